"""Out-of-fold predictions: no judge has seen the prompt of a text that it judges."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bfpo.core.errors import DataError
from bfpo.core.schema import Completion, Message
from bfpo.judges.ngrams import NgramSettings, fit_ngrams
from bfpo.judges.out_of_fold import labels_of, ngram_prediction, out_of_fold, prompts_of, too_few
from messages import raises


def rows(num: int, seed: int = 0) -> list[Completion]:
    """Two or three answers a prompt; "fine" is safe, and a tenth of the labels are wrong."""
    rng = random.Random(seed)
    made = []
    for n in range(num):
        safe = rng.random() < 0.6
        words = rng.sample(["one", "two", "three", "four", "five"], 3) + (["fine"] if safe else ["bad"])
        label = float(safe != (rng.random() < 0.1))
        made.append(Completion(f"c{n}", (Message("user", f"Question {n // 3}"),), " ".join(words), is_safe=label))
    return made


def test_no_row_is_judged_by_one_that_saw_its_prompt_and_each_is_judged_once() -> None:
    given = rows(90)
    prompts, judged = prompts_of(given), []

    def predict(train: list[int], test: list[int]) -> list[list[float]]:
        assert not {prompts[n] for n in train} & {prompts[n] for n in test}
        assert sorted(train + test) == list(range(len(given)))
        judged.extend(test)
        return [[n / 100 for n in test]]

    found = out_of_fold(given, predict, folds=5, seed=3, threshold=0.5)
    assert sorted(judged) == list(range(90))
    assert found.p.tolist() == [n / 100 for n in range(90)]
    assert (found.candidate, found.threshold) == (0, 0.5)


def test_the_label_of_a_row_does_not_change_its_own_prediction() -> None:
    given = rows(120)
    settings = NgramSettings((1, 1), 1 << 10, 1.0)
    before = out_of_fold(given, ngram_prediction(given, settings, balanced=False), folds=4, seed=0, threshold=0.5)
    seen: dict[int, list[int]] = {}

    def predict(train: list[int], test: list[int]) -> list[list[float]]:
        seen.update(dict.fromkeys(test, train))
        return ngram_prediction(given, settings, balanced=False)(train, test)  # type: ignore[return-value]

    again = out_of_fold(given, predict, folds=4, seed=0, threshold=0.5)
    assert again.p.tolist() == before.p.tolist()
    for place in (0, 17, 119):  # a judge fitted by hand on the rows of the other folds says the same
        train = seen[place]
        judge = fit_ngrams([given[n] for n in train], labels_of(given)[train].tolist(), settings)
        assert judge.judge([given[place]])[0].p_safe == pytest.approx(before.p[place], abs=1e-12)
    wrong = np.array([("fine" in row.text) != bool(row.is_safe) for row in given])
    flagged = (before.p > 0.5) != labels_of(given)
    assert (flagged == wrong).all()


def test_the_candidate_and_threshold_of_a_row_are_chosen_without_its_fold() -> None:
    given = rows(60)
    labels = labels_of(given)

    def predict(train: list[int], test: list[int]) -> list[list[float]]:
        good = [0.9 if labels[n] else 0.2 for n in test]
        return [[0.5] * len(test), [np.nan if n == 0 else p for n, p in zip(test, good, strict=True)]]

    found = out_of_fold(given, predict, folds=3, seed=0, threshold=None)
    assert found.candidate == 1
    assert np.isnan(found.p).tolist() == [True] + [False] * 59
    assert ((found.thresholds >= 0.2) & (found.thresholds < 0.9)).all()
    assert ((found.p[1:] > found.thresholds[1:]) == labels[1:]).all()


def test_folds_need_both_labels_and_enough_prompts() -> None:
    given = rows(12)
    assert too_few(given, 2) == ""
    assert "fewer than 5 folds" in too_few(given, 5)
    with raises(DataError, "labels"):
        too_few([row for row in given if row.is_safe], 2)
