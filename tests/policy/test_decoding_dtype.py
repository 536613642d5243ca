"""Weights that only generate are in bfloat16 where the device has instructions for it, and in float32 elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bfpo.policy.devices as devices
import bfpo.policy.precision as precision
from bfpo.config import SftConfig
from bfpo.policy.precision import decoding_dtype
from bfpo.training.session import common_arguments
from messages import says


@pytest.mark.parametrize(
    ("asked", "saved", "native", "gpu", "expected"),
    [
        ("auto", torch.float32, True, False, "bfloat16"),
        ("auto", torch.bfloat16, False, False, "float32"),
        ("auto", torch.float16, True, True, "float16"),
        ("auto", torch.float16, False, False, "float32"),
        ("auto", None, False, True, "float32"),
        ("float32", torch.bfloat16, True, True, "float32"),
        ("bfloat16", torch.float32, False, False, "bfloat16"),
    ],
)
def test_the_choice(
    asked: str, saved: Any, native: bool, gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: native)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    dtype, why = decoding_dtype(asked, saved)
    assert dtype == expected
    assert why.startswith("auto" if asked == "auto" else "as asked")
    assert ("is faster" in why) == (asked == "bfloat16")  # emulated in the one case of the table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("model name\t: avx512_bf16\nflags\t\t: fpu avx2 avx512f\n", False),
        (None, False),
    ],
)
def test_instructions_of_a_cpu_are_those_that_linux_lists(
    text: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(devices, "_CPU_INFO", file)
    assert devices.computes_bfloat16() == expected


@pytest.mark.parametrize(("dtype", "native"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_a_training_says_that_the_cpu_emulates_its_number_type(
    dtype: str, native: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: native)
    config = SftConfig.model_validate({"model": "m", "data": {"files": ["rows.jsonl"]}, "dtype": dtype})
    common_arguments(config, tmp_path, unit="completions", per_step=config.completions_per_step)
    if dtype == "bfloat16" and not native:
        says(caplog, "set dtype: float32")
    else:
        assert not caplog.text
