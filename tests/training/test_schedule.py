"""The warm-up: its first step learns, later steps are unchanged, and a run of before keeps the one that it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from bfpo.config.train import SCHEDULES
from bfpo.core.errors import SettingError
from bfpo.training.schedule import FromFirstStep, WarmTrainer, no_change, steps_of
from messages import raises


def rates(schedule: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)


SETTINGS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


def made(folder: Path, kind: str, warmup: float, steps: int) -> Any:
    args = TrainingArguments(
        output_dir=str(folder),
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=SETTINGS.get(kind),
        warmup_steps=warmup,
        use_cpu=True,
        report_to="none",
    )
    trainer = WarmTrainer(model=torch.nn.Linear(1, 1), args=args)
    return trainer.create_scheduler(steps, optimizer())


def before(kind: str, warmup: int, steps: int) -> Any:
    given = SETTINGS.get(kind)
    return get_scheduler(
        kind, optimizer(), num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=given
    )


@pytest.mark.parametrize("kind", sorted({*SCHEDULES} - {"constant"}))
@pytest.mark.parametrize("warmup", [1, 4])
def test_the_warm_up_is_one_step_ahead(tmp_path: Path, kind: str, warmup: int) -> None:
    now, then = rates(made(tmp_path, kind, warmup, 10), 10), rates(before(kind, warmup, 10), 10)
    assert then[0] == (2.0 / warmup if kind == "cosine_warmup_with_min_lr" else 0)  # which is ahead by itself
    assert now[:warmup] == [pytest.approx(2.0 * (k + 1) / warmup, rel=1e-15) for k in range(warmup)]
    assert now[warmup:] == then[warmup:]


@pytest.mark.parametrize(("kind", "warmup"), [("constant", 3), ("cosine", 0)])
def test_without_a_warm_up_nothing_changes(tmp_path: Path, kind: str, warmup: int) -> None:
    assert type(made(tmp_path, kind, warmup, 10)) is LambdaLR
    assert rates(made(tmp_path, kind, warmup, 10), 10) == rates(before(kind, warmup, 10), 10)


def goes_on(schedule: Any, state: dict[str, Any], groups: Any, steps: int) -> list[float]:
    schedule.optimizer.load_state_dict(groups)
    schedule.load_state_dict(state)
    return rates(schedule, steps)


@pytest.mark.parametrize("kind", ["cosine", "polynomial", "warmup_stable_decay"])
def test_a_resumed_run_goes_on_with_its_own_warm_up(tmp_path: Path, kind: str) -> None:
    for start, whole in ((before, before), (made, made)):
        arguments: tuple[Any, ...] = (kind, 4, 10) if start is before else (tmp_path, kind, 4, 10)
        first: Any = start(*arguments)
        rates(first, 2)
        torch.save(first.state_dict(), tmp_path / "scheduler.pt")
        state = torch.load(tmp_path / "scheduler.pt", weights_only=True)
        again = made(tmp_path, kind, 4, 10)
        assert isinstance(again, FromFirstStep)
        assert goes_on(again, state, first.optimizer.state_dict(), 8) == rates(whole(*arguments), 10)[2:]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("rate", "steps", "weights", "optim", "said"),
    [
        (5e-7, 1, 26_542_080, "adamw_torch", True),
        (5e-7, 1, 7_000_000_000, "adamw_torch", True),
        (5e-7, 1000, 7_000_000_000, "adamw_torch", False),  # a recipe that works
        (5e-7, 10, 7_000_000_000, "adamw_torch", False),
        (5e-7, 10, 26_542_080, "adamw_torch_fused", True),
        (1e-4, 60, 26_542_080, "adamw_torch_fused", False),  # each of the real rounds
        (1.5e-4, 200, 134_515_008, "adamw_torch_fused", False),
        (1e-9, 100, 10, "lion_32bit", True),
        (1e-9, 100, 10, "sgd", False),
        (1e-9, 100, 10, "adafactor", False),
    ],
)
def test_steps_that_are_too_few_and_too_small_are_named(
    tmp_path: Path, rate: float, steps: int, weights: int, optim: str, said: bool
) -> None:
    args = TrainingArguments(str(tmp_path), learning_rate=rate, optim=optim, use_cpu=True, report_to="none")
    text = no_change(args, steps, weights)
    assert (text != "") == said
    if said:
        assert text.startswith(f"expect no change of behaviour: {steps:,} step")
        assert f"a weight by about {rate * steps:.1g} at most" in text


def test_the_steps_of_a_training(tmp_path: Path) -> None:
    common: Any = {"use_cpu": True, "report_to": "none"}
    assert steps_of(TrainingArguments(str(tmp_path), max_steps=7, **common), 100, 32) == 7
    assert steps_of(TrainingArguments(str(tmp_path), num_train_epochs=2, **common), 100, 32) == 8
    dropping = TrainingArguments(str(tmp_path), num_train_epochs=2, dataloader_drop_last=True, **common)
    assert steps_of(dropping, 100, 32) == 6
    with raises(SettingError, "dataloader_drop_last"):
        steps_of(dropping, 31, 32)
