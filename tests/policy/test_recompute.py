"""Recomputed activations: the same gradients, less memory, and no product with weights a second time."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoConfig, OlmoForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from bfpo.core.errors import SettingError
from bfpo.data.pack import collate_pairs
from bfpo.policy.logps import sequence_logps
from bfpo.policy.memory import Plan, count_pass, measure
from bfpo.policy.probe import choose_form
from bfpo.policy.recompute import Recompute, set_recompute
from messages import raises
from tiny import SIZES, tiny_model, tiny_pairs

PAIRS = tiny_pairs(5, 3)


class Products(TorchDispatchMode):
    """Counts the operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Storages(TorchDispatchMode):
    """Holds weak references to the storages of the results of products."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.made.append(weakref.ref(result.untyped_storage()))
        return result


def gradients(model: Any, wanted: Recompute, form: Any, *, bfloat16: bool = False) -> list[torch.Tensor]:
    set_recompute(model, wanted)
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        sequence_logps(model, collate_pairs(PAIRS, form=form)).logps.pow(2).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.3}),
        ("gemma2", {}),  # attention written out, for its soft-capped scores
        ("gpt_neox", {}),
    ],
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_are_the_same_to_the_last_bit(family: str, settings: Any, form: str, bfloat16: bool) -> None:
    model = tiny_model(family, **settings).train()
    if form == "packed":
        choose_form(model, longest_text=12)
    kept = gradients(model, False, form, bfloat16=bfloat16)
    assert len(kept) > 10
    for wanted in ("selective", True):
        again = gradients(model, wanted, form, bfloat16=bfloat16)  # type: ignore[arg-type]
        assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True)), wanted


def test_with_adapters() -> None:
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model().train(), lora)
    kept = gradients(model, False, "padded")
    assert all(torch.equal(*pair) for pair in zip(kept, gradients(model, "selective", "padded"), strict=True))


def test_products_with_weights_and_attention_run_once() -> None:
    model = tiny_model(num_hidden_layers=3).train()
    counts = {}
    for wanted in (False, "selective", True):
        set_recompute(model, wanted)  # type: ignore[arg-type]
        with Products() as products:
            model.base_model(input_ids=torch.arange(12)[None] % 8, use_cache=False).last_hidden_state.sum().backward()
        counts[wanted] = products.counts
    names = {"mm", "_scaled_dot_product_flash_attention_for_cpu"} & counts[False].keys()
    assert "mm" in names  # torch 2.6 takes attention apart where heads share keys
    for name in names:
        assert counts["selective"][name] == counts[False][name], name
        assert counts[True][name] > counts[False][name], name
    assert counts["selective"]["silu"] == 2 * counts[False]["silu"] == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_counted(dtype: str) -> None:
    """Less than all, more than the inputs of the blocks; on fake tensors as on real ones."""
    model = tiny_model(num_hidden_layers=6)
    saved = {}
    for wanted in (False, "selective", True):
        fake = measure(Plan(model.config, 40, dtype=dtype, checkpointing=wanted)).counted  # type: ignore[arg-type]
        real = count_pass(model, 40, bfloat16=dtype == "bfloat16", checkpointing=wanted)  # type: ignore[arg-type]
        assert fake.saved == real.saved
        assert fake.peak == pytest.approx(real.peak, rel=0.1)
        saved[wanted] = fake
    assert saved[True].peak < saved["selective"].peak < 0.8 * saved[False].peak


def test_scores_written_out_are_not_kept() -> None:
    """Of Gemma 2: the products of queries and keys, (heads, T, T), are computed again."""
    model = tiny_model("gemma2", num_hidden_layers=3)
    short, long = (count_pass(model, tokens, checkpointing="selective").saved / tokens for tokens in (32, 128))
    assert long == pytest.approx(short, rel=0.1)


def test_the_setting_can_be_pickled_and_is_switched_off() -> None:
    model = tiny_model().train()
    set_recompute(model, "selective")
    pickle.dumps(model.model.layers[0]._gradient_checkpointing_func.keywords)
    assert model.model.layers[0].gradient_checkpointing
    set_recompute(model, False)
    assert not model.model.layers[0].gradient_checkpointing


def test_a_product_that_the_model_changes_in_place_is_refused() -> None:
    """Queries clamped in place: computed again from the clamped ones, no gradient would be 0."""
    torch.manual_seed(0)
    model = OlmoForCausalLM(OlmoConfig(**SIZES, clip_qkv=0.02)).train()
    kept = gradients(model, False, "padded")
    assert all(torch.equal(*pair) for pair in zip(kept, gradients(model, True, "padded"), strict=True))
    with raises(SettingError, "gradient_checkpointing: true"):
        gradients(model, "selective", "padded")
    with raises(SettingError, "gradient_checkpointing: true"):
        measure(Plan(model.config, 40, checkpointing="selective"))


def test_what_is_kept_is_freed_with_the_graph() -> None:
    """By counting references; the cyclic collector may come late."""
    model = tiny_model().train()
    set_recompute(model, "selective")
    gc.collect()
    gc.disable()
    try:
        with Storages() as storages:
            model(input_ids=torch.arange(12)[None] % 8, use_cache=False).logits.sum().backward()
        model.zero_grad()
        assert len(storages.made) > 20
        assert not any(storage() for storage in storages.made)
    finally:
        gc.enable()


@pytest.mark.parametrize("wanted", ["selective", True])
def test_a_model_that_cannot_recompute_is_refused(wanted: Recompute) -> None:
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with raises(SettingError, "gradient_checkpointing"):
        set_recompute(model, wanted)
