"""What is measured on a GPU, the most valuable first; each part is a process of its own and one row of the table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from benchmarks.training import TrainingRun
from benchmarks.workload import MODELS
from bfpo.policy.recompute import Recompute

__all__ = ["Part", "plan", "profile_part"]

TRL = ("trl", "datasets")


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement. `kind` and `group`: which rows are compared; `least` seconds must be left to start it.

    `needs`: packages without which it is not started. `most`: seconds after which it is stopped.
    """

    kind: str
    group: str
    title: str
    module: str
    values: dict[str, Any]
    needs: tuple[str, ...] = ()
    least: float = 25.0
    most: float = 180.0


def plan(*, small: bool, cuda: bool) -> list[Part]:
    """Return the parts in their order; of several ways to run a trainer the fastest is the one compared."""
    large, middle = ("XS", "XS") if small else ("8B", "1B")
    facts = Part("facts", "", "the device", "benchmarks.gpu.device", {"seconds": 0.1 if small else 1.0}, least=0)
    first = [
        _training("bfpo", large, small, cuda, max_tokens=3072),
        _training("trl", large, small, cuda, microbatch=2),
        _training("bfpo", large, small, cuda, max_tokens=8192, recompute=True),
        _training("trl", large, small, cuda, microbatch=4, recompute=True),
        _training("bfpo", large, small, cuda, max_tokens=6144, recompute="selective"),
    ]
    tests = Part(
        "tests", "", "tests marked gpu", "benchmarks.gpu.checks", {"small": small}, ("pytest", "hypothesis"), most=150.0
    )
    liger = [
        _training("trl", large, small, cuda, microbatch=4, recompute=True, kernels=True),
        _training("trl", middle, small, cuda, microbatch=8, kernels=True),
    ]
    adapters = [
        _training(trainer, size, small, cuda, trains=trains, recompute=True, max_tokens=tokens, microbatch=pairs)
        for trains, size in (("lora", large), ("qlora", middle), ("lora", middle), ("qlora", large))
        for trainer, tokens, pairs in (("bfpo", 8192, None), ("trl", None, 4))
    ]
    smaller = [
        _training("bfpo", middle, small, cuda, max_tokens=8192),
        _training("trl", middle, small, cuda, microbatch=4),
    ]
    plain, trl = {"arm": "transformers"}, {"arm": "trl", "form": "packed", "kernels": False}
    others = [
        Part(kind, f"{kind} {middle}", title, f"benchmarks.gpu.{kind}", _common(middle, small, cuda, **arm), needs)
        for kind, title, arm, needs in (
            ("generation", "bfpo generate", {"arm": "bfpo"}, ()),
            ("generation", "transformers, batches of 64", {**plain, "batch": 64}, ()),
            ("generation", "transformers, all prompts in one batch", {**plain, "batch": 256}, ()),
            ("sft", "bfpo sft", {"arm": "bfpo"}, ("pyarrow",)),
            ("sft", "TRL, packed rows", trl, TRL),
            ("sft", "TRL, packed rows, Liger kernels", {**trl, "kernels": True}, (*TRL, "liger_kernel")),
            ("sft", "TRL, padded rows", {**trl, "form": "padded"}, TRL),
        )
    ]
    # Each question once before any is asked of another size: DPO, tests, adapters, generation and SFT.
    once = [facts, *first[:2], tests, *first[2:], *adapters[:2], *others, *smaller, *adapters[2:4], *liger]
    if small:  # on a CPU that may be busy with other things
        return [dataclasses.replace(part, most=600.0) for part in once]
    again = [_with_seed(part, 1) for part in (*first, *smaller, *others)]  # with other pairs, texts and prompts
    return [*once, *adapters[4:], *again, *(_with_seed(part, 2) for part in first)]


def profile_part(part: Part) -> Part:
    """Return the part that says which kernels take the time of a training that was measured."""
    title = f"kernels of {part.title}"
    return dataclasses.replace(part, kind="kernels", title=title, module="benchmarks.gpu.kernels")


def _training(
    trainer: str,
    size: str,
    small: bool,
    cuda: bool,
    *,
    trains: str = "down_proj",
    microbatch: int | None = None,
    max_tokens: int | None = None,
    recompute: Recompute = False,
    kernels: bool = False,
) -> Part:
    pairs = 4 if small else 16
    per_pass = pairs if microbatch is None else min(pairs, microbatch)
    run = TrainingRun(
        trainer=trainer,  # type: ignore[arg-type]
        reference="precomputed",
        shape=MODELS[size],
        steps=3 if small else 8,  # a step takes a second, and to begin takes a minute
        pairs_per_step=pairs,
        microbatch=per_pass,
        seed=0,
        length_scale=0.1 if small else 1.0,
        learning_rate=1e-4,
        device="cuda" if cuda else "cpu",
        half=not small,
        trains=trains,  # type: ignore[arg-type]
        recompute=recompute,
        max_tokens=max_tokens,
        kernels=kernels,
    )
    needs = (
        *(TRL if trainer == "trl" else ()),
        *(("peft",) if trains in ("lora", "qlora") else ()),
        *(("bitsandbytes",) if trains == "qlora" else ()),
        *(("liger_kernel",) if kernels else ()),
    )
    cut = f"{max_tokens:,} tokens" if max_tokens is not None else f"{per_pass} pairs"
    kept = {False: "kept", True: "recomputed", "selective": "recomputed but for products"}[recompute]
    how = f"{cut} a forward, activations {kept}{', Liger kernels' if kernels else ''}"
    name = "bfpo train" if trainer == "bfpo" else "TRL"
    return Part("training", f"{size} {trains}", f"{name}, {how}", "benchmarks.training", dataclasses.asdict(run), needs)


def _with_seed(part: Part, seed: int) -> Part:
    return dataclasses.replace(part, values={**part.values, "seed": seed})


def _common(size: str, small: bool, cuda: bool, **arm: Any) -> dict[str, Any]:
    return {
        **arm,
        "shape": dataclasses.asdict(MODELS[size]),
        "small": small,
        "device": "cuda" if cuda else "cpu",
        "half": not small,
        "seed": 0,
    }
