from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from bfpo.core.errors import ModelError
from bfpo.policy.load import disable_dropout
from bfpo.policy.reference import cache as reference_keys
from bfpo.policy.reference.cache import model_key, row_key
from messages import raises
from tiny import tiny_model, tiny_pairs

KEY = model_key(tiny_model())


def adapted(model: Any, **settings: Any) -> Any:
    lora = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(model, LoraConfig(**lora))


@torch.no_grad()
def shift_adapter(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    return model


def same_models() -> dict[str, Callable[[], Any]]:
    def set_up_differently() -> Any:
        model = tiny_model(use_cache=False, attn_implementation="eager").train()
        model.config._name_or_path = "elsewhere"
        model.config.transformers_version = "5.0.0"
        disable_dropout(model)
        return model.requires_grad_(False)

    return {
        "copy": lambda: copy.deepcopy(tiny_model()),
        "other settings of speed": set_up_differently,
        "adapter": lambda: adapted(tiny_model()),
        "trained adapter": lambda: shift_adapter(adapted(tiny_model())),
        "copied head": lambda: shift_adapter(adapted(tiny_model(), modules_to_save=["lm_head"])),
        "trained tokens": lambda: adapted(tiny_model(), target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    }


@pytest.mark.parametrize("name", same_models())
def test_the_same_base_has_the_same_key(name: str) -> None:
    assert model_key(same_models()[name]()) == KEY


@torch.no_grad()
def nudged(model: Any, name: str = "model.layers.1.mlp.down_proj.weight") -> Any:
    weight = model.get_parameter(name)
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    return model


@torch.no_grad()
def exchanged(model: Any) -> Any:
    first, second = (model.model.layers[i].mlp.down_proj.weight for i in (0, 1))
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: nudged(tiny_model()),
        lambda: exchanged(tiny_model()),
        lambda: tiny_model().double(),
        lambda: tiny_model().bfloat16(),
        lambda: tiny_model(rms_norm_eps=1e-5),
        lambda: tiny_model(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
        lambda: adapted(nudged(tiny_model())),
    ],
)
def test_another_model_has_another_key(make: Callable[[], Any]) -> None:
    assert model_key(make()) != KEY


def test_the_computation_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    keys = {KEY, model_key(model, mixed_precision="bf16"), model_key(model, mixed_precision="fp16")}
    torch.set_float32_matmul_precision("high")
    try:
        keys.add(model_key(model))
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(reference_keys, "LOGPS_VERSION", reference_keys.LOGPS_VERSION + 1)
    keys.add(model_key(model))
    assert len(keys) == 5


def test_tied_weights_and_buffers_are_read() -> None:
    model = tiny_model(tie_word_embeddings=True)
    key = model_key(model)
    assert key == model_key(tiny_model(tie_word_embeddings=True)) != KEY
    model.register_buffer("scale", torch.tensor(1.5))
    with_buffer = model_key(model)
    model.scale += 1
    assert len({key, with_buffer, model_key(model)}) == 3


def test_content_that_is_not_here_has_no_key() -> None:
    with raises(ModelError, "model.embed_tokens.weight"):
        model_key(tiny_model().to("meta"))
    partitioned = tiny_model()
    partitioned.lm_head.weight.ds_id = 0
    with raises(ModelError, "lm_head.weight"):
        model_key(partitioned)
    merged = adapted(tiny_model(), target_modules=["q_proj"])
    merged.merge_adapter()
    with raises(ModelError, "self_attn.q_proj"):
        model_key(merged)


def test_the_key_of_a_row_is_its_tokens_and_their_boundaries() -> None:
    pair = tiny_pairs(1)[0]
    ids = {name: np.array(values, np.int32) for name, values in (("a", [5]), ("b", [5, 6]), ("c", [6, 7]), ("d", [7]))}
    same = replace(pair, pair_id="x", chosen_is_safe=0.5, ref_chosen_logps=1.0, prompt_ids=pair.prompt_ids.astype("i8"))
    assert row_key(same) == row_key(pair)
    one = replace(pair, prompt_ids=ids["a"], chosen_ids=ids["c"])
    moved = replace(pair, prompt_ids=ids["b"], chosen_ids=ids["d"])
    turned = replace(one, chosen_ids=one.rejected_ids, rejected_ids=one.chosen_ids)
    cut = replace(one, chosen_ids=ids["c"][:1])
    assert len({row_key(some) for some in (pair, one, moved, turned, cut)}) == 5
