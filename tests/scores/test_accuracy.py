from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo.core.errors import ModelError, SettingError
from bfpo.core.records import as_json
from bfpo.data.tokenize import TokenPair
from bfpo.execution.settings import ExecutorConfig
from bfpo.policy.logps import sequence_logps
from bfpo.scores import accuracy
from bfpo.scores.accuracy import PairLogps, accuracy_rows, accuracy_scores, pair_logps, shared_pair_logps
from bfpo.scores.records import AccuracyRow
from bfpo.stats import paired_test
from messages import raises

CELLS = {(1.0, 1.0): "safe-safe", (1.0, 0.0): "safe-unsafe", (0.0, 1.0): "unsafe-safe", (0.0, 0.0): "unsafe-unsafe"}


def pairs(number: int, rng: np.random.Generator) -> list[TokenPair]:
    def ids(size: int) -> Any:
        return rng.integers(3, 40, size=size).astype(np.int32)

    labels = list(CELLS)
    return [
        TokenPair(f"pair {n}", ids(1 + n % 5), ids(1 + n % 4), ids(1 + n % 3), *labels[n % 4]) for n in range(number)
    ]


def random_logps(number: int, rng: np.random.Generator) -> PairLogps:
    return PairLogps(rng.normal(-20, 5, number), rng.normal(-20, 5, number))


def test_rows_and_scores_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    data, policy, reference = pairs(80, rng), random_logps(80, rng), random_logps(80, rng)
    prompts = [str(n // 2) for n in range(80)]
    rows = accuracy_rows(data, prompts, policy, reference, beta=0.1)
    right: dict[str, list[bool]] = {"": []}
    for n, row in enumerate(rows):
        safe_c, safe_r = data[n].chosen_is_safe, data[n].rejected_is_safe
        target = 1.5 * safe_c - 0.5 * safe_r - 0.5
        margin = (policy.chosen[n] - reference.chosen[n]) - (policy.rejected[n] - reference.rejected[n])
        assert row.target == pytest.approx(target)
        assert row.margin == pytest.approx(margin, rel=1e-12)
        assert row.beta_margin == pytest.approx(0.1 * margin)
        assert row.cell == CELLS[safe_c, safe_r]
        assert row.right == (target * margin > 0)
        right[""].append(target * margin > 0)
        right.setdefault(row.cell, []).append(target * margin > 0)
    scores = {score.metric: score for score in accuracy_scores(rows)}
    assert scores["accuracy"].value == pytest.approx(np.mean(right[""]))
    assert scores["accuracy"].extra["num_prompts"] == 40
    for cell in CELLS.values():
        score = scores[f"accuracy_{cell.replace('-', '_')}"]
        assert (score.value, score.num) == (pytest.approx(np.mean(right[cell])), 20)
        assert score.low < score.value < score.high


def test_the_methods_own_order_is_what_counts() -> None:
    rng = np.random.default_rng(1)
    data, policy, reference = pairs(40, rng), random_logps(40, rng), random_logps(40, rng)
    prompts = [str(n) for n in range(40)]
    bfpo = accuracy_rows(data, prompts, policy, reference, beta=0.1)
    helpful = accuracy_rows(data, prompts, policy, reference, method="dpo_h", beta=0.1)
    for one, other in zip(bfpo, helpful, strict=True):
        assert other.target is None
        assert (one.right == other.right) == one.cell.startswith("safe")
    # SafeDPO drops what is unsafe on both sides: not right, not wrong.
    dropped = accuracy_rows(data, prompts, policy, reference, method="safedpo", beta=0.1)
    assert all((row.right is None) == (row.cell == "unsafe-unsafe") for row in dropped)
    scores = {score.metric: score for score in accuracy_scores(dropped)}
    assert (scores["accuracy"].num, scores["accuracy"].unscored) == (30, 10)
    assert scores["accuracy_unsafe_unsafe"].value is None


def test_a_model_that_did_not_move_is_never_right() -> None:
    rng = np.random.default_rng(2)
    data, policy = pairs(8, rng), random_logps(8, rng)
    (overall, *_) = accuracy_scores(accuracy_rows(data, [str(n) for n in range(8)], policy, policy, beta=1.0))
    assert (overall.value, overall.extra["num_ties"]) == (0.5, 8)
    assert overall.low < 0.5 < overall.high


def test_noise_of_rounding_is_a_tie_and_no_difference() -> None:
    rng = np.random.default_rng(6)
    data, reference = pairs(40, rng), random_logps(40, rng)
    prompts = [str(n) for n in range(40)]

    def moved(by: float, rounding: float) -> list[AccuracyRow]:
        noise = by * rng.uniform(0.5, 1.0, 40) * rng.choice([-1, 1], 40)
        policy = PairLogps(reference.chosen + noise, reference.rejected, rounding)
        return accuracy_rows(data, prompts, policy, reference, beta=0.1)

    for rows in (moved(1e-5, 1e-4), moved(0.0, 1e-4)):
        assert all((row.tie, row.right, row.credit) == (True, None, 0.5) for row in rows)
        assert all(score.value == 0.5 for score in accuracy_scores(rows))
    one, other = ([row.credit for row in moved(1e-5, 1e-4)] for _ in range(2))
    assert paired_test(one, other).p_value == 1.0
    beyond = moved(1e-2, 1e-4)
    assert all(row.tie is None and row.right is not None for row in beyond)
    assert {row.credit for row in beyond} == {0.0, 1.0}
    # The larger rounding of the two models counts, and a side that is not favoured cannot tie.
    rough = PairLogps(reference.chosen, reference.rejected, np.full(40, 1e-4))
    assert all(row.tie for row in accuracy_rows(data, prompts, PairLogps(*moved_by(reference, 1e-5)), rough, beta=0.1))
    dropped = accuracy_rows(data, prompts, rough, rough, method="safedpo", beta=0.1)
    assert all((row.tie, row.credit) == (None, None) for row in dropped if row.cell == "unsafe-unsafe")


def moved_by(logps: PairLogps, by: float) -> tuple[Any, Any]:
    return logps.chosen + by, logps.rejected


def test_rows_of_before_with_margin_zero_are_ties() -> None:
    row = AccuracyRow("a", "p", "safe-unsafe", 1, 1.0, 0.0, 0.0)
    assert (row.tie, row.right) == (True, None)
    assert list(as_json(AccuracyRow("a", "p", "safe-unsafe", 1, 1.0, -0.5, -0.05)))[-2:] == ["beta_margin", "right"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_other_widths_differ_by_less_than_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    model: Any = LlamaForCausalLM(config).to(dtype)
    data = pairs(30, np.random.default_rng(7))
    together, alone = (pair_logps(model, data, pairs_per_batch=size) for size in (30, 1))
    prompts = [str(n) for n in range(30)]
    rows = accuracy_rows(data, prompts, together, alone, beta=0.1)
    assert all(row.tie for row in rows)
    exact = copy.deepcopy(model).double()
    truth = pair_logps(exact, data)
    error = np.abs((together.chosen - together.rejected) - (truth.chosen - truth.rejected))
    # The scale is that of the errors, not of the margins: the float64 model is as far away as rounding, and no further.
    assert error.max() <= 20 * np.max(together.rounding)
    assert np.max(together.rounding) < {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]


def test_lengths_must_agree() -> None:
    rng = np.random.default_rng(3)
    with raises(SettingError):
        accuracy_rows(pairs(3, rng), ["a"] * 3, random_logps(3, rng), random_logps(4, rng), beta=1.0)
    assert accuracy_rows([], [], random_logps(0, rng), random_logps(0, rng), beta=1.0) == []
    assert all(score.value is None for score in accuracy_scores([]))


def test_pair_logps_against_one_pair_at_a_time() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config).double()
    data = pairs(13, np.random.default_rng(4))
    model.train()
    got = pair_logps(model, data, pairs_per_batch=4)
    assert model.training
    for n, pair in enumerate(data):
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            both = [*pair.prompt_ids.tolist(), *ids.tolist()]
            with torch.no_grad():
                logits = model(torch.tensor([both])).logits[0]
            total = sum(
                float(logits[place - 1, both[place]] - torch.logsumexp(logits[place - 1], 0))
                for place in range(len(pair.prompt_ids), len(both))
            )
            assert math.isclose(getattr(got, side)[n], total, rel_tol=1e-9)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_a_batch_is_bounded_by_tokens_unless_a_number_of_pairs_is_given(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config).double()
    rng = np.random.default_rng(4)
    parts = [rng.integers(3, 40, size).astype(np.int32) for size in (20, 30, 10)]
    data = [*pairs(40, rng), *(TokenPair(f"long {n}", *parts, 1.0, 0.0) for n in range(3))]
    monkeypatch.setattr(accuracy, "BATCH_TOKENS", 120)
    if form == "padded":
        monkeypatch.setattr(accuracy, "choose_form", lambda *given, **more: form)
    passes: list[tuple[int, int]] = []

    def seen(model: Any, batch: Any, **more: Any) -> Any:
        found = sequence_logps(model, batch, **more)
        passes.append((batch["input_ids"].numel(), len(found.logps) // 2))
        return found

    monkeypatch.setattr(accuracy, "sequence_logps", seen)
    by_tokens = pair_logps(model, data)
    assert max(tokens for tokens, _ in passes) <= 120 < 4 * 50  # that two of the long pairs have, padded
    assert max(num for _, num in passes) > 2
    assert sum(num for _, num in passes) == len(data)
    passes.clear()
    by_pairs = pair_logps(model, data, pairs_per_batch=9)
    assert sorted(num for _, num in passes) == [7, 9, 9, 9, 9]
    np.testing.assert_allclose(by_tokens.chosen, by_pairs.chosen, rtol=1e-10)
    np.testing.assert_allclose(by_tokens.rejected, by_pairs.rejected, rtol=1e-10)


def test_a_log_prob_that_is_not_finite_is_named() -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config)
    data = pairs(40, np.random.default_rng(4))
    first = data[22].prompt_ids[0]
    data[22].prompt_ids[0] = 2  # a token that no other pair has
    torch.nn.init.constant_(model.model.embed_tokens.weight[2], math.nan)
    with raises(ModelError, "pair 22"):
        shared_pair_logps(lambda: model, data, ExecutorConfig(), name="runs/policy", pairs_per_batch=4)
    data[22].prompt_ids[0] = first
    found = shared_pair_logps(lambda: model, data, ExecutorConfig(), name="runs/policy")
    assert np.isfinite([found.chosen, found.rejected]).all()


def test_trainings_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(5)
    data, policy, reference = pairs(60, rng), random_logps(60, rng), random_logps(60, rng)
    prompts = [str(n) for n in range(60)]
    one = accuracy_rows(data, prompts, policy, reference, beta=0.1)
    other = accuracy_rows(data, prompts, reference, policy, beta=0.1)  # every margin turned round
    (pooled, *_) = accuracy_scores([*one, *other])
    (seeded, *_) = accuracy_scores([*one, *other], seeds=[0] * 60 + [1] * 60)
    assert seeded.value == pooled.value == 0.5
    assert seeded.high - seeded.low >= pooled.high - pooled.low
    with raises(SettingError):
        accuracy_scores([*one, *other], seeds=[0])
