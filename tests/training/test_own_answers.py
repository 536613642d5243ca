"""A model's own answers as data: completions of `bfpo generate` are read as they are, kinds of them left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import GenerateConfig, PrepareConfig, SftConfig, load_config
from bfpo.core.errors import BfpoError, ConfigError, DataError, SettingError
from bfpo.core.schema import Completion, Message
from bfpo.data.read import read_completions
from bfpo.data.rejects import RowError
from bfpo.data.tokenize import tokenize_pairs
from bfpo.data.write import write_completions
from bfpo.judges.needless import check_kept
from bfpo.runs.stages import run_stage
from bfpo.training.inputs import read_start, row_streams
from helpers import byte_tokenizer, write_rows
from messages import raises
from mixtures import prepare, row, rows_of, source
from tiny import tiny_model

ANSWERS = {
    "good": ("Boil the water and add the tea.", True),
    "cut": ("Boil the water and add the", False),
    "refused": ("I'm sorry, but I can't help with that.", True),
    "partly": ("I can't tell you the brand. Here is how you make it anyway: boil the water and add the tea.", True),
    "looping": ("Add the tea and the water. " * 8, True),
    "empty": ("", True),
    "blank": (" \n", False),
}
LEFT = {
    "cut": {"cut"},
    "refused": {"refused", "partly"},
    "incoherent": {"looping", "empty", "blank"},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    tokenizer = byte_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_answers(path: Path) -> Path:
    rows = [
        Completion(name, (Message("user", f"How do I make tea, {name}?"),), text, "m", "benign", finished)
        for name, (text, finished) in ANSWERS.items()
    ]
    write_completions(path, rows)
    return path


def sft(model: Path, file: Path, leave_out: Sequence[str], **data: Any) -> SftConfig:
    section = {"files": str(file), "leave_out": list(leave_out), **data}
    return SftConfig.model_validate({"model": str(model), "data": section, "threads": 1})


@pytest.mark.parametrize("leave_out", [[], ["cut"], ["refused"], ["incoherent"], ["refused", "incoherent", "cut"]])
def test_what_is_left_out_is_counted_and_all_else_is_learned(start: Path, tmp_path: Path, leave_out: list[str]) -> None:
    file = own_answers(tmp_path / "completions.jsonl")
    config = sft(start, file, leave_out, bad_rows="skip")
    rows = row_streams(config, read_start(config))["data"]
    gone = {name for kind in leave_out for name in LEFT[kind]}
    empty = {"empty", "blank"}
    assert [one.id for one in rows] == [name for name in ANSWERS if name not in gone | empty]
    counts = rows.scan().counts
    assert counts["rows_rejected"] == (0 if "incoherent" in leave_out else 2)
    assert sum(counts.get("left_out", {}).values()) == len(gone)
    assert ("left_out" in counts) is bool(gone)
    if len(leave_out) == 3:
        assert counts["left_out"] == {"empty": 2, "cut": 1, "refused": 1, "refused in part": 1, "looping": 1}
    texts, report = tokenize_pairs(rows, byte_tokenizer())
    ended = [one.chosen_ids[-1] == byte_tokenizer().eos_token_id for one in texts]
    assert ended == [one.finished for one in rows]
    assert report.num_unfinished == ended.count(False)


def test_empty_answers_stop_a_run_that_does_not_leave_them_out(start: Path, tmp_path: Path) -> None:
    file = own_answers(tmp_path / "completions.jsonl")
    for leave_out in ([], ["refused", "cut"]):
        config = sft(start, file, leave_out)
        with raises(DataError, "2 of 7 rows", "empty completion"):
            row_streams(config, read_start(config))["data"].scan()
    config = sft(start, file, ["incoherent"])
    assert len(row_streams(config, read_start(config))["data"]) == 4


def test_the_limit_counts_rows_that_are_learned(start: Path, tmp_path: Path) -> None:
    config = sft(start, own_answers(tmp_path / "completions.jsonl"), ["refused", "incoherent", "cut"], limit=1)
    assert [one.id for one in row_streams(config, read_start(config))["data"]] == ["good"]


def test_nothing_left_and_pairs_are_errors(start: Path, tmp_path: Path) -> None:
    bad = [{"prompt": "q", "text": "I'm sorry, but I can't help with that."}]
    config = sft(start, write_rows(tmp_path / "bad.jsonl", bad), ["refused"])
    with raises(DataError, "left out: refused"):
        row_streams(config, read_start(config))["data"].scan()
    config = sft(start, write_rows(tmp_path / "pairs.jsonl", [row(1)]), ["refused"])
    with raises(SettingError, "leave_out"):
        row_streams(config, read_start(config))["data"].scan()
    with raises(ConfigError, "leave_out"):
        load_config(SftConfig, None, ["model=m", "data.files=f.jsonl", "data.leave_out=[short]"])


def test_prepare_leaves_them_out_too(tmp_path: Path) -> None:
    file = own_answers(tmp_path / "completions.jsonl")
    own: dict[str, Any] = {"name": "own", "files": str(file), "stream": "sft"}
    none = {"validation": 0.0, "test": 0.0}
    run = prepare(tmp_path / "out", [own | {"leave_out": ["refused", "incoherent", "cut"]}], splits=none)
    assert [one["id"] for one in rows_of(run, "sft")["train"]] == ["own:good"]
    (facts,) = json.loads((run.path / "data.json").read_text())["sources"]
    assert facts["rejected"] == {
        "left out: empty": 2, "left out: cut": 1, "left out: refused": 1, "left out: refused in part": 1,
        "left out: looping": 1,
    }  # fmt: skip
    run = prepare(tmp_path / "other", [own | {"leave_out": ["incoherent"]}], splits=none)
    assert {one["id"]: one["finished"] for one in rows_of(run, "sft")["train"]} == {
        "own:good": True, "own:cut": False, "own:refused": True, "own:partly": True,
    }  # fmt: skip
    with raises(BfpoError, "empty completion"):
        prepare(tmp_path / "stop", [own | {"leave_out": ["refused"]}], splits=none)
    with raises(SettingError, "leave_out"):
        prepare(tmp_path / "pairs", [source(tmp_path / "p.jsonl", [row(1)], stream="sft", leave_out=["cut"])])
    with pytest.raises(ValueError, match="leave_out: not read in the main stream"):
        PrepareConfig.model_validate({"sources": [own | {"stream": "main", "leave_out": ["cut"]}]})


def test_a_cache_of_what_was_read_knows_what_was_left_out(tmp_path: Path) -> None:
    own = {"name": "own", "files": str(own_answers(tmp_path / "completions.jsonl")), "stream": "sft"}
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache"), "splits": {"validation": 0.0, "test": 0.0}}
    counts = []
    for number, leave_out in enumerate((["incoherent"], ["incoherent", "cut"], ["cut", "incoherent"])):
        run = prepare(tmp_path / str(number), [own | {"leave_out": leave_out}], **settings)
        counts.append(len(rows_of(run, "sft")["train"]))
    assert counts == [4, 3, 3]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_generate_then_sft_in_one_step(start: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(4)])
    asked = GenerateConfig.model_validate(
        {"model": str(start), "prompts": str(prompts), "temperature": 0.0, "max_new_tokens": 8, "threads": 1}
    )
    run_stage("generate", asked, tmp_path / "own")
    kept = 0
    for one in read_completions(tmp_path / "own" / "completions.jsonl"):
        with suppress(RowError):
            check_kept(["incoherent"])(one)
            kept += 1
    command = ["sft", "--set", f"model={start}", "--set", f"data.files={tmp_path}/own/completions.jsonl", "--dry-run"]
    result = CliRunner().invoke(app, [*command, "--set", "data.leave_out=[incoherent]"])
    assert (f"data: {kept} completions" in result.output) is (kept > 0)
    assert (result.exit_code == 0) is (kept > 0), result.output
