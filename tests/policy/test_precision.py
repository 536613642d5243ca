"""bfloat16 with float32 masters, and a base in four bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bfpo.core.errors import MissingExtraError, ModelError
from bfpo.data.pack import collate_pairs
from bfpo.policy.load import load_policy
from bfpo.policy.logps import sequence_logps
from bfpo.policy.precision import in_float32
from bfpo.policy.probe import choose_form
from bfpo.policy.save import save_policy
from messages import raises
from tiny import tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer

DOWN = ["*.down_proj.weight"]


def saved(folder: Path, **settings: Any) -> Path:
    save_policy(tiny_model(**settings), tiny_tokenizer(), folder / "model")
    return folder / "model"


def test_what_trains_is_float32_and_the_rest_bfloat16(tmp_path: Path) -> None:
    model = load_policy(saved(tmp_path), trainable=DOWN, dtype="bfloat16", masters=True).model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "down_proj" in name else torch.bfloat16), name


@pytest.mark.parametrize("max_shard_size", ["50GB", "3KB"], ids=["one file", "shards"])
def test_masters_have_the_digits_of_the_file(tmp_path: Path, max_shard_size: str) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "3KB")
    found = dict(load_policy(tmp_path, trainable=DOWN, dtype="bfloat16", masters=True).model.named_parameters())
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            assert torch.equal(found[name], parameter)
            assert not torch.equal(parameter, parameter.bfloat16().float())
    rounded = load_policy(tmp_path, trainable=DOWN, dtype="bfloat16").model
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}


def trained(folder: Path, model: Any, **settings: Any) -> dict[str, Tensor]:
    trainer = tiny_trainer(folder, model=model, bf16=True, max_steps=20, **settings)
    trainer.train()
    return {name: value.detach().float().clone() for name, value in trainer.model.named_parameters()}


def test_updates_of_5e_7_are_not_lost(tmp_path: Path) -> None:
    """A weight of 0.3 is a multiple of 0.002 in bfloat16: twenty steps of 5e-7 leave it where it is."""
    folder = saved(tmp_path)
    start = {name: parameter.detach() for name, parameter in tiny_model().named_parameters()}
    settings = {"learning_rate": 5e-7, "max_grad_norm": 0.0, "optim": "adamw_torch"}
    moved = trained(
        tmp_path / "a", load_policy(folder, trainable=DOWN, dtype="bfloat16", masters=True).model, **settings
    )
    stuck = trained(tmp_path / "b", load_policy(folder, trainable=DOWN, dtype="bfloat16").model, **settings)
    for name, value in start.items():
        if "down_proj" in name:
            steps = (moved[name] - value).abs()
            assert 2e-6 < float(steps.median()) <= 20 * 5e-7 * 1.01  # Adam's step is at most the learning rate
            # without masters nearly nothing moves: only weights close to 0 have steps that fine
            assert float((stuck[name] != value.bfloat16().float()).float().mean()) < 0.1


def test_the_error_of_log_probs_in_bfloat16() -> None:
    """What rounding to 8 bits costs on a long completion, softmax and sums being float32 and float64."""
    pairs = tiny_pairs(3, 1, longest=300)
    batch = collate_pairs(pairs)
    exact = tiny_model(dtype=torch.float64, max_position_embeddings=1024)
    choose_form(exact, longest_text=900)
    expected = sequence_logps(exact, batch).logps.detach()
    model = tiny_model(max_position_embeddings=1024).bfloat16()
    choose_form(model, longest_text=900)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = (sequence_logps(model, batch).logps.detach() - expected).abs() / expected.abs()
    assert 1e-5 < float(error.max()) < 5e-3


def test_training_goes_on_exactly_from_saved_masters(tmp_path: Path) -> None:
    policy = load_policy(saved(tmp_path), trainable=DOWN, dtype="bfloat16", masters=True)
    with torch.no_grad():
        policy.model.model.layers[0].mlp.down_proj.weight += 1e-5
    save_policy(policy.model, policy.tokenizer, tmp_path / "next")
    again = load_policy(tmp_path / "next", trainable=DOWN, dtype="bfloat16", masters=True).model
    for (name, one), (_, other) in zip(policy.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    stored = load_file(tmp_path / "next" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16


# Four bits

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def test_four_bits_need_adapters_and_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    with raises(ModelError, "quantize"):
        load_policy(folder, quantize="nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises(MissingExtraError, "bfpo[quant]"):
        load_policy(folder, lora=LORA, quantize="nf4")


@pytest.mark.slow
def test_adapters_above_four_bits_have_the_gradient_of_the_dequantised_base(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = saved(tmp_path, **WIDE)
    model = load_policy(folder, lora=LORA, quantize="nf4").model
    assert choose_form(model, longest_text=12) == "packed"  # evaluates: the weights must stay in the form that trains
    plain = load_policy(folder, lora=LORA).model
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dict(plain.named_modules())[name].weight.data.copy_(whole)
    plain.double()
    choose_form(plain, longest_text=12)
    batch, gradients = collate_pairs(tiny_pairs(5, 3)), []
    for one in (model, plain):
        one.train()
        logps = sequence_logps(one, batch).logps
        (logps * torch.arange(10)).sum().backward()
        gradients.append({name: p.grad.double() for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    whole_norm = torch.cat([value.flatten() for value in gradients[1].values()]).norm()
    assert float(whole_norm) > 1
    for name, value in gradients[1].items():
        assert float((gradients[0][name] - value).norm()) < 1e-3 * float(whole_norm), name


@pytest.mark.slow
def test_a_run_above_four_bits_is_saved_as_the_model_that_it_trained(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    policy = load_policy(saved(tmp_path, **WIDE), lora=LORA, quantize="nf4", masters=True)
    trainer = tiny_trainer(tmp_path / "run", model=policy.model, max_steps=4, learning_rate=1e-2)
    trainer.train()
    save_policy(policy.model, policy.tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 15)[None]
    policy.model.eval()
    torch.testing.assert_close(again(input_ids=ids).logits, policy.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_half_precision_is_float32_while_it_is_used() -> None:
    """The weights are those of a float32 copy, one layer at a time, and come back as the same memory."""
    model = tiny_model("gemma3", num_hidden_layers=3).to(torch.bfloat16).eval()
    ids = torch.arange(5, 17)[None]
    exact = copy.deepcopy(model).float()
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    wide: list[int] = []

    def count(*_: Any) -> None:
        layers = model.model.layers
        wide.append(sum(layer.mlp.up_proj.weight.dtype == torch.float32 for layer in layers))

    hooks = [layer.mlp.register_forward_hook(count) for layer in model.model.layers]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with in_float32(model):
            found = model(input_ids=ids).logits
        assert torch.is_autocast_enabled("cpu")
    for hook in hooks:
        hook.remove()
    assert found.dtype == torch.float32
    assert torch.equal(found, exact(input_ids=ids).logits)
    assert wide == [1, 1, 1]
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_an_error_inside_leaves_half_precision_as_it_was() -> None:
    model = tiny_model().to(torch.bfloat16)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), in_float32(model):
        model(input_ids=torch.arange(5, 9)[None])
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)
