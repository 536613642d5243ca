"""The tokens of a run folder: streamed there, found again, made anew where what they come from differs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bfpo.data.load import PairStream, load_pairs
from bfpo.data.settings import DataConfig
from bfpo.data.store import TokenStore
from bfpo.data.tokenize import tokenize_pairs
from bfpo.runs.folder import RunFolder
from bfpo.training.tokens import token_stores
from helpers import CHATML, byte_tokenizer
from messages import says

SKIP: dict[str, Any] = {"bad_rows": "skip"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    labels = {"chosen_is_safe": True, "rejected_is_safe": False}
    rows = [{"prompt": f"q{i % 3}", "chosen": f"a{i}", "rejected": f"b{i}", **labels} for i in range(7)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n")
    return path


def stores(
    file: Path,
    name: str = "run",
    *,
    seed: int = 0,
    template: str | None = None,
    max_length: int = 25,
    cache: Path | None = None,
) -> tuple[dict[str, TokenStore], list[str]]:
    """Return the stores of a run, opened again if it is there, and the streams that were written."""
    sections = {"data": {**SKIP, "files": [str(file)]}, "buffer": {**SKIP, "files": [str(file)], "limit": 3}}
    folder = RunFolder.create(file.parent / name, "train", {**sections, "seed": seed}, resume=True)
    for section in sections:
        folder.add_data(section, file)
    before = {path: path.stat().st_ino for path in (cache or folder.path / "tokens").glob("*")}
    streams = {section: PairStream(DataConfig(**settings), seed=seed) for section, settings in sections.items()}
    shared = None if cache is None else str(cache)
    found = token_stores(folder, streams, byte_tokenizer(template), cache=shared, max_length=max_length)
    written = [section for section, store in found.items() if store.path.stat().st_ino != before.get(store.path)]
    return found, written


def test_the_first_time_everything_is_written(file: Path) -> None:
    found, written = stores(file)
    assert written == ["data", "buffer"]
    for name, settings in (("data", SKIP), ("buffer", {**SKIP, "limit": 3})):
        loaded = load_pairs(DataConfig(files=[file], **settings))
        pairs, report = tokenize_pairs(loaded.pairs, byte_tokenizer(), max_length=25)
        assert [pair.prompt_ids.tolist() for pair in found[name]] == [pair.prompt_ids.tolist() for pair in pairs]
        assert [pair.pair_id for pair in found[name]] == [pair.pair_id for pair in pairs]
        assert found[name].facts["counts"] == loaded.counts
        assert found[name].facts["tokens"] == report.as_row()
    rejects = [json.loads(line) for line in (file.parent / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["input"], row["line"], row["reason"]) for row in rejects] == [
        ("data", 8, "invalid JSON"),
        ("buffer", 8, "invalid JSON"),
    ]


def test_a_resumed_run_reads_no_pair_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = stores(file)
    monkeypatch.delattr(PairStream, "_read")
    again, written = stores(file)
    assert written == []
    assert [pair.chosen_ids.tolist() for pair in again["buffer"]] == [
        pair.chosen_ids.tolist() for pair in first["buffer"]
    ]
    assert again["data"].facts == first["data"].facts


def test_runs_that_share_a_cache_tokenize_what_is_the_same_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenized(run: str) -> dict[str, int]:
        return dict(json.loads((file.parent / run / "run.json").read_text())["tokenized"])

    cache = file.parent / "cache"
    first, _ = stores(file, "one", cache=cache)
    assert tokenized("one") == {"data": 7, "buffer": 3}
    assert not (file.parent / "one" / "tokens").exists()
    _, written = stores(file, "longer", max_length=24, cache=cache)
    assert written == ["data", "buffer"]
    with monkeypatch.context() as patch:
        patch.delattr("bfpo.data.tokenize.PairTokenizer.__call__")
        patch.delattr(PairStream, "_read")  # no row is read or rendered again
        again, written = stores(file, "two", cache=cache)
    assert (written, tokenized("two")) == ([], {"data": 0, "buffer": 0})
    assert [pair.chosen_ids.tolist() for pair in again["data"]] == [pair.chosen_ids.tolist() for pair in first["data"]]
    assert (file.parent / "two" / "rejects.jsonl").read_bytes() == (file.parent / "one" / "rejects.jsonl").read_bytes()
    again["data"].path.write_bytes(b"torn")
    assert stores(file, "three", cache=cache)[1] == ["data"]


@pytest.mark.parametrize("change", [{"template": CHATML}, {"max_length": 24}])
def test_another_template_or_length_makes_tokens_anew(file: Path, change: dict[str, Any]) -> None:
    stores(file)
    assert stores(file, **change)[1] == ["data", "buffer"]


@pytest.mark.parametrize(("seed", "expected"), [(0, []), (1, ["data", "buffer"])])
def test_tokens_of_another_seed_are_not_taken(file: Path, seed: int, expected: list[str]) -> None:
    stores(file)
    shutil.copytree(file.parent / "run", file.parent / "copy")
    record = json.loads((file.parent / "copy" / "run.json").read_text())
    record["config"]["seed"] = seed
    (file.parent / "copy" / "run.json").write_text(json.dumps(record))
    assert stores(file, "copy", seed=seed)[1] == expected


def test_a_damaged_store_is_written_anew_with_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = stores(file)[0]["buffer"].path
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        found, written = stores(file)
    assert written == ["buffer"]
    assert len(found["buffer"]) == 3
    says(caplog, "buffer.arrow")


NODES = """
import sys, time
from pathlib import Path
from transformers import TrainingArguments
from bfpo.training.tokens import _first_process_first

args = TrainingArguments(output_dir={out!r}, use_cpu=True)
with _first_process_first(args):
    there = Path({out!r}, "tokens").exists()
    if args.process_index == 0:
        time.sleep(1)
        Path({out!r}, "tokens").touch()
print(args.process_index, args.local_process_index, there)
"""


@pytest.mark.slow
def test_the_first_process_of_another_machine_waits_for_the_first_of_all(tmp_path: Path) -> None:
    """Two machines with a common folder, of which both have a process 0 of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-c", NODES.format(out=str(tmp_path))]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **group, "MASTER_PORT": port, "RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=200)[0].split() for process in processes]
    assert said == [["0", "0", "False"], ["1", "0", "True"]]
