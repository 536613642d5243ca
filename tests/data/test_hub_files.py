"""Data sets of a hub on loopback: which files are taken, at which commit, under which licence, and without the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from bfpo.config import AlignConfig, EvaluateConfig, LabelConfig, SftConfig, load_config
from bfpo.core.errors import ConfigError, DataError
from bfpo.core.yaml_text import parse_yaml
from bfpo.data.hub_files import find_hub_files
from bfpo.data.sources import SOURCES
from bfpo.policy.save import save_policy
from bfpo.runs.hub_data import with_hub_files
from bfpo.runs.stages import preview_stage, run_stage
from messages import raises
from support.hub_server import COMMIT, HubServer, connect
from tiny import tiny_model, tiny_tokenizer

CARD = """---
license: {licence}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-0.jsonl]
- config_name: other
  data_files: other/*.jsonl
---
# About it
"""
PAIRS = [
    {
        "prompt": f"w{i} w3",
        "chosen": f"w{i % 7} w9",
        "rejected": "w11",
        "chosen_is_safe": i % 2 == 0,
        "rejected_is_safe": i % 3 == 0,
    }
    for i in range(8)
]
FILES: dict[str, dict[str, Any]] = {
    "acme/listed": {
        "README.md": CARD.format(licence="cc-by-nc-4.0"),
        **dict.fromkeys(("data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl", "other/a.jsonl"), PAIRS),
        "strange/train.jsonl": PAIRS,
    },
    "acme/named": {
        "README.md": "---\nlicense: [mit, apache-2.0]\n---\n",
        "train.jsonl": PAIRS,
        "test.jsonl": PAIRS,
        "train.py": "raise SystemExit",
    },
    "acme/plain": {"rows.jsonl": PAIRS, "notes.txt": "about it"},
    "acme/parts": {"a/train.jsonl": PAIRS, "b/train.jsonl": PAIRS},
    "acme/nothing": {"notes.txt": "about it"},
    "Anthropic/hh-rlhf": {"helpful-base/train.jsonl.gz": "x", "harmless-base/train.jsonl.gz": "x"},
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    for name, files in FILES.items():
        for path, content in files.items():
            file = root / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else content
            file.write_text(rows)
    return {f"datasets/{name}": root / name for name in FILES}


@pytest.fixture
def hub(repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(repositories) as server:
        connect(monkeypatch, server, tmp_path / "cache")
        # the revision of the table is not that of this hub
        monkeypatch.setattr("bfpo.data.hub_files.SOURCES", {})
        yield server


def names(hub_id: str, **settings: Any) -> list[str]:
    found = find_hub_files(hub_id, **settings)
    assert found.commit == COMMIT
    return [file.as_posix().partition(f"{COMMIT}/")[2] for file in found.files]


def fetched(hub: HubServer) -> set[str]:
    """Return the data files that were asked for."""
    return {asked.partition(f"{COMMIT}/")[2] for asked in hub.requests if "/resolve/" in asked} - {"README.md"}


@pytest.mark.parametrize(
    ("hub_id", "settings", "wanted"),
    [
        ("acme/listed", {}, ["data/train-0.jsonl", "data/train-1.jsonl"]),
        ("acme/listed", {"split": "test", "revision": "main"}, ["data/test-0.jsonl"]),
        ("acme/listed", {"subset": "other", "revision": COMMIT}, ["other/a.jsonl"]),
        ("acme/listed", {"patterns": ["strange/*"]}, ["strange/train.jsonl"]),
        ("acme/named", {}, ["train.jsonl"]),
        ("acme/named", {"split": "test"}, ["test.jsonl"]),
        ("acme/plain", {}, ["rows.jsonl"]),
        ("acme/parts", {"subset": "b"}, ["b/train.jsonl"]),
        ("acme/parts", {"subset": "b", "split": "train"}, ["b/train.jsonl"]),
    ],
)
def test_the_files_of_a_split_are_fetched_and_no_others(
    hub: HubServer, hub_id: str, settings: dict[str, Any], wanted: list[str]
) -> None:
    assert names(hub_id, **settings) == wanted
    assert fetched(hub) - {"train.py"} == set(wanted)


@pytest.mark.parametrize(
    ("hub_id", "settings", "words"),
    [
        ("acme/listed", {"split": "dev"}, ("split", "train")),
        ("acme/listed", {"subset": "third"}, ("subset", "other")),
        ("acme/named", {"split": "dev"}, ("dev",)),
        ("acme/parts", {}, ("subset",)),
        ("acme/nothing", {}, ("files",)),
        ("acme/nobody", {}, ("acme/nobody", "files")),
        ("acme/plain", {"revision": "v2"}, ("revision",)),
    ],
)
def test_what_is_not_there_or_not_clear_is_said(
    hub: HubServer, hub_id: str, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    with raises(DataError, *words):
        find_hub_files(hub_id, **settings)


def test_licences_come_from_the_card(hub: HubServer) -> None:
    licences = [find_hub_files(name).licence for name in ("acme/listed", "acme/named", "acme/plain")]
    assert licences == ["cc-by-nc-4.0", "mit, apache-2.0", None]


def test_a_data_set_of_the_table_has_its_files_and_its_licence(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer(repositories) as server:
        connect(monkeypatch, server, tmp_path / "cache")
        found = find_hub_files("Anthropic/hh-rlhf", revision="main")
    assert [file.parent.name for file in found.files] == ["helpful-base"]
    assert found.licence == "mit"


def test_a_data_set_of_the_table_is_read_at_its_revision_whichever_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def download(hub_id: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str]:
        asked.append(revision)
        raise DataError("no hub")

    monkeypatch.setattr("bfpo.data.hub_files._download", download)
    (pinned, hub_id) = (SOURCES["pku-saferlhf"].revision, "PKU-Alignment/PKU-SafeRLHF")
    ways: list[dict[str, Any]] = [{}, {"split": "test"}, {"subset": "a"}, {"patterns": ["b"]}, {"revision": "main"}]
    for settings in ways:
        with pytest.raises(DataError):
            find_hub_files(hub_id, **settings)
    assert asked == [pinned] * 4 + ["main"]


def test_without_the_hub_the_cache_is_read(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names("acme/listed")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert names("acme/listed") == before
    assert len(hub.requests) == asked
    with raises(DataError, "acme/named", "files"):
        find_hub_files("acme/named")


def test_a_training_reads_the_hub_as_it_reads_files(hub: HubServer, tmp_path: Path) -> None:
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), tmp_path / "start")
    local = hub.repositories["datasets/acme/named"] / "train.jsonl"

    def config(**data: Any) -> SftConfig:
        common: dict[str, Any] = {"model": str(tmp_path / "start"), "max_steps": 2, "completions_per_step": 4}
        return SftConfig(**common, threads=1, data={**data, "use": "chosen", "limit": 6})

    asked = config(hub="acme/named", split="train", revision="main")
    assert "8 rows" in preview_stage("sft", asked) or "6 completions" in preview_stage("sft", asked)
    run = run_stage("sft", asked, tmp_path / "a")
    same = run_stage("sft", config(files=str(local)), tmp_path / "b")
    weights = [(one.path / "model" / "model.safetensors").read_bytes() for one in (run, same)]
    assert weights[0] == weights[1]
    assert run.config["data"]["hub"] == "acme/named"
    assert (run.config["data"]["hub_split"], run.config["data"]["files"]) == ("train", [])
    assert run.record["hub_data"] == {"data": COMMIT}
    head, _ = parse_yaml((run.path / "README.md").read_text().split("---")[1])
    assert head["datasets"] == ["acme/named"]
    assert f"licence mit, apache-2.0, acme/named at {COMMIT}" in (run.path / "README.md").read_text()
    assert str(tmp_path) not in (run.path / "README.md").read_text()


def test_a_model_names_the_sources_of_its_data_through_the_runs_before(hub: HubServer, tmp_path: Path) -> None:
    """hub -> label -> train, on a start of hub -> sft; what a run is only measured on is no source of what it makes."""
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), tmp_path / "start")
    steps: dict[str, Any] = {"max_steps": 1, "threads": 1}
    imitated = {"hub": "acme/listed", "split": "test", "use": "chosen"}
    held = {"hub": "acme/plain", "use": "chosen"}
    start = SftConfig(model=str(tmp_path / "start"), data=imitated, eval_data=held, **steps)
    run_stage("sft", start, tmp_path / "sft")
    given = {"data": {"hub": "acme/named"}, "judges": "oracle", "bootstrap_samples": 10}
    run_stage("label", LabelConfig.model_validate(given), tmp_path / "label")
    pairs = {"files": str(tmp_path / "label" / "pairs.jsonl"), "unknown_label": "drop"}
    aligned = AlignConfig(model=str(tmp_path / "sft" / "model"), data=pairs, **steps)
    run = run_stage("train", aligned, tmp_path / "train")
    named = {name: [row["hub_id"] for row in rows] for name, rows in run.record["sources"].items()}
    assert named == {"data": ["acme/named"], "start": ["acme/listed"]}
    text = (run.path / "README.md").read_text()
    head, _ = parse_yaml(text.split("---")[1])
    assert head["datasets"] == ["acme/named", "acme/listed"]
    assert f"licence cc-by-nc-4.0, acme/listed at {COMMIT}" in text


def test_a_resumed_run_reads_the_commit_that_it_began_with(hub: HubServer) -> None:
    config = SftConfig(model="m", data={"hub": "acme/named"})
    _, found = with_hub_files(config, {"data": COMMIT})
    assert found["data"].commit == COMMIT
    assert hub.requests
    assert not [asked for asked in hub.requests if "/main" in asked]
    with raises(DataError, "data.hub"):
        with_hub_files(config, {"data": "f" * 40})


def test_every_stream_of_preferences_may_be_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    parts = {"data": {"hub": "acme/named"}, "buffer": {"hub": "acme/listed", "split": {"held_out": 2}}}
    config = AlignConfig(model="m", **parts, eval_data={"hub": "acme/listed", "split": "test"})
    found, files = with_hub_files(config)
    assert {name: len(one.files) for name, one in files.items()} == {"data": 1, "buffer": 2, "eval_data": 1}
    assert found.buffer is not None
    assert found.buffer.split is not None
    assert found.data.hub is None
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), tmp_path / "start")
    job = EvaluateConfig(
        model=str(tmp_path / "start"),
        reference=str(tmp_path / "start"),
        threads=1,
        bootstrap_samples=10,
        data={"hub": "acme/named", "split": "test"},
    )
    run = run_stage("evaluate", job, tmp_path / "scores")
    assert (run.path / "scores.json").is_file()
    assert run.record["hub_data"] == {"data": COMMIT}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, ("files", "hub")),
        ({"files": "a", "revision": "v1"}, ("revision", "hub")),
        ({"files": "a", "split": "train"}, ("split",)),
        ({"hub": "a/b", "files": "c", "subset": "d"}, ("subset", "files")),
        ({"hub": "a/b", "split": "train", "hub_split": "train"}, ("hub_split",)),
        ({"hub": "https://x/a/b"}, ("hub",)),
    ],
)
def test_keys_that_do_not_fit_are_refused(data: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    settings = ["model=m", f"data={json.dumps(data)}"]
    with raises(ConfigError, *words):
        load_config(SftConfig, None, settings)
