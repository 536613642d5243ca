"""What the comparison runs: rivals as recipes of stages, settings to try for each, and the chains that they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bfpo.commands.interpolate import model_name
from bfpo.config import CompareConfig, InterpolateConfig
from bfpo.experiments.chains import Chain, Step
from bfpo.experiments.steps import CEILING, START, asking, sft_step, train_step

__all__ = ["RIVALS", "Rival", "Trial", "chains_of", "models_of", "prompts_file", "scores_folder"]

Trial = Mapping[str, float]
Part = str

_GRID: tuple[Trial, ...] = tuple({"beta": beta, "learning_rate": rate} for rate in (1e-3, 2e-3) for beta in (0.1, 0.05))
_BLENDS: tuple[Trial, ...] = tuple(
    {"beta": beta, "learning_rate": 1e-3, "weight": weight}
    for beta, weight in ((0.1, 0.5), (0.1, 0.75), (0.1, 0.25), (0.05, 0.5))
)


def _with(name: str, *values: float) -> tuple[Trial, ...]:
    return tuple({"beta": beta, "learning_rate": 1e-3, name: value} for value in values for beta in (0.1, 0.05))


@dataclass(frozen=True, slots=True)
class Rival:
    """A method as the comparison runs it: `kind` names its recipe, `trials` the settings to try, the quick ones first.

    `trainings`: how many trainings stand behind one model; each has the same number of steps.
    """

    name: str
    title: str
    kind: str = "loss"
    trials: tuple[Trial, ...] = field(default=_GRID)
    trainings: int = 1


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("bfpo", "BFPO"),
        Rival("dpo_h", "DPO-H"),
        Rival("dpo_s", "DPO-S"),
        Rival("dpo_mix", "DPO-mix"),
        Rival("ipo", "IPO"),
        Rival("dpo_safe_first", "DPO safe-first"),
        Rival("safedpo", "SafeDPO", trials=_with("safedpo_delta", 10.0, 2.0)),
        Rival("bso", "BSO", trials=_with("bso_shift", 30.0, 10.0)),
        Rival("linear_sum", "linear reward sum", trials=_with("safety_share", 0.5, 0.75)),
        Rival("modpo", "MODPO", "modpo", _with("safety_share", 0.5, 0.25), 2),
        Rival("sacpo", "SACPO", "sacpo", trainings=2),
        Rival("p_sacpo", "P-SACPO", "p_sacpo", _BLENDS, 2),
        Rival("soup", "soup", "soup", _BLENDS, 2),
    )
}


@dataclass(slots=True)
class _Seed:
    """The chains of one seed as they are asked for: what two rivals need is run once."""

    config: CompareConfig
    root: Path
    seed: int
    chains: dict[str, Chain] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.root / f"seed-{self.seed}"

    def sft(self, name: str) -> tuple[str, Path]:
        step = sft_step(self.config, self.root, name, self.seed)
        self.chains.setdefault(name, Chain(name, self.seed, (step,)))
        return name, step.out / "model"

    def train(self, method: str, trial: Trial, start: tuple[str, Path], **models: tuple[str, Path]) -> tuple[str, Path]:
        name = "-".join([method, *(f"{key}={value:g}" for key, value in trial.items())])
        name = name if start[0] == START else f"{name}-after-{start[0]}"
        settings = {**trial, **{key: str(path) for key, (_, path) in models.items()}}
        step = train_step(self.config, self.root, method, settings, start[1], self.runs / name, self.seed)
        needs = (start[0], *(other for other, _ in models.values()))
        self.chains.setdefault(name, Chain(name, self.seed, (step,), needs))
        return name, step.out / "model"

    def blend(self, name: str, first: tuple[str, Path], second: tuple[str, Path], weight: float) -> tuple[str, Path]:
        config = InterpolateConfig(first=str(first[1]), second=str(second[1]), weights=[weight])
        step = Step("interpolate", config, self.runs / name)
        self.chains.setdefault(name, Chain(name, self.seed, (step,), (first[0], second[0])))
        return name, step.out / "models" / model_name(weight)

    def model(self, rival: Rival, trial: Trial) -> tuple[str, Path]:
        """Return the chain and the folder of a rival's model, with all that it needs before it."""
        start = self.sft(START)
        if rival.kind == "loss":
            return self.train(rival.name, trial, start)
        common = {key: trial[key] for key in ("beta", "learning_rate")}
        if rival.kind == "modpo":
            return self.train("modpo", trial, start, margin_model=self.train("dpo_s", common, start))
        helpful = self.train("dpo_h", common, start)
        second = self.train("dpo_s", common, start if rival.kind == "soup" else helpful)
        if rival.kind == "sacpo":
            return second
        name = f"{rival.name}-" + "-".join(f"{key}={value:g}" for key, value in trial.items())
        return self.blend(name, helpful, second, trial["weight"])

    def ask(self, name: str, model: tuple[str, Path], part: Part) -> None:
        title = f"{name} on {part}"
        runs = self.runs / "asked" / part / name
        pairs = start = None
        if part == "test" and name not in (START, CEILING):
            pairs, start = self.root / "data" / f"seed-{self.seed}" / "held_out.jsonl", self.sft(START)[1]
        steps = asking(self.config, prompts_file(self.root, part), model[1], runs, self.seed, start, pairs)
        self.chains.setdefault(title, Chain(title, self.seed, tuple(steps), (model[0],)))


def prompts_file(root: Path, part: Part) -> Path:
    """Return the prompts of a part of the held-out topics."""
    return root / "data" / f"{part}.jsonl"


def scores_folder(root: Path, name: str, seed: int, part: Part) -> Path:
    """Return where the answers and verdicts of a model on a part are: `answers/` and `scores/`."""
    return root / f"seed-{seed}" / "asked" / part / name


def models_of(rival: Rival, trials: Iterable[int]) -> list[str]:
    """Return the names under which a rival is asked at these of its trials."""
    return [f"{rival.name}-trial{number}" for number in trials]


def chains_of(
    config: CompareConfig, root: Path, seed: int, wanted: Mapping[str, Iterable[int]], part: Part
) -> list[Chain]:
    """Return the chains of one seed that train each rival at the numbers of its trials in `wanted`, and ask it.

    Start and ceiling are asked beside them.
    """
    plan = _Seed(config, root, seed)
    for name in (START, CEILING):
        plan.ask(name, plan.sft(name), part)
    for name, numbers in wanted.items():
        rival = RIVALS[name]
        numbers = list(numbers)
        for number, title in zip(numbers, models_of(rival, numbers), strict=True):
            plan.ask(title, plan.model(rival, rival.trials[number]), part)
    return list(plan.chains.values())
