"""A tokenizer's chat template: conversations to text, within a time limit; what it refuses is one kind of error."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Environment, TemplateError, meta

from bfpo.core.errors import DataError, ModelError, SettingError, first_line
from bfpo.core.schema import Message, from_canonical
from bfpo.data.fields import REASONING

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "ChatTemplate",
    "RefusedChatError",
    "called_functions",
    "with_arguments_as_text",
    "with_template",
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

_SECONDS = 10.0
_REFUSALS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
_REWRITTEN = "the template rewrites the assistant's message at the end, which therefore cannot be continued"
_MOST_CHARACTERS, _MOST_TIMES = 1_000_000, 100  # a text longer than the sum of the first and the second x its inputs


_PARSER = Environment(extensions=["jinja2.ext.loopcontrols"])
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")  # a tag of transformers around answers
_FOR_TOOLS = "tool_use"  # transformers takes the template of this name for prompts with tools
_DATE = "date_string"  # the variable of Llama's templates
_DATE_FORMAT = re.compile(r"""strftime_now\(\s*(?:'([^']+)'|"([^"]+)")""")


class RefusedChatError(DataError):
    """A conversation that the chat template refuses; the message is the template's own reason."""


class ChatTemplate:
    """The template `text`, else the tokenizer's own, else `DEFAULT_CHAT_TEMPLATE`, with values of its variables.

    Raises `SettingError` for a variable that the template does not read. Rendering raises `RefusedChatError` for a
    conversation that the template refuses, and `ModelError` if the template does not end within ten seconds (in the
    main thread of a system with interval timers) or writes far more text than the conversation holds.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        self.text = DEFAULT_CHAT_TEMPLATE if text is None and not own else text
        """The template, `None` if it is the tokenizer's own."""
        self._variables = dict(variables or {})
        one = own if self.text is None else self.text
        texts = one if isinstance(one, dict) else {"default": one}
        source = texts.get("default", "")
        unread = [name for name in self._variables if not any(_reads(text, name) for text in texts.values())]
        if unread:
            raise SettingError(
                f"chat_template_kwargs: got {', '.join(unread)}, which the chat template does not read; check the "
                "spelling, or leave it out"
            )

        given = (f"{{%- set {name} = {value!r} -%}}" for name, value in self._variables.items())
        self.source = "".join([*given, source])
        """The template's text with the values of the variables in it, for renderers that take a text alone."""

    def check_time(self) -> None:
        """Raise `ModelError` if the template does not end for a question, for renderers that have no time limit."""
        with suppress(RefusedChatError):
            self.render((Message("user", "Which way?"),), generation=True)

    def date_note(self, rendered: str) -> str:
        """Return a note if a rendered text holds the date of today, for which the template asks; empty if not."""
        formats = [one or other for one, other in _DATE_FORMAT.findall(self.source)]
        date = next((date for one in formats if (date := datetime.now().strftime(one)) and date in rendered), "")
        if not date or _DATE in self._variables:
            return ""
        how = f"chat_template_kwargs: {{{_DATE}: '{date}'}}"
        if _DATE not in self.source:
            how = "a copy of the template with a fixed date, as chat_template,"
        return f"the chat template: prompts hold today's date ({date}) and are others tomorrow; {how} keeps this one"

    def render(
        self, messages: Sequence[Message], *, generation: bool = False, continued: bool = False, tools: str = ""
    ) -> str:
        """Return the text of a conversation.

        `generation`: with the generation prompt at the end; `continued`: it ends inside the last message instead.
        `tools`: canonical JSON as in `Pair`.
        """
        turns = [_with_reasoning(message.as_dict()) for message in messages]
        described = from_canonical(tools)

        def rendered(turns: list[dict[str, Any]]) -> str:
            return self.render_turns(turns, generation=generation, continued=continued, tools=described)

        return _best_form(turns, rendered) if any("tool_calls" in turn for turn in turns) else rendered(turns)

    def render_turns(
        self,
        turns: list[dict[str, Any]],
        *,
        generation: bool = False,
        continued: bool = False,
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of turns in the form that the template reads; `variables`: more of them, read or not."""
        try:
            with _time_limit(_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    turns,
                    tools,
                    chat_template=self.text,
                    add_generation_prompt=generation,
                    continue_final_message=continued,
                    tokenize=False,
                    **{**self._variables, **(variables or {})},
                )
        except _OverTimeError:
            raise ModelError(
                f"the chat template did not end within {_SECONDS:g} s on a conversation of {len(turns)} messages: a "
                "loop in it may be endless; pass another one with chat_template"
            ) from None
        except MemoryError:
            raise ModelError("the chat template needs more memory than there is; pass another one") from None
        except _REFUSALS as error:
            rewritten = continued and "continue_final_message" in str(error)
            raise RefusedChatError(_REWRITTEN if rewritten else first_line(error)) from error
        rendered = cast(str, text)
        if len(rendered) > _MOST_CHARACTERS and len(rendered) > _MOST_CHARACTERS + _MOST_TIMES * _size(turns, tools):
            raise ModelError(
                f"the chat template writes {len(rendered):,} characters for a conversation of {len(turns)} messages "
                f"with {_size(turns, tools):,} characters; pass another one with chat_template"
            )
        return rendered


def _reads(template: str, name: str) -> bool:
    """Return whether a template reads a variable of this name, as far as its syntax is right."""
    try:
        return name in meta.find_undeclared_variables(_PARSER.parse(_GENERATION.sub("", template)))
    except TemplateError:  # rendering says what is wrong
        return name in template


def _size(turns: list[dict[str, Any]], tools: list[Any] | None) -> int:
    return len(json.dumps([turns, tools], default=str))


class _OverTimeError(BaseException):
    """The time is up; not an `Exception`, so that no handler of a library catches it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_OverTimeError` inside the block after so many seconds, by the system's interval timer.

    Python runs signal handlers in the main thread only, and some systems have no such timer: no limit there. A timer
    that someone else has set continues afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OverTimeError

    handler = signal.signal(signal.SIGALRM, stop)
    start = time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - start), 1e-3), interval)


def with_template(tokenizer: PreTrainedTokenizerBase, text: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer with another chat template; of several named ones the default is replaced.

    The one for prompts with tools is left out then, since the other template renders these too.
    """
    own, other = tokenizer.chat_template, copy(tokenizer)
    if isinstance(own, dict):
        kept = own if text == own.get("default") else {name: one for name, one in own.items() if name != _FOR_TOOLS}
        other.chat_template = {**kept, "default": text}
    else:
        other.chat_template = text
    return other


# ------------------------------------------------------------------------------- forms of messages that templates read


def _with_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """Return the turn with its thoughts under the names that templates read, whichever of them it has."""
    thoughts = next((turn[name] for name in REASONING if name in turn), None)
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
            except RefusedChatError as error:
                refused = refused or error
                continue
            objects = [
                repr(call["arguments"]) for turn in turns for call in called_functions(turn) if call.get("arguments")
            ]
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
    return with_arguments_as_text(form) if arguments_as_text else form


def with_arguments_as_text(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with the arguments of its calls, as far as they are objects, as JSON text."""
    if not called_functions(turn):
        return turn
    form = {**turn, "tool_calls": json.loads(json.dumps(turn["tool_calls"]))}  # a copy
    for call in called_functions(form):
        if isinstance(call.get("arguments"), dict):
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return form


def called_functions(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a turn calls, with their names and arguments."""
    calls = turn.get("tool_calls") or []
    found = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [call for call in found if isinstance(call, dict)]
