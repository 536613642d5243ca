from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bfpo.config import EvaluateConfig, JudgeCheckConfig, JudgeConfig, RankerConfig, load_config
from bfpo.core.errors import ConfigError
from messages import raises

KEY = "sk-" + "proj-abcdefghij0123456789"


def judge(value: Any) -> JudgeConfig:
    return JudgeConfig.model_validate(value)


def test_short_forms_stand_for_keys(tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "judge.json").write_text("{}")
    (tmp_path / "server.yaml").write_text("format: qwen3guard\nurl: http://localhost:8000/v1\nmodel: guard\n")
    assert judge("oracle") == judge({"format": "oracle"})
    assert judge(str(tmp_path / "trained")).model_dump() == {
        "format": "trained",
        "name": None,
        "model": str(tmp_path / "trained"),
        "threshold": None,
        "base_model": None,
    }
    assert judge("qwen3guard").source is None
    assert judge("qwen3guard:Qwen/Qwen3Guard-Gen-4B").source == "Qwen/Qwen3Guard-Gen-4B"
    assert judge(str(tmp_path / "server.yaml")).title == "qwen3guard:guard at http://localhost:8000/v1"
    assert RankerConfig.model_validate("reward-model:some/model").format == "reward-model"


@pytest.mark.parametrize(
    ("url", "key", "allowed"),
    [
        ("https://collect.example/v1", "HF_TOKEN", False),
        ("https://collect.example/v1", "OPENAI_API_KEY", False),
        ("https://api.openai.com.collect.example/v1", "OPENAI_API_KEY", False),
        ("http://api.openai.com/v1", "OPENAI_API_KEY", False),
        ("https://api.openai.com/v1", "HF_TOKEN", False),
        ("https://api.openai.com/v1", "OPENAI_API_KEY", True),
        ("https://collect.example/v1", None, True),
    ],
)
def test_a_file_of_a_judge_chooses_no_key(tmp_path: Path, url: str, key: str | None, allowed: bool) -> None:
    keys = {"format": "qwen3guard", "model": "guard", "url": url, "api_key_env": key}
    (tmp_path / "theirs.yaml").write_text(json.dumps(keys))
    if allowed:
        assert judge(str(tmp_path / "theirs.yaml")) == judge(keys)
    else:
        with raises(ValueError, "api_key_env"):
            judge(str(tmp_path / "theirs.yaml"))
        with raises(ValueError, "api_key_env"):
            RankerConfig.model_validate(str(tmp_path / "theirs.yaml"))
    assert judge(keys).model_dump()["api_key_env"] == key  # in the user's own config


@pytest.mark.parametrize(
    ("value", "read", "left_out"),
    [
        ({"format": "oracle"}, set(), {"model", "url", "threshold"}),
        (
            {"format": "classifier", "model": "m", "safe_label": "ok"},
            {"safe_label", "dtype", "threshold"},
            {"controversial", "timeout"},
        ),
        ({"format": "qwen3guard"}, {"controversial", "batch_size"}, {"safe_label", "url", "temperature"}),
        ({"format": "qwen3guard", "model": "m", "url": "http://h/v1"}, {"timeout", "threshold"}, {"dtype", "revision"}),
    ],
)
def test_only_what_is_read_is_kept_and_it_loads_again(value: Any, read: set[str], left_out: set[str]) -> None:
    config = judge(value)
    kept = config.model_dump(mode="json")
    assert read <= kept.keys()
    assert not left_out & kept.keys()
    assert judge(kept) == config


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"format": "oracle", "threshold": 0.4}, "threshold"),
        (
            {"format": "qwen3guard", "model": "m", "url": "http://h/v1", "dtype": "auto"},
            "dtype",
        ),
        ({"format": "qwen3guard", "timeout": 3.0}, "timeout"),
        (
            {"format": "qwen3guard", "criterion": "harm"},
            "criterion",
        ),
        ({"format": "harmbench", "policy": "p.txt"}, "policy"),
        ({"format": "qwen3guard", "url": "http://h/v1"}, "model"),
        ({"format": "classifier"}, "model"),
        (
            {"format": "classifier", "model": "m", "safe_label": 1, "url": "http://h/v1"},
            "url",
        ),
        ({"format": "qwen3guard", "model": "m", "url": "localhost:8000"}, "url"),
        ({"format": "qwen3guard", "model": "m", "url": "http://h:port/v1"}, "url"),
        ({"format": "qwen3guard", "model": "m", "url": "http://h/v1?key=1"}, "url"),
        ({"format": "classifier", "model": "m"}, "safe_label, unsafe_label"),
        ("missing.yaml", "missing.yaml"),
    ],
)
def test_what_cannot_be_is_refused_in_words(value: Any, key: str) -> None:
    with raises(ConfigError, key):
        load_config(JudgeCheckConfig, None, ["data.files=d", f"judge={json.dumps(value)}"])


@pytest.mark.parametrize(
    "override",
    [
        f"judge.api_key_env={KEY}",
        f"judge.api_key={KEY}",
        f"judge.url=http://me:{KEY}@host/v1",
        f"judge.url=http://{KEY}@host/v1",
        "judge.api_key_env=hf_AbCdEfGh1jKlMnOpQr",
        "judge.api_key=AbCdEfGh1jKlMnOpQr",
        "judge.api_key_env=ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    ],
)
def test_a_key_is_refused_and_not_repeated(override: str) -> None:
    settings = ["completions=c", "judge.format=qwen3guard", "judge.model=m"]
    if "url" not in override:
        settings.append("judge.url=http://host/v1")
    with pytest.raises(ConfigError) as error:
        load_config(EvaluateConfig, None, [*settings, override])
    text = str(error.value)
    assert "judge." in text
    for secret in (KEY, "AbCdEfGh1jKlMnOpQr", "ABCDEFGHIJ"):
        assert secret not in text


def test_evaluation_takes_the_same_judge() -> None:
    config: Any = load_config(EvaluateConfig, None, ["completions=c", "judge=qwen3guard:some/model"])
    assert config.judge.title == "qwen3guard:some/model"
    assert EvaluateConfig(completions="c").resolved()["judge"] == {"format": "oracle"}
