"""Kinds of files: what each gives, and how damage is said."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from bfpo.core.errors import DataError
from bfpo.core.inputs import expand_files
from bfpo.data import files as rows
from bfpo.data.files import iter_rows
from bfpo.data.read import read_pairs
from bfpo.data.rejects import Row
from messages import raises

ROWS = [{"prompt": f"q{k}", "chosen": "a", "rejected": "b"} for k in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(folder: Path, name: str, content: bytes) -> list[Row]:
    (folder / name).write_bytes(content)
    return list(iter_rows(folder / name))


def zstd(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


def reasons(found: list[Row]) -> list[tuple[int, str]]:
    return [(row.line, row.bad.reason) for row in found if row.bad is not None]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_compressed_files(tmp_path: Path, suffix: str, pack: object) -> None:
    packed = pack(LINES)  # type: ignore[operator]
    assert [row.columns for row in read(tmp_path, f"rows.jsonl{suffix}", packed)] == ROWS
    assert [row.columns for row in read(tmp_path, f"twice.jsonl{suffix}", packed * 2)] == ROWS * 2
    assert [dict(row.columns) for row in read(tmp_path, f"rows.csv{suffix}", pack(b"a,b\n1,2\n"))] == [  # type: ignore[operator]
        {"a": "1", "b": "2"}
    ]
    for damaged in (packed[: len(packed) // 2], b"plain text", packed[:10] + b"\xff\xff\xff" + packed[13:]):
        with raises(DataError, f"rows.jsonl{suffix}", mask="(?<=to its end: ).*"):
            read(tmp_path, f"rows.jsonl{suffix}", damaged)


def test_csv_with_a_space_behind_each_comma(tmp_path: Path) -> None:
    rows = [dict(row.columns) for row in read(tmp_path, "rows.csv", b'a, b, c\n"1, 2", "x", y\n3,"z, w",  v\n')]
    assert rows == [{"a": "1, 2", "b": "x", "c": "y"}, {"a": "3", "b": "z, w", "c": "v"}]
    (kept,) = read(tmp_path, "kept.csv", b"a, b,c\n1, x,y\n")
    assert kept.columns == {"a": "1", "b": " x", "c": "y"}


def test_csv_with_quotes(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbfid,prompt,"chosen"\r\n'
        b'1,"two\nlines, and a comma","say ""hi"""\r\n'
        b"\r\n"
        b'2,plain,5" pipe\n'
        b'3,"broken "quote,x\n'
        b"4,too few\n"
        b"5,a,b,c\n"
        b"6,\xff,b\n"
        b"7,last,one"
    )
    found = read(tmp_path, "rows.csv", content)
    assert [(row.line, dict(row.columns)) for row in found if row.bad is None] == [
        (2, {"id": "1", "prompt": "two\nlines, and a comma", "chosen": 'say "hi"'}),
        (5, {"id": "2", "prompt": "plain", "chosen": '5" pipe'}),
        (10, {"id": "7", "prompt": "last", "chosen": "one"}),
    ]
    assert reasons(found) == [
        (6, "broken CSV (quotes or line ends)"),
        (7, "wrong number of fields"),
        (8, "wrong number of fields"),
        (9, "invalid UTF-8"),
    ]


def test_a_quote_that_never_closes_says_how_far_it_went(tmp_path: Path) -> None:
    (bad,) = read(tmp_path, "rows.csv", b'a,b\n1,"open\n2,x\n3,y\n')
    assert bad.line == 2
    assert bad.bad is not None
    assert bad.bad.value == "unexpected end of data, up to line 4"


def test_tsv_and_index_columns(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "rows.tsv", b"\ta\tb\n0\tx, y\tz\n")
    assert dict(row.columns) == {"a": "x, y", "b": "z"}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a,b,a\n1,2,3\n", 1),
        (b'"open\n', 1),
        (b"\n\xff\xfe,b\n", 2),
    ],
)
def test_csv_whose_columns_have_no_names(tmp_path: Path, content: bytes, line: int) -> None:
    with raises(DataError, f"rows.csv:{line}"):
        read(tmp_path, "rows.csv", content)


def test_csv_cells_are_labels_numbers_and_text_where_they_are_needed(tmp_path: Path) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["id", "prompt", "response_0", "response_1", "better_response_id", "is_response_0_safe"])
    writer.writerow(["7", "12", "true", "0.5", "1", "False"])
    writer.writerow(["8", "q", "a", "b", "0", ""])
    writer.writerow(["9", "q", "a", "b", "first", "1"])
    writer.writerow(["10", "q", "a", "b", "1", "perhaps"])
    file = tmp_path / "pairs.csv"
    file.write_text(table.getvalue())
    result = read_pairs([file])
    one, two = result.pairs
    assert (one.id, one.prompt[0].content, one.chosen, one.rejected) == ("7", "12", "0.5", "true")
    assert (one.chosen_is_safe, one.rejected_is_safe, two.chosen_is_safe) == (None, 0.0, None)
    assert type(one.chosen) is str
    assert [(reject.line, reject.field) for reject in result.rejects] == [
        (4, "better_response_id"),
        (5, "is_response_0_safe"),
    ]


# --------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
def test_a_json_array_has_the_line_of_each_element(tmp_path: Path, name: str) -> None:
    content = b'\xef\xbb\xbf\n [{"a": 1},\r\n  {"a":\n2}, 3,\n {"a": 4}\n]\n'
    found = read(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
    assert [(row.line, dict(row.columns)) for row in found] == [(2, {"a": 1}), (3, {"a": 2}), (4, {}), (5, {"a": 4})]
    assert reasons(found) == [(4, "not an object")]
    assert read(tmp_path, name, gzip.compress(b"[]") if name.endswith(".gz") else b"[]") == []


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_an_object_with_a_key_twice_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", block)
    good, twice, within = '{"a": {"b": 1}}', '{"a": 1, "b": 2, "a": 3}', '{"a": [{"b": 1, "b": 1}]}'
    expected = [(2, "an object has a key twice"), (3, "an object has a key twice")]
    for name, text in (
        ("lines.jsonl", "\n".join([good, twice, within, good])),
        ("array.json", "[" + ",\n".join([good, twice, within, good]) + "]"),
    ):
        found = read(tmp_path, name, text.encode())
        assert reasons(found) == expected
        assert [row.bad.value for row in found if row.bad is not None] == ["a", "b"]
        assert [dict(row.columns) for row in found if row.bad is None] == [{"a": {"b": 1}}] * 2


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["q"]), pyarrow.array([True]), pyarrow.array([False])], ["a", "b", "b"])
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with raises(DataError, "a.arrow", "'b'"):
        list(iter_rows(tmp_path / "a.arrow"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'[{"a": 1},\n{"a"', 2),
        (b'[{"a": 1}\n{"a": 2}]', 2),
        (b'[{"a": 1},\n\n', 3),
        (b"[1]\n[2]", 2),
        (b"[\n\xff]", 2),
    ],
)
def test_a_damaged_array_is_one_error_with_its_line(tmp_path: Path, content: bytes, line: int) -> None:
    with raises(DataError, f"rows.json:{line}"):
        read(tmp_path, "rows.json", content)


def test_an_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    assert read(tmp_path, "rows.json", b'{\n "a": [1,\n 2]\n}\n') == [Row(1, {"a": [1, 2]})]
    found = read(tmp_path, "rows.json", b'{"a": \n{"b": 1}\n\n{"b": 2}')
    assert [(row.line, dict(row.columns)) for row in found] == [(1, {}), (2, {"b": 1}), (4, {"b": 2})]
    assert reasons(read(tmp_path, "rows.jsonl", b'{\n "a": 1\n}\n')) == [(k, "invalid JSON") for k in (1, 2, 3)]


def test_an_object_beyond_the_limit_must_be_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_DOCUMENT_BYTES", 100)
    assert len(reasons(read(tmp_path, "rows.json", b'{\n"a": "' + b"x" * 200 + b'"\n}'))) == 3


@pytest.mark.parametrize("block", [3, 4, 5, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_read_in_blocks_is_the_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", block)
    items = [{"a": "ä\U0001f600]\\,"}, -12.5e3, {}, {"b": [1, {"c": "\n["}]}, "x", 1234]
    content = json.dumps(items, indent=indent, ensure_ascii=False).encode()
    found = read(tmp_path, "rows.json", b"\xef\xbb\xbf\n " + content)
    assert [dict(row.columns) for row in found] == [item if isinstance(item, dict) else {} for item in items]
    starts = [3, 6, 7, 8, 16, 17] if indent else [2] * 6
    assert [row.line for row in found] == starts
    for cut in range(1, len(content)):  # at every place: whole elements, then one error, also within a character
        with pytest.raises(DataError, match=r"rows\.json:\d+: "):
            read(tmp_path, "rows.json", content[:cut])


@pytest.mark.parametrize("rows_per_group", [200, 8000])
def test_a_parquet_file_is_not_in_memory_as_a_whole(tmp_path: Path, rows_per_group: int) -> None:
    import pyarrow.parquet

    file = tmp_path / "rows.parquet"
    table = pyarrow.table({"a": [os.urandom(600).hex() for _ in range(8000)]})
    options = {"use_dictionary": False, "compression": None, "data_page_size": 1 << 15}
    pyarrow.parquet.write_table(table, file, row_group_size=rows_per_group, **options)
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    held = [pool.bytes_allocated() - before for _ in iter_rows(file)]
    assert len(held) == 8000
    assert 0 < max(held) < file.stat().st_size / 2


def test_an_array_is_not_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 1000)
    held: list[int] = []
    real = rows._ArrayText._read_more

    def read_more(text: Any) -> None:
        real(text)
        held.append(len(text._text))

    monkeypatch.setattr(rows._ArrayText, "_read_more", read_more)
    content = json.dumps([{"a": "x" * 300, "k": k} for k in range(200)]).encode()  # on one line
    assert [row.columns["k"] for row in read(tmp_path, "rows.json", content)] == list(range(200))
    assert max(held) < 2400 < len(content) / 20
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 5000)
    with raises(DataError, "5000", "rows.json:2"):
        read(tmp_path, "rows.json", b'[1,\n{"a": "' + b"x" * 50_000 + b'"}]')
    assert max(held) < 17_000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_line_beyond_the_limit_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    long = b'{"a": "' + b"x" * 5000 + b'"}\n'
    content = b'{"a": 1}\n' + long + b'{"a": 2}\n' + long.strip()
    if name.endswith("csv"):
        content = b"a,b\n1,2\n" + b"x" * 5000 + b",1\n3,4\n" + b"x" * 5000
    found = read(tmp_path, name, content)
    head = 1 if name.endswith("csv") else 0
    assert reasons(found) == [(2 + head, "line longer than 100 bytes"), (4 + head, "line longer than 100 bytes")]
    assert [row.line for row in found] == [k + head for k in (1, 2, 3, 4)]


@pytest.mark.slow
def test_a_line_of_100_mb_does_not_fill_the_memory(tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.write(LINES + b'{"prompt": "')
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n' + LINES)
    tracemalloc.start()
    result = read_pairs([file], layout="trl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(result.pairs), result.counts()) == (6, {f"line longer than {1 << 26} bytes": 1})
    assert peak < 3 * rows.MAX_LINE_BYTES


def test_mixed_line_ends_and_nul_bytes(tmp_path: Path) -> None:
    found = read(tmp_path, "rows.jsonl", b'{"a": 1}\r\n{"a": 2}\n\r\n\x00\n{"a": "\\u0000"}\r{"a": 3}\n{"a": "\x00"}')
    assert [(row.line, row.bad is None) for row in found] == [(1, True), (2, True), (4, False), (5, False), (6, False)]


# ------------------------------------------------------------------------------------------------------ folders


def test_a_folder_stands_for_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b/part-1.parquet", "b/part-0.parquet", "a.jsonl", "README.md", ".cache/x.jsonl", "c.CSV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = ["a.jsonl", "b/part-0.parquet", "b/part-1.parquet", "c.CSV"]
    assert [file.relative_to(tmp_path).as_posix() for file in expand_files([tmp_path])] == names
    assert expand_files([tmp_path / "README.md", tmp_path / "b"])[0] == tmp_path / "README.md"
    (tmp_path / "none").mkdir()
    with raises(DataError):
        expand_files([tmp_path / "none"])


def test_pairs_of_a_folder(tmp_path: Path) -> None:
    import pyarrow.parquet

    folder = tmp_path / "shards"
    folder.mkdir()
    for k, row in enumerate(ROWS):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / f"train-{2 - k}.parquet")
    assert [pair.prompt[0].content for pair in read_pairs([folder]).pairs] == ["q2", "q1", "q0"]


def test_times_that_python_cannot_hold_are_text(tmp_path: Path) -> None:
    import pyarrow.parquet

    times = {
        "ns": (pyarrow.timestamp("ns"), 1_700_000_000_123_456_789, "2023-11-14 22:13:20.123456789"),
        "span": (pyarrow.duration("ns"), 1_234_567, "1234567"),
        "clock": (pyarrow.time64("ns"), 1_234_567, "00:00:00.001234567"),
    }
    columns = {name: pyarrow.array([value, None]).cast(kind) for name, (kind, value, _) in times.items()}
    columns["far"] = pyarrow.array([10**12, None]).cast(pyarrow.timestamp("s"))  # a year above 9999
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q", "r"], **columns}), tmp_path / "a.parquet")
    first, second = iter_rows(tmp_path / "a.parquet")
    far = first.columns["far"]
    assert isinstance(far, str)
    assert first.columns == {"prompt": "q", **{name: text for name, (_, _, text) in times.items()}, "far": far}
    assert second.columns == {"prompt": "r", **dict.fromkeys([*times, "far"])}
    inside = pyarrow.array([[1_700_000_000_123_456_789]]).cast(pyarrow.list_(pyarrow.timestamp("ns")))
    pyarrow.parquet.write_table(pyarrow.table({"when": inside}), tmp_path / "b.parquet")
    with raises(DataError, "b.parquet", "when"):
        list(iter_rows(tmp_path / "b.parquet"))


def is_too_deep(text: str) -> bool:
    """Whether this Python's decoder gives up on it: from about 1,000 levels, since 3.13 from more."""
    try:
        json.loads(text)
    except RecursionError:
        return True
    return False


@pytest.mark.parametrize("depth", [101, 600, 5000, 200_000])
@pytest.mark.parametrize("form", ["lines", "array", "object"])
def test_a_row_of_nested_lists_is_a_bad_row(depth: int, form: str, tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    deep = '{"prompt": ' + "[" * depth + "]" * depth + "}"
    text = {"lines": f'{{"a": 1}}\n{deep}\n', "array": f'[{{"a": 1}}, {deep}]', "object": "{\n" + deep[1:]}
    file.write_text(text[form])
    if form == "array" and is_too_deep(deep):  # beyond the limit of the decoder, which then has lost its place
        with pytest.raises(DataError, match=r"deep\.jsonl"):
            list(iter_rows(file))
    else:
        bad = [row.bad for row in iter_rows(file) if row.bad is not None]
        assert {each.field for each in bad} == {"row"}


def test_a_row_of_many_short_lists_is_read(tmp_path: Path) -> None:
    file = tmp_path / "wide.jsonl"
    file.write_text('{"prompt": ' + "[" + "[]," * 500 + "[]]}\n")
    assert [row.bad for row in iter_rows(file)] == [None]
