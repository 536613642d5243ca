"""Commands write the same bytes with one worker and with several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from bfpo.config import CleanConfig, EvaluateConfig, GenerateConfig, JudgeCheckConfig, LabelConfig
from bfpo.core.records import load_lines
from bfpo.core.schema import VerdictRow
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from execution.copies import take_copies
from helpers import byte_tokenizer
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("made"))


def make_inputs(folder: Path) -> Path:
    """Return a folder with a model, a judge and prompts of different lengths."""
    save_policy(tiny_model(initializer_range=0.6), tiny_tokenizer(), folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=260, num_labels=2, pad_token_id=1, initializer_range=0.5, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    byte_tokenizer().save_pretrained(folder / "judge")
    rows = [{"id": f"p{n}", "prompt": " ".join(f"w{(3 * n + k) % 90}" for k in range(1 + n % 7))} for n in range(30)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def generate(made: Path, **settings: Any) -> GenerateConfig:
    keys = {"max_new_tokens": 6, "batch_size": 1, "threads": 1, **settings}
    return GenerateConfig.model_validate({"model": str(made / "model"), "prompts": str(made / "prompts.jsonl"), **keys})


def test_the_number_of_workers_changes_no_byte(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bfpo.judges.shared.PER_CALL", 7)
    judge = {"format": "classifier", "model": str(made / "judge"), "safe_label": 1, "text": "completion"}
    for workers in (1, 2):
        executor = {"workers": workers}
        answers = run_stage("generate", generate(made, executor=executor), tmp_path / f"answers-{workers}")
        completions = str(answers.path / "completions.jsonl")
        keys = {"completions": completions, "executor": executor, "threads": 1}
        label = LabelConfig.model_validate({**keys, "judges": judge, "label_cache": str(tmp_path / f"cache-{workers}")})
        run_stage("label", label, tmp_path / f"label-{workers}")
    take_copies(monkeypatch)  # the same judge, now without new processes
    for workers in (1, 2):
        keys = {"completions": str(tmp_path / "answers-1" / "completions.jsonl"), "threads": 1}
        evaluate = EvaluateConfig.model_validate({**keys, "judge": judge, "executor": {"workers": workers}})
        run_stage("evaluate", evaluate, tmp_path / f"scores-{workers}")
    files = ("answers/completions.jsonl", "label/verdicts.jsonl", "scores/verdicts.jsonl", "scores/scores.json")
    for file in files:
        folder, _, name = file.partition("/")
        one, two = ((tmp_path / f"{folder}-{workers}" / name).read_bytes() for workers in (1, 2))
        assert one == two, file
    verdicts = list(load_lines(VerdictRow, tmp_path / "label-2" / "verdicts.jsonl"))
    assert len(verdicts) == 30
    assert all(row.p_safe is not None for row in verdicts)


def test_a_check_of_a_judge_and_of_labels_is_shared_too(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bfpo.judges.shared.PER_CALL", 7)
    copies = take_copies(monkeypatch)
    answers = [
        {"id": f"a{n}", "prompt": f"w{n}", "completion": f"w{n} w{3 * n}", "is_safe": n % 3 > 0} for n in range(30)
    ]
    pairs = [
        {"prompt": f"w{n}", "chosen": f"w{n}", "rejected": f"w{2 * n}", "chosen_is_safe": n % 2, "rejected_is_safe": 1}
        for n in range(1, 20)
    ]
    for name, rows in (("answers", answers), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judge = {"format": "classifier", "model": str(made / "judge"), "safe_label": 1, "text": "completion"}
    for workers in (1, 2):
        cache = str(tmp_path / f"cache-{workers}")
        keys: dict[str, Any] = {"executor": {"workers": workers}, "threads": 1, "label_cache": cache}
        data = {"files": str(tmp_path / "answers.jsonl")}
        check = JudgeCheckConfig.model_validate({**keys, "judge": judge, "data": data})
        run_stage("judge-check", check, tmp_path / f"check-{workers}")
        data = {"files": str(tmp_path / "pairs.jsonl")}
        clean = CleanConfig.model_validate({**keys, "judges": judge, "data": data})
        run_stage("clean", clean, tmp_path / f"clean-{workers}")
    assert [one.used for one in copies] == [{0, 1}, {0, 1}]
    for file in ("check/verdicts.jsonl", "check/quality.json", "clean/clean.json", "clean/verdicts.jsonl"):
        folder, _, name = file.partition("/")
        one, two = ((tmp_path / f"{folder}-{workers}" / name).read_bytes() for workers in (1, 2))
        assert one == two, file


def test_another_number_of_workers_continues_a_run(made: Path, tmp_path: Path) -> None:
    run_stage("generate", generate(made), tmp_path / "whole")
    rows = (tmp_path / "whole" / "completions.jsonl").read_text().splitlines()
    assert len(rows) == 30
    again = run_stage("generate", generate(made, executor={"workers": 4}), tmp_path / "whole", resume=True)
    assert again.finished


@pytest.mark.parametrize(
    ("cls", "keys", "key"),
    [
        (GenerateConfig, {"engine": "server", "url": "http://h/v1", "executor": {"workers": 2}}, "executor"),
        (GenerateConfig, {"executor": {"gpus_per_worker": 2}}, "gpus_per_worker"),
        (GenerateConfig, {"executor": {"address": "h:6379"}}, "address"),
        (LabelConfig, {"judges": "oracle", "completions": "c", "executor": {"workers": 2}}, "executor"),
        (EvaluateConfig, {"completions": "c", "executor": {"workers": 2}}, "executor"),
        (JudgeCheckConfig, {"judge": "oracle", "data": {"files": "f"}, "executor": {"workers": 2}}, "executor"),
        (CleanConfig, {"data": {"files": "f"}, "executor": {"workers": 2}}, "executor"),
    ],
)
def test_workers_are_refused_where_none_would_be_used(cls: Any, keys: dict[str, Any], key: str) -> None:
    needed = {"model": "m", "prompts": "p"} if cls is GenerateConfig else {}
    with pytest.raises(ValueError, match=key):
        cls.model_validate({**needed, **keys})
