"""The benchmark of `bfpo clean`: it counts wrong labels by the oracle, and compares the same training on all labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import cleaning
from benchmarks.process import read_results
from bfpo.data.read import read_pairs
from bfpo.world.datasets import main_pairs


def test_a_flipped_label_is_one_wrong_label_and_a_soft_one_its_distance():
    right = main_pairs(40, 0, harmful_share=0.45)
    assert cleaning._counted(right) == (40, 80, 0.0)
    flipped = [replace(pair, chosen_is_safe=1.0 - float(pair.chosen_is_safe or 0.0)) for pair in right[:7]]
    assert cleaning._counted([*flipped, *right[7:]]) == (40, 80, 7.0)
    soft = [replace(pair, chosen_is_safe=0.75 if pair.chosen_is_safe else 0.25) for pair in right]
    assert cleaning._counted(soft) == (40, 80, 10.0)


def _gain(metric: str, second: str, difference: float) -> dict[str, Any]:
    bounds = {"low": difference - 0.01, "high": difference + 0.01}
    return {"metric": metric, "second": second, "difference": difference, "p_holm": 0.5, **bounds}


def test_the_table_has_a_row_an_arm_and_the_cleaned_arms_are_compared_with_each_other():
    score = {metric: {"value": 0.9, "low": 0.8, "high": 0.95} for metric in cleaning.METRICS}
    row = {"noise": 0.1, "pairs": [100, 90], "labels": [200, 180], "wrong": [20, 18.5], "scores": score}
    runs = [
        {**row, "arm": "given", "minus_given": {}, "minus_others": []},
        {
            **row,
            "arm": "soften",
            "minus_given": {"helpful_and_safe": _gain("helpful_and_safe", "given", 0.02)},
            "minus_others": [_gain("helpful_and_safe", "drop", -0.03)],
        },
    ]
    given, soften = cleaning.table(runs).splitlines()[2:]
    assert [cell.strip() for cell in given.split("|")[1:6]] == ["10", "given", "95", "10.1", "90.0 (80.0 to 95.0)"]
    assert "+2.0 (+1.0 to +3.0), p 0.5" in soften
    assert cleaning.between(runs) == "10%, soften minus drop: helpful_and_safe -3.0 (-4.0 to -2.0), p 0.5\n"


def test_the_smoke_form_trains_on_labels_as_given_and_as_cleaned(tmp_path, capsys):
    """Each arm has its own labels of the same pairs and the same buffer; a second call trains nothing again."""
    options = ["--quick", "--seeds", "1", "--noise", "0.2", "--policies", "soften"]
    options += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    cleaning.main(options)
    assert capsys.readouterr().out.count("\n| 20 |") == 2
    results = read_results(tmp_path, "cleaning")
    assert results is not None
    given, soften = results["runs"]
    assert [row["arm"] for row in (given, soften)] == ["given", "soften"]
    assert given["pairs"] == soften["pairs"] == [200]
    assert 40 <= given["wrong"][0] <= 120  # a fifth of 400 labels
    assert soften["wrong"][0] < given["wrong"][0]
    assert set(soften["minus_given"]) == set(cleaning.METRICS)
    root = tmp_path / "runs" / "noise-0.2"
    own = {arm: root / arm / "data" / "seed-0" for arm in ("given", "soften")}
    assert (own["given"] / "buffer.jsonl").read_bytes() == (own["soften"] / "buffer.jsonl").read_bytes()
    assert {pair.chosen_is_safe for pair in read_pairs([own["soften"] / "main.jsonl"]).pairs} - {0.0, 1.0}
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    assert len(before) >= 2
    cleaning.main(options)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before


def test_a_share_of_noise_that_the_world_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="safety_flips"):
        cleaning.main(["--quick", "--noise", "0.7", "--runs", str(tmp_path)])
