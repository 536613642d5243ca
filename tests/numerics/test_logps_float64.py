"""Log-probs of micro-batches against one unpadded sequence at a time, full logits, float64: value and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bfpo.data.pack import Form, collate_pairs, split_by_tokens
from bfpo.data.tokenize import TokenPair
from bfpo.policy.logps import sequence_logps
from bfpo.policy.probe import choose_form
from tiny import FAMILIES, VOCABULARY, tiny_model

Lengths = tuple[int, int, int]

# (prompt, chosen, rejected): odd ones, single tokens, prompts of one token (an empty text's), rows beyond a window of 6
ODD: list[Lengths] = [(3, 5, 4), (1, 1, 1), (7, 2, 13), (1, 11, 1), (9, 1, 7), (2, 8, 8)]
ONE: list[Lengths] = [(5, 3, 6)]
FIFTY: list[Lengths] = [(1 + i % 7, 1 + (3 * i) % 5, 1 + (5 * i) % 6) for i in range(50)]


def make_pairs(lengths: Sequence[Lengths]) -> list[TokenPair]:
    generator = np.random.default_rng(5)

    def ids(length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return generator.integers(3, VOCABULARY, length).astype(np.int32)

    return [TokenPair(f"pair {i}", *map(ids, each), 1.0, 0.0) for i, each in enumerate(lengths)]


def one_by_one(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """The definition, token by token: sum of log(exp(z_token) / sum_v exp(z_v))."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            completion = getattr(pair, side)
            ids = torch.tensor([[*pair.prompt_ids.tolist(), *completion.tolist()]])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            total = torch.zeros((), dtype=logits.dtype)
            for position, token in enumerate(completion.tolist(), start=len(pair.prompt_ids)):
                scores = logits[position - 1]
                total = total + scores[token] - torch.logsumexp(scores, 0)
            sums.append(total)
    return torch.stack(sums)


def weights(num_sequences: int) -> Tensor:
    return torch.linspace(-2.0, 3.0, num_sequences, dtype=torch.float64).roll(1)


def gradient(model: Any, logps: Tensor) -> Tensor:
    model.zero_grad()
    (weights(len(logps)) * logps.double()).sum().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def freeze(model: Any, what: str) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "all" or "down_proj" in name or "dense_4h_to_h" in name)
    return model


def compare(
    family: str, form: Form, dtype: torch.dtype, lengths: Sequence[Lengths], *, trains: str, **settings: Any
) -> tuple[float, float, float]:
    """Return the largest error of a log-prob, the relative error of the gradient, and the largest log-prob."""
    pairs = make_pairs(lengths)
    exact_model = freeze(tiny_model(family, dtype=torch.float64, **settings), trains)
    expected = one_by_one(exact_model, pairs)
    expected_gradient = gradient(exact_model, expected)
    model = freeze(tiny_model(family, dtype=torch.float64, **settings).to(dtype), trains)
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)
    assert choose_form(model, form, longest_text=longest) == form
    found = sequence_logps(model, collate_pairs(pairs, form=form), chunk_rows=7)
    assert found.logps.dtype == torch.float64
    sizes = [*(chosen for _, chosen, _ in lengths), *(rejected for _, _, rejected in lengths)]
    assert found.num_tokens.tolist() == sizes
    difference = gradient(model, found.logps) - expected_gradient
    expected = expected.detach()
    return (
        float((found.logps.detach() - expected).abs().max()),
        float(difference.norm() / expected_gradient.norm()),
        float(expected.abs().max()),
    )


@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("trains", ["down", "all"])
def test_families_in_float32(family: str, form: Form, trains: str) -> None:
    value, gradient_error, _ = compare(family, form, torch.float32, ODD, trains=trains)
    assert value < 1e-4
    assert gradient_error < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_in_float64(family: str) -> None:
    """Some take their norms or the softmax of their attention in float32 whatever the dtype, which is seen here."""
    value, gradient_error, _ = compare(family, "packed", torch.float64, ODD, trains="all")
    assert value < 1e-5
    assert gradient_error < 1e-5


@pytest.mark.parametrize("lengths", [ONE, FIFTY], ids=["one", "fifty"])
@pytest.mark.parametrize("trains", ["down", "all"])
def test_one_pair_and_fifty(lengths: list[Lengths], trains: str) -> None:
    value, gradient_error, _ = compare("llama", "packed", torch.float32, lengths, trains=trains)
    assert value < 1e-4
    assert gradient_error < 1e-5


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_log_probs_in_the_thousands(form: Form) -> None:
    """Summed in float32, the rounding of the sum alone would be about 1e-3."""
    lengths = [(41, 607, 3), (1, 150, 533)]
    value, gradient_error, largest = compare(
        "llama", form, torch.float32, lengths, trains="down", max_position_embeddings=1024
    )
    assert largest > 3000
    assert value < 1e-4
    assert gradient_error < 1e-5


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_tied_embeddings(form: Form) -> None:
    value, gradient_error, _ = compare("llama", form, torch.float32, ODD, trains="all", tie_word_embeddings=True)
    assert value < 1e-4
    assert gradient_error < 1e-5


def test_order_form_and_micro_batches_change_nothing() -> None:
    pairs = make_pairs(ODD)
    results: list[tuple[Tensor, Tensor]] = []
    for form, order, max_tokens in (
        ("packed", range(6), None),
        ("padded", range(6), None),
        ("packed", [3, 0, 5, 1, 4, 2], None),
        ("packed", range(6), 30),
        ("padded", [5, 4, 3, 2, 1, 0], 40),
        ("packed", range(6), 1),
    ):
        model = freeze(tiny_model(dtype=torch.float64), "down")
        choose_form(model, form, longest_text=20)
        logps = torch.zeros(12, dtype=torch.float64)
        arranged = [pairs[place] for place in order]
        groups = split_by_tokens(
            [(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in arranged],
            form=form,
            max_tokens=max_tokens,
        )
        for group in groups:
            found = sequence_logps(model, collate_pairs([arranged[place] for place in group], form=form)).logps
            places = torch.tensor([list(order)[place] for place in group])
            both = torch.cat([places, 6 + places])
            (weights(12)[both] * found).sum().backward()
            logps[both] = found.detach()
        results.append((logps, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for logps, one_gradient in results[1:]:
        torch.testing.assert_close(logps, results[0][0], rtol=1e-12, atol=0)
        assert float((one_gradient - results[0][1]).norm() / results[0][1].norm()) < 1e-7


def test_mean_is_the_sum_over_the_number_of_tokens() -> None:
    model, batch = tiny_model(dtype=torch.float64), collate_pairs(make_pairs(ODD), form="padded")
    sums = sequence_logps(model, batch).logps
    means = sequence_logps(model, batch, reduction="mean").logps
    sizes = torch.tensor([*(chosen for _, chosen, _ in ODD), *(rejected for _, _, rejected in ODD)])
    torch.testing.assert_close(means, sums / sizes, rtol=1e-15, atol=0)
