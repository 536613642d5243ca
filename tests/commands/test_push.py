"""A trained model on a hub on loopback: its files and card, who may push, and what is never written anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import SftConfig
from bfpo.core.errors import ConfigError, ServerError
from bfpo.core.files import file_digest
from bfpo.core.yaml_text import parse_yaml
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from messages import fails, raises
from support.hub_server import HubServer, connect
from tiny import tiny_model, tiny_tokenizer

TOKEN = "hf_aTokenThatNobodyHas"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({}, root=tmp_path / "hub", token=TOKEN) as server:
        connect(monkeypatch, server, tmp_path / "cache", TOKEN)
        yield server


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A start model, and completions as `bfpo prepare` leaves them, with two sources."""
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), tmp_path / "start")
    file = tmp_path / "data" / "sft" / "train.jsonl"
    file.parent.mkdir(parents=True)
    rows = [{"prompt": f"w{i} w3", "completion": f"w{i % 7} w9"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"stream": "sft", "revision": "0" * 40}
    sources = [
        {"name": "ultra", "licence": "mit", "hub_id": "acme/ultra", **common},
        {"name": "own", "licence": None, "hub_id": None, **common},
    ]
    manifest = {"files": {"sft/train.jsonl": {"sha256": file_digest(file)}}, "sources": sources}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def config(folder: Path, **settings: Any) -> SftConfig:
    data = {"files": str(folder / "data" / "sft" / "train.jsonl")}
    common: dict[str, Any] = {"model": str(folder / "start"), "data": data, "max_steps": 1, "threads": 1}
    return SftConfig(**{**common, "completions_per_step": 4, "run_tags": ["sft", "mine", "bfpo"], **settings})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_training_pushes_its_model_with_a_card(hub: HubServer, prepared: Path) -> None:
    run = run_stage("sft", config(prepared, push_to_hub="acme/tiny", hub_private_repo=True), prepared / "run")
    pushed = files_of(prepared / "hub" / "acme" / "tiny")
    assert pushed == files_of(run.path / "model")
    assert hub.created == [{"name": "acme/tiny", "private": True}]
    assert run.record["pushed"].startswith(f"{hub.url}/acme/tiny/commit/")
    AutoModelForCausalLM.from_pretrained(prepared / "hub" / "acme" / "tiny")
    card = pushed["README.md"].decode()
    head, _ = parse_yaml(card.split("---")[1])
    assert head == {
        "library_name": "transformers",
        "tags": ["bfpo", "sft", "mine"],
        "datasets": ["acme/ultra"],
        "pipeline_tag": "text-generation",
    }
    assert f"| data: ultra | licence mit, acme/ultra at {'0' * 40} |" in card
    assert "| data: own | licence unknown, own files" in card
    assert f"data: train.jsonl | SHA-256 {file_digest(prepared / 'data' / 'sft' / 'train.jsonl')}" in card
    places = [str(prepared).encode(), str(Path.home()).encode() + b"/", TOKEN.encode()]
    assert not [name for name, content in pushed.items() if any(place in content for place in places)]
    assert not [name for name, content in files_of(run.path).items() if TOKEN.encode() in content]


def test_a_training_that_may_not_push_ends_before_it_begins(
    hub: HubServer, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises(ConfigError, "others/tiny", "push_to_hub"):
        run_stage("sft", config(prepared, push_to_hub="others/tiny"), prepared / "a")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with raises(ConfigError, "HF_TOKEN"):
        run_stage("sft", config(prepared, push_to_hub="acme/tiny"), prepared / "b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with raises(ConfigError, "HF_HUB_OFFLINE"):
        run_stage("sft", config(prepared, push_to_hub="acme/tiny"), prepared / "c")
    assert not [run for run in "abc" if (prepared / run / "model").exists()]


def test_a_hub_that_is_lost_leaves_a_whole_model_and_resume_pushes_it(hub: HubServer, prepared: Path) -> None:
    root, hub.root = hub.root, None

    def take(*asked: Any, real: Any = hub.take) -> Any:
        hub.root = root if asked[0].endswith("create") else None
        return real(*asked)

    hub.take = take  # type: ignore[method-assign]
    settings = config(prepared, push_to_hub="acme/tiny")
    with raises(ConfigError, "--resume", "the model is whole"):
        run_stage("sft", settings, prepared / "run")
    before = files_of(prepared / "run" / "model")
    del hub.take
    hub.root = root
    run_stage("sft", settings, prepared / "run", resume=True)
    weights = files_of(prepared / "hub" / "acme" / "tiny")["model.safetensors"]
    assert weights == before["model.safetensors"]


def lose(hub: HubServer, status: int) -> None:
    """Let the hub make repositories, and answer all else with this status."""

    def take(*asked: Any, real: Any = hub.take) -> Any:
        return real(*asked) if asked[0].endswith("create") else (status, {}, b"{}")

    hub.take = take  # type: ignore[method-assign]


def test_a_hub_that_fails_at_the_end_of_a_training_is_not_bad_input(hub: HubServer, prepared: Path) -> None:
    lose(hub, 500)
    with raises(ServerError, "answers 500", "--resume") as caught:
        run_stage("sft", config(prepared, push_to_hub="acme/tiny"), prepared / "run")
    assert getattr(caught.value, "exit_code", None) == 1


def test_a_hub_that_cannot_be_reached_is_not_bad_input(hub: HubServer, prepared: Path) -> None:
    hub._http.server_close()
    fails(export(prepared / "start", prepared / "out", "--push", "acme/start"), "cannot be reached", "again", code=1)
    assert not (prepared / "out").exists()


@pytest.mark.parametrize(("status", "code"), [(429, 1), (503, 1), (400, 2)])
def test_an_export_that_is_not_pushed_says_where_the_model_is(
    hub: HubServer, prepared: Path, status: int, code: int
) -> None:
    lose(hub, status)
    out = prepared / "my out"
    ended = json.loads(export(prepared / "start", out, "--push", "acme/start", "--json").stdout)
    assert ended["exit_code"] == code
    assert f"hf upload acme/start '{out}'" in ended["error"]["message"]
    AutoModelForCausalLM.from_pretrained(out)


def export(model: Path, out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["export", str(model), "--out", str(out), *options])


def test_an_exported_folder_is_pushed(hub: HubServer, prepared: Path) -> None:
    result = export(prepared / "start", prepared / "out", "--push", "acme/start", "--public", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pushed"].startswith(f"{hub.url}/acme/start/commit/")
    assert files_of(prepared / "hub" / "acme" / "start") == files_of(prepared / "out")
    assert hub.created[0]["private"] is False
    assert TOKEN not in result.output
    card = (prepared / "out" / "README.md").read_text()
    assert str(prepared) not in card
    assert "base_model" not in card  # a folder: nobody knows which model of the hub it is
    assert export(prepared / "start", prepared / "again", "--push", "acme/start").exit_code == 0
    assert hub.created[1]["private"] is None


def test_the_weights_of_an_earlier_model_do_not_stay(hub: HubServer, prepared: Path) -> None:
    there = prepared / "hub" / "acme" / "start"
    there.mkdir(parents=True)
    for name in (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
        "notes.txt",
    ):
        (there / name).write_text("{}")
    result = export(prepared / "start", prepared / "out", "--push", "acme/start")
    assert result.exit_code == 0, result.output
    assert files_of(there).keys() == files_of(prepared / "out").keys() | {"notes.txt"}
    AutoModelForCausalLM.from_pretrained(there)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--push", "start"], ("--push", "ORG/NAME")),
        (["--private"], ("--private", "--push")),
        (["--push", "others/start"], ("others/start",)),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_export(
    hub: HubServer, prepared: Path, options: list[str], words: tuple[str, ...]
) -> None:
    fails(export(prepared / "start", prepared / "out", *options), *words)
    assert not (prepared / "out").exists()
