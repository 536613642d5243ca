"""`bfpo chat` from a script: messages, commands, two models, the judge, `--json`, and bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.commands.chat import _Chat
from bfpo.config import ChatConfig
from bfpo.core.errors import SettingError
from bfpo.data.chat import ChatEncoder
from bfpo.generation.talk import Talk
from bfpo.policy.save import save_policy
from helpers import CHATML, byte_tokenizer
from messages import fails, raises
from tiny import tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        save_policy(tiny_model(vocab_size=260, seed=seed), byte_tokenizer(CHATML), folder / name)
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    (folder / "one").rename(folder / "run" / "model")
    disable_progress_bar()  # the recorded messages would have its speed
    yield folder
    enable_progress_bar()


def chat(folder: Path, lines: str, *options: str, name: str = "run") -> Any:
    command = ["chat", str(folder / name), "--max-new-tokens", "6", *options]
    return CliRunner().invoke(app, command, input=lines)


def told(folder: Path, lines: str, *options: str) -> dict[str, Any]:
    result = chat(folder, lines, "--json", *options)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_a_conversation_of_two_models_with_a_judge(models: Path) -> None:
    facts = told(models, "hello\nand?\n", "--against", str(models / "two"), "--judge", "refusal-phrases")
    assert facts["models"] == [
        {"name": "run", "model": str(models / "run")},
        {"name": "two", "model": str(models / "two")},
    ]
    (conversation,) = facts["conversations"]
    assert [turn["user"] for turn in conversation["turns"]] == ["hello", "and?"]
    for turn in conversation["turns"]:
        assert [reply["model"] for reply in turn["replies"]] == ["run", "two"]
        assert [reply["verdict"]["judge"] for reply in turn["replies"]] == ["refusal-phrases"] * 2
        assert turn["replies"][0]["text"] != turn["replies"][1]["text"]
    assert chat(models, "hello\n", "--judge", "refusal-phrases").stdout.count("does not decline") == 1


def test_a_script_is_echoed_with_its_replies(models: Path) -> None:
    out = chat(models, "hello\n").stdout
    first, second, *_ = out.splitlines()
    assert first == "you> hello"
    assert second.startswith("run> ")


def test_commands_of_a_session(models: Path) -> None:
    lines = "hello\n/reset\nhello\n/system be brief\nhello\\\nthere\n\n//quit\n/quit\nnever read\n"
    first, again, other = told(models, lines)["conversations"]
    assert [turn["user"] for turn in other["turns"]] == ["hello\nthere", "/quit"]
    assert (first["system"], again["system"], other["system"]) == (None, None, "be brief")
    assert len(first["turns"]) == len(again["turns"]) == 1


def test_settings_change_in_a_session_and_seeds_repeat(models: Path) -> None:
    greedy = told(models, "/set temperature 0\nhello\n/set max_new_tokens 2\nmore\n")
    assert greedy["conversations"][0]["turns"][1]["replies"][0]["num_tokens"] <= 2
    replies = [told(models, "hello\n", "--temperature", "0")["conversations"] for _ in range(2)]
    assert replies[0] == replies[1]
    assert replies[0][0]["turns"][0] == greedy["conversations"][0]["turns"][0]
    sampled = [told(models, "hello\n", "--seed", seed)["conversations"] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("lines", "words"),
    [("hello\n/rest\n", ("line 2", "/rest", "/reset")), ("/set beta 3\n", ("line 1", "temperature"))],
)
def test_a_wrong_line_of_a_script_is_named(models: Path, lines: str, words: tuple[str, ...]) -> None:
    fails(chat(models, lines), *words)


def test_a_wrong_value_of_a_script_is_named(models: Path) -> None:
    fails(chat(models, "/set top_p 3\n"), "line 1", "top_p")


@pytest.mark.parametrize("other", ["run", "none"])
def test_a_model_that_cannot_be_asked(models: Path, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    result = CliRunner().invoke(app, ["chat", "run", "--against", f"./{other}"[2 * (other == "run") :]], input="x\n")
    fails(result, other)


def test_a_template_that_cannot_be_used_is_an_error_before_weights_are_read(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bfpo.commands.chat.load_policy", None)
    (tmp_path / "template.jinja").write_text("no answer")
    fails(chat(models, "x\n", "--set", f"chat_template={tmp_path / 'template.jinja'}"), "chat template")
    fails(chat(models, "x\n", "--set", "chat_template_kwargs={enable_thinking: false}"), "enable_thinking")


def test_an_unknown_judge_is_named_before_a_model_is_loaded(models: Path) -> None:
    fails(chat(models, "x\n", "--judge", "oracel", name="nowhere"), "oracel")


def test_a_message_that_one_model_has_no_room_for_is_told_to_none() -> None:
    talks = [
        Talk(name, tiny_model(vocab_size=260, max_position_embeddings=most), ChatEncoder(byte_tokenizer(CHATML)), (1,))
        for name, most in (("large", 400), ("small", 120))
    ]
    config = ChatConfig.model_validate({"model": "large", "against": "small", "max_new_tokens": 2})
    session = _Chat(config, lambda changes: config, talks, None)
    session.take("hello")
    before = talks[0].check("")[1]
    with raises(SettingError, "/reset"):
        session.take("x" * 120)
    assert talks[0].check("")[1] == before
    session.take("and?")
    assert [turn["user"] for turn in session.told[0]["turns"]] == ["hello", "and?"]
