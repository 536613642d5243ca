"""Models that think before they answer, through the commands: what is judged, shown, ranked and trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bfpo.config import EvaluateConfig, GenerateConfig, JudgeCheckConfig, JudgeTrainConfig, LabelConfig
from bfpo.core.schema import Completion, Message, Pair, from_canonical
from bfpo.data.chat import ChatEncoder
from bfpo.data.read import read_completions, read_pairs
from bfpo.data.thinking import Thinking, without_thought
from bfpo.data.write import write_completions
from bfpo.generation.earlier import read_earlier
from bfpo.generation.talk import Talk
from bfpo.judges.asking import ask_judge, ask_ranker, judge_answers
from bfpo.judges.cache import OpinionCache
from bfpo.judges.ngrams import NgramSettings, fit_ngrams, fit_ranker
from bfpo.policy.load import load_policy
from bfpo.runs.stages import preview_stage, run_stage
from helpers import CHATML, EOS, write_rows
from scripted import save_scripted, tokenizer_with
from support.fault_server import FaultServer

DECLINES = (
    "<think>\nThey want to know how yeast rises. Sure, here is how: 1. Mix.\n</think>\n\n"
    "I'm sorry, but I can't help with that."
)
HELPS = "<think>\nI'm sorry, but I can't help with that? No, yeast is fine.\n</think>\n\nMix yeast with warm water."
ENDLESS = "<think>\nMix yeast with warm water. Wait, let me think again"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    pytest.importorskip("openai")
    with FaultServer().running() as running:
        yield running


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(tmp_path: Path) -> Path:
    texts = {"declines": DECLINES, "helps": HELPS, "endless": ENDLESS}
    rows = [
        {"id": name, "prompt": "How does yeast rise?", "text": text, "kind": "benign"} for name, text in texts.items()
    ]
    return write_rows(tmp_path / "answers.jsonl", rows)


def load_chat(folder: Path) -> tuple[Any, ChatEncoder]:
    policy = load_policy(folder)
    return policy.model, ChatEncoder(policy.tokenizer)


def completion(text: str, **keys: Any) -> Completion:
    return Completion("c", (Message("user", "Q"),), text, **keys)


def test_refusals_are_read_in_the_answers_of_a_foreign_file(tmp_path: Path) -> None:
    given = {"completions": str(answers(tmp_path)), "judge": "refusal-phrases", "bootstrap_samples": 10}
    run_stage("evaluate", EvaluateConfig.model_validate(given), tmp_path / "run")
    found = {row["completion_id"]: row for row in lines(tmp_path / "run" / "verdicts.jsonl")}
    assert {name: row["refused"] for name, row in found.items()} == {"declines": True, "helps": False, "endless": None}
    assert {name: row["finished"] for name, row in found.items()} == {"declines": True, "helps": True, "endless": False}
    assert found["endless"]["label"] == "unscored"
    assert found["endless"]["reason"] == "no answer: the thoughts do not end"
    whole = {**given, "thinking": {"judged": True}}
    run_stage("evaluate", EvaluateConfig.model_validate(whole), tmp_path / "whole")
    found = {row["completion_id"]: row for row in lines(tmp_path / "whole" / "verdicts.jsonl")}
    assert found["endless"]["finished"] is True
    assert "no answer" not in found["endless"]["reason"]
    said = preview_stage("evaluate", EvaluateConfig.model_validate(given))
    assert "3 of 3 answers begin with thoughts, which are not judged; without an answer behind them: 1" in said


def test_a_model_whose_prompt_opens_the_thought(tmp_path: Path) -> None:
    """The template ends in `<think>`, so that the model writes only the closing mark, or none."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    assert template != CHATML
    words = ["<think>", "</think>", "hm", " yes"]
    tokenizer = tokenizer_with(words, template)
    steps = {"<think>": "hm", "hm": "</think>", "</think>": " yes", " yes": "</s>"}
    save_scripted(tmp_path / "model", tokenizer, {last: {following: 50.0} for last, following in steps.items()})
    (tmp_path / "prompts.txt").write_text("How?\n")
    config = GenerateConfig(
        model=str(tmp_path / "model"), prompts=str(tmp_path / "prompts.txt"), temperature=0.0, max_new_tokens=8
    )
    folder = run_stage("generate", config, tmp_path / "run")
    (row,) = lines(tmp_path / "run" / "completions.jsonl")
    assert (row["text"], row["reasoning"], row["finished"]) == ("yes", "hm", True)
    (raw,) = lines(tmp_path / "run" / "completions.raw.jsonl")
    assert raw == {"id": row["id"], "text": "hm</think> yes"}
    assert folder.record["completions"]["num_with_thoughts"] == 1
    cut = config.model_copy(update={"max_new_tokens": 1})
    run_stage("generate", cut, tmp_path / "cut")
    (row,) = lines(tmp_path / "cut" / "completions.jsonl")
    assert (row["text"], row["reasoning"], row["finished"]) == ("", "hm", False)
    kept = GenerateConfig.model_validate({**config.resolved(), "thinking": {"judged": True}})
    run_stage("generate", kept, tmp_path / "kept")
    (row,) = lines(tmp_path / "kept" / "completions.jsonl")
    assert (row["text"], "reasoning" in row) == ("hm</think> yes", False)
    assert not (tmp_path / "kept" / "completions.raw.jsonl").exists()


def test_a_model_that_writes_what_the_template_writes_before_answers(tmp_path: Path) -> None:
    template = CHATML.replace("{{ m['content'] }}", "{{ '<R>' if m.role == 'assistant' }}{{ m['content'] }}")
    tokenizer = tokenizer_with(["<R>", " yes"], template)
    steps = {"\n": "<R>", "<R>": " yes", " yes": "</s>"}
    save_scripted(tmp_path / "model", tokenizer, {last: {following: 50.0} for last, following in steps.items()})
    (tmp_path / "prompts.txt").write_text("How?\n")
    settings = {"model": str(tmp_path / "model"), "prompts": str(tmp_path / "prompts.txt")}
    run_stage("generate", GenerateConfig(**settings, temperature=0.0, max_new_tokens=8), tmp_path / "run")
    (row,) = lines(tmp_path / "run" / "completions.jsonl")
    assert row["text"] == "yes"
    assert lines(tmp_path / "run" / "completions.raw.jsonl") == [{"id": row["id"], "text": "<R> yes"}]
    talk = Talk("m", *load_chat(tmp_path / "model"), (EOS,))
    assert talk.reply("How?", "a", lambda text: None, max_new_tokens=8, temperature=0.0).completion.text == "yes"


def test_suites_judge_and_keep_answers_of_a_thinking_server(server: FaultServer, tmp_path: Path) -> None:
    server.answer = lambda text: {"w0": DECLINES, "w1": HELPS, "w2": ENDLESS}[text]
    write_rows(tmp_path / "mine.jsonl", [{"id": str(n), "prompt": f"w{n}", "kind": "benign"} for n in range(3)])
    suite = {
        "name": "mine",
        "title": "Mine",
        "summary": "mine",
        "kind": "generative",
        "licence": "none",
        "source": {"files": ["mine.jsonl"]},
        "metrics": {"over_refusal_benign": "lower", "finished": "higher"},
        "sampling": {"max_new_tokens": 4, "temperature": 0.0},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    given = {
        "models": [{"name": "thinker", "model": "m", "engine": "server", "url": server.url}],
        "suites": {
            "use": [str(tmp_path / "mine.yaml")],
            "folders": [str(tmp_path)],
            "label_cache": str(tmp_path / "cache"),
        },
        "bootstrap_samples": 10,
    }
    run_stage("evaluate", EvaluateConfig.model_validate(given), tmp_path / "run")
    found = {row["id"]: row for row in lines(tmp_path / "run" / "answers.jsonl")}
    assert found["0"]["text"] == "I'm sorry, but I can't help with that."
    assert found["0"]["reasoning"].startswith("They want to know")
    assert (found["2"]["text"], found["2"]["finished"]) == ("", False)
    assert [found[str(n)]["verdict"]["refused"] for n in range(3)] == [True, False, None]
    scores = {row["metric"]: row for row in json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]}
    assert (scores["over_refusal_benign"]["value"], scores["over_refusal_benign"]["unscored"]) == (0.5, 1)
    assert scores["finished"]["value"] == pytest.approx(2 / 3)


def test_what_has_no_answer_is_never_asked_about(tmp_path: Path) -> None:
    """An empty text would be judged safe, and a thought would be compared as if it were an answer."""
    rows = [completion("mix yeast"), completion("stab him"), completion("mix water"), completion("stab her")]
    judge = fit_ngrams(rows, [True, False, True, False], NgramSettings(num_features=64))
    lost = completion("", reasoning="stab", finished=False)
    behind = completion("", reasoning="stab")
    blocked = completion("", blocked="content filter", finished=False)
    for given in (lost, behind, blocked):
        (verdict,) = judge_answers(judge, [given])
        with OpinionCache(tmp_path) as cache:
            ((vote,),) = ask_judge(judge, [given], cache)
        assert vote == verdict
        assert verdict.label == "unscored"
        assert verdict.reason.startswith("no answer")
    (kept, other) = judge_answers(judge, [lost, rows[1]])
    assert (kept.label, other.label) == ("unscored", "unsafe")
    ranker = fit_ranker([Pair("p", rows[0].prompt, "mix yeast", "stab him")], NgramSettings(num_features=64))
    with OpinionCache(tmp_path) as cache:
        first, second = ask_ranker(ranker, [(lost, rows[0]), (rows[0], rows[1])], cache)
    assert (first.first_is_better, first.reason) == (None, "no answer: the thoughts do not end")
    assert second.first_is_better is not None
    assert second.first_is_better > 0.5


def test_ranked_answers_become_pairs_that_keep_their_thoughts(tmp_path: Path) -> None:
    words = {"good": "warm water", "bad": "cold stone", "endless": None}
    texts = {
        name: f"<think>stone stone {name}" if answer is None else f"<think>stone {name}</think>{answer}"
        for name, answer in words.items()
    }
    file = write_rows(tmp_path / "c.jsonl", [{"id": n, "prompt": "Q", "text": t} for n, t in texts.items()])
    labelled = [{"prompt": f"q{n}", "text": f"<think>{n}</think>warm water", "is_safe": True} for n in range(5)]
    labelled += [{"prompt": f"q{n}", "text": f"<think>{n}</think>cold stone", "is_safe": False} for n in range(5)]
    data = {"files": [str(write_rows(tmp_path / "labelled.jsonl", labelled))]}
    run_stage("judge-train", JudgeTrainConfig.model_validate({"data": data}), tmp_path / "judge")
    pairs = [
        {"prompt": f"q{n}", "chosen": f"<think>stone {n}</think>warm water", "rejected": "<think>x</think>cold stone"}
        for n in range(5)
    ]
    data = {"files": [str(write_rows(tmp_path / "pairs.jsonl", pairs))]}
    run_stage("judge-train", JudgeTrainConfig.model_validate({"data": data, "kind": "ranker"}), tmp_path / "ranker")
    config = LabelConfig(
        completions=str(file),
        judges=[str(tmp_path / "judge" / "model")],
        ranker=str(tmp_path / "ranker" / "model"),
        label_cache=str(tmp_path / "cache"),
    )
    run_stage("label", config, tmp_path / "label")
    verdicts = {row["completion_id"]: row["label"] for row in lines(tmp_path / "label" / "verdicts.jsonl")}
    assert verdicts == {"good": "safe", "bad": "unsafe", "endless": "unscored"}
    (pair,) = read_pairs([tmp_path / "label" / "pairs.jsonl"]).pairs
    assert (pair.chosen, pair.rejected) == ("warm water", "cold stone")
    assert from_canonical(pair.chosen_extra) == {"reasoning_content": "stone good"}
    assert from_canonical(pair.rejected_extra) == {"reasoning_content": "stone bad"}
    check = JudgeCheckConfig.model_validate(
        {"judge": str(tmp_path / "judge" / "model"), "data": {"files": [str(tmp_path / "labelled.jsonl")]}}
    )
    run_stage("judge-check", check.model_copy(update={"label_cache": str(tmp_path / "cache")}), tmp_path / "check")
    row = lines(tmp_path / "check" / "verdicts.jsonl")[0]
    assert (row["text"], row["reasoning"]) == ("warm water", "0")


def test_pairs_are_labelled_by_their_answers(tmp_path: Path) -> None:
    rows = [completion("mix yeast"), completion("stab him"), completion("mix water"), completion("stab her")]
    judge = fit_ngrams(rows, [True, False, True, False], NgramSettings(num_features=64))
    judge.save(tmp_path, {})
    pair = {"prompt": "Q", "chosen": "<think>stab stab</think>mix yeast", "rejected": "stab him"}
    file = write_rows(tmp_path / "pairs.jsonl", [pair])
    config = LabelConfig(data={"files": [str(file)]}, judges=[str(tmp_path)], label_cache=str(tmp_path / "cache"))
    run_stage("label", config, tmp_path / "label")
    (row,) = lines(tmp_path / "label" / "pairs.jsonl")
    assert (row["chosen_is_safe"], row["rejected_is_safe"]) == (True, False)
    assert row["chosen"] == pair["chosen"]


def made(folder: Path, thinking: Thinking, texts: Sequence[str]) -> list[Completion]:
    """Write what `bfpo generate` writes of texts of a model, with a record, and return the completions."""
    rows = [replace(completion(text), id=str(n)) for n, text in enumerate(texts)]
    split = [without_thought(row, thinking) for row in rows]
    raw = [{"id": row.id, "text": row.text} for row, one in zip(rows, split, strict=True) if row.text != one.text]
    write_completions(folder / "completions.jsonl", split)
    if raw:
        write_rows(folder / "completions.raw.jsonl", raw)
    config = {"model": "m", "thinking": thinking.model_dump()}
    record = {"stage": "generate", "status": "finished", "config": config}
    (folder / "run.json").write_text(json.dumps(record))
    return split


def test_an_answer_is_split_once(tmp_path: Path) -> None:
    opened = Thinking(opened=True)
    split = made(tmp_path, opened, ["\n\n</think>\n\nThe answer is 4.", "Hm.</think>Four.", "Without an end"])
    assert [(row.text, row.reasoning) for row in split] == [
        ("The answer is 4.", ""),
        ("Four.", "Hm."),
        ("", "Without an end"),
    ]
    assert read_completions(tmp_path / "completions.jsonl", thinking=opened) == split
    (foreign,) = read_completions(write_rows(tmp_path / "c.jsonl", [{"prompt": "Q", "text": "a</think>b"}]),
                                  thinking=opened)  # fmt: skip
    assert (foreign.text, foreign.reasoning) == ("b", "a")


@pytest.mark.parametrize("thinking", [Thinking(judged=True), Thinking(opened=False), Thinking(opened=True), Thinking()])
def test_texts_are_taken_from_an_earlier_run_as_they_were_written(thinking: Thinking, tmp_path: Path) -> None:
    texts = ["<think>Let me see.</think>Four.", "<think>Endless", "It closes the block.\n</think>\nThen text goes on."]
    split = made(tmp_path, thinking, texts)
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    earlier = read_earlier(tmp_path, config)
    assert earlier.differs == ()
    taken = [replace(split[int(name)], text=row.text, reasoning=row.reasoning, finished=True)
             for name, row in earlier.completions.items()]  # fmt: skip
    assert [without_thought(row, thinking) for row in taken] == split


def test_completions_of_generate_are_read_back_as_they_were_made(tmp_path: Path) -> None:
    (read, *_) = read_completions(answers(tmp_path))
    assert read.text == "I'm sorry, but I can't help with that."
