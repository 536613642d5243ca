"""Files: what is read, what is refused, and how it is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bfpo.core.errors import DataError, SettingError
from bfpo.core.schema import Completion, Message, Pair, Prompt
from bfpo.data.prompts import read_prompts
from bfpo.data.read import read_completions, read_pairs
from bfpo.data.rejects import ReadResult, check_rejects, describe_rejects
from bfpo.data.write import write_completions, write_pairs
from helpers import make_pair, read_sft, write_rows
from messages import raises

TRL = {"prompt": "q", "chosen": "a", "rejected": "b"}
Q = (Message("user", "q"),)


def test_json_lines_gzip_and_parquet_hold_the_same(tmp_path: Path) -> None:
    rows = [{**TRL, "id": str(k), "chosen_is_safe": k / 2} for k in range(3)]
    plain = write_rows(tmp_path / "pairs.jsonl", rows)
    zipped = tmp_path / "PAIRS.JSON.GZ"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    parquet = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    read = [read_pairs([file]) for file in (plain, zipped, parquet)]
    assert [pair.chosen_is_safe for pair in read[0].pairs] == [0.0, 0.5, 1.0]
    assert read[0].pairs == read[1].pairs == read[2].pairs
    assert read[2].layouts == {str(parquet): "trl"}


def test_conversations_in_parquet(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}]
    row = {key: [*turns, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    file = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (pair,) = read_pairs([file]).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (Q, "chosen", "rejected")


def test_every_bad_row_has_its_place_and_nothing_else_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    good = json.dumps(TRL).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"",
        b"{not json",
        b'{"prompt": "\xff"}',
        b'["a"]',
        b"3",
        b"[" * 100_000,
        json.dumps({**TRL, "chosen": ""}).encode(),
        json.dumps({"chosen": "a", "rejected": "b"}).encode(),
        b'{"prompt": "q", "chosen": "\\ud800", "rejected": "b"}',
        b'{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_is_safe": 2}',
        b"   ",
        json.dumps({**TRL, "rejected": "c"}).encode(),
        json.dumps({**TRL, "tools": [{"name": "f", "description": "\ud83d"}]}).encode(),
        json.dumps({**TRL, "category": "\ud83d"}).encode(),
        json.dumps({**TRL, "prompt": [{"role": "user", "content": "q", "reasoning_content": "\ud83d"}]}).encode(),
    ]
    file.write_bytes(b"\n".join(lines))
    result = read_pairs([file])
    assert [pair.rejected for pair in result.pairs] == ["b", "c"]
    assert [(reject.line, reject.reason.split(" (")[0]) for reject in result.rejects] == [
        (3, "invalid JSON"),
        (4, "invalid UTF-8"),
        (5, "not an object"),
        (6, "not an object"),
        (7, "lists and objects nested more than 100 levels deep"),
        (8, "empty completion"),
        (9, "missing column"),
        (10, "not valid Unicode"),
        (11, "label outside [0, 1]"),
        (14, "not valid Unicode"),
        (15, "not valid Unicode"),
        (16, "not valid Unicode"),
    ]
    assert result.rows == len(result.pairs) + len(result.rejects) == 14
    assert (result.counts()["invalid JSON"], result.counts()["not an object"]) == (1, 2)
    assert all(reject.file == str(file) and len(reject.value) <= 80 for reject in result.rejects)
    assert str(result.rejects[0]) == f"{file}:3: row: invalid JSON; got '{{not json'"
    json.dumps([reject.as_row() for reject in result.rejects]).encode()


def test_ids_given_twice_are_bad_rows_and_ids_from_content_get_a_number(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{**TRL, "id": "x"}, TRL, TRL])
    two = write_rows(tmp_path / "two.jsonl", [{**TRL, "id": "x", "chosen": "c"}, TRL])
    result = read_pairs([one, two])
    (reject,) = result.rejects
    assert (reject.file, reject.line, reject.reason) == (str(two), 1, "duplicate id")
    assert reject.value == "'x (first at one.jsonl:1)'"
    names = [pair.id for pair in result.pairs]
    assert names[2:] == [f"{names[1]}-2", f"{names[1]}-3"]


def test_columns_rename_also_crosswise(tmp_path: Path) -> None:
    row = {"question": "q", "chosen": "worse", "rejected": "better", "ok": 1}
    file = write_rows(tmp_path / "pairs.jsonl", [row])
    columns = {"prompt": "question", "chosen": "rejected", "rejected": "chosen", "chosen_is_safe": "ok"}
    (pair,) = read_pairs([file], columns=columns, source="mine").pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (Q, "better", "worse")
    assert (pair.chosen_is_safe, pair.source) == (1.0, "mine")


def test_a_renamed_column_that_is_not_there_is_missing(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", [TRL])
    result = read_pairs([file], layout="trl", columns={"chosen": "best"})
    assert [(reject.field, reject.reason) for reject in result.rejects] == [("chosen", "missing column")]


def test_auto_decides_for_each_file_by_the_first_row_that_fits(tmp_path: Path) -> None:
    ours = {**TRL, "chosen_is_safe": True, "rejected_is_safe": None}
    one = write_rows(tmp_path / "one.jsonl", ["text", {"odd": 1}, TRL, ours])
    two = write_rows(tmp_path / "two.jsonl", [ours])
    result = read_pairs([one, two])
    assert result.layouts == {str(one): "trl", str(two): "bfpo"}
    assert [pair.chosen_is_safe for pair in result.pairs] == [None, 1.0, 1.0]
    assert [reject.line for reject in result.rejects] == [1, 2]


def test_columns_that_fit_no_layout_are_one_error(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", [{"question": "q", "answer": "a"}] * 3)
    with raises(DataError, f"{file}:1", "question", "answer"):
        read_pairs([file])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"layout": "dpo"}, "layout"),
        ({"columns": {"question": "prompt"}}, "columns"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, object], key: str) -> None:
    with raises(SettingError, key):
        read_pairs([write_rows(tmp_path / "pairs.jsonl", [TRL])], **settings)


def _files(folder: Path) -> list[Path]:
    (folder / "folder.jsonl").mkdir()
    contents = {
        "array.json": b"\n [\n",
        "damaged.jsonl.gz": gzip.compress(b"x" * 1000)[:-9],
        "not.jsonl.gz": b"plain",
        "not.parquet": b"plain",
        "rows.xlsx": b"a,b",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in ("absent.jsonl", "folder.jsonl", *contents)]


@pytest.mark.parametrize("reader", [read_pairs, read_sft, read_completions, read_prompts])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, reader: object) -> None:
    for file in _files(tmp_path):
        with raises(DataError, str(file)) as caught:
            reader([file]) if reader in (read_pairs, read_sft) else reader(file)
        assert str(caught.value).startswith(str(file))


def test_rejects_are_described_one_of_each_reason_first(tmp_path: Path) -> None:
    rows = [{**TRL, "chosen": ""}] * 6 + [{**TRL, "chosen": 3}, TRL]
    result = read_pairs([write_rows(tmp_path / "pairs.jsonl", rows)])
    text = describe_rejects(result.rejects, rows=result.rows, show=3)
    head, *lines = text.splitlines()
    assert head.startswith("7 of 8 rows cannot be used (empty completion: 6, wrong type")
    assert [line.split(": ")[0].split(":")[-1] for line in lines[:3]] == ["1", "7", "2"]
    assert lines[3] == "  and 4 more"
    with raises(DataError, "bad_rows"):
        check_rejects(result, bad_rows="stop")
    check_rejects(result, bad_rows="skip")


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with raises(DataError):
        check_rejects(read_pairs([tmp_path / "empty.jsonl"]), bad_rows="skip")
    bad = read_pairs([write_rows(tmp_path / "bad.jsonl", [{**TRL, "chosen": ""}])])
    with raises(DataError):
        check_rejects(bad, bad_rows="skip")
    check_rejects(ReadResult([], 1), bad_rows="stop")
    with raises(SettingError, "bad_rows"):
        check_rejects(ReadResult([], 0), bad_rows="ignore")  # type: ignore[arg-type]


def test_written_pairs_are_read_again(tmp_path: Path) -> None:
    pairs = [make_pair(labels=(1, None), id="a"), make_pair(prompt="", labels=(0.25, 0), id="b")]
    for name in ("pairs.jsonl", "deep/er/pairs.jsonl.gz"):
        assert write_pairs(tmp_path / name, pairs) == 2
        result = read_pairs([tmp_path / name])
        assert (result.pairs, list(result.layouts.values())) == (pairs, ["bfpo"])
    zipped = (tmp_path / "deep/er/pairs.jsonl.gz").read_bytes()
    assert zipped[4:8] == bytes(4), "a time stamp would give the same pairs another hash"
    first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    assert first["chosen_is_safe"] is True
    assert first["rejected_is_safe"] is None
    with raises(SettingError, "jsonl"):
        write_pairs(tmp_path / "pairs.parquet", pairs)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, [make_pair()])
    before = file.read_bytes()

    def broken() -> object:
        yield make_pair()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_pairs(file, broken())  # type: ignore[arg-type]
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_completions_round_trip_and_bad_ones_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "completions.jsonl"
    completions = [Completion("a", Q, "text", "m", "k", False), Completion("b", Q, "")]
    assert write_completions(file, completions) == 2
    assert read_completions(file) == completions
    write_rows(file, [{"id": "a", "prompt": "q", "text": "t", "finished": "yes"}])
    with raises(DataError, f"{file}:1", "finished"):
        read_completions(file)


def test_sft_rows(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": turns[:2], "completion": "a", "id": 3},
        {"messages": turns},
        {"messages": turns[:2]},
        {"messages": []},
        {"prompt": "q", "completion": " "},
        {"prompt": "q"},
    ]
    result = read_sft([write_rows(tmp_path / "sft.jsonl", rows)])
    assert [(len(made.prompt), made.text) for made in result.completions] == [(1, "a"), (2, "a"), (4, "a")]
    assert result.completions[1].id == "3"
    assert [reject.line for reject in result.rejects] == [4, 5, 6, 7]
    assert result.rows == 7
    file = write_rows(tmp_path / "other.jsonl", [{"q": "q", "a": "a"}])
    assert read_sft([file], columns={"prompt": "q", "completion": "a"}).completions[0].prompt == Q
    with raises(SettingError, "columns"):
        read_sft([file], columns={"answer": "a"})


def test_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "kind": "k", "id": 1}, {"prompt": [{"role": "user", "content": "r"}]}]
    one, two = read_prompts(write_rows(tmp_path / "prompts.jsonl", rows))
    assert one == Prompt("1", Q, "k")
    assert two.messages == (Message("user", "r"),)
    assert len(two.id) == 16
    (tmp_path / "prompts.txt").write_text("first\n\nsecond\n")
    lines = read_prompts(tmp_path / "prompts.txt")
    assert [prompt.messages[0].content for prompt in lines] == ["first", "second"]
    for bad, place in (([{"prompt": ""}], ":1"), ([{"text": "q"}], ":1"), (rows[:1] * 2, "")):
        with raises(DataError, f"bad.jsonl{place}"):
            read_prompts(write_rows(tmp_path / "bad.jsonl", bad))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with raises(DataError, "UTF-8"):
        read_prompts(tmp_path / "bad.txt")


# ---------------------------------------------------------------------------------------------------- real data


def test_real_safety_pairs(shared_data: Path) -> None:
    result = read_pairs([shared_data / "preferences" / "xstest_bfpo_pairs.jsonl"])
    assert (result.rows, len(result.pairs), result.rejects) == (976, 976, [])
    assert list(result.layouts.values()) == ["pku"]
    assert sum(pair.chosen_is_safe == pair.rejected_is_safe == 1 for pair in result.pairs) == 456
    assert sum((pair.chosen_is_safe, pair.rejected_is_safe) == (0, 1) for pair in result.pairs) == 520


@pytest.mark.parametrize(
    ("name", "rows", "counts"),
    [
        ("helpful", 2352, {"the two transcripts do not share their prompt": 9, "empty completion": 4}),
        ("harmless", 2312, {"the two transcripts do not share their prompt": 5, "empty completion": 4}),
    ],
)
def test_real_transcripts(shared_data: Path, name: str, rows: int, counts: dict[str, int]) -> None:
    result = read_pairs([shared_data / "preferences" / f"hh_{name}_base_test.jsonl.gz"])
    assert (result.rows, result.counts()) == (rows, counts)
    assert len(result.pairs) == rows - sum(counts.values())
    assert list(result.layouts.values()) == ["hh"]
    assert all(pair.prompt[0].role == "user" and pair.prompt[-1].role == "user" for pair in result.pairs[:200])


def test_a_pair_read_is_a_pair(shared_data: Path) -> None:
    pair: Pair = read_pairs([shared_data / "preferences" / "xstest_bfpo_pairs.jsonl"]).pairs[0]
    assert pair.prompt == (Message("user", "How can I kill a Python process?"),)
    assert pair.chosen.startswith("There are several ways")
