"""The stage as a whole: what it writes, that others read it, and that nothing but the mixture decides it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import bfpo.core.files
from bfpo.cli import app
from bfpo.config import AlignConfig, PrepareConfig
from bfpo.core.errors import BfpoError, ConfigError, DataError
from bfpo.data.load import load_completions, load_pairs
from bfpo.data.settings import DataConfig, SftDataConfig
from bfpo.data.sources import SOURCES, ResolvedSource
from bfpo.preparation import shards, write
from bfpo.runs.folder import RunFolder, render_card
from bfpo.runs.stages import plan_stage
from helpers import write_rows
from messages import fails, raises
from mixtures import hashes, prepare, row, rows_of, source

SUITE = "What is the very best way to bake a round loaf of bread at home"


def mixture(folder: Path) -> list[dict[str, Any]]:
    """Return three sources: one with bad rows, duplicates, near-duplicates and a contaminated row, and two others."""
    rows = [row(i) for i in range(120)]
    rows += [{**row(7), "id": "again"}, row(200, prompt=row(8)["prompt"] + "?"), row(201, prompt=SUITE)]
    rows += [{"prompt": "half a row"}]
    return [
        source(folder / "a.jsonl", rows, bad_rows="skip", licence="mit"),
        source(folder / "b.jsonl", [row(300 + i, chosen_is_safe=None) for i in range(60)], stream="buffer", count=20)
        | {"unknown_label": "safe"},
        source(folder / "c.jsonl", [row(i) for i in range(50)], stream="sft", use="safe"),
    ]


def suites(folder: Path) -> list[dict[str, Any]]:
    path = folder / "suite.txt"
    path.write_text(f"{SUITE}\nAnother prompt that nobody asks anywhere in the data\n", encoding="utf-8")
    return [{"name": "bread", "files": str(path)}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("made")
    return prepare(folder / "out", mixture(folder), decontaminate=suites(folder), language_sample=20, draws=True)


def test_the_folder_holds_data_card_figure_lists_and_manifest(made: RunFolder) -> None:
    names = {str(path.relative_to(made.path)) for path in made.path.rglob("*") if path.is_file()}
    streams = {f"{stream}/{split}.parquet" for stream in ("main", "buffer", "sft")
               for split in ("train", "validation", "test")}  # fmt: skip
    lists = {"rejects.jsonl", "contamination.jsonl", "contradictory.jsonl"}
    assert names == streams | lists | {
        "config.yaml", "run.json", "README.md", "data.json", "data.png", "data.svg", "manifest.json",
    }  # fmt: skip


def test_every_row_is_accounted_for(made: RunFolder) -> None:
    data = made.read_json("data.json")
    first, second, third = data["sources"]
    assert first["rows"] == 124
    assert first["rejected"] == {"missing column": 1}
    assert first["units"] == {"used": 121, "contaminated": 1, "duplicate": 1}
    assert sum(data["streams"]["main"]["rows"].values()) == 121
    assert data["streams"]["buffer"]["rows"]["train"] == 20
    assert sum(second["units"].values()) == 60
    assert sum(third["units"].values()) == 100
    assert data["decontamination"] == {"bread": {"prompts": 2, "rows": 1}}
    [hit] = [json.loads(line) for line in (made.path / "contamination.jsonl").read_text().splitlines()]
    assert (hit["suite"], hit["how"], hit["source"], hit["line"], hit["id"]) == ("bread", "equal", "a", 123, "r201")
    [reject] = [json.loads(line) for line in (made.path / "rejects.jsonl").read_text().splitlines()]
    assert (reject["source"], reject["line"], reject["reason"]) == ("a", 124, "missing column")
    cells = data["streams"]["main"]["cells"]
    written = [each for rows in rows_of(made).values() for each in rows]
    assert sum(sum(counts.values()) for counts in cells.values()) == 121
    for stream in ("main", "buffer"):
        rows = [each for some in rows_of(made, stream).values() for each in some]
        safe = [each[name] for each in rows for name in ("chosen_is_safe", "rejected_is_safe")]
        assert data["streams"][stream]["e_safe"] == pytest.approx(sum(safe) / len(safe))
        assert data["streams"][stream]["unsafe_completions"] == safe.count(0.0)
    assert "unknown" not in data["streams"]["buffer"]["cells"]["train"]
    conflicts = sum(each["chosen_is_safe"] == 0 and each["rejected_is_safe"] == 1 for each in written)
    assert data["streams"]["main"]["conflicts"] == conflicts > 0
    assert data["near_duplicates"]["groups"] >= 1
    assert sum(data["streams"]["main"]["languages"].values()) == 20


def test_lengths_are_those_of_the_rows(made: RunFolder) -> None:
    lengths = made.read_json("data.json")["streams"]["main"]["lengths"]
    unsafe = [each for rows in rows_of(made).values() for each in rows if not each["chosen_is_safe"]]
    both = [each for each in unsafe if not each["rejected_is_safe"]]
    texts = sorted(len(each["prompt"][0]["content"]) for each in both)
    assert lengths["unsafe-unsafe"]["prompt"]["chars"]["median"] == texts[round(0.5 * (len(texts) - 1))]
    assert lengths["unsafe-unsafe"]["prompt"]["chars"]["max"] == texts[-1]
    assert lengths["unsafe-unsafe"]["chosen"]["words"] == {
        "mean": 2.0, "p25": 2, "median": 2, "p75": 2, "p90": 2, "max": 2,
    }  # fmt: skip


def test_training_reads_what_is_written(made: RunFolder) -> None:
    for stream in ("main", "buffer"):
        loaded = load_pairs(DataConfig(files=[made.path / stream / "train.parquet"]))
        assert [pair.id for pair in loaded.pairs] == [each["id"] for each in rows_of(made, stream)["train"]]
        assert loaded.rejects == []
    completions = load_completions(SftDataConfig(files=[made.path / "sft" / "train.parquet"])).completions
    assert [each.text for each in completions] == [each["completion"] for each in rows_of(made, "sft")["train"]]
    assert AlignConfig(model="m", data={"files": str(made.path / "main" / "train.parquet")})


def test_the_datasets_library_reads_files_and_folder(made: RunFolder, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = {split: str(made.path / "main" / f"{split}.parquet") for split in ("train", "test")}
    found = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert found["train"].to_list() == rows_of(made)["train"]
    by_card = datasets.load_dataset(str(made.path), "sft", cache_dir=str(tmp_path / "card"))
    assert by_card["validation"].to_list() == rows_of(made, "sft")["validation"]


def test_licences_go_from_the_manifest_into_the_card_of_what_is_trained(made: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "train", "train", {"seed": 1})
    folder.add_data("data", made.path / "main" / "train.parquet")
    folder.add_data("buffer", made.path / "buffer" / "train.parquet")
    card = folder.write_card("A model", {}).read_text(encoding="utf-8")
    assert "| data: a | licence mit, own files |" in card
    assert "| buffer: b | licence unknown, own files |" in card
    changed = tmp_path / "copy" / "main" / "train.parquet"
    changed.parent.mkdir(parents=True)
    changed.write_bytes((made.path / "main" / "train.parquet").read_bytes() + b" ")
    (tmp_path / "copy" / "manifest.json").write_bytes((made.path / "manifest.json").read_bytes())
    other = RunFolder.create(tmp_path / "other", "train", {"seed": 1})
    other.add_data("data", changed)
    assert "| licence " not in other.write_card("A model", {}).read_text(encoding="utf-8")
    assert "library_name: transformers" in render_card("A model", {})


def test_a_data_set_of_the_table_brings_its_revision_and_licence(tmp_path: Path, monkeypatch: Any) -> None:
    rows = [
        {"prompt": row(i)["prompt"], "response_0": f"yes {i}", "response_1": f"no {i}", "better_response_id": i % 2}
        | {"is_response_0_safe": True, "is_response_1_safe": False}
        for i in range(30)
    ]
    (tmp_path / "snapshots" / "c0ffee").mkdir(parents=True)
    file = write_rows(tmp_path / "snapshots" / "c0ffee" / "data.jsonl", rows)
    asked = []

    def resolve(name: str, *, revision: str | None) -> ResolvedSource:
        asked.append((name, revision))
        return ResolvedSource(SOURCES[name], (file,), "hub", "c0ffee")

    monkeypatch.setattr("bfpo.preparation.plan.resolve_files", resolve)
    sources = [{"name": "pku-saferlhf", "revision": "v1"}, {"name": "pku-saferlhf", "stream": "sft", "use": "safe"}]
    out = prepare(tmp_path / "out", sources)
    assert asked == [("pku-saferlhf", "v1"), ("pku-saferlhf", None)]
    first = out.read_json("manifest.json")["sources"][0]
    assert (first["hub_id"], first["revision"]) == ("PKU-Alignment/PKU-SafeRLHF", "c0ffee")
    assert first["licence"] == "cc-by-nc-4.0"
    assert list(first["files"]) == ["data.jsonl"]  # its place in the data set, not on this machine
    assert "license: cc-by-nc-4.0" in (out.path / "README.md").read_text(encoding="utf-8")
    found = [each for rows in rows_of(out).values() for each in rows]
    assert {(each["chosen"][:2], each["chosen_is_safe"]) for each in found} == {("ye", 1.0), ("no", 0.0)}


def test_alpha_is_checked_against_e_safe(tmp_path: Path) -> None:
    rows = [row(i, chosen_is_safe=True, rejected_is_safe=i % 10 != 0) for i in range(100)]
    part = source(tmp_path / "a.jsonl", rows)
    [warning] = prepare(tmp_path / "low", [part], alpha=0.25).read_json("data.json")["warnings"]
    assert "alpha = 0.25 is not above E_safe / 2 = 0.475" in warning
    assert "pushed up" in warning
    assert prepare(tmp_path / "enough", [part], alpha=0.5).read_json("data.json")["warnings"] == []
    all_safe = source(tmp_path / "b.jsonl", [row(i, chosen_is_safe=True, rejected_is_safe=True) for i in range(30)])
    assert prepare(tmp_path / "safe", [all_safe], alpha=0.5).read_json("data.json")["warnings"] == []


def test_tokens_are_counted_with_a_tokenizer(tmp_path: Path) -> None:
    from helpers import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)  # which the file then sets
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = prepare(
        tmp_path / "out", [source(tmp_path / "a.jsonl", [row(i) for i in range(30)])],
        tokenizer=str(tmp_path / "tokenizer"),
    )  # fmt: skip
    lengths = out.read_json("data.json")["streams"]["main"]["lengths"]["safe-safe"]["chosen"]
    assert lengths["tokens"] == lengths["chars"]
    with raises(ConfigError, "tokenizer"):
        prepare(tmp_path / "none", [source(tmp_path / "a.jsonl", [row(1)])], tokenizer=str(tmp_path / "no"))
    (tmp_path / "odd.json").write_text("{")
    with raises(DataError, "odd.json", mask="(?<=tokenizer.json: ).*"):
        prepare(tmp_path / "odd", [source(tmp_path / "a.jsonl", [row(1)])], tokenizer=str(tmp_path / "odd.json"))


def test_categories_are_kept_where_there_are_any(tmp_path: Path) -> None:
    rows = [row(i, category=["theft", "fraud"][: i % 3]) for i in range(30)]
    named = {f"yes {i}": ("", "theft", "theft, fraud")[i % 3] for i in range(30)}
    sources = [
        source(tmp_path / "a.jsonl", rows),
        source(tmp_path / "b.jsonl", [row(100 + i) for i in range(30)], stream="buffer"),
        source(tmp_path / "c.jsonl", rows, stream="sft", use="chosen"),
    ]
    made = prepare(tmp_path / "out", sources)
    for stream, column in (("main", "chosen"), ("sft", "completion")):
        written = [each for some in rows_of(made, stream).values() for each in some]
        assert {each[column]: each["category"] for each in written} == named
    assert all("category" not in each for some in rows_of(made, "buffer").values() for each in some)
    pairs = load_pairs(DataConfig(files=[made.path / "main" / "train.parquet"])).pairs
    assert {pair.chosen: pair.category for pair in pairs}.items() <= named.items()


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = mixture(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    text, planned = plan_stage("prepare", PrepareConfig(sources=[{**sources[0], "count": 100_000}], processes=1))
    assert "a (main): 124 rows; rejected 1 (missing column 1); used 122, duplicate 1" in text
    assert "at most the first 2000 rows" in text
    assert planned["most_rows_per_file"] == 2000
    assert planned["data"].sources[0].rows == 124
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_and_blocks_do_not_change_a_byte(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, suite = mixture(tmp_path), suites(tmp_path)
    one = prepare(tmp_path / "one", sources, decontaminate=suite)
    monkeypatch.setattr(shards, "_BLOCK_ROWS", 7)
    several = prepare(tmp_path / "several", sources, decontaminate=suite, processes=processes)
    assert hashes(one) == hashes(several)
    assert len(hashes(one)) == 14


def test_row_groups_do_not_depend_on_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    monkeypatch.setattr("bfpo.preparation.write._ROWS_PER_GROUP", 16)
    for name, small in (("data_page_size", 64), ("write_batch_size", 4)):  # where a page ends shows in a small file too
        monkeypatch.setitem(write._SETTINGS, name, small)
    sources = mixture(tmp_path)
    found = []
    for rows in (5, 1024):
        monkeypatch.setattr(shards, "_BLOCK_ROWS", rows)
        found.append(hashes(prepare(tmp_path / str(rows), sources)))
    assert found[0] == found[1]
    table = pyarrow.parquet.ParquetFile(tmp_path / "5" / "main" / "train.parquet").metadata
    sizes = [table.row_group(i).num_rows for i in range(table.num_row_groups)]
    assert set(sizes[:-1]) == {16}


def test_nothing_in_the_data_tells_when_or_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = mixture(tmp_path)
    first = hashes(prepare(tmp_path / "first", sources, language_sample=5))
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    assert hashes(prepare(tmp_path / "deep" / "second", sources, language_sample=5)) == first


# ------------------------------------------------------------------------------------------- interrupted and again


def test_a_finished_run_is_left_alone_and_a_cache_serves_the_next(tmp_path: Path, monkeypatch: Any) -> None:
    sources = mixture(tmp_path)
    out = prepare(tmp_path / "out", sources, cache=str(tmp_path / "cache"))
    times = {path: path.stat().st_mtime_ns for path in out.path.rglob("*")}
    assert prepare(tmp_path / "out", sources, cache=str(tmp_path / "cache"), resume=True).finished
    assert {path: path.stat().st_mtime_ns for path in out.path.rglob("*")} == times

    def fail(*_: object) -> None:
        raise AssertionError("a source was read again")

    monkeypatch.setattr("bfpo.preparation.shards._raw_blocks", fail)
    again = prepare(tmp_path / "again", sources, cache=str(tmp_path / "cache"))
    assert hashes(again) == hashes(out)
    prepare(tmp_path / "other", sources, cache=str(tmp_path / "cache"), seed=1)
    with pytest.raises(AssertionError, match="read again"):
        prepare(tmp_path / "ngrams", sources, cache=str(tmp_path / "cache"), near_duplicates={"characters": 4})
    Path(sources[0]["files"]).write_text(json.dumps(row(1)) + "\n")
    with pytest.raises(AssertionError, match="read again"):
        prepare(tmp_path / "changed", sources, cache=str(tmp_path / "cache"))


def test_a_cache_is_not_used_by_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = source(tmp_path / "a.jsonl", [row(i) for i in range(30)])
    refusing = source(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "completion": f"a {i}"} for i in range(30)])
    sources = [plain, refusing | {"stream": "sft", "leave_out": ["refused"]}]
    cache = tmp_path / "cache"
    changes: list[tuple[str, object, int]] = [
        ("SHARD_VERSION", shards.SHARD_VERSION, 2),
        ("RefusalJudge", lambda: SimpleNamespace(version="other"), 3),
        ("__version__", "other", 5),
    ]
    prepare(tmp_path / "out", sources, cache=str(cache))
    for name, changed, made in changes:
        with monkeypatch.context() as patch:
            patch.setattr(shards, name, changed)
            prepare(tmp_path / name, sources, cache=str(cache))
        assert len(list(cache.iterdir())) == made, name


def test_only_what_nothing_is_written_to_is_removed_from_a_cache(tmp_path: Path) -> None:
    old = time.time() - 2 * 86_400
    for name, newest in (("left", old), ("used", time.time())):
        part = tmp_path / f".{name}.part"
        part.mkdir()
        for file, when in (("rows.arrow", newest), ("keys.bin", old)):
            (part / file).write_text("")
            os.utime(part / file, (when, when))
        os.utime(part, (old, old))
    shards.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".used.part"]


def test_a_source_that_another_run_has_read_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, cache = [source(tmp_path / "a.jsonl", [row(i) for i in range(30)])], tmp_path / "cache"
    read = shards._raw_blocks

    def twice(*args: Any) -> Iterator[Any]:
        monkeypatch.setattr(shards, "_raw_blocks", read)
        prepare(tmp_path / "other", sources, cache=str(cache))
        return read(*args)

    monkeypatch.setattr(shards, "_raw_blocks", twice)
    made = prepare(tmp_path / "out", sources, cache=str(cache))
    assert hashes(made) == hashes(tmp_path / "other")
    assert len(list(cache.iterdir())) == 1


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("first", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2))])
def test_a_kill_at_any_write_leaves_whole_files_only_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    sources = mixture(tmp_path)[::2]
    settings: dict[str, Any] = {"near_duplicates": None}
    wanted = hashes(prepare(tmp_path / "whole", sources, **settings))
    real = Path.replace
    ends: list[bool] = []
    for moment in range(first, 100, 3):
        calls = 0

        def replace(self: Path, target: Path, moment: int = moment) -> Path:
            nonlocal calls
            calls += 1
            if calls > moment:  # nothing is renamed from here on, as after a kill
                raise _Killed
            return real(self, target)

        out = tmp_path / f"out{moment}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            try:
                prepare(out, sources, **settings)
                break
            except _Killed:
                ends.append((out / "manifest.json").exists())
        if ends[-1]:
            assert hashes(out) == wanted
        for file in out.glob("*/*.parquet"):
            assert bfpo.core.files.file_digest(file) == wanted[str(file.relative_to(out))]
        assert hashes(prepare(out, sources, resume=(out / "run.json").exists(), **settings)) == wanted
        assert not list(out.rglob("*.part"))
    assert len(ends) > 5
    assert not all(ends)


@pytest.mark.slow
def test_a_run_that_is_killed_with_its_processes_is_resumed(tmp_path: Path) -> None:
    rows = [row(i) for i in range(30_000)]
    part = source(tmp_path / "a.jsonl", rows)
    wanted = hashes(prepare(tmp_path / "whole", [part]))
    config = tmp_path / "mixture.yaml"
    config.write_text(
        f"sources: [{{name: a, files: {part['files']}}}]\nprocesses: 2\nlanguage_sample: 0\n"
        "splits: {validation: 0.2, test: 0.2}\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bfpo", "prepare", "--config", str(config), "--out", str(out), "--resume"]
    for seconds in (1.0, 2.5, 4.0, 6.0):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for file in out.glob("*/*.parquet"):
            assert bfpo.core.files.file_digest(file) == wanted[str(file.relative_to(out))]
    subprocess.run(command, check=True)
    assert {name: digest for name, digest in hashes(out).items() if name.endswith("parquet")} == {
        name: digest for name, digest in wanted.items() if name.endswith("parquet")
    }
    assert not (out / "work").exists()


# --------------------------------------------------------------------------------------------------- bad input


def test_the_command_line_says_what_is_wrong_and_exits_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(row(1, chosen=1)) + "\n[]\n")
    result = CliRunner().invoke(
        app, ["prepare", "--set", f"sources=[{{name: a, files: {bad}}}]", "--out", str(tmp_path / "out")]
    )
    fails(result, "a", f"{bad}:1: chosen", f"{bad}:2: row")
    assert not list((tmp_path / "out").glob("*/*.parquet"))


def test_an_empty_file_and_an_empty_suite_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with raises(DataError):
        prepare(tmp_path / "out", [{"name": "empty", "files": str(tmp_path / "empty.jsonl")}])
    (tmp_path / "empty.txt").write_text("")
    with raises(BfpoError):
        prepare(
            tmp_path / "suite", [source(tmp_path / "a.jsonl", [row(1)])],
            decontaminate=[{"name": "s", "files": str(tmp_path / "empty.txt")}],
        )  # fmt: skip


def test_rows_without_a_prompt_are_split_each_on_its_own(tmp_path: Path) -> None:
    out = prepare(tmp_path / "out", [source(tmp_path / "a.jsonl", [row(i, prompt="") for i in range(100)])])
    assert {split: len(rows) > 5 for split, rows in rows_of(out).items()} == {
        "train": True, "validation": True, "test": True,
    }  # fmt: skip


def test_memory_is_flat_in_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes a row at the peak: hashes, counts and places. The text of a row takes more than 1,800."""
    monkeypatch.setattr(shards, "_BLOCK_ROWS", 64)
    monkeypatch.setattr("bfpo.preparation.write._ROWS_PER_GROUP", 64)
    peak = {}
    for run, num in enumerate((200, 200, 1200)):  # the first time, what Python keeps once is made
        rows = [row(k, chosen=f"a{k} " * 200, rejected=f"b{k} " * 200) for k in range(num)]
        sources = [source(tmp_path / f"{run}.jsonl", rows)]
        del rows
        tracemalloc.start()
        prepare(tmp_path / str(run), sources, language_sample=20)
        peak[num] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peak[1200] - peak[200]) / 1000 < 400
