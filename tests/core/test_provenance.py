"""Where a run comes from: the commit of the checkout that the package is imported from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import bfpo
from bfpo.core.provenance import describe_checkout

PACKAGE = Path(bfpo.__file__).parent
CODE = "from bfpo.core.provenance import describe_checkout as d; f = d(); print(f.get('commit'), f.get('changed'))"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_run_knows_the_commit_of_its_checkout_and_whether_it_was_changed(tmp_path: Path) -> None:
    for name in (
        "__init__.py",
        "_version.py",
        "core/__init__.py",
        "core/errors.py",
        "core/files.py",
        "core/lazy.py",
        "core/provenance.py",
    ):
        (tmp_path / "src" / "bfpo" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, tmp_path / "src" / "bfpo" / name)

    def described() -> str:
        command = [sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, 'src'); {CODE}"]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert described() == "None None"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert described() == f"{commit} False"
    (tmp_path / "src" / "bfpo" / "core" / "__init__.py").write_text("x = 1\n")
    assert described() == f"{commit} True"


def test_in_a_checkout_of_ours_the_commit_is_found() -> None:
    root = PACKAGE.parents[1]
    if (root / ".git").exists():
        assert describe_checkout()["commit"] == git(root, "rev-parse", "HEAD")
