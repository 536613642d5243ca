"""The machine: what it is, its best matrix rate, and the memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import time
from importlib import metadata
from pathlib import Path

from bfpo.core.provenance import describe_checkout, describe_platform, describe_versions

__all__ = ["best_matrix_rate", "describe_machine", "peak_rss", "reset_peak", "rss", "software"]

STATUS = Path("/proc/self/status")


def describe_machine() -> dict[str, str | int | None]:
    """Return the CPU's name, the number of cores, the memory in bytes and the operating system."""
    return {
        "cpu": _after_colon("/proc/cpuinfo", "model name"),
        "memory_bytes": _total_memory(),
        **describe_platform(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
    }


def software() -> dict[str, object]:
    """Return the versions of what is measured and the commit of this checkout."""
    versions: dict[str, object] = dict(describe_versions())
    for package in ("trl", "datasets"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, **describe_checkout()}


def _after_colon(file: str, name: str) -> str | None:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def rss() -> int | None:
    """Return the resident memory of this process in bytes, garbage given back first; `None` where it is not known."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would count as the model's
    return _status("VmRSS")


def peak_rss() -> int | None:
    """Return the most resident memory since `reset_peak`, or since the start where that did nothing, in bytes."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Let the peak start anew from what is resident now; returns whether the kernel did so (Linux does)."""
    rss()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    text = _after_colon(str(STATUS), name)
    return None if text is None else int(text.split()[0]) * 1024


def best_matrix_rate(*, seconds: float = 1.0) -> dict[str, float]:
    """Return the best float32 rate of a matrix product per shape, in operations per second.

    Square products and one as flat as those of a model; each repeated for `seconds`, the fastest repeat counts.
    """
    import torch

    rates = {}
    with torch.no_grad():
        for rows, inner, columns in ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 512, 2048), (256, 512, 32_000)):
            left, right = torch.randn(rows, inner), torch.randn(inner, columns)
            out = torch.empty(rows, columns)
            best, stop = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < stop:
                start = time.perf_counter()
                torch.mm(left, right, out=out)
                best = min(best, time.perf_counter() - start)
            rates[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / best
    return rates
