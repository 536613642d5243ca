from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bfpo.core.energy import gpu_joules, joules_since
from bfpo.report.gather import gather
from bfpo.report.page import render_html
from bfpo.runs.folder import RunFolder
from run_folders import write_run


class FakeNvml(ModuleType):
    """Two GPUs with counters in millijoules, as `pynvml` gives them."""

    class NVMLError(Exception):
        pass

    def __init__(self, counters: list[int], names: list[str] | None = None) -> None:
        super().__init__("pynvml")
        self.counters, self.names, self.depth = counters, names or ["one"] * len(counters), 0
        self.broken = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.depth += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.depth -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, place: int) -> int:  # noqa: N802
        return place

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}abc"

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.names[handle]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if self.broken:
            raise self.NVMLError("not supported")
        return self.counters[handle]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml([5_000, 90_000])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_counters_are_read_in_joules_and_the_library_is_closed(nvml: FakeNvml) -> None:
    start = gpu_joules()
    assert start == {"GPU-0abc": 5.0, "GPU-1abc": 90.0}
    nvml.counters = [7_500, 90_250]
    assert joules_since(start) == pytest.approx(2.75)
    nvml.counters = [10, 90_250]  # the driver was loaded again
    assert joules_since(start) is None
    nvml.broken = True
    assert gpu_joules() == {}
    assert nvml.depth == 0


@pytest.mark.parametrize(
    ("visible", "found"),
    [("1", [1]), ("0,1", [0, 1]), ("GPU-1a", [1]), ("", []), ("7", []), ("MIG-3", []), ("-1", [])],
)
def test_only_what_cuda_may_use_is_counted(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, found: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(gpu_joules()) == [f"GPU-{place}abc" for place in found]


def test_numbers_that_may_mean_other_gpus_are_not_guessed(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.names = ["small", "large"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu_joules() == {}
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert list(gpu_joules()) == ["GPU-0abc"]
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert gpu_joules() == {}  # the other machine's are out of reach


def test_without_the_library_energy_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_joules() == {}
    assert joules_since({}) is None


def test_a_run_writes_its_energy_and_the_page_shows_it(nvml: FakeNvml, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "train", {"seed": 1})
    nvml.counters[0] += 7_200_000
    folder.set_status("interrupted")
    resumed = RunFolder.create(tmp_path / "run", "train", {"seed": 1}, resume=True)
    nvml.counters[1] += 3_600_000
    resumed.set_status("finished")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["gpu_joules"] == pytest.approx(10_800)  # both parts: 2 Wh and 1 Wh
    write_run(tmp_path / "other", "prepare")
    page = render_html(gather([tmp_path]))
    assert "3.0 Wh drawn by GPUs in 1 of 2 runs" in page
    assert "<td>3.0 Wh</td>" in page
    assert "Energy was not measured" not in page
    alone = render_html(gather([tmp_path / "other"]))
    assert "Energy was not measured" in alone
    assert '<th scope="col">GPU energy</th>' not in alone


def test_a_part_without_energy_leaves_the_whole_unknown(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.broken = True
    RunFolder.create(tmp_path / "run", "train", {"seed": 1}).set_status("interrupted")
    nvml.broken = False
    resumed = RunFolder.create(tmp_path / "run", "train", {"seed": 1}, resume=True)
    nvml.counters[1] += 1_000
    resumed.set_status("finished")
    assert "gpu_joules" not in json.loads((tmp_path / "run" / "run.json").read_text())
