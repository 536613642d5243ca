"""Training in memory and `bfpo generate` need torch, transformers and what these bring, and little else."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bfpo.config import GenerateConfig
from bfpo.runs.stages import run_stage
from survival import write_inputs
from tiny import tiny_trainer

HEAVY = {
    "scipy",
    "sklearn",
    "matplotlib",
    "pyarrow",
    "pandas",
    "rensa",
    "peft",
    "py3langid",
    "datasets",
    "bitsandbytes",
}
COMMANDS = ("bfpo.commands.train", "bfpo.commands.sft", "bfpo.commands.generate", "bfpo.commands.doctor", "bfpo.cli")


def top_level(nodes: list[ast.stmt]) -> Iterator[str]:
    """Yield what a module imports when it is imported; functions and blocks for type checkers are left out."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.unparse(node).splitlines()[0]:
            yield from top_level(node.body)


def test_no_module_of_the_commands_imports_a_heavy_package() -> None:
    waiting, seen = list(COMMANDS), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # a name within a module
            continue
        if spec is None or spec.origin is None:
            continue
        found = set(top_level(ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body))
        assert not {one for one in found if one.partition(".")[0] in HEAVY}, name
        waiting += [part for one in found if one.startswith("bfpo") for part in (one, one.rpartition(".")[0]) if part]
    assert {"bfpo.training.trainer", "bfpo.stats.intervals", "bfpo.data.store", "bfpo.policy.reference.cache"} <= seen


@pytest.fixture
def _without_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every import of a heavy package by a module of ours fail, as where it is not installed."""
    real = builtins.__import__

    def guarded(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        caller = str((globals or {}).get("__name__", ""))
        if level == 0 and caller.startswith("bfpo.") and name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{caller} imports {name}", name=name)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", guarded)


@pytest.mark.usefixtures("_without_heavy")
def test_training_in_memory_and_generation_run_without_them(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "trainer", max_steps=2, reference="precompute").train()
    inputs = write_inputs(tmp_path / "inputs")
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3\n")
    settings = {"model": str(inputs / "start"), "prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 3}
    run_stage("generate", GenerateConfig.model_validate({**settings, "threads": 1}), tmp_path / "made")
    rows = [json.loads(line) for line in (tmp_path / "made" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 2
