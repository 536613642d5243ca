"""The protocols of judges and rankers, the oracle, and the way from a spec to a judge or ranker."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from bfpo.core.errors import ModelError, SettingError, first_line
from bfpo.core.inputs import missing_folder
from bfpo.core.schema import Comparison, Completion, Message, Verdict
from bfpo.judges.formats import FORMATS, PAIR_FORMATS, make_format
from bfpo.judges.ngrams import JUDGE_FILE, NgramJudge, NgramRanker
from bfpo.judges.refusals import RefusalJudge
from bfpo.judges.settings import (
    ClassifierSpec,
    GuardSpec,
    JudgeConfig,
    LocalRankerSpec,
    OracleRankerSpec,
    OracleSpec,
    RankerConfig,
    RefusalSpec,
    ServedGuardSpec,
    ServedRankerSpec,
    TrainedRankerSpec,
    TrainedSpec,
)
from bfpo.world.oracle import assess

if TYPE_CHECKING:
    from bfpo.generation.server import RequestBudget, Server
    from bfpo.judges.classifier import ClassifierJudge

__all__ = [
    "Judge",
    "OneByOneJudge",
    "OneByOneRanker",
    "OracleJudge",
    "Ranker",
    "check_judge",
    "check_ranker",
    "make_judge",
    "make_ranker",
    "trained_judge",
    "trained_ranker",
]


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


@runtime_checkable
class OneByOneJudge(Judge, Protocol):
    """A judge that says each verdict as it comes and, where `is_sampled`, another one when it is asked again."""

    @property
    def is_sampled(self) -> bool:
        """Return whether another vote may say something else."""
        ...

    def judge_each(
        self, completions: Sequence[Completion], report: Callable[[int, Verdict, bool], None], *, vote: int = 0
    ) -> None:
        """Report each completion's verdict as it comes: its place, the verdict, whether it would stay when asked again.

        Raises when going on is of no use; what was reported before holds.
        """
        ...


@runtime_checkable
class OneByOneRanker(Ranker, Protocol):
    """A ranker that says each comparison as it comes."""

    def compare_each(
        self, pairs: Sequence[tuple[Completion, Completion]], report: Callable[[int, Comparison, bool], None]
    ) -> None:
        """Report each comparison as it comes, as `OneByOneJudge.judge_each` does."""
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


def check_judge(format: str) -> None:
    """Raise `SettingError` for a format that no judge has; nothing is loaded."""
    if format in FORMATS or format in ("oracle", "refusal-phrases", "trained", "classifier"):
        return
    own = "oracle, refusal-phrases, a folder of `bfpo judge-train`, classifier:MODEL"
    known = f"{own}, {', '.join(FORMATS)} (or FORMAT:MODEL)"
    raise SettingError(f"judge: got {format!r}{_hint(format)}; allowed: {known}, or a .yaml file")


def check_ranker(format: str) -> None:
    """Raise `SettingError` for a format that no ranker has; nothing is loaded."""
    if format not in ("oracle", "trained", "reward-model", "pairrm", "pairwise"):
        raise SettingError(
            f"ranker: got {format!r}{_hint(format)}; allowed: oracle, a folder of `bfpo judge-train` (kind=ranker), "
            "reward-model, reward-model:MODEL, pairrm, pairwise:MODEL, or a .yaml file"
        )


def _hint(format: str) -> str:
    """Return what may have been meant by what is no format: a folder that is not there, or one above the judge's."""
    if (problem := missing_folder(format)) is not None:
        return f"; {problem}"
    if (inner := Path(format) / "model" / "judge.json").is_file():
        return f"; did you mean {inner.parent}?"
    return "; a folder or a hub id alone does not say how it is asked" if "/" in format else ""


def make_judge(spec: JudgeConfig, budget: RequestBudget | None = None) -> Judge:
    """Return the judge of a spec; its requests to a server, if it has one, count against `budget`.

    Raises `SettingError` for an unknown format or setting, `ModelError` for a model that cannot be loaded,
    `MissingExtraError` where the server's client is not installed.
    """
    check_judge(spec.format)
    if isinstance(spec, OracleSpec):
        return OracleJudge()
    if isinstance(spec, RefusalSpec):
        return RefusalJudge() if spec.name is None else RefusalJudge(name=spec.name)
    if isinstance(spec, TrainedSpec):
        return trained_judge(spec.model, name=spec.name)
    if isinstance(spec, ClassifierSpec):
        from bfpo.judges.classifier import ClassifierJudge

        return ClassifierJudge(
            safe_label=spec.safe_label,
            unsafe_label=spec.unsafe_label,
            text=spec.text,
            threshold=spec.threshold,
            **spec.loading(),
        )
    assert isinstance(spec, GuardSpec | ServedGuardSpec)  # there is no other
    words = None if spec.policy is None else _read_policy(spec.policy)
    own = {"controversial": spec.controversial, "policy": words, "criterion": spec.criterion}
    guard = make_format(spec.format, **{key: value for key, value in own.items() if value is not None})
    if isinstance(spec, GuardSpec):
        from bfpo.judges.guard import GuardJudge

        return GuardJudge(guard, threshold=spec.threshold, **spec.loading())
    from bfpo.judges.server_judges import ServerJudge

    asks_text = isinstance(guard.ask(Completion("probe", (Message("user", "q"),), "a")), str)
    server = _server(spec, "completions" if asks_text else "chat", budget)
    return ServerJudge(guard, server, threshold=spec.threshold, name=spec.name)


def make_ranker(spec: RankerConfig, budget: RequestBudget | None = None) -> Ranker:
    """Return the ranker of a spec, as `make_judge` does."""
    check_ranker(spec.format)
    if isinstance(spec, TrainedRankerSpec):
        return trained_ranker(spec.model, name=spec.name)
    if isinstance(spec, ServedRankerSpec):
        from bfpo.judges.server_judges import ServerRanker

        return ServerRanker(PAIR_FORMATS["helpfulness"], _server(spec, "chat", budget), name=spec.name)
    from bfpo.judges.rankers import GenerativeRanker, OracleRanker, PairRanker, RewardRanker

    if isinstance(spec, OracleRankerSpec):
        return OracleRanker()
    assert isinstance(spec, LocalRankerSpec)  # there is no other
    made: dict[str, Callable[..., Ranker]] = {
        "reward-model": RewardRanker,
        "pairrm": PairRanker,
        "pairwise": GenerativeRanker,
    }
    return made[spec.format](**spec.loading())


def _server(spec: ServedGuardSpec | ServedRankerSpec, api: str, budget: RequestBudget | None) -> Server:
    from bfpo.generation.server import Server

    return Server(spec, spec.model, api=spec.api or api, temperature=spec.temperature, budget=budget)


def _read_policy(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"policy: {file} cannot be read as text ({first_line(error)})") from error


def trained_judge(folder: str | Path, *, name: str | None = None) -> NgramJudge | ClassifierJudge:
    """Return the judge that the folder holds, as its own or another name. Raises `ModelError` where there is none."""
    folder = Path(folder)
    try:
        described = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
        kind = described["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}: holds no {JUDGE_FILE} that can be read ({type(error).__name__}: {error}); needed: the folder "
            "`model` of a run of `bfpo judge-train`"
        ) from error
    judge: NgramJudge | ClassifierJudge
    if kind == "ngrams":
        judge = NgramJudge.load(folder)
    elif kind == "classifier":
        from bfpo.judges.classifier import load_finetuned

        judge = load_finetuned(folder, described)
    else:
        raise ModelError(f"{folder / JUDGE_FILE}: kind is {kind!r}; allowed for a judge: ngrams, classifier")
    if name is not None:
        judge.name = name
    return judge


def trained_ranker(folder: str | Path, *, name: str | None = None) -> NgramRanker:
    """Return the ranker that the folder holds, as its own or another name. Raises `ModelError` where there is none."""
    ranker = NgramRanker.load(Path(folder))
    if name is not None:
        ranker.name = name
    return ranker
