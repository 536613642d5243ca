"""What this machine has: devices, memory, disk, versions and optional packages. Nothing is sent or fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bfpo.core.offline import offline_variable

__all__ = [
    "EXTRAS",
    "Device",
    "computes_bfloat16",
    "describe_hub",
    "find_devices",
    "free_bytes",
    "free_disk",
    "installed_extras",
    "runs_on_cpu",
    "to_gpu",
    "use_threads",
]

EXTRAS = {
    "flash-attn": "variable-length attention on a GPU",
    "bitsandbytes": "4-bit and 8-bit weights",
    "deepspeed": "ZeRO-2 and ZeRO-3",
    "trl": "the loss as a TRL trainer",
    "vllm": "`engine: vllm` of `bfpo generate`",
    "ray": "workers on several machines (`executor.backend: ray`)",
    "gguf": "`--gguf` of `bfpo export`",
    "wandb": "a tracker",
    "tensorboard": "a tracker",
}
"""Packages that are used if they are installed, and what for."""


_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # Intel and AMD, Intel, Arm


@dataclass(frozen=True, slots=True)
class Device:
    """A device that can train: memory in bytes, `None` if the backend does not report it.

    `bfloat16`: whether it has instructions for it.
    """

    name: str
    description: str
    free_bytes: int | None
    total_bytes: int | None
    bfloat16: bool


def runs_on_cpu() -> bool:
    """Whether training runs on the CPU: no accelerator, or one without float64 (MPS)."""
    if not torch.accelerator.is_available():
        return True
    device = torch.accelerator.current_accelerator()
    return device is None or device.type == "mps"


def find_devices() -> list[Device]:
    """Return the accelerators that training would use, else the CPU."""
    if runs_on_cpu():
        free, total = _memory_of_host()
        words = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        return [Device("cpu", words, free, total, computes_bfloat16())]
    device = torch.accelerator.current_accelerator()
    assert device is not None
    backend: Any = torch.get_device_module(device)
    return [_accelerator(backend, device.type, index) for index in range(torch.accelerator.device_count())]


def _accelerator(backend: Any, kind: str, index: int) -> Device:
    free, total = backend.mem_get_info(index) if hasattr(backend, "mem_get_info") else (None, None)
    name = backend.get_device_name(index) if hasattr(backend, "get_device_name") else kind
    supported: Callable[[], bool] = getattr(backend, "is_bf16_supported", lambda: False)
    return Device(f"{kind}:{index}", str(name), free, total, bool(supported()))


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that this process can still use on a device, `None` if unknown; no other device is asked.

    What torch has reserved there and does not use is free for it.
    """
    if device.type == "cpu":
        return _memory_of_host()[0]
    backend: Any = torch.get_device_module(device)
    if not hasattr(backend, "mem_get_info"):
        return None
    index = device.index or 0
    return int(backend.mem_get_info(index)[0] + backend.memory_reserved(index) - backend.memory_allocated(index))


def computes_bfloat16() -> bool:
    """Return whether the device of `to_gpu` has instructions for bfloat16; emulated, it is slower than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return not flags.isdisjoint(_BFLOAT16_FLAGS)


def _memory_of_host() -> tuple[int | None, int | None]:
    """Return free and total memory for processes, within a container's limit; `None` if unknown."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError, IndexError):
        try:
            return None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return None, None
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return free, total
    return min(free, limit - used), min(total, limit)


def free_disk(folder: str | Path = ".") -> int:
    """Return the free bytes of the file system that holds the folder, or will hold it."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def installed_extras() -> dict[str, str | None]:
    """Return the version of each optional package, `None` if it is not installed. Nothing is imported."""
    found: dict[str, str | None] = {}
    for package in EXTRAS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe_hub() -> str:
    """Return whether models may come from the hub, according to the environment; no connection is tried."""
    offline = offline_variable()
    if offline is not None:
        return f"not used: {offline} is set"
    return f"used for what is not in the cache, at {os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}"


def use_threads(threads: int | None) -> None:
    """Set the CPU threads of torch, if a number is given."""
    if threads is not None:
        torch.set_num_threads(threads)


def to_gpu(model: torch.nn.Module) -> None:
    """Move a model to the GPU if there is one."""
    if torch.cuda.is_available():
        model.to("cuda")
