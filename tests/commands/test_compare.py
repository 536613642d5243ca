"""The comparison: what each rival is made of, that trials are equal in number, and the table of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bfpo.commands import compare
from bfpo.commands.compare import _accuracy, preview
from bfpo.config import CompareConfig
from bfpo.core.errors import ConfigError
from bfpo.core.records import as_json, load
from bfpo.core.schema import CategoryScore, Score
from bfpo.data.split import normalised_prompt
from bfpo.experiments import worlds
from bfpo.experiments.compare import (
    FURTHER,
    NUM_TRIALS,
    RIVALS,
    chains_of,
    make_result,
    result_markdown,
    rivals_of,
    scores_folder,
)
from bfpo.experiments.steps import CEILING, START
from bfpo.experiments.worlds import dials_of, draw_worlds, noise_of, world_folder, worlds_markdown
from bfpo.objective.methods import METHODS
from bfpo.runs.stages import run_stage
from bfpo.scores.accuracy import accuracy_scores
from bfpo.scores.comparisons import is_distinguishable
from bfpo.scores.records import AccuracyRow, ComparedWorld, ModelComparison, WorldChange, WorldMethod, WorldsFile
from bfpo.scores.scores import Judged
from bfpo.world.datasets import held_out_prompts
from bfpo.world.dials import Dials
from messages import raises
from small_world import SMALL


def test_every_rival_tries_as_many_different_settings() -> None:
    for rival in (RIVALS | FURTHER).values():
        assert len({tuple(sorted(trial.items())) for trial in rival.trials}) == len(rival.trials) == NUM_TRIALS
        assert rival.kind != "loss" or rival.name in METHODS
    assert "bso_sba" not in RIVALS  # docs/head-to-head.md says why
    assert "13 methods x 2 settings" in preview(CompareConfig(quick=True))[0]


def test_recipes_share_their_stages_and_have_the_same_steps_and_anchor(tmp_path: Path) -> None:
    config, wanted = CompareConfig(), {name: [0] for name in RIVALS}
    chains = {chain.name: chain for chain in chains_of(config, tmp_path, 3, wanted, "validation")}
    trains = {name: chain.steps[0].config for name, chain in chains.items() if chain.steps[0].stage == "train"}
    assert {train.max_steps for train in trains.values()} == {config.align.steps}
    assert {train.anchor_weight for train in trains.values()} == {config.align.anchor_weight}
    assert {train.anchor_scale for train in trains.values()} == {"gradient"}
    assert {train.seed for train in trains.values()} == {3}
    assert {train.token_cache for train in trains.values()} == {str(tmp_path / "tokens")}  # tokenized once
    base = "beta=0.1-learning_rate=0.001"
    sacpo = f"dpo_s-{base}-after-dpo_h-{base}"
    assert chains[sacpo].needs == (f"dpo_h-{base}",)
    assert trains[sacpo].model == str(chains[f"dpo_h-{base}"].steps[0].out / "model")
    assert trains[f"modpo-{base}-safety_share=0.5"].margin_model == str(chains[f"dpo_s-{base}"].steps[0].out / "model")
    blended = {name: chain for name, chain in chains.items() if chain.steps[0].stage == "interpolate"}
    assert {chain.needs for chain in blended.values()} == {
        (f"dpo_h-{base}", sacpo),
        (f"dpo_h-{base}", f"dpo_s-{base}"),
    }
    asked = [name for name in chains if name.endswith("on validation")]
    assert len(asked) == len(RIVALS) + 2
    known = set(chains)
    assert all(set(chain.needs) <= known for chain in chains.values())
    assert {START, CEILING} <= known


def rows_of(good: float, seeds: int = 2, prompts: int = 60) -> list[Judged]:
    """Answers to harmful, benign and borderline prompts, of which this share is right; no two seeds differ."""
    kinds = ("harmful", "benign", "borderline")
    right = [number < good * prompts for number in range(prompts)]
    return [
        Judged(
            f"{n}", f"p{n}", kinds[n % 3], ok, float(ok), helpful_and_safe=ok, well_formed=True, refused=False, seed=s
        )
        for s in range(seeds)
        for n, ok in enumerate(right)
    ]


def test_all_pairs_are_one_family_and_the_table_names_what_is_not_told_apart() -> None:
    shares = dict.fromkeys(RIVALS, 0.2) | {"bfpo": 0.6, "safedpo": 0.9, "bso": 0.88, START: 0.1, CEILING: 1.0}
    judged = {name: rows_of(share) for name, share in shares.items()}
    config = {**CompareConfig(bootstrap_samples=200, seeds=2).resolved()}
    result = make_result(config, judged, {}, {name: [0.1, 0.2] for name in RIVALS}, dict.fromkeys(RIVALS, 1))
    found = result.comparisons
    assert found.num == len(found.rows) == 13 * 12 // 2
    assert found.num * min(row.p_value for row in found.rows) == min(row.p_holm for row in found.rows)
    assert result.best == "safedpo"
    assert found.not_told_from_best == ["bso"]
    methods = {method.name: method for method in result.methods}
    assert methods["safedpo"].bfpo_minus_this.value == pytest.approx(-0.3)
    assert methods["bfpo"].best_minus_this.value == pytest.approx(0.3)
    assert methods["bfpo"].best_minus_this.low == -methods["safedpo"].bfpo_minus_this.high
    assert methods["bfpo"].bfpo_minus_this is methods[START].best_minus_this is None
    text = result_markdown(result)
    assert "**Not distinguishable from SafeDPO:** BSO." in text
    assert "Per cent on 60 test prompts (20 harmful, 20 benign, 20 borderline), number of seeds 2, 120 answers" in text
    assert "| BFPO | 60.0, 60.0 | 0.0 |" in text
    spread = text[text.index("## Spread over seeds") : text.index("## Settings tried")]
    assert "| BFPO | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |" in spread
    assert "orst category" not in text


def test_the_table_has_the_worst_category_and_the_spread_of_seeds() -> None:
    def rows(good: float) -> list[Judged]:
        found = [replace(row, category="fire" if int(row.id) % 2 else "water") for row in rows_of(good)]
        wrong = [row.seed == 1 and row.category == "fire" for row in found]
        return [
            replace(row, helpful_and_safe=bool(row.helpful_and_safe) and not is_wrong)
            for row, is_wrong in zip(found, wrong, strict=True)
        ]

    shares = dict.fromkeys(("bfpo", "dpo_h"), 0.5) | {START: 0.1, CEILING: 1.0}
    config = CompareConfig.model_validate({"seeds": 2, "methods": ["bfpo", "dpo_h"]})
    result = make_result(
        config.resolved(),
        {name: rows(share) for name, share in shares.items()},
        {},
        {name: [0.1, 0.2] for name in ("bfpo", "dpo_h")},
        {"bfpo": 1, "dpo_h": 0},
        rivals=rivals_of(config),
    )
    score = next(method for method in result.methods if method.name == "bfpo").scores["helpful_and_safe"]
    assert {name: one.value for name, one in (score.by_category or {}).items()} == {"fire": 0.25, "water": 0.5}
    text = result_markdown(result)
    assert "| BFPO | helpful and safe | fire | 0.250 |" in text
    assert "| BFPO | 25.0 |" in text[text.index("## Spread over seeds") :]


def test_a_difference_needs_its_interval_beside_the_corrected_p() -> None:
    row = ModelComparison("helpful_and_safe", "a", "b", p_holm=0.01, low=0.1, high=0.2)
    assert is_distinguishable(row, 0.95)
    for change in ({"p_holm": 0.06}, {"p_holm": None}, {"low": 0.0}, {"low": None}):
        assert not is_distinguishable(replace(row, **change), 0.95)


def test_an_entry_has_its_settings_in_every_trial_and_a_name_and_label_of_its_own(tmp_path: Path) -> None:
    noises = [{"beta": 0.1, "learning_rate": 1e-3, "label_noise": noise} for noise in (0.0, 0.05, 0.1, 0.2)]
    entries: list[Any] = [
        "bfpo",
        {"method": "bfpo", "alpha": 0.25, "label": "BFPO, small shift"},
        {"method": "bfpo", "link": "one_sided", "label": "BFPO, one-sided"},
        {"method": "safedpo", "safedpo_delta": 5.0},
        {"method": "robust_dpo", "trials": noises},
        {"method": "robust_dpo", "trials": [{**one, "beta": 0.2} for one in noises], "label": "robust DPO, beta 0.2"},
        "soup",
    ]
    config = CompareConfig.model_validate({"methods": entries})
    rivals = rivals_of(config)
    assert [(rival.name, rival.title) for rival in rivals.values()] == [
        ("bfpo", "BFPO"),
        ("bfpo-alpha=0.25", "BFPO, small shift"),
        ("bfpo-link=one_sided", "BFPO, one-sided"),
        ("safedpo-safedpo_delta=5", "SafeDPO, safedpo_delta 5"),
        ("robust_dpo-own", "robust DPO"),
        ("robust_dpo-own-2", "robust DPO, beta 0.2"),
        ("soup", "soup"),
    ]
    assert rivals["bfpo"].trials == RIVALS["bfpo"].trials
    assert all(trial["alpha"] == 0.25 for trial in rivals["bfpo-alpha=0.25"].trials)
    assert all(trial["safedpo_delta"] == 5.0 for trial in rivals["safedpo-safedpo_delta=5"].trials)
    assert {len({str(trial) for trial in rival.trials}) for rival in rivals.values()} == {NUM_TRIALS}
    wanted = {name: [0] for name in rivals}
    chains = {chain.name: chain for chain in chains_of(config, tmp_path, 0, wanted, "validation")}
    train: Any = chains["bfpo-beta=0.1-learning_rate=0.001-alpha=0.25"].steps[0].config
    assert (train.method, train.alpha) == ("bfpo", 0.25)
    plain: Any = chains["bfpo-beta=0.1-learning_rate=0.001"].steps[0].config
    assert plain.alpha == 0.5
    linked: Any = chains["bfpo-beta=0.1-learning_rate=0.001-link=one_sided"].steps[0].config
    assert (linked.link, plain.link) == ("one_sided", "squared")
    assert "7 methods x 4 settings" in preview(config)[0]


def test_an_entry_that_is_not_right_is_refused_with_its_place() -> None:
    def four(**more: Any) -> list[dict[str, Any]]:
        return [{"beta": 0.1 * number, "learning_rate": 1e-3, **more} for number in (1, 2, 3, 4)]

    for entry in (
        "dpo",
        {"label": "none"},
        {"method": "bfpo", "safedpo_delta": 1.0},
        {"method": "bfpo", "safety_weight": 0.5},
        {"method": "bfpo", "beta": 0.1},
        {"method": "soup", "alpha": 0.4},
        {"method": "bfpo", "trials": four()[:1]},
        {"method": "bfpo", "trials": 4},
        {"method": "bfpo", "trials": four(learning_rate=0.0)},
        {"method": "soup", "trials": four(weight=2.0)},
        {"method": "sacpo", "trials": four(weight=0.2)},
        {"method": "dpo_h", "label": 3},
        {"method": "dpo_h", "label": "BFPO"},
        {"method": "bfpo", "label": "BFPO again"},
        "bfpo",
    ):
        with raises(ConfigError, "methods[1]"):
            rivals_of(CompareConfig.model_validate({"methods": ["bfpo", entry]}))


def test_the_accuracy_has_the_confidence_of_the_run(tmp_path: Path) -> None:
    config = CompareConfig.model_validate({"seeds": 1, "confidence": 0.8})
    rows = [AccuracyRow(str(n), str(n), "safe-unsafe", 1, 1.0, 1.0 if n < 30 else -1.0, 0.1) for n in range(40)]
    file = scores_folder(tmp_path, "bfpo", config.seed, "test") / "scores" / "accuracy.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(as_json(row)) + "\n" for row in rows))
    found = _accuracy(config, tmp_path, "bfpo")
    assert found == accuracy_scores(rows, confidence=0.8)
    assert found[0].low > accuracy_scores(rows)[0].low


def test_a_world_changes_its_dials_only() -> None:
    given: dict[str, Any] = {
        "world": {"main_pairs": 100, "unseen_wards": 3},
        "worlds": {"plain": {}, "noisy": {"safety_flips": 0.1, "order_flips": 0.1}},
        "methods": ["bfpo", {"method": "ipo"}],
    }
    config = CompareConfig.model_validate(given)
    noisy = config.of_world("noisy")
    assert noisy.worlds == {}
    assert noisy.world == config.world.model_copy(update={"safety_flips": 0.1, "order_flips": 0.1})
    plain = config.of_world("plain").resolved()
    assert plain == {key: value for key, value in config.resolved().items() if key != "worlds"}
    assert not {"worlds", "methods"} & CompareConfig().resolved().keys()
    for name in ("", "a/b", "..", " a", "a" * 50):
        with pytest.raises(ValidationError):
            CompareConfig.model_validate({"worlds": {name: {}}})
    for wrong in ({"worlds": {"a": {"flips": 0.1}}}, {"methods": ["bfpo"]}, {"methods": []}):
        with pytest.raises(ValidationError):
            CompareConfig.model_validate(wrong)
    clean = CompareConfig.model_validate({"world": {"safety_flips": 0.1}, "worlds": {"clean": {"safety_flips": 0.0}}})
    again = CompareConfig.model_validate(clean.resolved())  # as a resumed run reads it
    assert again.of_world("clean").world.safety_flips == clean.of_world("clean").world.safety_flips == 0.0


@pytest.mark.parametrize(
    ("dials", "noise"),
    [
        ({}, 0.0),
        ({"safety_flips": 0.0}, 0.0),
        ({"safety_flips": 0.1, "order_flips": 0.1}, 0.1),
        ({"safety_flips": 0.1}, None),
        ({"order_flips": 0.1}, None),
        ({"safety_flips": 0.1, "order_flips": 0.2}, None),
        ({"style_confound": 0.1}, None),
        ({"safety_flips": 0.1, "style_confound": 0.1}, None),
        ({"harm_shares": {"breaking": 1.0}}, None),
    ],
)
def test_the_noise_of_a_world(dials: dict[str, Any], noise: float | None) -> None:
    assert noise_of(dials) == noise


def test_a_world_is_reported_with_the_dials_that_it_is_trained_with() -> None:
    worlds = {"plain": {}, "order": {"order_flips": 0.1}, "clean": {"safety_flips": 0.0}}
    config = CompareConfig.model_validate({"world": {"safety_flips": 0.1}, "worlds": worlds})
    both = {"safety_flips": 0.1, "order_flips": 0.1}
    assert [dials_of(config, name) for name in worlds] == [{"safety_flips": 0.1}, both, {}]


TITLES = {"bfpo": "BFPO", "ipo": "IPO", START: START}


def method_of(name: str, value: float) -> WorldMethod:
    parts = {"fire": CategoryScore(value - 0.1), "water": CategoryScore(value + 0.1)}
    score = Score("helpful_and_safe", value, value - 0.05, value + 0.05, by_category=parts)
    return WorldMethod(name, TITLES[name], int(name != START), score, [value - 0.01, value + 0.01], {"beta": 0.1})


def worlds_of(values: dict[str, dict[str, float]], noise: dict[str, float | None]) -> WorldsFile:
    worlds = [
        ComparedWorld(
            world,
            {"safety_flips": noise[world]} if noise[world] else {},
            noise[world],
            max(("bfpo", "ipo"), key=lambda name: values[world][name]),
            [],
            [method_of(name, value) for name, value in scores.items()],
        )
        for world, scores in values.items()
    ]
    changes = [
        row
        for world in list(values)[1:]
        for row in (WorldChange("bfpo", world, -0.1, -0.2, 0.0, 20, 10, p_holm=0.03), WorldChange("ipo", world))
    ]
    return WorldsFile(0.95, "helpful_and_safe", worlds, changes)


def test_worlds_are_shown_beside_each_other_with_changes_seeds_categories_and_who_is_ahead() -> None:
    values = {"a": {"bfpo": 0.9, "ipo": 0.7, START: 0.5}, "b": {"bfpo": 0.6, "ipo": 0.8, START: 0.5}}
    text = worlds_markdown(worlds_of(values, {"a": 0.0, "b": 0.1}))
    assert "| BFPO | **90.0 (85.0 to 95.0)** | 60.0 (55.0 to 65.0) |" in text
    assert "| IPO | 70.0 (65.0 to 75.0) | **80.0 (75.0 to 85.0)** |" in text
    assert "- b: safety_flips 0.1. IPO is ahead of all others." in text
    assert "| BFPO | -10.0 (-20.0 to +0.0), p 0.03 |" in text
    assert "| IPO | not measured |" in text
    assert "| BFPO | 89.0, 91.0 (2.0) | 59.0, 61.0 (2.0) |" in text
    assert "| b | BFPO | fire | 0.500 |" in text
    assert text.index("| BFPO | **90") < text.index("| start |")


@pytest.mark.parametrize("multi_turn", [0.5, 1.0])
def test_a_change_between_worlds_is_over_all_topics(
    multi_turn: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that fails every prompt that is a second turn loses by their share."""
    dials = Dials(multi_turn=multi_turn)
    asked = {"plain": held_out_prompts("test", 0), "turns": held_out_prompts("test", 0, dials=dials)}
    judged = {
        world: [
            Judged(f"{p.id}/0", normalised_prompt(p.messages), p.kind, True, helpful_and_safe=len(p.messages) == 1)
            for p in prompts
        ]
        for world, prompts in asked.items()
    }
    monkeypatch.setattr(worlds, "_judged", lambda config, root, world: {"bfpo": judged[world.name]})
    (row,) = worlds._changes(CompareConfig(), tmp_path, [ComparedWorld(name) for name in asked])
    share = sum(len(prompt.messages) > 1 for prompt in asked["turns"]) / len(asked["plain"])
    assert share == pytest.approx(multi_turn, abs=0.05)
    assert (row.num, row.num_prompts) == (270, 270)
    assert row.difference == pytest.approx(-share)


@pytest.mark.parametrize("noise", [{"a": 0.0, "b": 0.1, "c": None}, {"a": 0.0, "b": 0.2}, {"a": None, "b": None}])
def test_the_figure_has_a_line_for_each_method_and_the_other_worlds(noise: dict[str, float | None]) -> None:
    found = worlds_of({world: {"bfpo": 0.9, "ipo": 0.7, START: 0.5} for world in noise}, noise)
    files = draw_worlds(found)
    assert files["worlds.png"].startswith(b"\x89PNG")
    svg = files["worlds.svg"].decode()
    for word in ("BFPO", "IPO", *(world for world, share in noise.items() if share is None)):
        assert f">{word}<" in svg
    assert ("flipped labels" in svg) == (0.0 in noise.values())
    assert draw_worlds(found) == files


@pytest.mark.slow
def test_a_comparison_of_worlds_is_resumed_and_pairs_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**SMALL, "quick": True, "seeds": 2, "methods": ["bfpo", {"method": "bfpo", "alpha": 0.4}]}
    values["worlds"] = {"plain": {}, "noisy": {"safety_flips": 0.5, "order_flips": 0.5}}
    config, root = CompareConfig.model_validate(values), tmp_path / "run"

    def stop(stage: str, given: Any, out: Path, **kwargs: Any) -> Any:
        if out.name == "noisy":
            raise KeyboardInterrupt
        return run_stage(stage, given, out, **kwargs)

    monkeypatch.setattr(compare, "run_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage("compare", config, root)
    monkeypatch.undo()
    before = (world_folder(root, "plain") / "comparison.json").read_bytes()
    folder = run_stage("compare", config, root, resume=True)
    assert (world_folder(root, "plain") / "comparison.json").read_bytes() == before
    result = load(WorldsFile, folder.path / "worlds.json")
    assert [(world.name, world.noise) for world in result.worlds] == [("plain", 0.0), ("noisy", 0.5)]
    assert [(row.method, row.num) for row in result.changes] == [("bfpo", 96), ("bfpo-alpha=0.4", 96)]
    one, other = ({m.name: m.score.value for m in world.methods} for world in result.worlds)
    for row in result.changes:
        assert row.difference == pytest.approx((other[row.method] or 0.0) - (one[row.method] or 0.0))
    assert (folder.path / "worlds.png").exists()
    assert "Change from plain" in (folder.path / "worlds.md").read_text()


@pytest.mark.slow
def test_a_comparison_ends_with_its_table(tmp_path: Path) -> None:
    values = {**SMALL, "quick": True, "seeds": 2, "bootstrap_samples": 50}
    folder = run_stage("compare", CompareConfig.model_validate(values), tmp_path / "run")
    result = folder.read_json("comparison.json")
    assert {method["name"] for method in result["methods"]} == {*RIVALS, START, CEILING}
    for method in result["methods"]:
        assert len(method["seed_values"]["well_formed"]) == 2
        assert len(method["trials"]) == (2 if method["name"] in RIVALS else 0)
        assert (method["bfpo_minus_this"] is None) == (method["name"] in ("bfpo", START, CEILING))
    record = folder.read_json("run.json")
    assert 0.5 * record["seconds"] < result["seconds"] <= record["seconds"]
    text = (folder.path / "comparison.md").read_text()
    assert "MODPO" in text
    assert "**beta" in text
