"""The build: layers cover every module, pins cover every dependency, and what a clone needs is there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = ROOT / "src" / "bfpo"


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found is not None
    return found.group().lower().replace("_", "-")


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.sub(r"(\.0)+$", "", version)))


def test_every_module_has_its_layer():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    listed = {name.strip(" ()") for layer in layers for name in re.split(r"[|:]", layer)}
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    homeless = [m for m in modules if not any(m == name or m.startswith(f"{name}.") for name in listed)]
    assert sorted(homeless) == [], "add them to a layer of tool.importlinter in pyproject.toml"
    gone = [n for n in listed if n not in modules and not (PACKAGE.parent / Path(*n.split("."))).is_dir()]
    assert sorted(gone) == []


def test_every_dependency_is_pinned_within_its_range():
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pins.setdefault(name_of(line), []).append(line.split("==")[1].split(";")[0])
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *(each for extra in extras.values() for each in extra)]
    for requirement in needed:
        lower = requirement.partition(">=")[2]
        for pin in pins[name_of(requirement)]:
            assert release(pin) >= release(lower), requirement
    assert pins.keys() == {name_of(requirement) for requirement in needed}


def test_the_lowest_versions_are_those_of_the_ranges():
    lowest = {
        name_of(line): line.split("==")[1]
        for line in (ROOT / "constraints-lowest.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    ranges = {name_of(r): r.partition(">=")[2] for r in PROJECT["project"]["dependencies"]}
    assert {name: release(version) for name, version in lowest.items()} == {
        name: release(version) for name, version in ranges.items()
    }


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "src/bfpo/py.typed"])
def test_what_a_clone_needs_is_there(name):
    assert (ROOT / name).is_file()


def test_ci_runs_make_test():
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert "make test" in run.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "test-all"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_make_names_a_python_that_is_too_old(tmp_path):
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.1; else exit 1; fi\n')
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "constraints.txt").write_text("")
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert f"bfpo needs Python 3.10 or newer; '{old}' is Python 3.9.1." in done.stderr
    assert not (tmp_path / ".venv").exists()
