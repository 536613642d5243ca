"""GGUF files: transformers' own reader finds the same weights, tokens and settings; what is not sure is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo.core.errors import ModelError
from bfpo.policy.gguf import GGUF_KINDS, _split, write_gguf
from bfpo.policy.save import save_policy
from helpers import BOS, CHATML, EOS, IM_END, byte_tokenizer
from messages import raises
from tiny import tiny_model

gguf = pytest.importorskip("gguf")
TEXTS = ["Hello there, it's 2024!", "ab  abc\n\n x", "Ñandú costs 12 €"]
MERGES = [("a", "b"), ("ab", "c"), ("h", "e"), ("1", "2")]
SIZE = 264  # of byte_tokenizer with these merges


def saved(folder: Path, family: str = "llama", *, spare: int = 0, **settings: Any) -> Path:
    """Save a model with a byte-level tokenizer that cuts words as GPT-2 does; `spare` ids have no token."""
    shapes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {**shapes, "head_dim": 16, **settings}
    tokenizer = byte_tokenizer(CHATML, merges=MERGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    save_policy(tiny_model(family, vocab_size=SIZE + spare, **settings), tokenizer, folder)
    return folder


def written(folder: Path, kind: str = "f32", ends: tuple[int, ...] = (IM_END,)) -> Path:
    file = folder / "model.gguf"
    assert write_gguf(folder, file, kind, name="tiny", end_ids=ends) > 0
    return file


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_model_back(family: str, tied: bool, tmp_path: Path) -> None:
    own = {"head_dim": 128} if family == "qwen3" else {}  # transformers reads no other of Qwen3 from GGUF files
    folder = saved(tmp_path, family, spare=3, tie_word_embeddings=tied, **own)
    written(folder)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    ours, theirs = before.state_dict(), after.state_dict()
    assert ours.keys() - theirs.keys() <= {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
    same = ("vocab_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_size")
    assert [getattr(before.config, key) for key in same] == pytest.approx([getattr(after.config, key) for key in same])


def test_transformers_reads_the_same_tokens_back(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    written(folder)
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    assert [before(text).input_ids for text in TEXTS] == [after(text).input_ids for text in TEXTS]


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_what_ends_an_answer_and_what_no_text_becomes(tmp_path: Path) -> None:
    found = fields_of(written(saved(tmp_path, spare=2)))
    assert [found[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "eot")] == [BOS, EOS, IM_END]
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    types = found["tokenizer.ggml.token_type"]
    control, unused, normal = gguf.TokenType.CONTROL, gguf.TokenType.UNUSED, gguf.TokenType.NORMAL
    assert types == [control] * 4 + [normal] * (SIZE - 4) + [unused] * 2
    assert not found["tokenizer.ggml.add_bos_token"]
    assert found["general.architecture"] == "llama"
    assert found["tokenizer.chat_template"] == CHATML


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_matrices_are_rounded_to_the_kind_and_vectors_are_not(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen2", intermediate_size=90)
    reader = gguf.GGUFReader(written(folder, kind))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    step = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[kind]
    for key, value in whole.items():
        tensor = tensors[names.get_name(key, try_suffixes=(".weight", ".bias"))]
        wanted = "F32" if value.ndim == 1 else "F16" if kind == "q8_0" and value.shape[-1] == 90 else kind.upper()
        assert tensor.tensor_type.name == wanted
        back = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape).copy())
        error = 0.0 if value.ndim == 1 else step
        assert (back - value).abs().max() <= error * value.abs().max()
        assert kind == "f32" or value.ndim == 1 or not torch.equal(back, value)


def test_pre_tokenizers_are_those_of_the_published_models(tmp_path: Path) -> None:
    """The expressions of Llama 3 and Qwen2, written out here, are found in the form in which tokenizers saves them."""
    llama = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    llama += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers, regex in ((r"\p{N}{1,3}", llama), (r"\p{N}", llama.replace("{1,3}", ""))):
        assert json.loads(pre_tokenizers.Split(Regex(regex), "isolated").__getstate__()) == _split(numbers)


def test_all_of_several_named_templates_are_written(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools"}
    tokenizer.save_pretrained(folder)
    found = fields_of(written(folder))
    assert found["tokenizer.chat_template"] == CHATML
    assert found["tokenizer.chat_template.tool_use"] == "tools"


def test_digits_apart_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    one_by_one = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [one_by_one, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)
    assert fields_of(written(folder))["tokenizer.ggml.pre"] == "smollm"


def rewrite(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
)
def test_a_setting_that_is_not_known_is_refused(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite(folder, **values)
    with raises(ModelError, name, "convert_hf_to_gguf.py"):
        written(folder)


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with raises(ModelError, "olmo2", "convert_hf_to_gguf.py"):
        written(saved(tmp_path, "olmo2"))


def test_a_tokenizer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for change in (
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
    ):
        tokenizer = byte_tokenizer(CHATML, merges=MERGES)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        change(tokenizer.backend_tokenizer)
        tokenizer.save_pretrained(folder)
        with raises(ModelError, "cuts texts into words", "convert_hf_to_gguf.py"):
            written(folder)


def test_a_number_beyond_float16_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    model = tiny_model("llama", vocab_size=SIZE)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    tokenizer = byte_tokenizer(CHATML, merges=MERGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    save_policy(model, tokenizer, folder)
    with raises(ModelError, "up_proj", "float16"):
        written(folder, "f16")
    written(folder, "bf16")
