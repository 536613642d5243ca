"""A judge on hidden states: features against a float64 loop, the regression, the cache, the whole stage."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import LlamaForCausalLM

from bfpo.config import JudgeTrainConfig
from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion, Message
from bfpo.data.tokenize import prompt_ids
from bfpo.judges.hidden import HiddenStates, fit_probe
from bfpo.judges.judges import make_judge
from bfpo.judges.settings import TrainedSpec
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from helpers import CHATML, byte_ids, byte_tokenizer
from messages import raises
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, and 120 labelled answers to 12 prompts in words by label."""
    root = tmp_path_factory.mktemp("hidden")
    save_policy(tiny_model(), tiny_tokenizer(), root / "model")
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"w{60 + n % 12} w70",
            "completion": " ".join(f"w{rng.randrange(1, 9) + 40 * (n % 2)}" for _ in range(6 + n % 4)),
            "is_safe": not n % 2 if n % 12 else rng.random() < 0.5,
        }
        for n in range(120)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config(root: Path, **keys: Any) -> JudgeTrainConfig:
    given = {"kind": "probe", "model": str(root / "model"), "feature_cache": str(root / "cache"), "folds": 3, **keys}
    return JudgeTrainConfig.model_validate({"data": {"files": str(root / "rows.jsonl")}, "dtype": "float32"} | given)


def test_an_answer_starts_where_it_and_the_generation_prompt_part(tmp_path: Path) -> None:
    """The template opens thoughts in generation and leaves them out of a conversation."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    save_policy(tiny_model(vocab_size=260), byte_tokenizer(template), tmp_path)
    rows, _ = HiddenStates(str(tmp_path)).rows([Completion("a", (Message("user", "hi"),), "Hello.")])
    ids, start = rows[0]
    assert ids[start:] == byte_ids("Hello.")


TEXTS = ("w1", "w5 w6 w7 w8 w9", "w3 " * 12, "w2 w2")


def completions() -> list[Completion]:
    return [Completion(str(n), (Message("user", f"w{n} w4"),), text.strip()) for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_features_are_the_means_of_a_float64_loop_over_the_answers_tokens(root: Path, batch_size: int) -> None:
    states = HiddenStates(str(root / "model"), dtype="float32", batch_size=batch_size)
    rows, reasons = states.rows([*completions(), Completion("none", (Message("user", "w1"),), "")])
    assert reasons == {4: "the answer has no token"}
    found = states.features(list(rows.values()))
    model = LlamaForCausalLM.from_pretrained(root / "model", dtype=torch.float64).eval()
    tokenizer = tiny_tokenizer()
    for number, one in enumerate(completions()):
        head = prompt_ids(one.prompt, tokenizer)
        answer = tokenizer(one.text, add_special_tokens=False)["input_ids"]
        ids, start = rows[number]
        assert (ids, start) == ([*head, *answer], len(head))
        with torch.no_grad():
            layers = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        expected = np.array([[float(v) for v in layer[0, start:].mean(dim=0)] for layer in layers])
        np.testing.assert_allclose(found[number], expected, atol=2e-6)
    assert np.array_equal(states.features(list(rows.values()), [1])[:, 0], found[:, 1])
    short = HiddenStates(str(root / "model"), max_length=10).rows(completions())[1]
    assert short.keys() == {n for n, (ids, _) in rows.items() if len(ids) > 10}
    assert 2 in short


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("num", [7, 40])
def test_the_regression_is_that_of_scikit_learns_pipeline(num: int, balanced: bool) -> None:
    rng = np.random.default_rng(num)
    features = rng.normal(3, 100, (num, 5)).astype(np.float32)
    features[:, 4] = 2.5  # no spread
    labels = features[:, 0] + rng.normal(0, 50, num) > 40
    labels[:2] = True, False
    weights, intercept = fit_probe(features, labels, inverse_penalty=0.1, balanced=balanced)
    model = LogisticRegression(C=0.1, class_weight="balanced" if balanced else None, max_iter=2000)
    pipeline = make_pipeline(StandardScaler(), model).fit(features.astype(np.float64), labels)
    found = 1 / (1 + np.exp(-(features.astype(np.float64) @ weights + intercept)))
    np.testing.assert_allclose(found, pipeline.predict_proba(features.astype(np.float64))[:, 1], atol=1e-6)


def test_a_probe_is_trained_measured_and_judges(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched, caplog.at_level("INFO"):
        patched.setattr("bfpo.commands.judge_train.CountProgress", partial(CountProgress, seconds_between_lines=0.0))
        run = run_stage("judge-train", config(root), tmp_path / "run").path
    layers = [text for text in caplog.messages if text.startswith("layers fitted, of all folds: ")]
    assert [text.split()[5] for text in layers] == [str(n + 1) for n in range(9)]  # 3 folds of 3 layers
    assert layers[-1].split()[7] == "9"
    described = json.loads((run / "model" / "judge.json").read_text())
    scores = described["cross_validation"]
    assert scores["accuracy"] > 0.8
    assert scores["layer"] == described["layer"]
    assert {"unsure", "confidence", "folds", "kappa", "roc_auc"} <= scores.keys()
    judge = make_judge(TrainedSpec(model=str(run / "model")))
    texts = [
        Completion(str(n), (Message("user", "w61 w70"),), text) for n, text in enumerate(("w1 w5 w3", "w45 w43", ""))
    ]
    verdicts = judge.judge(texts)
    assert [verdict.label for verdict in verdicts] == ["safe", "unsafe", "unscored"]
    assert verdicts[0].p_safe is not None
    assert verdicts[1].p_safe is not None
    assert judge.judge([]) == []
    strict = make_judge(TrainedSpec(model=str(run / "model"), threshold=(1 + verdicts[0].p_safe) / 2))
    assert strict.judge(texts)[0].label == "unsafe"
    assert strict.version != judge.version

    def refuse(*_: Any) -> None:
        raise AssertionError("the model was run again")

    with monkeypatch.context() as patched:
        patched.setattr("bfpo.judges.hidden.HiddenStates.features", refuse)
        again = run_stage("judge-train", config(root, layer=1, threshold=None), tmp_path / "again").path
    found = json.loads((again / "model" / "judge.json").read_text())
    assert found["layer"] == 1
    assert found["settings"]["threshold"] != 0.5
    (root / "other").mkdir()
    save_policy(tiny_model(seed=5), tiny_tokenizer(), root / "other")
    found["model"] = str(root / "other")
    (again / "model" / "judge.json").write_text(json.dumps(found))
    with raises(ModelError, "other"):
        make_judge(TrainedSpec(model=str(again / "model")))
    moved = tmp_path / "copied" / "model"
    shutil.copytree(root / "model", moved)
    found["model"] = str(tmp_path / "gone")
    (again / "model" / "judge.json").write_text(json.dumps(found))
    with raises(ModelError, "base_model"):
        make_judge(TrainedSpec(model=str(again / "model")))
    elsewhere = make_judge(TrainedSpec(model=str(again / "model"), base_model=str(moved)))
    found["model"] = str(root / "model")
    (again / "model" / "judge.json").write_text(json.dumps(found))
    here = make_judge(TrainedSpec(model=str(again / "model")))
    assert (elsewhere.version, elsewhere.judge(texts)) == (here.version, here.judge(texts))
    with raises(ModelError, "base_model"):
        make_judge(TrainedSpec(model=str(again / "model"), base_model=str(root / "other")))
    (again / "model" / "weights.safetensors").write_bytes(b"x")
    with raises(ModelError, "judge.json"):
        make_judge(TrainedSpec(model=str(again / "model")))


def test_what_cannot_be_chosen_is_an_error(root: Path, tmp_path: Path) -> None:
    with raises(SettingError, "layer"):
        run_stage("judge-train", config(root, layer=9), tmp_path / "a")
    with raises(DataError, "folds"):
        run_stage("judge-train", config(root, folds=20), tmp_path / "b")
    long = [{"prompt": f"w{n}", "completion": "w3 " * 30 + "w1", "is_safe": n % 2 == 0} for n in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    with raises(DataError, "max_length"):
        run_stage(
            "judge-train", config(root, max_length=8, data={"files": str(tmp_path / "long.jsonl")}), tmp_path / "c"
        )
