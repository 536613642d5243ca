"""The saved model is the one in memory, with its adapter merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bfpo.policy import save
from bfpo.policy.load import set_trainable
from bfpo.policy.save import save_policy
from tiny import tiny_model, tiny_tokenizer


def adapted(dtype: torch.dtype, **settings: Any) -> Any:
    """A model whose adapters add something."""
    lora = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **settings}
    model = set_trainable(tiny_model(dtype=dtype), "all", lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_merged_weight_by_weight_and_rounded_once(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Any] = []
    monkeypatch.setattr(save, "deepcopy", lambda value: copied.append(value) or value)
    model = adapted(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_policy(model, tiny_tokenizer(), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert not any(isinstance(value, torch.nn.Module) for value in copied)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    start = tiny_model(dtype=dtype).state_dict()
    assert saved.keys() == start.keys()
    changed = 0
    for name, value in saved.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.default.weight" not in before:
            assert torch.equal(value, start[name]), name
            continue
        down, up = (before[f"{path}.lora_{part}.default.weight"].double() for part in "AB")
        exact = start[name].double() + 5 / 3 * up @ down
        assert torch.allclose(value.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-7), name
        changed += 1
    assert changed == 4


def test_another_adapter_is_merged_by_peft(tmp_path: Path) -> None:
    model = adapted(torch.float32, use_dora=True)
    save_policy(model, tiny_tokenizer(), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(saved(ids).logits, model.eval()(ids).logits, atol=1e-4)
