"""What the training stages read before any weights: the tokenizer, the model's sizes, the data and their tokens."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bfpo.config import AlignConfig, SftConfig, read_template
from bfpo.core.errors import DataError, LabelError, ServerError, SettingError
from bfpo.core.files import user_cache_folder
from bfpo.core.schema import Completion, Pair
from bfpo.data.chat import ChatEncoder
from bfpo.data.load import CompletionStream, Hashes, PairStream, RowStream
from bfpo.data.rejects import Reject
from bfpo.data.tokenize import (
    PairTokenizer,
    TokenPair,
    check_tokens,
    ids_to_check,
    row_check,
    token_notes,
)
from bfpo.judges.needless import check_kept
from bfpo.objective.methods import ReadsBeside
from bfpo.policy.load import Policy, initial_config, load_policy, load_tokenizer
from bfpo.policy.recompute import set_recompute
from bfpo.policy.source import check_text_only, num_embeddings, num_positions, read_config
from bfpo.runs.folder import RunFolder

__all__ = [
    "REJECTS",
    "Start",
    "TrainingConfig",
    "checked_lines",
    "data_sections",
    "describe_tokens",
    "lacking_tokens",
    "load_start",
    "pair_categories",
    "read_start",
    "reference_cache",
    "report_data",
    "row_counts",
    "row_streams",
    "start_notes",
    "template_facts",
    "trained_hashes",
    "write_rejects",
]

logger = logging.getLogger(__name__)

REJECTS = "rejects.jsonl"
TrainingConfig = AlignConfig | SftConfig
_KEPT_CHARACTERS = 2**22
_use_up = partial(deque[Any], maxlen=0)  # keeps nothing


@dataclass(frozen=True)
class Start:
    """The model that training starts from, without its weights; a size is `None` where the config has none.

    `settings`: the keyword arguments of `PairTokenizer`.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    num_embeddings: int | None
    num_positions: int | None

    @cached_property
    def chat(self) -> ChatEncoder:
        """The tokenizer with its chat template; it keeps texts of the first checked rows until they are encoded."""
        names = ("chat_template", "chat_template_kwargs")
        chat = ChatEncoder(self.tokenizer, *(self.settings.get(name) for name in names))
        chat.keep_rendered(_KEPT_CHARACTERS)
        return chat

    def row_check(self) -> Callable[[Pair | Completion], None]:
        """Return the check that raises `RowError` for a row that the chat template refuses."""
        return row_check(self.chat)


def read_start(config: TrainingConfig) -> Start:
    """Read tokenizer and config of the start; raises `ModelError` for either, `ConfigError` for the template's file."""
    init = config.init if isinstance(config, SftConfig) else None
    if init is not None:
        tokenizer = load_tokenizer(init.tokenizer)
        shape: Any = initial_config(init.config, tokenizer)
    else:
        assert config.model is not None
        tokenizer = load_tokenizer(config.model, revision=config.revision)
        shape = read_config(config.model, revision=config.revision)
        check_text_only(config.model, shape)
    rows = num_embeddings(shape)
    if isinstance(config, AlignConfig) and config.margin_model is not None:  # it reads the same tokens
        rows = min(filter(None, (rows, num_embeddings(read_config(config.margin_model)))), default=None)
    settings: dict[str, Any] = {
        "max_length": config.max_length,
        "max_completion_length": config.max_completion_length,
        "chat_template": read_template(config.chat_template),
    }
    if config.chat_template_kwargs:
        settings["chat_template_kwargs"] = config.chat_template_kwargs
    return Start(tokenizer, settings, rows, num_positions(shape))


def load_start(config: TrainingConfig, *, dropout: bool = False) -> Policy:
    """Load the model that training starts from, with what trains chosen; raises as `load_policy` does."""
    assert config.model is not None  # of `bfpo sft`, whose `init` has no model
    policy = load_policy(
        config.model,
        trainable="all" if config.lora is not None else config.trainable,
        lora=config.lora,
        quantize=config.quantize,
        dtype=config.dtype,
        masters=True,
        revision=config.revision,
        seed=config.seed,
        dropout=dropout,
    )
    recompute(policy, config)
    return policy


def recompute(policy: Policy, config: TrainingConfig) -> None:
    """Switch on what `gradient_checkpointing` asks for; raises as `set_recompute` does."""
    if config.gradient_checkpointing:
        set_recompute(policy.model, config.gradient_checkpointing)


def data_sections(config: TrainingConfig) -> dict[str, Any]:
    """Return the data sections that are given, by name; the main stream comes first."""
    sections = {name: getattr(config, name, None) for name in ("data", "buffer", "eval_data")}
    return {name: section for name, section in sections.items() if section is not None}


def row_streams(config: TrainingConfig, start: Start) -> dict[str, RowStream[Any]]:
    """Return the pairs or completions of each section, read on first use.

    A row that the chat template refuses is a bad one, and one that a section leaves out is not read.
    """
    kind: Any = PairStream if isinstance(config, AlignConfig) else CompletionStream
    is_taken = start.row_check()

    def stream(section: Any) -> RowStream[Any]:
        kept = check_kept(section.leave_out) if getattr(section, "leave_out", None) else None

        def check(row: Pair | Completion) -> None:
            is_taken(row)
            if kept is not None and isinstance(row, Completion):
                kept(row)

        found: RowStream[Any] = kind(section, seed=config.seed, check=check)
        return found

    return {name: stream(section) for name, section in data_sections(config).items()}


def pair_categories(config: AlignConfig) -> list[list[str]] | None:
    """Return the category of each pair of each section, "" for none; `None` for a method that does not read them.

    The files are read for it once more, so that no other method's tokens carry a column of names.
    """
    method = config.method_object()
    if not isinstance(method, ReadsBeside) or method.state_by != "category":
        return None
    found = [[pair.category for pair in stream] for stream in row_streams(config, read_start(config)).values()]
    if not any(name for names in found for name in names):
        logger.warning("%s: no pair has a category (column: category), so all of them share one margin", method.name)
    return found


def row_counts(streams: Mapping[str, RowStream[Any]]) -> dict[str, Any]:
    """Return the counts of each section, as `data.json` has them."""
    return {name: stream.scan().counts for name, stream in streams.items()}


def trained_hashes(streams: Mapping[str, RowStream[Any]]) -> Iterator[Hashes]:
    """Yield the hashes of the prompts of each stream that is trained on."""
    return (stream.scan().hashes for name, stream in streams.items() if name != "eval_data")


def lacking_tokens(config: TrainingConfig) -> list[str]:
    """Return the tokens of the tokenizer that the model's embedding lacks, each with its id.

    If there are any, the rows of the data are looked through for them: raises `ModelError` for the first.
    """
    start = read_start(config)
    limit = ids_to_check(start.tokenizer, start.num_embeddings)
    if limit is None:
        return []
    with suppress(DataError, LabelError, ServerError):  # other faults of the data, or files that are not here
        describe_tokens(config, start)
    lacking = {number: token for token, number in start.tokenizer.get_vocab().items() if number >= limit}
    return [f"{token!r} ({number})" for number, token in sorted(lacking.items())]


def reference_cache(config: AlignConfig) -> str:
    """Return the root folder of the reference log-probs: the config's, else that of the user."""
    return config.reference_cache or str(user_cache_folder("reference"))


# Descriptions


def describe_tokens(
    config: TrainingConfig,
    start: Start,
    take: Callable[[Iterator[TokenPair]], object] = _use_up,
    *,
    streams: Mapping[str, RowStream[Any]] | None = None,
) -> list[str]:
    """Return lines for each section: its pairs by cell or its completions, what was cut and changed.

    `streams`: those of `row_streams`, if they are needed elsewhere too. `take` gets the tokens of each section and
    uses them up; by default rows are counted, not kept. Raises `DataError` as training does for pairs that nothing can
    be learned from.
    """
    lines, rows = [], []
    for name, pairs in (streams or row_streams(config, start)).items():
        tokenize = PairTokenizer(
            start.tokenizer, **start.settings, num_embeddings=start.num_embeddings, chat=start.chat
        )
        take(tokenize(pairs))
        rows.append(tokenize.report.as_row())
        lines += checked_lines(config, name, pairs.scan().counts, rows[-1])
    return [*lines, *start_notes(start, rows)]


def checked_lines(config: TrainingConfig, name: str, counts: Mapping[str, Any], tokens: Mapping[str, Any]) -> list[str]:
    """Return lines on an input, from its counts and the row of its report of tokens; raises as `check_tokens`.

    Raises `SettingError` if `best` compares a label cell of which there is no held-out pair.
    """
    _check(config, name, counts, tokens)
    return [_describe_data(name, counts, tokens), *token_notes(name, tokens)]


def _describe_data(name: str, counts: Mapping[str, Any], tokens: Mapping[str, Any]) -> str:
    """Return the counts of a stream in one line, those that are zero left out."""
    unit = "pairs" if "cells" in counts else "completions"
    lines = [f"{name}: {counts[unit]} {unit}"]
    if "cells" in counts:
        lines.append("by cell (chosen-rejected) " + ", ".join(f"{cell} {n}" for cell, n in counts["cells"].items()))
    shown = {"rows_rejected": "rows rejected", "labels_set_safe": "with a label set to safe"}
    shown["pairs_without_label_dropped"] = "dropped for a missing label"
    lines += [f"{counts[key]} {text}" for key, text in shown.items() if counts.get(key)]
    if left := counts.get("left_out"):
        lines.append("left out " + ", ".join(f"{n} ({reason})" for reason, n in left.items()))
    cut = {"prompt_truncated": "prompts cut", "completion_truncated": "completions cut"}
    return "; ".join([*lines, *(f"{tokens[key]} {text}" for key, text in cut.items() if tokens[key])])


def start_notes(start: Start, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what to know of the start: a chat template that dates itself, and fewer positions than texts have tokens.

    `rows`: the reports of tokens.
    """
    notes = [start.chat.date_note] if start.chat.date_note else []
    longest, limit = max((row["longest_tokens"] for row in rows), default=0), start.num_positions
    if limit is not None and longest > limit:
        notes.append(
            f"the longest text has {longest} tokens, more than the {limit} positions of the model, which was not "
            f"trained on texts of this length; max_length: {limit} would cut them"
        )
    return notes


def report_data(
    folder: RunFolder,
    start: Start,
    streams: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]],
    config: TrainingConfig,
) -> None:
    """Write `data.json`, log one line per stream and what its tokens show, and check them.

    `streams`: name -> (the counts of `load_pairs` or `load_completions`, the row of the report of tokenization).
    Raises as `checked_lines` does.
    """
    folder.write_json("data.json", {name: {**counts, "tokens": tokens} for name, (counts, tokens) in streams.items()})
    rows = {name: tokens for name, (_, tokens) in streams.items()}
    if folder.is_writer:
        for name, (counts, tokens) in streams.items():
            logger.info("%s", _describe_data(name, counts, tokens))
        notes = [note for name, tokens in rows.items() for note in token_notes(name, tokens)]
        for note in [*notes, *start_notes(start, rows.values())]:
            logger.warning("%s", note)
    for name, (counts, tokens) in streams.items():
        _check(config, name, counts, tokens)


def _check(config: TrainingConfig, name: str, counts: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    """Raise as `checked_lines`."""
    check_tokens(name, tokens, allow_changes=config.allow_template_changes, allow_rendered=config.allow_rendered_text)
    metric = "" if config.best is None or name != "eval_data" else config.best.metric
    cell = metric.rpartition("/")[0]
    if cell and not counts["cells"].get(cell):
        there = ", ".join(one for one, num in counts["cells"].items() if num)
        raise SettingError(
            f"best.metric: got {metric!r}, and no pair of eval_data is {cell} (chosen-rejected); it has: "
            f"{there}; compare one of these or all pairs, or add such pairs"
        )
    if cell and _drops(config, cell):
        raise SettingError(
            f"best.metric: got {metric!r}, and the method drops pairs that are {cell} (chosen-rejected): they have no "
            "loss to compare; compare another cell or all pairs"
        )


def _drops(config: TrainingConfig, cell: str) -> bool:
    if not isinstance(config, AlignConfig) or (method := config.method_object()).reads:
        return False  # no method that reads more than the margin drops pairs
    labels = (torch.tensor([float(label == "safe")]) for label in cell.split("-"))
    return bool(method.loss(torch.zeros(1), *labels).dropped)


def template_facts(config: TrainingConfig, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what a model's card says of the chat template and of the tokens of each stream; empty if nothing."""
    facts = {}
    if config.chat_template is not None:
        facts["chat template"] = config.chat_template
    if config.chat_template_kwargs:
        given = config.chat_template_kwargs.items()
        facts["chat template settings"] = ", ".join(f"{name}: {value}" for name, value in given)
    notes = [note for name, tokens in rows.items() for note in token_notes(name, tokens)]
    return {**facts, "notes on the data": "; ".join(notes)} if notes else facts


def write_rejects(folder: RunFolder, rejects: Mapping[str, Sequence[Reject]]) -> None:
    """Write `rejects.jsonl`: the rows of each stream that could not be used."""
    rows = [{"input": name, **reject.as_row()} for name, some in rejects.items() for reject in some]
    folder.write_jsonl(REJECTS, rows)
