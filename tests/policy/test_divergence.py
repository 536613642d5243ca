from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bfpo.core.errors import ModelError
from bfpo.policy.divergence import token_divergence
from messages import raises
from tiny import FAMILIES, VOCABULARY, tiny_model


def by_definition(policy: Any, start: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Float64, one position and one token at a time."""
    found = []
    for place in range(len(answer)):
        ids = torch.tensor([[*prompt, *answer[:place]]])
        p, q = (model(input_ids=ids).logits[0, -1].double().tolist() for model in (policy, start))
        norms = [max(z) + math.log(math.fsum(math.exp(one - max(z)) for one in z)) for z in (p, q)]
        logs = [([one - norm for one in z]) for z, norm in zip((p, q), norms, strict=True)]
        found.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(*logs, strict=True) if math.exp(a) > 0))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt_neox"])
def test_it_agrees_with_float64_at_every_length(family: str) -> None:
    assert family in FAMILIES
    policy, start = (tiny_model(family, seed=seed, dtype=torch.float64).eval() for seed in (1, 2))
    generator = torch.Generator().manual_seed(0)
    for num_prompt, num_answer in ((1, 1), (3, 2), (7, 31), (2, 32), (5, 33), (1, 65)):
        ids = torch.randint(3, VOCABULARY, (num_prompt + num_answer,), generator=generator).tolist()
        found = token_divergence(policy, start, ids[:num_prompt], ids[num_prompt:])
        assert found.dtype == torch.float64
        expected = by_definition(policy, start, ids[:num_prompt], ids[num_prompt:])
        within = 1e-6 if family == "gemma2" else 1e-9  # its attention is in float32 within
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=within, atol=within / 10)
        assert min(expected) > 1e-7
    assert token_divergence(policy, policy, [3, 4], [5, 6, 7]).tolist() == [0.0, 0.0, 0.0]
    assert token_divergence(policy, start, [3], []).tolist() == []


class Given(nn.Module):
    """Gives the same logits (V,) at every position."""

    def __init__(self, logits: list[float], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logits, self.device = torch.tensor(logits, dtype=dtype), torch.device("cpu")

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.logits.expand(1, input_ids.shape[1], -1))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e4, -1e4], [-1e4, 1e4], 2e4),
        ([0.0, -math.inf], [0.0, 0.0], math.log(2)),
        ([0.0, -math.inf], [0.0, -math.inf], 0.0),
        ([0.0, 0.0], [0.0, -math.inf], math.inf),
        ([3e38, 3e38], [0.0, 0.0], 0.0),
        ([0.0, -800.0], [0.0, 0.0], math.log(2)),
    ],
)
def test_extreme_logits(ours: list[float], theirs: list[float], expected: float) -> None:
    found = token_divergence(Given(ours), Given(theirs), [0], [1, 0, 1])
    assert found.tolist() == pytest.approx([expected] * 3, rel=1e-12, abs=1e-15)


def test_two_vocabularies_have_no_divergence() -> None:
    with raises(ModelError, "same vocabulary"):
        token_divergence(Given([0.0, 1.0]), Given([0.0, 1.0, 2.0]), [0], [1])
