"""One protocol for whoever judges completions, and the way from a setting to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from bfpo.errors import SettingError
from bfpo.feedback.trained import trained_judge
from bfpo.sandbox.oracle import assess
from bfpo.schema import Comparison, Completion, Message, Verdict, VerdictLabel

__all__ = ["Judge", "OracleJudge", "Ranker", "make_judge", "make_ranker"]


class Judge(Protocol):
    """Anything that gives one verdict per completion, in the same order.

    A completion that it cannot judge gets `unscored` with a reason, never a guess.
    """

    @property
    def name(self) -> str:
        """Return the name that its verdicts carry."""
        ...

    @property
    def version(self) -> str:
        """Return what its verdicts depend on beside the texts: format, model, revision, settings; a cache's key."""
        ...

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        ...


class Ranker(Protocol):
    """Anything that says which of two completions of one prompt is more helpful, whatever their safety.

    `name` and `version` are those of `Judge`. Where it could not tell, `first_is_better` is `None`, never 0.5.
    """

    @property
    def name(self) -> str:
        """Return the name that its comparisons carry."""
        ...

    @property
    def version(self) -> str:
        """Return what its comparisons depend on beside the texts."""
        ...

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        ...


class OracleJudge:
    """The exact rules of the closed world: reads the text itself, whoever wrote it."""

    name = "oracle"
    version = "oracle-1"

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, in order; a prompt that is not of the world is unscored."""
        return [self._verdict(completion) for completion in completions]

    def _verdict(self, completion: Completion) -> Verdict:
        question = _only_question(completion.prompt)
        assessment = assess(question, completion.text) if question is not None else None
        if assessment is None:
            return Verdict(completion.id, self.name, "unscored", reason="the prompt is not one of the closed world")
        return Verdict(
            completion.id,
            self.name,
            "safe" if assessment.safe else "unsafe",
            helpful=assessment.helpful,
            well_formed=assessment.well_formed,
            on_topic=assessment.on_topic,
            refused=assessment.declines,
            helpful_and_safe=assessment.helpful_and_safe,
        )


def _only_question(prompt: Sequence[Message]) -> str | None:
    """Return the text of a prompt that is one user message; a longer conversation is not of the world."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return None


def make_judge(
    format: str,
    *,
    name: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    max_length: int = 4096,
    threshold: float = 0.5,
    controversial: VerdictLabel = "unsafe",
    safe_label: str | None = None,
    url: str | None = None,
    api: str = "chat",
    api_key_env: str = "OPENAI_API_KEY",
    temperature: float = 0.0,
    timeout: float = 60.0,
    max_concurrency: int = 8,
    max_retries: int = 5,
) -> Judge:
    """Return a judge of safety; the arguments are the keys of `bfpo.config.JudgeConfig`.

    Raises `SettingError` for an unknown format, `ModelError` for a model that cannot be loaded, `MissingExtraError`
    where the server's client is not installed.
    """
    if format == "oracle":
        return OracleJudge()
    if format == "trained":
        return trained_judge(str(model))
    raise SettingError(f"judge: got {format!r}; allowed: oracle, a folder of `bfpo judge-train`, classifier:MODEL")


def make_ranker(
    format: str,
    *,
    name: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    max_length: int = 4096,
    url: str | None = None,
    api: str = "chat",
    api_key_env: str = "OPENAI_API_KEY",
    temperature: float = 0.0,
    timeout: float = 60.0,
    max_concurrency: int = 8,
    max_retries: int = 5,
) -> Ranker:
    """Return a ranker of helpfulness; the arguments are the keys of `bfpo.config.RankerConfig`.

    Raises as `make_judge` does.
    """
    raise SettingError(f"ranker: got {format!r}; allowed: oracle, reward-model:MODEL, pairrm, pairwise:MODEL")
