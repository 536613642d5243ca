"""Suites that ask what a model was trained on: what runs record, how it is counted and left out; parts and limits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from bfpo.config import AlignConfig, EvaluateConfig, InterpolateConfig, SftConfig
from bfpo.core.errors import ConfigError, DataError, RunError
from bfpo.core.schema import Message, Prompt
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from bfpo.suites import lm_eval
from bfpo.suites.lm_eval import TaskRunner
from bfpo.training.trained_on import asked_in_training, has_no_record, trained_prompts
from helpers import write_rows
from messages import raises, says
from tiny import tiny_model, tiny_tokenizer

TRAINING = {"max_length": 40, "max_steps": 1, "threads": 1, "trainable": "all"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of `sft` on w0 to w2, of `train` from it on w3 (main) and w4 (buffer), and a suite of w0 to w9."""
    root = tmp_path_factory.mktemp("trained")
    save_policy(tiny_model(max_position_embeddings=64), tiny_tokenizer(), root / "start")
    write_rows(root / "sft.jsonl", [{"prompt": f"w{n}", "completion": "w9"} for n in range(3)])
    pair = {"chosen": "w9 w8", "rejected": "w7", "chosen_is_safe": True, "rejected_is_safe": False}
    turns = [{"role": "system", "content": "w9"}, {"role": "user", "content": " W3 "}]
    later = [{"role": "assistant", "content": "w1"}, {"role": "user", "content": "w6"}]
    write_rows(root / "main.jsonl", [{"prompt": [*turns, *later], **pair}, {"prompt": "w30", **pair}])
    write_rows(root / "buffer.jsonl", [{"prompt": "w4", **pair}])
    write_rows(root / "held.jsonl", [{"prompt": "w5", **pair}])
    write_rows(root / "mine.jsonl", [{"prompt": f"w{n}", "id": str(n)} for n in range(10)])
    suite: dict[str, Any] = {"name": "mine", "title": "Mine", "summary": "s", "kind": "generative", "licence": "CC0"}
    suite |= {"source": {"files": ["mine.jsonl"]}, "metrics": {"over_refusal_full": "lower"}, "prompt_kind": "benign"}
    suite |= {"sampling": {"max_new_tokens": 3, "temperature": 0.0}}
    (root / "mine.yaml").write_text(yaml.safe_dump(suite))
    (root / "other.yaml").write_text(yaml.safe_dump({**suite, "name": "other", "title": "Other"}))
    sft = SftConfig(
        model=str(root / "start"),
        data={"files": str(root / "sft.jsonl")},
        completions_per_step=2,
        completions_per_microbatch=2,
        **TRAINING,
    )
    run_stage("sft", sft, root / "sft")
    run_stage("train", align(root), root / "train")
    return root


def align(root: Path) -> AlignConfig:
    files = {name: {"files": str(root / f"{file}.jsonl")} for name, file in (("data", "main"), ("buffer", "buffer"))}
    settings: dict[str, Any] = {"eval_data": {"files": str(root / "held.jsonl")}, "pairs_per_step": 2, **TRAINING}
    return AlignConfig(model=str(root / "sft" / "model"), beta=0.1, learning_rate=1e-3, **files, **settings)


def evaluated(root: Path, out: Path, model: str = "train/model", **suites: Any) -> dict[str, Any]:
    section = {"use": [str(root / "mine.yaml")], "folders": [str(root)], "label_cache": str(root / "cache"), **suites}
    models = [{"name": "one", "model": str(root / model)}]
    run_stage("evaluate", EvaluateConfig(models=models, suites=section, threads=1), out)  # type: ignore[arg-type]
    return json.loads((out / "scores.json").read_text())  # type: ignore[no-any-return]


def asked(out: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (out / "answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["suite"], []).append(row["id"])
    return found


def known(model: Path) -> list[int]:
    hashes = trained_prompts(str(model))
    assert hashes is not None
    return [n for n in range(40) if asked_in_training(Prompt("", (Message("user", f"w{n}"),)), hashes)]


def test_a_run_records_its_prompts_and_those_of_its_start(root: Path, tmp_path: Path) -> None:
    assert known(root / "sft" / "model") == [0, 1, 2]
    assert known(root / "train" / "model") == [0, 1, 2, 3, 4, 30]  # a conversation by its first turn, nothing held out
    assert known(root / "train" / "checkpoints" / "checkpoint-1") == known(root / "train")
    config = InterpolateConfig(first=str(root / "start"), second=str(root / "sft" / "model"), weights="0.5")
    run_stage("interpolate", config, tmp_path / "blend")
    assert known(tmp_path / "blend" / "models" / "weight-0.5") == [0, 1, 2]
    assert trained_prompts(str(root / "start")) is None
    assert trained_prompts("org/model-of-the-hub") is None
    assert not has_no_record(str(root / "start"))
    shutil.move(shutil.copytree(root / "train", tmp_path / "copy"), tmp_path / "moved")
    assert known(tmp_path / "moved" / "model") == known(root / "train")


def test_a_conversation_is_asked_where_all_its_turns_are(root: Path) -> None:
    hashes = trained_prompts(str(root / "train"))
    assert hashes is not None
    first, second = Message("user", "w3"), Message("user", "W6")
    other = (first, Message("assistant", "another answer"), second)
    assert asked_in_training(Prompt("", other), hashes)
    assert not asked_in_training(Prompt("", (second,)), hashes)
    assert not asked_in_training(Prompt("", (first, second, second)), hashes)
    assert not asked_in_training(Prompt("", (first,)), np.zeros(0, np.uint64))


def test_prompts_of_the_training_are_counted(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(root, tmp_path / "run")
    assert found["suites"][0]["trained_on"] == {"one": 5}
    assert "left_out" not in found["suites"][0]
    warning = "one: 5 of the 10 prompts of Mine are prompts that it was trained on"
    assert [text for text in found["warnings"] if text.startswith(warning)]
    assert f"Warning: {warning}" in capsys.readouterr().out
    assert "one was trained on 5 of the 10 prompts." in (tmp_path / "run" / "scores.md").read_text()
    of_start = evaluated(root, tmp_path / "start", "start")
    assert ("trained_on" in of_start["suites"][0], of_start["warnings"]) == (False, [])


def test_prompts_of_the_training_are_left_out_before_the_limit(root: Path, tmp_path: Path) -> None:
    found = evaluated(root, tmp_path / "run", trained_on="leave_out", limit=4)
    (facts,) = found["suites"]
    assert (facts["num_prompts"], facts["left_out"]) == (4, {"a model was trained on it": 5})
    assert "trained_on" not in facts
    assert set(asked(tmp_path / "run")["mine"]) < set("56789")
    write_rows(tmp_path / "mine.jsonl", [{"prompt": "w1"}, {"prompt": "W2 "}])
    both = [str(root / "mine.yaml"), "world"]
    skipped = evaluated(root, tmp_path / "none", use=both, folders=[str(tmp_path)], trained_on="leave_out", limit=2)
    assert (skipped["suites"][0]["status"], skipped["suites"][1]["status"]) == ("skipped", "scored")
    assert skipped["suites"][0]["reason"] == "all its 2 prompts are left out: a model was trained on it"


class Task:
    """Stands in for a task of lm-eval."""

    def __init__(self, docs: list[dict[str, Any]], column: str | None) -> None:
        self.eval_docs, self._column = docs, column
        self.config = SimpleNamespace(output_type="generate_until", generation_kwargs={})

    def doc_to_text(self, doc: dict[str, Any]) -> Any:
        return 0 if self._column is None else f"{doc[self._column]}"

    def set_fewshot_seed(self, seed: int) -> None: ...

    def set_config(self, *_: object, **__: object) -> None: ...


@pytest.fixture
def asked_of_task(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let tasks run without lm-eval; the function that is returned sets their documents and gives what is asked."""
    asked: list[int] = []
    task: list[Task] = []

    def load(runner: TaskRunner) -> None:
        runner._model = SimpleNamespace(max_length=64, max_gen_toks=8, tok_encode=str.split)
        runner._manager = SimpleNamespace(load=lambda names: {"tasks": dict.fromkeys(names, task[0])})

    def evaluate(task_dict: dict[str, Task], samples: dict[str, list[int]] | None, **_: object) -> dict[str, Any]:
        ((name, one),) = task_dict.items()
        asked[:] = range(len(one.eval_docs)) if samples is None else samples[name]
        rows = [{"doc_id": n, "prompt_level_strict_acc": 1.0, "arguments": [("w1",)]} for n in asked]
        return {"samples": {name: rows}, "versions": {}}

    def of(docs: list[dict[str, Any]], column: str | None = "prompt") -> list[int]:
        task[:] = [Task(docs, column)]
        return asked

    monkeypatch.setattr(TaskRunner, "_load", load)
    monkeypatch.setattr(lm_eval, "_lm_eval", lambda: SimpleNamespace(evaluate=evaluate))
    return of


def test_documents_of_the_training_are_counted_and_left_out(
    root: Path, tmp_path: Path, asked_of_task: Callable[..., list[int]]
) -> None:
    docs = [{"prompt": f"W{n} "} for n in range(8)]
    write_rows(tmp_path / "ifeval.jsonl", docs)
    ifeval = {"use": ["ifeval"], "folders": [str(tmp_path)]}
    asked = asked_of_task(docs)
    found = evaluated(root, tmp_path / "run", **ifeval)
    assert (asked, found["suites"][0]["trained_on"]) == (list(range(8)), {"one": 5})
    assert found["warnings"][0].startswith("one: 5 of the 8 prompts of IFEval are prompts that it was trained on")
    found = evaluated(root, tmp_path / "limit", **ifeval, trained_on="leave_out", limit=2)
    assert (len(asked), set(asked) < {5, 6, 7}) == (2, True)
    (facts,) = found["suites"]
    assert (facts["num_prompts"], facts["left_out"]) == (2, {"a model was trained on it": 5})
    assert "trained_on" not in facts
    asked_of_task([{"goal": "w9"}, {"goal": "w0"}], None)
    assert evaluated(root, tmp_path / "column", **ifeval)["suites"][0]["trained_on"] == {"one": 1}
    asked_of_task([{"text": "w1"}], None)
    (warning,) = evaluated(root, tmp_path / "other", **ifeval)["warnings"]
    assert warning.startswith("one: it is not known whether IFEval asks prompts that it was trained on")
    asked_of_task(docs[:3])
    with raises(DataError, "all its 3 documents are left out"):
        evaluated(root, tmp_path / "none", **ifeval, trained_on="leave_out")


def test_a_run_that_records_nothing_is_not_zero(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = shutil.copytree(root / "train", tmp_path / "old")
    (old / "trained_on.npy").unlink()
    assert trained_prompts(str(old / "model")) is None
    (warning,) = evaluated(tmp_path, tmp_path / "run", "old/model", use=[str(root / "mine.yaml")], folders=[str(root)])[
        "warnings"
    ]
    assert warning.startswith("one: its run folder does not record the prompts")
    settings = align(root).model_dump(exclude_unset=True) | {"model": str(old / "model")}
    run_stage("train", AlignConfig(**settings), tmp_path / "next")
    says(caplog, "does not record the prompts")
    assert known(tmp_path / "next") == [3, 4, 30]
    (old / "trained_on.npy").write_bytes(b"cut")
    with raises(RunError, "trained_on.npy"):
        trained_prompts(str(old / "model"))


def test_each_suite_has_its_limit_and_part(root: Path, tmp_path: Path) -> None:
    use = [str(root / "mine.yaml"), str(root / "other.yaml")]
    split = {"parts": {"a": 0.5, "b": 0.5}, "part": "a"}
    first = evaluated(root, tmp_path / "one", use=use, limit=3, each={"other": {"limit": None}})
    assert [facts["num_prompts"] for facts in first["suites"]] == [3, 10]
    assert set(asked(tmp_path / "one")["mine"]) != set("012")  # not the first ones
    second = evaluated(root, tmp_path / "two", use=use, split=split, each={"other": {"split": {**split, "part": "b"}}})
    parts = asked(tmp_path / "two")
    assert sorted(parts["mine"] + parts["other"]) == list("0123456789")
    assert second["suites"][0]["left_out"] == {"in another part of the split": len(parts["other"])}
    third = evaluated(root, tmp_path / "three", "start", use=use, limit=3, split=split, each={"other": {"split": None}})
    assert [facts["num_prompts"] for facts in third["suites"]] == [3, 3]
    assert asked(tmp_path / "three")["other"] == asked(tmp_path / "one")["mine"]  # whatever the model and the suite
    for each, key in (({"mien": {"limit": 2}}, "mien"), ({"bbq": {"split": split}}, "bbq")):
        with raises(ConfigError, key):
            evaluated(root, tmp_path / "bad", use=[*use, "bbq"], each=each)
