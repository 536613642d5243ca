"""`bfpo doctor`: the machine without a config; with one, the memory it needs, the verdict and what would help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import bfpo.training.diagnosis
from bfpo.cli import app
from bfpo.commands.doctor import diagnosis_lines
from bfpo.core.errors import ConfigError, SettingError
from bfpo.policy.devices import EXTRAS, Device
from bfpo.policy.memory import estimate_memory
from bfpo.training.diagnosis import GIB, KEPT_FREE, examine
from messages import fails, raises
from tiny import tiny_model, tiny_tokenizer


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model's config and tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    return str(folder)


@pytest.fixture
def config(model: str, tmp_path: Path) -> str:
    path = tmp_path / "train.yaml"
    path.write_text(f"model: {model}\ndata:\n  files: [absent.jsonl]\ndtype: bfloat16\nmax_length: 64\n")
    return str(path)


def test_the_machine_is_described_without_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = doctor().output
    for word in ("torch", "transformers", "GiB free of", "HF_HUB_OFFLINE is set", *EXTRAS):
        assert word in text
    facts = json.loads(doctor("--json").stdout)
    assert (Path(facts["documents"]) / "docs" / "data.md").is_file()
    assert facts["documents"] in text
    assert facts["devices"][0]["total_bytes"] >= facts["devices"][0]["free_bytes"] > 0
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert "https://mirror.example" in doctor().output


def test_a_config_that_fits(config: str) -> None:
    result = doctor("--config", config)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "config of:  bfpo train" in lines
    assert lines[-1] == "fits"
    assert "down_proj" in result.output
    assert "estimated        MiB" in result.output  # a tiny model has figures too
    weights = next(line for line in lines if line.startswith("  weights"))
    assert float(weights.split()[1]) == round(examine(Path(config), []).memory.weights / 2**20, 2) > 0
    facts = json.loads(doctor("--config", config, "--json").stdout)
    assert facts["memory_bytes"]["total"] == sum(v for k, v in facts["memory_bytes"].items() if k != "total")
    assert facts["fits"] is True
    assert facts["remedies"] == []
    assert (facts["host_bytes"], "the whole model" in result.output) == (0, False)  # on a CPU


def test_a_config_that_does_not_fit_is_told_what_would(config: str) -> None:
    result = doctor("--config", config, "--memory", "0.0005", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    available = facts["available_bytes"]
    assert available == int(0.0005 * GIB)
    changes = {remedy["change"]: remedy for remedy in facts["remedies"]}
    assert {"gradient_checkpointing: true", "max_tokens_per_microbatch: 128", "all of these"} < set(changes)
    assert "dtype: bfloat16" not in changes  # it is that already
    for remedy in changes.values():
        assert remedy["fits"] == (remedy["total"] <= available * (1 - KEPT_FREE))
    assert changes["all of these"]["fits"]
    text = "\n".join(diagnosis_lines(examine(Path(config), ["gradient_checkpointing=true"], memory_gib=0.0005)))
    assert "does not fit" in text
    assert "free (--memory)" in text
    assert facts["host_bytes"] > 0  # a GPU's model is saved from its host
    assert "the whole model, at the end" in text


def test_a_model_that_cannot_recompute_is_told_the_other_changes(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    changes = [remedy.change for remedy in examine(Path(config), [], memory_gib=0.0005).remedies]
    assert {"max_tokens_per_microbatch: 128", "all of these"} < set(changes)
    assert not [change for change in changes if "gradient_checkpointing" in change]
    with raises(SettingError, "gradient_checkpointing"):
        examine(Path(config), ["gradient_checkpointing=true"])


def test_a_remedy_has_the_figure_that_the_change_gives(config: str) -> None:
    settings = ["gradient_checkpointing=true", "reference=swap", "lora.r=2", "max_steps=1"]
    found = examine(Path(config), settings, memory_gib=0.0001)
    figures = {remedy.change: remedy.total for remedy in found.remedies}
    changed = examine(Path(config), [*settings, "reference=precompute"], memory_gib=1.0)
    assert figures["reference: precompute"] == changed.memory.total < found.memory.total


def test_processes_share_what_sharding_divides(config: str) -> None:
    whole = examine(Path(config), [])
    sharded = examine(Path(config), [], processes=4, sharding="fsdp")
    assert sharded.memory.optimizer == -(-whole.memory.optimizer // 4)
    assert sharded.memory.weights == -(-whole.memory.weights // 4)
    assert examine(Path(config), [], processes=4).memory.exchange == whole.memory.gradients


@pytest.mark.parametrize("settings", [["trainable=['*.down_proj.weight']"], ["lora.r=2"], ["trainable=all"]])
def test_a_checkpoint_holds_no_frozen_weights(config: str, settings: list[str]) -> None:
    """Per number that trains, in bfloat16: float32 master and two moments; ZeRO-2 twice more the bfloat16 weight."""
    found = {sharding: examine(Path(config), settings, sharding=sharding) for sharding in ("none", "fsdp", "zero2")}
    trained = found["fsdp"].memory.gradients // 4
    assert {name: each.checkpoint for name, each in found.items()} == {
        "none": 12 * trained,
        "fsdp": 12 * trained,
        "zero2": 16 * trained,
    }


def test_processes_share_the_memory_of_a_cpu_and_not_that_of_gpus(config: str, monkeypatch: Any) -> None:
    for name, share in (("cpu", 4), ("cuda:0", 1)):
        monkeypatch.setattr(bfpo.training.diagnosis, "find_devices", lambda name=name: [Device(name, "", 80, 90, True)])
        assert examine(Path(config), [], processes=4).available == 80 // share
    monkeypatch.setattr(bfpo.training.diagnosis, "find_devices", lambda: [Device("xpu:0", "", None, None, True)])
    unknown = examine(Path(config), [])
    assert (unknown.available, unknown.memory_fits, unknown.fits) == (None, None, True)


@pytest.mark.parametrize(
    ("settings", "swaps"),
    [
        (["reference=swap"], True),
        (["reference=precompute"], False),
        ([], False),  # a whole epoch without a buffer is precomputed
        (["max_steps=5"], True),
        (["buffer.files=b.jsonl"], True),
        (["max_steps=5", "lora.r=2"], False),
    ],
)
def test_the_reference_is_a_copy_of_what_trains_or_nothing(config: str, settings: list[str], swaps: bool) -> None:
    memory = examine(Path(config), settings).memory
    assert memory.reference == (memory.gradients if swaps else 0)


def test_the_margin_model_of_modpo_is_counted_where_its_pass_needs_more_than_training(
    config: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        other = tiny_model(hidden_size=1024)  # far larger than the model that trains
    other.config.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    settings = ["method=modpo", f"margin_model={tmp_path / 'other'}"]
    alone = examine(Path(config), ["method=dpo_h"]).memory
    found = examine(Path(config), settings)
    held = sum(tensor.numel() for tensor in other.parameters()) * 2  # bfloat16
    assert held <= found.margin_bytes < 1.01 * held
    assert found.memory.margin == found.margin_bytes - (
        alone.gradients + alone.optimizer + alone.reference + alone.activations + alone.exchange
    )
    assert found.memory.total == alone.total + found.memory.margin
    assert "a pass of margin_model before training" in "\n".join(diagnosis_lines(found))
    same = examine(Path(config), ["method=modpo", f"margin_model={found.model.partition(':')[0]}", "trainable=all"])
    assert (same.memory.margin, same.margin_bytes > 0) == (0, True)  # training itself needs more


def test_an_sft_config_is_known_by_its_keys(model: str, tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(f"model: {model}\ndata:\n  files: [absent.jsonl]\ncompletions_per_microbatch: 2\nmax_length: 32\n")
    found = examine(path, [])
    assert (found.stage, found.plan.tokens) == ("sft", 64)
    assert found.memory.head > found.memory.reference == 0
    assert examine(path, ["max_tokens_per_microbatch=48"]).plan.tokens == 48
    assert examine(path, ["completions_per_microbatch=null", "completions_per_step=3"]).plan.tokens == 96
    scratch = [
        "init.config={hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1}",
        f"init.tokenizer={model}",
        "data.files=absent.jsonl",
    ]
    assert examine(None, scratch).model.startswith("random weights: Llama")


def test_too_small_a_disk_is_said(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfpo.training.diagnosis, "free_disk", lambda folder: 1000)
    result = doctor("--config", config)
    assert result.exit_code == 1
    assert "the memory is enough; the disk is too small" in result.output
    assert doctor("--config", config, "--memory", "8").exit_code == 0  # another machine: its disk is not known


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (
            ["--set", "model=m", "--set", "data.files=x", "--set", "lora.r=2", "--set", "quantize=nf4"],
            "quantize",
        ),
        (["--config", "none.yaml"], "none.yaml"),
        (["--processes", "3"], "--config"),
        (["--set", "model=nowhere/x"], "data"),
        (["--set", "model=./nowhere", "--set", "data.files=x"], "model"),
    ],
)
def test_bad_input_gets_one_message_and_exit_status_2(arguments: list[str], key: str) -> None:
    fails(doctor(*arguments), key)


@pytest.mark.parametrize("arguments", [["--processes", "0"], ["--sharding", "zero9"]])
def test_what_typer_refuses_is_named(arguments: list[str]) -> None:
    result = doctor(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.output


def test_a_config_error_names_the_key_of_train(config: str) -> None:
    with raises(ConfigError, "betta"):
        examine(Path(config), ["betta=1"])


def test_the_plan_of_a_diagnosis_gives_its_figures(config: str) -> None:
    found = examine(Path(config), [])
    assert estimate_memory(found.plan) == found.memory


@pytest.mark.parametrize("memory", ["nan", "inf", "0", "-1"])
def test_a_memory_that_is_none_is_refused(config: str, memory: str) -> None:
    fails(doctor("--config", config, "--memory", memory), "--memory")


def test_a_pair_longer_than_the_budget_is_counted(config: str) -> None:
    lengths = ["max_length=40", "max_completion_length=10"]
    small = examine(Path(config), [*lengths, "max_tokens_per_microbatch=2"])
    longest = examine(Path(config), [*lengths, "max_tokens_per_microbatch=50"])
    assert small.plan.tokens == 50
    assert small.memory == longest.memory


@pytest.mark.parametrize("stage", ["train", "sft"])
def test_tokens_that_the_model_lacks_are_named_and_looked_for_in_the_data(stage: str, tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(tmp_path / "m")
    data = tmp_path / "rows.jsonl"
    labels = {"chosen_is_safe": True, "rejected_is_safe": True}
    answer = {"completion": "w5"} if stage == "sft" else {"chosen": "w5", "rejected": "w6", **labels}
    row = {"prompt": "w3 w4", **answer}
    data.write_text(json.dumps(row) + "\n")
    given = ["--set", f"model={tmp_path / 'm'}", "--set", f"data.files={data}", "--set", "max_length=64"]
    given += ["--set", "data.use=all"] if stage == "sft" else []
    assert "2 of the tokenizer are not in the model" in doctor(*given).output
    assert json.loads(doctor(*given, "--json").stdout)["lacking_tokens"] == ["'<new>' (97)", "'<newer>' (98)"]
    data.write_text(json.dumps({**row, "prompt": "w3 <newer>"}) + "\n")
    fails(doctor(*given), "98", "<newer>")
