"""Conversations to token ids: the chat template, its end token, and text that looks like a special token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from bfpo.core.errors import DataError, ModelError
from bfpo.core.schema import Message, canonical_json, from_canonical

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
]

DEFAULT_CHAT_TEMPLATE = """\
{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{{ message['role'] | capitalize + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{%- if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif -%}
"""
"""For tokenizers without a chat template: `User:` and `Assistant:` turns, BOS first if the tokenizer has one, the end
token after every assistant turn. The line break before an answer separates its first token from the prompt."""

_PROBE = "bfpoprobeanswer"
_TEXTS_COMPARED = 8


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
        ids of the whole text, except for marked parts.
        """
        ids: list[int] = []
        plain = ""
        for number, part in enumerate(text.split(mark)):
            if number % 2:
                if part in self._not_special:  # `split_special_tokens` does not split these: cut them in two
                    ids += self._encode_plain(plain + part[:1])
                    plain = part[1:]
                else:
                    plain += part
                continue
            position = 0
            for match in self._tokens.finditer(part):
                token = match.group()
                left, right = self._strips.get(token, (False, False))
                before = plain + part[position : match.start()]
                ids += self._encode_plain(before.rstrip() if left else before)
                ids.append(cast(int, self._tokenizer.convert_tokens_to_ids(token)))
                plain = ""
                position = match.end() + (len(part[match.end() :]) - len(part[match.end() :].lstrip()) if right else 0)
            plain += part[position:]
        return ids + self._encode_plain(plain)

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return cast("list[int]", encoded["input_ids"])


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """Texts to encode: the prompt and whole conversations, or answers alone, which then follow `start`.

    `mark` is the character around parts that look like special tokens but are text; `None` if there are no such parts.
    """

    texts: list[str]
    mark: str | None
    start: list[int] | None = None


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Ids of a prompt (with the generation prompt) and of whole conversations, each ending with the end token."""

    prompt: list[int]
    conversations: list[list[int]]


class ChatEncoder:
    """A tokenizer with a chat template: `chat_template`, else the tokenizer's, else `DEFAULT_CHAT_TEMPLATE`.

    `end_id` is the token that ends an assistant turn: the first special token that the template writes after the
    answer, else the tokenizer's EOS. Raises `ModelError` if the tokenizer has no EOS or the template cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template or (None if tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE)
        eos = tokenizer.eos_token_id
        if eos is None or (eos == tokenizer.unk_token_id and tokenizer.eos_token != tokenizer.unk_token):
            raise ModelError(
                f"eos_token: got {tokenizer.eos_token!r}, which is not a token of this tokenizer; completions "
                "need an end token. Set tokenizer.eos_token to the token that ends a text and save the tokenizer again"
            )
        self.eos_id = cast(int, eos)
        self.bos_id = cast("int | None", tokenizer.bos_token_id)
        self._suffix, end = self._probe()
        self.end_id = self.eos_id if end is None else cast(int, tokenizer.convert_tokens_to_ids(end))
        # The template's text up to its end token is part of the turn; without one, EOS follows the answer itself.
        self._ending = "" if end is None else self._suffix[: self._suffix.index(end) + len(end)]
        self._text = TextEncoder(tokenizer, () if end is None else (end,))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the texts."""
        return self._tokenizer

    def _probe(self) -> tuple[str, str | None]:
        """Return what the template writes after an answer and the first added token in it, if any."""
        try:
            rendered = self._render((Message("user", "bfpoprobequestion"), Message("assistant", _PROBE)))
        except (TemplateError, TypeError, ValueError) as error:
            raise ModelError(f"the chat template cannot render a user and an assistant turn: {error}") from error
        if rendered.count(_PROBE) != 1:
            raise ModelError("the chat template does not write the assistant's answer once and unchanged; pass another")
        suffix = rendered.partition(_PROBE)[2]
        added = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        tokens = [token for token in {*added, *self._tokenizer.all_special_tokens} if token.strip() and token in suffix]
        return suffix, min(tokens, key=lambda token: (suffix.index(token), -len(token)), default=None)

    def encode(
        self, prompt: Sequence[Message], answers: Sequence[str | Message], *, name: str, tools: str = ""
    ) -> EncodedChat:
        """Return the ids of the prompt and of the prompt with each answer; `name`: of the row, for errors.

        An answer that is a message may hold tool calls or reasoning; `tools` as in `Pair`. An empty prompt means
        unconditional text: no template, and BOS (EOS if there is no BOS) as the first token.
        """
        return self.encode_rendered([self.render(prompt, answers, name=name, tools=tools)])[0]

    def render(
        self, prompt: Sequence[Message], answers: Sequence[str | Message], *, name: str, tools: str = ""
    ) -> RenderedChat:
        """Return the texts whose ids `encode` returns, for `encode_rendered`. Raises as `encode` does."""
        last = [Message("assistant", answer) if isinstance(answer, str) else answer for answer in answers]
        texts = [tools, *(text for message in (*prompt, *last) for text in (message.content, message.extra))]
        mark = unused_character(texts) if any(map(self._text.holds_control_token, texts)) else None
        if not prompt and not tools and not any(message.extra for message in last):
            start = [self.eos_id if self.bos_id is None else self.bos_id]
            return RenderedChat([self._escape(message.content, mark) for message in last], mark, start)
        if mark is not None:
            prompt, last = self._escaped(prompt, mark), self._escaped(last, mark)
            tools = _escaped_json(tools, lambda text: self._escape(text, mark))
        try:
            head = self._render(prompt, generation=True, tools=tools)
            full = [self._render([*prompt, message], tools=tools) for message in last]
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{name}: the chat template refuses this conversation: {error}") from error
        return RenderedChat([head, *(self._without_suffix(text, head) + self._ending for text in full)], mark)

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
                encoded.append(EncodedChat(ids[0], ids[1:]))
            else:
                encoded.append(EncodedChat(chat.start, [chat.start + answer for answer in ids]))
        return encoded

    def ended(self, ids: list[int]) -> list[int]:
        """Return the ids of a conversation with one end token at their end."""
        return ids if ids[-1:] == [self.end_id] else [*ids, self.end_id]

    def _render(self, messages: Sequence[Message], *, generation: bool = False, tools: str = "") -> str:
        turns = [_with_reasoning(message.as_dict()) for message in messages]
        described = from_canonical(tools)

        def rendered(turns: list[dict[str, Any]]) -> str:
            text = self._tokenizer.apply_chat_template(
                turns, described, chat_template=self._template, add_generation_prompt=generation, tokenize=False
            )
            return cast(str, text)

        return _best_form(turns, rendered) if any("tool_calls" in turn for turn in turns) else rendered(turns)

    def _without_suffix(self, rendered: str, head: str) -> str:
        # The template may end this conversation differently from the probe: then cut at its last end token, unless that
        # ends a turn of the prompt.
        if rendered.endswith(self._suffix):
            return rendered[: len(rendered) - len(self._suffix)]
        start = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(head, rendered, strict=False)))
        place = rendered.rfind(self._ending, start)
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


def _with_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """Return the turn with its thoughts under the names that templates read, whichever of them it has."""
    thoughts = next((turn[name] for name in ("reasoning_content", "reasoning", "thinking") if name in turn), None)
    return turn if thoughts is None else {"reasoning_content": thoughts, "thinking": thoughts, **turn}


def _best_form(turns: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]) -> str:
    """Return turns with tool calls as the template renders them, in the first form that it writes as it should.

    Templates disagree on two points: whether the arguments of a call are an object or its JSON text, and whether the
    content beside calls may be null. A wrong form is refused, or leaves `None` or an object as Python writes it.
    """
    best, fewest, refused = None, 0, None
    for null_as_text in (False, True):
        for arguments_as_text in (False, True):
            form = [_in_form(turn, null_as_text=null_as_text, arguments_as_text=arguments_as_text) for turn in turns]
            try:
                text = render(form)
            except (TemplateError, TypeError, ValueError) as error:
                refused = refused or error
                continue
            objects = [repr(call["arguments"]) for turn in turns for call in _calls(turn) if call.get("arguments")]
            num_python = text.count("None") + sum(map(text.count, objects))
            if best is None or num_python < fewest:
                best, fewest = text, num_python
            if not fewest:
                return best
    if best is None:
        assert refused is not None
        raise refused
    return best


def _in_form(turn: dict[str, Any], *, null_as_text: bool, arguments_as_text: bool) -> dict[str, Any]:
    form = {**turn, "content": ""} if null_as_text and turn["content"] is None else dict(turn)
    if arguments_as_text and _calls(turn):
        form["tool_calls"] = json.loads(json.dumps(turn["tool_calls"]))  # a copy
        for call in _calls(form):
            if isinstance(call.get("arguments"), dict):
                call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return form


def _calls(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a turn calls, with their names and arguments."""
    calls = turn.get("tool_calls") or []
    found = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [call for call in found if isinstance(call, dict)]


def end_token_id(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> int:
    """Return the id that ends an assistant turn under this template: what generation must stop at besides EOS."""
    return ChatEncoder(tokenizer, chat_template).end_id


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
