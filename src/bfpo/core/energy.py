"""Energy used by GPUs, read from their own counters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

__all__ = ["gpu_joules", "joules_since"]


def gpu_joules() -> dict[str, float]:
    """Return the energy that each GPU visible to CUDA has used since its driver was loaded, in joules by UUID.

    Read from NVML through `nvidia-ml-py` (the extra `energy`). Empty if that is not installed, if a GPU has no counter
    (before Volta, MIG slices), if the visible GPUs cannot be identified, or in a run over several machines.
    """
    if os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")):
        return {}
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, no driver or no permission: the energy is unknown, which is not an error
        return {}
    try:
        return {
            str(nvml.nvmlDeviceGetUUID(device)): nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000
            for device in _visible(nvml)
        }
    except nvml.NVMLError:
        return {}
    finally:
        nvml.nvmlShutdown()


def joules_since(start: Mapping[str, float]) -> float | None:
    """Return the energy that the GPUs of `start` have used since then, in joules; `None` if unknown.

    It includes other programs on these GPUs and excludes the rest of the machine. A driver restart makes it unknown.
    """
    now = gpu_joules() if start else {}
    if not start or set(now) != set(start) or any(now[name] < start[name] for name in start):
        return None
    return sum(now[name] - start[name] for name in start)


def _visible(nvml: Any) -> list[Any]:
    """Return the NVML handles of the GPUs visible to CUDA; empty if CUDA and NVML may number the GPUs differently."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [nvml.nvmlDeviceGetHandleByIndex(place) for place in range(nvml.nvmlDeviceGetCount())]
    if wanted is None:
        return devices
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if names and all(name.startswith("GPU-") for name in names):
        return [device for device in devices if str(nvml.nvmlDeviceGetUUID(device)).startswith(tuple(names))]
    ordered = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    alike = len({str(nvml.nvmlDeviceGetName(device)) for device in devices}) == 1
    if not all(name.isdigit() and int(name) < len(devices) for name in names) or not (ordered or alike):
        return []
    return [devices[int(name)] for name in names]
