from __future__ import annotations

import random

import pytest

import bfpo.data.read as names_module
from bfpo.data.read import SeenNames


@pytest.mark.parametrize("crowded", [False, True])
def test_names_are_found_where_they_were_first(crowded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if crowded:  # neighbouring hashes, so that most names lie in another's slot
        monkeypatch.setattr(names_module, "_key", lambda name: 1 + 2048 * (int(name) % 7) + int(name))
    monkeypatch.setattr(names_module, "_FIRST_SLOTS", 8)
    draws = random.Random(0).choices(range(1500), k=3000)
    seen, expected = SeenNames(), dict[str, int]()
    for place, name in enumerate(map(str, draws)):
        assert seen.place_of(name) == expected.get(name)
        if name not in expected:
            seen.add(name, place)
            expected[name] = place
    assert all(seen.place_of(name) == place for name, place in expected.items())
    assert seen.place_of("9999") is None
