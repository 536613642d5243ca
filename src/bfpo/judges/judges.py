"""One protocol for whoever judges completions, and the way from a setting to one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bfpo.core.errors import ModelError, SettingError, first_line
from bfpo.core.inputs import missing_folder
from bfpo.core.schema import Comparison, Completion, Message, Verdict
from bfpo.judges.formats import FORMATS, PAIR_FORMATS, make_format
from bfpo.judges.ngrams import JUDGE_FILE, NgramJudge, NgramRanker
from bfpo.judges.refusals import RefusalJudge
from bfpo.world.oracle import assess

if TYPE_CHECKING:
    from bfpo.generation.server import RequestBudget
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


def make_judge(
    format: str,
    *,
    name: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    threshold: float | None = None,
    controversial: str | None = None,
    policy: str | None = None,
    criterion: str | None = None,
    safe_label: str | int | None = None,
    unsafe_label: str | int | None = None,
    text: str | None = None,
    url: str | None = None,
    budget: RequestBudget | None = None,
    **server: Any,
) -> Judge:
    """Return a judge of safety; the arguments are the keys of `bfpo.config.JudgeConfig`, `None` the format's default.

    With `url`, `server` holds the settings of `bfpo.generation.server.Server`, and its requests count against `budget`.
    Raises `SettingError` for an unknown format or setting, `ModelError` for a model that cannot be loaded,
    `MissingExtraError` where the server's client is not installed.
    """
    check_judge(format)
    if format == "oracle":
        return OracleJudge()
    if format == "refusal-phrases":
        return RefusalJudge(**_given(name=name))
    if format == "trained":
        from bfpo.judges.judges import trained_judge

        return trained_judge(str(model), name=name)
    local = _given(model=model, revision=revision, dtype=dtype, batch_size=batch_size, max_length=max_length)
    common = _given(name=name, threshold=threshold)
    if format == "classifier":
        from bfpo.judges.classifier import ClassifierJudge

        return ClassifierJudge(**local, **common, **_given(safe_label=safe_label, unsafe_label=unsafe_label, text=text))
    words = None if policy is None else _read_policy(policy)
    guard = make_format(format, **_given(controversial=controversial, policy=words, criterion=criterion))
    if url is None:
        from bfpo.judges.guard import GuardJudge

        return GuardJudge(guard, **local, **common)
    from bfpo.generation.server import Server
    from bfpo.judges.server_judges import ServerJudge

    asks_text = isinstance(guard.ask(Completion("probe", (Message("user", "q"),), "a")), str)
    server = {**server, "api": server.get("api") or ("completions" if asks_text else "chat")}
    return ServerJudge(guard, Server(url=url, model=str(model), budget=budget, **server), **common)


def make_ranker(
    format: str,
    *,
    name: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    url: str | None = None,
    budget: RequestBudget | None = None,
    **server: Any,
) -> Ranker:
    """Return a ranker of helpfulness; the arguments are the keys of `bfpo.config.RankerConfig`.

    All else is as for `make_judge`.
    """
    check_ranker(format)
    if format == "oracle":
        from bfpo.judges.rankers import OracleRanker

        return OracleRanker()
    if format == "trained":
        from bfpo.judges.judges import trained_ranker

        return trained_ranker(str(model), name=name)
    local = _given(model=model, revision=revision, dtype=dtype, batch_size=batch_size, max_length=max_length, name=name)
    if format == "reward-model":
        from bfpo.judges.rankers import RewardRanker

        return RewardRanker(**local)
    if format == "pairrm":
        from bfpo.judges.rankers import PairRanker

        return PairRanker(**local)
    if url is None:
        from bfpo.judges.rankers import GenerativeRanker

        return GenerativeRanker(**local)
    from bfpo.generation.server import Server
    from bfpo.judges.server_judges import ServerRanker

    server = {**server, "api": server.get("api") or "chat"}
    return ServerRanker(
        PAIR_FORMATS["helpfulness"], Server(url=url, model=str(model), budget=budget, **server), name=name
    )


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


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
