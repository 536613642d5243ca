"""Conversations to token ids: the chat template, its end token, and text that looks like a special token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from bfpo.core.errors import DataError, ModelError
from bfpo.core.schema import Completion, Message, canonical_json, from_canonical
from bfpo.data.fidelity import changed_texts, common_length, moves_prompt, opening_difference, shortest_text
from bfpo.data.messages import ends_with_assistant, without_empty_end
from bfpo.data.rendered import RenderedText
from bfpo.data.template import (
    DEFAULT_CHAT_TEMPLATE,
    ChatTemplate,
    RefusedChatError,
    called_functions,
    with_template,
)
from bfpo.data.thinking import MARKS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "ChatEncoder",
    "EncodedChat",
    "RenderedChat",
    "TextEncoder",
    "end_token_id",
    "unused_character",
    "whole_answer",
]

_PROBE = "bfpoprobeanswer"
_TEXTS_COMPARED = 8
_ANCHOR = "\n"
_SHORT = 12  # a text of fewer characters may occur in the template's own text


class TextEncoder:
    """Encode text without adding special tokens; marked text is never read as a special token.

    A completion may hold `</s>` or `<|im_start|>` as text. `escape` marks such parts before a template renders the
    text; `encode_marked` then encodes them as plain text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        control_tokens: Sequence[str] = (),
        markers: Sequence[str] = (),
    ) -> None:
        """`control_tokens` are tokens of the vocabulary that are not special; `markers` are strings of a template.

        A marker in marked text is split in two, so that it never gets the ids of the template's own marker.
        """
        self._tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        special = {content for content, token in added.items() if token.special} | set(tokenizer.all_special_tokens)
        self._not_special = {*control_tokens, *markers} - special
        self._strips = {content: (token.lstrip, token.rstrip) for content, token in added.items()}
        self._tokens = _any_of(special | set(control_tokens))
        self._control = _any_of(special | set(control_tokens) | set(markers))
        self._anchor = self._anchor_ids()

    def holds_control_token(self, text: str) -> bool:
        """Return whether some part of the text would be read as a special token."""
        return self._control.search(text) is not None

    def escape(self, text: str, mark: str) -> str:
        """Put `mark`, a character that no text contains, around every such part."""
        return self._control.sub(lambda match: f"{mark}{match.group()}{mark}", text)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each unmarked text; many texts are encoded by the threads of a fast tokenizer.

        The fast path skips the offsets of tokens, half of the work. The first few texts also go through a normal call:
        it sets the tokenizer's options (truncation, padding, special tokens as text), and its ids show whether the fast
        path gives the same ones. If not, all texts go through the normal call.
        """
        if len(texts) <= _TEXTS_COMPARED or not self._tokenizer.is_fast:
            return self._call(texts)
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        first = self._call(texts[:_TEXTS_COMPARED])
        ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return ids if ids[:_TEXTS_COMPARED] == first else self._call(texts)

    def _call(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return cast("list[list[int]]", self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Return the ids of marked text: marked parts as plain text, unmarked special tokens as themselves.

        A tokenizer encodes the text between two special tokens on its own, so encoding these parts one by one gives the
        ids of the whole text, except for marked parts. SentencePiece puts a space before the first of them only.
        """
        ids: list[int] = []
        plain = ""
        # Marked parts by their pattern, not by parity: a template that cuts a text may leave a single mark.
        for number, part in enumerate(re.split(f"{mark}({self._control.pattern}){mark}", text)):
            part = part.replace(mark, "")
            if number % 2:
                if part in self._not_special:  # `split_special_tokens` does not split these: cut them in two
                    ids += self._encode_plain(plain + part[:1], within=bool(ids))
                    plain = part[1:]
                else:
                    plain += part
                continue
            position = 0
            for match in self._tokens.finditer(part):
                token = match.group()
                left, right = self._strips.get(token, (False, False))
                before = plain + part[position : match.start()]
                ids += self._encode_plain(before.rstrip() if left else before, within=bool(ids))
                ids.append(cast(int, self._tokenizer.convert_tokens_to_ids(token)))
                plain = ""
                position = match.end() + (len(part[match.end() :]) - len(part[match.end() :].lstrip()) if right else 0)
            plain += part[position:]
        return ids + self._encode_plain(plain, within=bool(ids))

    def _encode_plain(self, text: str, *, within: bool = False) -> list[int]:
        """Return the ids of plain text; `within`: it is not the beginning of the whole text."""
        if not text:
            return []
        anchor = self._anchor if within else []
        ids = self._plain_ids(_ANCHOR + text if anchor else text)
        if ids[: len(anchor)] != anchor:  # a token of both
            return self._plain_ids(text)
        return ids[len(anchor) :]

    def _plain_ids(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return cast("list[int]", encoded["input_ids"])

    def _anchor_ids(self) -> list[int]:
        """Return the ids of a text in front of others that keeps them from beginning as a whole text does.

        Empty where a text begins alike behind a special token, and if no such text is found.
        """
        end, probe = self._tokenizer.eos_token, "x"
        if not isinstance(end, str):
            return []
        token, *behind = self._call([end + probe])[0]
        if token != self._tokenizer.eos_token_id or behind == self._plain_ids(probe):
            return []
        anchor = self._plain_ids(_ANCHOR)
        return anchor if self._plain_ids(_ANCHOR + probe) == [*anchor, *behind] else []


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """Texts to encode: the prompt and whole conversations, or answers alone, which then follow `start`.

    `mark` is the character around parts that look like special tokens but are text; `None` if there are no such parts.
    `changes`, `openings` and `rendered` as in `EncodedChat`.
    """

    texts: list[str]
    mark: str | None
    start: list[int] | None = None
    changes: tuple[str, ...] = ()
    openings: tuple[str, ...] = ()
    rendered: str = ""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Ids of a prompt (with the generation prompt) and of whole conversations, each ending with the end token.

    `changes`: what the template deletes or moves (`changed_texts`); `openings`: how the start of an answer differs
    between generation and training (`opening_difference`); `rendered`: the mark that shows that the texts were rendered
    with a template before (`RenderedText`), "" without one.
    """

    prompt: list[int]
    conversations: list[list[int]]
    changes: tuple[str, ...] = ()
    openings: tuple[str, ...] = ()
    rendered: str = ""


def _size(chat: RenderedChat) -> int:
    return sum(map(len, chat.texts))


class ChatEncoder:
    """A tokenizer with a chat template: `chat_template`, else the tokenizer's, else `DEFAULT_CHAT_TEMPLATE`.

    `variables`: values of the template's variables (`chat_template_kwargs`). `end_id` is the token that ends an
    assistant turn: the first special token that the template writes after the answer, else the tokenizer's EOS.
    `opening`: how the template opens an answer differently in generation and in training; empty if it does not.
    `date_note`: what to know of a template that writes the date of today; empty for others.

    Raises `ModelError` if the tokenizer has no EOS or the template cannot be used, `SettingError` for a variable that
    the template does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        if eos is None or (eos == tokenizer.unk_token_id and tokenizer.eos_token != tokenizer.unk_token):
            raise ModelError(
                f"eos_token: got {tokenizer.eos_token!r}, which is not a token of this tokenizer; completions "
                "need an end token. Set tokenizer.eos_token to the token that ends a text and save the tokenizer again"
            )
        self.eos_id = cast(int, eos)
        self.bos_id = cast("int | None", tokenizer.bos_token_id)
        self._template = ChatTemplate(tokenizer, chat_template, variables)
        self._suffix, end = self._probe()
        self.end_id = self.eos_id if end is None else cast(int, tokenizer.convert_tokens_to_ids(end))
        # The template's text up to its end token is part of the turn; without one, EOS follows the answer itself.
        self._ending = "" if end is None else self._suffix[: self._suffix.index(end) + len(end)]
        self._text = TextEncoder(tokenizer, () if end is None else (end,))
        self._thoughts = tuple(opening for opening, _ in MARKS if self._text.holds_control_token(opening))
        self._changes_by_form: dict[tuple[object, ...], tuple[str, ...]] = {}
        self._kept: dict[tuple[object, ...], RenderedChat] = {}
        self._room = 0

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the texts."""
        return self._tokenizer

    @property
    def saved_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the template in it, for the folder of a model; values of variables are not stored."""
        text = self._template.text
        return self._tokenizer if text is None else with_template(self._tokenizer, text)

    def _probe(self) -> tuple[str, str | None]:
        """Return what the template writes after an answer and the first added token in it, if any.

        Sets `opening` and `date_note`.
        """
        question, answer = Message("user", "bfpoprobequestion"), Message("assistant", _PROBE)
        try:
            rendered = self._template.render((question, answer))
            head = self._template.render((question,), generation=True)
        except RefusedChatError as error:
            raise ModelError(f"the chat template cannot render a user and an assistant turn: {error}") from error
        if rendered.count(_PROBE) != 1:
            raise ModelError("the chat template does not write the assistant's answer once and unchanged; pass another")
        before, _, suffix = rendered.partition(_PROBE)
        self.opening = opening_difference(head, rendered.removesuffix(suffix), _PROBE)
        self.date_note = self._template.date_note(head)
        self._written = before.removeprefix(head).strip() if before.startswith(head) else ""
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        added |= set(self._tokenizer.all_special_tokens)
        written = sorted(token for token in added if token in head + rendered)
        self._before = RenderedText(written, head.partition(question.content)[2])
        tokens = [token for token in added if token.strip() and token in suffix]
        return suffix, min(tokens, key=lambda token: (suffix.index(token), -len(token)), default=None)

    def encode(
        self, prompt: Sequence[Message], answers: Sequence[str | Message], *, name: str, tools: str = ""
    ) -> EncodedChat:
        """Return the ids of the prompt and of the prompt with each answer; `name`: of the row, for errors.

        An answer that is a message may hold tool calls or reasoning; `tools` as in `Pair`. An answer continues a
        message of the assistant that ends the prompt. An empty prompt means unconditional text: no template, and BOS
        (EOS if there is no BOS) as the first token. Raises `RefusedChatError` if the template refuses.
        """
        return self.encode_rendered([self.render(prompt, answers, name=name, tools=tools)])[0]

    def keep_rendered(self, characters: int) -> None:
        """Keep the texts of `render`, of so many characters in all, for the next time that it is asked for the same.

        For rows that are checked in one pass and encoded in the next. What is kept is given once.
        """
        self._room = characters

    def render(
        self,
        prompt: Sequence[Message],
        answers: Sequence[str | Message],
        *,
        name: str,
        tools: str = "",
        finished: Sequence[bool] | None = None,
    ) -> RenderedChat:
        """Return the texts whose ids `encode` returns, for `encode_rendered`. Raises as `encode` does.

        `finished`: of each answer, whether its turn ends after it (`None`: all do); else nothing follows its text.
        """
        last = [Message("assistant", answer) if isinstance(answer, str) else answer for answer in answers]
        finished = tuple(finished or [True] * len(last))
        key = (tuple(prompt), tuple(last), tools, finished)
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._room += _size(kept)
            return kept
        made = self._rendered(prompt, last, name, tools, finished)
        if 0 < _size(made) <= self._room:
            self._room -= _size(made)
            self._kept[key] = made
        return made

    def _rendered(
        self, prompt: Sequence[Message], last: list[Message], name: str, tools: str, finished: Sequence[bool]
    ) -> RenderedChat:
        before = self._before.mark(prompt, last)
        begun: Message | None = None
        if prompt and prompt[-1].role == "assistant":  # the answer continues this message, unless it is empty
            prompt, begun = prompt[:-1], prompt[-1] if ends_with_assistant(prompt) else None
            last = last if begun is None else [_joined(begun, answer) for answer in last]
        texts = [tools, *(text for message in (*prompt, *last) for text in (message.content, message.extra))]
        texts += [] if begun is None else [begun.content, begun.extra]
        mark = unused_character(texts) if any(map(self._text.holds_control_token, texts)) else None
        if not prompt and begun is None and not tools and not any(message.extra for message in last):
            start = [self.eos_id if self.bos_id is None else self.bos_id]
            return RenderedChat([self._escape(message.content, mark) for message in last], mark, start, rendered=before)
        try:
            if begun is not None and called_functions(from_canonical(begun.extra) or {}):
                raise RefusedChatError("it ends with a tool call of the assistant; the tool's message must follow")
            rendered = self._texts(prompt, begun, last, tools, mark)
            plain = rendered if mark is None else [text.replace(mark, "") for text in rendered]
            changes = self._changes(prompt, begun, last, tools, plain)
        except RefusedChatError as error:
            raise RefusedChatError(f"{name}: the chat template refuses this conversation: {error}") from error
        openings = [
            opening_difference(
                plain[0],
                text.removesuffix(self._ending),
                "" if begun is not None or message.extra else message.content,
            )
            for text, message in zip(plain[1:], last, strict=True)
        ]
        if moves_prompt(changes):  # the openings then hold its text, another one in every row
            openings = []
        openings += [
            f'generation opens thoughts with the token "{opening}", training has it as text'
            for opening in self._thoughts
            if any(message.content.lstrip().startswith(opening) for message in last)
        ]
        answered = [
            text if whole else text.removesuffix(self._ending)
            for text, whole in zip(rendered[1:], finished, strict=True)
        ]
        openings = list(dict.fromkeys(filter(None, openings)))
        return RenderedChat([rendered[0], *answered], mark, None, changes, tuple(openings), before)

    def _texts(
        self, prompt: Sequence[Message], begun: Message | None, last: Sequence[Message], tools: str, mark: str | None
    ) -> list[str]:
        """Return the prompt with the generation prompt, or up to the end of `begun`, and the whole conversations."""
        if mark is not None:
            prompt, last = self._escaped(prompt, mark), self._escaped(last, mark)
            begun = None if begun is None else self._escaped([begun], mark)[0]
            tools = _escaped_json(tools, lambda text: self._escape(text, mark))
        if begun is None:
            head = self._template.render(prompt, generation=True, tools=tools)
        else:
            head = self._template.render([*prompt, begun], continued=True, tools=tools)
        full = [self._template.render([*prompt, message], tools=tools) for message in last]
        return [head, *(self._without_suffix(text, head) + self._ending for text in full)]

    def _changes(
        self,
        prompt: Sequence[Message],
        begun: Message | None,
        last: Sequence[Message],
        tools: str,
        rendered: Sequence[str],
    ) -> tuple[str, ...]:
        """Return what the template deletes or moves, as fixed phrases.

        A short text may by chance be in the template's own text. Then probes in the place of all texts show whether the
        template keeps messages of these roles.
        """
        head, *whole = rendered
        turns = [*prompt, *([] if begun is None else [begun])]
        found = [] if last else changed_texts(turns, None, tools, head, head)
        for answer, text in zip(last, whole, strict=True):
            found += changed_texts(prompt, answer, tools, head, text)
        if shortest_text([*turns, *last]) < _SHORT:
            key = (bool(last), begun is None, *((message.role, bool(message.content.strip())) for message in turns))
            if key not in self._changes_by_form:
                self._changes_by_form[key] = self._changes_of_probes(turns, begun is not None, bool(last))
            found += self._changes_by_form[key]
        return tuple(dict.fromkeys(found))

    def _changes_of_probes(self, turns: Sequence[Message], continued: bool, answered: bool) -> tuple[str, ...]:
        contents = [f"bfpoprobe{number}x" if turn.content.strip() else "" for number, turn in enumerate(turns)]
        probes = [Message(turn.role, content) for turn, content in zip(turns, contents, strict=True)]
        prompt, begun = (probes[:-1], probes[-1]) if continued else (probes, None)
        answer = Message("assistant", _PROBE) if begun is None else _joined(begun, Message("assistant", _PROBE))
        try:
            head, *whole = self._texts(prompt, begun, [answer] if answered else [], "", None)
        except RefusedChatError:  # such as a turn whose tool call is left out here
            return ()
        found = (
            changed_texts(prompt, answer, "", head, *whole) if whole else changed_texts(probes, None, "", head, head)
        )
        return tuple(found)

    def encode_rendered(self, chats: Sequence[RenderedChat]) -> list[EncodedChat]:
        """Return the ids of many chats, their unmarked texts encoded at once."""
        plain = iter(self._text.encode([text for chat in chats if chat.mark is None for text in chat.texts]))
        encoded = []
        for chat in chats:
            if chat.mark is None:
                ids = list(islice(plain, len(chat.texts)))
            else:
                ids = [self._text.encode_marked(text, chat.mark) for text in chat.texts]
            if chat.start is None:
                encoded.append(EncodedChat(ids[0], ids[1:], chat.changes, chat.openings, chat.rendered))
            else:
                whole = [chat.start + answer for answer in ids]
                encoded.append(EncodedChat(chat.start, whole, rendered=chat.rendered))
        return encoded

    def without_written(self, completion: Completion) -> Completion:
        """Return an answer of the model without what the template writes before answers in training.

        The model has learnt to write it itself, such as `<|START_RESPONSE|>` of Command R7B, and the template would
        write it again.
        """
        text = completion.text.lstrip()
        if not self._written or not text.startswith(self._written) or ends_with_assistant(completion.prompt):
            return completion
        return replace(completion, text=text.removeprefix(self._written).lstrip())

    def ended(self, ids: list[int]) -> list[int]:
        """Return the ids of a conversation with one end token at their end."""
        return ids if ids[-1:] == [self.end_id] else [*ids, self.end_id]

    def _without_suffix(self, rendered: str, head: str) -> str:
        # The template may end this conversation differently from the probe: then cut at its last end token, unless that
        # ends a turn of the prompt.
        if rendered.endswith(self._suffix):
            return rendered[: len(rendered) - len(self._suffix)]
        place = rendered.rfind(self._ending, common_length(head, rendered))
        return rendered if place < 0 else rendered[:place]

    def _escape(self, text: str, mark: str | None) -> str:
        return text if mark is None else self._text.escape(text, mark)

    def _escaped(self, messages: Sequence[Message], mark: str) -> list[Message]:
        def escape(text: str) -> str:
            return self._text.escape(text, mark)

        return [
            replace(message, content=escape(message.content), extra=_escaped_json(message.extra, escape))
            for message in messages
        ]


def _escaped_json(text: str, escape: Callable[[str], str]) -> str:
    """Return canonical JSON with all its texts, names of keys too, escaped."""

    def escaped(value: Any) -> Any:
        if isinstance(value, str):
            return escape(value)
        if isinstance(value, list):
            return [escaped(item) for item in value]
        return {escape(key): escaped(item) for key, item in value.items()} if isinstance(value, dict) else value

    return canonical_json(escaped(from_canonical(text)))


def _joined(begun: Message, answer: Message) -> Message:
    """Return the message that `answer` makes of one that the prompt has begun."""
    extra = {**(from_canonical(begun.extra) or {}), **(from_canonical(answer.extra) or {})}
    return Message("assistant", begun.content + answer.content, canonical_json(extra))


def whole_answer(completion: Completion) -> Completion:
    """Return a completion that continues a message of the assistant with the whole message as its text.

    An empty message, whose place the answer takes, is left out.
    """
    if not ends_with_assistant(completion.prompt):
        prompt = without_empty_end(completion.prompt)
        return completion if prompt is completion.prompt else replace(completion, prompt=prompt)
    return replace(completion, prompt=completion.prompt[:-1], text=completion.prompt[-1].content + completion.text)


def end_token_id(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, variables: Mapping[str, Any] | None = None
) -> int:
    """Return the id that ends an assistant turn under this template: what generation must stop at besides EOS."""
    return ChatEncoder(tokenizer, chat_template, variables).end_id


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")


def unused_character(texts: Sequence[str]) -> str:
    """Return a Unicode noncharacter that no text contains; raises `DataError` if the texts contain all 32."""
    used = set().union(*texts)
    free = next((chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in used), None)
    if free is None:
        raise DataError("a text contains special tokens and all 32 noncharacters U+FDD0 to U+FDEF; remove either")
    return free
