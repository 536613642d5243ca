"""Checkpoints without frozen weights: resumed runs end bit for bit alike, and with their start they are models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.core.errors import ModelError, RunError
from bfpo.policy.load import load_policy
from bfpo.policy.save import save_policy
from bfpo.policy.trained import FACTS, TRAINED, require_whole
from bfpo.runs.stages import run_stage
from bfpo.training import checkpoint
from bfpo.training.checkpoint import state_of_trained
from messages import fails, raises
from survival import differences, result, run_under_deepspeed, stage_config, write_inputs
from tiny import tiny_model, tiny_tokenizer

TRAINS = ["*.down_proj.weight"]
NAMES = {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def straight(inputs: Path) -> tuple[Any, dict[str, Any]]:
    """The config of an uninterrupted run that keeps its checkpoints, and what it left in `straight`."""
    config = stage_config("train", inputs, trainable=TRAINS, save_total_limit=None)
    run_stage("train", config, inputs / "straight")
    return config, result(inputs / "straight")


def interrupted(run: Path, out: Path, *, after: int) -> Path:
    """Copy a run as it was killed after the checkpoint of a step."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("checkpoint-")) > after:
            shutil.rmtree(path)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    return out


def test_a_checkpoint_holds_what_trains_and_is_no_model(inputs: Path, straight: Any) -> None:
    folder = inputs / "straight" / "checkpoints" / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert {TRAINED, FACTS, "optimizer.pt", "complete.json"} <= names
    assert not {name for name in names if name.startswith(("model", "config", "pytorch_model"))}
    assert load_file(folder / TRAINED).keys() == NAMES
    assert set(json.loads((folder / FACTS).read_text())["trained"]) == NAMES
    assert TRAINED in json.loads((folder / "complete.json").read_text())["sha256"]
    with pytest.raises(OSError, match="checkpoint-4"):
        type(tiny_model()).from_pretrained(folder)


@pytest.mark.parametrize("after", [4, 7])
def test_a_resumed_run_ends_bit_for_bit_alike(inputs: Path, straight: Any, tmp_path: Path, after: int) -> None:
    config, wanted = straight
    out = interrupted(inputs / "straight", tmp_path / "run", after=after)
    run_stage("train", config, out, resume=True)
    assert not list(differences(result(out), wanted))
    start, model = (load_file(folder / "model.safetensors") for folder in (inputs / "start", out / "model"))
    assert {name for name, value in model.items() if not torch.equal(value, start[name])} == NAMES


def test_a_whole_checkpoint_of_before_still_resumes(
    inputs: Path, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, wanted = straight
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "leaves_out_frozen", lambda trainer: False)
        run_stage("train", config, tmp_path / "before")
    assert (tmp_path / "before" / "checkpoints" / "checkpoint-4" / "model.safetensors").is_file()
    out = interrupted(tmp_path / "before", tmp_path / "run", after=4)
    run_stage("train", config, out, resume=True)
    weights = (folder / "model" / "model.safetensors" for folder in (out, inputs / "straight"))
    one, other = map(load_file, weights)
    assert all(torch.equal(one[name], value) for name, value in other.items())
    assert not list(differences(result(out)["metrics"], wanted["metrics"]))


def forget(out: Path, *names: str) -> None:
    """Make a run one of before these facts were in its `run.json`; of `data.` ones the part of one input."""
    record = json.loads((out / "run.json").read_text())
    for name in names:
        held = record["data"] if name.startswith("data.") else record
        del held[name.removeprefix("data.")]
    (out / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))


@pytest.mark.parametrize("recorded", [True, False])
def test_another_start_model_is_refused(inputs: Path, straight: Any, tmp_path: Path, recorded: bool) -> None:
    """By its files, which says it of LoRA and of runs that train everything too; before, by the frozen weights."""
    config, _ = straight
    out = interrupted(inputs / "straight", tmp_path / "run", after=4)
    forget(out, *(() if recorded else ("weights",)))
    file = inputs / "start" / "model.safetensors"
    before = file.read_bytes()
    weights = load_file(file)
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1
    try:
        save_file(weights, file, metadata={"format": "pt"})
        with raises(RunError, "model" if recorded else "frozen", mask=r"hash \w+, now \w+"):
            run_stage("train", config, out, resume=True)
    finally:
        file.write_bytes(before)
    run_stage("train", config, out, resume=True)


def test_another_chat_template_is_refused(inputs: Path, tmp_path: Path) -> None:
    template, out = tmp_path / "chat.jinja", tmp_path / "run"
    text = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    template.write_text(text)
    config = stage_config("train", inputs, chat_template=str(template), max_steps=1, eval_steps=None, eval_data=None)
    run_stage("train", config, out)
    forget(out)
    template.write_text(text.replace("{{ m", "user {{ m"))
    with raises(RunError, "chat.jinja"):
        run_stage("train", config, out, resume=True)
    forget(out, "data.chat_template")
    run_stage("train", config, out, resume=True)


def test_a_checkpoint_of_other_trained_weights_is_refused(inputs: Path, straight: Any, tmp_path: Path) -> None:
    config, _ = straight
    out = interrupted(inputs / "straight", tmp_path / "run", after=4)
    facts = out / "checkpoints" / "checkpoint-4" / FACTS
    content = json.loads(facts.read_text())
    facts.write_text(json.dumps({**content, "trained": content["trained"][:1]}, indent=2) + "\n")
    mark = out / "checkpoints" / "checkpoint-4" / "complete.json"
    marked = json.loads(mark.read_text())
    marked["bytes"][FACTS], marked["sha256"] = facts.stat().st_size, {}
    mark.write_text(json.dumps(marked))
    with raises(RunError, "trained"):
        run_stage("train", config, out, resume=True)


# DeepSpeed

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "zero", "processes", "dtype"),
    [("train", 1, 1, "float32"), ("train", 2, 2, "bfloat16"), ("sft", 3, 2, "float32")],
)
def test_a_run_of_deepspeed_resumes_bit_for_bit_from_what_trains(
    tmp_path: Path, stage: str, zero: int, processes: int, dtype: str
) -> None:
    start = write_inputs(tmp_path) / "start"
    save_policy(tiny_model(max_position_embeddings=128, tie_word_embeddings=True), tiny_tokenizer(), start)
    config = stage_config(
        stage,
        tmp_path,
        trainable=TRAINS,
        dtype=dtype,
        max_steps=4,
        save_total_limit=None,
        trainer_args={"ddp_backend": "gloo"},
    )
    wanted, out = tmp_path / "straight", tmp_path / "run"
    run_under_deepspeed(stage, config, wanted, zero=zero, processes=processes)
    checkpoint = wanted / "checkpoints" / "checkpoint-2"
    assert ((checkpoint / FACTS).is_file(), (checkpoint / TRAINED).is_file()) == (True, zero < 3)
    assert not list(checkpoint.glob("*model*"))
    written = [torch.load(path, weights_only=False) for path in checkpoint.rglob("*model_states.pt")]
    assert len(written) == (processes if zero == 3 else 1)
    assert all(state["module"].keys() == NAMES and not state["frozen_param_fragments"] for state in written)
    interrupted(wanted, out, after=2)
    run_under_deepspeed(stage, config, out, zero=zero, processes=processes, resume=True)
    assert not list(differences(result(out), result(wanted)))
    before, after = (load_file(folder / "model.safetensors") for folder in (start, out / "model"))
    held = {name: value.to(after[name].dtype) for name, value in before.items()}
    assert {name for name, value in after.items() if not torch.equal(value, held[name])} == NAMES
    if zero < 3:  # where the weights are not in parts, a checkpoint is a model
        model = load_policy(str(out / "checkpoints" / "checkpoint-4"), dtype=dtype).model.state_dict()
        assert all(torch.equal(model[name].to(value.dtype), value) for name, value in after.items())


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_of_deepspeed_keeps_its_best_checkpoint(tmp_path: Path, zero: int) -> None:
    start = tiny_model(max_position_embeddings=128, initializer_range=0.1)
    start.lm_head.weight.data.mul_(3)
    save_policy(start, tiny_tokenizer(), write_inputs(tmp_path) / "start")
    others = [{"prompt": f"w{i} w60", "completion": f"w{50 + i} w70 w{80 - i}"} for i in range(6)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    steps = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
    settings = {
        "trainable": TRAINS,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "eval_data": {"files": str(tmp_path / "others.jsonl")},
        "best": {"metric": "loss"},
        "trainer_args": {"ddp_backend": "gloo"},
    }
    run_under_deepspeed(
        "sft", stage_config("sft", tmp_path, **steps, **settings), tmp_path / "run", zero=zero, processes=1
    )
    found = result(tmp_path / "run")
    first, last, kept = (row["eval_loss"] for row in found["metrics"] if "eval_loss" in row)
    assert kept == first < last
    if zero == 2:
        trained, model = found["checkpoints/checkpoint-2/trained.safetensors"], found["model/model.safetensors"]
        assert all(torch.equal(model[name], value) for name, value in trained.items())


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_state_of_what_trains_is_given_and_taken_where_the_model_is_sharded() -> None:
    model, empty = tiny_model(), tiny_model().to("meta")
    for name, parameter in [*model.named_parameters(), *empty.named_parameters()]:
        parameter.requires_grad_(name in NAMES)
    whole = model.state_dict().keys()
    mesh = init_device_mesh("cpu", (1,))
    with state_of_trained(model), state_of_trained(empty):
        assert model.state_dict().keys() == whole  # which accelerate distributes
        fully_shard(empty, mesh=mesh)
        assert empty.state_dict().keys() == whole  # to these
        fully_shard(model, mesh=mesh)
        assert model.state_dict().keys() == NAMES
        moved = {name: value + 1 for name, value in model.state_dict().items()}
        model.load_state_dict(moved, strict=True)
        with pytest.raises(RuntimeError, match="Missing"):
            model.load_state_dict({}, strict=True)
    for name, value in moved.items():
        assert torch.equal(model.get_parameter(name).full_tensor(), value.full_tensor())
    assert model.state_dict().keys() == whole


def checkpoint_of(inputs: Path, step: int) -> Path:
    return inputs / "straight" / "checkpoints" / f"checkpoint-{step}"


def state_of(model: str | Path, **settings: Any) -> dict[str, torch.Tensor]:
    return dict(load_policy(model, **settings).model.state_dict())


def bfpo(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_last_checkpoint_is_the_model_of_the_run(inputs: Path, straight: Any, tmp_path: Path) -> None:
    last = max((inputs / "straight" / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    model = inputs / "straight" / "model"
    found, wanted = state_of(last), state_of(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    (tmp_path / "prompts.txt").write_text("w1 w3\nw4 w3\n")
    texts = []
    for number, each in enumerate((last, model)):
        more = ["--set", "max_new_tokens=8", "--set", "temperature=0", "--out", tmp_path / f"answers-{number}"]
        done = bfpo("generate", "--model", each, "--prompts", tmp_path / "prompts.txt", *more)
        assert done.exit_code == 0, done.output
        rows = (tmp_path / f"answers-{number}" / "completions.jsonl").read_text().splitlines()
        texts.append([json.loads(row)["text"] for row in rows])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_exported_with_the_rest_of_its_start(
    inputs: Path, straight: Any, tmp_path: Path, dtype: str
) -> None:
    folder = checkpoint_of(inputs, 4)
    done = bfpo("export", folder, "--out", tmp_path / "out", "--dtype", dtype, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["base"] == str(inputs / "start")
    found, start = (load_file(place / "model.safetensors") for place in (tmp_path / "out", inputs / "start"))
    wanted = {**start, **load_file(folder / TRAINED)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value.to(getattr(torch, dtype))) for name, value in wanted.items())
    assert {name for name, value in wanted.items() if not torch.equal(value, start[name])} == NAMES
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (inputs / "start" / "tokenizer.json").read_bytes()
    assert "checkpoint-4" in (tmp_path / "out" / "README.md").read_text()


def test_a_training_from_a_checkpoint_has_all_its_digits(inputs: Path, straight: Any) -> None:
    folder = checkpoint_of(inputs, 4)
    model = load_policy(folder, trainable=TRAINS, dtype="bfloat16", masters=True).model
    trained = load_file(folder / TRAINED)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in NAMES else torch.bfloat16)
        assert name not in NAMES or torch.equal(parameter, trained[name])


def test_a_checkpoint_whose_start_is_gone_or_changed_is_no_model(inputs: Path, straight: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint_of(inputs, 4), run / "checkpoints" / "checkpoint-4")
    folder, start = run / "checkpoints" / "checkpoint-4", tmp_path / "start"
    with raises(ModelError, "run folder"):
        load_policy(folder)
    (run / "run.json").write_text("{}")
    with raises(ModelError, "run.json"):
        load_policy(folder)
    (run / "run.json").write_text(json.dumps({"config": {"model": str(start), "dtype": "float32"}}))
    fails(bfpo("export", folder, "--out", tmp_path / "out"), "gone")
    shutil.copytree(inputs / "start", start)
    with raises(ModelError, "lm-eval"):
        require_whole(folder, "lm-eval")
    load_policy(folder)
    weights = load_file(start / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    fails(bfpo("export", folder, "--out", tmp_path / "out"), "SHA-256")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_in_parts_or_cut_short_is_no_model(inputs: Path, straight: Any, tmp_path: Path) -> None:
    shutil.copytree(inputs / "straight", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    os.truncate(folder / TRAINED, 100)
    with raises(ModelError, TRAINED):
        load_policy(folder)
    save_file({"other": torch.zeros(1)}, folder / TRAINED)
    with raises(ModelError, "does not fit"):
        load_policy(folder)
    (folder / TRAINED).unlink()
    with raises(ModelError, "several processes"):
        load_policy(folder)
