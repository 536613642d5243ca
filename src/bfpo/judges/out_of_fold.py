"""p(safe) of labelled texts by judges that saw none of their prompts: a cross-validation by prompt.

Such judges can check the labels that they are trained on: none has seen the label of the text that it judges
(Northcutt, Jiang and Chuang 2021, "Confident learning", section 3).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from bfpo.core.errors import DataError, SettingError
from bfpo.core.files import user_cache_folder
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion
from bfpo.data.split import normalised_prompt
from bfpo.judges.ngrams import NgramSettings, fit_ngrams
from bfpo.judges.quality import best_threshold

__all__ = [
    "Floats",
    "OutOfFold",
    "Predict",
    "ProbeFeatures",
    "labels_of",
    "ngram_prediction",
    "out_of_fold",
    "probe_features",
    "probe_prediction",
    "prompts_of",
    "too_few",
]

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Predict = Callable[[list[int], list[int]], Sequence[Sequence[float] | Floats]]
"""(rows to train on, other rows) -> p(safe) of the other rows by each candidate; NaN is unscored."""


@dataclass(frozen=True, slots=True)
class OutOfFold:
    """p(safe) and the threshold of each row, (N,), chosen without its fold; the candidate and threshold of all rows."""

    p: Floats
    thresholds: Floats
    candidate: int
    threshold: float


def labels_of(rows: Sequence[Completion]) -> Bools:
    """Return which rows are labelled safe; a probability counts as safe above 0.5."""
    return np.array([(row.is_safe or 0.0) > 0.5 for row in rows], bool)


def prompts_of(rows: Sequence[Completion]) -> list[str]:
    """Return the prompt of each row, by which rows belong together; the id of one without a prompt."""
    return [normalised_prompt(row.prompt) or row.id for row in rows]


def too_few(rows: Sequence[Completion], folds: int) -> str:
    """Return why rows cannot be split into folds that all have both labels; empty if they can.

    Raises `DataError` if all labels are the same.
    """
    labels, groups = labels_of(rows), prompts_of(rows)
    if len(set(labels.tolist())) < 2:
        raise DataError(f"labels: all {len(rows)} are {'safe' if labels.any() else 'unsafe'}; both kinds are needed")
    rarer = min(len({group for group, label in zip(groups, labels, strict=True) if label == kind}) for kind in (0, 1))
    return f"{rarer} prompts of the rarer label, fewer than {folds} folds" if rarer < folds else ""


def out_of_fold(
    rows: Sequence[Completion], predict: Predict, *, folds: int, seed: int, threshold: float | None
) -> OutOfFold:
    """Return p(safe) of each row by a judge that was trained on the other folds.

    Of several candidates the one with the least cross-entropy is taken, and a `threshold` of `None` is the one with the
    best kappa; for each row both are chosen on the other folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    labels, fold, found = labels_of(rows), np.zeros(len(rows), int), []
    splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(rows, labels, prompts_of(rows))
    for number, (train, test) in enumerate(splits):
        fold[test] = number
        found.append((test, np.asarray(predict(train.tolist(), test.tolist()))))
    p = np.zeros((len(found[0][1]), len(rows)))
    for test, values in found:
        p[:, test] = values

    def chosen(part: Bools) -> tuple[int, float]:
        """Return the candidate and the threshold by a part of the rows."""
        part = part & ~np.isnan(p).any(axis=0)
        right = np.where(labels[part], p[:, part], 1 - p[:, part])
        best = int(np.argmin(-np.log(np.maximum(right, 1e-12)).mean(axis=1)))
        return best, best_threshold(p[best, part], labels[part]) if threshold is None else threshold

    best_p, thresholds = np.zeros(len(rows)), np.zeros(len(rows))
    for number in range(folds):
        candidate, least = chosen(fold != number)
        best_p[fold == number], thresholds[fold == number] = p[candidate, fold == number], least
    return OutOfFold(best_p, thresholds, *chosen(np.ones(len(rows), bool)))


def ngram_prediction(
    rows: Sequence[Completion], settings: NgramSettings, *, balanced: bool, unseen: list[float] | None = None
) -> Predict:
    """Return the prediction of an n-gram judge; `unseen` gets each fold's share of n-grams that training lacked."""
    labels = labels_of(rows)

    def predict(train: list[int], test: list[int]) -> list[list[float]]:
        judge = fit_ngrams([rows[n] for n in train], labels[train].tolist(), settings, balanced=balanced)
        held_out = [rows[n] for n in test]
        if unseen is not None:
            unseen.append(judge.unseen(held_out))
        return [[np.nan if v.p_safe is None else v.p_safe for v in judge.judge(held_out)]]

    return predict


@dataclass(frozen=True, slots=True)
class ProbeFeatures:
    """The hidden states of a frozen model on the rows that it can read: their places, and why others are left out."""

    key: str
    places: list[int]
    features: npt.NDArray[np.float32]
    layers: Sequence[int]
    left_out: dict[str, int]


def probe_features(
    rows: Sequence[Completion],
    *,
    model: str,
    revision: str | None,
    dtype: str,
    max_length: int,
    batch_size: int | None,
    layer: int | None,
    feature_cache: str | None,
) -> ProbeFeatures:
    """Return the hidden states of rows, kept in a cache as they are computed; `layer` of `None` means all layers.

    Raises `DataError` if no text fits, `SettingError` for a layer that the model does not have.
    """
    from bfpo.judges.hidden import HiddenStates

    states = HiddenStates(model, revision=revision, dtype=dtype, max_length=max_length, batch_size=batch_size)
    ids, reasons = states.rows(rows)
    if not ids:
        raise DataError(f"max_length: none of {len(rows)} texts is left; the model reads {states.max_length} tokens")
    with CountProgress("read by the model", len(ids), _log) as progress:
        cache = feature_cache or user_cache_folder("features")
        features = states.cached(list(ids.values()), cache, progress.advance)
    if not 0 <= (layer or 0) < features.shape[1]:
        raise SettingError(f"layer: got {layer}; allowed: 0 to {features.shape[1] - 1}, or null")
    layers = range(features.shape[1]) if layer is None else [layer]
    return ProbeFeatures(states.key, list(ids), features, layers, dict(Counter(reasons.values())))


def probe_prediction(
    found: ProbeFeatures,
    labels: Bools,
    *,
    inverse_penalty: float,
    balanced: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> Predict:
    """Return the prediction of a probe at each layer; `labels` are those of the rows that have features."""
    from bfpo.judges.hidden import fit_probe

    def predict(train: list[int], test: list[int]) -> list[Floats]:
        made = []
        for layer in found.layers:
            states = found.features[:, layer]
            weights, intercept = fit_probe(
                states[train], labels[train], inverse_penalty=inverse_penalty, balanced=balanced
            )
            made.append(expit(states[test] @ weights + intercept))
            advance(1)
        return made

    return predict
