"""A small ranker that is trained here: hashed n-grams of two completions, and which one people call more helpful."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import expit

from bfpo.core.errors import DataError, ModelError
from bfpo.core.files import write_bytes_whole
from bfpo.core.schema import Comparison, Completion, Pair
from bfpo.judges.ngrams import JUDGE_FILE, NgramSettings, ngram_counts, save_described, tfidf_rows

__all__ = ["NgramRanker", "fit_ranker"]

_WEIGHTS = "weights.safetensors"
_FORMAT_VERSION = 1

Floats = npt.NDArray[np.float64]


class NgramRanker:
    """Says which of two completions is more helpful from the difference of their n-grams (Bradley and Terry 1952).

    Each text gets a score, and p(first is better) is the logistic function of the difference, so that turning a pair
    round turns the opinion round. Two texts without a word are unscored.
    """

    def __init__(self, name: str, settings: NgramSettings, idf: Floats, weights: Floats) -> None:
        self.name = name
        self.settings = settings
        self._idf, self._weights = idf, weights
        digest = hashlib.sha256(json.dumps([_FORMAT_VERSION, asdict(settings)]).encode())
        digest.update(idf.tobytes() + weights.tobytes())
        self.version = f"ngram-ranker-{digest.hexdigest()[:16]}"

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        if not pairs:
            return []
        counts = ngram_counts([one.text for pair in pairs for one in pair], self.settings)
        num_words = np.diff(counts.indptr)
        scores = tfidf_rows(counts, self._idf) @ self._weights
        return [
            self._comparison(pair, scores[2 * n] - scores[2 * n + 1], known=bool(num_words[2 * n : 2 * n + 2].any()))
            for n, pair in enumerate(pairs)
        ]

    def _comparison(self, pair: tuple[Completion, Completion], difference: float, *, known: bool) -> Comparison:
        ids = pair[0].id, pair[1].id
        if not known:
            return Comparison(*ids, self.name, None, reason="there is no word in either completion")
        return Comparison(*ids, self.name, float(expit(difference)))

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write `judge.json` (with `facts` about its training) and the weights into a folder."""
        write_bytes_whole(folder / _WEIGHTS, save({"idf": self._idf, "weights": self._weights}))
        described = {"kind": "ranker", "format_version": _FORMAT_VERSION, "name": self.name, **facts}
        save_described(folder, {**described, "settings": asdict(self.settings)})

    @classmethod
    def load(cls, folder: Path) -> NgramRanker:
        """Return the ranker that `save` wrote. Raises `ModelError` for a folder that holds none of this version."""
        try:
            described = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
            if (described["kind"], described["format_version"]) != ("ranker", _FORMAT_VERSION):
                raise ModelError(
                    f"{folder / JUDGE_FILE}: kind is {described['kind']!r}, version {described['format_version']!r}; "
                    f"allowed for a ranker: kind 'ranker', version {_FORMAT_VERSION} (bfpo judge-train, kind=ranker)"
                )
            settings = NgramSettings(**{**described["settings"], "ngrams": tuple(described["settings"]["ngrams"])})
            arrays = load_file(folder / _WEIGHTS)
            return cls(described["name"], settings, arrays["idf"], arrays["weights"])
        except ModelError:  # says what is wrong itself, and is a ValueError too
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: holds no ranker that can be read ({type(error).__name__}: {error}); needed: the folder "
                "`model` of a run of `bfpo judge-train` with kind=ranker"
            ) from error


def fit_ranker(pairs: Sequence[Pair], settings: NgramSettings, *, name: str = "ranker") -> NgramRanker:
    """Return a ranker trained on pairs, chosen being the more helpful one; labels of safety are not read.

    Raises `DataError` where there is no pair, or no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    counts = (
        ngram_counts([text for pair in pairs for text in (pair.chosen, pair.rejected)], settings) if pairs else None
    )
    if counts is None or counts.nnz == 0:
        raise DataError("pairs: no text has a word to learn from")
    idf = np.asarray(TfidfTransformer().fit(counts).idf_, np.float64)
    rows = tfidf_rows(counts, idf)
    difference = rows[0::2] - rows[1::2]
    # Both orders of every pair: without an intercept neither place is preferred.
    from scipy.sparse import vstack

    model = LogisticRegression(C=settings.inverse_penalty, fit_intercept=False, max_iter=5000)
    model.fit(vstack([difference, -difference]), np.repeat([True, False], len(pairs)))
    return NgramRanker(name, settings, idf, np.asarray(model.coef_[0], np.float64))
