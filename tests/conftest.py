"""Shared settings of the tests: one thread (tiny models are faster so), no network, no telemetry, no clock."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

import messages

torch.set_num_threads(1)
settings.register_profile("bfpo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("bfpo")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep every test, and every process that it starts, out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="session")
def no_bfloat16_of_this_machine() -> Iterator[None]:
    """Let `dtype: auto` be float32 everywhere, so that no test depends on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bfpo.policy.precision.computes_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data beside the checkout, or skip with the reason."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data is not at {SHARED_DATA}")
    return SHARED_DATA


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules: every `Trainer.train` collects, and would walk them all each time."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-messages", action="store_true", help="record the texts of errors (tests/messages.py)")


def pytest_configure(config: pytest.Config) -> None:
    messages.start(config)


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let arguments of a training count eight GPUs in this process, as on a machine that has them, until one is set."""
    from transformers import TrainingArguments

    def n_gpu(args: Any) -> int:
        if "counted" not in vars(args):
            assert args.device is not None  # which sets the number
            args._n_gpu, args.counted = 8, True
        return int(args._n_gpu)

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(n_gpu))
