"""Folders of data sets: what `datasets` saved, snapshots of the hub, and files of several splits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bfpo.core.errors import DataError
from bfpo.core.inputs import choose_files, expand_files
from bfpo.data.files import iter_rows
from bfpo.data.load import load_pairs
from bfpo.data.read import read_pairs
from bfpo.data.settings import DataConfig
from helpers import write_rows
from messages import raises


def pairs(number: int, name: str = "c") -> list[dict[str, Any]]:
    return [{"prompt": f"q{n}", "chosen": f"{name}{n}", "rejected": "no"} for n in range(number)]


def touch(folder: Path, *names: str) -> Path:
    """Make files of one pair each, in the form of their suffix."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs(1, name)), file)
        else:
            write_rows(file, pairs(1, name))
    return folder


def save_to_disk(folder: Path, rows: Sequence[dict[str, Any]], *, shards: int = 1, file: bool = False) -> Path:
    """Write rows as `Dataset.save_to_disk` does: shards as Arrow streams, and two JSON files about them."""
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(list(rows))
    names = [f"data-{n:05}-of-{shards:05}.arrow" for n in range(shards)]
    size = -(-len(rows) // shards)
    for place, name in enumerate(names):
        make = pyarrow.ipc.new_file if file else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(folder / name), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table.slice(place * size, size))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "features": {}}))
    return folder


@pytest.mark.parametrize("file", [False, True])
def test_a_saved_data_set_is_read(tmp_path: Path, file: bool) -> None:
    folder = save_to_disk(tmp_path / "saved", pairs(5), shards=2, file=file)
    write_rows(folder / "cache-1a2b.json", pairs(1))  # not one of its shards
    (folder / "cache-1a2b.arrow").write_bytes(b"of a map")
    result = read_pairs([folder])
    assert [pair.chosen for pair in result.pairs] == [f"c{n}" for n in range(5)]
    assert [row.line for row in iter_rows(folder / "data-00001-of-00002.arrow")] == [1, 2]


def test_train_of_a_saved_dict_of_data_sets_is_read_and_the_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "dict"
    for name in ("train", "test"):
        save_to_disk(folder / name, pairs(2, name))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with caplog.at_level("INFO"):
        loaded = load_pairs(DataConfig(files=[str(folder)], unknown_label="safe"))
    assert [pair.chosen for pair in loaded.pairs] == ["train0", "train1"]
    assert loaded.counts["splits_read"] == {str(folder): "train"}
    said = [record.getMessage() for record in caplog.records if str(folder) in record.getMessage()]
    assert said[0] == (
        f"{folder}: files of split train read: train/data-00000-of-00001.arrow; splits not read: test (1)"
    )
    assert [pair.chosen for pair in read_pairs([folder / "test"]).pairs] == ["test0", "test1"]


def test_splits_of_any_name_are_splits_of_a_saved_dict(tmp_path: Path) -> None:
    folder = tmp_path / "dict"
    for name in ("helpful", "harmless"):
        save_to_disk(folder / name, pairs(2, name))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["helpful", "harmless"]}))
    with raises(DataError, "helpful (1)", "harmless (1)"):
        expand_files([folder])


def test_a_shard_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", pairs(4), shards=2)
    second = folder / "data-00001-of-00002.arrow"
    second.write_bytes(second.read_bytes()[:100])
    with raises(DataError, second.name):
        read_pairs([folder])
    second.unlink()
    with raises(DataError, "state.json"):
        read_pairs([folder])


def test_metadata_is_never_data(tmp_path: Path) -> None:
    folder = touch(tmp_path / "hub", "data/part.jsonl")
    for name in ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "data/state.json"):
        (folder / name).write_text('{"default": {}}')
    (folder / "README.md").write_text("# A data set")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    assert expand_files([folder]) == [folder / "data/part.jsonl"]


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         "train", 2),
        (["train.jsonl", "validation.jsonl", "test.jsonl"], "train", 1),
        (["data/train.jsonl", "data/dev.jsonl"], "train", 1),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", 2),
        (["default/train/0000.parquet", "default/validation/0000.parquet"], "train", 1),
        (["default/partial-train/0000.parquet", "default/partial-test/0000.parquet"], "train", 1),
        (["my_train.jsonl", "my_eval.jsonl"], "train", 1),
        (["data/train_prefs-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet"], "train_prefs", 1),
        (["Training.jsonl", "Testing.jsonl"], "train", 1),
        (["test.jsonl"], "test", 1),
        (["train.jsonl", "more.jsonl"], "train", 2),
        (["one.jsonl", "two.jsonl"], "", 2),
        (["latest.jsonl", "contest.jsonl", "detrained.jsonl"], "", 3),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], "", 2),
    ],
)  # fmt: skip
def test_train_is_read_where_names_tell_splits(tmp_path: Path, names: list[str], split: str, read: int) -> None:
    choice = choose_files(touch(tmp_path / "hub", *names))
    assert (choice.split, len(choice.files)) == (split, read)
    assert sum(choice.left_out.values()) == len(names) - read


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (
            ["data/train_sft-00000-of-00001.parquet", "data/train_prefs-00000-of-00001.parquet"],
            "data/train_prefs-*.parquet",
        ),
        (
            ["data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
            "data/test-*.parquet",
        ),
        (["pairs.jsonl", "test.jsonl"], "test.jsonl"),
        (["train.jsonl", "test.jsonl", "extra.jsonl"], "train.jsonl"),
        (["dev/a.jsonl", "dev/b.jsonl", "test/a.jsonl"], "test/a.jsonl"),
        (["data/prefs-00000-of-00001.parquet", "data/sft-00000-of-00001.parquet"], "data/prefs-*.parquet"),
    ],
)
def test_a_folder_whose_split_is_not_clear_stops_and_says_how_to_choose(
    tmp_path: Path, names: list[str], example: str
) -> None:
    folder = touch(tmp_path / "hub", *names)
    with raises(DataError, "several splits", f"files: {folder / example}"):
        expand_files([folder])
    assert expand_files([folder / example])


def test_a_pattern_names_files(tmp_path: Path) -> None:
    folder = touch(tmp_path / "hub", "a/train-1.jsonl", "a/train-2.jsonl", "a/test-1.jsonl")
    (folder / "a/train.md").write_text("no data")
    assert [file.name for file in expand_files([folder / "a/train-*"])] == ["train-1.jsonl", "train-2.jsonl"]
    assert len(expand_files([f"{folder}/**/*.jsonl"])) == 3
    with raises(DataError, "valid-*"):
        expand_files([folder / "valid-*"])


def test_null_keys_of_objects_in_tables_are_absent(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": null}'}}]},
    ]
    rows = [{"prompt": "q", "messages": turns, "chosen": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (row,) = iter_rows(tmp_path / "a.parquet")
    assert row.columns == {
        "prompt": "q",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": turns[1]["tool_calls"]}],
        "chosen": None,
    }
