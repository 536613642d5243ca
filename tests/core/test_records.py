"""Records: what does not fit is an error with file, key and value, or left out and said."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.errors import RunError
from bfpo.core.records import OPTIONAL, as_json, load, load_lines
from bfpo.core.schema import Score, Verdict
from messages import raises


@dataclass
class Part:
    name: str
    share: float = 0.0
    note: str | None = field(default=None, metadata=OPTIONAL)


@dataclass
class Whole:
    title: str = ""
    parts: list[Part] = field(default_factory=list)
    by_name: dict[str, list[float | None]] = field(default_factory=dict)
    score: Score | None = None


def written(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    return path


def test_keys_keep_their_order_and_numbers_their_kind() -> None:
    record = Whole("x", [Part("a", note="n"), Part("b", float("nan"))], {"k": [None, 1.0]}, Score("m", 1.0, num=3))
    assert json.dumps(as_json(record)) == (
        '{"title": "x", "parts": [{"name": "a", "share": 0.0, "note": "n"}, {"name": "b", "share": null}], '
        '"by_name": {"k": [null, 1.0]}, "score": {"metric": "m", "value": 1.0, "low": null, "high": null, "num": 3, '
        '"unscored": 0, "higher_is_better": true, "extra": {}}}'
    )


def test_a_file_that_does_not_fit_is_an_error_with_its_key_and_value(tmp_path: Path) -> None:
    file = written(tmp_path / "x.json", {"parts": [{"name": "a"}, {"name": 3}], "by_name": {"k": ["y"]}})
    with pytest.raises(RunError) as caught:
        load(Whole, file)
    for words in (str(file), "parts.1.name", "(got 3)", "by_name.k.0", "(got 'y')"):
        assert words in str(caught.value)
    with raises(RunError):
        load(Whole, written(tmp_path / "list.json", [1]))
    with raises(RunError, "gone.json"):
        load(Whole, tmp_path / "gone.json")
    with raises(RunError, "rows.jsonl:2"):
        load_lines(Part, written(tmp_path / "rows.jsonl", {"name": "a"}, {"share": 1}))


def test_with_problems_all_that_fits_is_kept_and_the_rest_is_said(tmp_path: Path) -> None:
    problems: list[str] = []
    value = {"title": 4, "parts": [{"share": 1}, {"name": "b", "share": True}, "c", {"name": "d"}], "score": {"low": 1}}
    found = load(Whole, written(tmp_path / "x.json", value), problems)
    assert found == Whole("", [Part("b"), Part("d")])
    assert len(problems) == 5
    assert "parts.1.share" in " ".join(problems)
    (tmp_path / "broken.json").write_text('{"title"')
    assert load(Whole, tmp_path / "broken.json", problems) == Whole()
    assert problems[-1].endswith("broken.json: cannot be read (JSONDecodeError)")
    file = written(tmp_path / "rows.jsonl", {"completion_id": "a", "judge": "j", "label": "safe", "helpful": 3}, [1], 2)
    assert load_lines(Verdict, file, problems) == []
    assert "line 1: Value error, helpful: got 3.0" in problems[-1]
    assert problems[-2].endswith("2 lines are not JSON objects and were skipped")


def test_numbers_that_are_not_finite_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"by_name": {"k": [NaN, 1e999, -Infinity, 1.5]}}')
    assert load(Whole, tmp_path / "x.json").by_name == {"k": [None, None, None, 1.5]}


def test_a_key_of_a_newer_version_is_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path / "x.json", {"title": "t", "colour": 1, "parts": [{"name": "a", "shape": 2}]})
    with caplog.at_level(logging.INFO, "bfpo.core.records"):
        assert load(Whole, file) == Whole("t", [Part("a")])
    (record,) = caplog.records
    assert record.getMessage() == f"{file}: written by another version; not read: colour, shape"
    problems: list[str] = []
    load_lines(Part, written(tmp_path / "rows.jsonl", *[{"name": "a", "shape": 2}] * 3), problems)
    assert problems == [f"{tmp_path}/rows.jsonl: written by another version; not read: shape"]
