"""The measurements for a GPU: their plan, budget, failures, tables and wheels; the slow test runs them on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import training as trainings
from benchmarks.flops import needed_flops
from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import checks, device, generation, kernels, wheels
from benchmarks.gpu import plan as plans
from benchmarks.gpu.kernels import group_of, shares, times
from benchmarks.gpu.table import gpu_tables
from benchmarks.process import ROOT, read_results
from benchmarks.workload import MODELS, ModelShape
from bfpo.core.errors import RunError, SettingError
from messages import raises


def test_the_shapes_are_those_of_their_names() -> None:
    assert MODELS["8B"].parameters() == pytest.approx(8.03e9, rel=1e-3)
    assert MODELS["1B"].parameters() == pytest.approx(1.236e9, rel=1e-3)


def test_needed_operations_by_what_trains() -> None:
    shape = ModelShape(vocabulary=50, hidden=8, intermediate=12, layers=2, heads=4, key_heads=2)
    # queries and output 8 x 8, keys and values 8 x 4, MLP 3 x 8 x 12
    layer = 2 * 64 + 2 * 32 + 3 * 96
    assert shape.layer_weights() == layer
    (prompt, chosen, rejected) = length = (5, 3, 2)
    tokens, predicted = prompt + chosen + rejected, chosen + rejected
    seen = 8 * 9 // 2 + rejected * prompt + 2 * 3 // 2
    attention = 4 * 8 * seen
    forward = 2 * (2 * layer * tokens + attention)
    head = 2 * 8 * 50 * predicted  # one product
    one = 2 * layer * tokens + 2 * attention  # gradient by the activations of a layer
    weights = {"down_proj": 2 * 2 * 96 * tokens, "all": 2 * 2 * layer * tokens + head, "lora": 0}
    for trains, layers in (("down_proj", 1), ("all", 2), ("lora", 2)):
        expected = forward + layers * one + weights[trains] + 2 * head
        assert needed_flops(shape, [length], trains=trains) == expected  # type: ignore[arg-type]


def fake(answers: dict[str, Any]) -> Any:
    """Return an `in_process` that answers by module, and raises what is an exception."""

    def in_process(module: str, values: Any, *, threads: int, timeout: float) -> dict[str, Any]:
        answer = answers.get(module, {})
        answer = answer(values) if callable(answer) else answer
        if isinstance(answer, BaseException):
            raise answer
        return dict(answer)

    return in_process


def training(values: dict[str, Any]) -> Any:
    if values["trainer"] == "trl" and values["recompute"]:
        return RunError("benchmarks.training failed:\nTraceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n")
    rate = {"bfpo": 300.0, "trl": 100.0}[values["trainer"]]
    return {"loop_seconds": 2.0, "loop_tokens": 2 * rate, "loop_needed_flops": 1e12, "peak": 3 * 2**30}


ANSWERS: dict[str, Any] = {
    "benchmarks.gpu.device": {"device": "NVIDIA H100", "datasheet": 1e12, "matrix_bfloat16": 2e12, "compiler": "cc"},
    "benchmarks.training": training,
    "benchmarks.gpu.checks": {"passed": ["a", "b"], "failed": ["c: wrong | value"], "skipped": []},
    "benchmarks.gpu.kernels": {"step_seconds": 2.0, **shares([("nvjet_gemm", 0.9, 3), ("flex|x", 0.1, 1)])},
    "benchmarks.gpu.sft": subprocess.TimeoutExpired("x", 5),
    "benchmarks.gpu.generation": {"loop_seconds": 1.0, "loop_tokens": 10, "peak": None},
}


def rows_of(text: str, title: str) -> list[list[str]]:
    block = text.split(f"### {title}")[1].split("###")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line.startswith("|")][2:]


def test_a_part_that_fails_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(kit, "in_process", fake(ANSWERS))
    monkeypatch.setattr(kit, "_has_gpu", lambda: True)
    known = {"trl", "datasets", "peft", "pytest", "hypothesis", "pyarrow"}
    monkeypatch.setattr(kit.importlib.util, "find_spec", lambda name: name if name in known else None)
    kit.main(["--budget", "540", "--out", str(tmp_path)])
    assert (tmp_path / "gpu.md").read_text() in capsys.readouterr().out
    results = read_results(tmp_path, "gpu")
    assert results is not None
    rows = rows_of((tmp_path / "gpu.md").read_text(), "On one GPU")
    of = {(row[0], row[1]): row[2:] for row in rows}
    best = of["8B down_proj", "bfpo train, 3,072 tokens a forward, activations kept"]
    assert best == ["300 (median of 3)", "3.00", "3.0", "50.0%", "25.0%"]
    failed = of["8B down_proj", "TRL, 4 pairs a forward, activations recomputed"]
    assert failed[0] == "failed: torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert of["1B qlora", "bfpo train, 8,192 tokens a forward, activations recomputed"][0].endswith(
        "bitsandbytes not installed"
    )
    assert of["sft 1B", "TRL, packed rows"][0].startswith("stopped after")
    assert [row[0] for row in rows_of((tmp_path / "gpu.md").read_text(), "Tests")] == ["c: wrong / value", "a", "b"]
    kernels = [run for run in results["runs"] if run["kind"] == "kernels"]
    assert len(kernels) == 1
    assert kernels[0]["values"]["max_tokens"] in (3072, 8192)
    equal = next(row for row in rows if row[1].startswith("at most the peak"))
    assert equal[3] == "3.00"


def test_the_budget_ends_the_run_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(kit.time, "monotonic", lambda: now[0])
    answers = fake(ANSWERS)

    def slow(*args: Any, timeout: float, **kwargs: Any) -> Any:
        now[0] += 40.0
        assert timeout <= 180.0
        return answers(*args, timeout=timeout, **kwargs)

    monkeypatch.setattr(kit, "in_process", slow)
    monkeypatch.setattr(kit, "_has_gpu", lambda: True)
    monkeypatch.setattr(kit.importlib.util, "find_spec", lambda name: name)
    kit.main(["--budget", "180", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text())
    measured = [run["kind"] for run in content["runs"] if run["status"] == "measured"]
    assert measured == ["facts", "training", "training", "tests"]
    assert content["runs"][4]["status"] == "not started: 15 s of the budget left"
    assert now[0] <= 180


def test_bad_options_and_a_machine_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments, said in ((["--parts", "sftt"], "sftt"), (["--budget", "3"], "--budget")):
        with pytest.raises(SystemExit) as ended:
            kit.main(arguments)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(kit, "_has_gpu", lambda: False)
    with raises(SettingError, "--small"):
        kit.main([])


def test_every_part_names_a_worker_that_is_there() -> None:
    parts = plans.plan(small=True, cuda=False) + plans.plan(small=False, cuda=True)
    for module in {part.module for part in parts}:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert parts[0].kind == "facts"
    large = plans.plan(small=False, cuda=True)
    assert [part.values["trainer"] for part in large[1:3]] == ["bfpo", "trl"]  # the most valuable figure first
    assert len(large) > 2 * len({(part.group, part.title) for part in large}) * 0.6
    groups = [part.group for part in large]
    assert groups.index("8B lora") < groups.index("generation 1B") < groups.index("1B down_proj")  # every question once
    assert {f"{size} {trains}" for size in ("1B", "8B") for trains in ("down_proj", "lora", "qlora")} <= set(groups)
    assert groups.index("1B lora") > groups.index("1B qlora")
    seeds = {kind: {part.values["seed"] for part in large if part.kind == kind} for kind in ("sft", "generation")}
    assert seeds == {"sft": {0, 1}, "generation": {0, 1}}


def test_trl_gets_its_best_settings_for_completions() -> None:
    ways = [part.values for part in plans.plan(small=False, cuda=True) if part.kind == "sft" and "TRL" in part.title]
    assert {(way["form"], way["kernels"]) for way in ways} == {("packed", False), ("packed", True), ("padded", False)}


@pytest.mark.parametrize(("device", "half", "installed", "asked"), [
    ("cuda", True, True, ["flash_attention_2"]),
    ("cuda", True, False, []),
    ("cuda", False, True, []),  # which it cannot compute
    ("cpu", True, True, []),
])  # fmt: skip
def test_trl_attends_by_flash_attention_where_it_is_installed(
    device: str, half: bool, installed: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings.importlib.util, "find_spec", lambda name: name if installed else None)
    found: list[str] = []
    model = SimpleNamespace(set_attn_implementation=found.append)
    assert trainings.fast_attention(model, SimpleNamespace(device=device, half=half)) is model
    assert found == asked


@pytest.mark.parametrize("arm", [{"arm": "bfpo"}, {"arm": "transformers", "batch": 64}])
def test_answers_of_the_small_form_end_at_their_own_lengths(arm: dict[str, Any]) -> None:
    part = next(part for part in plans.plan(small=True, cuda=False) if part.kind == "generation")
    values = {name: value for name, value in part.values.items() if name != "arm"}
    found = generation.measure({**values, **arm})
    assert 8 <= found["loop_tokens"] < 0.9 * 8 * 64  # without an end all have 64 tokens


def test_kernels_are_grouped_by_their_names() -> None:
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "matrix products",
        "triton_tem_fused_flex_attention_0": "attention",
        "void at::native::vectorized_elementwise_kernel<4, ...>": "elementwise",
        "Memcpy DtoD (Device -> Device)": "copies and casts",
        "unknown": "other",
    }
    assert {name: group_of(name) for name in names} == names
    assert sum(shares([("gemm", 1.0, 1), ("x", 3.0, 2)])["groups"].values()) == pytest.approx(1.0)


def test_named_ranges_are_no_kernels() -> None:
    def event(name: str, microseconds: float, *, device: str = "CUDA", is_range: bool = False) -> Any:
        return SimpleNamespace(
            key=name,
            self_device_time_total=microseconds,
            self_cpu_time_total=5e6,
            count=2,
            device_type=f"DeviceType.{device}",
            is_user_annotation=is_range,
        )

    events = [
        event("multi_tensor_apply_kernel", 2e6),
        event("Optimizer.step#AdamW.step", 3e6, is_range=True),  # the same kernels, and the gaps between them
        event("aten::mm", 4e6, device="CPU"),
        event("nvjet_gemm", 0.0),
    ]
    assert times(events, cuda=True) == [("multi_tensor_apply_kernel", 2.0, 2)]
    assert [name for name, *_ in times(events, cuda=False)] == [one.key for one in events]


def test_the_start_of_the_profiler_is_no_time_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    late = [0.0]

    class Profiler:
        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> None:
            late[0] += 1000.0

        def __exit__(self, *_: Any) -> None:
            late[0] += 1000.0

        def key_averages(self) -> list[Any]:
            return []

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    for module in (kernels, importlib.import_module("benchmarks.training")):
        monkeypatch.setattr(module, "time", clock)
    part = next(part for part in plans.plan(small=True, cuda=False) if part.title.startswith("bfpo train, 8,192"))
    assert 0 < kernels.measure(part.values)["step_seconds"] < 1000


def test_tests_that_cannot_run_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "none.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setattr(checks, "TESTS", ("none.py",))
    with raises(RunError, "exit code 2"):
        checks.measure({"small": True})


def test_packages_that_the_tests_import_are_carried() -> None:
    part = next(part for part in plans.plan(small=False, cuda=True) if part.kind == "tests")
    third, waiting = set[str](), [ROOT / "tests" / "conftest.py", *(ROOT / name for name in checks.TESTS)]
    for file in waiting:  # which grows by the helpers of the tests
        for name in re.findall(r"^(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            own = ROOT / "tests" / f"{name}.py"
            waiting += [own] if own.is_file() and own not in waiting else []
            if not own.is_file() and name not in sys.stdlib_module_names | {"bfpo", "benchmarks"}:
                third.add(name)
    # What transformers requires, and bfpo itself.
    assert third - {*wheels.THERE, "numpy", "tokenizers", "pydantic"} == set(part.needs)
    needed = {name for part in plans.plan(small=False, cuda=True) for name in part.needs}
    assert {name.replace("_", "-") for name in needed} <= wheels.needed_wheels().keys()


BARE = """
import sys
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from benchmarks.gpu import plan, wheels

here = {wheels.canonicalize_name(one.metadata["Name"]) for one in metadata.distributions()}
carried = wheels._with_requirements(name for name, use in wheels.WANTED.items() if use == "everything")
missing = here - wheels._with_requirements(wheels.THERE) - carried
known = metadata.packages_distributions().items()
hidden = {name for name, owners in known if all(wheels.canonicalize_name(one) in missing for one in owners)}
assert {"peft", "trl", "datasets", "pyarrow", "scipy", "sklearn", "matplotlib"} & set(dict(known)) <= hidden

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
parts = plan.plan(small=True, cuda=False)
for part in parts:
    import_module(part.module)
chosen = [part for part in parts if "bfpo" in part.title and not part.needs]
assert {part.kind for part in chosen} == {"training", "generation"}
for part in {part.kind: part for part in chosen}.values():
    worker = import_module(part.module)
    is_training = part.kind == "training"
    given = (worker.TrainingRun.from_json(part.values), sys.argv[1]) if is_training else (part.values,)
    found = worker.measure(*given)
    print(part.kind, found["loop_tokens"] > 0)
"""


def test_bfpo_trains_and_generates_on_a_machine_without_what_only_some_parts_need(tmp_path: Path) -> None:
    """Everything that is neither there with torch and transformers nor carried for every part is hidden."""
    command = [sys.executable, "-c", BARE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "generation True", "training True"]


def test_the_sources_of_the_checkout_are_used_where_bfpo_is_not_installed() -> None:
    """Without any installed package, as on a bare machine; what a worker imports is found too."""
    asked = "import bfpo; print(bfpo.__file__)"
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {asked!r}], check=True, cwd='/')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import benchmarks; {asked}; {worker}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == [str(ROOT / "src" / "bfpo" / "__init__.py")] * 2


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100 80GB PCIe", 312e12),  # the same in both forms
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L4", None),
    ],
)
def test_the_rate_of_the_data_sheet_is_that_of_the_form(name: str, rate: float | None) -> None:
    assert device.datasheet(name) == rate


def test_wheels_are_what_is_wanted_without_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = wheels.needed_wheels()
    assert {"pydantic", "pydantic-core", "accelerate", "liger-kernel", "bitsandbytes"} <= needed.keys()
    assert not {"torch", "transformers", "numpy", "tokenizers", "safetensors"} & needed.keys()
    assert "pydantic" not in wheels.needed_wheels(["pydantic"])
    for name in wheels.needed_wheels():
        (tmp_path / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").write_bytes(b"x" * 100)
    monkeypatch.setattr(wheels, "LIMIT", 250)
    (tmp_path / "names.txt").write_text("pydantic\ntrl\n")
    kit.main(["--wheels", str(tmp_path), "--have", "rich"])
    assert kit.parse(["--have", f"@{tmp_path / 'names.txt'}"]).have == ["pydantic", "trl"]
    sizes = {"a": 200, "b": 100, "c": 50, "d": 251, "e": 150}
    assert wheels.loads(sizes) == {"a": 1, "b": 2, "c": 1, "d": None, "e": 2}


def test_one_training_on_the_cpu_in_the_small_form(tmp_path: Path) -> None:
    """The worker's own function, in this process: counts, memory and losses of a real run."""
    part = next(part for part in plans.plan(small=True, cuda=False) if part.title.startswith("bfpo train, 8,192"))
    worker = importlib.import_module("benchmarks.training")
    found = worker.measure(worker.TrainingRun.from_json(part.values), str(tmp_path))
    assert found["form"] == "packed"
    assert found["loop_tokens"] > 0
    assert found["first_step_flops"] >= found["first_step_needed_flops"] > 0
    table = gpu_tables({"runs": [{**found, "kind": "training", "group": "g", "title": "bfpo", "status": "measured"}],
                        "settings": {"small": True}})[0]  # fmt: skip
    assert "mean nothing" in table.title


@pytest.mark.slow
def test_the_whole_small_form_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--budget", "1500", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    bad = [run for run in content["runs"] if not run["status"].startswith(("measured", "not measured"))]
    assert not bad, bad
    assert {"kernels", "tests", "sft", "generation"} <= {run["kind"] for run in content["runs"]}
