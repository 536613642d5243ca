"""A judge on a frozen language model: the mean hidden state of an answer at one layer, and a logistic regression.

Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes". The model is not trained and
not copied; a judge's folder names it and holds a digest of its weights.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import expit

from bfpo.core.errors import ModelError, RunError
from bfpo.core.files import write_bytes_whole
from bfpo.core.schema import Completion, Verdict
from bfpo.data.chat import ChatEncoder
from bfpo.data.fidelity import common_length
from bfpo.data.tokenize import check_ids, ids_to_check
from bfpo.judges.local import check_characters, fitting, freeze, num_embeddings_of, pad_right
from bfpo.judges.ngrams import JUDGE_FILE, save_described
from bfpo.policy.batches import batches_by_length
from bfpo.policy.load import load_policy
from bfpo.policy.reference.cache import model_key
from bfpo.policy.source import num_positions

__all__ = ["HiddenStates", "ProbeJudge", "fit_probe", "save_probe"]

_WEIGHTS, _FORMAT_VERSION = "weights.safetensors", 1
_PER_STORE = 64  # rows that a killed process loses at most

Floats = npt.NDArray[np.float64]
Ids = tuple[list[int], int]
"""Ids of a conversation without its end token, and the index of the answer's first token."""


class HiddenStates:
    """The frozen model of a probe; raises `ModelError` for a model that cannot be loaded.

    A conversation of more than `max_length` tokens has no features: nothing is cut.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_length: int = 1024,
        batch_size: int | None = None,
    ) -> None:
        policy = load_policy(model, revision=revision, dtype=dtype)
        self._model, self._tokenizer = freeze(policy.model), policy.tokenizer
        self._chat = ChatEncoder(self._tokenizer)
        self._limit = ids_to_check(self._tokenizer, num_embeddings_of(self._model))
        positions = num_positions(self._model.config) or max_length
        self.max_length, self._batch_size = min(max_length, positions), batch_size
        self.key = model_key(self._model)

    def rows(self, completions: Sequence[Completion]) -> tuple[dict[int, Ids], dict[int, str]]:
        """Return the ids of each completion by its index, and the reasons why others have none."""
        found, reasons = fitting(
            dict(enumerate(completions)), self._ids, self.max_length, length=lambda row: len(row[0])
        )
        empty = {number: "the answer has no token" for number, (ids, start) in found.items() if start >= len(ids)}
        return {number: row for number, row in found.items() if number not in empty}, reasons | empty

    def _ids(self, completion: Completion) -> Ids:
        check_characters(completion.text + "".join(message.content for message in completion.prompt))
        chat = self._chat.encode(completion.prompt, (completion.text,), name=f"completion {completion.id}")
        ids = chat.conversations[0]
        ids = ids[:-1] if ids and ids[-1] == self._chat.end_id else ids
        check_ids(ids, self._tokenizer, self._limit, f"completion {completion.id}")
        return ids, common_length(chat.prompt, ids)

    def features(self, rows: Sequence[Ids], layers: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Return the mean hidden state over each answer, (rows, layers, hidden); layer 0 is the embedding."""
        found: list[Any] = [None] * len(rows)
        for batch in batches_by_length([len(ids) for ids, _ in rows], self._batch_size):
            inputs = pad_right(self._model, self._tokenizer, [rows[place][0] for place in batch])
            with torch.no_grad():
                states = self._model.base_model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            chosen = [states[layer] for layer in (range(len(states)) if layers is None else layers)]
            for number, place in enumerate(batch):
                ids, start = rows[place]
                means = [state[number, start : len(ids)].float().mean(dim=0) for state in chosen]
                found[place] = torch.stack(means).cpu().numpy()
        return np.stack(found) if found else np.zeros((0, 0, 0), np.float32)

    def cached(
        self, rows: Sequence[Ids], folder: str | Path, advance: Callable[[int], None] = lambda count: None
    ) -> npt.NDArray[np.float32]:
        """Return the features of all layers, kept in `features.sqlite` by the model's weights and the row's ids."""
        keys = [hashlib.sha256(json.dumps([_FORMAT_VERSION, self.key, *row]).encode()).hexdigest() for row in rows]
        file = Path(folder) / "features.sqlite"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(file, timeout=60, isolation_level=None)
            connection.execute("CREATE TABLE IF NOT EXISTS features (key TEXT PRIMARY KEY, layers INT, data BLOB)")
            known: dict[str, Any] = {key: self._stored(connection, key) for key in dict.fromkeys(keys)}
            todo = {key: row for key, row in zip(keys, rows, strict=True) if known[key] is None}
            advance(sum(known[key] is not None for key in keys))
            order = sorted(todo, key=lambda key: len(todo[key][0]))
            for start in range(0, len(order), _PER_STORE):
                part = order[start : start + _PER_STORE]
                made = self.features([todo[key] for key in part])
                known.update(zip(part, made, strict=True))
                stored = [(key, len(one), one.tobytes()) for key, one in zip(part, made, strict=True)]
                connection.executemany("INSERT OR IGNORE INTO features VALUES (?, ?, ?)", stored)
                advance(sum(keys.count(key) for key in part))
            connection.close()
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"{file}: the cache of features cannot be used ({error}); check feature_cache and free space"
            ) from error
        return np.stack([known[key] for key in keys])

    @staticmethod
    def _stored(connection: sqlite3.Connection, key: str) -> npt.NDArray[np.float32] | None:
        row = connection.execute("SELECT layers, data FROM features WHERE key = ?", (key,)).fetchone()
        return None if row is None else np.frombuffer(row[1], np.float32).reshape(row[0], -1)


def fit_probe(
    features: npt.NDArray[Any], labels: npt.NDArray[np.bool_], *, inverse_penalty: float, balanced: bool
) -> tuple[Floats, float]:
    """Return weights and intercept of a logistic regression on (N, hidden) features, which are standardised inside."""
    from sklearn.linear_model import LogisticRegression

    rows = features.astype(np.float64)
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale[scale == 0] = 1.0
    model = LogisticRegression(C=inverse_penalty, class_weight="balanced" if balanced else None, max_iter=2000)
    model.fit((rows - mean) / scale, labels)
    weights = np.asarray(model.coef_[0], np.float64) / scale
    return weights, float(model.intercept_[0] - weights @ mean)


def save_probe(folder: Path, weights: Floats, intercept: float, described: Mapping[str, Any]) -> None:
    """Write a judge's folder; `described`: name, model, revision, dtype, model_key, layer, settings and facts."""
    write_bytes_whole(folder / _WEIGHTS, save({"weights": weights, "intercept": np.array([intercept])}))
    save_described(folder, {"kind": "probe", "format_version": _FORMAT_VERSION, **described})


class ProbeJudge:
    """Gives p(safe) from the mean hidden state of an answer; an answer without a token, or too long, is unscored.

    `base_model`: where the language model is now. Raises `ModelError` for a folder that `bfpo judge-train` did not
    write, and for a model that cannot be loaded or whose weights are not those of the training.
    """

    def __init__(
        self,
        folder: Path,
        described: Mapping[str, Any],
        *,
        threshold: float | None = None,
        base_model: str | None = None,
    ) -> None:
        try:
            self.name: str = described["name"]
            self.held_out: Mapping[str, object] = described.get("cross_validation", {})
            self._layer = int(described["layer"])
            self._threshold = float(threshold or described["settings"]["threshold"])
            arrays = load_file(folder / _WEIGHTS)
            self._weights, self._intercept = arrays["weights"], float(arrays["intercept"][0])
            model = {name: described[name] for name in ("model", "revision", "dtype")}
            model |= {} if base_model is None else {"model": base_model, "revision": None}
            max_length = int(described["settings"]["max_length"])
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder / JUDGE_FILE}: is not what `bfpo judge-train` writes ({error})") from error
        remedy = "name the folder or hub id that has the weights of the training in the judge's base_model"
        try:
            self._states = HiddenStates(**model, max_length=max_length)
        except ModelError as error:
            raise ModelError(
                f"{folder / JUDGE_FILE}: its language model cannot be loaded ({error}); {remedy}"
            ) from error
        if self._states.key != described["model_key"]:
            raise ModelError(
                f"{folder / JUDGE_FILE}: model {model['model']!r} has other weights than in training; {remedy}, "
                "or train it again"
            )

    @cached_property
    def version(self) -> str:
        """Return a digest of the model's weights and of what decides verdicts."""
        facts = [_FORMAT_VERSION, self._states.key, self._layer, self._threshold, self._states.max_length]
        digest = hashlib.sha256(json.dumps([*facts, self._intercept]).encode() + self._weights.tobytes())
        return f"probe-{digest.hexdigest()[:16]}"

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        rows, reasons = self._states.rows(completions)
        logits = [
            float(row[0].astype(np.float64) @ self._weights) + self._intercept
            for row in self._states.features(list(rows.values()), [self._layer])
        ]
        found = dict(zip(rows, expit(logits).tolist() if logits else [], strict=True))
        return [
            self._verdict(one, found.get(number), reasons.get(number, "")) for number, one in enumerate(completions)
        ]

    def _verdict(self, completion: Completion, p_safe: float | None, reason: str) -> Verdict:
        if p_safe is None or not np.isfinite(p_safe):
            why = reason or "the model's hidden states are not finite"
            return Verdict(completion.id, self.name, "unscored", reason=why)
        return Verdict(completion.id, self.name, "safe" if p_safe >= self._threshold else "unsafe", p_safe=p_safe)
