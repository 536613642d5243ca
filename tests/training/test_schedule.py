"""The warm-up: its first step learns, later steps are unchanged, and a run of before keeps the one that it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from bfpo.config.train import SCHEDULES
from bfpo.training.schedule import FromFirstStep, WarmTrainer


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
