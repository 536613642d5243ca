"""WORKER: the device, its best rates of a matrix product and of a copy, its packages and its compiler."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from benchmarks.process import worker

# Dense bfloat16 of the data sheets, in operations per second; of Hopper the SXM form, whose names say nothing or HBM3.
DATASHEET = {"H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "A100": 312e12}
SLOWER_FORMS = ("PCIe", "NVL", "HBM2")
PACKAGES = ("accelerate", "peft", "trl", "datasets", "bitsandbytes", "flash-attn", "liger-kernel", "triton")


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Return facts; rates are medians of repeats on random data, after a warm-up."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    name = torch.cuda.get_device_name() if cuda else "cpu"
    facts: dict[str, Any] = {
        "device": name,
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cuda": torch.version.cuda,
        "packages": {package: _version(package) for package in PACKAGES},
        "compiler": next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),  # Triton needs one
        "datasheet": datasheet(name),
    }
    size = 8192 if cuda else 512
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _median(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), values["seconds"])  # type: ignore[misc]
        facts[f"matrix_{str(dtype).removeprefix('torch.')}"] = 2 * size**3 / seconds
    source = torch.randn(2**29 if cuda else 2**22, device=device)
    target = torch.empty_like(source)
    facts["copy_bytes"] = 2 * source.nbytes / _median(lambda: target.copy_(source), values["seconds"])
    return facts


def datasheet(name: str) -> float | None:
    """Return the rate of the card of this name; `None` for unknown ones, Hopper's slower forms, and parts of a card."""
    card = next((card for card in DATASHEET if card in name), None)
    slower = card != "A100" and any(form in name for form in SLOWER_FORMS)
    return None if card is None or slower or "MIG" in name else DATASHEET[card]


def _median(call: Callable[[], Any], seconds: float) -> float:
    """Return the median seconds of a call, after three that are not timed."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(3):
        once()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        times.append(once())
    return sorted(times)[len(times) // 2]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    worker(measure)
