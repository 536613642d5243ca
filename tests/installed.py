"""What must work where only the wheel is installed: `make test-wheel` runs this file by itself, in an empty folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import yaml

from small_world import SMALL

BIN = Path(sys.executable).parent
# Documents that the messages of the package name, as `docs/data.md` or `recipes/accelerate`.
NAMED = re.compile(r"\b(?:docs|recipes|examples)/[\w/.-]*\w")


def bfpo(*arguments: str, cwd: Path) -> str:
    """Run the installed command; its stdout."""
    sys.stderr.write(f"bfpo {' '.join(arguments)}\n")
    return subprocess.run([BIN / "bfpo", *arguments], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def check(cwd: Path) -> None:
    """Fail unless the package is the installed one, complete, and runs the demo."""
    package = Path(sysconfig.get_path("purelib")) / "bfpo"
    machine = json.loads(bfpo("doctor", "--json", cwd=cwd))
    documents = Path(machine["documents"])
    assert machine["versions"]["bfpo"], machine
    assert Path(sys.prefix) in documents.parents, documents
    named = {(file, name) for file in package.rglob("*.py") for name in NAMED.findall(file.read_text())}
    assert named, package
    lacking = [f"{file.name} names {name}" for file, name in sorted(named) if not (documents / name).exists()]
    assert not lacking, lacking
    bfpo("train", "--config", str(documents / "recipes/mistral-7b/train.yaml"), "--keys", cwd=cwd)
    suites = bfpo("evaluate", "--keys", cwd=cwd)
    assert "suites" in suites
    (cwd / "demo.yaml").write_text(yaml.safe_dump(SMALL))
    bfpo("demo", "--config", "demo.yaml", "--out", "demo", cwd=cwd)
    page = (cwd / "demo" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    gate = bfpo("report", "demo", "--out", "again.html", "--json", cwd=cwd)
    assert json.loads(gate)["exit_code"] == 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))
    sys.stderr.write("the wheel is complete\n")
