from __future__ import annotations

import random

import numpy as np
import pytest

from bfpo.config.prepare import NearDuplicatesConfig
from bfpo.preparation.sketches import (
    bands_and_rows,
    bands_of,
    estimated_similarity,
    group_similar,
    ngrams,
    similarity,
    sketches_of,
)

SETTINGS = NearDuplicatesConfig(threshold=0.8, characters=5, permutations=128)


def plain_similarity(first: str, second: str, size: int = 5) -> float:
    one, other = ({text[i : i + size] for i in range(max(1, len(text) - size + 1))} for text in (first, second))
    return len(one & other) / len(one | other)


def texts_with_changes(num: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    base = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=200))
    texts = []
    for place in range(num):
        characters = list(base)
        for _ in range(place):
            characters[draw.randrange(len(characters))] = draw.choice("ABCDEFGH")
        texts.append("".join(characters))
    return texts


def test_similarity_is_that_of_the_sets_of_ngrams() -> None:
    texts = [*texts_with_changes(12, 0), "", "ab", "abcde", "日本語のテキスト", "aaaaaaaaaa"]
    grams = ngrams(texts, 5)
    for i, first in enumerate(texts):
        for j, second in enumerate(texts):
            assert similarity(grams[i], grams[j]) == pytest.approx(plain_similarity(first, second))


def test_ngrams_do_not_run_from_one_text_into_the_next() -> None:
    alone = [ngrams([text], 3)[0] for text in ("hello", "a", "world")]
    together = ngrams(["hello", "a", "world"], 3)
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_the_low_bytes_of_a_sketch_estimate_similarity() -> None:
    texts = texts_with_changes(30, 1)
    grams = ngrams(texts, 5)
    low = (sketches_of(grams, SETTINGS) & 0xFF).astype(np.uint8)
    exact = np.array([similarity(grams[0], one) for one in grams])
    estimated = estimated_similarity(np.repeat(low[:1], len(low), 0), low)
    assert estimated[0] == 1
    assert np.abs(estimated - exact).max() < 4 * np.sqrt(0.25 / 128)


@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.8, 0.95, 1.0])
def test_bands_leave_similar_texts_a_chance_of_99_percent_to_meet(threshold: float) -> None:
    settings = NearDuplicatesConfig(threshold=threshold, characters=5, permutations=128)
    num_bands, rows = bands_and_rows(settings)
    met = 1 - (1 - threshold**rows) ** num_bands
    assert met >= 0.99
    assert num_bands * rows <= 128


def test_similar_texts_are_in_one_group_and_others_are_not() -> None:
    families = [texts_with_changes(3, seed)[: 1 + seed % 3] for seed in range(40)]
    texts = [text for family in families for text in family]
    family_of = [number for number, family in enumerate(families) for _ in family]
    assert min(plain_similarity(f[0], f[-1]) for f in families) > 0.9
    groups = group(texts)
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert (groups[i] == groups[j]) == (family_of[i] == family_of[j])


def test_a_chain_of_similar_texts_is_one_group() -> None:
    draw = random.Random(5)
    characters = draw.choices("abcdefghijklmnopqrstuvwxyz", k=300)
    chain = []
    for place in range(0, 40, 4):
        characters[place * 7] = "X"
        chain.append("".join(characters))
    assert plain_similarity(chain[0], chain[1]) > 0.9
    assert plain_similarity(chain[0], chain[-1]) < 0.8
    assert len(set(group([*chain, "something else altogether"]).tolist())) == 2


def test_a_text_between_two_similar_ones_does_not_part_them() -> None:
    low = np.array([[1] * 64, [1, 2] * 32, [1] * 64], np.uint8)
    groups = group_similar(
        3, num_bands=1, band=lambda _: np.full(3, 7, np.uint32), sketches=lambda rows: low[rows], threshold=0.8
    )
    assert groups[0] == groups[2] != groups[1]


def group(texts: list[str]) -> np.ndarray:
    sketches = sketches_of(ngrams(texts, 5), SETTINGS)
    bands, low = bands_of(sketches, SETTINGS), (sketches & 0xFF).astype(np.uint8)
    return group_similar(
        len(texts),
        num_bands=bands_and_rows(SETTINGS)[0],
        band=lambda number: bands[:, number],
        sketches=lambda indices: low[indices],
        threshold=SETTINGS.threshold,
    )
