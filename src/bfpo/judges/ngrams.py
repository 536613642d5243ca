"""A small judge that is trained here: hashed n-grams of the words and a logistic regression."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import expit

from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.files import write_bytes_whole
from bfpo.core.schema import Completion, Verdict

__all__ = ["JUDGE_FILE", "NgramJudge", "NgramSettings", "fit_ngrams", "ngram_counts", "save_described", "tfidf_rows"]

JUDGE_FILE, _WEIGHTS = "judge.json", "weights.safetensors"
_FORMAT_VERSION = 1
_WORD = re.compile(r"\b\w\w+\b")  # what scikit-learn's vectorizers take for a word

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class NgramSettings:
    """What the judge reads and how much it may learn.

    `ngrams` bounds the number of words in a row, `num_features` is the size of the hashed table, `inverse_penalty` the
    C of scikit-learn's logistic regression, `with_prompt` has it read the prompt too (its words apart from the
    completion's). A text is safe where p(safe) is above `threshold`. Raises `SettingError` for a value out of range.
    """

    ngrams: tuple[int, int] = (1, 2)
    num_features: int = 1 << 18
    inverse_penalty: float = 10.0
    with_prompt: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.ngrams
        if not 1 <= low <= high:
            raise SettingError(f"ngrams: got {list(self.ngrams)}; allowed: two whole numbers, 1 <= first <= second")
        if self.num_features < 2 or self.inverse_penalty <= 0 or not 0 < self.threshold < 1:
            raise SettingError("num_features, inverse_penalty, threshold: allowed: at least 2, above 0, and in (0, 1)")


class NgramJudge:
    """Says p(safe) of a text from its n-grams; a text without a word is unscored."""

    def __init__(self, name: str, settings: NgramSettings, idf: Floats, weights: Floats, intercept: float) -> None:
        self.name = name
        self.settings = settings
        self._idf, self._weights, self._intercept = idf, weights, intercept
        digest = hashlib.sha256(json.dumps([_FORMAT_VERSION, asdict(settings), intercept]).encode())
        digest.update(idf.tobytes() + weights.tobytes())
        self.version = f"ngrams-{digest.hexdigest()[:16]}"

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        texts = [_text(completion, self.settings) for completion in completions]
        if not texts:
            return []
        p_safe = expit(tfidf_rows(ngram_counts(texts, self.settings), self._idf) @ self._weights + self._intercept)
        return [
            self._verdict(completion, float(p) if _WORD.search(completion.text) else None)
            for completion, p in zip(completions, p_safe, strict=True)
        ]

    def _verdict(self, completion: Completion, p_safe: float | None) -> Verdict:
        if p_safe is None:
            return Verdict(completion.id, self.name, "unscored", reason="there is no word in the completion")
        label = "safe" if p_safe > self.settings.threshold else "unsafe"
        return Verdict(completion.id, self.name, label, p_safe=p_safe)  # type: ignore[arg-type]

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write `judge.json` (with `facts` about its training) and the weights into a folder."""
        arrays = {"idf": self._idf, "weights": self._weights, "intercept": np.array([self._intercept])}
        write_bytes_whole(folder / _WEIGHTS, save(arrays))
        described = {"kind": "ngrams", "format_version": _FORMAT_VERSION, "name": self.name, **facts}
        save_described(folder, {**described, "settings": asdict(self.settings)})

    @classmethod
    def load(cls, folder: Path) -> NgramJudge:
        """Return the judge that `save` wrote. Raises `ModelError` for a folder that holds none of this version."""
        try:
            described = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
            if described["format_version"] != _FORMAT_VERSION:
                raise ModelError(
                    f"{folder / JUDGE_FILE}: format_version is {described['format_version']!r}; allowed: "
                    f"{_FORMAT_VERSION}; train the judge again"
                )
            settings = NgramSettings(**{**described["settings"], "ngrams": tuple(described["settings"]["ngrams"])})
            arrays = load_file(folder / _WEIGHTS)
            return cls(described["name"], settings, arrays["idf"], arrays["weights"], float(arrays["intercept"][0]))
        except ModelError:  # says what is wrong itself, and is a ValueError too
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: holds no judge that can be read ({type(error).__name__}: {error}); needed: a folder that "
                "`bfpo judge-train` wrote"
            ) from error


def save_described(folder: Path, described: dict[str, Any]) -> None:
    """Write the `judge.json` that makes a folder a judge or a ranker."""
    write_bytes_whole(folder / JUDGE_FILE, (json.dumps(described, indent=2) + "\n").encode())


def fit_ngrams(
    completions: Sequence[Completion], is_safe: Sequence[bool], settings: NgramSettings, *, name: str = "ngrams"
) -> NgramJudge:
    """Return a judge trained on labelled completions; the same rows in the same order give the same judge.

    Raises `DataError` where all labels are the same, or no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    if len(set(is_safe)) < 2:
        raise DataError(f"labels: all {len(is_safe)} are {'safe' if any(is_safe) else 'unsafe'}; both kinds are needed")
    counts = ngram_counts([_text(completion, settings) for completion in completions], settings)
    if counts.nnz == 0:
        raise DataError("completions: no text has a word to learn from")
    idf = np.asarray(TfidfTransformer().fit(counts).idf_, np.float64)
    model = LogisticRegression(C=settings.inverse_penalty, max_iter=5000)
    model.fit(tfidf_rows(counts, idf), np.asarray(is_safe, bool))
    return NgramJudge(name, settings, idf, np.asarray(model.coef_[0], np.float64), float(model.intercept_[0]))


def _text(completion: Completion, settings: NgramSettings) -> str:
    if not settings.with_prompt:
        return completion.text
    # A word of the prompt gets a mark, so that the same word in the completion is another feature.
    asked = " ".join(f"prompt_{word}" for message in completion.prompt for word in message.content.split())
    return f"{asked} {completion.text}"


def ngram_counts(texts: Sequence[str], settings: NgramSettings) -> Any:
    """Return the counts of hashed n-grams, a sparse (texts, num_features)."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        ngram_range=settings.ngrams, n_features=settings.num_features, alternate_sign=False, norm=None
    )
    return vectorizer.transform(texts)


def tfidf_rows(counts: Any, idf: Floats) -> Any:
    """Return rows of length 1 of (1 + log count) x idf."""
    from sklearn.preprocessing import normalize

    weighed = counts.astype(np.float64)
    weighed.data = (1 + np.log(weighed.data)) * idf[weighed.indices]
    return normalize(weighed, copy=False)
