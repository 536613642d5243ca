"""Chains of stages, the points of a sweep with all configs checked before anything runs, and their results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bfpo.config import (
    AlignConfig,
    EvaluateConfig,
    GenerateConfig,
    ReferenceConfig,
    StageConfig,
    SweepConfig,
    load_config,
)
from bfpo.core.errors import BfpoError, ConfigError, RunError
from bfpo.core.records import load, load_lines, narrowed
from bfpo.core.schema import Score, Verdict, VerdictRow
from bfpo.core.yaml_text import read_yaml
from bfpo.data.read import read_completions
from bfpo.runs.stages import check_stage
from bfpo.scores.accuracy import accuracy_scores
from bfpo.scores.records import AccuracyRow, InterpolateFile
from bfpo.scores.scores import Judged, join_verdicts

__all__ = [
    "Chain",
    "Point",
    "Step",
    "blend_name",
    "chains_of",
    "plan_points",
    "read_accuracy",
    "read_judged",
    "read_verdicts",
    "scores_of",
]

REFERENCE, TOKENS = "reference", "tokens"
_LONGEST_NAME = 200  # bytes; file systems take 255, and logs add to the name


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of a chain; `out` is its run folder."""

    stage: str
    config: StageConfig
    out: Path


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Stages that run one after another in one process; `needs` names chains of the same seed that must end before.

    `memory` is an estimate in bytes, 0 if unknown.
    """

    name: str
    seed: int
    steps: tuple[Step, ...]
    needs: tuple[str, ...] = ()
    memory: int = 0

    @property
    def title(self) -> str:
        """Return the chain's name in progress lines."""
        return f"seed {self.seed} {self.name}"

    @property
    def log_name(self) -> str:
        """Return the name of its log file."""
        return f"{self.seed}-{_folder_name(self.name)}.log"


@dataclass(frozen=True, slots=True)
class Point:
    """One model of a sweep: its settings, as values and as overrides `key=value` of the config file.

    `train` is the config of its training, `None` for a blend.
    """

    name: str
    settings: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    train: AlignConfig | None = None

    @property
    def start(self) -> str:
        """Return the model that exists before anything runs: the blend, or the start of the training."""
        return str(self.settings["model"]) if self.train is None else self.train.model

    def place(self, root: Path) -> Path:
        """Return the folder of its runs."""
        return root / "points" / _folder_name(self.name)

    def training(self, root: Path) -> list[str]:
        """Return the overrides of its training: its own, its name in trackers, and the token cache that all share."""
        assert self.train is not None
        tokens = [] if self.train.token_cache else [f"token_cache={json.dumps(str(root / TOKENS))}"]
        named = self.train.run_name or not self.train.report_to
        return [*self.overrides, *([] if named else [f"run_name={json.dumps(self.name)}"]), *tokens]

    def model(self, root: Path) -> Path:
        """Return the folder of the model to evaluate."""
        return Path(self.start) if self.train is None else self.place(root) / "train" / "model"


def plan_points(config: SweepConfig) -> list[Point]:
    """Return the points, with all their configs checked; nothing is loaded.

    Raises `ConfigError` for a config that a stage refuses and for points of the same name, `RunError` for invalid
    blends.
    """
    points = _blends(Path(config.blends)) if config.blends is not None else list(_grid(config))
    folders: dict[str, Point] = {}
    for point in points:
        folder = _folder_name(point.name)
        if folder in folders:
            raise ConfigError(f"grid: {point.name} occurs twice; allowed: each value of a key once")
        if len(folder.encode()) > _LONGEST_NAME:
            raise ConfigError(
                f"grid: {point.name[:60]}...: too long for the name of a folder; sweep fewer keys at once"
            )
        folders[folder] = point
    _refuse_own_key(config.generate, "generate", "model")
    if config.evaluate is not None:
        _refuse_own_key(config.evaluate, "evaluate", "completions")
    for point in points:  # checked with the start model, as a stage checks that its model exists
        for step in _asking(config, point, Path("OUT"), Path(point.start)):
            check_stage(step.stage, step.config)
    return points


def _blends(run: Path) -> list[Point]:
    file = run / "models.json"
    try:
        blends = load(InterpolateFile, file).models
    except RunError as error:
        raise RunError(f"blends: cannot be read as a run of `bfpo interpolate` ({error})") from error
    points = [Point(f"weight={blend.weight:g}", asdict(blend)) for blend in blends]
    models = [Path(point.start) for point in points]
    if missing := [str(model) for model in models if not model.is_dir()]:
        raise RunError(f"{file}: {missing[0]} does not exist; continue that run with --resume, or check blends")
    if not points:
        raise RunError(f"{file}: holds no model; check blends")
    return points


def _grid(config: SweepConfig) -> Iterator[Point]:
    keys = list(config.grid)
    for one, other in itertools.permutations(keys, 2):
        if other.startswith((f"{one}.", f"{one}[")):
            raise ConfigError(f"grid: {one} and {other}: the first contains the second; sweep one of the two")
    problems: dict[str, str] = {}
    for values in itertools.product(*config.grid.values()):
        settings = dict(zip(keys, values, strict=True))
        name = ",".join(f"{key}={_text(value)}" for key, value in settings.items())
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())
        try:
            train = load_config(AlignConfig, config.train, overrides)
            check_stage("train", train)
            if train.push_to_hub is not None:
                raise ConfigError(
                    f"push_to_hub: got {train.push_to_hub!r}, to which every point would push over the one before; "
                    "leave it out, and push one point with: bfpo export OUT/points/NAME/train --out DIR --push ORG/NAME"
                )
            if train.reference in ("auto", "precompute"):
                load_config(ReferenceConfig, config.train, overrides)
        except BfpoError as error:
            text = str(error)
            for override in overrides:  # the user did not write these as --set
                text = text.replace(f"--set {override}: ", "")
            problems.setdefault(text, name)  # one error is reported once, not for every point
            continue
        yield Point(name, settings, overrides, train)
    if problems:
        where = f"on top of {config.train}"
        raise ConfigError("\n".join(f"grid: {name} {where}: {problem}" for problem, name in problems.items()))


def _text(value: Any) -> str:
    """Return a value as in a name: short, and different for different values."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def _refuse_own_key(file: str, name: str, key: str) -> None:
    """Raise `ConfigError` if a file sets a key that the sweep sets; other errors are left to its loader."""
    try:
        values, _ = read_yaml(file)
    except ConfigError:
        return
    if isinstance(values, Mapping) and key in values:
        raise ConfigError(f"{name}: {file} sets {key}, which differs between points; remove it from the file")


def chains_of(config: SweepConfig, points: list[Point], root: Path, memory: Mapping[str, int]) -> list[Chain]:
    """Return a chain for each point, after one for the reference log-probs they share; `memory`: bytes by point."""
    chains: list[Chain] = []
    needs: tuple[str, ...] = ()
    first = points[0]
    if first.train is not None and first.train.reference in ("auto", "precompute"):
        assert config.train is not None  # the config has checked it
        reference = load_config(ReferenceConfig, Path(config.train), first.training(root))
        step = Step("reference", reference, root / REFERENCE)
        chains, needs = [Chain(REFERENCE, config.seed, (step,), memory=memory.get(first.name, 0))], (REFERENCE,)
    for point in points:
        steps: tuple[Step, ...] = _asking(config, point, root, point.model(root))
        if point.train is not None:
            assert config.train is not None
            train = load_config(AlignConfig, Path(config.train), point.training(root))
            steps = (Step("train", train, point.place(root) / "train"), *steps)
        chains.append(Chain(point.name, config.seed, steps, needs, memory.get(point.name, 0)))
    return chains


def _asking(config: SweepConfig, point: Point, root: Path, model: Path) -> tuple[Step, Step]:
    answers, scores = scores_of(point, root)
    generate = load_config(GenerateConfig, config.generate, [f"model={json.dumps(str(model))}"])
    completions = f"completions={json.dumps(str(answers / 'completions.jsonl'))}"
    evaluate = load_config(EvaluateConfig, config.evaluate, [completions])
    return Step("generate", generate, answers), Step("evaluate", evaluate, scores)


def scores_of(point: Point, root: Path) -> tuple[Path, Path]:
    """Return the run folders of a point's answers and of their verdicts."""
    return point.place(root) / "answers", point.place(root) / "scores"


def _folder_name(name: str) -> str:
    return "".join("_" if character in "/\\" or not character.isprintable() else character for character in name)


def blend_name(weight: float) -> str:
    """Return the folder name of an interpolated model; `weight` is that of the second model."""
    return f"weight-{weight:g}"


def read_judged(answers: Path, scores: Path, *, seed: int = 0) -> list[Judged]:
    """Return the judged rows of the run folders of `generate` and of `evaluate`, in the order of the completions."""
    completions = read_completions(answers / "completions.jsonl")
    verdicts = read_verdicts(scores / "verdicts.jsonl")
    return join_verdicts(completions, [verdicts[completion.id] for completion in completions], seed=seed)


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """Return the verdicts of a `verdicts.jsonl` by the id of the completion."""
    return {row.completion_id: narrowed(Verdict, row) for row in load_lines(VerdictRow, path)}


def read_accuracy(runs: Sequence[Path], *, confidence: float = 0.95) -> list[Score]:
    """Return the accuracy on held-out pairs from `scores/accuracy.jsonl` of the runs, one per seed."""
    files = [run / "scores" / "accuracy.jsonl" for run in runs]
    found = [(row, seed) for seed, file in enumerate(files) if file.exists() for row in load_lines(AccuracyRow, file)]
    rows, seeds = [row for row, _ in found], [seed for _, seed in found]
    return accuracy_scores(rows, seeds=seeds, confidence=confidence) if found else []
