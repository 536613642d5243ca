"""A small judge and a small ranker that bfpo trains: hashed n-grams of the words and a logistic regression."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import expit

from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.files import write_bytes_whole, write_text_whole
from bfpo.core.schema import Comparison, Completion, Pair, Verdict, VerdictLabel

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "JUDGE_FILE",
    "NgramJudge",
    "NgramRanker",
    "NgramSettings",
    "few_rows",
    "fit_ngrams",
    "fit_ranker",
    "save_described",
    "seen_rows",
    "trained_on_few",
    "write_rows",
]

JUDGE_FILE, _WEIGHTS = "judge.json", "weights.safetensors"
_ROWS = "trained_rows.txt"
_FORMAT_VERSION = 1
_WORD = re.compile(r"\b\w\w+\b")  # a word for scikit-learn's vectorizers
_FEW_ROWS = 50  # fewest rows of the rarer class (pairs, for a ranker) without a warning

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class NgramSettings:
    """Features and regularization of an n-gram judge or ranker.

    `ngrams` bounds the number of words in an n-gram, `num_features` is the size of the hashed table, `inverse_penalty`
    the C of scikit-learn's logistic regression; `with_prompt` adds the prompt's words as separate features. A text is
    safe if p(safe) is above `threshold`. Raises `SettingError` for a value out of range.
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


class _NgramModel:
    """The weights of a judge or ranker of n-grams, and the folder that holds them."""

    _kind: ClassVar[Literal["ngrams", "ranker"]]
    _role: ClassVar[Literal["judge", "ranker"]]

    def __init__(self, name: str, settings: NgramSettings, idf: Floats, weights: Floats, *intercept: float) -> None:
        self.name, self.settings = name, settings
        self.held_out: Mapping[str, object] = {}
        self._idf, self._weights, self._intercept = idf, weights, intercept
        digest = hashlib.sha256(json.dumps([_FORMAT_VERSION, asdict(settings), *intercept]).encode())
        digest.update(idf.tobytes() + weights.tobytes())
        self.version = f"{'ngrams' if self._role == 'judge' else 'ngram-ranker'}-{digest.hexdigest()[:16]}"

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write `judge.json` (with `facts` about the training) and the weights into a folder."""
        arrays = {"idf": self._idf, "weights": self._weights}
        if self._intercept:
            arrays["intercept"] = np.array(self._intercept)
        write_bytes_whole(folder / _WEIGHTS, save(arrays))
        described = {"kind": self._kind, "format_version": _FORMAT_VERSION, "name": self.name, **facts}
        save_described(folder, {**described, "settings": asdict(self.settings)})

    @classmethod
    def load(cls, folder: Path, *, threshold: float | None = None) -> Self:
        """Return what `save` wrote, a judge with another `threshold` if one is given.

        Raises `ModelError` for a folder without a model of this kind and version.
        """
        remedy = f"the folder `model` of a run of `bfpo judge-train` with kind={cls._kind}"
        try:
            described = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
            if (described["kind"], described["format_version"]) != (cls._kind, _FORMAT_VERSION):
                raise ModelError(
                    f"{folder / JUDGE_FILE}: kind is {described['kind']!r}, format_version "
                    f"{described['format_version']!r}; allowed for a {cls._role}: {cls._kind!r}, {_FORMAT_VERSION}; "
                    f"give {remedy}"
                )
            settings = NgramSettings(**{**described["settings"], "ngrams": tuple(described["settings"]["ngrams"])})
            settings = settings if threshold is None else replace(settings, threshold=threshold)
            arrays = load_file(folder / _WEIGHTS)
            intercept = [float(arrays["intercept"][0])] if cls._role == "judge" else []
            loaded = cls(described["name"], settings, arrays["idf"], arrays["weights"], *intercept)
            loaded.held_out = described.get("cross_validation", {})
            return loaded
        except ModelError:  # a `ValueError` too, with a message of its own
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: holds no {cls._role} that can be read ({type(error).__name__}: {error}); needed: {remedy}"
            ) from error


def save_described(folder: Path, described: dict[str, Any]) -> None:
    """Write the `judge.json` that makes a folder a judge or a ranker."""
    write_text_whole(folder / JUDGE_FILE, json.dumps(described, indent=2) + "\n")


class NgramJudge(_NgramModel):
    """Gives p(safe) of a text from its n-grams; a text without a word is unscored."""

    _kind, _role = "ngrams", "judge"

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, one per completion, in order."""
        texts = [_text(completion, self.settings) for completion in completions]
        if not texts:
            return []
        logits = tfidf_rows(ngram_counts(texts, self.settings), self._idf) @ self._weights + self._intercept[0]
        return [self._verdict(*row) for row in zip(completions, expit(logits).tolist(), strict=True)]

    def unseen(self, completions: Sequence[Completion]) -> float:
        """Return the share of the n-grams of these texts that were in no training text, up to collisions of hashes."""
        counts = ngram_counts([_text(completion, self.settings) for completion in completions], self.settings)
        # A feature without a training text keeps the weight 0 at which the penalised regression starts.
        return float(counts.data[self._weights[counts.indices] == 0].sum() / max(counts.data.sum(), 1))

    def _verdict(self, completion: Completion, p_safe: float) -> Verdict:
        if not _WORD.search(completion.text):
            return Verdict(completion.id, self.name, "unscored", reason="there is no word in the completion")
        label: VerdictLabel = "safe" if p_safe > self.settings.threshold else "unsafe"
        return Verdict(completion.id, self.name, label, p_safe=p_safe)


class NgramRanker(_NgramModel):
    """Compares two completions by the difference of their n-gram scores (Bradley and Terry 1952).

    p(first is better) is the logistic function of the difference of the scores, so that swapping a pair gives the
    complement. Two texts without a word are unscored.
    """

    _kind, _role = "ranker", "ranker"

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


# ----------------------------------------------------------------------------------------------------------- training


def fit_ngrams(
    completions: Sequence[Completion],
    is_safe: Sequence[bool],
    settings: NgramSettings,
    *,
    name: str = "ngrams",
    balanced: bool = False,
) -> NgramJudge:
    """Return a judge trained on labelled completions; the same rows in the same order give the same judge.

    `balanced`: rows are weighed so that safe and unsafe ones count the same.

    Raises `DataError` if all labels are the same or no text has a word.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(is_safe)) < 2:
        raise DataError(f"labels: all {len(is_safe)} are {'safe' if any(is_safe) else 'unsafe'}; both kinds are needed")
    counts, idf = _counts_and_idf("completions", [_text(completion, settings) for completion in completions], settings)
    weights = "balanced" if balanced else None
    model = LogisticRegression(C=settings.inverse_penalty, class_weight=weights, max_iter=5000)
    model.fit(tfidf_rows(counts, idf), np.asarray(is_safe, bool))
    return NgramJudge(name, settings, idf, np.asarray(model.coef_[0], np.float64), float(model.intercept_[0]))


def fit_ranker(pairs: Sequence[Pair], settings: NgramSettings, *, name: str = "ranker") -> NgramRanker:
    """Return a ranker trained on pairs whose chosen completion is the more helpful one; safety labels are not read.

    Raises `DataError` if there is no pair or no text has a word.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    counts, idf = _counts_and_idf("pairs", [text for pair in pairs for text in (pair.chosen, pair.rejected)], settings)
    rows = tfidf_rows(counts, idf)
    difference = rows[0::2] - rows[1::2]
    # Both orders of every pair: without an intercept, neither position is preferred.
    model = LogisticRegression(C=settings.inverse_penalty, fit_intercept=False, max_iter=5000)
    model.fit(vstack([difference, -difference]), np.repeat([True, False], len(pairs)))
    return NgramRanker(name, settings, idf, np.asarray(model.coef_[0], np.float64))


def _counts_and_idf(name: str, texts: Sequence[str], settings: NgramSettings) -> tuple[Any, Floats]:
    from sklearn.feature_extraction.text import TfidfTransformer

    counts = ngram_counts(texts, settings) if texts else None
    if counts is None or counts.nnz == 0:
        raise DataError(f"{name}: no text has a word to learn from")
    return counts, np.asarray(TfidfTransformer().fit(counts).idf_, np.float64)


def _text(completion: Completion, settings: NgramSettings) -> str:
    if not settings.with_prompt:
        return completion.text
    # A word of the prompt gets a prefix, so that the same word in the completion is another feature.
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
    """Return rows of (1 + log count) x idf, scaled to length 1."""
    from sklearn.preprocessing import normalize

    weighed = counts.astype(np.float64)
    weighed.data = (1 + np.log(weighed.data)) * idf[weighed.indices]
    return normalize(weighed, copy=False)


# ----------------------------------------------------------- warnings about the training data of a trained judge


def few_rows(name: str, trained_on: Mapping[str, Any]) -> list[str]:
    """Return a warning if training had few rows of a class (`safe`, `unsafe`; for a ranker `pairs`)."""
    few = [
        f"{num} {kind}"
        for kind in ("safe", "unsafe", "pairs")
        if isinstance(num := trained_on.get(kind), int) and num < _FEW_ROWS
    ]
    if not few:
        return []
    rows = "" if "pairs" in trained_on else " completions"
    return [f"{name} was trained on only {' and '.join(few)}{rows}; below {_FEW_ROWS} it is unreliable"]


def trained_on_few(folder: str | Path) -> list[str]:
    """Return the warnings of `few_rows` for the judge or ranker in a folder; none if its `judge.json` has no counts."""
    try:
        described = json.loads((Path(folder) / JUDGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # loading the judge reports what is wrong with its folder
        return []
    trained_on = described.get("trained_on") if isinstance(described, dict) else None
    return few_rows(str(folder), trained_on) if isinstance(trained_on, dict) else []


def write_rows(folder: Path, completions: Iterable[Completion]) -> None:
    """Write a digest of each training text into the judge's folder, by which a check finds texts seen in training."""
    write_text_whole(folder / _ROWS, "".join(f"{digest}\n" for digest in sorted(set(map(_digest, completions)))))


def seen_rows(folder: str | Path, completions: Sequence[Completion]) -> list[str]:
    """Return a warning if the judge in a folder was trained on some of these texts."""
    try:
        known = set((Path(folder) / _ROWS).read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):  # not a judge of this version
        return []
    seen = sum(_digest(completion) in known for completion in completions)
    if not seen:
        return []
    return [
        f"{seen} of {len(completions)} texts were in the training data of {folder}: the figures are too good; check it "
        "on other texts"
    ]


def _digest(completion: Completion) -> str:
    words = [[[message.role, message.content] for message in completion.prompt], completion.text]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
