"""The build: the import contract holds for files to come, pins cover every dependency, a clone has what it needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from installed import NAMED

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = ROOT / "src" / "bfpo"
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found is not None
    return found.group().lower().replace("_", "-")


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.sub(r"(\.0)+$", "", version)))


def verdicts(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contract of a copy of the package with an interpreter that finds this copy first."""
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (needed,) = (
        each for each in PROJECT["project"]["optional-dependencies"]["dev"] if name_of(each) == "import-linter"
    )
    # Beside the lowest version of rich only an older one can be installed, which writes colours into its output.
    pytest.importorskip("importlinter", minversion=needed.split(">=")[1])
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "src" / "bfpo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_a_new_file_needs_no_edit_of_the_contract(copy):
    new = copy / "src" / "bfpo" / "data" / "new_file.py"
    new.write_text("from bfpo.core.errors import DataError\nfrom bfpo.data.files import iter_rows\n")
    try:
        done = verdicts(copy)
    finally:
        new.unlink()
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("place", "text", "contract"),
    [
        ("data/new_file.py", "import bfpo.judges.judges", "layers"),
        ("commands/new_command.py", "import bfpo.commands.train", "commands"),
        ("judges/new_file.py", "import bfpo.runs.folder", "layers"),
        ("report/new_file.py", "import bfpo.runs.folder", "folders"),
        ("objective/new_file.py", "import numpy", "objective"),
        ("config/new_file.py", "import torch", "light"),
        ("new_package/__init__.py", "", "layers"),
    ],
)
def test_a_wrong_import_is_caught_in_a_new_file(copy, place, text, contract):
    new = copy / "src" / "bfpo" / place
    existed = new.parent.is_dir()
    new.parent.mkdir(exist_ok=True)
    new.write_text(f"{text}\n")
    try:
        done = verdicts(copy)
    finally:
        shutil.rmtree(new.parent) if not existed else new.unlink()
    assert done.returncode == 1, done.stdout
    broken = {each["name"] for each in CONTRACTS if f"{each['name']} BROKEN" in " ".join(done.stdout.split())}
    assert {each["name"] for each in CONTRACTS if each["id"] == contract} <= broken


def test_two_files_of_one_folder_may_not_import_each_other(copy):
    new = copy / "src" / "bfpo" / "data" / "new_file.py"
    old = copy / "src" / "bfpo" / "data" / "fields.py"
    before = old.read_text()
    new.write_text("import bfpo.data.fields\n")
    old.write_text(f"{before}\nimport bfpo.data.new_file\n")
    try:
        done = verdicts(copy)
    finally:
        new.unlink()
        old.write_text(before)
    assert done.returncode == 1
    assert "circle BROKEN" in " ".join(done.stdout.split())


def test_the_contract_names_packages_only():
    text = (ROOT / "pyproject.toml").read_text()
    named = set(re.findall(r"bfpo(?:\.\w+)+", text[text.index("[tool.importlinter]") :]))
    files = {name for name in named if (PACKAGE.parent / Path(*name.split("."))).with_suffix(".py").is_file()}
    assert files <= {"bfpo.cli"}


def test_every_dependency_is_pinned_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *(each for extra in extras.values() for each in extra)]
    for requirement in map(Requirement, needed):
        for python in ("3.10", "3.11", "3.12", "3.13"):
            if applies(requirement, python):
                of_name = (pin for pin in pins if name_of(pin.name) == name_of(requirement.name))
                (pin,) = (pin for pin in of_name if applies(pin, python))
                assert requirement.specifier.contains(str(pin.specifier).removeprefix("==")), requirement
    assert {name_of(pin.name) for pin in pins} == {name_of(requirement) for requirement in needed}


def test_what_is_installed_with_hashes_has_the_pinned_versions():
    text = (ROOT / "requirements-hashed.txt").read_text()
    packages = [entry.splitlines() for entry in re.split(r"\n(?! )", text.strip()) if not entry.startswith("#")]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", line) for _, *hashes in packages for line in hashes)
    assert all(len(lines) > 1 for lines in packages)
    hashed = {(name_of(first), release(re.split(r"[ ;]", first.split("==")[1])[0])) for first, *_ in packages}
    extras = PROJECT["project"]["optional-dependencies"]
    behind = {name_of(each) for each in [*PROJECT["project"]["dependencies"], *extras["dev"]]}
    pins = [line.split(";")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {(name_of(pin), release(pin.split("==")[1])) for pin in pins}
    assert {pin for pin in pinned if pin[0] in behind} <= hashed, "run: make hashes"


def test_the_slow_tests_have_the_packages_that_they_are_skipped_without(tmp_path):
    told = subprocess.run(
        ["make", "-n", f"VENV={tmp_path}", "test-all"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    installed = {extra for extras in re.findall(r"\.\[([\w,-]+)\]", told) for extra in extras.split(",")}
    others = {"deepspeed", "lm-eval", "mlflow", "quant", "ray", "trackio", "wandb"}
    assert installed >= {"bench", "browser", "dev", *others}


def test_the_wheel_brings_the_documents_that_messages_name():
    brought = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    named = {name for file in PACKAGE.rglob("*.py") for name in NAMED.findall(file.read_text())}
    assert {name.split("/")[0] for name in named} <= brought.keys()
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert {place.removeprefix("share/doc/bfpo/") for place in brought.values()} == brought.keys()


def test_packages_installed_without_hashes_do_not_pass_for_verified_ones(tmp_path):
    for stamp in (".made", ".torch", ".runtime", ".dev"):
        (tmp_path / stamp).touch()
    make = ["make", "-n", f"VENV={tmp_path}", f"BIN={Path(sys.executable).parent}", "test", "HASHES=1"]
    told = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--force-reinstall --require-hashes -r requirements-hashed.txt" in told


def test_an_absent_interpreter_is_not_a_test_that_passed():
    done = subprocess.run(
        ["make", "test-pythons", "PYTHONS=2.0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nothing was tested" in done.stderr


def test_the_lowest_versions_are_those_of_the_ranges():
    lowest = {
        name_of(line): line.split("==")[1]
        for line in (ROOT / "constraints-lowest.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    ranges = {name_of(r): r.partition(">=")[2].split(",")[0] for r in PROJECT["project"]["dependencies"]}
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


def test_the_picture_of_the_readme_is_made_by_the_command_that_it_names():
    shown, caption = re.search(r"!\[[^\]]*\]\(([^)]+\.png)\)\n\n\*([^*]+)\*", (ROOT / "README.md").read_text()).groups()
    (target,) = re.findall(r"`make (\w+)`", caption)
    command = ["make", "-n", "--no-print-directory", target, "-o", ".venv/.runtime"]  # also inside `make test`
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    demo, copy = done.stdout.strip().splitlines()
    folder = re.search(r"demo --out (\S+)", demo).group(1)
    assert demo.endswith("--full --seeds 3")  # as the caption says
    assert copy.split() == ["cp", f"{folder}/figures/scatter.png", shown]
    assert (ROOT / shown).is_file()


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
