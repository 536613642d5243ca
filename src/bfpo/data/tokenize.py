"""Pairs and completions to token ids: one template, one shared prompt, one end token, and counts of what was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import BfpoError, DataError, LabelError, ModelError, SettingError
from bfpo.core.records import OPTIONAL
from bfpo.core.schema import Completion, Message, Pair, Prompt
from bfpo.data.chat import DEFAULT_CHAT_TEMPLATE, ChatEncoder, EncodedChat, RenderedChat, end_token_id
from bfpo.data.fidelity import common_length
from bfpo.data.rejects import RowError
from bfpo.data.rendered import is_mostly_rendered, rendered_note
from bfpo.data.template import RefusedChatError
from bfpo.data.thinking import message_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "PairTokenizer",
    "TokenPair",
    "TokenizeReport",
    "check_ids",
    "check_tokens",
    "end_token_id",
    "ids_to_check",
    "prompt_ids",
    "row_check",
    "token_notes",
    "tokenize_pairs",
]

Ids = npt.NDArray[np.int32]
Row = TypeVar("Row", bound=Pair | Completion)

# A batch for the tokenizer: enough rows to keep its threads busy, few enough characters to take little memory.
_ROWS_PER_BATCH, _CHARACTERS_PER_BATCH = 512, 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class TokenPair:
    """A pair as token ids, `(T,)` int32 each; both completions follow the same prompt and end with the end token
    unless they were cut. `ref_` log-probs (nats, summed) are `None` until precomputed. An unpaired answer, as every
    completion of `bfpo sft`, is the chosen completion, with no rejected id.
    """

    pair_id: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    chosen_is_safe: float
    rejected_is_safe: float
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None

    @property
    def is_alone(self) -> bool:
        """Whether it is one completion, with no rejected one."""
        return len(self.rejected_ids) == 0

    @property
    def title(self) -> str:
        """What it is and its id, for messages."""
        return f"{'completion' if self.is_alone else 'pair'} {self.pair_id}"


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """What tokenization saw and cut.

    `num_pairs` counts rows (pairs, or completions that stand alone), `prompt_truncated` prompts and
    `completion_truncated` completions that were cut, `cut_` and `num_tokens` tokens. `num_identical` counts pairs whose
    completions are the same ids (their margin stays 0, so they have no gradient), `num_boundary_moved` rows whose
    prompt lost tokens that merge with the answer or that the template does not write before a given one.

    `num_unfinished` counts completions that were cut when they were generated, so that they get no end token, and
    `num_without_prompt` rows that are unconditional text.

    `template_changes` counts rows by what the chat template deletes or moves, `openings` by how the start of an answer
    differs between generation and training; `first_changed` names the first row of each change. `rendered_before`
    counts rows whose text a chat template has rendered before, by the mark that shows it.
    """

    num_pairs: int = 0
    prompt_truncated: int = 0
    completion_truncated: int = 0
    cut_prompt_tokens: int = 0
    cut_completion_tokens: int = 0
    num_tokens: int = 0
    longest_tokens: int = 0
    num_identical: int = 0
    num_boundary_moved: int = 0
    num_unfinished: int = field(default=0, metadata=OPTIONAL)
    num_without_prompt: int = field(default=0, metadata=OPTIONAL)
    template_changes: dict[str, int] = field(default_factory=dict)
    openings: dict[str, int] = field(default_factory=dict)
    first_changed: dict[str, str] = field(default_factory=dict)
    rendered_before: dict[str, int] = field(default_factory=dict)

    @property
    def cut_tokens(self) -> int:
        """Tokens cut from prompts and completions together."""
        return self.cut_prompt_tokens + self.cut_completion_tokens

    def as_row(self) -> dict[str, Any]:
        """Return a dict, to be printed or written; counts by reason, and optional ones, where there are any."""
        optional = {one.name for one in fields(self) if one.metadata == OPTIONAL}
        return {name: value for name, value in asdict(self).items() if value != {} and (value or name not in optional)}


class _Counter:
    """Counts for a report."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._longest = 0
        self._changes: Counter[str] = Counter()
        self._openings: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._before: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        self._counts.update(counts)

    def longest(self, num_tokens: int) -> None:
        self._longest = max(self._longest, num_tokens)

    def rendered(self, name: str, chat: EncodedChat) -> None:
        self._changes.update(chat.changes)
        self._openings.update(chat.openings)
        self._before.update([chat.rendered] if chat.rendered else [])
        self._first = {**dict.fromkeys(chat.changes, name), **self._first} if chat.changes else self._first

    def report(self) -> TokenizeReport:
        facts: dict[str, Any] = {
            **self._counts,
            "longest_tokens": self._longest,
            "template_changes": dict(self._changes.most_common()),
            "openings": dict(self._openings.most_common()),
            "first_changed": self._first,
            "rendered_before": dict(self._before.most_common()),
        }
        return TokenizeReport(**facts)


@dataclass(frozen=True, slots=True)
class _Limits:
    max_length: int
    max_completion_length: int | None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise SettingError(f"max_length: got {self.max_length}; at least 2 tokens are needed (prompt, completion)")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise SettingError(f"max_completion_length: got {self.max_completion_length}; at least 1 token is needed")


class PairTokenizer:
    """Pairs and single completions to token ids, a batch at a time; `report` counts those returned so far.

    Lengths in tokens. The template is applied once to each whole conversation; a completion starts where the prompt
    (rendered with the generation prompt) is no longer a common beginning of both, so both follow the same ids. One that
    was not finished when it was generated gets no end token. To fit,
    completions are first cut on the right to `max_completion_length` (losing their end token), then the prompt on the
    left (keeping BOS) to `max_length`, and only then completions again.

    `num_embeddings`: the rows of the model's embedding, if known. `chat`: one that was made of these arguments.
    Raises `ModelError` for a tokenizer without EOS, `SettingError` for a length that leaves no room.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        max_completion_length: int | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        num_embeddings: int | None = None,
        chat: ChatEncoder | None = None,
    ) -> None:
        self._limits = _Limits(max_length, max_completion_length)
        self._chat = chat or ChatEncoder(tokenizer, chat_template, chat_template_kwargs)
        self._counter = _Counter()
        self._num_embeddings = ids_to_check(tokenizer, num_embeddings)

    @property
    def report(self) -> TokenizeReport:
        """What was seen and cut so far."""
        return self._counter.report()

    def __call__(self, rows: Iterable[Pair | Completion]) -> Iterator[TokenPair]:
        """Yield the rows as token ids, in their order.

        Raises `DataError` for an empty completion and `LabelError` for an unknown label of a pair, with the row's id,
        and `ModelError` for a token that the model's embedding lacks.
        """
        for row, encoded in _encoded(rows, self._rendered, self._chat):
            yield self._token_pair(row, encoded)

    def _rendered(self, row: Pair | Completion) -> RenderedChat:
        if isinstance(row, Pair) and (row.chosen_is_safe is None or row.rejected_is_safe is None):
            raise LabelError(f"pair {row.id}: a safety label is unknown; resolve unknown labels before tokenizing")
        return _render(row, self._chat)

    def _token_pair(self, row: Pair | Completion, encoded: EncodedChat) -> TokenPair:
        if isinstance(row, Completion):
            name, labels = f"completion {row.id}", (1.0, 1.0)
        else:
            assert row.chosen_is_safe is not None  # checked by _rendered
            assert row.rejected_is_safe is not None
            name, labels = f"pair {row.id}", (row.chosen_is_safe, row.rejected_is_safe)
        prompt, answers = _shared_prompt(name, encoded, _finished(row), self._chat, self._counter)
        prompt, answers = _cut(prompt, answers, self._chat, self._limits, self._counter)
        chosen, rejected = [*answers, []][:2]
        self._counter.add(num_identical=chosen == rejected, num_without_prompt=not row.prompt)
        for ids in (prompt, chosen, rejected):
            check_ids(ids, self._chat.tokenizer, self._num_embeddings, name)
        as_ids = partial(np.asarray, dtype=np.int32)
        return TokenPair(row.id, as_ids(prompt), as_ids(chosen), as_ids(rejected), *labels)


def tokenize_pairs(
    rows: Iterable[Pair | Completion], tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> tuple[list[TokenPair], TokenizeReport]:
    """Return rows as token ids and the report of what was cut: `PairTokenizer` on rows that fit in memory.

    `settings`: keyword arguments of `PairTokenizer`. Raises as it does.
    """
    tokenize = PairTokenizer(tokenizer, **settings)
    return list(tokenize(rows)), tokenize.report


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    tools: str = "",
) -> list[int]:
    """Return the ids to generate from: the same template with its generation prompt, cut on the left (keeping BOS).

    Without messages it is the one token that unconditional text starts from; a message of the assistant at the end is
    continued. `tools` as in `Prompt`. Raises `SettingError` if `max_length` is 0 or less.
    """
    if max_length is not None and max_length < 1:
        raise SettingError(f"max_length: got {max_length}; at least 1 token is needed")
    chat = ChatEncoder(tokenizer, chat_template, chat_template_kwargs)
    ids = chat.encode(messages, (), name="prompt", tools=tools).prompt
    return ids if max_length is None else _cut_left(ids, max_length, chat.bos_id)


# ------------------------------------------------------------------------------------------------------- checks


def row_check(chat: ChatEncoder) -> Callable[[Pair | Completion | Prompt], None]:
    """Return a check that raises `RowError` for a row that the chat template refuses."""

    def check(row: Pair | Completion | Prompt) -> None:
        try:
            _render(row, chat)
        except RefusedChatError as error:
            raise RowError("prompt", "the chat template refuses this conversation", str(error.__cause__)) from error

    return check


def token_notes(name: str, row: Mapping[str, Any]) -> list[str]:
    """Return in words what a report (`as_row`) counts that changes what training learns; `name`: of the stream."""
    total, same = row.get("num_pairs", 0), row.get("num_identical", 0)
    notes = [f"{same} of {total} pairs have two identical completions, from which nothing is learned"] if same else []
    if num := row.get("num_unfinished"):
        notes.append(f"{num} completions were cut off when they were generated; no end token follows")
    if num := row.get("num_without_prompt"):
        notes.append(f"{num} of {total} rows have no prompt; their completions are learned as text without one")
    notes += [f"the chat template: {reason} ({num} of {total})" for reason, num in _counted(row, "template_changes")]
    notes += [f"the chat template: {opening} ({num} of {total})" for opening, num in _counted(row, "openings")]
    notes += [rendered_note(row["rendered_before"], total)] if "rendered_before" in row else []
    return [f"{name}: {note}" for note in notes]


def check_tokens(name: str, row: Mapping[str, Any], *, allow_changes: bool, allow_rendered: bool) -> None:
    """Raise `DataError` if a report (`as_row`) has only identical pairs, or what is not allowed.

    That is changes by the template, and text that was rendered before in at least half of the rows.
    """
    before = row.get("rendered_before", {})
    if is_mostly_rendered(sum(before.values()), row["num_pairs"]) and not allow_rendered:
        raise DataError(
            f"{name}: {rendered_note(before, row['num_pairs'])}: they were rendered with a chat template before, and "
            "would be a second time; use the plain text of prompts and completions, or messages, or take these tokens "
            "as text with allow_rendered_text: true"
        )
    changes = [f"{reason}: {num} of {row['num_pairs']}" for reason, num in _counted(row, "template_changes")]
    if changes and not allow_changes:
        first = next(iter(row["first_changed"].values()))
        raise DataError(
            f"{name}: the chat template does not keep the text of the rows ({'; '.join(changes)}; first: {first}); "
            "pass another one with chat_template, or train on what it leaves with allow_template_changes: true"
        )
    if row["num_identical"] and row["num_identical"] == row["num_pairs"]:
        raise DataError(
            f"{name}: the two completions of all {row['num_pairs']} pairs are identical after the chat template and "
            "the cuts to max_length and max_completion_length, so that nothing can be learned; raise these limits, or "
            "check the template and the files"
        )


def _counted(row: Mapping[str, Any], name: str) -> list[tuple[str, int]]:
    return list(row.get(name, {}).items())


def ids_to_check(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> int | None:
    """Return `num_embeddings` if the tokenizer has ids beyond these rows of an embedding, else `None`."""
    if num_embeddings is None:
        return None
    return num_embeddings if max(tokenizer.get_vocab().values(), default=0) >= num_embeddings else None


def check_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None, name: str) -> None:
    """Raise `ModelError` for an id for which the model has no row in its embedding; `name`: of the text."""
    if num_embeddings is not None and ids and (largest := max(ids)) >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"{name}: token id {largest} ({token!r}), and the model's embedding has {num_embeddings} rows; use the "
            "tokenizer that belongs to the model, or resize the embedding (resize_token_embeddings of transformers) "
            "and save both again"
        )


# ---------------------------------------------------------------------------------------------------- rendering


def _render(row: Pair | Completion | Prompt, chat: ChatEncoder) -> RenderedChat:
    if isinstance(row, Prompt):
        return chat.render(row.messages, (), name=f"prompt {row.id}", tools=row.tools)
    if isinstance(row, Pair):
        name = f"pair {row.id}"
        texts = {"chosen": (row.chosen, row.chosen_extra), "rejected": (row.rejected, row.rejected_extra)}
        texts = {"chosen": texts["chosen"]} if row.unpaired else texts
    else:
        name, texts = f"completion {row.id}", {"text": (row.text, message_extra(row))}
    for field_name, (text, extra) in texts.items():
        if not text.strip() and not extra:
            raise DataError(f"{name}: {field_name}: got {text!r}; a completion needs text")
    answers = [Message("assistant", *both) for both in texts.values()]
    return chat.render(row.prompt, answers, name=name, tools=row.tools, finished=_finished(row))


def _finished(row: Pair | Completion) -> list[bool]:
    """Return of each answer whether the model ended it."""
    if isinstance(row, Completion):
        return [row.finished]
    return [row.chosen_finished, row.rejected_finished][: 1 if row.unpaired else 2]


def _encoded(
    rows: Iterable[Row], render: Callable[[Row], RenderedChat], chat: ChatEncoder
) -> Iterator[tuple[Row, EncodedChat]]:
    for batch, failure in _batches(rows, render):
        encoded = chat.encode_rendered([rendered for _, rendered in batch])
        yield from zip((row for row, _ in batch), encoded, strict=True)
        if failure is not None:
            raise failure


def _batches(
    rows: Iterable[Row], render: Callable[[Row], RenderedChat]
) -> Iterator[tuple[list[tuple[Row, RenderedChat]], BfpoError | None]]:
    """Yield batches of rows with their rendered texts; the rows before one that fails come with its error."""
    batch: list[tuple[Row, RenderedChat]] = []
    num_characters = 0
    try:
        for row in rows:
            rendered = render(row)
            batch.append((row, rendered))
            num_characters += sum(map(len, rendered.texts))
            if len(batch) == _ROWS_PER_BATCH or num_characters >= _CHARACTERS_PER_BATCH:
                yield batch, None
                batch, num_characters = [], 0
    except BfpoError as error:
        yield batch, error
    else:
        yield batch, None


def _shared_prompt(
    name: str, encoded: EncodedChat, finished: Sequence[bool], chat: ChatEncoder, counter: _Counter
) -> tuple[list[int], list[list[int]]]:
    """Return the shared prompt and the rest of each conversation, with an end token where it is finished."""
    start = min(common_length(encoded.prompt, ids) for ids in encoded.conversations)
    if start == 0:
        raise ModelError(f"{name}: the chat template writes no common beginning for the prompt and the conversation")
    counter.add(num_pairs=1, num_boundary_moved=start < len(encoded.prompt), num_unfinished=finished.count(False))
    counter.rendered(name, encoded)
    return encoded.prompt[:start], [
        ([] if whole else ids[start:]) or chat.ended(ids)[start:]  # a template may write nothing of an answer
        for ids, whole in zip(encoded.conversations, finished, strict=True)
    ]


def _cut(
    prompt: list[int], answers: list[list[int]], chat: ChatEncoder, limits: _Limits, counter: _Counter
) -> tuple[list[int], list[list[int]]]:
    """Cut to the limits in the order that keeps completions longest, and count."""
    allowed = limits.max_completion_length
    kept = answers if allowed is None else [ids[:allowed] for ids in answers]
    room = max(1, limits.max_length - max(map(len, kept)))
    shorter = _cut_left(prompt, room, chat.bos_id)
    kept = [ids[: limits.max_length - len(shorter)] for ids in kept]
    lost = [len(ids) - len(rest) for ids, rest in zip(answers, kept, strict=True)]
    counter.add(
        prompt_truncated=len(shorter) < len(prompt),
        cut_prompt_tokens=len(prompt) - len(shorter),
        completion_truncated=sum(count > 0 for count in lost),
        cut_completion_tokens=sum(lost),
        num_tokens=sum(len(shorter) + len(ids) for ids in kept),
    )
    counter.longest(len(shorter) + max(map(len, kept)))
    return shorter, kept


def _cut_left(ids: list[int], length: int, bos_id: int | None) -> list[int]:
    if len(ids) <= length:
        return ids
    if bos_id is not None and ids[0] == bos_id:
        return [bos_id, *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]
