from __future__ import annotations

import math

import pytest
import torch

from bfpo.core.errors import TrainingError
from bfpo.objective.methods import BFPO
from bfpo.training.checks import DivergenceWatch, StartCheck, check_finite, implied_losses
from messages import raises
from tiny import tiny_pairs

PAIRS = tiny_pairs(6, 2)
WEIGHTS = torch.full((6,), 1 / 6, dtype=torch.float64)


def implied(beta: float) -> float:
    targets = [1.5 * pair.chosen_is_safe - 0.5 * pair.rejected_is_safe - 0.5 for pair in PAIRS]
    return sum((target / beta) ** 2 for target in targets) / len(targets)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_tolerance_is_that_of_rounding(beta: float, dtype: torch.dtype) -> None:
    check = StartCheck(BFPO(beta=beta), dtype=dtype, log_vocabulary=math.log(97))
    right = implied(beta)
    assert float(implied_losses(PAIRS, BFPO(beta=beta)).mean()) == pytest.approx(right)
    check(right, PAIRS, WEIGHTS)
    rounding = float(check.margin_tolerance(PAIRS).max())
    assert rounding < {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}[dtype]
    for wrong in (right * 1.2 + 4 * rounding**2 + 4 * rounding / beta, math.nan, math.inf):
        with raises(TrainingError):
            check(wrong, PAIRS, WEIGHTS)


def test_a_small_margin_is_found_in_float32() -> None:
    check = StartCheck(BFPO(beta=0.1), dtype=torch.float32, log_vocabulary=math.log(97))
    margin = 0.05  # nats, on every pair, along its target
    seen = sum(
        (margin * (1 if t > 0 else -1) - t / 0.1) ** 2
        for t in (1.5 * pair.chosen_is_safe - 0.5 * pair.rejected_is_safe - 0.5 for pair in PAIRS)
    ) / len(PAIRS)
    with raises(TrainingError):
        check(seen, PAIRS, WEIGHTS, largest_margin=margin)


def test_what_is_not_finite_names_its_row() -> None:
    check_finite(torch.zeros(4), str)
    for row, pair, completion in ((1, "name-1", "chosen"), (2, "name-0", "rejected")):
        logps = torch.zeros(4)
        logps[row] = math.nan
        with raises(TrainingError, pair, completion):
            check_finite(logps, lambda place: f"name-{place}")


def watched(losses: list[float], **settings: float) -> list[int]:
    """Return the steps, ten apart, at which a watch warns about these losses; the start is 1."""
    watch = DivergenceWatch(1e-3, **{"warmup_steps": 0, **settings})  # type: ignore[arg-type]
    last = len(losses)
    return [10 * i for i, loss in enumerate(losses, start=1) if watch.update(10 * i, loss, 1.0, last=i == last)]


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([0.9, 0.7, 0.5, 0.4], []),
        ([1.0, 1.0, 1.0, 1.0], []),
        ([3.0, 3.0, 3.0, 3.0], [20]),  # once
        ([1.3, 0.5, 0.5, 0.5], []),  # a start that settles
        ([0.8, 0.7, 3.0, 4.0, 5.0, 5.0], [40]),
        ([0.8, 9.0], [20]),  # the run ends before it can be patient
        ([math.nan, math.nan], []),  # an error elsewhere
    ],
)
def test_divergence(losses: list[float], steps: list[int]) -> None:
    assert watched(losses) == steps


def test_warm_up_is_left_out() -> None:
    assert watched([3.0, 3.0, 3.0, 0.1, 0.1, 0.1, 0.1], warmup_steps=30) == []
    assert watched([3.0] * 7, warmup_steps=30) == [50]


def test_the_warning_names_the_setting() -> None:
    watch = DivergenceWatch(3e-4, warmup_steps=0)
    text = watch.update(20, 3.0, 1.0, last=True)
    assert text is not None
    assert "3.00 times its value at the start" in text
    assert "Lower learning_rate: it is 0.0003, try 3e-05" in text
    assert watch.message == text
