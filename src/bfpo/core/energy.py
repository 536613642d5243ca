"""The energy that GPUs have drawn, by their own counters: a part of what a run cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

__all__ = ["gpu_joules", "joules_since"]


def gpu_joules() -> dict[str, float]:
    """Return what each GPU that CUDA may use has drawn since its driver was loaded, joules by UUID.

    From NVML through `nvidia-ml-py` (the extra `energy`). Empty where that is missing, where a GPU has no counter
    (before Volta, slices of MIG), where it is not clear which GPUs are meant, or in a run over several machines.
    """
    if os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")):
        return {}
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: energy is then unknown, which is no failure
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
    """Return what the same GPUs have drawn since, joules; `None` where that is not known, as after a driver's restart.

    Whatever else ran on them is in it; what the rest of the machine drew is not.
    """
    now = gpu_joules() if start else {}
    if not start or set(now) != set(start) or any(now[name] < start[name] for name in start):
        return None
    return sum(now[name] - start[name] for name in start)


def _visible(nvml: Any) -> list[Any]:
    """Return the handles of the GPUs that CUDA may use; none where their numbers may mean others to NVML."""
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
