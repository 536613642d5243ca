from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bfpo.core.errors import ModelError, SettingError
from bfpo.data.pack import collate_pairs
from bfpo.policy.logps import sequence_logps
from bfpo.policy.memory import _LiveBytes
from bfpo.policy.reference.forward_pass import ReferencePass
from bfpo.policy.reference.sources import (
    AdapterOff,
    Precomputed,
    SwappedWeights,
    choose_reference,
    make_reference,
)
from messages import raises
from tiny import tiny_model, tiny_pairs

PAIRS = tiny_pairs(5, 3)


def collate(pairs: Any) -> dict[str, Tensor]:
    return collate_pairs(pairs, form="padded")


BATCH = collate(PAIRS)


def logps(model: Any) -> Tensor:
    with torch.no_grad():
        return sequence_logps(model, BATCH).logps


def shift(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def with_adapter(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


def test_swapped_weights_give_the_start_and_put_back_the_same_bits() -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    expected = logps(model)
    reference = SwappedWeights(model)
    model.train()
    shift(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = logps(model)
    found = reference.logps(model, BATCH)
    assert torch.equal(found, expected)
    assert not torch.allclose(moved, expected)
    assert not found.requires_grad
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(reference._initial) == 2  # copies of what trains, no second model


def test_swapping_between_forward_and_backward_leaves_the_gradient_right() -> None:
    model = tiny_model(dtype=torch.float64)
    reference = SwappedWeights(model)
    shift(model)
    gradients = []
    for swaps in (False, True):
        model.zero_grad()
        total = sequence_logps(model, BATCH).logps.sum()
        if swaps:
            reference.logps(model, BATCH)
        total.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_weights_come_back_after_an_exception() -> None:
    model = tiny_model().train()
    reference = SwappedWeights(model)
    shift(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError):
        reference.logps(model, {"input_ids": BATCH["input_ids"]})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_a_module_kept_in_evaluation_mode_stays_there() -> None:
    model = tiny_model().train()
    model.lm_head.eval()
    SwappedWeights(model).logps(model, BATCH)
    assert model.training
    assert not model.lm_head.training


def test_swapping_needs_the_same_trainable_parameters() -> None:
    model = tiny_model()
    reference = SwappedWeights(model)
    model.lm_head.weight.requires_grad_(False)
    with raises(ModelError):
        reference.logps(model, BATCH)
    with raises(ModelError):
        SwappedWeights(tiny_model().requires_grad_(False))


def test_adapter_off_is_the_base_model() -> None:
    expected = logps(tiny_model())
    model = with_adapter(tiny_model())
    shift(model)
    assert not torch.allclose(logps(model), expected)
    torch.testing.assert_close(AdapterOff(model).logps(model, BATCH), expected, rtol=1e-6, atol=0)
    assert not torch.allclose(logps(model), expected)
    with raises(ModelError, "LlamaForCausalLM"):
        AdapterOff(tiny_model())


def test_swapping_an_adapter_is_its_start() -> None:
    model = with_adapter(tiny_model())
    reference = SwappedWeights(model)
    expected = logps(model)
    shift(model)
    assert torch.equal(reference.logps(model, BATCH), expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_one_pass_before_training(adapted: bool) -> None:
    model = tiny_model(dtype=torch.float64)
    expected = logps(model)
    if adapted:
        model = with_adapter(model)
        shift(model)
    model.train()
    (pairs,), report = ReferencePass(model, [PAIRS]).run(collate=collate, max_tokens=20)
    assert report.num_computed == len(PAIRS)
    assert model.training
    found = Precomputed().logps(model, collate(pairs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert [pair.pair_id for pair in pairs] == [pair.pair_id for pair in PAIRS]
    with raises(ModelError):
        Precomputed().logps(model, BATCH)


@pytest.mark.parametrize(
    ("requested", "pairs", "seen", "adapter", "chosen"),
    [
        ("auto", 100, 100, False, "precompute"),
        ("auto", 100, 300, True, "precompute"),
        ("auto", 100, 99, False, "swap"),
        ("auto", 100, 99, True, "adapter_off"),
        ("swap", 100, 300, True, "swap"),
        ("precompute", 100, 1, False, "precompute"),
    ],
)
def test_choice_of_the_reference(requested: Any, pairs: int, seen: int, adapter: bool, chosen: str) -> None:
    assert choose_reference(requested, num_to_compute=pairs, num_pairs_seen=seen, has_adapter=adapter) == chosen


@pytest.mark.parametrize(
    ("requested", "lacking", "adapter", "chosen"),
    [
        ("auto", 0, True, "precompute"),
        ("auto", 1, False, "swap"),
        ("auto", 1, True, "adapter_off"),
        ("precompute", 0, False, "precompute"),
        ("swap", 0, False, "swap"),
    ],
)
def test_before_sharding_only_what_the_cache_knows_is_precomputed(
    requested: Any, lacking: int, adapter: bool, chosen: str
) -> None:
    facts = {"num_to_compute": lacking, "num_pairs_seen": 100, "has_adapter": adapter, "sharded": True}
    assert choose_reference(requested, **facts) == chosen


def test_rows_that_are_lacking_before_sharding_are_an_error_that_says_what_to_do() -> None:
    with raises(SettingError, "--config"):
        choose_reference("precompute", num_to_compute=7, num_pairs_seen=100, has_adapter=False, sharded=True)


def test_weights_partitioned_by_deepspeed_are_not_swapped() -> None:
    model = tiny_model()
    reference = SwappedWeights(model)
    model.lm_head.weight.ds_id = 3
    before = model.lm_head.weight.clone()
    with raises(ModelError, "adapter_off"):
        reference.logps(model, BATCH)
    assert torch.equal(model.lm_head.weight, before)


def test_an_adapter_that_is_off_counts_as_what_trains() -> None:
    """FSDP2 chooses in its first forward pass, by what trains then, the dtype in which it reduces gradients."""
    model = with_adapter(tiny_model())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen: list[set[str]] = []
    model.register_forward_pre_hook(
        lambda *_: seen.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    )
    AdapterOff(model).logps(model, BATCH)
    assert seen == [trained]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_swapping_takes_no_second_copy_of_the_weights() -> None:
    model = tiny_model(hidden_size=64, intermediate_size=512)
    reference = SwappedWeights(model)

    def peak(logps_of: Any) -> int:
        live = _LiveBytes()
        kept = live.forget([*model.parameters(), *reference._initial])
        with live, torch.no_grad():
            logps_of(model, BATCH)
        assert kept
        return live.peak

    weights = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert 3 * largest < weights
    assert peak(reference.logps) - peak(sequence_logps) <= largest


def test_names_of_references() -> None:
    with raises(SettingError, "adapter_off"):
        choose_reference("adapter_off", num_to_compute=1, num_pairs_seen=1, has_adapter=False)
    with raises(SettingError, "adapter_off"):
        choose_reference("frozen", num_to_compute=1, num_pairs_seen=1, has_adapter=False)  # type: ignore[arg-type]
    with raises(SettingError):
        make_reference("auto", tiny_model())
    assert isinstance(make_reference("swap", tiny_model()), SwappedWeights)
    assert isinstance(make_reference("precompute", tiny_model()), Precomputed)
    assert isinstance(make_reference("adapter_off", with_adapter(tiny_model())), AdapterOff)
