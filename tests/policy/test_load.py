from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from bfpo.core.errors import ModelError
from bfpo.policy.load import (
    choose_trainable,
    disable_dropout,
    init_policy,
    load_policy,
    load_tokenizer,
    pad_token_id,
    set_trainable,
)
from bfpo.policy.save import save_policy
from messages import raises
from tiny import VOCABULARY, tiny_model, tiny_tokenizer

INIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tiny_model(attention_dropout=0.3), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_patterns_choose_what_trains(folder: Path) -> None:
    policy = load_policy(folder, trainable=["*.down_proj.weight", "lm_head.*"])
    expected = {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)} | {"lm_head.weight"}
    assert trainable(policy.model) == expected
    report = policy.trainable_report
    assert report.num_trainable == 2 * 16 * 24 + 97 * 16
    assert report.num_total == sum(parameter.numel() for parameter in policy.model.parameters())
    assert report.num_tensors == 3
    assert f"{report.num_trainable:,} of {report.num_total:,} parameters train" in str(report)
    assert "model.layers.0.mlp.down_proj.weight" in str(report)


def test_everything_trains_unless_told(folder: Path) -> None:
    policy = load_policy(folder)
    assert trainable(policy.model) == {name for name, _ in policy.model.named_parameters()}
    assert policy.trainable_report.share == 1


@pytest.mark.parametrize(
    ("pattern", "close"),
    [("*.downproj.weight", "model.layers.*.mlp.down_proj.weight"), ("*.q.weight", "self_attn.q_proj.weight")],
)
def test_a_pattern_without_a_match_lists_close_names(folder: Path, pattern: str, close: str) -> None:
    with raises(ModelError, pattern, close):
        load_policy(folder, trainable=["lm_head.weight", pattern])


def test_no_pattern_at_all(folder: Path) -> None:
    with raises(ModelError):
        load_policy(folder, trainable=[])


def test_a_shared_weight_is_matched_by_either_name() -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        model = tiny_model(tie_word_embeddings=True)
        choose_trainable(model, [name])
        assert trainable(model) == {"model.embed_tokens.weight"}


def test_lora_trains_adapters_alone_and_is_merged_when_saved(folder: Path, tmp_path: Path) -> None:
    policy = load_policy(folder, lora={"r": 2, "target_modules": ["q_proj"]})
    assert all("lora_" in name for name in trainable(policy.model))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3)
    ids = torch.arange(3, 12)[None]
    save_policy(policy.model, policy.tokenizer, tmp_path / "merged")
    merged = load_policy(tmp_path / "merged").model
    with torch.no_grad():
        expected = policy.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        with policy.model.disable_adapter():
            assert not torch.allclose(policy.model(input_ids=ids).logits, expected)


def saved_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors"}


@pytest.mark.parametrize("family", ["llama", "tied", "bfloat16", "lora", "embedding"])
def test_what_is_saved_from_a_state_is_what_the_model_would_save(tmp_path: Path, family: str) -> None:
    model = tiny_model(tie_word_embeddings=family == "tied")
    model.generation_config.max_new_tokens = 7
    if family == "bfloat16":  # frozen weights beside float32 masters
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "down_proj" in name else torch.bfloat16)
    if family in ("lora", "embedding"):
        targets = ["q_proj", "down_proj", *(["embed_tokens"] if family == "embedding" else [])]
        model = set_trainable(model, "all", {"r": 2, "lora_alpha": 5, "target_modules": targets})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    save_policy(model, tiny_tokenizer(), tmp_path / "model")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a shard of no use
    save_policy(model, tiny_tokenizer(), tmp_path / "state", state_dict=state)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "state"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    assert saved_files(tmp_path / "state") == saved_files(tmp_path / "model")
    assert '"max_new_tokens": 7' in saved_files(tmp_path / "state")["generation_config.json"]


def test_a_state_that_lacks_weights_or_has_another_adapter_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    with raises(ModelError, "lm_head.weight"):
        save_policy(model, tiny_tokenizer(), tmp_path / "out", state_dict=state)
    adapted = set_trainable(model, "all", {"r": 2, "target_modules": ["q_proj"], "use_dora": True})
    with raises(ModelError, "q_proj"):
        save_policy(adapted, tiny_tokenizer(), tmp_path / "out", state_dict=adapted.state_dict())


def test_lora_beside_patterns_or_with_unknown_keys(folder: Path) -> None:
    with raises(ModelError):
        load_policy(folder, trainable=["lm_head.*"], lora={"r": 2})
    with raises(ModelError, "rank"):
        load_policy(folder, lora={"rank": 2})


def test_dropout_is_off_unless_asked_for(folder: Path) -> None:
    ids = torch.arange(3, 12)[None]
    quiet, noisy = load_policy(folder).model.train(), load_policy(folder, dropout=True).model.train()
    assert torch.equal(quiet(input_ids=ids).logits, quiet(input_ids=ids).logits)
    assert not torch.equal(noisy(input_ids=ids).logits, noisy(input_ids=ids).logits)
    assert quiet.config.attention_dropout == 0.3  # the saved config keeps what the model was made with


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_dropout_of_other_families(family: str) -> None:
    settings = {"attention_dropout": 0.4, **({"hidden_dropout": 0.4} if family == "gpt_neox" else {})}
    model = tiny_model(family, **settings).train()
    ids = torch.arange(3, 12)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_only_safetensors_are_read(folder: Path) -> None:
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with raises(ModelError, "safetensors"):
        load_policy(folder)


@pytest.mark.parametrize("name", ["no/such-model", "missing_folder"])
def test_a_model_that_is_not_there(tmp_path: Path, name: str) -> None:
    with raises(ModelError):
        load_policy(tmp_path / name)


def test_weights_are_read_whole_under_zero3(folder: Path) -> None:
    """Arguments of a training launched with ZeRO-3 let transformers partition weights while it reads them."""

    class Config:
        def is_zero3(self) -> bool:
            return True

    config = Config()  # transformers holds a weak reference
    set_hf_deepspeed_config(config)
    try:
        shapes = {name: parameter.shape for name, parameter in load_policy(folder).model.named_parameters()}
    finally:
        unset_hf_deepspeed_config()
    assert shapes == {name: parameter.shape for name, parameter in tiny_model().named_parameters()}


def test_dtypes(folder: Path) -> None:
    assert load_policy(folder).model.dtype == torch.float32
    assert load_policy(folder, dtype="float64").model.dtype == torch.float64
    with raises(ModelError, "dtype"):
        load_policy(folder, dtype="fp8")


def test_from_scratch_depends_on_the_seed_alone(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    first = init_policy(INIT, tmp_path, seed=1)
    torch.manual_seed(5)
    second, third = init_policy(INIT, tmp_path, seed=1), init_policy(INIT, tmp_path, seed=2)
    weights = [policy.model.lm_head.weight for policy in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    config = first.model.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (97, 1, 2, 2)


def test_from_scratch_with_bad_settings(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with raises(ModelError, "hiden_size"):
        init_policy({"hiden_size": 16}, tmp_path)
    with raises(ModelError):
        init_policy({**INIT, "hidden_act": "no_such_activation"}, tmp_path)


def test_padding_id() -> None:
    tokenizer = tiny_tokenizer()
    assert pad_token_id(tokenizer) == 2
    tokenizer.pad_token = "<unk>"
    assert pad_token_id(tokenizer) == 0
    tokenizer.pad_token = tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert (pad_token_id(tokenizer), pad_token_id(tokenizer, VOCABULARY), pad_token_id(tokenizer, 2)) == (97, 2, 0)


def test_a_model_that_comes_with_an_adapter_is_neither_trained_nor_saved(folder: Path, tmp_path: Path) -> None:
    """transformers puts it onto the weights, and would save it alone."""
    adapted = get_peft_model(load_policy(folder).model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    policy = load_policy(folder)
    with raises(ModelError, "adapter"):
        save_policy(policy.model, policy.tokenizer, tmp_path / "saved")
    with raises(ModelError, "adapter"):
        load_policy(folder, trainable=["*.down_proj.weight"], masters=True)


def test_a_saved_model_may_use_its_cache_again(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.use_cache = False
    save_policy(model, tiny_tokenizer(), tmp_path)
    assert load_policy(tmp_path).model.config.use_cache is True


def test_a_model_without_its_head_is_not_completed_by_chance(folder: Path, tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path / "headless")
    tiny_tokenizer().save_pretrained(tmp_path / "headless")
    with raises(ModelError, "lm_head.weight"):
        load_policy(tmp_path / "headless")


def test_an_adapter_starts_by_the_seed_alone(folder: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        model = load_policy(folder, lora={"r": 2, "target_modules": ["q_proj"]}, seed=seed).model
        return next(parameter for name, parameter in model.named_parameters() if "lora_A" in name).detach()

    first = start(1)
    torch.manual_seed(3)
    assert torch.equal(first, start(1))
    assert not torch.equal(first, start(2))


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_layers_left_out_and_noise_on_experts_are_off(family: str) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: Any
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, layerdrop=0.5))
    else:
        noise = {"num_key_value_heads": 1, "intermediate_size": 24, "num_local_experts": 2, "router_jitter_noise": 0.5}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **noise))
    disable_dropout(model)
    ids = torch.arange(3, 12)[None]
    first = model.train()(input_ids=ids).logits
    assert all(torch.equal(model(input_ids=ids).logits, first) for _ in range(5))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_a_shared_weight_is_refused(target: str) -> None:
    with raises(ModelError):
        set_trainable(tiny_model(tie_word_embeddings=True), "all", {"r": 2, "target_modules": ["q_proj", target]})
    set_trainable(tiny_model(), "all", {"r": 2, "target_modules": ["q_proj", target]})
    set_trainable(tiny_model(tie_word_embeddings=True), "all", {"r": 2, "target_modules": ["q_proj"]})


def test_a_tokenizer_in_a_file_of_sentencepiece_names_the_package_that_reads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    (folder / "tokenizer.model").touch()
    for found, words in ((None, "sentencepiece"), (object(), "tiktoken")):
        monkeypatch.setattr("bfpo.policy.load.find_spec", lambda name, found=found: found)
        with raises(ModelError, words):
            load_tokenizer(folder)
