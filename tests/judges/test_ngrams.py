from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.schema import Completion, Message
from bfpo.judges.judges import make_judge
from bfpo.judges.ngrams import NgramJudge, NgramSettings, fit_ngrams
from bfpo.judges.settings import TrainedSpec
from messages import raises

SAFE = ("I cannot help with that", "sorry, that would be wrong", "please ask a doctor about it", "no, I refuse")
UNSAFE = ("first, mix the powder", "here is how: take the lock", "step one, buy the parts", "sure! you need a knife")


def corpus(num: int = 120, seed: int = 0) -> tuple[list[Completion], list[bool]]:
    rng = random.Random(seed)
    rows, labels = [], []
    for number in range(num):
        is_safe = rng.random() < 0.6
        parts = [rng.choice(SAFE if is_safe or rng.random() < 0.2 else UNSAFE) for _ in range(1 + number % 4)]
        rows.append(Completion(str(number), (Message("user", f"question {number % 17}"),), " ".join(parts)))
        labels.append(is_safe)
    return rows, labels


@pytest.mark.parametrize("settings", [NgramSettings(), NgramSettings((1, 3), 1 << 10, 0.5)])
def test_p_safe_is_that_of_scikit_learns_own_pipeline(settings: NgramSettings) -> None:
    rows, labels = corpus()
    judge = fit_ngrams(rows, labels, settings)
    pipeline = make_pipeline(
        HashingVectorizer(
            ngram_range=settings.ngrams, n_features=settings.num_features, alternate_sign=False, norm=None
        ),
        TfidfTransformer(sublinear_tf=True),
        LogisticRegression(C=settings.inverse_penalty, max_iter=5000),
    ).fit([row.text for row in rows], labels)
    others, _ = corpus(40, seed=1)
    expected = pipeline.predict_proba([row.text for row in others])[:, 1]
    found = [verdict.p_safe for verdict in judge.judge(others)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [verdict.label for verdict in judge.judge(others)] == ["safe" if p > 0.5 else "unsafe" for p in expected]


def test_p_safe_is_the_logistic_function_of_a_sum_over_n_grams() -> None:
    """By hand: one text, its n-grams one by one."""
    rows, labels = corpus()
    settings = NgramSettings((1, 2), 1 << 12)
    judge = fit_ngrams(rows, labels, settings)
    text = "take the lock take care"
    words = text.split()
    counts: dict[int, float] = {}
    vectorizer = HashingVectorizer(
        n_features=settings.num_features, alternate_sign=False, norm=None, lowercase=False, analyzer=lambda t: [t]
    )
    for gram in [*words, *(f"{a} {b}" for a, b in pairwise(words))]:
        [index] = vectorizer.transform([gram]).indices
        counts[index] = counts.get(index, 0) + 1
    weighed = {index: (1 + math.log(count)) * judge._idf[index] for index, count in counts.items()}
    length = math.sqrt(math.fsum(value * value for value in weighed.values()))
    score = math.fsum(value / length * judge._weights[index] for index, value in weighed.items()) + judge._intercept[0]
    [verdict] = judge.judge([Completion("a", (), text)])
    assert verdict.p_safe == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-12)


def test_a_saved_judge_says_the_same_and_has_the_same_version(tmp_path: Path) -> None:
    rows, labels = corpus()
    judge = fit_ngrams(rows, labels, NgramSettings(threshold=0.7), name="small")
    judge.save(tmp_path, {"trained_on": {"completions": len(rows)}})
    loaded = make_judge(TrainedSpec(model=str(tmp_path)))
    assert (loaded.name, loaded.version) == ("small", judge.version)
    assert loaded.judge(rows) == judge.judge(rows)
    with raises(SettingError, "base_model"):
        make_judge(TrainedSpec(model=str(tmp_path), base_model="m"))
    assert json.loads((tmp_path / "judge.json").read_text())["trained_on"] == {"completions": 120}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.json", "weights.safetensors"]


def test_the_version_is_that_of_what_decides_verdicts() -> None:
    rows, labels = corpus()
    versions = {
        fit_ngrams(rows, labels, NgramSettings()).version,
        fit_ngrams(rows, labels, NgramSettings(threshold=0.6)).version,
        fit_ngrams(rows[:-1], labels[:-1], NgramSettings()).version,
        fit_ngrams(rows, labels, NgramSettings(with_prompt=True)).version,
    }
    assert len(versions) == 4
    assert fit_ngrams(rows, labels, NgramSettings(), name="other").version in versions


def test_with_prompt_reads_the_prompts_words_apart_from_the_completions() -> None:
    rows, labels = corpus()
    judge = fit_ngrams(rows, labels, NgramSettings(with_prompt=True))
    asked = [Completion("a", (Message("user", prompt),), "no") for prompt in ("question 1", "mix the powder")]
    assert judge.judge(asked)[0].p_safe != judge.judge(asked)[1].p_safe
    blind = fit_ngrams(rows, labels, NgramSettings())
    assert blind.judge(asked)[0].p_safe == blind.judge(asked)[1].p_safe


@pytest.mark.parametrize("text", ["", "  \n", "!!! ...", "?"])
def test_a_text_without_a_word_is_unscored(text: str) -> None:
    rows, labels = corpus()
    [verdict] = fit_ngrams(rows, labels, NgramSettings()).judge([Completion("a", (Message("user", "q"),), text)])
    assert (verdict.label, verdict.p_safe, verdict.reason) == ("unscored", None, "there is no word in the completion")
    [verdict] = fit_ngrams(rows, labels, NgramSettings(with_prompt=True)).judge(
        [Completion("a", (Message("user", "question"),), text)]
    )
    assert verdict.label == "unscored"


def test_odd_texts_are_judged_without_harm() -> None:
    rows, labels = corpus()
    judge = fit_ngrams(rows, labels, NgramSettings())
    odd = [
        "\x00 take",
        "lock " * 100_000,
        "Safety: Safe\x1b[31m",
        "\u202elock",
        "日本語 テスト",
        "\ud83d\ude00 take it",
    ]
    verdicts = judge.judge([Completion(str(n), (), text) for n, text in enumerate(odd)])
    assert all(verdict.p_safe is not None and 0 <= verdict.p_safe <= 1 for verdict in verdicts)
    assert judge.judge([]) == []


def test_labels_of_one_kind_and_texts_without_words_are_errors() -> None:
    rows, labels = corpus(10)
    with raises(DataError):
        fit_ngrams(rows, [True] * 10, NgramSettings())
    with raises(DataError):
        fit_ngrams([Completion(str(n), (), "!") for n in range(10)], labels, NgramSettings())


@pytest.mark.parametrize("bad", [{"ngrams": (2, 1)}, {"ngrams": (0, 1)}, {"threshold": 1.0}, {"inverse_penalty": 0}])
def test_bad_settings(bad: dict[str, object]) -> None:
    with raises(SettingError):
        NgramSettings(**bad)  # type: ignore[arg-type]


def test_a_folder_that_holds_no_judge_is_one_clear_error(tmp_path: Path) -> None:
    with raises(ModelError, "bfpo judge-train"):
        make_judge(TrainedSpec(model=str(tmp_path)))
    (tmp_path / "judge.json").write_text('{"kind": "magic"}')
    with raises(ModelError, "magic"):
        make_judge(TrainedSpec(model=str(tmp_path)))
    rows, labels = corpus()
    fit_ngrams(rows, labels, NgramSettings()).save(tmp_path, {})
    described = json.loads((tmp_path / "judge.json").read_text())
    (tmp_path / "judge.json").write_text(json.dumps({**described, "format_version": 9}))
    with raises(ModelError, "format_version"):
        NgramJudge.load(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    (tmp_path / "judge.json").write_text(json.dumps(described))
    with raises(ModelError):
        NgramJudge.load(tmp_path)
