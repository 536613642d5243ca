"""Shared by intervals and tests: bootstrap weights, integer codes of labels, and input checks."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import SettingError

__all__ = [
    "Floats",
    "Ints",
    "bootstrap_weights",
    "check_confidence",
    "drawn_counts",
    "in_unit_interval",
    "label_codes",
    "paired_values",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def bootstrap_weights(clusters: Sequence[Hashable], num_resamples: int, random_seed: int = 0) -> Iterator[Floats]:
    """Yield, for each resample of whole clusters, how often each value is drawn, `(len(clusters),)`.

    For statistics other than means, as weights of the values.
    """
    codes = label_codes("clusters", clusters, len(clusters))
    num_clusters = int(codes.max()) + 1 if codes.size else 0
    generator = np.random.default_rng(random_seed)
    for _ in range(num_resamples if num_clusters else 0):
        yield drawn_counts(generator, num_clusters)[codes].astype(np.float64)


def drawn_counts(generator: np.random.Generator, num: int) -> Ints:
    """Return how often each of `num` is drawn in as many draws with replacement, (num,); faster than a multinomial."""
    return np.bincount(generator.integers(0, num, num), minlength=num)


def label_codes(name: str, labels: Sequence[Hashable] | None, size: int) -> Ints:
    """Return labels as integers 0, 1, ... in order of first occurrence, (size,); without labels, `range(size)`."""
    if labels is None:
        return np.arange(size, dtype=np.int64)
    if len(labels) != size:
        raise SettingError(f"{name}: got {len(labels)} for {size} values; one per value is needed")
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.int64)


def in_unit_interval(name: str, values: Sequence[bool | float]) -> Floats:
    """Return the values as float64, (N,); raises `SettingError` for one outside [0, 1]."""
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not (np.isfinite(data) & (data >= 0) & (data <= 1)).all():
        raise SettingError(f"{name}: a flat list of numbers in [0, 1] is needed")
    return data


def paired_values(first: Sequence[bool | float], second: Sequence[bool | float]) -> tuple[Floats, Floats]:
    """Return both lists as float64, (N,) each; raises `SettingError` for lengths that differ or values off [0, 1]."""
    left, right = in_unit_interval("first", first), in_unit_interval("second", second)
    if left.size != right.size:
        raise SettingError(f"first, second: got {left.size} and {right.size} values; their lengths must match")
    return left, right


def check_confidence(confidence: float) -> None:
    """Raise `SettingError` for a confidence outside (0, 1)."""
    if not 0 < confidence < 1:
        raise SettingError(f"confidence: got {confidence}; allowed: a number between 0 and 1, such as 0.95")
