"""YAML of other people: bounded in size, depth and aliases, without tags; one message for whatever is odd."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.core.errors import ConfigError
from bfpo.core.yaml_text import parse_yaml, read_yaml
from messages import fails, raises

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)  # fmt: skip
CHAIN = "a0: &a0 1\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))
REFUSED: dict[str, bytes] = {
    "aliases of aliases": LAUGHS.encode(),
    "a chain of aliases": CHAIN.encode(),
    "an alias in itself": b"a: &a [1, *a]\n",
    "an alias in itself, as a mapping": b"&a\nb: {c: *a}\n",
    "an unknown alias": b"a: *b\n",
    "deep lists": b"a: " + b"[" * 5000,
    "deep mappings": b"a: " + b"{a: " * 5000,
    "deep blocks": b"".join(b" " * n + b"a:\n" for n in range(500)),
    "deep keys": b"? " * 5000,
    "deep items": b"- " * 5000,
    "a Python object": b"a: !!python/object/apply:os.system [id]\n",
    "a Python name": b"a: !!python/name:os.system\n",
    "a date": b"a: !!timestamp 2001-01-01\n",
    "bytes": b"a: !!binary aGk=\n",
    "a set": b"a: !!set {b, c}\n",
    "a wrong number": b"a: !!int x\n",
    "a wrong truth": b"a: !!bool x\n",
    "its own tag": b"a: !x y\n",
    "a huge number": b"seed: " + b"9" * 5000,
    "a key twice": b"seed: 1\n'seed': 2\n",
    "a list as a key": b"? [a]\n: 1\n",
    "several documents": b"seed: 1\n---\nseed: 2\n",
    "a tab": b"seed:\n\t1\n",
    "zero bytes": b"seed: \x001\n",
    "controls": b"seed: \x1b[31m\n",
    "UTF-16": "seed: 1\n".encode("utf-16"),
    "UTF-32": "seed: 1\n".encode("utf-32"),
    "Latin-1": b"title: \xe4\n",
    "an open quote": b"a: 'b\n",
    "an open bracket": b"a: [1\n",
    "a list": b"- 1\n",
    "a scalar": b"text\n",
    "a number": b"1\n",
    "an unknown key": b"<<: {seed: 1}\n",
    "a merge key below another": b"a: &a {seed: 1}\nb:\n  <<: *a\n",
    "an infinite number": b"beta: .inf\n",
    "no number": b"beta: .nan\n",
    "a number that is too large": b"beta: 1e999\n",
    "yes for a truth": b"chart: yes\n",
    "a base of sixty": b"seed: 1:30\n",
    "hexadecimal": b"seed: 0x1f\n",
    "underscores": b"seed: 1_000\n",
    "too large": b"# " + b"x" * (1 << 20),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_odd_file_ends_in_one_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(REFUSED[name])
    result = CliRunner().invoke(app, ["toy", "--config", str(path), "--dry-run"])
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stderr) < 3000
    fails(result, "odd.yaml")


def test_a_folder_a_pipe_a_device_and_no_file_end_in_one_message(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "none", tmp_path / "loop", "a\0b", "x" * 300):
        with raises(ConfigError, mask=r"x{300}"):
            read_yaml(name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# only a comment\n", None),
        ("\ufeffa: 1", {"a": 1}),
        ("a: 010", {"a": 10}),
        ("a: 1e-5", {"a": 1e-5}),
        ("a: no", {"a": "no"}),
        ("a: on", {"a": "on"}),
        ("a: 2001-01-01", {"a": "2001-01-01"}),
        ("a: 12:30", {"a": "12:30"}),
        ("1: a\nnull: b\ntrue: c", {"1": "a", "null": "b", "true": "c"}),
        ("a: !!str 1", {"a": "1"}),
        ("a: &x [1, 2]\nb: *x\nc: [*x, *x]", {"a": [1, 2], "b": [1, 2], "c": [[1, 2], [1, 2]]}),
        ("a: " + "[" * 30 + "]" * 30, None),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: " + "9" * 300, {"a": int("9" * 300)}),
        ("---\na: 1\n...\n", {"a": 1}),
    ],
)
def test_what_is_within_the_bounds_is_read(text: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "fine.yaml"
    path.write_bytes(text.encode())
    found, _ = read_yaml(path)
    assert found == value or (value is None and isinstance(found, dict) and "a" in found)
    assert parse_yaml(text)[0] == found


@pytest.mark.parametrize(
    "setting",
    [
        "seed=" + "[" * 5000,
        "seed=!!python/name:os.system",
        "seed=&a [*a]",
        "seed=" + "9" * 5000,
        "seed=1\n---\n2",
        "seed=\x00",
        "seed=*b",
        ".".join("a" * 5000) + "=1",
        "a[" + "9" * 5000 + "]=1",
        "a[0][=1",
        "=1",
        "seed",
        "seed=",
        "seed=\ud800",
        "s\x1beed=1",
    ],
)
def test_an_odd_setting_ends_in_one_message(setting: str) -> None:
    result = CliRunner().invoke(app, ["toy", "--set", setting, "--dry-run"])
    assert len(result.stderr.splitlines()) == 1
    fails(result, mask=r"(?:9{50,}|(?:a\.){50,}a|\[{50,})")


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["label", "--set", "completions=x.jsonl", "--set", "judges={file}"], "judges"),
        (["evaluate", "--set", "model=x", "--set", "suites.use={file}"], None),
        (["doctor", "--config", "{file}"], None),
        (["sweep", "--set", "train={file}", "--set", "generate={file}", "--set", "grid=beta=0.1"], None),
    ],
)
@pytest.mark.parametrize(
    "name", ["aliases of aliases", "deep lists", "a Python object", "zero bytes", "UTF-16", "pipe"]
)
def test_the_other_files_are_read_alike(command: list[str], key: str | None, name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    if name == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(REFUSED[name])
    dry = [] if command[0] == "doctor" else ["--dry-run"]
    fails(CliRunner().invoke(app, [*(part.format(file=path) for part in command), *dry]), "odd.yaml", key)
