"""Cards name no place on this machine, and nothing else in them changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bfpo.core.places import without_places


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("| model | /scratch/anna/start/model |", "| model | model |"),
        ("| data: /data/a/pairs.jsonl | SHA-256 ab, 3 bytes |", "| data: pairs.jsonl | SHA-256 ab, 3 bytes |"),
        ("'/a/b/c.json', /d/e/f and ~/g/h.", "'c.json', f and h."),
        (r"C:\Users\anna\pairs.jsonl", "pairs.jsonl"),
        ("https://huggingface.co/datasets/a/b at runs/x/model", "https://huggingface.co/datasets/a/b at runs/x/model"),
        ("nats/token, and/or, 1 / 2, a/b/c, ../x/y, ./x/y", "nats/token, and/or, 1 / 2, a/b/c, ../x/y, ./x/y"),
        ("licence mit, acme/ultra at 0123", "licence mit, acme/ultra at 0123"),
        ("| model | //nas/models/x |", "| model | x |"),
        (r"\\server\share\x and a // b", "x and a // b"),
    ],
)
def test_absolute_paths_become_names(text: str, shown: str) -> None:
    assert without_places(text) == shown


def test_paths_that_are_known_are_shortened_whatever_they_look_like() -> None:
    known = ["/model", "/model 2/start", "/data.jsonl", "acme/x", "/"]
    text = "# /model, trained\n| /data.jsonl | /model/ | /model 2/start. | /no_think | org/model, ../model, /models |"
    shown = "# model, trained\n| data.jsonl | model | start. | /no_think | org/model, ../model, /models |"
    assert without_places(text, known) == shown


def test_what_is_below_the_current_or_the_home_folder_keeps_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "a home"))
    text = f"{tmp_path}/runs/a/model and {tmp_path}/a home/data/pairs.jsonl"
    assert without_places(text) == "runs/a/model and data/pairs.jsonl"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/pairs.jsonl", "pairs.jsonl"),
        ("| /mnt/data/pairs.jsonl |", "| pairs.jsonl |"),
        ("http://host:8000/data/v1", "http://host:8000/data/v1"),
        ("hf://datasets/acme/data/train.parquet", "hf://datasets/acme/data/train.parquet"),
        ("http://data/v1", "http://data/v1"),
        ("file:///data/runs/a and sqlite:////data/runs.db", "file://runs/a and sqlite:///runs.db"),
    ],
)
def test_the_current_folder_is_not_taken_out_of_other_paths_and_addresses(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path("/data"))
    assert without_places(text) == shown
