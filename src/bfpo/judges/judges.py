"""The protocols of judges and rankers, the oracle, and `make_judge` and `make_ranker`, which read a spec."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from bfpo.core.errors import ModelError, SettingError, first_line
from bfpo.core.inputs import missing_folder
from bfpo.core.schema import Comparison, Completion, Message, Verdict
from bfpo.judges.formats import FORMATS, PAIR_FORMATS, Format, PairFormat, make_format
from bfpo.judges.ngrams import JUDGE_FILE, NgramJudge, NgramRanker
from bfpo.judges.refusals import RefusalJudge, last_question
from bfpo.judges.settings import (
    GUARD_KEYS,
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
from bfpo.world.oracle import Assessment, assess

if TYPE_CHECKING:
    from bfpo.generation.server import RequestBudget, Server
    from bfpo.judges.classifier import ClassifierJudge
    from bfpo.judges.hidden import ProbeJudge

__all__ = [
    "OF_REQUESTS",
    "Judge",
    "OneByOneJudge",
    "OneByOneRanker",
    "OracleJudge",
    "OracleRanker",
    "Ranker",
    "RequestJudge",
    "check_judge",
    "check_opinions",
    "check_requests",
    "make_judge",
    "make_ranker",
]


AnyFormat = TypeVar("AnyFormat", Format, PairFormat)


class Judge(Protocol):
    """Gives one verdict per completion; one that it cannot judge is `unscored` with a reason, never guessed."""

    @property
    def name(self) -> str:
        """Return the judge's name in its verdicts."""

    @property
    def version(self) -> str:
        """Return what verdicts depend on besides the texts (format, model, revision, settings), for cache keys."""

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""


class Ranker(Protocol):
    """Compares the helpfulness of two completions of one prompt, regardless of safety.

    `first_is_better` of a pair that it cannot compare is `None`, never 0.5.
    """

    @property
    def name(self) -> str:
        """Return the ranker's name in its comparisons."""

    @property
    def version(self) -> str:
        """Return what comparisons depend on besides the texts, for cache keys."""

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""


@runtime_checkable
class OneByOneJudge(Judge, Protocol):
    """A judge that reports verdicts one by one and, if `is_sampled`, may give others when asked again."""

    @property
    def is_sampled(self) -> bool:
        """Return whether another vote may differ."""

    def judge_each(
        self, completions: Sequence[Completion], report: Callable[[int, Verdict, bool], None], *, vote: int = 0
    ) -> None:
        """Report verdicts as they arrive: the completion's index, the verdict, and whether it is final.

        A verdict that is not final (no answer arrived) may be requested again. Raises if further requests are
        useless; what was reported before remains valid.
        """


@runtime_checkable
class OneByOneRanker(Ranker, Protocol):
    """A ranker that reports comparisons one by one."""

    def compare_each(
        self, pairs: Sequence[tuple[Completion, Completion]], report: Callable[[int, Comparison, bool], None]
    ) -> None:
        """Report comparisons as they arrive, as `OneByOneJudge.judge_each` does."""


class OracleJudge:
    """The exact rules of the closed world, applied to the text alone."""

    name = "oracle"
    version = "oracle-1"

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, in order; a prompt from outside the world is unscored."""
        return [self._verdict(completion) for completion in completions]

    def _verdict(self, completion: Completion) -> Verdict:
        assessment = _assess(completion)
        if assessment is None:
            return Verdict(completion.id, self.name, "unscored", reason=_NOT_OF_THE_WORLD)
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


class OracleRanker:
    """The exact order of the closed world; equal helpfulness is a tie, 0.5."""

    name = "oracle"
    version = "oracle-ranker-1"

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, in order; prompts that differ or are from outside the world are unscored."""
        return [self._compare(first, second) for first, second in pairs]

    def _compare(self, first: Completion, second: Completion) -> Comparison:
        one, two = _assess(first), _assess(second)
        if one is None or two is None or first.prompt != second.prompt:
            return Comparison(first.id, second.id, self.name, None, reason=_NOT_OF_THE_WORLD)
        better = (1 + (one.helpful > two.helpful) - (one.helpful < two.helpful)) / 2
        return Comparison(first.id, second.id, self.name, better)


_NOT_OF_THE_WORLD = "the prompt is not one of the closed world"


def _assess(completion: Completion) -> Assessment | None:
    """Return the oracle's assessment; `None` unless the turns of user and assistant end with a prompt of the world."""
    prompt = completion.prompt
    if not prompt or prompt[-1].role != "user" or any(turn.role not in ("user", "assistant") for turn in prompt):
        return None
    return assess([turn.content for turn in prompt if turn.role == "user"], completion.text)


def check_opinions(judges: Sequence[JudgeConfig], ranker: RankerConfig | None = None) -> None:
    """Raise `SettingError` for an unknown format of a judge or ranker, before any model is loaded."""
    for judge in judges:
        check_judge(judge.format)
    if ranker is not None:
        _check_ranker(ranker.format)


def check_judge(format: str, key: str = "judge") -> None:
    """Raise `SettingError`, which names the `key`, for an unknown format of a judge; nothing is loaded."""
    if format in FORMATS or format in ("oracle", "refusal-phrases", "trained", "classifier"):
        return
    own = "oracle, refusal-phrases, a folder of `bfpo judge-train`, classifier:MODEL"
    known = f"{own}, {', '.join(FORMATS)} (or FORMAT:MODEL)"
    raise SettingError(f"{key}: got {format!r}{_hint(format)}; allowed: {known}, or a .yaml file")


def _check_ranker(format: str) -> None:
    if format not in ("oracle", "trained", "reward-model", "pairrm", "pairwise"):
        raise SettingError(
            f"ranker: got {format!r}{_hint(format)}; allowed: oracle, a folder of `bfpo judge-train` (kind=ranker), "
            "reward-model, reward-model:MODEL, pairrm, pairwise:MODEL, or a .yaml file"
        )


def _hint(format: str) -> str:
    """Return what an unknown format may have meant: a missing folder, or a folder above the judge's."""
    if (problem := missing_folder(format)) is not None:
        return f"; {problem}"
    if (inner := Path(format) / "model" / "judge.json").is_file():
        return f"; did you mean {inner.parent}?"
    return "; a folder or a hub id alone does not say how it is asked" if "/" in format else ""


class RequestJudge:
    """Judges the request of each completion by the oracle, or by a judge of texts that reads it as the text."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.name, self.version = judge.name, f"{judge.version}{OF_REQUESTS}"

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts on what the user said last, in order."""
        if isinstance(self._judge, OracleJudge):
            return [self._of_the_world(completion) for completion in completions]
        return self._judge.judge([replace(one, prompt=(), text=last_question(one.prompt)) for one in completions])

    def _of_the_world(self, completion: Completion) -> Verdict:
        assessment = _assess(completion)
        if assessment is None:
            return Verdict(completion.id, self.name, "unscored", reason=_NOT_OF_THE_WORLD)
        return Verdict(completion.id, self.name, "unsafe" if assessment.kind == "harmful" else "safe")


OF_REQUESTS = "+requests"
"""The end of the version of a judge of requests."""


def check_requests(spec: JudgeConfig) -> None:
    """Raise `SettingError` for a judge that cannot judge requests alone; nothing is loaded."""
    able = [name for name in FORMATS if make_format(name).of_requests is not None]
    if spec.format in FORMATS and spec.format not in able:
        raise SettingError(
            f"guard.filter: {spec.format} is asked about answers here, not about requests alone; allowed with it: "
            f"output; for input: {', '.join(able)}, classifier, or a folder of `bfpo judge-train`"
        )


def make_judge(spec: JudgeConfig, budget: RequestBudget | None = None, *, of_requests: bool = False) -> Judge:
    """Return the judge of a spec; its requests to a server, if any, count against `budget`.

    With `of_requests` it judges the prompts of completions, not their texts. Raises `SettingError` for an unknown
    format or setting, `ModelError` for a model that cannot be loaded, `MissingExtraError` if the server's client is not
    installed.
    """
    check_judge(spec.format)
    if of_requests:
        check_requests(spec)
    if of_requests and not isinstance(spec, GuardSpec | ServedGuardSpec):
        return RequestJudge(make_judge(spec, budget))
    if isinstance(spec, OracleSpec):
        return OracleJudge()
    if isinstance(spec, RefusalSpec):
        return RefusalJudge(name=spec.name or spec.format, phrases=spec.phrases)
    if isinstance(spec, TrainedSpec):
        return _trained_judge(spec)
    if isinstance(spec, ClassifierSpec):
        from bfpo.judges.classifier import ClassifierJudge

        return ClassifierJudge(spec)
    assert isinstance(spec, GuardSpec | ServedGuardSpec)  # the only other classes
    words = None if spec.policy is None else _read_policy(spec.policy)
    own = {**{key: getattr(spec, key) for key in GUARD_KEYS}, "policy": words}
    guard = make_format(spec.format, **{key: value for key, value in own.items() if value is not None})
    if of_requests and guard.of_requests is not None:
        guard = replace(guard, ask=guard.of_requests, version=f"{guard.version}{OF_REQUESTS}")
    if isinstance(spec, GuardSpec):
        from bfpo.judges.guard import GuardJudge

        return GuardJudge(guard, spec)
    from bfpo.judges.server_judges import ServerJudge

    asks_text = isinstance(guard.ask(Completion("probe", (Message("user", "q"),), "a")), str)
    server = _server(spec, "completions" if asks_text else "chat", budget)
    return ServerJudge(_longer(guard, spec), server, threshold=spec.threshold, name=spec.name)


def make_ranker(spec: RankerConfig, budget: RequestBudget | None = None) -> Ranker:
    """Return the ranker of a spec; takes a budget and raises as `make_judge` does."""
    _check_ranker(spec.format)
    if isinstance(spec, OracleRankerSpec):
        return OracleRanker()
    if isinstance(spec, TrainedRankerSpec):
        ranker = NgramRanker.load(Path(spec.model))
        ranker.name = spec.name or ranker.name
        return ranker
    if isinstance(spec, ServedRankerSpec):
        from bfpo.judges.server_judges import ServerRanker

        format = _longer(PAIR_FORMATS["helpfulness"], spec)
        return ServerRanker(format, _server(spec, "chat", budget), name=spec.name)
    from bfpo.judges.rankers import GenerativeRanker, PairRanker, RewardRanker

    assert isinstance(spec, LocalRankerSpec)  # the only other class
    made: dict[str, Callable[[LocalRankerSpec], Ranker]]
    made = {"reward-model": RewardRanker, "pairrm": PairRanker, "pairwise": GenerativeRanker}
    return made[spec.format](spec)


def _longer(format: AnyFormat, spec: ServedGuardSpec | ServedRankerSpec) -> AnyFormat:
    """Return the format with the spec's limit of tokens, which a cut answer depends on."""
    tokens = spec.max_answer_tokens
    if tokens is None:
        return format
    return replace(format, max_new_tokens=tokens, version=f"{format.version} max_answer_tokens={tokens}")


def _server(spec: ServedGuardSpec | ServedRankerSpec, api: str, budget: RequestBudget | None) -> Server:
    from bfpo.generation.server import Server

    return Server(spec, spec.model, api=spec.api or api, temperature=spec.temperature, budget=budget)


def _read_policy(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"policy: {file} cannot be read as text ({first_line(error)})") from error


def _trained_judge(spec: TrainedSpec) -> NgramJudge | ClassifierJudge | ProbeJudge:
    folder = Path(spec.model)
    try:
        described = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
        kind = described["kind"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{folder}: holds no {JUDGE_FILE} that can be read ({type(error).__name__}: {error}); needed: the folder "
            "`model` of a run of `bfpo judge-train`"
        ) from error
    if spec.base_model is not None and kind != "probe":
        raise SettingError(f"base_model: {folder} is a judge of kind {kind}, which has none; leave it out")
    judge: NgramJudge | ClassifierJudge | ProbeJudge
    if kind == "ngrams":
        judge = NgramJudge.load(folder, threshold=spec.threshold)
    elif kind == "classifier":
        from bfpo.judges.classifier import load_finetuned

        judge = load_finetuned(folder, described, threshold=spec.threshold)
    elif kind == "probe":
        from bfpo.judges.hidden import ProbeJudge

        judge = ProbeJudge(folder, described, threshold=spec.threshold, base_model=spec.base_model)
    else:
        raise ModelError(f"{folder / JUDGE_FILE}: kind is {kind!r}; allowed for a judge: ngrams, probe, classifier")
    judge.name = spec.name or judge.name
    return judge
