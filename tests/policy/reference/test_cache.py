from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bfpo.core.files import user_cache_folder
from bfpo.policy.reference.cache import ReferenceCache

KEYS = [bytes([i]) * 16 for i in range(6)]
LOGPS = np.random.default_rng(0).normal(-3000, 900, (6, 2))


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    """A cache of two shards: rows 0-2 and rows 3-4."""
    cache = ReferenceCache(tmp_path, "model", {"class": "Llama"})
    cache.write(KEYS[:3], LOGPS[:3])
    cache.write(KEYS[3:5], LOGPS[3:5])
    return cache


def shard(cache: ReferenceCache, rows: int = 3) -> Path:
    """The shard with that many rows."""
    manifests = {path: json.loads(path.read_text()) for path in cache.folder.glob("*.json")}
    return next(path for path, manifest in manifests.items() if manifest["rows"] == rows).with_suffix(".parquet")


def test_rows_come_back_bit_for_bit(cache: ReferenceCache, tmp_path: Path) -> None:
    order = [4, 0, 5, 2]
    found = ReferenceCache(tmp_path, "model").find([KEYS[i] for i in order])
    assert np.isnan(found[2]).all()
    assert (found[[0, 1, 3]] == LOGPS[[4, 0, 2]]).all()
    assert np.isnan(ReferenceCache(tmp_path, "other").find(KEYS)).all()
    assert ReferenceCache(tmp_path, "model").find([]).shape == (0, 2)


def test_a_manifest_says_what_its_shard_is(cache: ReferenceCache) -> None:
    path = shard(cache)
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (manifest["rows"], manifest["model_key"], manifest["class"]) == (3, "model", "Llama")
    assert len(list(cache.folder.iterdir())) == 4  # nothing unfinished lies about


def change_manifest(path: Path, **values: Any) -> None:
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**manifest, **values}))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def not_parquet(path: Path) -> None:
    path.write_bytes(b"rows")
    change_manifest(path, sha256=hashlib.sha256(b"rows").hexdigest())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "damaged: its checksum"),
        (lambda path: path.write_bytes(b""), "damaged: its checksum"),
        (flip_a_bit, "damaged: its checksum"),
        (not_parquet, "not a Parquet file"),
        (lambda path: path.with_suffix(".json").unlink(), "has no manifest"),
        (lambda path: path.with_suffix(".json").write_text('{"sha'), "its manifest is not JSON"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "its manifest is not a JSON object"),
        (lambda path: change_manifest(path, model_key="stranger"), "belongs to the model stranger"),
        (lambda path: change_manifest(path, logps_version=0), "written by another version"),
        (lambda path: change_manifest(path, rows=4), "another number of rows"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_named_once_and_not_read(
    cache: ReferenceCache, spoil: Callable[[Path], Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = shard(cache)
    spoil(path)
    found = cache.find(KEYS)
    assert np.isnan(found[[0, 1, 2, 5]]).all()
    assert (found[3:5] == LOGPS[3:5]).all()  # the other shard is not touched
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert path.name in record.getMessage()
    assert words in record.getMessage()
    assert np.isnan(cache.find(KEYS)[:3]).all()
    assert len(caplog.records) == 1  # it is set aside
    cache.write(KEYS[:3], LOGPS[:3])
    assert (cache.find(KEYS[:5]) == LOGPS[:5]).all()
    assert len(caplog.records) == 1


def test_a_foreign_shard_copied_with_its_manifest_is_found_out(
    cache: ReferenceCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = ReferenceCache(tmp_path, "other")
    cache.folder.rename(other.folder)
    assert np.isnan(other.find(KEYS)).all()
    (record,) = caplog.records
    assert record.getMessage().count("belongs to the model model") == 2


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    one, other = ReferenceCache(tmp_path, "model"), ReferenceCache(tmp_path, "model")
    assert np.isnan(one.find(KEYS)).all()
    assert np.isnan(other.find(KEYS)).all()
    one.write(KEYS[:2], LOGPS[:2])
    other.write(KEYS[1:4], LOGPS[1:4])
    one.write(KEYS[4:], LOGPS[4:])
    other.write(KEYS[4:], LOGPS[4:])  # the very same shard
    assert (ReferenceCache(tmp_path, "model").find(KEYS) == LOGPS).all()


def test_a_writer_killed_before_its_shard_leaves_nothing_to_warn_of(
    cache: ReferenceCache, caplog: pytest.LogCaptureFixture
) -> None:
    shard(cache).unlink()
    assert np.isnan(cache.find(KEYS)[:3]).all()
    assert not caplog.records


def test_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, own_cache_folder: Path, tmp_path: Path) -> None:
    assert user_cache_folder("reference") == own_cache_folder / "bfpo" / "reference"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_folder("reference") == tmp_path / ".cache" / "bfpo" / "reference"
