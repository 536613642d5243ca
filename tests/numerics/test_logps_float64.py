"""Batched log-probs against one unpadded sequence at a time, full logits, float64: value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bfpo.policy.logps import sequence_logps
from tiny import VOCABULARY, tiny_model

# (prompt, completion) lengths: odd ones, a single-token completion, a prompt of one token, the longest row last
LENGTHS = [(3, 5), (1, 1), (7, 2), (4, 11), (9, 7)]
WEIGHTS = [1.0, -2.0, 0.5, 3.0, -0.25]


def make_rows() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randint(3, VOCABULARY, (prompt,), generator=generator).tolist(),
            torch.randint(3, VOCABULARY, (completion,), generator=generator).tolist(),
        )
        for prompt, completion in LENGTHS
    ]


def pad(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    batch = {
        "input_ids": torch.full((len(rows), width), 2),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.int64),
        "completion_mask": torch.zeros(len(rows), width, dtype=torch.bool),
    }
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        batch["input_ids"][i, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][i, :end] = 1
        batch["completion_mask"][i, len(prompt) : end] = True
    return batch


def one_by_one(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """The definition, token by token: sum of log(exp(z_token) / sum_v exp(z_v))."""
    logps = []
    for prompt, completion in rows:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        total = torch.zeros((), dtype=logits.dtype)
        for position, token in enumerate(completion, start=len(prompt)):
            scores = logits[position - 1]
            total = total + scores[token] - torch.log(torch.exp(scores).sum())
        logps.append(total)
    return logps


def gradient(model: Any, logps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(weight * value for weight, value in zip(WEIGHTS, logps, strict=True)).backward()  # type: ignore[union-attr]
    return {name: parameter.grad.clone().double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-11, 1e-6), (torch.float32, 2e-4, 2e-4)],
    ids=["float64", "float32"],
)
def test_values_and_gradients(
    family: str, dtype: torch.dtype, value_tolerance: float, gradient_tolerance: float
) -> None:
    # float32: a few dozen terms of size about 5, each right to about 1e-6; the gradient likewise, relative.
    # float64: Gemma2 takes its attention's softmax in float32 whatever the dtype, which its gradient shows.
    rows = make_rows()
    exact_model = tiny_model(family, dtype=torch.float64)
    expected = one_by_one(exact_model, rows)
    expected_gradient = gradient(exact_model, expected)

    model = tiny_model(family, dtype=torch.float64).to(dtype)
    found = sequence_logps(model, pad(rows))
    assert found.logps.dtype == torch.float64
    assert found.num_tokens.tolist() == [completion for _, completion in LENGTHS]
    torch.testing.assert_close(found.logps, torch.stack(expected), rtol=0, atol=value_tolerance)

    found_gradient = gradient(model, list(found.logps))
    largest = max(float(value.norm()) for value in expected_gradient.values())
    for name, value in expected_gradient.items():
        assert float((found_gradient[name] - value).norm()) <= gradient_tolerance * largest, name


def test_mean_is_the_sum_over_the_number_of_tokens() -> None:
    model, batch = tiny_model(dtype=torch.float64), pad(make_rows())
    sums = sequence_logps(model, batch).logps
    means = sequence_logps(model, batch, reduction="mean").logps
    lengths = torch.tensor([completion for _, completion in LENGTHS])
    torch.testing.assert_close(means, sums / lengths, rtol=1e-15, atol=0)


def test_rounding_of_the_sum_is_not_float32() -> None:
    """A long completion: summed in float32 the error of the sum alone would be about 1e-3."""
    generator = torch.Generator().manual_seed(1)
    rows = [([5], torch.randint(3, VOCABULARY, (1500,), generator=generator).tolist())]
    exact = tiny_model(dtype=torch.float64, max_position_embeddings=2048)
    model = tiny_model(dtype=torch.float64, max_position_embeddings=2048).float()
    with torch.no_grad():
        error = sequence_logps(model, pad(rows)).logps - sequence_logps(exact, pad(rows)).logps
    assert float(error.abs()) < 2e-4
