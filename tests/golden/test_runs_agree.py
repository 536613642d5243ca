"""Classes of runs that must end in the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import tiny_model, tiny_pairs, tiny_trainer

Weights = dict[str, Tensor]


def train(folder: Path, **settings: Any) -> Weights:
    trainer = tiny_trainer(folder, **settings)
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def largest_difference(one: Weights, other: Weights) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


STREAMS: dict[str, Any] = {
    "main": tiny_pairs(22, 1),
    "buffer": tiny_pairs(7, 2, cells="safe"),
    "anchor_weight": 0.3,
    "buffer_weight": 0.5,
}


@pytest.mark.parametrize(("attention", "max_tokens"), [("padded", None), ("packed", 1), ("packed", 40), ("padded", 40)])
def test_micro_batches_and_form_of_rows_change_nothing(tmp_path: Path, attention: str, max_tokens: int | None) -> None:
    scale = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-5, "per_device_train_batch_size": 8}
    settings = {**STREAMS, **scale, "max_steps": 5, "logging_steps": 100}
    make = {"dtype": torch.float64}
    whole = train(tmp_path, model=tiny_model(**make), max_tokens_per_microbatch=None, **settings)
    cut = train(
        tmp_path, model=tiny_model(**make), attention=attention, max_tokens_per_microbatch=max_tokens, **settings
    )
    assert (
        largest_difference(whole, {name: value.detach() for name, value in tiny_model(**make).state_dict().items()})
        > 1e-3
    )
    assert largest_difference(whole, cut) < 1e-9


@pytest.mark.parametrize("micro", [1, 4, 3])
def test_accumulated_steps_equal_whole_ones(tmp_path: Path, micro: int) -> None:
    """22 pairs in steps of 8: the last step of each epoch has 6. With 3 a micro-batch is itself ragged, at 9 a step."""
    per_step = 9 if micro == 3 else 8
    # Adam and clipping would hide a step whose gradient is too large or too small as a whole
    scale = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-5}
    settings = {**STREAMS, **scale, "max_steps": -1, "num_train_epochs": 2, "logging_steps": 100}
    make = {"dtype": torch.float64}
    whole = train(tmp_path, model=tiny_model(**make), per_device_train_batch_size=per_step, **settings)
    parts = train(
        tmp_path,
        model=tiny_model(**make),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_step // micro,
        **settings,
    )
    start = {name: value.detach() for name, value in tiny_model(**make).state_dict().items()}
    assert largest_difference(whole, start) > 1e-3  # it did train
    assert largest_difference(whole, parts) < 1e-9


@pytest.mark.parametrize("reference", ["swap", "precompute"])
def test_ways_to_the_reference_agree(tmp_path: Path, reference: str) -> None:
    settings = {**STREAMS, "max_steps": 6, "logging_steps": 100}
    auto = train(tmp_path, model=tiny_model(dtype=torch.float64), **settings)
    other = train(tmp_path, model=tiny_model(dtype=torch.float64), reference=reference, **settings)
    assert largest_difference(auto, other) < 1e-6


def test_logging_and_evaluation_change_nothing(tmp_path: Path) -> None:
    settings = {**STREAMS, "max_steps": 6}
    plain = train(tmp_path, logging_steps=100, **settings)
    watched = train(
        tmp_path, logging_steps=1, eval_strategy="steps", eval_steps=2, eval_dataset=tiny_pairs(5, 9), **settings
    )
    assert largest_difference(plain, watched) == 0


@pytest.mark.parametrize(("reference", "stop"), [("swap", 3), ("precompute", 5), ("swap", 6), ("precompute", 8)])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, reference: str, stop: int) -> None:
    """6 steps an epoch of 22 pairs: inside the first epoch, at its last step but one, at its end, inside the second."""
    settings = {
        **STREAMS,
        "max_steps": -1,
        "num_train_epochs": 2,
        "reference": reference,
        "lr_scheduler_type": "linear",
    }
    straight = tiny_trainer(tmp_path / "straight", **settings)
    straight.train()
    assert straight.state.global_step == 12

    folder = tmp_path / "stopped"
    first = tiny_trainer(folder, **{**settings, "save_strategy": "steps", "save_steps": stop})
    first.train()
    second = tiny_trainer(folder, **settings)
    torch.manual_seed(77)  # whatever another process has drawn by then
    second.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    told = {row["step"]: row for row in straight.state.log_history if "learning_rate" in row}
    again = {row["step"]: row for row in second.state.log_history if "learning_rate" in row}
    assert told[12]["buffer/loss"] == again[12]["buffer/loss"]


def test_each_epoch_brings_other_buffer_pairs(tmp_path: Path) -> None:
    """Both streams are told the epoch: across two epochs every buffer pair comes equally often."""
    seen: list[int] = []
    trainer = tiny_trainer(tmp_path, main=tiny_pairs(8, 1), buffer=tiny_pairs(16, 2), max_steps=-1, num_train_epochs=2)
    inner = trainer.compute_loss

    def spy(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(inputs["pair_index"][inputs["is_buffer"]].tolist())
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy  # type: ignore[method-assign]
    trainer.train()
    assert sorted(seen) == list(range(16))


PROCESSES = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from tiny import tiny_model, tiny_pairs, tiny_trainer
trainer = tiny_trainer(
    Path({folder!r}), model=tiny_model(dtype=torch.float64), main=tiny_pairs({num_pairs}, 1),
    buffer=tiny_pairs(7, 2, cells="safe"), anchor_weight=0.3, buffer_weight=0.5, max_steps=5, reference={reference!r},
    method={method!r},
    per_device_train_batch_size=4, gradient_accumulation_steps={accumulation}, logging_steps=1,
    max_tokens_per_microbatch={max_tokens}, ddp_find_unused_parameters=False, eval_dataset=tiny_pairs(5, 9),
    save_strategy="steps", save_steps=2,
)
trainer.train(resume_from_checkpoint={resume!r})
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    logs = [row for row in trainer.state.log_history if "learning_rate" in row]
    torch.save({{"weights": trainer.model.state_dict(), "logs": logs, "metrics": metrics}}, {out!r})
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    os._exit(0)  # torch now and then aborts in the clean-up of a process that was in a group; `bfpo` leaves so too
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "num_pairs", "method"),
    [("swap", 24, "bfpo"), ("precompute", 22, "bfpo"), ("swap", 17, "bfpo"), ("precompute", 22, "kto"),
     ("swap", 17, "kto"), ("swap", 17, "kldo")],
)  # fmt: skip
def test_two_processes_agree_with_one_of_twice_the_accumulation(
    tmp_path: Path, reference: str, num_pairs: int, method: str
) -> None:
    """Steps of 8, the last of an epoch of 8, 6 and 1; at 25 tokens the shares differ in their number of micro-batches.

    The third run continues that of two processes from its second step.
    """
    results = []
    for name, processes, resume in (("1", 1, None), ("2", 2, None), ("2", 2, str(tmp_path / "2" / "checkpoint-2"))):
        out = tmp_path / f"{len(results)}.pt"
        script = tmp_path / f"run{len(results)}.py"
        script.write_text(
            PROCESSES.format(
                tests=str(Path(__file__).parents[1]),
                folder=str(tmp_path / name),
                reference=reference,
                num_pairs=num_pairs,
                method=method,
                accumulation=2 // processes,
                max_tokens=25,
                resume=resume,
                out=str(out),
            )
        )
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*(launch if processes > 1 else [sys.executable]), str(script)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(out, weights_only=False))
    one = results[0]
    assert len(one["logs"]) == 5
    for two in results[1:]:
        # The processes share out the pairs of each step, and sum them in another order.
        assert largest_difference(one["weights"], two["weights"]) < 1e-6
        assert len(two["logs"]) == 5
        for row, other in zip(one["logs"], two["logs"], strict=True):
            assert row.keys() == other.keys()
            for name in row.keys() - {"epoch"}:  # which counts batches: 5 of one process, 3 of each of two, in 17 pairs
                assert row[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
        assert one["metrics"]["eval_num_pairs"] == two["metrics"]["eval_num_pairs"] == 5
        assert one["metrics"]["eval_loss"] == pytest.approx(two["metrics"]["eval_loss"], rel=1e-6)
