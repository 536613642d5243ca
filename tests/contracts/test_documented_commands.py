"""Every `bfpo ...` command of the README, the docs and the examples is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bfpo import BfpoError
from bfpo.cli import app
from bfpo.config import GateConfig, describe_keys, load_config
from bfpo.runs.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
FENCE = re.compile(r"^[ \t]*```([\w-]*)[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
SHELLS = {"", "bash", "sh", "shell", "console"}


def commands_of(text: str) -> Iterator[str]:
    """Yield the `bfpo` commands of the shell blocks, continued lines joined, up to a `|`, `&&` or `>`."""
    for language, block in FENCE.findall(text):
        if language not in SHELLS:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = re.split(r"\s(?:\||&&|;|>)", line.strip().removeprefix("$ "))[0]
            found = re.match(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?bfpo(?= |$)(.*)", words)
            if found:
                yield found.group(1).strip()


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the command line would refuse the command, a setting in it or the config file that it names."""
    arguments = [word for word in shlex.split(command, comments=True) if word != "..."]
    stages, calls = [], []
    monkeypatch.setattr(
        "bfpo.cli._execute",
        lambda *stage, config, keys, schema, **_: stages.append((*stage, config, keys or schema)),
    )
    monkeypatch.setattr("bfpo.cli._call", lambda name, debug, *values, **_: calls.append((name, *values)))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 or arguments == [], f"bfpo {command}: {result.output}"
    for name, *values in calls:
        if name == "gate":
            monkeypatch.chdir(ROOT)
            load_config(GateConfig, *values[2:4])
            continue
        file, settings = values[:2]
        if name == "doctor" and file is not None and "FILE" not in file.name:
            monkeypatch.chdir(ROOT)
            load_config(STAGES[file.stem].config_class(), file, settings)
    for stage, settings, file, listed in stages:
        config = STAGES[stage].config_class()
        monkeypatch.chdir(ROOT)
        known = {key.name for key in describe_keys(config)}
        for setting in settings:
            key, equals, _ = setting.partition("=")
            assert equals, f"bfpo {command}: {setting} is no key=value"
            assert key in known or key.startswith("init.config."), f"bfpo {command}: unknown key {key}"
        if file is not None and not file.name.isupper() and "FILE" not in file.name:
            if file.parts[0] != "runs":  # made by an earlier command
                load_config(config, file, settings)
        elif not listed:
            try:
                load_config(config, None, settings)
            except BfpoError as error:  # only a file that the reader writes can hold what is missing
                if file is None or not all(": missing;" in line for line in str(error).splitlines()):
                    raise


DOCUMENTED = [(str(page.relative_to(ROOT)), command) for page in PAGES for command in commands_of(page.read_text())]


@pytest.mark.parametrize(("page", "command"), DOCUMENTED, ids=[f"{page}: {command}" for page, command in DOCUMENTED])
def test_a_documented_command_is_one_that_works(page, command, monkeypatch):
    check(command, monkeypatch)


SAMPLE = """
```bash
$ .venv/bin/bfpo toy --out runs/toy --set steps=5 \\
      --set seed=1 | tail -1
bfpo --help   # as it says
make demo
bfpolish x
```
```python
bfpo = 3
```
"""


def test_commands_are_found_and_good_ones_pass(monkeypatch):
    found = list(commands_of(SAMPLE))
    assert [shlex.split(command, comments=True) for command in found] == [
        ["toy", "--out", "runs/toy", "--set", "steps=5", "--set", "seed=1"],
        ["--help"],
    ]
    for command in found:
        check(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "toys --out x",
        "toy --oot x",
        "toy --set stps=3",
        "toy --set steps=none",
        "toy --set steps",
        "toy --config recipes/none.yaml",
        "train --out x",
        "label --config FILE.yaml --set judges=qwen3guard --max-requests 5 --out x",
    ],
)
def test_a_command_that_would_be_refused_fails_the_check(command, monkeypatch):
    with pytest.raises((AssertionError, BfpoError)):
        check(command, monkeypatch)
