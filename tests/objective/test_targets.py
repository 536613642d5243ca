"""The target of a pair, and labels and settings that cannot be used."""

from __future__ import annotations

import math

import pytest
import torch

from bfpo.core.errors import LabelError, SettingError
from bfpo.objective.losses import bfpo_target, check_labels
from messages import raises

# chosen, rejected: both safe, only the chosen, only the rejected, none
CELLS = (torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize(("alpha", "target"), [(0.5, [0.5, 1.0, -1.0, -0.5]), (0.0, [1.0, 1.5, -0.5, 0.0])])
def test_the_four_cells_have_the_published_targets(alpha, target):
    assert bfpo_target(*CELLS, alpha=alpha).tolist() == target


def test_another_safety_weight():
    # B3 = 1/(5-1): 5/4 s_c - 1/4 s_r - 1/2
    assert bfpo_target(*CELLS, safety_weight=5.0).tolist() == [0.5, 0.75, -0.75, -0.5]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_bits_of_any_type_are_values_and_not_indexes(dtype):
    chosen, rejected = (label.to(dtype) for label in CELLS)
    assert bfpo_target(chosen, rejected).tolist() == [0.5, 1.0, -1.0, -0.5]
    assert bfpo_target(chosen, rejected).dtype == torch.float64


def test_labels_of_two_precisions_are_taken():
    assert bfpo_target(CELLS[0], CELLS[1].double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        (1.5, "rejected_is_safe[2]"),
        (-0.1, "rejected_is_safe[2]"),
        (math.nan, "rejected_is_safe[2]"),
        (math.inf, "rejected_is_safe[2]"),
    ],
)
def test_a_label_that_is_no_probability_is_named_with_its_pair(bad, key):
    rejected = CELLS[1].clone()
    rejected[2] = bad
    with raises(LabelError, key):
        bfpo_target(CELLS[0], rejected)


def test_shapes_and_types_that_are_no_labels():
    with raises(LabelError, "chosen_is_safe"):
        check_labels(CELLS[0], CELLS[1][:3])
    with raises(LabelError, "chosen_is_safe"):
        check_labels(CELLS[0][:, None], CELLS[1][:, None])
    with raises(LabelError, "rejected_is_safe"):
        check_labels(CELLS[0], [1, 0, 1, 0])
    with raises(LabelError, "complex64"):
        check_labels(CELLS[0].to(torch.complex64), CELLS[1])


@pytest.mark.parametrize("safety_weight", [1.0, 0.5, -3.0, math.inf, math.nan, "3", True])
def test_a_safety_weight_without_b3_is_refused(safety_weight):
    with raises(SettingError, "safety_weight", repr(safety_weight)):
        bfpo_target(*CELLS, safety_weight=safety_weight)


@pytest.mark.parametrize("alpha", [math.inf, math.nan, None])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with raises(SettingError, "alpha", repr(alpha)):
        bfpo_target(*CELLS, alpha=alpha)


def test_no_pair_has_no_target():
    assert bfpo_target(torch.zeros(0), torch.zeros(0)).shape == (0,)
