from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.errors import BfpoError, DataError, LabelError, SettingError
from bfpo.data import load
from bfpo.data.load import CompletionStream, LoadedCompletions, LoadedPairs, PairStream
from bfpo.data.settings import DataConfig, SftDataConfig
from bfpo.data.split import normalised_prompt
from helpers import write_rows
from messages import raises


def load_pairs(files: list[Path], *, seed: int = 0, **keys: Any) -> LoadedPairs:
    return load.load_pairs(DataConfig(files=files, **keys), seed=seed)


def load_completions(files: list[Path], *, seed: int = 0, **keys: Any) -> LoadedCompletions:
    return load.load_completions(SftDataConfig(files=files, **keys), seed=seed)


def pair_stream(files: list[Path], *, seed: int = 0, **keys: Any) -> PairStream:
    return PairStream(DataConfig(files=files, **keys), seed=seed)


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


def test_later_passes_have_the_ids_of_the_first_where_rows_share_a_line(tmp_path: Path) -> None:
    rows = [{"prompt": name, "chosen": "yes", "rejected": "no"} for name in "aabcb"]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([rows[0], {"prompt": "half a row"}, *rows[1:]]))
    loaded = [pair.id for pair in load_pairs([file], unknown_label="safe", bad_rows="skip").pairs]
    assert loaded == [loaded[0], f"{loaded[0]}-2", loaded[2], loaded[3], f"{loaded[2]}-2"]
    stream = pair_stream([file], unknown_label="safe", bad_rows="skip")
    for _ in range(2):
        assert [pair.id for pair in stream] == loaded


def test_a_first_file_without_rows_does_not_decide_what_the_others_hold(tmp_path: Path, completions: Path) -> None:
    empty = tmp_path / "part-0.jsonl"
    empty.write_text("")
    assert len(load_completions([empty, completions]).completions) == 6


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
    with raises(DataError, "pairs.jsonl:13"):
        load_pairs([pairs], unknown_label="drop")
    with raises(LabelError):
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


@pytest.mark.parametrize(
    ("use", "names"),
    [
        ("all", ["a:chosen", "a:rejected", "b:rejected", "c:chosen", "c:rejected"]),
        ("chosen", ["a:chosen", "c:chosen"]),
        ("safe", ["a:chosen", "c:rejected"]),
    ],
)
def test_completions_to_imitate_come_once_each(tmp_path: Path, use: Any, names: list[str]) -> None:
    rows = [
        {"id": "a", "prompt": "q", "chosen": "good", "rejected": "bad", "chosen_is_safe": 1, "rejected_is_safe": 0},
        {"id": "b", "prompt": "q", "chosen": "good", "rejected": "other", "chosen_is_safe": 0, "rejected_is_safe": 0},
        {
            "id": "c",
            "prompt": "p",
            "chosen": "good",
            "rejected": "fine",
            "chosen_is_safe": 0.5,
            "rejected_is_safe": 0.9,
        },
    ]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    stream = CompletionStream(SftDataConfig(files=[str(file)], use=use))
    assert [made.id for made in stream] == names == [made.id for made in stream]
    assert (len(stream), stream.scan().counts["pairs"], stream.scan().counts["completions"]) == (
        len(names),
        3,
        len(names),
    )
    assert all(made.is_safe is None for made in stream)
    used = {name[0] for name in names}
    one_by_one = [PairStream(DataConfig(files=[str(file)])).scan().hashes] if "b" in used else []
    assert len(stream.scan().hashes) == 2
    assert all(set(stream.scan().hashes) == set(some) for some in one_by_one)


def test_a_stream_of_completions_keeps_no_row(tmp_path: Path) -> None:
    """Bytes that a scan leaves behind, a row: its mark, and two hashes of its prompt."""
    kept = {}
    for num in (100, 1100):
        rows = [{"prompt": f"w{i} " * 50, "completion": f"a{i} " * 200} for i in range(num)]
        file = write_rows(tmp_path / f"{num}.jsonl", rows)
        stream = CompletionStream(SftDataConfig(files=[str(file)]))
        assert sum(1 for _ in stream) == num
        tracemalloc.start()
        stream = CompletionStream(SftDataConfig(files=[str(file)]))
        stream.scan()
        kept[num] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert (kept[1100] - kept[100]) / 1000 < 30


def test_files_that_change_after_the_scan_are_an_error(completions: Path) -> None:
    stream = CompletionStream(SftDataConfig(files=[str(completions)]))
    stream.scan()
    completions.write_text(completions.read_text() + '{"prompt": "q", "completion": "a"}\n')
    with raises(DataError, "changed"):
        list(stream)


def test_labels_matter_only_where_safe_ones_are_picked(pairs: Path) -> None:
    assert load_completions([pairs], bad_rows="skip").counts["completions"] == 24
    with raises(LabelError):
        load_completions([pairs], bad_rows="skip", use="safe")


def test_a_file_of_completions(completions: Path) -> None:
    assert load_completions([completions]).counts == {"rows": 6, "rows_rejected": 0, "completions": 6}
    held_out = load_completions([completions], split={"held_out": 2, "seed": 0, "part": "test"}, source="mine")
    assert len(held_out.completions) == 2
    assert {completion.kind for completion in held_out.completions} == {"mine"}
    assert len(load_completions([completions], limit=4).completions) == 4
    with raises(SettingError, "use"):
        load_completions([completions], use="safe")


def test_renamed_columns_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    loaded = load_completions([path], columns={"prompt": "question", "completion": "answer"})
    assert loaded.completions[0].text == "a"


CHOICES: list[dict[str, Any]] = [
    {},
    {"split": {"held_out": 2, "seed": 3, "part": "train"}},
    {"split": {"held_out": 2, "seed": 3, "part": "test"}, "limit": 3},
    {"limit": 5, "seed": 4, "source": "mine"},
]


@pytest.mark.parametrize("unknown", ["safe", "drop"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_stream_is_the_list(pairs: Path, unknown: Any, choice: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"bad_rows": "skip", "unknown_label": unknown, **choice}
    # Another file, whose rows come again: ids from content get numbers, and a given id is a reject of its own.
    rows = pairs.read_text().splitlines()[1:4]
    again = pairs.with_name("again.jsonl")
    nameless = '{"prompt": "q0", "chosen": "a", "rejected": "b", "chosen_is_safe": true, "rejected_is_safe": true}'
    again.write_text("\n".join(["", nameless, *rows, nameless, nameless]))
    loaded = load_pairs([pairs, again], **settings)
    stream = pair_stream([pairs, again], **settings)
    for pairs_at_once in zip(stream, stream, loaded.pairs, strict=True):
        assert pairs_at_once[0] == pairs_at_once[1] == pairs_at_once[2]
    assert (stream.scan().counts, stream.scan().rejects, len(stream)) == (
        loaded.counts,
        loaded.rejects,
        len(loaded.pairs),
    )
    assert "p1 (first at pairs.jsonl:2)" in stream.scan().rejects[1].value
    assert len({pair.id for pair in loaded.pairs}) == len(loaded.pairs)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"bad_rows": "skip"},
        {"bad_rows": "skip", "unknown_label": "drop", "split": {"held_out": 9, "seed": 0, "part": "test"}},
    ],
)
def test_a_stream_fails_as_the_list_before_its_first_pair(pairs: Path, choice: dict[str, Any]) -> None:
    with pytest.raises(BfpoError) as expected:
        load_pairs([pairs], **choice)
    with pytest.raises(type(expected.value)) as found:
        pair_stream([pairs], **choice).scan()
    assert str(found.value) == str(expected.value)


def test_a_stream_whose_file_changes_is_an_error(pairs: Path) -> None:
    stream = pair_stream([pairs], bad_rows="skip", unknown_label="safe")
    stream.scan()
    lines = pairs.read_text().splitlines(keepends=True)
    for changed in (lines[:-3], [*lines, lines[0]], ["{}\n", *lines[1:]]):
        pairs.write_text("".join(changed))
        with raises(DataError):
            list(stream)


def test_a_stream_holds_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    row = {"chosen": "a" * 2500, "rejected": "b" * 2500, "chosen_is_safe": True, "rejected_is_safe": False}
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"q{i}", **row}) + "\n" for i in range(600)))
    streams = [pair_stream([path], split={"held_out": 5, "seed": 0, "part": "train"}, limit=500) for _ in range(2)]
    for _ in streams[0]:
        pass  # what is imported and cached at first use is not what is measured
    tracemalloc.start()
    try:
        assert sum(len(pair.chosen) for pair in streams[1]) == 500 * 2500
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # the rows are 3 MB of text
