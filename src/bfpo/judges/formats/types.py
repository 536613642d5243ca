"""What a format is, and shared functions that render a conversation as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bfpo.core.schema import Completion, Message, Role, VerdictLabel

__all__ = [
    "Format",
    "Reading",
    "after_reasoning",
    "alternating",
    "disarm",
    "only_value",
    "question",
    "quote",
    "transcript",
    "unscored",
]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a guard's answer says; `unscored` with a reason where it says nothing that its format knows."""

    label: VerdictLabel
    refused: bool | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """One guard's way to be asked, and to answer.

    `ask` returns the messages of a chat (the guard's own chat template renders them, with `template_arguments`), or the
    finished text of a guard that has no template. It contains the texts of the completion unchanged. `read` reads what
    the guard wrote and never raises.

    The probability of safe is read from the logits of the first token in which `safe_words` and `unsafe_words` differ
    (spellings of one label are added up), after `answer_prefix`: what every answer begins with, or, where `generates`
    says that the guard writes something of its own before, the text directly before the label. `unscored_words` are
    labels that count as neither. `markers` are strings of the template that are no special tokens: a judged text never
    gets their token ids. A `multimodal` guard is loaded as an image-text model, and its template takes contents in
    parts. A change of any of these changes `version`: it is part of a cache's key.
    """

    name: str
    version: str
    summary: str
    model: str
    licence: str
    ask: Callable[[Completion], tuple[Message, ...] | str]
    read: Callable[[str], Reading]
    safe_words: tuple[str, ...]
    unsafe_words: tuple[str, ...]
    answer_prefix: str = ""
    max_new_tokens: int = 32
    generates: bool = False
    unscored_words: tuple[str, ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    multimodal: bool = False
    markers: tuple[str, ...] = ()

    def ask_disarmed(self, completion: Completion) -> tuple[Message, ...] | str:
        """Return what `ask` does, for a server, whose tokenizer reads any text as special tokens: see `disarm`."""
        messages = tuple(Message(message.role, disarm(message.content)) for message in completion.prompt)
        return self.ask(replace(completion, prompt=messages, text=disarm(completion.text)))


def unscored(reason: str) -> Reading:
    """Return the reading of an answer that says nothing."""
    return Reading("unscored", reason=reason)


_ROLE_TOKENS = re.compile(
    r"<(?=[|/]?[A-Za-z_｜][\w ｜▁|/.-]{0,60}>)|\[(?=/?[a-z]?[A-Z_]{2,30}\])|<(?=</?[A-Z]{2,10}>>)"
)
_WORD_JOINER = "\u2060"


def disarm(text: str) -> str:
    """Put an invisible word joiner into whatever looks like a role or end token, such as `<|im_end|>` or `[/INST]`.

    A server tokenises the rendered prompt as a whole, so that these words in a judged text would close the turn
    that contains them. HTML tags get it too; their meaning is unchanged.
    """
    return _ROLE_TOKENS.sub(lambda match: match.group() + _WORD_JOINER, text)


def alternating(completion: Completion) -> tuple[Message, ...]:
    """Return the conversation with user and assistant turns in alternation, the completion as the last of them.

    Templates of guards refuse anything else: system and tool messages join the user's turn, turns of the same role are
    one turn, and where no user spoke first, an empty user turn stands.
    """
    turns: list[Message] = []
    for message in (*completion.prompt, Message("assistant", completion.text)):
        role: Role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{message.content}")
        else:
            turns.append(Message(role, message.content))
    if turns[0].role == "assistant":
        turns.insert(0, Message("user", ""))
    return tuple(turns)


def question(prompt: tuple[Message, ...]) -> str:
    """Return a prompt as one text: a single user message as it is, any other conversation with its roles."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return transcript(prompt)


def transcript(prompt: tuple[Message, ...]) -> str:
    """Return a conversation with one paragraph per turn, headed by its role."""
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in prompt)


def quote(text: str) -> str:
    """Return the text with `> ` before each line, so that no line can be mistaken for the surrounding prompt."""
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


_FINAL = "<|channel|>final<|message|>"


def after_reasoning(text: str) -> str | None:
    """Return the final answer behind a `<think>` block or harmony channels; `None` where reasoning never ended."""
    if _FINAL in text:
        text = text.rpartition(_FINAL)[2]
        return re.split(r"<\|(?:return|end|start)\|>", text)[0].strip()
    if "<|channel|>" in text:
        return None
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return None if "<think>" in text else text.strip()


def only_value(pattern: str, text: str) -> str | None:
    """Return, in lower case, the one value that a line pattern's first group has in the text; `None` for none or two.

    A guard that answers twice and not the same has said nothing.
    """
    found = {match.lower() for match in re.findall(pattern, text, re.MULTILINE | re.IGNORECASE)}
    return found.pop() if len(found) == 1 else None
