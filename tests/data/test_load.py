from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bfpo.data.load import load_completions, load_pairs
from bfpo.data.split import normalised_prompt
from bfpo.errors import DataError, LabelError, SettingError


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": f"p{i}", "prompt": f"q{i // 2}", "chosen": f"a{i}", "rejected": f"b{i}", "chosen_is_safe": True}
        | {"rejected_is_safe": None if i == 0 else bool(i % 2)}
        for i in range(12)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "q", "chosen": 3}\n')
    return path


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(6)))
    return path


def test_every_step_is_counted(pairs: Path) -> None:
    loaded = load_pairs([pairs], bad_rows="skip", unknown_label="drop")
    assert loaded.counts == {
        "rows": 13,
        "rows_rejected": 1,
        "rejected_by_reason": loaded.counts["rejected_by_reason"],
        "labels_set_safe": 0,
        "pairs_without_label_dropped": 1,
        "pairs": 11,
        "cells": {"safe-safe": 6, "safe-unsafe": 5, "unsafe-safe": 0, "unsafe-unsafe": 0},
    }
    assert [reject.line for reject in loaded.rejects] == [13]
    assert load_pairs([pairs], bad_rows="skip", unknown_label="safe").counts["labels_set_safe"] == 1
    with pytest.raises(DataError, match=r"pairs\.jsonl:13"):
        load_pairs([pairs], unknown_label="drop")
    with pytest.raises(LabelError, match="1 of 12 pairs lack a safety label"):
        load_pairs([pairs], bad_rows="skip")


def test_the_split_comes_before_the_limit(pairs: Path) -> None:
    settings: dict[str, Any] = {"bad_rows": "skip", "unknown_label": "safe"}
    parts = {
        part: load_pairs([pairs], split={"held_out": 2, "seed": 3, "part": part}, **settings).pairs
        for part in ("train", "test")
    }
    prompts = {part: {normalised_prompt(pair.prompt) for pair in some} for part, some in parts.items()}
    assert len(prompts["test"]) == 2
    assert not prompts["test"] & prompts["train"]
    assert len(parts["test"]) + len(parts["train"]) == 12
    few = load_pairs([pairs], split={"held_out": 2, "seed": 3, "part": "test"}, limit=3, **settings).pairs
    assert len(few) == 3
    assert {pair.id for pair in few} < {pair.id for pair in parts["test"]}


@pytest.mark.parametrize(("use", "num"), [("all", 24), ("chosen", 12), ("safe", 19)])
def test_completions_of_pairs(pairs: Path, use: Any, num: int) -> None:
    loaded = load_completions([pairs], use=use, bad_rows="skip", unknown_label="safe")
    assert len(loaded.completions) == loaded.counts["completions"] == num
    assert loaded.counts["rows_rejected"] == 1


def test_labels_matter_only_where_safe_ones_are_picked(pairs: Path) -> None:
    assert load_completions([pairs], bad_rows="skip").counts["completions"] == 24
    with pytest.raises(LabelError, match="lack a safety label"):
        load_completions([pairs], bad_rows="skip", use="safe")


def test_a_file_of_completions(completions: Path) -> None:
    assert load_completions([completions]).counts == {"rows": 6, "rows_rejected": 0, "completions": 6}
    held_out = load_completions([completions], split={"held_out": 2, "seed": 0, "part": "test"}, source="mine")
    assert len(held_out.completions) == 2
    assert {completion.kind for completion in held_out.completions} == {"mine"}
    assert len(load_completions([completions], limit=4).completions) == 4
    with pytest.raises(SettingError, match="use: got 'safe' for a file of completions"):
        load_completions([completions], use="safe")


def test_renamed_columns_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    loaded = load_completions([path], columns={"prompt": "question", "completion": "answer"})
    assert loaded.completions[0].text == "a"
