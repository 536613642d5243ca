"""`bfpo export`: the written folder is the model, merged, in one number type, whole or not there; bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.policy import save
from bfpo.policy.save import save_policy
from helpers import CHATML, byte_tokenizer
from messages import fails
from tiny import tiny_model


@pytest.fixture(autouse=True)
def _no_bars() -> Any:
    disable_progress_bar()  # the recorded messages would have its speed
    yield
    enable_progress_bar()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_policy(tiny_model(vocab_size=260), byte_tokenizer(CHATML), tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    return tmp_path / "run" / "model"


def export(model: str | Path, out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["export", str(model), "--out", str(out), *options])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_run_is_written_in_one_number_type(model: Path, tmp_path: Path, dtype: str) -> None:
    result = export(model.parent, tmp_path / "out", "--dtype", dtype, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["dtype"], facts["base"], facts["gguf"]) == (dtype, None, None)
    assert set(facts["files"]) == {file.name for file in (tmp_path / "out").iterdir()}
    before, after = weights(model), weights(tmp_path / "out")
    assert {value.dtype for value in after.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(before[name].to(value.dtype), value) for name, value in after.items())
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    assert ours.chat_template == theirs.chat_template
    assert ours("hello").input_ids == theirs("hello").input_ids


def test_bfloat16_is_what_is_written_unless_said(model: Path, tmp_path: Path) -> None:
    assert export(model, tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_is_merged_in_float32_and_rounded_once(model: Path, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    result = export(tmp_path / "adapter", out)
    assert result.exit_code == 0, result.output
    assert f"merged into {model}" in result.stdout.replace("\n", "")
    assert not list(out.glob("adapter*"))
    before, after = weights(model), weights(out)
    changed = 0
    for name, value in after.items():
        wanted = before[name].double()
        path, _, leaf = name.rpartition(".")
        layer = adapted.get_base_model().get_submodule(path)
        if leaf == "weight" and hasattr(layer, "lora_A"):
            up, down = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
            wanted = wanted + 8 / 2 * up @ down
            changed += 1
        assert torch.equal(wanted.float().to(torch.bfloat16), value) or leaf == "weight"
        assert (wanted - value.double()).abs().max() <= 2**-8 * wanted.abs().max()
    assert changed == 4


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_brings_its_own_tokenizer_and_its_base_has_the_revision(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_config: bool
) -> None:
    byte_tokenizer(None).save_pretrained(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapter = tmp_path / "adapter"
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], revision="v1")).save_pretrained(adapter)
    byte_tokenizer(CHATML).save_pretrained(adapter)
    (adapter / "chat_template.jinja").unlink()  # transformers 4 wrote it into the tokenizer's config
    facts = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**facts, "chat_template": CHATML}))
    if with_config:  # as axolotl writes it
        base.config.save_pretrained(adapter)
    asked: list[str | None] = []
    load = save.load_policy
    monkeypatch.setattr(save, "load_policy", lambda *a, **k: asked.append(k["revision"]) or load(*a, **k))
    result = export(adapter, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
    assert asked == ["v1"]


def test_a_gguf_file_beside_the_model(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = True
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = export(model.parent, tmp_path / "out", "--gguf", "f16")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "run-f16.gguf").stat().st_size > 0


def test_no_file_of_the_folder_names_a_place_on_this_machine(model: Path, tmp_path: Path) -> None:
    export(model.parent, tmp_path / "out")
    places = [str(tmp_path).encode(), str(Path.home()).encode() + b"/"]
    assert not [file for file in (tmp_path / "out").iterdir() if any(place in file.read_bytes() for place in places)]


def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(model)
    broken.model.norm.weight.data[0] = 1e30
    broken.save_pretrained(model)
    before = sorted(tmp_path.iterdir())
    fails(export(model, tmp_path / "out", "--dtype", "float16"), "model.norm.weight", "float16")
    assert sorted(tmp_path.iterdir()) == before
    assert export(model, tmp_path / "out", "--dtype", "bfloat16").exit_code == 0


@pytest.mark.parametrize("name", ["taken", "file"])
def test_a_folder_in_use_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").touch()
    (tmp_path / "file").touch()
    fails(export(model, tmp_path / name), name)


def test_what_is_no_whole_model_is_refused(model: Path, tmp_path: Path) -> None:
    for name, files in {
        "checkpoint": {"trained.json": "{}", "config.json": "{}"},
        "unfinished": {"run.json": "{}"},
        "nameless": {"adapter_config.json": "{}"},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text)
        fails(export(folder, tmp_path / "out"), name)
        assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named_before_anything_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails(export(model, tmp_path / "out", "--gguf", "f16"), "bfpo[gguf]")
