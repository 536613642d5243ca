from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from bfpo.core.errors import ModelError
from bfpo.policy import source
from bfpo.policy.load import load_policy, load_tokenizer
from bfpo.policy.source import read_config
from messages import raises


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
    with raises(ModelError, "nope"):
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
