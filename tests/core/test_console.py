"""What is printed reaches a terminal as text: control characters and invisible ones as symbols, no markup of rich."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.core.console import one_line, printable, show, show_table, start_logging
from bfpo.core.errors import DataError
from bfpo.core.progress import CountProgress
from bfpo.runs.folder import RunFolder

HOSTILE = (
    "\x1b[31mred",
    "\x1b]8;;https://x.example\x07link",
    "\x9b2Jcleared",
    "safe\rforged",
    "a\bb",
    "\x7fdel",
    "\u202eltr",
    "\u2066iso\u2069",
    "\u2028line",
    "\U000e0041tag",
    "\u3164filler",
    "\x85next",
    "\ud800half",
)


@pytest.fixture(autouse=True)
def usual_records() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


def is_harmless(text: str) -> bool:
    return (
        all(character.isprintable() or character in "\n\t\u200c\u200d" for character in text) and "\u3164" not in text
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_controls_and_invisible_characters_are_symbols(text: str) -> None:
    assert is_harmless(printable(text))
    assert ascii(text)[1:-1].replace("\\ud800", "") in printable(text).replace("\\ud800", "")


def test_what_people_write_stays() -> None:
    text = "line one\n\tline two, می‌خواهم 👩‍👩‍👧 naïve e\u0301 ½ \u00a0 中文 ❤️"
    assert printable(text) == text
    assert one_line("a\nb\tc\x1b") == "a\\nb\\tc\\x1b"


def test_results_tables_logs_and_errors_are_escaped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start_logging()
    text = "".join(HOSTILE)
    show(text)
    show_table(("key", "meaning"), [(text, text)])
    logging.getLogger("bfpo.x").warning("%s: %d pairs", f"{text}\nerror: forged", 3)
    logging.getLogger("bfpo.x").error("%s", f"first\n{text}")
    shown = capsys.readouterr()
    assert is_harmless(shown.out + shown.err)
    assert [line for line in shown.err.split("\n") if line.startswith("error: forged")] == []
    assert str(DataError.at(f"{text}\n.jsonl", 3, "x")).count("\n") == 0


def test_records_of_other_libraries_are_escaped() -> None:
    start_logging()
    stream = io.StringIO()
    logger = logging.getLogger("another.library")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.warning("loading %s", "\x1b[31mmodel\x9b")
    logger.removeHandler(handler)
    assert stream.getvalue() == "loading \\x1b[31mmodel\\x9b\n"


def test_a_title_of_a_bar_is_no_markup() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system="truecolor")
    with CountProgress("[red]titel\x1b[5m[/red]", 3, logging.getLogger("bfpo.x"), console=console) as progress:
        progress.advance(1)
    assert "[red]titel\\x1b[5m[/red]" in stream.getvalue()
    assert "\x1b[5m" not in stream.getvalue()


def test_markdown_of_a_run_folder_is_escaped(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "toy", {"name": "\x1b[31mred"})
    folder.write_card("\x9bTitle\u202e", {"Section": "\x1b]0;x\x07"})
    folder.write_text("scores.md", "\x1b[2J\n")
    for name in ("README.md", "scores.md", "config.yaml"):
        assert is_harmless((tmp_path / "run" / name).read_text(encoding="utf-8"))


def cases(root: Path) -> dict[str, list[str]]:
    """Return commands whose files, values and names hold escapes."""
    bad = "\x1b[31m\x9b\u202e\r\b"
    pairs = {"prompt": f"q{bad}", "chosen": "a", "rejected": f"b{bad}", "chosen_is_safe": f"x{bad}"}
    (root / f"p{bad}.jsonl").write_text(json.dumps(pairs) + "\n", encoding="utf-8")
    (root / f"c{bad}.yaml").write_text("model: x\n'a\\e[31m': 1\n", encoding="utf-8")
    (root / "broken.yaml").write_text("a: '\\e[31m\n", encoding="utf-8")
    (root / "title.yaml").write_text('use: x\nfolders: ["\\e[31m"]\n', encoding="utf-8")
    files = f"data.files={json.dumps(str(root / f'p{bad}.jsonl'))}"
    return {
        "data file": ["train", "--set", f"model=x{bad}", "--set", files, "--dry-run"],
        "config file": ["train", "--config", str(root / f"c{bad}.yaml"), "--dry-run"],
        "missing file": ["train", "--config", str(root / f"none{bad}.yaml"), "--dry-run"],
        "broken file": ["train", "--config", str(root / "broken.yaml"), "--dry-run"],
        "value": ["train", "--set", f"beta={bad}", "--dry-run"],
        "key": ["train", "--set", f"be{bad}ta=1", "--dry-run"],
        "name of a model": ["generate", "--set", f"model=./x{bad}", "--set", f"prompts=x{bad}", "--dry-run"],
        "dry run": ["toy", "--set", f'chart="{bad}"', "--dry-run"],
        "report": ["report", str(root / f"none{bad}"), "--out", str(root / "p.html")],
        "doctor": ["doctor", "--config", str(root / f"c{bad}.yaml")],
        "debug": ["train", "--set", f"be{bad}ta=1", "--dry-run", "--debug"],
        "unknown command": [f"tra{bad}in"],
    }


def test_no_command_prints_an_escape_that_it_was_given(tmp_path: Path) -> None:
    for name, arguments in cases(tmp_path).items():
        result = CliRunner().invoke(app, arguments)
        assert is_harmless(result.output), (name, ascii(result.output))
        assert result.output


def test_on_a_terminal_the_only_escapes_are_our_own(tmp_path: Path) -> None:
    code = (
        "import logging\nfrom bfpo.core.console import *\nstart_logging()\n"
        "logging.getLogger('bfpo.x').warning('[bold]%s[/bold]', 'x\\x1b]0;evil\\x07y')\n"
        "show_table(('key',), [('[red]a\\x1b[5mb',)])\n"
    )
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=follower, stderr=follower, check=True, timeout=60)
    os.close(follower)
    text = os.read(leader, 65536).decode()
    os.close(leader)
    assert "[bold]x\\x1b]0;evil\\x07y[/bold]" in text
    assert "[red]a\\x1b[5mb" in text
    assert "\x1b]" not in text
    assert "\x1b[5m" not in text
