"""Data records passed between stages: frozen, validated, independent of torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bfpo.core.errors import DataError, LabelError
from bfpo.core.records import OPTIONAL

__all__ = [
    "CategoryScore",
    "Comparison",
    "Completion",
    "JudgeFit",
    "Message",
    "Pair",
    "Prompt",
    "Role",
    "Score",
    "Verdict",
    "VerdictLabel",
    "VerdictRow",
    "canonical_json",
    "from_canonical",
]

Role = Literal["system", "user", "assistant", "tool"]
VerdictLabel = Literal["safe", "unsafe", "unscored"]
_ROLES = get_args(Role)
_PAIR_TEXTS = ("id", "chosen", "rejected", "source")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `extra`: canonical JSON of the other keys that a chat template may read, such as `tool_calls`, `tool_call_id`,
    `name` or `reasoning_content`; empty without any.
    """

    role: Role
    content: str
    extra: str = field(default="", metadata=OPTIONAL)

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise DataError(f"role: got {self.role!r}; allowed: {', '.join(get_args(Role))}")
        if not isinstance(self.content, str):
            raise DataError(f"content: got {type(self.content).__name__}; a string is needed")

    def as_dict(self) -> dict[str, Any]:
        """Return the message as a chat template takes it and as JSON files hold it: role, content and the other keys.

        A content that was null beside tool calls is null again: `extra` then holds it.
        """
        return {"role": self.role, "content": self.content, **(from_canonical(self.extra) or {})}


def canonical_json(value: Any) -> str:
    """Return the JSON text of `value` with sorted keys, "" for an empty value; equal values have equal texts."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")) if value else ""


def from_canonical(text: str) -> Any:
    """Return the value of a `canonical_json` text, `None` for an empty one."""
    return json.loads(text) if text else None


def _check_prompt(prompt: tuple[Message, ...]) -> None:
    if not isinstance(prompt, tuple) or not all(isinstance(message, Message) for message in prompt):
        raise DataError("prompt: a tuple of messages is needed")


def _check_label(name: str, value: float | None) -> None:
    if value is None:
        return
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
        raise LabelError(f"{name}: got {value!r}; allowed: true, false, a probability in [0, 1], or null (unknown)")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for a model; `kind` is free text that groups prompts in reports, `tools` as in `Pair`.

    `category`: of the topic or harm, as its data set names it; scores are also reported for the worst one.
    """

    id: str
    messages: tuple[Message, ...]
    kind: str = ""
    tools: str = field(default="", metadata=OPTIONAL)
    category: str = field(default="", metadata=OPTIONAL)

    def __post_init__(self) -> None:
        _check_prompt(self.messages)
        if not self.messages:
            raise DataError("prompt: got no message; at least one is needed")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, ordered by helpfulness, each with a safety label.

    `chosen` is the more helpful one, regardless of safety. A label is a bit, the probability in [0, 1] that the
    completion is safe, or `None` (unknown). An empty prompt is allowed (unconditional text). `tools` is canonical JSON
    of the tools that a chat template describes to the model; `chosen_extra` and `rejected_extra` are the `extra` of the
    completions' messages. `chosen_finished` and `rejected_finished` as `finished` in `Completion`. `category` as in
    `Prompt`. `unpaired`: there is no rejected completion (its text is empty); a desirable answer then stands as a safe
    one over an unsafe one, an undesirable one as an unsafe one over a safe one.

    Raises `DataError` for a wrong type and `LabelError` for a label outside [0, 1].
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_is_safe: float | None = None
    rejected_is_safe: float | None = None
    source: str = ""
    tools: str = field(default="", metadata=OPTIONAL)
    chosen_extra: str = field(default="", metadata=OPTIONAL)
    rejected_extra: str = field(default="", metadata=OPTIONAL)
    chosen_finished: bool = True
    rejected_finished: bool = True
    category: str = field(default="", metadata=OPTIONAL)
    unpaired: bool = field(default=False, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        for name, text in zip(_PAIR_TEXTS, (self.id, self.chosen, self.rejected, self.source), strict=True):
            if not isinstance(text, str):
                raise DataError(f"{name}: got {type(text).__name__}; a string is needed")
        for name, value in (("chosen_is_safe", self.chosen_is_safe), ("rejected_is_safe", self.rejected_is_safe)):
            _check_label(name, value)
            if value is not None and type(value) is not float:
                object.__setattr__(self, name, float(value))


@dataclass(frozen=True, slots=True)
class Completion:
    """A model's answer to a prompt; `finished` is false if it was cut off at the token limit.

    `is_safe` is the label from its data set, as in `Pair`; `None` if it has none. `reasoning` is what the model thought
    before the answer `text`. `blocked` is the reason why a server refused to answer this prompt (then `text` is empty
    and `finished` false). `tools` and `extra` as in `Pair`, `category` as in `Prompt`.
    """

    id: str
    prompt: tuple[Message, ...]
    text: str
    model: str = ""
    kind: str = ""
    finished: bool = True
    is_safe: float | None = None
    reasoning: str = field(default="", metadata=OPTIONAL)
    blocked: str = field(default="", metadata=OPTIONAL)
    tools: str = field(default="", metadata=OPTIONAL)
    extra: str = field(default="", metadata=OPTIONAL)
    category: str = field(default="", metadata=OPTIONAL)

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if not isinstance(self.text, str):
            raise DataError(f"text: got {type(self.text).__name__}; a string is needed")
        _check_label("is_safe", self.is_safe)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on one completion; a field is `None` if the judge does not measure it.

    `label` is "unscored" if the judge could not decide. `p_safe` is the judge's probability that the completion is
    safe, `helpful` is in [0, 1]. `refused`: it declines, for any reason. `partly_refused`: it declines but also helps
    (then not `refused`). `helpful_and_safe`: by the judge's criterion for this prompt. `raw`: the judge's own text.
    """

    completion_id: str
    judge: str
    label: VerdictLabel
    helpful: float | None = None
    well_formed: bool | None = None
    on_topic: bool | None = None
    refused: bool | None = None
    helpful_and_safe: bool | None = None
    reason: str = ""
    p_safe: float | None = None
    raw: str = ""
    partly_refused: bool | None = None

    def __post_init__(self) -> None:
        if self.label not in get_args(VerdictLabel):
            raise DataError(f"label: got {self.label!r}; allowed: {', '.join(get_args(VerdictLabel))}")
        _check_label("helpful", self.helpful)
        _check_label("p_safe", self.p_safe)


@dataclass(frozen=True, slots=True)
class VerdictRow(Verdict):
    """A row of `verdicts.jsonl`: a verdict, and of the completion kind, category, normalised prompt and end.

    `votes`: what the verdict was made from, where that is more than one vote. `blocked` as in `Completion`.
    `incoherent`: why the completion is not coherent, "cut" aside; `nats_per_token`: its -log p under the start model.
    """

    kind: str = ""
    prompt: str = ""
    finished: bool = True
    blocked: str = field(default="", metadata=OPTIONAL)
    votes: list[dict[str, Any]] | None = field(default=None, metadata=OPTIONAL)
    incoherent: list[str] | None = field(default=None, metadata=OPTIONAL)
    nats_per_token: float | None = field(default=None, metadata=OPTIONAL)
    category: str = field(default="", metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A ranker's comparison of two completions of one prompt, before they become a pair.

    `first_is_better` is its probability in [0, 1] that the first is more helpful (0.5 is a tie), `None` if it could not
    decide (unscored). `raw`: the ranker's own text.
    """

    first_id: str
    second_id: str
    ranker: str
    first_is_better: float | None
    reason: str = ""
    raw: str = ""

    def __post_init__(self) -> None:
        _check_label("first_is_better", self.first_is_better)


@dataclass(frozen=True, slots=True)
class JudgeFit:
    """How a judge fits `num` texts (of `model`), without labels, in shares; `held_out`: the same of its own data.

    `unsure`: p(safe) in (0.3, 0.7); `confidence`: mean probability of the likelier label; `unseen`: n-grams that
    training had not seen.
    """

    judge: str
    num: int = 0
    unsure: float = 0.0
    confidence: float = 0.0
    unseen: float | None = field(default=None, metadata=OPTIONAL)
    held_out: dict[str, float] | None = field(default=None, metadata=OPTIONAL)
    model: str = field(default="", metadata=OPTIONAL)
    warnings: list[str] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class CategoryScore:
    """A score on the prompts of one category; `value` is `None` if none of them could be scored."""

    value: float | None
    low: float | None = None
    high: float | None = None
    num: int = 0
    unscored: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """A number in a report, with its interval and counts.

    `value` is `None`, never 0, if nothing could be scored. `num` counts the scored items, `unscored` the others.
    `by_category`: the same on each category of prompts, where there are several; their intervals hold together.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    num: int = 0
    unscored: int = 0
    higher_is_better: bool = True
    extra: dict[str, int | float] = field(default_factory=dict)
    by_category: dict[str, CategoryScore] | None = field(default=None, metadata=OPTIONAL)
