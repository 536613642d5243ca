from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bfpo.config import GenerateConfig, RedteamConfig, load_config
from bfpo.core.errors import ConfigError
from messages import raises

LOCAL = {"revision", "dtype", "max_prompt_length", "long_prompts", "chat_template", "chat_template_kwargs"}
TORCH = {"batch_size", "threads"}
SERVER = {"url", "api_key_env", "extra_body", "timeout", "max_concurrency", "max_retries", "max_requests"}
VALUES: dict[str, Any] = {
    "revision": "main",
    "dtype": "auto",
    "max_prompt_length": 9,
    "long_prompts": "skip",
    "chat_template": "t.jinja",
    "chat_template_kwargs": {"style": "terse"},
    "batch_size": 3,
    "threads": 1,
    "url": "http://localhost:8000/v1",
    "api_key_env": "MY_KEY",
    "timeout": 5.0,
    "max_concurrency": 2,
    "max_retries": 1,
    "max_requests": 7,
}


OF_ENGINE = {
    engine: ["model=m", "prompts=p.txt", f"engine={engine}", *(["url=http://h/v1"] if engine == "server" else [])]
    for engine in ("transformers", "vllm", "server")
}


def config(**settings: Any) -> GenerateConfig:
    needed = {"url": "http://localhost:8000/v1"} if settings.get("engine") == "server" else {}
    return GenerateConfig(**{"model": "m", "prompts": "p.txt", **needed, **settings})


@pytest.mark.parametrize(
    ("engine", "unread"), [("transformers", SERVER), ("vllm", SERVER | TORCH), ("server", LOCAL | TORCH | {"executor"})]
)
def test_an_engine_refuses_and_leaves_out_the_keys_that_it_does_not_read(engine: str, unread: set[str]) -> None:
    for key, value in VALUES.items():
        if key in unread:
            with raises(ConfigError, key, engine):
                load_config(GenerateConfig, None, [*OF_ENGINE[engine], f"{key}={value}"])
        else:
            assert getattr(config(engine=engine, **{key: value}), key) == value
    resolved = config(engine=engine).resolved()
    assert not unread & resolved.keys()
    assert GenerateConfig.every_field().keys() - unread == resolved.keys()
    assert GenerateConfig.model_validate(resolved).resolved() == resolved


def test_a_server_needs_a_url_and_takes_no_key_in_a_setting() -> None:
    with raises(ConfigError, "url"):
        load_config(GenerateConfig, None, ["model=m", "prompts=p.txt", "engine=server"])
    secret = "sk-" + "proj-abcdefghij0123456789"
    for key, wrong in (("api_key_env", secret), ("url", f"http://me:{secret}@host/v1")):
        with raises(ValueError, key) as error:
            config(engine="server", **{key: wrong})
        assert secret not in error.value.errors()[0]["msg"]  # type: ignore[attr-defined]


def test_a_wrong_engine_is_named() -> None:
    with raises(ConfigError, "engine"):
        load_config(GenerateConfig, None, ["model=m", "prompts=p", "engine=tgi"])


def redteam(**settings: Any) -> RedteamConfig:
    given = {"model": "m", "prompts": "p.txt", "judges": "oracle", "ranker": "oracle", **settings}
    return RedteamConfig.model_validate(given)


def test_red_teaming_shares_keys_with_its_judges() -> None:
    judge = {"format": "qwen3guard", "model": "x", "url": "http://localhost:1/v1"}
    url = "http://localhost:2/v1"
    assert redteam(engine="server", url=url, threads=1, max_requests=5).max_requests == 5
    assert redteam(judges=judge, max_requests=5).max_requests == 5
    with raises(ValueError, "max_requests"):
        redteam(max_requests=5)
    given = ["model=m", "prompts=p.txt", "judges=oracle", "ranker=oracle"]
    with raises(ConfigError, "url"):
        load_config(RedteamConfig, None, [*given, "engine=server"])
    with raises(ConfigError, "batch_size"):
        load_config(RedteamConfig, None, [*given, "engine=vllm", "batch_size=2"])


def test_red_teaming_gives_each_stage_the_keys_that_it_reads(tmp_path: Path) -> None:
    from bfpo.commands.redteam import _generate, _label

    asked = redteam(engine="server", url="http://localhost:2/v1", threads=1, max_requests=5)
    assert (_generate(asked).resolved()["max_requests"], _label(asked, tmp_path).max_requests) == (5, None)
    assert _label(asked, tmp_path).threads == 1
    judge = {"format": "qwen3guard", "model": "x", "url": "http://localhost:1/v1"}
    judged = redteam(judges=judge, max_requests=5, batch_size=3)
    assert "max_requests" not in _generate(judged).resolved()
    assert _label(judged, tmp_path).max_requests == 5
    assert _generate(judged).resolved()["batch_size"] == 3
