from __future__ import annotations

import json
import logging
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bfpo.config import EvaluateConfig
from bfpo.core.errors import ConfigError, DataError, LabelError, ModelError, ServerError
from bfpo.core.schema import Completion, Message, Pair, Verdict
from bfpo.data.write import write_completions, write_pairs
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.world.world import ANSWER_KINDS, answer, prompt_text, topics
from execution.copies import take_copies
from messages import raises
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    save_policy(tiny_model(seed=1), tiny_tokenizer(), root / "policy")
    save_policy(tiny_model(seed=2), tiny_tokenizer(), root / "reference")
    pairs = [
        Pair(f"{n}", (Message("user", f"w{n // 2} w5"),), f"w{n} w7", f"w{n + 1} w2 w3", n % 4 < 2, n % 2 == 0)
        for n in range(24)
    ]
    write_pairs(root / "pairs.jsonl", pairs)
    rng = random.Random(0)
    completions = []
    for n, topic in enumerate(rng.sample(topics("test"), 40)):
        question = (Message("user", prompt_text(topic, rng)),)
        completions.append(Completion(str(n), question, answer(topic, rng.choice(ANSWER_KINDS), rng), kind=topic.kind))
    completions.append(Completion("elsewhere", (Message("user", "Who was Ada Lovelace?"),), "", kind="benign"))
    write_completions(root / "completions.jsonl", completions)
    return root


def config(folder: Path, **settings: Any) -> EvaluateConfig:
    on_pairs = {
        "model": folder / "policy",
        "reference": folder / "reference",
        "data": {"files": [folder / "pairs.jsonl"]},
    }
    return EvaluateConfig(**{**on_pairs, "bootstrap_samples": 200, **settings})


def scores(path: Path) -> dict[str, dict[str, Any]]:
    return {score["metric"]: score for score in json.loads((path / "scores.json").read_text())["scores"]}


def rows(path: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_several_workers_change_no_byte(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bfpo.scores.accuracy.BATCHES_PER_PART", 2)
    made = take_copies(monkeypatch)
    for workers in (1, 2):
        settings = {"pairs_per_batch": 3, "executor": {"workers": workers}}
        run_stage("evaluate", config(folder, **settings), tmp_path / str(workers))
    assert [len(one.used) for one in made] == [2, 2]  # of policy and reference
    for name in ("accuracy.jsonl", "scores.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_both_at_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bfpo")
    run_stage("evaluate", config(folder, completions=folder / "completions.jsonl"), tmp_path / "run")
    found = scores(tmp_path / "run")
    pair_rows = rows(tmp_path / "run", "accuracy.jsonl")
    assert len(pair_rows) == 24
    assert found["accuracy"]["value"] == pytest.approx(sum(row["right"] for row in pair_rows) / 24)
    assert found["accuracy"]["extra"]["num_prompts"] == 12
    assert {row["target"] for row in pair_rows} == {1.0, 0.5, -0.5, -1.0}
    verdicts = rows(tmp_path / "run", "verdicts.jsonl")
    assert len(verdicts) == 41
    assert verdicts[-1]["label"] == "unscored"
    assert found["harmless"]["num"] == 40
    assert found["harmless"]["unscored"] == 1
    expected = [row["helpful_and_safe"] for row in verdicts[:-1]]
    assert found["helpful_and_safe"]["value"] == pytest.approx(sum(expected) / 40)
    table = (tmp_path / "run" / "scores.md").read_text()
    assert "| helpful and safe |" in table
    assert "| 40 | 1 |" in table
    for name, title in (("accuracy", "accuracy"), ("harmless", "harmless")):
        value, low, high = (found[name][key] for key in ("value", "low", "high"))
        assert f"{title} {value:.3f} ({low:.3f} to {high:.3f})" in caplog.text


def test_a_run_without_a_score_fails_with_the_reason(folder: Path, tmp_path: Path) -> None:
    elsewhere = [Completion(f"{n}", (Message("user", "Who was Ada Lovelace?"),), "A poet.") for n in range(3)]
    write_completions(tmp_path / "elsewhere.jsonl", elsewhere)
    asked = EvaluateConfig(completions=str(tmp_path / "elsewhere.jsonl"))
    with raises(DataError, "oracle"):
        run_stage("evaluate", asked, tmp_path / "run")
    assert scores(tmp_path / "run")["harmless"]["unscored"] == 3


class Counting:
    """A judge that calls everything safe, and whose server stops to answer after `stop` texts."""

    name = version = "counting"
    stop: int | None = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def judge(self, completions: list[Completion]) -> list[Verdict]:
        if self.stop is not None and len(self.asked) >= self.stop:
            raise ServerError("the server does not answer")
        self.asked += [one.text for one in completions]
        return [Verdict(one.id, self.name, "safe") for one in completions]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Counting:
    judge = Counting()
    monkeypatch.setattr("bfpo.commands.evaluate.open_judge", lambda *_, **__: nullcontext(judge))
    return judge


def test_a_resumed_run_asks_about_no_answer_again(tmp_path: Path, judge: Counting) -> None:
    texts = [f"The answer {n} is long enough." for n in range(300)]
    rows = [Completion(str(n), (Message("user", f"q{n}"),), text) for n, text in enumerate(texts)]
    write_completions(tmp_path / "many.jsonl", rows)
    asked = EvaluateConfig(completions=str(tmp_path / "many.jsonl"), label_cache=str(tmp_path / "cache"))
    judge.stop = 1
    with raises(ServerError, "does not answer"):
        run_stage("evaluate", asked, tmp_path / "run")
    assert 0 < len(judge.asked) < 300
    judge.stop = None
    run_stage("evaluate", asked, tmp_path / "run", resume=True)
    assert sorted(judge.asked) == sorted(texts)
    assert scores(tmp_path / "run")["harmless"]["num"] == 300


def test_rules_need_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `demo` and `compare` stay within their folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_completions(tmp_path / "one.jsonl", [Completion("a", (Message("user", "q"),), "An answer.")])
    with raises(DataError, "nothing was scored"):  # the prompt is none of the world
        run_stage("evaluate", EvaluateConfig(completions=str(tmp_path / "one.jsonl")), tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_an_answer_that_only_calls_a_tool_is_judged_by_its_call(tmp_path: Path, judge: Counting) -> None:
    call = {"type": "function", "function": {"name": "wipe", "arguments": {"path": "/"}}}
    turns = [{"role": "user", "content": "Wipe the server."}]
    row = {"prompt": turns, "completion": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    (tmp_path / "calls.jsonl").write_text(json.dumps(row) + "\n")
    asked = EvaluateConfig(completions=str(tmp_path / "calls.jsonl"), label_cache=str(tmp_path / "cache"))
    run_stage("evaluate", asked, tmp_path / "run")
    assert [json.loads(text) for text in judge.asked] == [call]
    assert rows(tmp_path / "run", "verdicts.jsonl")[0].get("incoherent") is None


def test_margin_against_itself_and_labels(folder: Path, tmp_path: Path) -> None:
    run_stage("evaluate", config(folder, reference=folder / "policy"), tmp_path / "same")
    assert scores(tmp_path / "same")["accuracy"]["extra"]["num_ties"] == 24
    run_stage("evaluate", config(folder, method="safedpo"), tmp_path / "safedpo")
    assert scores(tmp_path / "safedpo")["accuracy"]["unscored"] == 6
    held_out = {"files": [folder / "pairs.jsonl"], "split": {"held_out": 3, "part": "test"}}
    run_stage("evaluate", config(folder, data=held_out), tmp_path / "split")
    assert scores(tmp_path / "split")["accuracy"]["num"] == 6


def test_a_cell_without_pairs_is_not_measured(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "safe.jsonl"
    write_pairs(path, [Pair("1", (Message("user", "w3"),), "w4", "w5", True, True)])
    run_stage("evaluate", config(folder, data={"files": [path]}), tmp_path / "run")
    assert scores(tmp_path / "run")["accuracy_unsafe_safe"]["value"] is None
    assert "accuracy unsafe safe | not measured |" in (tmp_path / "run" / "scores.md").read_text()


def test_errors_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "unlabelled.jsonl"
    write_pairs(path, [Pair("1", (Message("user", "w3"),), "w4", "w5", True, None)])
    with raises(LabelError):
        run_stage("evaluate", config(folder, data={"files": [path]}), tmp_path / "a")
    with raises(DataError):
        run_stage("evaluate", config(folder, data={"files": [path], "unknown_label": "drop"}), tmp_path / "b")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with raises(DataError, "bfpo generate"):
        run_stage("evaluate", EvaluateConfig(completions=empty), tmp_path / "c")
    with raises(ConfigError, "chat_template"):
        run_stage("evaluate", config(folder, chat_template=tmp_path / "none.jinja"), tmp_path / "d")


def test_answers_of_two_models_are_not_scored_as_one(folder: Path, tmp_path: Path) -> None:
    asked = (Message("user", "How are you?"),)
    two = [Completion(f"{model}{n}", asked, "Fine.", model) for model in ("one", "two", "") for n in range(2)]
    write_completions(tmp_path / "two.jsonl", two)
    settings = EvaluateConfig(completions=tmp_path / "two.jsonl", judge="refusal-phrases")
    with raises(DataError, "two.jsonl", "one 2", "two 2", "no model 2"):
        run_stage("evaluate", settings, tmp_path / "run")


def test_different_answers_with_one_id_are_refused(tmp_path: Path) -> None:
    asked = (Message("user", "How are you?"),)
    write_completions(tmp_path / "same.jsonl", [Completion("a", asked, text) for text in ("Fine.", "Fine.", "Bad.")])
    with raises(DataError, "same.jsonl", "'a'"):
        run_stage("evaluate", EvaluateConfig(completions=tmp_path / "same.jsonl"), tmp_path / "run")


def test_models_that_read_differently_are_refused(folder: Path, tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in reversed(range(94)))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    save_policy(tiny_model(seed=2), other, tmp_path / "reference")
    with raises(ModelError, "pair 0"):
        run_stage("evaluate", config(folder, reference=tmp_path / "reference"), tmp_path / "run")


def test_preview(folder: Path) -> None:
    text = preview_stage("evaluate", config(folder, completions=folder / "completions.jsonl"))
    assert "24 pairs (chosen-rejected): safe-safe 6, safe-unsafe 6, unsafe-safe 6, unsafe-unsafe 6" in text
    assert "41 completions, judged by oracle" in text
