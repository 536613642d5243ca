"""Every call that loads a model, a tokenizer or a data set says whether code that comes with it may run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(file for folder in ("src", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py"))
LOADS = {"from_pretrained", "from_config", "pipeline", "load_dataset", "LLM", "HFLM"}
ONLY_PASSED_ON = {"load_policy", "load_tokenizer"}
"""Functions of bfpo with an argument `trust_remote_code`, false by default, which they pass on."""


def calls_without_a_word(source: str) -> list[int]:
    """Return the lines of the calls that do not pass `trust_remote_code=False`, or pass on a function's argument."""
    lines = []
    tree = ast.parse(source)
    passing = {
        call: function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {each.arg: each.value for each in call.keywords}.get("trust_remote_code")
        if name in LOADS or given is not None:
            refused = isinstance(given, ast.Constant) and given.value is False
            passed_on = isinstance(given, ast.Name) and passing.get(call) in ONLY_PASSED_ON
            if not (refused or passed_on):
                lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_call_lets_code_of_a_model_run(file: Path) -> None:
    assert calls_without_a_word(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("AutoConfig.from_pretrained(x)", [1]),
        ("AutoModel.from_pretrained(x, **settings)", [1]),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", [1]),
        ("AutoModel.from_pretrained(x, trust_remote_code=None)", [1]),
        ("load_policy(x, trust_remote_code=True)", [1]),
        ("vllm.LLM(model=x)", [1]),
        ("pipeline('text-generation', x)", [1]),
        ("load_dataset(x, trust_remote_code=False)", []),
        ("def load_tokenizer(trust_remote_code):\n  A.from_pretrained(x, trust_remote_code=trust_remote_code)", []),
        ("def other(trust_remote_code):\n  A.from_pretrained(x, trust_remote_code=trust_remote_code)", [2]),
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(call: str, found: list[int]) -> None:
    assert calls_without_a_word(call) == found
