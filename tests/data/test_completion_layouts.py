"""Layouts of single completions: rows by hand, labels, and what `use` takes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bfpo.core.errors import DataError, LabelError, SettingError
from bfpo.core.schema import Completion, Message
from bfpo.data import load
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.load import LoadedCompletions
from bfpo.data.read import iter_completions, read_completions, read_pairs
from bfpo.data.rejects import Reject, RowError
from bfpo.data.settings import SftDataConfig
from bfpo.data.write import write_completions
from helpers import write_rows
from messages import raises


def load_completions(files: list[Path], *, seed: int = 0, **keys: Any) -> LoadedCompletions:
    return load.load_completions(SftDataConfig(files=files, **keys), seed=seed)


Q = Message("user", "q")
BEAVERTAILS: dict[str, Any] = {"prompt": "q", "response": "a", "category": {"violence": False}, "is_safe": False}
WILDGUARD: dict[str, Any] = {
    "prompt": "q",
    "adversarial": True,
    "response": "a",
    "prompt_harm_label": "harmful",
    "response_refusal_label": "compliance",
    "response_harm_label": "unharmful",
    "subcategory": "others",
}
SHAREGPT: dict[str, Any] = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
ULTRACHAT: dict[str, Any] = {
    "prompt": "q",
    "prompt_id": "x",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
}


@pytest.mark.parametrize(
    ("name", "row", "kind", "is_safe"),
    [
        ("completions", {"prompt": "q", "text": "a", "kind": "k", "is_safe": 0.3}, "k", 0.3),
        ("completions", {"prompt": "q", "completion": "a"}, "", None),
        ("completions", ULTRACHAT, "", None),
        ("beavertails", BEAVERTAILS, "", 0.0),
        ("beavertails", {**BEAVERTAILS, "is_safe": None}, "", None),
        ("wildguardmix", WILDGUARD, "harmful", 1.0),
        ("wildguardmix", {**WILDGUARD, "response_harm_label": "harmful", "prompt_harm_label": None}, "", 0.0),
        ("wildguardmix", {**WILDGUARD, "response_harm_label": None, "prompt_harm_label": "unharmful"}, "benign", None),
        ("conversations", SHAREGPT, "", None),
        ("conversations", {**SHAREGPT, "is_safe": False}, "", 0.0),
    ],
)
def test_rows_are_completions(name: str, row: dict[str, Any], kind: str, is_safe: float | None) -> None:
    layout = COMPLETION_LAYOUTS.detect(row)
    assert layout is COMPLETION_LAYOUTS[name]
    made = layout.parse(row)
    assert (made.prompt, made.text, made.kind, made.is_safe) == ((Q,), "a", kind, is_safe)


@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("beavertails", {**BEAVERTAILS, "response": " "}, "response"),
        ("beavertails", {**BEAVERTAILS, "is_safe": "no"}, "is_safe"),
        ("wildguardmix", {**WILDGUARD, "response": None}, "response"),
        ("wildguardmix", {**WILDGUARD, "response_harm_label": "bad"}, "response_harm_label"),
        ("wildguardmix", {**WILDGUARD, "response_harm_label": []}, "response_harm_label"),
        ("conversations", {"conversations": SHAREGPT["conversations"][:1]}, "conversations"),
        ("conversations", {"conversations": []}, "conversations"),
        ("completions", {"prompt": "q", "text": "a", "is_safe": 2}, "is_safe"),
    ],
)
def test_bad_rows_say_field_and_reason(name: str, row: dict[str, Any], field: str) -> None:
    with raises(RowError) as caught:
        COMPLETION_LAYOUTS[name].parse(row)
    assert caught.value.field == field


def test_files_are_streamed_each_in_its_layout(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", ["text", BEAVERTAILS, {"prompt": "q"}])
    two = write_rows(tmp_path / "two.jsonl", [WILDGUARD])
    layouts: dict[str, str] = {}
    items = list(iter_completions([tmp_path], layouts=layouts))
    assert [isinstance(item, Reject) for item in items] == [True, False, True, False]
    assert layouts == {str(one): "beavertails", str(two): "wildguardmix"}
    with raises(SettingError, "layout"):
        list(iter_completions([one], layout="pku"))
    with raises(DataError, "three.jsonl:1"):
        list(iter_completions([write_rows(tmp_path / "three.jsonl", [{"a": 1}])]))


def test_labels_are_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "completions.jsonl"
    completions = [Completion("a", (Q,), "t", is_safe=1.0), Completion("b", (Q,), "t", is_safe=0.25)]
    write_completions(file, completions)
    assert read_completions(file) == completions
    with raises(LabelError, "is_safe"):
        Completion("a", (Q,), "t", is_safe=2.0)


def test_use_safe_takes_labelled_completions(tmp_path: Path) -> None:
    rows = [{**BEAVERTAILS, "response": str(k), "is_safe": label} for k, label in enumerate((True, False, None))]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    taken = {
        unknown: [row.text for row in load_completions([file], use="safe", unknown_label=unknown).completions]
        for unknown in ("safe", "drop")
    }
    assert taken == {"safe": ["0", "2"], "drop": ["0"]}
    assert len(load_completions([file], layout="beavertails").completions) == 3
    with raises(LabelError):
        load_completions([file], use="safe")
    with raises(SettingError, "use"):
        load_completions([file], use="chosen")


def test_a_completion_layout_is_no_layout_of_pairs(tmp_path: Path) -> None:
    with raises(SettingError, "layout"):
        read_pairs([write_rows(tmp_path / "rows.jsonl", [BEAVERTAILS])], layout="beavertails")
