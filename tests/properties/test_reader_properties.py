"""Damaged, odd and hostile files: each reader ends in counts or in one error with the file's name, never otherwise."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bfpo.core.errors import BfpoError, DataError
from bfpo.data import files as rows
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.files import iter_rows
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.prompt_layouts import PROMPT_LAYOUTS
from bfpo.data.prompts import read_prompt_files
from bfpo.data.read import iter_pairs, read_pairs
from bfpo.data.rejects import Reject, check_rejects
from helpers import read_sft
from messages import raises

PROPERTY = settings(max_examples=40, deadline=None)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=5,
)
names = sorted(
    {
        name
        for layout in (*PAIR_LAYOUTS.values(), *COMPLETION_LAYOUTS.values())
        for name in (*layout.needs, *layout.reads)
    }
    | {name for layout in PROMPT_LAYOUTS.values() for name in (*layout.needs, *layout.reads)}
)
GOOD: list[dict[str, Any]] = [
    {
        "id": str(k),
        "prompt": f"question {k}",
        "chosen": 'a "quoted", one',
        "rejected": "two\nlines",
        "chosen_is_safe": True,
    }
    for k in range(6)
]


def zstd(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


def as_json_lines(items: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def as_array(items: list[dict[str, Any]]) -> bytes:
    return json.dumps(items, indent=1).encode()


def as_csv(items: list[dict[str, Any]]) -> bytes:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(items[0]))
    writer.writeheader()
    writer.writerows(items)
    return table.getvalue().encode()


def as_parquet(items: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), buffer)
    return buffer.getvalue()


FORMS: dict[str, bytes] = {
    "pairs.jsonl": as_json_lines(GOOD),
    "pairs.json": as_array(GOOD),
    "pairs.csv": as_csv(GOOD),
    "pairs.parquet": as_parquet(GOOD),
    "pairs.jsonl.gz": gzip.compress(as_json_lines(GOOD), mtime=0),
    "pairs.csv.xz": lzma.compress(as_csv(GOOD)),
    "pairs.json.zst": zstd(as_array(GOOD)),
}
NOISE = st.one_of(
    st.sampled_from([b"\x00", b"\xff", b'"', b"\n", b"\r", b"[", b"{", b",", b"\xef\xbb\xbf"]), st.binary(max_size=8)
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(FORMS)))
    content = FORMS[name]
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.one_of(st.just(start), st.integers(start, min(len(content), start + 40)), st.just(len(content))))
        content = content[:start] + draw(NOISE) + content[end:]
    return name, content


def result_or_error(read: Callable[[], Any], file: Path) -> Any:
    """Return what a reader returns, `None` where it raises one error that names the file."""
    try:
        return read()
    except DataError as error:
        message = str(error)
    message.encode("utf-8")
    assert str(file) in message
    return None


def read_every_way(file: Path) -> None:
    """Read a file as pairs, completions and prompts, by its columns and as given layouts; check what comes of it."""
    readers: list[Callable[[], Any]] = [
        lambda: read_pairs([file]),
        lambda: read_pairs([file], layout="bfpo"),
        lambda: read_sft([file]),
        lambda: read_prompt_files([file]),
    ]
    for read in readers:
        result = result_or_error(read, file)
        if hasattr(result, "rejects") and not hasattr(result, "prompts"):
            kept = result.pairs if hasattr(result, "pairs") else result.completions
            assert result.rows == len(kept) + len(result.rejects)
            json.dumps([reject.as_row() for reject in result.rejects]).encode()
            assert sum(result.counts().values()) == len(result.rejects)


@PROPERTY
@given(damaged())
def test_a_damaged_file_ends_in_counts_or_one_error(item: tuple[str, bytes]) -> None:
    name, content = item
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        read_every_way(file)
        found = result_or_error(lambda: list(iter_rows(file)), file)
        assert found is None or read_pairs([file], layout="trl").rows == len(found)


@PROPERTY
@given(st.lists(st.dictionaries(st.sampled_from(names), values, max_size=8), max_size=3), st.booleans())
def test_any_values_in_known_columns(items: list[dict[str, Any]], array: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("any.json" if array else "any.jsonl")
        file.write_bytes(json.dumps(items).encode() if array else as_json_lines(items))
        read_every_way(file)
        for layout in PROMPT_LAYOUTS:
            result_or_error(partial(read_prompt_files, [file], layout=layout), file)
        for layout in PAIR_LAYOUTS:
            assert read_pairs([file], layout=layout).rows == len(items)
        for layout in COMPLETION_LAYOUTS:
            assert read_sft([file], layout=layout).rows == len(items)


@PROPERTY
@given(
    st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_every_line_is_counted(lines: list[bytes], end: bytes) -> None:
    content = b'{"prompt": "q"}' + end + end.join(lines)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        file.write_bytes(content)
        result = read_pairs([file], layout="trl")
    assert result.rows == sum(1 for line in content.split(b"\n") if line.strip())


cells = st.text(
    st.one_of(st.sampled_from("\",\n;' "), st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00")),
    max_size=9,
)


@PROPERTY
@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_csv_written_is_read_again(table: list[tuple[str, str, str]], end: str, bom: bool) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator=end)
    writer.writerow(["a", "b", "c"])
    writer.writerows(table)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.csv"
        file.write_bytes(b"\xef\xbb\xbf" * bom + stream.getvalue().encode())
        found = list(iter_rows(file))
    assert [tuple(row.columns.values()) for row in found] == table
    starts = [2 + k + sum(cell.count("\n") for row in table[:k] for cell in row) for k in range(len(table))]
    assert [row.line for row in found] == starts


@settings(PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged(), st.integers(1, 120))
def test_limits_are_counts_or_errors_too(item: tuple[str, bytes], limit: int) -> None:
    name, content = item
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "MAX_LINE_BYTES", limit)
        patch.setattr(rows, "MAX_DOCUMENT_BYTES", 3 * limit)
        file = Path(folder) / name
        file.write_bytes(content)
        read_every_way(file)


# ------------------------------------------------------------------------------------------------- odd but fine


def one(folder: Path, item: dict[str, Any]) -> Any:
    file = folder / "row.jsonl"
    file.write_bytes(as_json_lines([item]))
    return read_pairs([file])


def test_a_row_of_a_hundred_thousand_tokens_is_a_row(tmp_path: Path) -> None:
    (pair,) = one(tmp_path, {**GOOD[0], "chosen": "word " * 100_000}).pairs
    assert len(pair.chosen) == 500_000


def test_a_prompt_inside_its_completion_is_left_as_it_is(tmp_path: Path) -> None:
    (pair,) = one(tmp_path, {**GOOD[0], "chosen": "ask 0\n\nHuman: ask 0"}).pairs
    assert pair.chosen == "ask 0\n\nHuman: ask 0"


def test_contradictory_labels_are_two_pairs(tmp_path: Path) -> None:
    items = [{**GOOD[0], "id": str(k), "chosen_is_safe": k} for k in (0, 1)]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(as_json_lines(items))
    assert [pair.chosen_is_safe for pair in read_pairs([file]).pairs] == [0.0, 1.0]


def test_duplicate_ids_and_renamed_columns_are_counted(tmp_path: Path) -> None:
    renamed = {**{k: v for k, v in GOOD[1].items() if k != "chosen"}, "Chosen": "a"}
    file = tmp_path / "rows.csv"
    file.write_bytes(as_csv([GOOD[0], GOOD[0], GOOD[1]]))
    assert read_pairs([file]).counts() == {"duplicate id": 1}
    file.write_bytes(as_csv([renamed]))
    with raises(DataError, "rows.csv:2"):
        read_pairs([file])
    assert len(read_pairs([file], columns={"chosen": "Chosen"}).pairs) == 1


@pytest.mark.parametrize("name", sorted(FORMS))
def test_an_empty_file_is_one_error_that_names_it_or_no_rows(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"")
    result = result_or_error(lambda: read_pairs([file]), file)
    if result is None:
        return
    assert (result.rows, result.pairs) == (0, [])
    with raises(BfpoError):
        check_rejects(result, bad_rows="skip")


def test_bad_rows_of_many_files_are_all_seen(tmp_path: Path) -> None:
    for name, content in FORMS.items():
        (tmp_path / name).write_bytes(content)
    items = list(iter_pairs([tmp_path]))
    assert len(items) == len(GOOD) * len(FORMS)
    assert sum(isinstance(item, Reject) for item in items) == len(GOOD) * (len(FORMS) - 1)  # the same ids again
