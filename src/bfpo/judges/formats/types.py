"""What a format is, and shared functions that render a conversation as text and read an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bfpo.core.schema import Completion, Message, Role, VerdictLabel
from bfpo.data.thinking import Thought, split_thought

__all__ = [
    "Ask",
    "Format",
    "Reading",
    "alternating",
    "bare",
    "behind_thoughts",
    "disarm",
    "first_verdict",
    "only_field",
    "question",
    "quote",
    "request",
    "stands_alone",
    "thought_of_judge",
    "transcript",
    "unscored",
]

Ask = Callable[[Completion], "tuple[Message, ...] | str"]
"""What a guard is asked about a completion: the messages of a chat, or a finished text."""


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
    parts. `principles` are several questions about one completion by name, of which the worst answer counts; `ask` is
    then the first. `bos` is the token that a finished text itself begins with. `of_requests`: what it is asked about a
    request alone, if it judges these. A change of any of these changes `version`: it is part of a cache's key.
    """

    name: str
    version: str
    summary: str
    model: str
    licence: str
    ask: Ask
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
    principles: tuple[tuple[str, Ask], ...] = ()
    bos: str = ""
    of_requests: Ask | None = None

    @property
    def questions(self) -> tuple[tuple[str, Ask], ...]:
        """The questions about one completion, by the name of their principle; one without a name, in general."""
        return self.principles or (("", self.ask),)

    def ask_disarmed(self, completion: Completion, ask: Ask | None = None) -> tuple[Message, ...] | str:
        """Return what `ask` does, for a server, whose tokenizer reads any text as special tokens: see `disarm`.

        A finished text comes without `bos`, which the server's tokenizer writes.
        """
        messages = tuple(Message(message.role, disarm(message.content)) for message in completion.prompt)
        asked = (ask or self.ask)(replace(completion, prompt=messages, text=disarm(completion.text)))
        return asked.removeprefix(self.bos) if isinstance(asked, str) else asked


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


def request(completion: Completion) -> tuple[Message, ...]:
    """Return the conversation of `alternating` without the completion: the user's turn is the last one."""
    return alternating(replace(completion, text=""))[:-1]


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


# -------------------------------------------------------------------------------------------- reading answers

_END_TOKEN = re.compile(r"(?:<\|[^<>|]{1,40}\|>|</s>|<eos>|<end_of_turn>)\Z")
_DECORATION = re.compile(r"[*_`~#>]+")


def thought_of_judge(text: str) -> Thought | None:
    """Return the thoughts and the answer of a text that a judge wrote, `None` if it is an answer alone.

    The last closing mark ends the thoughts: a verdict does not explain marks, and thoughts may quote a text with some.
    """
    found = split_thought(text)
    while found is None or found.closed:
        start = 0 if found is None else found.start
        inside = split_thought(text[start:], opened=True)
        if inside is None or not inside.closed:
            break
        found = Thought(text[:start] + inside.reasoning, inside.answer, start + inside.start)
    return found


def behind_thoughts(read: Callable[[str], Reading]) -> Callable[[str], Reading]:
    """Return `read` for whole texts of a guard: it gets the answer behind the thoughts, without end tokens."""

    def read_behind(text: str) -> Reading:
        found = thought_of_judge(text)
        if found is not None and not found.closed:
            return unscored("the reasoning has no end")
        answer = (text if found is None else found.answer).rstrip()
        while (end := _END_TOKEN.search(answer, max(0, len(answer) - 48))) is not None:
            answer = answer[: end.start()].rstrip()
        return read(answer)

    return read_behind


def bare(text: str) -> str:
    """Return a word without Markdown, quotes, brackets and punctuation around it, in lower case."""
    return text.strip().strip("*_`~#>.!:,;\"'“”‘’()[] \t").lower()


def stands_alone(word: str, text: str) -> bool:
    """Return whether a verdict word is in the text as an answer of its own: first, or before a stop or the end.

    `no` in `there is no doubt` is not.
    """
    plain = _DECORATION.sub("", text)
    return re.search(rf"\A\W*{word}\b|(?<![\w'’-]){word}(?=\s*(?:[.!?;:,/|)\n]|\Z))", plain, re.IGNORECASE) is not None


def first_verdict(text: str, words: Sequence[str]) -> str | None:
    """Return which of the words the text begins with; `None` for none, or if another of them stands alone after it."""
    match = re.match(rf"\W*({'|'.join(words)})(?![\w'’-])", _DECORATION.sub("", text[:2000]), re.IGNORECASE)
    if match is None:
        return None
    first, rest = match[1].lower(), _DECORATION.sub("", text)[match.end() :]
    return None if any(stands_alone(word, rest) for word in words if word != first) else first


def only_field(name: str, values: Sequence[str], text: str) -> str | None:
    """Return, in lower case, the one value that the lines `NAME: VALUE` give; `None` for none, two, or another value.

    A guard that answers twice and not the same has said nothing.
    """
    plain = _DECORATION.sub("", text)
    lines = re.findall(rf"^[ \t-]*{name}[ \t]*:(.*)$", plain, re.MULTILINE | re.IGNORECASE)
    inside = re.findall(rf"{name}[ \t]*:[ \t]*({'|'.join(values)})\b", plain, re.IGNORECASE)
    found = {bare(line) for line in lines} | ({value.lower() for value in inside} if lines else set())
    value = found.pop() if len(found) == 1 else None
    return value if value in {allowed.lower() for allowed in values} else None
