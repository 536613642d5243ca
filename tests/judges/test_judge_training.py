"""What training of a judge does to its rows and its threshold, and the options of a fine-tuned classifier."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import cohen_kappa_score
from transformers import TrainingArguments

from bfpo.config import JudgeTrainConfig, load_config
from bfpo.core.errors import ConfigError, SettingError
from bfpo.core.schema import Completion, Message
from bfpo.judges.classifier import _balanced_loss, classifier_row, classifier_rows
from bfpo.judges.judges import make_judge
from bfpo.judges.ngrams import NgramJudge, NgramSettings, fit_ngrams
from bfpo.judges.quality import best_threshold
from bfpo.judges.settings import ClassifierSpec, TrainedSpec
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from messages import raises
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, and 90 labelled answers to 30 prompts, a third of them unsafe and some long."""
    root = tmp_path_factory.mktemp("training")
    save_policy(tiny_model(), tiny_tokenizer(), root / "model")
    rng = random.Random(0)
    rows = [
        {
            "id": str(n),
            "prompt": f"w{30 + n % 30} w70",
            "completion": " ".join(f"w{rng.randrange(1, 20) + 12 * (n % 3 == 0)}" for _ in range(3 + n % 9)),
            "is_safe": n % 3 != 0,
        }
        for n in range(90)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def rows_of(root: Path, num_words: int | None = None) -> tuple[list[Completion], list[bool]]:
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    made = [
        Completion(row["id"], (Message("user", row["prompt"]),), " ".join(row["completion"].split()[:num_words]))
        for row in rows
    ]
    return made, [row["is_safe"] for row in rows]


def train(root: Path, out: Path, **keys: Any) -> Path:
    data = {"files": str(root / "rows.jsonl")}
    return run_stage("judge-train", JudgeTrainConfig.model_validate({"data": data, **keys}), out).path


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_has_the_largest_kappa(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(60) < 0.7
    p = np.round(np.clip(rng.normal(0.3 + 0.4 * labels, 0.25), 0, 1), 2)
    found = cohen_kappa_score(labels, p >= best_threshold(p, labels))
    tried = [cohen_kappa_score(labels, p >= t) for t in np.arange(0.005, 1, 0.01)]
    assert found == pytest.approx(max(tried))
    assert best_threshold(np.full(9, 0.4), np.arange(9) > 4) == 0.5
    assert best_threshold(np.zeros(0), np.zeros(0, bool)) == 0.5


def test_n_grams_of_cut_answers_weighed_with_a_threshold_of_held_out_rows(root: Path, tmp_path: Path) -> None:
    settings = {"max_answer_words": 4, "balanced": True, "threshold": None}
    folder = train(root, tmp_path / "run", **settings) / "model"
    described = json.loads((folder / "judge.json").read_text())
    threshold = described["settings"]["threshold"]
    assert threshold not in (0.5, None)
    rows, labels = rows_of(root, 4)
    expected = fit_ngrams(rows, labels, NgramSettings(threshold=threshold), balanced=True)
    assert NgramJudge.load(folder).version == expected.version
    whole = fit_ngrams(rows_of(root)[0], labels, NgramSettings(threshold=threshold), balanced=True)
    plain = fit_ngrams(rows, labels, NgramSettings(threshold=threshold))
    assert len({expected.version, whole.version, plain.version}) == 3
    sure = [np.mean([v.p_safe for v in judge.judge(rows)]) for judge in (plain, expected)]
    assert sure[0] > sure[1]  # most rows are safe; weighed, fewer are called so
    assert described["cross_validation"]["kappa"] is not None


def test_a_classifier_is_measured_on_prompts_that_it_was_not_trained_on(root: Path, tmp_path: Path) -> None:
    keys = {"kind": "classifier", "model": str(root / "model"), "max_length": 16, "windows": True, "dtype": "bfloat16"}
    keys |= {"held_out": 0.3, "max_steps": 3, "save_steps": 2, "batch_size": 8, "balanced": True, "threshold": None}
    run = train(root, tmp_path / "run", **keys)
    described = json.loads((run / "model" / "judge.json").read_text())
    held_out = described["held_out"]
    assert held_out["rows"] == 27
    assert {"accuracy", "kappa", "roc_auc", "unsure", "confidence"} <= held_out.keys()
    assert described["settings"]["windows"] is True
    assert not (run / "checkpoints").exists()
    assert len((run / "model" / "trained_rows.txt").read_text().split()) == 63
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    judge = make_judge(TrainedSpec(model=str(run / "model")))
    assert judge.held_out == held_out  # type: ignore[attr-defined]
    [long] = judge.judge([Completion("a", (Message("user", "w1"),), "w3 " * 60)])
    assert long.p_safe is not None


@pytest.mark.parametrize("keys", [{"trainable": "head"}, {"lora": {"r": 2}}])
def test_a_frozen_body_and_adapters_train_what_they_say(root: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    given = {"kind": "classifier", "model": str(root / "model"), "max_steps": 2, "learning_rate": 0.1, "held_out": 0.0}
    run = train(root, tmp_path / "run", **given, **keys)
    before, after = load_file(root / "model" / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    body = [name for name in after if name.startswith("model.")]
    changed = {name for name in body if not torch.equal(before[name], after[name])}
    assert "score.weight" in after
    assert bool(changed) == ("lora" in keys)
    assert all("proj" in name for name in changed)
    assert make_judge(TrainedSpec(model=str(run / "model"))).judge(rows_of(root)[0])[0].p_safe is not None


@pytest.mark.parametrize(("name", "words"), [("n_gpu", "2 GPUs"), ("world_size", "2 processes")])
def test_several_gpus_or_processes_are_refused_whose_batches_would_add_up(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setattr(TrainingArguments, name, 2)
    with raises(SettingError, words):
        train(root, tmp_path / "run", kind="classifier", model=str(root / "model"), max_steps=2)


def test_the_balanced_loss_is_that_of_a_float64_loop() -> None:
    labels = [0, 0, 0, 0, 0, 1]
    loss = _balanced_loss(labels)
    for num in (1, 2, 5):
        logits = torch.randn(num, 2, generator=torch.Generator().manual_seed(num), dtype=torch.float64)
        given = torch.tensor([n % 2 for n in range(num)])
        weights = [6 / (2 * 5), 6 / (2 * 1)]
        terms = [-weights[int(y)] * float(row.log_softmax(0)[y]) for row, y in zip(logits, given, strict=True)]
        assert float(loss({"logits": logits}, given)) == pytest.approx(sum(terms) / num, rel=1e-6)


def test_windows_cover_the_whole_answer_and_only_a_long_one_has_several() -> None:
    tokenizer = tiny_tokenizer()
    for num in (1, 5, 12, 13, 40, 100):
        answer = " ".join(f"w{n % 80}" for n in range(num))
        whole = classifier_row(tokenizer, "w1 w2", answer)["input_ids"]
        rows = [row["input_ids"] for row in classifier_rows(tokenizer, "w1 w2", answer, window=16)]
        bare = len(classifier_row(tokenizer, "w1 w2", "")["input_ids"])
        assert (len(rows) == 1) == (len(whole) <= 16)
        assert all(len(row) <= 16 for row in rows)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(rows) > 1:
            parts = [[token for token in row if token in set(ids)] for row in rows]
            assert sum(len(row) - bare for row in rows) > num  # they overlap
            assert set(ids) <= {token for part in parts for token in part}
    long_prompt = " ".join(["w1"] * 30)
    assert len(classifier_rows(tokenizer, long_prompt, "w2 " * 30, window=16)) == 1
    assert len(classifier_rows(tokenizer, "w1", "w2 " * 30, window=None)) == 1


def test_the_least_safe_window_counts(root: Path, tmp_path: Path) -> None:
    run = train(
        root, tmp_path / "run", kind="classifier", model=str(root / "model"), max_length=16, max_steps=1, held_out=0.0
    )
    folder = str(run / "model")
    spec = {"model": folder, "safe_label": "safe", "max_length": 16}
    windowed = make_judge(ClassifierSpec(**spec, windows=True))
    plain = make_judge(ClassifierSpec(**spec))
    long = Completion("a", (Message("user", "w1"),), " ".join(f"w{n}" for n in range(40)))
    assert plain.judge([long])[0].label == "unscored"
    rows = classifier_rows(tiny_tokenizer(), "w1", long.text, window=16)
    from bfpo.judges.classifier import classifier_logits

    logits = classifier_logits(windowed._model, windowed._tokenizer, rows, 4)  # type: ignore[attr-defined]
    expected = min(float(row.softmax(dim=-1)[1]) for row in logits)
    short = Completion("b", (Message("user", "w1"),), "w2")
    found = windowed.judge([short, long, short])
    assert found[1].p_safe == pytest.approx(expected, abs=1e-6)
    assert found[0].p_safe == found[2].p_safe == pytest.approx(plain.judge([short])[0].p_safe, abs=1e-6)
    assert windowed.version != plain.version


@pytest.mark.parametrize(
    "keys",
    [
        ["kind=classifier", "model=m", "threshold=null", "held_out=0"],
        ["kind=classifier", "model=m", "lora={}", "trainable=head"],
        ["kind=probe"],
        ["kind=probe", "model=m", "ngrams=[1, 2]"],
        ["layer=3"],
        ["max_answer_words=0"],
    ],
)
def test_settings_that_do_not_fit(keys: list[str]) -> None:
    with raises(
        ConfigError,
        "model" if keys == ["kind=probe"] else keys[2 if "threshold=null" in keys else -1].partition("=")[0],
    ):
        load_config(JudgeTrainConfig, None, ["data.files=a.jsonl", *keys])
