"""A page of every kind of run: its numbers are those of its files, and no value is shown as Python writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.console import in_words, level_text
from bfpo.report.gather import gather
from bfpo.report.page import render_html, render_markdown
from html_page import Page, written_as_python
from run_folders import write_compare, write_run, write_suites, write_sweep

OWN = Path(__file__).parents[1] / "golden" / "own_files"
STAGES = {
    "check": "judge-check",
    "clean": "clean",
    "compare": "compare",
    "completions": "evaluate",
    "dial": "interpolate",
    "label": "label",
    "label-pairs": "label",
    "pairs": "evaluate",
    "prepare": "prepare",
    "redteam": "redteam",
    "suites": "evaluate",
    "sweep": "sweep",
}


def run_of(folder: Path, name: str) -> Path:
    """A run with the files of `golden/own_files`."""
    run = write_run(folder / name, STAGES[name], {"seed": None, "data": {"files": ["a.jsonl"], "split": None}})
    for file in (OWN / name).iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    return run


@pytest.mark.parametrize("name", STAGES)
def test_no_page_shows_what_python_writes(name: str, tmp_path: Path) -> None:
    data = gather([run_of(tmp_path, name)])
    assert written_as_python("\n".join(Page(render_html(data)).words)) == []
    markdown = re.sub(r"!?\[[^\]]*\]\([^)]*\)", "", render_markdown(data))
    assert written_as_python(markdown) == []


@pytest.mark.parametrize("write", [write_suites, write_sweep, write_compare])
def test_no_page_of_made_up_runs_shows_what_python_writes(write: Any, tmp_path: Path) -> None:
    assert written_as_python("\n".join(Page(render_html(gather([write(tmp_path / "run")]))).words)) == []


def test_the_data_card_shows_the_numbers_of_its_file(tmp_path: Path) -> None:
    run = run_of(tmp_path, "prepare")
    content = json.loads((run / "data.json").read_text())
    content["sources"][0]["rejected"] = {"no prompt, or an empty one": 31, "label outside [0, 1]": 4}
    content["decontamination"] = {"probe": {"prompts": 203, "rows": 47}, "other": {"prompts": 5, "rows": 0}}
    content["contradictory_rows"] = 12
    (run / "data.json").write_text(json.dumps(content))
    page = Page(render_html(gather([run]))).text
    assert "no prompt, or an empty one: 31; label outside [0, 1]: 4" in page
    assert "rows removed because they ask a prompt of probe 47 (prompts looked for: 203)" in page
    assert "rows removed because they ask a prompt of other 0 (prompts looked for: 5)" in page
    assert "labelled both safe and unsafe 12" in page
    for source in content["sources"]:
        assert f"{source['name']} {source['stream']} {source['rows']}" in page
    for name, stream in content["streams"].items():
        for split, cells in stream.get("cells", {}).items():
            counts = [cells.get(cell, 0) for cell in ("safe-safe", "safe-unsafe", "unsafe-safe", "unsafe-unsafe")]
            assert " ".join(map(str, [name, split, *counts])) in page


def test_values_in_words() -> None:
    given = {"a": None, "b": [1, 2.5], "c": {"d": True}, "e": [], "f": "x", "g": 1 / 3}
    assert in_words(given) == "a: none; b: 1, 2.5; c: d: yes; e: none; f: x; g: 0.333333"
    assert in_words({}) == "none"
    assert in_words(2 / 3, 2) == "0.67"


def test_the_level_of_intervals_is_not_rounded(tmp_path: Path) -> None:
    assert [level_text(level) for level in (0.95, 0.975, 0.999, 0.07)] == ["95%", "97.5%", "99.9%", "7%"]
    run = write_suites(tmp_path / "run")
    content = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps({**content, "confidence": 0.975}))
    data = gather([run])
    assert "97.5% intervals in brackets" in render_markdown(data)
    assert "98%" not in Page(render_html(data)).text
