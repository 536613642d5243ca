"""Every JSON file of ours that is read again: its record holds all of it, and the writer writes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.records import as_json, load, load_lines
from bfpo.core.schema import VerdictRow
from bfpo.data.records import DataFile
from bfpo.judges.records import CleanFile, ContradictedLabel, JudgeCheckFile, RedteamFile
from bfpo.scores.records import AccuracyRow, ComparisonFile, InterpolateFile, ScoresFile, TradeoffFile
from bfpo.suites.records import SuiteAnswer, SuitesFile
from html_page import written_as_python
from own_files import KEPT, NO_MODEL, RUNS, write_inputs

KINDS: dict[str, type[Any]] = {
    "completions/scores.json": ScoresFile,
    "completions/verdicts.jsonl": VerdictRow,
    "label/scores.json": ScoresFile,
    "label/verdicts.jsonl": VerdictRow,
    "label-pairs/scores.json": ScoresFile,
    "clean/clean.json": CleanFile,
    "clean/contradictions.jsonl": ContradictedLabel,
    "check/quality.json": JudgeCheckFile,
    "prepare/data.json": DataFile,
    "sweep/tradeoff.json": TradeoffFile,
    "compare/comparison.json": ComparisonFile,
    "pairs/scores.json": ScoresFile,
    "pairs/accuracy.jsonl": AccuracyRow,
    "suites/scores.json": SuitesFile,
    "suites/answers.jsonl": SuiteAnswer,
    "redteam/redteam.json": RedteamFile,
    "dial/models.json": InterpolateFile,
}
WRITTEN = Path(__file__).parent / "own_files"


@pytest.mark.parametrize("name", KEPT)
def test_a_record_holds_all_of_its_file_in_its_order(name: str) -> None:
    file, problems = WRITTEN / name, list[str]()
    if file.suffix == ".jsonl":
        rows = load_lines(KINDS[name], file, problems)
        text = "".join(json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(as_json(load(KINDS[name], file, problems)), indent=2, ensure_ascii=False) + "\n"
    assert text == file.read_text(encoding="utf-8")
    assert problems == []


def rounded(text: str) -> Any:
    """Return JSON with the digits that no other processor could change."""
    return json.loads(text, parse_float=lambda digits: f"{float(digits):.9g}")


@pytest.mark.parametrize("run", NO_MODEL)
def test_the_writer_writes_what_it_wrote_before(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs()
    RUNS[run]()
    for name in (name for name in KEPT if name.startswith(f"{run}/")):
        found, wanted = ((place / name).read_text(encoding="utf-8") for place in (tmp_path, WRITTEN))
        lines = zip(found.splitlines(), wanted.splitlines(), strict=True)
        pairs = lines if name.endswith(".jsonl") else [(found, wanted)]
        for one, other in pairs:
            # Compared as text, so that the order of keys counts.
            assert json.dumps(rounded(one)) == json.dumps(rounded(other)), name
    for card in tmp_path.rglob("*.md"):
        assert written_as_python(card.read_text(encoding="utf-8")) == [], card
