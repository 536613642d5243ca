"""The saved model is the one in memory, with its adapter merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bfpo.data.chat import DEFAULT_CHAT_TEMPLATE, ChatEncoder
from bfpo.policy import save
from bfpo.policy.load import load_policy, set_trainable
from bfpo.policy.save import save_policy
from helpers import CHATML, EOS, IM_END, byte_tokenizer
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


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"temperature": 0.9, "do_sample": False}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.9, "do_sample": True}, {"do_sample": True, "temperature": 0.9}),
        ({"max_new_tokens": 7}, {"do_sample": None, "max_new_tokens": 7}),
        ({"temperature": 0.9, "length_penalty": 2.0}, {"do_sample": None, "temperature": 0.9}),  # has another fault
    ],
)
def test_a_start_that_names_settings_of_sampling_can_be_saved_when_its_tokens_change(
    tmp_path: Path, given: dict[str, Any], saved: dict[str, Any]
) -> None:
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text(json.dumps({**given, "bos_token_id": 7}))
    policy = load_policy(tmp_path / "start")
    found = policy.model.generation_config
    assert {name: getattr(found, name) for name in saved} == saved
    if "length_penalty" in given:
        return
    found.bos_token_id = 1  # as the trainer aligns it with the tokenizer
    save_policy(policy.model, policy.tokenizer, tmp_path / "saved")
    held = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: held.get(name) for name in saved} == saved
    assert held["bos_token_id"] == 1


def test_another_adapter_is_merged_by_peft(tmp_path: Path) -> None:
    model = adapted(torch.float32, use_dora=True)
    save_policy(model, tiny_tokenizer(), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(saved(ids).logits, model.eval()(ids).logits, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_what_was_trained_whole_beside_an_adapter_is_saved(
    tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    lora = {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=tied), peft.LoraConfig(**lora)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_policy(model, tiny_tokenizer(), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(saved(ids).logits, model(ids).logits, atol=1e-4)


THREE_TEMPLATES = {"default": "{{ messages[0]['content'] }}", "tool_use": "tools", "rag": "documents"}


@pytest.mark.parametrize("own", [None, "{{ messages[0]['content'] }}", THREE_TEMPLATES])
def test_a_model_is_saved_with_the_template_and_the_end_token_of_its_training(tmp_path: Path, own: Any) -> None:
    tokenizer = byte_tokenizer(own)
    chat = ChatEncoder(tokenizer, CHATML)
    save_policy(tiny_model(vocab_size=260, eos_token_id=EOS), chat.saved_tokenizer, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.chat_template == ({"default": CHATML, "rag": "documents"} if isinstance(own, dict) else CHATML)
    assert tokenizer.chat_template == own
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [EOS, IM_END]
    assert ChatEncoder(found).end_id == chat.end_id == IM_END


def test_a_model_without_a_template_is_saved_with_the_default_one(tmp_path: Path) -> None:
    save_policy(tiny_model(vocab_size=260, eos_token_id=EOS), ChatEncoder(byte_tokenizer()).saved_tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == DEFAULT_CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == EOS


def test_a_template_that_renders_no_chat_is_saved_as_it_is(tmp_path: Path) -> None:
    save_policy(tiny_model(vocab_size=260, eos_token_id=EOS), byte_tokenizer("no chat"), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "no chat"
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == EOS
