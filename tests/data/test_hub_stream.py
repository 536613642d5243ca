"""Data sets of a hub on loopback, read over the network: the rows of their files, and no more than is needed."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from bfpo.config import AlignConfig, EvaluateConfig, SftConfig, load_config
from bfpo.core.errors import ConfigError, DataError, LabelError, ServerError
from bfpo.data import hub_stream
from bfpo.data.hub_files import find_hub_files
from bfpo.data.load import PairStream, load_completions, load_pair_rows, load_pairs
from bfpo.data.settings import DataConfig, SftDataConfig
from bfpo.policy.save import save_policy
from bfpo.runs.hub_data import files_of_record, with_hub_files
from bfpo.runs.stages import preview_stage, run_stage
from messages import raises
from support.hub_server import COMMIT, HubServer, connect
from tiny import tiny_model, tiny_tokenizer

ROWS = [
    {
        "prompt": f"w{i} w3",
        "chosen": " ".join(f"w{random.Random(i).randrange(90)}" for _ in range(3)),
        "rejected": random.Random(i).randbytes(500).hex(),
        "chosen_is_safe": i % 2 == 0,
        "rejected_is_safe": i % 3 == 0,
        "note": f"n{i}",
    }
    for i in range(1200)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
KINDS = ("train.jsonl", "train.jsonl.gz", "train.jsonl.xz", "train.jsonl.zst", "train.json", "train.csv")
KINDS += ("train.parquet", "train.arrow")


def write(file: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=100)
    elif file.suffix == ".arrow":
        with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=100)
    elif file.suffix == ".json":
        file.write_text(json.dumps(ROWS))
    elif file.suffix == ".csv":
        names = list(ROWS[0])
        file.write_text("\n".join([",".join(names), *(",".join(str(row[name]) for name in names) for row in ROWS)]))
    else:
        packed = {".jsonl": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
        zst = pyarrow.Codec("zstd").compress
        file.write_bytes(packed[file.suffix](LINES) if file.suffix in packed else bytes(zst(LINES, asbytes=True)))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    for kind in KINDS:
        folder = root / kind.removeprefix("train.")
        folder.mkdir()
        write(folder / kind)
    (root / "two" / "data").mkdir(parents=True)
    for number in range(2):
        (root / "two" / "data" / f"train-{number}.jsonl").write_bytes(LINES[number * 100_000 :].partition(b"\n")[2])
    (root / "two" / "README.md").write_text("---\nlicense: mit\n---\n")
    (root / "small").mkdir()
    (root / "small" / "train.jsonl").write_bytes(b"\n".join(LINES.splitlines()[:12]))
    return {f"datasets/acme/{folder.name}": folder for folder in root.iterdir()}


@pytest.fixture
def hub(repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(dict(repositories)) as server:
        connect(monkeypatch, server, tmp_path / "cache")
        monkeypatch.setattr(hub_stream, "_FIRST_BYTES", 1 << 14)
        monkeypatch.setattr(hub_stream, "_READ_BYTES", 1 << 13)
        monkeypatch.setattr(hub_stream, "_MOST_BYTES", 1 << 16)
        yield server


def streamed(name: str, **settings: Any) -> DataConfig:
    config = AlignConfig(model="m", data={"hub": f"acme/{name}", "streaming": True, **settings})
    return with_hub_files(config)[0].data


def copies(cache: Path) -> list[Path]:
    """Return the data files that were kept on this disk."""
    return [file for file in cache.rglob("*") if file.is_file() and file.name.startswith("train")]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_file(hub: HubServer, kind: str, tmp_path: Path) -> None:
    name = kind.removeprefix("train.")
    data = streamed(name)
    assert data.files == [f"hf://datasets/acme/{name}@{COMMIT}/{kind}"]
    local = DataConfig(files=[str(hub.repositories[f"datasets/acme/{name}"] / kind)])
    rows = list(PairStream(data))
    assert rows == list(PairStream(local))
    assert len(rows) == len(ROWS)
    assert not copies(tmp_path)
    size = (hub.repositories[f"datasets/acme/{name}"] / kind).stat().st_size
    assert 1.8 * size <= hub.sent[kind] <= 4 * size  # checked and used; in some kinds the layout needs a part, too


@pytest.mark.parametrize("kind", ["train.jsonl", "train.jsonl.gz", "train.csv", "train.parquet", "train.arrow"])
def test_reading_ends_with_the_limit(hub: HubServer, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bfpo.data.columnar._ROWS_PER_BATCH", 50)
    name = kind.removeprefix("train.")
    data = streamed(name, limit=7)
    hub.sent.clear()
    scan = PairStream(data).scan()
    assert (scan.counts["pairs"], scan.counts["rows"]) == (7, 7)
    size = (hub.repositories[f"datasets/acme/{name}"] / kind).stat().st_size
    assert 0 < hub.sent[kind] < 0.4 * size
    assert [pair.prompt[0].content for pair in load_pairs(data).pairs] == [f"w{i} w3" for i in range(7)]
    assert [pair.prompt[0].content for pair in PairStream(data)] == [f"w{i} w3" for i in range(7)]


def test_files_after_the_limit_are_not_opened(hub: HubServer) -> None:
    data = streamed("two", limit=400)
    assert len(load_pairs(data).pairs) == 400
    assert {file for file, num in hub.sent.items() if num} == {"README.md", "data/train-0.jsonl"}
    assert len(load_pair_rows(data).pairs) == 400
    assert hub.sent["data/train-1.jsonl"] == 0
    assert len(load_pairs(streamed("two", limit=1500)).pairs) == 1500
    assert hub.sent["data/train-1.jsonl"] > 0


def test_a_limit_counts_usable_rows_of_the_part_of_a_split(hub: HubServer) -> None:
    split = {"parts": {"a": 0.2, "b": 0.8}, "part": "a"}
    some = [pair.id for pair in load_pairs(streamed("jsonl", split=split, limit=9)).pairs]
    assert hub.sent["train.jsonl"] < len(LINES) / 2
    everything = [pair.id for pair in load_pairs(streamed("jsonl", split=split)).pairs]
    assert some == everything[:9]
    # which prompts are held out is known after the last row only
    hub.sent.clear()
    held = load_pairs(streamed("jsonl", split={"held_out": 50}, limit=9)).pairs
    assert hub.sent["train.jsonl"] > 0.9 * len(LINES)
    assert [pair.id for pair in held] == [
        pair.id for pair in load_pairs(streamed("jsonl", split={"held_out": 50})).pairs
    ][:9]


@pytest.mark.parametrize("limit", [7, None])
def test_an_error_in_the_rows_ends_the_reading(
    hub: HubServer, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bfpo.data.load._ROWS_OF_ERROR", 50)
    unlabelled = streamed("jsonl", limit=limit, columns={"chosen_is_safe": None, "rejected_is_safe": None})
    with raises(LabelError, str(limit or 50)):
        load_pairs(unlabelled)
    of_pairs = SftDataConfig(
        files=unlabelled.files, streaming=True, limit=limit, columns=unlabelled.columns, use="safe"
    )
    with raises(LabelError, str(limit or 50)):
        load_completions(of_pairs)
    bad = streamed("jsonl", limit=limit, columns={"chosen": "rejected_is_safe"})
    with raises(DataError, "train.jsonl:1", str(limit or 50)):
        load_pairs(bad)
    assert 0 < hub.sent["train.jsonl"] < len(LINES) / 2


def test_notes_on_a_file_are_made_where_its_rest_is_not_read(hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bfpo"):
        data = streamed("jsonl", limit=7)
        counts = load_pairs(data).counts
    assert counts["columns_not_read"] == {data.files[0]: ["note"]}
    assert "first 7 rows" in caplog.text


def test_long_reading_shows_progress(
    hub: HubServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_stream, "_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "bfpo"):
        PairStream(streamed("jsonl")).scan()
    assert f"hf://datasets/acme/jsonl@{COMMIT}/train.jsonl: at " in caplog.text


def test_the_digest_of_a_file_is_asked_for_and_the_file_is_not_read(hub: HubServer) -> None:
    for name in ("parquet", "small"):
        (file,) = find_hub_files(f"acme/{name}", streaming=True).files
        body = (hub.repositories[f"datasets/acme/{name}"] / file.name).read_bytes()
        digest = {"sha256": hashlib.sha256(body).hexdigest()} if name == "parquet" else None
        digest = digest or {"git_sha1": hashlib.sha1(body).hexdigest()}
        assert hub_stream.remote_facts(file) == {**digest, "bytes": len(body)}
    assert not hub.sent


def test_a_file_that_cannot_be_read_on_is_said(hub: HubServer, tmp_path: Path) -> None:
    for name, kind in (("cut", "train.jsonl"), ("cut-table", "train.parquet")):
        write((folder := tmp_path / name).mkdir() or folder / kind)
        hub.repositories[f"datasets/acme/{name}"] = folder
        data = streamed(name)
        assert hub_stream.remote_facts(data.files[0])["bytes"]
        (folder / kind).write_bytes((folder / kind).read_bytes()[:20_000])
        with raises(ServerError, f"hf://datasets/acme/{name}@{COMMIT}/{kind}"):
            PairStream(data).scan()


def test_a_hub_that_is_lost_is_not_bad_data(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = streamed("small")
    monkeypatch.setattr(hub, "answer", lambda path: (501, {}, b"{}"))
    with raises(ServerError, "train.jsonl", "again"):
        load_pairs(streamed_again(data))
    with raises(ServerError, "data.hub", "acme/two", mask=r"(?<=<quoted error>)\.?") as caught:
        streamed("two")
    assert getattr(caught.value, "exit_code", None) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"hub": "acme/nobody"}, ("data.hub", "acme/nobody", "files")),
        ({"hub": "acme/two", "split": "dev"}, ("data.hub", "dev")),
        ({"hub": "acme/two", "files": "other/*"}, ("data.hub", f"hf://datasets/acme/two@{COMMIT}", "other/*")),
        ({"hub": "acme/two", "revision": "v2"}, ("data.hub", "revision")),
    ],
)
def test_what_is_not_there_is_said(hub: HubServer, data: dict[str, Any], words: tuple[str, ...]) -> None:
    with raises(DataError, *words):
        with_hub_files(SftConfig(model="m", data={**data, "streaming": True}))


def test_a_private_data_set_needs_a_login(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.password = "hf_secret"
    with raises(DataError, "data.hub", "login"):
        streamed("small")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    data = streamed("small")
    assert len(load_pairs(data).pairs) == 12
    hub.password = "hf_other"
    with raises(DataError, "train.jsonl", "login"):
        load_pairs(streamed_again(data))


def streamed_again(data: DataConfig) -> DataConfig:
    """Return the section without what is known of the hub and its files in this process."""
    hub_stream._first_bytes.cache_clear()
    return data


def test_without_the_hub_one_message_says_so(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with raises(DataError, "data.hub", "files"):
        streamed("two")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    streamed("two")  # the card is in the cache now
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.HfFileSystem().invalidate_cache()
    with raises(DataError, "files"):
        load_pairs(streamed("two"))


def test_a_training_streams_and_is_resumed_without_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_policy(tiny_model(max_position_embeddings=512), tiny_tokenizer(), tmp_path / "start")
    common: dict[str, Any] = {"model": str(tmp_path / "start"), "max_steps": 2, "completions_per_step": 4, "threads": 1}

    def config(**data: Any) -> SftConfig:
        return SftConfig(**common, data={**data, "use": "chosen"})

    asked = config(hub="acme/small", streaming=True)
    assert "12 rows" in preview_stage("sft", asked) or "12 completions" in preview_stage("sft", asked)
    run = run_stage("sft", asked, tmp_path / "a")
    same = run_stage("sft", config(files=str(hub.repositories["datasets/acme/small"] / "train.jsonl")), tmp_path / "b")
    weights = [(one.path / "model" / "model.safetensors").read_bytes() for one in (run, same)]
    assert weights[0] == weights[1]
    assert not copies(tmp_path / "cache")
    name = f"hf://datasets/acme/small@{COMMIT}/train.jsonl"
    assert run.record["data"]["data"][name].keys() == {"git_sha1", "bytes"}
    assert run.record["hub_data"] == {"data": COMMIT}
    assert f"git SHA-1 {run.record['data']['data'][name]['git_sha1']}" in (run.path / "README.md").read_text()

    record = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    again = run_stage("sft", asked, tmp_path / "a", resume=True)
    assert len(hub.requests) == before
    assert (again.path / "model" / "model.safetensors").read_bytes() == weights[0]
    assert again.record["sources"] == run.record["sources"]


def test_a_resumed_run_reads_the_files_that_it_recorded(hub: HubServer) -> None:
    config = SftConfig(model="m", data={"hub": "acme/two", "streaming": True})
    first, found = with_hub_files(config)
    record = {
        "hub_data": {"data": COMMIT},
        "data": {"data": {file: {} for file in first.data.files}},
        "sources": {"data": [found["data"].as_source()]},
    }
    before = len(hub.requests)
    again, known = with_hub_files(config, record["hub_data"], files_of_record(record))
    assert (again, known) == (first, found)
    assert len(hub.requests) == before


def test_an_evaluation_streams(hub: HubServer, tmp_path: Path) -> None:
    save_policy(tiny_model(max_position_embeddings=512), tiny_tokenizer(), tmp_path / "start")
    start = str(tmp_path / "start")
    common: dict[str, Any] = {"model": start, "reference": start, "threads": 1, "bootstrap_samples": 10}
    job = EvaluateConfig(**common, data={"hub": "acme/jsonl", "streaming": True, "limit": 4})
    run = run_stage("evaluate", job, tmp_path / "scores")
    assert (run.path / "scores.json").is_file()
    assert len((run.path / "accuracy.jsonl").read_text().splitlines()) == 4
    assert hub.sent["train.jsonl"] < len(LINES) / 4


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"files": "a", "streaming": True}, ("streaming", "hub")),
        ({"files": "hf://datasets/a/b/train.jsonl"}, ("files", "hub", "streaming")),
    ],
)
def test_keys_that_do_not_fit_are_refused(data: dict[str, Any], words: tuple[str, ...]) -> None:
    with raises(ConfigError, *words):
        load_config(SftConfig, None, ["model=m", f"data={json.dumps(data)}"])
