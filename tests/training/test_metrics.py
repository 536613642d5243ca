from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bfpo.data.labels import CELLS, cell_of
from bfpo.objective.losses import preference_loss
from bfpo.training.metrics import CellMetrics, PairFigures, cell_index, group_index, summarise

CHOSEN = [1.0, 1.0, 0.0, 0.0, 0.9, 0.5]
REJECTED = [1.0, 0.0, 1.0, 0.0, 0.2, 1.0]
IS_BUFFER = [False, False, False, False, True, True]
MARGIN = [3.0, -1.0, -2.0, 4.0, 1.0, 1.0]


def figures(pairs: slice = slice(None), method: str = "bfpo", **settings: str) -> tuple[PairFigures, torch.Tensor]:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[pairs]

    chosen, rejected, margin = column(CHOSEN), column(REJECTED), column(MARGIN)
    made = PairFigures(
        pair_loss=preference_loss(margin, chosen, rejected, method=method, beta=0.5, **settings),
        margin=margin,
        rounding=column([1e-3] * 6),
        beta=0.5,
        chosen_drift=column([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        rejected_drift=column([-2.0, -4.0, -6.0, -8.0, -10.0, -12.0]),
        chosen_tokens=column([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).long(),
        rejected_tokens=column([2.0, 2.0, 2.0, 4.0, 5.0, 6.0]).long(),
        loss_at_start=column([1.0] * 6),
        anchor=column([0.5] * 6),
    )
    return made, group_index(chosen, rejected, torch.tensor(IS_BUFFER)[pairs])


def test_cells_are_those_of_the_data() -> None:
    found = cell_index(torch.tensor(CHOSEN), torch.tensor(REJECTED))
    assert [CELLS[i] for i in found] == [cell_of(c, r) for c, r in zip(CHOSEN, REJECTED, strict=True)]


def test_metrics_of_streams_and_cells() -> None:
    metrics = CellMetrics(torch.device("cpu"))
    for pairs in (slice(0, 2), slice(2, 6)):  # added in parts
        made, group = figures(pairs=pairs)
        metrics.add(made.table(), group)
    named = summarise(metrics.read(), normaliser=0.25, has_target=True, anchored=True)
    assert named["main/num_pairs"] == 4
    assert named["buffer/num_pairs"] == 2
    assert "buffer/safe-safe/num_pairs" not in named
    # targets +.5, +1, -1, -.5: margins 3, -1, -2, 4 are right, wrong, right, wrong
    assert named["main/accuracy"] == 0.5
    assert [named[f"main/{cell}/accuracy"] for cell in CELLS] == [1, 0, 1, 0]
    assert [named[f"main/{cell}/target"] for cell in CELLS] == [0.5, 1, -1, -0.5]
    assert [named[f"main/{cell}/beta_margin"] for cell in CELLS] == [1.5, -0.5, -1.0, 2.0]
    assert named["main/safe-safe/loss"] == pytest.approx((3 - 0.5 / 0.5) ** 2)
    assert named["main/safe-safe/normalised_loss"] == pytest.approx(0.25 * (3 - 0.5 / 0.5) ** 2)
    assert named["main/loss_at_start"] == 0.25
    # the favoured completion: chosen, chosen, rejected, rejected
    assert named["main/favoured_drift"] == pytest.approx((1 + 2 - 6 - 8) / 4)
    assert named["main/favoured_drift_per_token"] == pytest.approx((1 + 1 - 3 - 2) / 4)
    assert named["main/chosen_tokens"] == 2.5
    assert named["main/swapped_pairs"] == 2
    assert named["main/dropped_pairs"] == 0
    assert named["main/anchor"] == 0.5
    assert metrics.empty


@pytest.mark.parametrize("noise", [0.0, 3e-4, -3e-4, 1e-3])
def test_a_margin_within_rounding_is_neither_right_nor_wrong(noise: float) -> None:
    made, group = figures(pairs=slice(0, 4))
    near = dataclasses.replace(made, margin=torch.tensor([noise, noise, -2.0, 4.0], dtype=torch.float64))
    metrics = CellMetrics(torch.device("cpu"))
    metrics.add(near.table(), group)
    named = summarise(metrics.read(), normaliser=0.25, has_target=True)
    # two ties, one right, one wrong: whatever the sign of the noise
    assert (named["main/accuracy"], named["main/tied_pairs"]) == (0.5, 2)
    assert [named[f"main/{cell}/accuracy"] for cell in CELLS] == [0.5, 0.5, 1, 0]
    assert "main/unsafe-safe/tied_pairs" not in named
    metrics.add(made.table(), group)
    assert not any("tied" in name for name in summarise(metrics.read(), normaliser=0.25, has_target=True))


def test_sums_of_a_checkpoint_of_before_have_fewer_columns() -> None:
    made, group = figures()
    metrics = CellMetrics(torch.device("cpu"))
    metrics.add(made.table(), group)
    metrics.end_step()
    held = metrics.state()
    metrics.load([row[:14] for row in held])
    favoured_pairs = 5  # its place; what was summed before counted all of these
    assert metrics.state() == [[*row[:14], 0, 0, 0, 0, row[favoured_pairs]] for row in held]


def test_the_absent_side_of_a_single_answer_has_no_drift() -> None:
    """Of an undesirable answer alone the favoured side is the absent one."""
    made, group = figures(slice(0, 4))  # the third and the fourth favour the rejected side
    tokens = torch.tensor([2, 2, 0, 0])
    single = dataclasses.replace(made, rejected_tokens=tokens, rejected_drift=-2.0 * tokens.double())
    metrics = CellMetrics(torch.device("cpu"))
    metrics.add(single.table(), group)
    named = summarise(metrics.read(), normaliser=1.0, has_target=False)
    assert named["main/favoured_drift"] == pytest.approx((1 + 2) / 2)
    assert named["main/favoured_drift_per_token"] == pytest.approx(1.0)
    assert named["main/accuracy"] == 0.5
    assert "main/unsafe-unsafe/accuracy" in named
    assert "main/unsafe-unsafe/favoured_drift" not in named


def test_dropped_pairs_count_for_the_loss_and_not_for_the_accuracy() -> None:
    made, group = figures(slice(0, 4), "dpo_s")
    metrics = CellMetrics(torch.device("cpu"))
    metrics.add(made.table(), group)
    named = summarise(metrics.read(), normaliser=1.0, has_target=False)
    assert named["main/dropped_pairs"] == 2
    assert named["main/loss"] == pytest.approx((math.log1p(math.exp(0.5)) + math.log1p(math.exp(-1.0))) / 4)
    assert named["main/accuracy"] == 0.5
    assert "main/safe-safe/accuracy" not in named
    assert not any(name.endswith(("target", "anchor")) for name in named)


def test_steps_are_reduced_when_they_end_and_reading_starts_anew() -> None:
    made, group = figures()
    metrics = CellMetrics(torch.device("cpu"))
    metrics.add(made.table(), group)
    step = metrics.end_step(lambda sums: 2 * sums)
    assert step[:, 0].sum() == 12
    metrics.add(made.table(), group)
    metrics.end_step()
    held = metrics.state()
    assert summarise(metrics.read(), normaliser=1.0, has_target=True)["main/num_pairs"] == 12
    assert metrics.empty
    metrics.load(held)
    assert not metrics.empty
    assert metrics.state() == held
    metrics.load(None)
    assert summarise(metrics.read(), normaliser=1.0, has_target=True) == {}


def test_the_pairs_past_their_target_and_their_share_of_the_gradient() -> None:
    """beta h = 1.5, -.5, -1, 2 with targets .5, 1, -1, -.5: the first is past its target, the third is on it."""
    for link, past_gradient in (("squared", 4 / (4 + 6 + 0 + 10)), ("one_sided", 0.0)):
        made, group = figures(slice(0, 4), link=link)
        metrics = CellMetrics(torch.device("cpu"))
        metrics.add(made.table(), group)
        named = summarise(metrics.read(), normaliser=0.25, has_target=True)
        assert named["main/past_target"] == 0.25
        assert [named[f"main/{cell}/past_target"] for cell in CELLS] == [1, 0, 0, 0]
        assert named["main/past_gradient"] == pytest.approx(past_gradient)
        assert named["main/safe-safe/past_gradient"] == float(link == "squared")
    made, group = figures(slice(0, 4), link="logistic")
    metrics = CellMetrics(torch.device("cpu"))
    metrics.add(made.table(), group)
    assert not [name for name in summarise(metrics.read(), normaliser=1, has_target=False) if "past" in name]
