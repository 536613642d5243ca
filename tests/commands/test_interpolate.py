"""Models between two: the numbers of a loop over whole tensors, in whatever files; what has no middle is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import InterpolateConfig, describe_keys, load_config
from bfpo.core.errors import ConfigError, ModelError, RunError
from bfpo.policy.load import load_tokenizer
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from helpers import CHATML, IM_END, byte_tokenizer
from messages import raises
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    for name, seed in (("a", 1), ("b", 2)):
        save_policy(tiny_model(seed=seed), tiny_tokenizer(), tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return copies: what `load_file` returns are views of the file, which a test may go on to write over."""
    return {name: value.clone() for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("sharded", ["neither", "first", "second"])
def test_each_model_is_the_weighted_mean_of_the_two(models: tuple[Path, Path], tmp_path: Path, sharded: str) -> None:
    for model, name in zip(models, ("first", "second"), strict=True):
        if sharded == name:
            whole = AutoModelForCausalLM.from_pretrained(model)
            (model / "model.safetensors").unlink()
            whole.save_pretrained(model, max_shard_size="4KB")
            assert len(list(model.glob("*.safetensors"))) > 1
    config = InterpolateConfig(first=str(models[0]), second=str(models[1]), weights="0,0.3,1")
    folder = run_stage("interpolate", config, tmp_path / "run")
    one, other = (weights_of(model) for model in models)
    for weight in (0.0, 0.3, 1.0):
        made = folder.path / "models" / f"weight-{weight:g}"
        found = weights_of(made)
        assert found.keys() == one.keys()
        for name, value in found.items():
            expected = (1 - weight) * one[name].double() + weight * other[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        loaded = AutoModelForCausalLM.from_pretrained(made)
        torch.testing.assert_close(loaded.state_dict()["lm_head.weight"], found["lm_head.weight"])
    assert [row["weight"] for row in folder.read_json("models.json")["models"]] == [0, 0.3, 1]


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        save_policy(tiny_model(seed=seed).bfloat16(), tiny_tokenizer(), tmp_path / name)
    config = InterpolateConfig(first=str(tmp_path / "a"), second=str(tmp_path / "b"), weights=[0.1])
    made = run_stage("interpolate", config, tmp_path / "run").path / "models" / "weight-0.1"
    found, one, other = (weights_of(path) for path in (made, tmp_path / "a", tmp_path / "b"))
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, torch.lerp(one[name].float(), other[name].float(), 0.1).bfloat16())


def test_what_is_there_is_left_and_what_was_cut_off_is_made_anew(models: tuple[Path, Path], tmp_path: Path) -> None:
    config = InterpolateConfig(first=str(models[0]), second=str(models[1]), weights=[0.2, 0.8])
    folder = run_stage("interpolate", config, tmp_path / "run")
    record = json.loads((folder.path / "run.json").read_text())
    (folder.path / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    kept = folder.path / "models" / "weight-0.2" / "model.safetensors"
    stamp = kept.stat().st_mtime_ns
    shutil.move(folder.path / "models" / "weight-0.8", folder.path / "models" / ".weight-0.8.part")
    run_stage("interpolate", config, folder.path, resume=True)
    assert kept.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in (folder.path / "models").iterdir()) == ["weight-0.2", "weight-0.8"]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "is full"), (errno.EACCES, "Permission denied")])
def test_a_model_that_cannot_be_written_says_why(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("bfpo.commands.interpolate.blend_weights", fails)
    config = InterpolateConfig(first=str(models[0]), second=str(models[1]), weights=[0.2])
    with pytest.raises(RunError, match=words):
        run_stage("interpolate", config, tmp_path / "run")


@pytest.mark.parametrize("which", [0, 1])
def test_a_chat_template_that_one_of_the_two_has_is_kept(tmp_path: Path, which: int) -> None:
    own = {"default": CHATML, "tool_use": "tools"}
    for number in (0, 1):
        tokenizer = byte_tokenizer(own if number == which else None)
        save_policy(tiny_model(seed=number, vocab_size=260), tokenizer, tmp_path / str(number))
    config = InterpolateConfig(first=str(tmp_path / "0"), second=str(tmp_path / "1"), weights=[0.5])
    made = run_stage("interpolate", config, tmp_path / "run").path / "models" / "weight-0.5"
    assert load_tokenizer(made).chat_template == own
    assert IM_END in GenerationConfig.from_pretrained(made).eos_token_id
    byte_tokenizer("{{ messages }}").save_pretrained(tmp_path / str(1 - which))
    with raises(ModelError, "chat template"):
        preview_stage("interpolate", config)


def test_a_config_of_another_version_or_with_other_special_tokens_is_the_same(models: tuple[Path, Path]) -> None:
    file = models[0] / "config.json"
    values = json.loads(file.read_text())
    rope = values.pop("rope_parameters")  # the form of transformers 4
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": values.pop("dtype")}
    older |= {"_attn_implementation_autoset": True, "transformers_version": "4.50.0"}
    file.write_text(json.dumps({**values, **older, "eos_token_id": [5, 6], "pad_token_id": 7}))  # a trainer sets them
    config = InterpolateConfig(first=str(models[0]), second=str(models[1]))
    preview_stage("interpolate", config)
    file.write_text(json.dumps({**values, **older, "rope_theta": 500.0}))
    with raises(ModelError, "rope_parameters"):
        preview_stage("interpolate", config)


def test_models_without_a_middle_are_refused(models: tuple[Path, Path]) -> None:
    def refused(key: str) -> None:
        with raises(ModelError, key):
            preview_stage("interpolate", InterpolateConfig(first=str(models[0]), second=str(models[1])))

    weights = weights_of(models[1])
    save_file({**weights, "extra": torch.zeros(1)}, models[1] / "model.safetensors")
    refused("extra")
    save_file({**weights, "lm_head.weight": torch.zeros(2, 2)}, models[1] / "model.safetensors")
    refused("lm_head.weight")
    save_file(weights, models[1] / "model.safetensors")
    config = json.loads((models[1] / "config.json").read_text())
    (models[1] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    refused("rms_norm_eps")
    (models[1] / "config.json").write_text(json.dumps(config))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(models[1])
    refused("tokenizer")
    (models[1] / "adapter_config.json").write_text("{}")
    refused("adapter")
    (models[0] / "model.safetensors").write_bytes(b"\xff" * 30)
    refused("model.safetensors")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("0,1.5", "weights"),
        ("-0.1", "weights"),
        ("a,b", "weights"),
        ("0.5,0.5", "weights"),
        ("[0.5, 0.50000001]", "weights"),
        ("''", "weights"),
        ("[]", "weights"),
    ],
)
def test_weights_that_are_none_are_named(text: str, key: str) -> None:
    with raises(ConfigError, key):
        load_config(InterpolateConfig, None, ["first=a", "second=b", f"weights={text}"])


def test_the_keys_say_that_weights_are_numbers() -> None:
    (weights,) = [key for key in describe_keys(InterpolateConfig) if key.name == "weights"]
    assert weights.allowed == "a list of numbers >= 0 and <= 1"


def test_the_command_takes_the_two_by_their_place(models: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["interpolate", str(models[0]), str(models[1]), "--weights", "0.5", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "models" / "weight-0.5" / "config.json").exists()
