"""Runs that are killed, stopped or find the disk full, and end as if nothing had happened."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from bfpo.core import files
from bfpo.core.errors import DiskFullError, StopRequest
from bfpo.runs import folder as runs
from bfpo.runs.stages import run_stage
from bfpo.training import callbacks as checkpoints
from bfpo.training.callbacks import MetricsCallback
from messages import raises
from survival import differences, result, run, run_in_two, run_with_copies, stage_config, write_inputs

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
CHECKPOINT_FILES = ("model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# Every kind of moment; which of its occurrences is drawn.
KINDS = [
    "after micro-batch",
    "after backward",
    "after optimizer step",
    "half row metrics.jsonl",
    "before mark complete.json",
    "half mark complete.json",
    "half removal checkpoint",
    "before model/",
    "after model/",
    *(f"half file {name}" for name in (*CHECKPOINT_FILES, "trainer_state.json")),
]


# Moments by the how manieth time they are passed.
MOMENTS = {
    "after backward": 1,  # before the first checkpoint
    "half row metrics.jsonl": 1,
    "half file optimizer.pt": 1,
    "before mark complete.json": 2,  # every file of a checkpoint is there
    "half removal checkpoint": 3,
    "before model/": 0,  # after the last step
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def straight(inputs: Path) -> tuple[Any, dict[str, Any], dict[str, Path]]:
    """The config of an uninterrupted run, what it left, and copies of its folder from moments of it."""
    config = stage_config("train", inputs)
    wanted = list(MOMENTS.items())
    copies = run_with_copies("train", config, inputs / "straight", wanted)
    return config, result(inputs / "straight"), copies


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: a killed process loses nothing that it has written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    found = list(differences(one, other))
    assert not found, "\n".join(found[:10])


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_resumed_from_what_a_kill_leaves_ends_bit_for_bit_alike(
    straight: tuple[Any, dict[str, Any], dict[str, Path]], moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, wanted, copies = straight
    other_number = moment in ("after backward", "before model/")
    if other_number:
        record = json.loads((copies[moment] / "run.json").read_text())
        assert record["processes"] == 1
        (copies[moment] / "run.json").write_text(json.dumps({**record, "processes": 2}))
    with caplog.at_level(logging.INFO):
        run_stage("train", config, copies[moment], resume=True)
    same(result(copies[moment]), wanted)
    assert ("starting again from the beginning" in caplog.text) == (moment == "after backward")
    goes_on = other_number and moment != "after backward"
    assert ("this run had 2 processes and continues with 1" in caplog.text) == goes_on


@pytest.fixture(scope="module")
def every_checkpoint(inputs: Path) -> tuple[Any, dict[str, Any]]:
    """The config of a run that keeps its checkpoints, and what it left."""
    config = stage_config("train", inputs, save_total_limit=None)
    run_stage("train", config, inputs / "every")
    return config, result(inputs / "every")


@pytest.mark.parametrize("num_damaged", [1, 2, 4])
def test_a_checkpoint_whose_content_has_changed_is_not_used(
    inputs: Path,
    every_checkpoint: tuple[Any, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    num_damaged: int,
) -> None:
    config, wanted = every_checkpoint
    out = tmp_path / "run"
    shutil.copytree(inputs / "every", out)
    shutil.rmtree(out / "model")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    steps = [7, 6, 4, 2]
    for step in steps[:num_damaged]:
        file = out / f"checkpoints/checkpoint-{step}/optimizer.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with caplog.at_level(logging.INFO):
        run_stage("train", config, out, resume=True)
    for step in steps[:num_damaged]:
        folder = out / f"checkpoints/checkpoint-{step}"
        assert f"{folder}: optimizer.pt changed since the checkpoint was written" in caplog.text
        shutil.rmtree(folder.with_name(f"{folder.name}.damaged"))
    same(result(out), wanted)
    if num_damaged < len(steps):
        assert f"continuing from step {steps[num_damaged]}" in caplog.text
    else:
        assert "starting again from the beginning" in caplog.text


def test_a_mark_of_an_earlier_version_counts_by_its_sizes(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    checkpoints._mark(checkpoint)
    mark = json.loads((checkpoint / "complete.json").read_text())
    assert mark["sha256"].keys() == mark["bytes"].keys() == {"trainer_state.json"}
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    (checkpoint / "complete.json").write_text(json.dumps({"bytes": mark["bytes"]}))
    assert checkpoints.set_apart_damaged(tmp_path) == []
    (checkpoint / "complete.json").write_text(json.dumps(mark))
    (found,) = checkpoints.set_apart_damaged(tmp_path)
    assert "trainer_state.json changed" in found
    assert checkpoints.last_whole_checkpoint(tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "lora", "num_points"), [("train", False, 20), ("train", True, 16), ("sft", False, 16)]
)
def test_a_run_killed_at_random_moments_ends_bit_for_bit_alike(
    tmp_path: Path, stage: str, lora: bool, num_points: int
) -> None:
    inputs = write_inputs(tmp_path)
    config = stage_config(stage, inputs, **({"lora": LORA} if lora else {}))
    places = run(stage, config, tmp_path / "straight")
    wanted = result(tmp_path / "straight")
    draw = random.Random(7)
    names = [kind.replace("model.safetensors", "adapter_model.safetensors") if lora else kind for kind in KINDS]
    points = [draw.choice([i for i, place in enumerate(places) if place == name]) for name in names]
    points += draw.sample([i for i in range(len(places)) if i not in points], num_points - len(points))
    for point in points:
        out = tmp_path / f"killed-{point}"
        run(stage, config, out, killed_at=point)
        run(stage, config, out, resume=True)
        found = list(differences(result(out), wanted))
        assert not found, (point, places[point], found[:10])


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    config = stage_config("train", write_inputs(tmp_path))
    run("train", config, tmp_path / "straight")
    for i, place in enumerate((80, 90, 57, 70)):
        run("train", config, tmp_path / "killed", resume=i > 0, killed_at=place)
    run("train", config, tmp_path / "killed", resume=True)
    same(result(tmp_path / "killed"), result(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("stage", "number", "kind"), [("train", signal.SIGTERM, StopRequest), ("sft", signal.SIGINT, KeyboardInterrupt)]
)
def test_a_stopped_run_has_a_checkpoint_and_ends_alike_when_resumed(
    inputs: Path,
    straight: tuple[Any, dict[str, Any], dict[str, Path]],
    tmp_path: Path,
    stage: str,
    number: int,
    kind: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, wanted = stage_config(stage, inputs), straight[1]
    if stage == "sft":
        run_stage(stage, config, tmp_path / "straight")
        wanted = result(tmp_path / "straight")
    before = signal.signal(number, signal.default_int_handler)  # a run in the background starts with SIGINT ignored
    on_log = MetricsCallback.on_log

    def signalled(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        on_log(self, args, state, control, logs, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCallback, "on_log", signalled)
        with pytest.raises(KeyboardInterrupt) as raised:
            run_stage(stage, config, tmp_path / "stopped")
    assert raised.type is kind
    assert signal.signal(number, before) == signal.default_int_handler
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["status"] == "interrupted"
    found = checkpoints.last_whole_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert found is not None
    assert found[1]["global_step"] == 4
    run_stage(stage, config, tmp_path / "stopped", resume=True)
    same(result(tmp_path / "stopped"), wanted)


@pytest.mark.slow
def test_two_processes_resume_alike_and_stop_at_the_same_step(tmp_path: Path) -> None:
    config = stage_config("train", write_inputs(tmp_path))
    first, second = run_in_two("train", config, tmp_path / "straight")
    assert isinstance(first, list), first
    assert isinstance(second, list), second
    wanted = result(tmp_path / "straight")
    assert "checkpoints/checkpoint-7/rng_state_1.pth" in wanted["files"]
    # In the second process while it writes its own file of the second checkpoint; in the first before it is marked.
    own = [i for i, name in enumerate(second) if name == "half file rng_state_1.pth"][1]
    mark = [i for i, name in enumerate(first) if name == "before mark complete.json"][2]
    for rank, place in ((1, own), (0, mark)):
        out = tmp_path / f"killed-{rank}"
        run_in_two("train", config, out, signalled=(rank, place, signal.SIGKILL))
        run_in_two("train", config, out, resume=True)
        same(result(out), wanted)
    # One of the two is asked to stop, within step 5 or at the end of step 3.
    for rank, step in ((0, 5), (1, 3)):
        out = tmp_path / f"stopped-{rank}"
        places = [first, second][rank]
        place = [i for i, name in enumerate(places) if name == "before optimizer step"][step - 1]
        told = run_in_two("train", config, out, signalled=(rank, place, signal.SIGTERM))
        assert all("StopRequest" in text for text in told), told
        found = checkpoints.last_whole_checkpoint(out / "checkpoints")
        assert found is not None
        assert found[1]["global_step"] == step
        assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
        run_in_two("train", config, out, resume=True)
        same(result(out), wanted)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
RUST = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
TORCH = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1600 vs 1488")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("owner", "function", "error", "after", "file", "step"),
    [
        (safetensors.torch, "serialize_file", RUST, 1, "checkpoint-4/model.safetensors", 2),
        slow(torch, "save", TORCH, 5, "checkpoint-4/optimizer.pt", 2),
        slow(transformers.TrainerState, "save_to_json", NO_SPACE, 1, "checkpoint-4/trainer_state.json", 2),
        slow(checkpoints, "write_text_whole", NO_SPACE, 0, "checkpoint-2/", None),
        (safetensors.torch, "serialize_file", RUST, 4, "model", 7),
        (runs, "write_bytes_whole", NO_SPACE, -1, "run.json", 7),
    ],
)
def test_a_full_disk_is_one_clear_message_and_the_resumed_run_ends_alike(
    straight: tuple[Any, dict[str, Any], dict[str, Path]],
    tmp_path: Path,
    owner: Any,
    function: str,
    error: Exception,
    after: int,
    file: str,
    step: int | None,
) -> None:
    config, wanted, _ = straight
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, failing(getattr(owner, function), error, after, file))
        with raises(DiskFullError, f"step {step}" if step else None, "--resume") as raised:
            run_stage("train", config, out)
    assert file in str(raised.value)
    assert raised.value.exit_code == 1
    assert not checkpoints.half_checkpoints(out / "checkpoints")
    assert not list(out.glob(".model*"))
    found = checkpoints.last_whole_checkpoint(out / "checkpoints")
    assert (found[1]["global_step"] if found else None) == step
    run_stage("train", config, out, resume=True)
    same(result(out), wanted)


def failing(original: Callable[..., Any], error: Exception, after: int, file: str) -> Callable[..., Any]:
    """Return a function that writes half of its file and raises: from its call number `after` on, or at the end."""
    calls = 0

    def write(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        passes = calls <= after
        if after < 0:  # the last file of a run: the model is there when run.json is written
            passes = Path(args[0]).name != file or not (Path(args[0]).parent / "model").exists()
        if passes:
            return original(*args, **kwargs)
        if original is not files.write_bytes_whole and original is not files.write_text_whole:
            Path(args[1]).write_bytes(b"half")
        raise error

    return write


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [100, 200, 260, 330])
def test_a_disk_that_is_really_full(tmp_path: Path, kilobytes: int) -> None:
    """A small disk in memory; a checkpoint of this model takes some 150 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here; that needs root")
    try:
        config = stage_config("train", write_inputs(tmp_path / "inputs"))
        run_stage("train", config, tmp_path / "straight")
        with pytest.raises(DiskFullError, match="--resume"):  # which file comes last depends on their sizes
            run_stage("train", config, disk / "run")
        assert not checkpoints.half_checkpoints(disk / "run" / "checkpoints")
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        run_stage("train", config, disk / "run", resume=True)
        same(result(disk / "run"), result(tmp_path / "straight"))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_checkpoints_are_kept_by_step_and_only_whole_ones_count(tmp_path: Path) -> None:
    class State:
        is_world_process_zero = True
        global_step = 0

    class Args:
        output_dir = str(tmp_path)

    told: list[int] = []
    callback = checkpoints.WholeCheckpoints(2, told.append)
    for step in (2, 4, 10, 12):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "shards").mkdir(parents=True)
        (folder / "shards" / "0.bin").write_bytes(b"01234")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        State.global_step = step
        callback.on_save(Args, State, None)  # type: ignore[arg-type]
    assert told == [2, 4, 10, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]
    found = checkpoints.last_whole_checkpoint(tmp_path)
    assert found == (tmp_path / "checkpoint-12", {"global_step": 12})
    (tmp_path / "checkpoint-12" / "shards" / "0.bin").write_bytes(b"0123")
    found = checkpoints.last_whole_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == "checkpoint-10"
    assert checkpoints.half_checkpoints(tmp_path) == [tmp_path / "checkpoint-12"]
