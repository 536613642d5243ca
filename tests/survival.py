"""Runs of stages in processes of their own that are killed at a chosen event, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bfpo.config import AlignConfig, SftConfig
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from tiny import tiny_model, tiny_tokenizer

CELLS = [(True, True), (True, False), (False, True), (False, False)]
# What differs between two runs of the same steps.
WALL_CLOCK = ("runtime", "per_second", "preparation_time")


def write_inputs(folder: Path) -> Path:
    """A model, 10 pairs of all cells, a buffer of 5 pairs, completions."""
    folder.mkdir(exist_ok=True)
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), folder / "start")
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"w{i} w3",
            "chosen": f"w{i % 7} w{i % 5} w9",
            "rejected": f"w{i % 3} w11",
            "chosen_is_safe": CELLS[i % 4][0],
            "rejected_is_safe": CELLS[i % 4][1],
        }
        for i in range(10)
    ]
    inputs = {
        "pairs": rows,
        "safe": [{**row, "chosen_is_safe": True, "rejected_is_safe": True} for row in rows[:5]],
        "sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows],
    }
    for name, content in inputs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def stage_config(stage: str, folder: Path, **settings: Any) -> Any:
    """Steps of two micro-batches; checkpoints fall between rows of the log, the last row between two checkpoints."""
    pairs = str(folder / "pairs.jsonl")
    common = {
        "model": str(folder / "start"),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "max_steps": 7,
        "logging_steps": 3,
        "save_steps": 2,
        "eval_steps": 5,
        "threads": 1,
    }
    if stage == "sft":
        files = str(folder / "sft.jsonl")
        own = {"data": {"files": files}, "eval_data": {"files": files}, "completions_per_step": 4}
        return SftConfig(**{**common, **own, "completions_per_microbatch": 2, "trainable": "all", **settings})
    own = {
        "data": {"files": pairs},
        "buffer": {"files": str(folder / "safe.jsonl")},
        "eval_data": {"files": pairs},
        "beta": 0.1,
        "anchor_weight": 0.1,
        "pairs_per_step": 4,
        "max_tokens_per_microbatch": 24,
    }
    trains = {} if "lora" in settings else {"trainable": "all"}
    return AlignConfig(**{**common, **own, **trains, **settings})


class Events:
    """Counts the places that a run passes, and calls `at` with the number and the name of each.

    A file is three places: before it, with half of it written, and after it. At the second one `at` is given a function
    that cuts the file, or a copy of it in another folder, to its half.
    """

    def __init__(self, at: Callable[[int, str, Callable[[Path], None]], None]) -> None:
        self.names: list[str] = []
        self._at = at

    def passes(self, name: str, half: Callable[[Path], None] = lambda folder: None) -> None:
        """Note a place."""
        self._at(len(self.names), name, half)
        self.names.append(name)

    def install(self, out: Path, patch: Callable[[Any, str, Any], None] = setattr) -> None:
        """Note micro-batches, backward passes, optimizer steps, rows, every file of checkpoints and model, removals."""
        import accelerate
        import safetensors.torch
        import transformers
        from accelerate.optimizer import AcceleratedOptimizer

        from bfpo.runs import folder as runs
        from bfpo.training import callbacks as checkpoints
        from bfpo.training import session

        def around(owner: Any, function: str, name: str, path_of: Callable[..., Any] | None = None) -> None:
            original = getattr(owner, function)

            def noted(*args: Any, **kwargs: Any) -> Any:
                path = None if path_of is None else Path(path_of(*args, **kwargs))
                called = name if path is None else f"{name} {path.name}"
                self.passes(f"before {called}")
                result = original(*args, **kwargs)
                if path is not None:
                    inside = path.relative_to(out)
                    self.passes(f"half {called}", lambda folder: _cut(folder / inside))
                self.passes(f"after {called}")
                return result

            patch(owner, function, noted)

        def removed(path: Any, *args: Any, **kwargs: Any) -> None:
            for file in sorted(Path(path).rglob("*")):
                if file.is_file():
                    file.unlink()
                    self.passes(f"half removal {Path(path).name.partition('-')[0]}")
            remove(path, *args, **kwargs)

        around(transformers.Trainer, "compute_loss_context_manager", "micro-batch")
        around(accelerate.Accelerator, "backward", "backward")
        around(AcceleratedOptimizer, "step", "optimizer step")
        around(torch, "save", "file", lambda value, path, *_, **__: path)
        around(safetensors.torch, "serialize_file", "file", lambda value, path, *_, **__: path)
        around(transformers.TrainerState, "save_to_json", "file", lambda state, path: path)
        around(runs.RunFolder, "append_metrics", "row", lambda folder, row: folder.path / "metrics.jsonl")
        around(runs, "write_bytes_whole", "whole file")
        around(checkpoints, "write_text_whole", "mark", lambda path, text: path)
        remove = checkpoints.shutil.rmtree
        patch(checkpoints.shutil, "rmtree", removed)
        around(session, "save_model_folder", "model/")


def _cut(path: Path) -> None:
    """Leave half of a file: of `metrics.jsonl` the rows before the last and half of that."""
    content = path.read_bytes()
    start = content[:-1].rfind(b"\n") + 1 if path.name == "metrics.jsonl" else 0
    os.truncate(path, (start + len(content)) // 2)


def _child(
    stage: str, config: Any, out: Path, resume: bool, signalled: tuple[int, int] | None, environment: Any, told: Any
) -> None:
    def at(number: int, name: str, half: Callable[[Path], None]) -> None:
        if signalled is not None and number == signalled[0]:
            if signalled[1] == signal.SIGKILL:
                half(out)
            os.kill(os.getpid(), signalled[1])

    os.environ.update(environment)
    torch.set_num_threads(1)
    if "DS_ACCELERATOR" in environment:
        _let_deepspeed_run_on_the_cpu()
    events = Events(at)
    events.install(out)
    try:
        run_stage(stage, config, out, resume=resume)
    except BaseException:
        told.send(traceback.format_exc())
        raise
    told.send(events.names)


def _let_deepspeed_run_on_the_cpu() -> None:
    import deepspeed
    from transformers import training_args

    from bfpo.training import session

    session.runs_on_cpu = lambda: False  # with `use_cpu` accelerate leaves DeepSpeed out
    training_args.is_torch_bf16_gpu_available = lambda: True
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile


def _start(*arguments: Any) -> tuple[Any, Any]:
    # Its start takes some seconds, for torch and transformers; a run then takes half a second.
    context = get_context("forkserver")
    context.set_forkserver_preload(["bfpo.commands.train", "bfpo.commands.sft", "peft"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(*arguments, sender))
    process.start()
    sender.close()
    return process, receiver


def _told(receiver: Any) -> Any:
    try:
        return receiver.recv()
    except EOFError:
        return ""


def run(stage: str, config: Any, out: Path, *, resume: bool = False, killed_at: int | None = None) -> list[str]:
    """Run a stage in a process of its own; return the places it passed, none where it was killed as wanted."""
    signalled = None if killed_at is None else (killed_at, signal.SIGKILL)
    process, receiver = _start(stage, config, out, resume, signalled, {})
    told = _told(receiver)
    process.join()
    assert process.exitcode == (0 if killed_at is None else -signal.SIGKILL), told
    return list(told)


def run_in_two(
    stage: str, config: Any, out: Path, *, resume: bool = False, signalled: tuple[int, int, int] | None = None
) -> list[Any]:
    """Run a stage in two processes; return what each passed, or the traceback of its end, or "" where it was killed.

    `signalled`: (process, place, signal) that it sends itself there. Where one is killed, so is the other, as by a
    launcher.
    """
    started = []
    for rank, environment in enumerate(_launched(2)):
        own = signalled[1:] if signalled is not None and signalled[0] == rank else None
        started.append(_start(stage, config, out, resume, own, environment))
    if signalled is not None and signalled[2] == signal.SIGKILL:
        started[signalled[0]][0].join()
        started[1 - signalled[0]][0].kill()
    told = [_told(receiver) for _, receiver in started]
    for process, _ in started:
        process.join()
    return told


def _launched(processes: int) -> list[dict[str, str]]:
    """Return the variables that a launcher sets in each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [{**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run_under_deepspeed(stage: str, config: Any, out: Path, *, zero: int, processes: int, resume: bool = False) -> None:
    """Run a stage under DeepSpeed on the CPU; the config must have `ddp_backend: gloo` in its `trainer_args`."""
    settings = {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "LOCAL_SIZE": str(processes),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }
    started = [_start(stage, config, out, resume, None, {**own, **settings}) for own in _launched(processes)]
    told = [_told(receiver) for _, receiver in started]
    for process, _ in started:
        process.join()
    assert [process.exitcode for process, _ in started] == [0] * processes, told


def run_with_copies(stage: str, config: Any, out: Path, wanted: Sequence[tuple[str, int]]) -> dict[str, Path]:
    """Run a stage here and return a copy of its folder as a kill would leave it at each wanted place, by name.

    `wanted`: name of the place and the how manieth time it is passed, from 0.
    """
    seen: Counter[str] = Counter()
    copies: dict[str, Path] = {}

    def at(number: int, name: str, half: Callable[[Path], None]) -> None:
        if (name, seen[name]) in wanted:
            copies[name] = copytree(out, out.parent / f"{out.name}-killed-{number}")
            half(copies[name])
        seen[name] += 1

    with pytest.MonkeyPatch.context() as patch:
        Events(at).install(out, patch.setattr)
        run_stage(stage, config, out)
    assert len(copies) == len(wanted), seen
    return copies


def result(out: Path) -> dict[str, Any]:
    """What a run has left: model, checkpoints with optimizer, scheduler, RNG and trainer state, rows, facts, files."""
    found: dict[str, Any] = {"files": sorted(str(path.relative_to(out)) for path in out.rglob("*"))}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.suffix in (".pt", ".pth") and path.name != "training_args.bin":
            found[name] = torch.load(path, weights_only=False)
        elif path.name == "trainer_state.json":
            found[name] = _timeless(json.loads(path.read_text()))
    text = (out / "metrics.jsonl").read_text()
    found["metrics"] = [_timeless(json.loads(line)) for line in text.splitlines()]
    record = json.loads((out / "run.json").read_text())
    found["record"] = _timeless({name: record[name] for name in ("status", "metrics")})
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if not name.endswith(WALL_CLOCK)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Yield the places in which two results differ, bit for bit."""
    if isinstance(one, torch.Tensor):
        if not (isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)):
            yield place
    elif isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            if name in one and name in other:
                yield from differences(one[name], other[name], f"{place}/{name}")
            else:
                yield f"{place}/{name} is in one only"
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{place}/{i}")
    elif type(one).__name__ == "ndarray":
        if one.tolist() != other.tolist():
            yield place
    elif type(one) is type(other) and hasattr(one, "__dict__"):
        yield from differences(vars(one), vars(other), place)
    elif one != other:
        yield f"{place}: {one!r} != {other!r}"
