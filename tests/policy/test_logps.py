from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bfpo.errors import ModelError, SettingError
from bfpo.policy.logps import sequence_logps
from tiny import tiny_model


def batch_of(completion_mask: list[list[int]]) -> dict[str, torch.Tensor]:
    mask = torch.tensor(completion_mask, dtype=torch.bool)
    return {
        "input_ids": torch.arange(3, 3 + mask.numel()).reshape(mask.shape),
        "attention_mask": torch.ones_like(mask, dtype=torch.int64),
        "completion_mask": mask,
    }


class FullLogits(nn.Module):
    """A model whose forward takes no `logits_to_keep`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


class Wrapped(nn.Module):
    """What data parallelism does: the model is `.module` and the signature says nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_a_model_without_logits_to_keep_gives_the_same() -> None:
    model, batch = tiny_model(dtype=torch.float64), batch_of([[0, 0, 1, 1, 1], [0, 0, 0, 1, 0]])
    expected = sequence_logps(model, batch).logps
    torch.testing.assert_close(sequence_logps(FullLogits(model), batch).logps, expected, rtol=1e-13, atol=0)


def test_the_head_runs_at_the_columns_of_completions_only() -> None:
    model, batch = tiny_model(), batch_of([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]])
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[:2])))
    sequence_logps(model, batch)
    sequence_logps(Wrapped(model), batch)
    assert seen == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("mask", "words"),
    [([[0, 1, 1], [0, 0, 0]], "row 1 has 0 completion tokens"), ([[1, 1, 0], [0, 1, 1]], "row 0 .*column 0")],
)
def test_masks_that_make_no_sense(mask: list[list[int]], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        sequence_logps(tiny_model(), batch_of(mask))


def test_unknown_reduction() -> None:
    with pytest.raises(SettingError, match="got 'median'; allowed: sum, mean"):
        sequence_logps(tiny_model(), batch_of([[0, 1]]), reduction="median")  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [[[0, 1, 1], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]]])
def test_padding_on_the_left_is_refused(mask: list[list[int]]) -> None:
    batch = {**batch_of([[0, 0, 1], [0, 0, 1]]), "attention_mask": torch.tensor(mask)}
    with pytest.raises(ModelError, match="row 0 has padding before or between tokens"):
        sequence_logps(tiny_model(), batch)
