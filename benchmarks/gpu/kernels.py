"""WORKER: which kernels take the time of one training step, by torch's profiler."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from typing import Any

from benchmarks.process import worker
from benchmarks.training import TrainingRun, add_clock, import_trainer, our_trainer, trl_trainer
from benchmarks.workload import make_tokenizer

SHOWN = 25
# The first group of which a word is in a kernel's name.
GROUPS = {
    "attention": ("flash", "fmha", "flex", "attention", "sdpa"),
    "matrix products": ("gemm", "xmma", "cutlass", "nvjet", "cublas", "matmul", "::mm", "::addmm", "::bmm"),
    "optimizer and clipping": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "copies and casts": ("copy", "memcpy", "memset", "_to_copy", "cat", "fill"),
    "softmax, sums, norms": ("softmax", "logsumexp", "reduce", "norm", "::sum", "::mean", "::amax", "::var"),
    "gather and scatter": ("index", "gather", "scatter", "embedding"),
    "elementwise": ("elementwise", "vectorized", "triton", "::mul", "::add", "::exp", "::sub", "::div", "silu"),
}


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Return the share of each group, the kernels that take most, and the share of the step without any."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    run = TrainingRun.from_json(values)
    cuda = run.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiler: Any = profile(activities=activities)
    started: list[float] = []

    class Profile(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == run.steps - 1:
                profiler.__enter__()  # the first one takes seconds on a GPU
                started.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == run.steps:
                profiler.__exit__(None, None, None)

    import_trainer(run.trainer)
    with tempfile.TemporaryDirectory() as folder:
        make = our_trainer if run.trainer == "bfpo" else trl_trainer
        trainer = make(run, run.model(), make_tokenizer(run.shape.vocabulary), run.pairs(), folder)
        clock = add_clock(trainer, count=False)  # first, so that a step ends when the device has done its work
        trainer.add_callback(Profile())
        trainer.train()
    return {**shares(times(profiler.key_averages(), cuda=cuda)), "step_seconds": clock.ends[-1] - started[0]}


def times(events: Iterable[Any], *, cuda: bool) -> list[tuple[str, float, int]]:
    """Return name, seconds and calls of what took time on the device.

    Ranges that are named in Python, such as the optimizer's step, appear among the kernels of a GPU, with the time of
    all kernels in them and between; they are left out.
    """
    time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
    return [
        (event.key, getattr(event, time_of) / 1e6, event.count)
        for event in events
        if getattr(event, time_of) > 0
        if not cuda or (str(event.device_type).endswith("CUDA") and not event.is_user_annotation)
    ]


def shares(kernels: list[tuple[str, float, int]]) -> dict[str, Any]:
    """Return the total and the share of each group and of the longest kernels: (name, seconds, calls)."""
    total = sum(seconds for _, seconds, _ in kernels)
    groups = dict.fromkeys([*GROUPS, "other"], 0.0)
    for name, seconds, _ in kernels:
        groups[group_of(name)] += seconds
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:SHOWN]
    return {
        "kernel_seconds": total,
        "groups": {name: seconds / total for name, seconds in groups.items()} if total else {},
        "longest": [{"name": name[:120], "share": s / total, "calls": calls} for name, s, calls in longest],
    }


def group_of(kernel: str) -> str:
    """Return the group of a kernel, by its name."""
    lower = kernel.lower()
    return next((group for group, words in GROUPS.items() if any(word in lower for word in words)), "other")


if __name__ == "__main__":
    worker(measure)
