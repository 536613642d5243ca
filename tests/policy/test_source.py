from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.core.errors import ModelError, ServerError
from bfpo.policy import source
from bfpo.policy.load import load_policy, load_tokenizer
from bfpo.policy.save import save_policy
from bfpo.policy.source import read_config
from messages import raises
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the hub is asked for; it cannot be reached, and any other question to it fails the test."""
    names: list[str] = []

    def model_info(self: Any, name: str, **_: Any) -> None:
        names.append(name)
        raise ConnectionError("Name or service not known")

    def other(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers was asked for a model that is not there")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr("bfpo.policy.load.AutoTokenizer.from_pretrained", other)
    monkeypatch.setattr("bfpo.policy.load.AutoModelForCausalLM.from_pretrained", other)
    monkeypatch.setattr("bfpo.policy.source.AutoConfig.from_pretrained", other)
    source._ask_hub.cache_clear()
    return names


@pytest.mark.parametrize("load", [load_tokenizer, load_policy, read_config])
def test_the_hub_is_asked_once_for_a_name_that_is_no_folder(load: Any, asked: list[str]) -> None:
    with raises(ServerError, "nope"):
        load("nope")
    assert asked == ["nope"]


def test_a_missing_folder_is_never_asked_of_the_hub(tmp_path: Path, asked: list[str]) -> None:
    with raises(ModelError):
        load_tokenizer(tmp_path / "model")
    assert asked == []


def test_what_the_hub_does_not_have_is_said(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        answer: Any = SimpleNamespace(headers={}, request=None)
        raise RepositoryNotFoundError("404", response=answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    with raises(ModelError):
        load_tokenizer("nope")


def test_what_is_in_the_cache_is_not_asked_for(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda model, name, revision: f"/cache/{name}")
    source.check_source("model", "some/model")
    assert asked == []


def test_a_run_folder_in_place_of_its_model_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with raises(ModelError, str(tmp_path / "model")):
        load_tokenizer(tmp_path)


def test_an_adapter_in_place_of_a_model_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with raises(ModelError, "adapter", "bfpo export"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "generation_config.json",
        "adapter_config.json",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ],
)
@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 990 + "1" + "}" * 990, "\0", "[]", '"text"', "{"])
def test_a_damaged_or_nested_file_of_a_model_ends_in_one_message(name: str, content: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_policy(tiny_model(), tiny_tokenizer(), model)
    (model / name).write_text(content)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1 w2"}\n')
    settings = [f"model={model}", f"prompts={prompts}", "max_new_tokens=2"]
    options = [part for setting in settings for part in ("--set", setting)]
    for command in (["generate", *options], ["interpolate", str(model), str(model)]):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / command[0])])
        assert result.exit_code in (0, 2), result.stderr
        assert "Traceback" not in result.stderr
        assert result.exit_code == 0 or result.stderr.splitlines()[-1].startswith("error: ")
