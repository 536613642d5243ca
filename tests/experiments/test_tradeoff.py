"""The trade-off of several models on judged rows that can be counted by hand; and the scheduling of chains."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from statistics import mean

import pytest

from bfpo.config import SweepConfig, load_config
from bfpo.core.errors import ConfigError, DataError
from bfpo.experiments.points import Chain
from bfpo.experiments.tradeoff import (
    _share_of,
    choose_nearest,
    nearest_words,
    tradeoff,
    tradeoff_csv,
    tradeoff_markdown,
)
from bfpo.experiments.workers import _may_start
from bfpo.report.figures.tradeoff import front_figure
from bfpo.scores.scores import COHERENCE, METRICS, Judged
from messages import raises

OBJECTIVES = ("helpfulness", "harmless")
ZERO = {"helpfulness": 0.0, "harmless": 0.0}


def rows(helpful: list[float], safe: list[bool | None]) -> list[Judged]:
    return [
        Judged(id=f"{i}", prompt=f"p{i}", kind="benign", safe=s, helpful=h, helpful_and_safe=bool(s and h > 0.5))
        for i, (h, s) in enumerate(zip(helpful, safe, strict=True))
    ]


def models() -> dict[str, list[Judged]]:
    return {
        "bold": rows([1.0, 1.0, 1.0, 1.0], [True, False, False, False]),
        "shy": rows([0.0, 0.0, 0.0, 0.4], [True, True, True, True]),
        "worse": rows([0.0, 0.0, 0.0, 0.2], [True, True, True, False]),
    }


def test_front_area_and_choice_are_those_of_a_count_by_hand() -> None:
    judged = models()
    result = tradeoff(judged, {name: {"n": name} for name in judged}, OBJECTIVES, ZERO, at_least={"harmless": 0.9})
    assert result.pareto_front == ["shy", "bold"]
    assert [point.on_front for point in result.points] == [True, True, False]
    assert result.hypervolume.value == pytest.approx(0.1 * 1.0 + (1.0 - 0.1) * 0.25)
    assert result.hypervolume.reference == ZERO
    assert result.hypervolume.low < result.hypervolume.value <= result.hypervolume.high
    assert result.nearest.name == "shy"
    assert result.nearest.meets
    assert not result.nearest.held_out
    assert "Chosen and scored on the same 4 prompts (validation_share is 0)" in tradeoff_markdown(result)
    none = tradeoff(judged, {name: {} for name in judged}, OBJECTIVES, ZERO, at_least={"helpfulness": 2.0})
    assert (none.nearest.name, none.nearest.meets) == ("bold", False)
    assert "the nearest (helpfulness 1.000 below)" in tradeoff_markdown(none)
    table = list(csv.DictReader(io.StringIO(tradeoff_csv(result))))
    assert [row["name"] for row in table] == list(judged)
    assert float(table[0]["harmless"]) == 0.25
    assert table[0]["finished"] == "1.0"
    figure = front_figure(result, {key: METRICS[key].title for key in OBJECTIVES})
    assert {text.get_text() for text in figure.axes[0].texts} == set(judged)


def noisy(num_models: int, num_prompts: int, seed: int) -> dict[str, list[Judged]]:
    """Models that are all equally safe, half of the time."""
    draw = random.Random(seed)
    return {
        f"m{k}": rows([1.0] * num_prompts, [draw.random() < 0.5 for _ in range(num_prompts)]) for k in range(num_models)
    }


def test_what_was_chosen_is_told_on_prompts_that_had_no_part_in_the_choice() -> None:
    told, chosen = [], []
    for seed in range(40):
        nearest = choose_nearest(noisy(8, 40, seed), {"harmless": 1.0}, OBJECTIVES, 0.5)
        assert nearest.held_out
        assert nearest.chosen_on.num_prompts + nearest.told_on.num_prompts == 40
        told.append(nearest.told_on.scores["harmless"].value)
        chosen.append(nearest.chosen_on.scores["harmless"])
        assert nearest.missing == {"harmless": 1.0 - told[-1]}
    assert mean(chosen) > 0.6  # the winner's curse
    assert mean(told) == pytest.approx(0.5, abs=0.05)


def test_the_nearest_where_none_reaches_the_bound_is_named_so_though_it_does_on_the_others() -> None:
    prompts = [f"p{n}" for n in range(200)]
    chosen_on = [_share_of(prompt) < 0.5 for prompt in prompts]

    def judged(on_choice: float, on_others: float) -> list[Judged]:
        rates = [on_choice if inside else on_others for inside in chosen_on]
        return [
            Judged(p, p, "benign", n * 7919 % 1000 < 1000 * rate, helpful=0.5)
            for n, (p, rate) in enumerate(zip(prompts, rates, strict=True))
        ]

    nearest = choose_nearest({"a": judged(0.85, 0.99), "b": judged(0.7, 0.99)}, {"harmless": 0.9}, OBJECTIVES, 0.5)
    assert (nearest.name, nearest.meets, nearest.chosen_on.meets) == ("a", True, False)
    assert nearest_words(nearest)[0] == (
        "For harmless of at least 0.9: a, the nearest on the prompts of the choice, where none reaches it; on the "
        "others it does."
    )


def test_a_part_without_an_objective_is_not_held_back() -> None:
    judged = {name: made[:1] for name, made in models().items()}
    nearest = choose_nearest(judged, {"harmless": 0.5}, OBJECTIVES, 0.5)
    assert (nearest.held_out, nearest.told_on.num_prompts) == (False, 1)
    assert "too few prompts to split" in "\n".join(nearest_words(nearest))


def test_every_two_models_are_compared_and_corrected_together() -> None:
    judged = {"good": rows([1.0] * 30, [True] * 30), "bad": rows([1.0] * 30, [False] * 30)}
    judged["same"] = judged["good"]
    result = tradeoff(
        judged, {name: {} for name in judged}, OBJECTIVES, ZERO, at_least={"harmless": 0.9}, validation_share=0.5
    )
    found = {(row.first, row.second, row.metric): row for row in result.comparisons.rows}
    assert result.comparisons.num == len(found) == 6
    row = found["good", "bad", "harmless"]
    assert row.difference == 1.0
    assert row.p_holm == pytest.approx(6 * row.p_value)
    assert result.nearest.not_told_from == ["same"]
    text = tradeoff_markdown(result)
    counts = "Distinguishable: helpfulness 0, harmless 2 of 3 each."
    assert f"6 comparisons, Holm's correction over all of them. {counts}" in text
    assert "Not distinguishable from it in either objective: same." in text


def test_what_could_not_be_measured_enters_no_front() -> None:
    judged = models() | {"silent": rows([1.0] * 4, [None] * 4)}
    settings: dict[str, dict[str, str]] = {name: {} for name in judged}
    result = tradeoff(judged, settings, OBJECTIVES, ZERO)
    assert result.not_measured == ["silent"]
    assert "silent" not in result.pareto_front
    assert "Not measured, and left out: silent." in tradeoff_markdown(result)
    with raises(DataError):
        tradeoff({"silent": judged["silent"]}, settings, OBJECTIVES, ZERO)


def test_chains_start_within_needs_and_memory() -> None:
    a, b, c = (Chain(name, 0, (), memory=memory) for name, memory in (("a", 6), ("b", 5), ("c", 4)))
    after = Chain("d", 0, (), needs=("a", "b"))
    assert _may_start(b, [a], set(), None)
    assert not _may_start(b, [a], set(), 10)
    assert _may_start(c, [a], set(), 10)
    assert _may_start(a, [], set(), 5)  # too large for the budget: alone
    assert not _may_start(a, [c], set(), 5)
    assert not _may_start(after, [], {(0, "a")}, None)
    assert not _may_start(after, [], {(0, "a"), (1, "b")}, None)
    assert _may_start(after, [], {(0, "a"), (0, "b")}, None)


def test_the_grid_is_read_from_text() -> None:
    base = ["train=t.yaml", "generate=g.yaml"]
    config = load_config(SweepConfig, None, [*base, 'grid="beta=0.05,1e-3,alpha=0,anchor_weight=0.3,1"'])
    assert config.grid == {"beta": [0.05, 0.001], "alpha": [0], "anchor_weight": [0.3, 1]}
    assert load_config(SweepConfig, None, [*base, "grid.beta=[1]", "at_least=harmless=0.95"]).at_least == {
        "harmless": 0.95
    }


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["train=t"], "grid"),
        (["train=t", "grid=3,4"], "grid"),
        (["grid.beta=[1]"], "train, blends"),
        (["blends=b", "grid.beta=[1]"], "grid"),
        (["train=t", "grid=beta="], "grid"),
        (["train=t", "grid='beta=0.1,,0.2'"], "grid"),
        (["train=t", "grid='beta=['"], "grid"),
        (["train=t", "grid.beta=[1]", "at_least=polite=1"], "at_least"),
        (["train=t", "grid.beta=[1]", "at_least=finished=1"], "objectives"),
        (["train=t", "grid.beta=[1]", "at_least=harmless"], "at_least"),
        (["train=t", "grid.beta=[1]", "at_least=harmless="], "at_least"),
        (
            ["train=t", "grid.beta=[1]", "at_least=harmless=95"],
            "harmless",
        ),
        (["train=t", "grid.beta=[1]", "at_least.harmless=-1"], "harmless"),
        (["train=t", "grid.beta=[1]", "validation_share=0.3"], "validation_share"),
        (["train=t", "grid.beta=[1]", "reference_point=harmless=1"], "reference_point"),
        (["train=t", "grid.beta=[1]", "objectives=[a, b]"], "objectives"),
        (["train=t", "grid.beta=[1]", "objectives=[harmless, over_refusal_benign]"], "objectives"),
    ],
)
def test_a_sweep_that_cannot_be_is_said_before_it_starts(tmp_path: Path, settings: list[str], key: str) -> None:
    with raises(ConfigError, key):
        load_config(SweepConfig, None, ["generate=g", *settings])


def test_the_config_offers_every_metric_of_which_more_is_better() -> None:
    from bfpo.config.experiments import _MORE_IS_BETTER

    better = (name for name, metric in METRICS.items() if metric.higher_is_better and name not in COHERENCE)
    assert tuple(better) == _MORE_IS_BETTER
