from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.core.errors import DataError
from bfpo.report.data import ReportData
from bfpo.report.gather import gather
from bfpo.report.headline import headline
from bfpo.report.page import render_html, render_markdown, write_report
from messages import raises
from run_folders import HOSTILE, point_score, write_compare, write_run, write_suites, write_sweep


def test_a_sweep_is_shown_as_one_with_its_front_hypervolume_and_choice(tmp_path: Path) -> None:
    data = gather([write_sweep(tmp_path / "sweep")])
    assert data.methods == []  # no point is a model of its own, no answer of the runs inside is on the page
    assert data.samples == []
    found = headline(data)
    assert found.sentence == (
        "For harmless of at least 92%, beta=0.2 was chosen of 3 models: helpfulness on harmless prompts 80% "
        "(76% to 84%) and harmless 93% (89% to 97%)."
    )
    for text in (render_html(data), render_markdown(data).replace("\\", "")):
        for words in (
            "0.762 (0.701 to 0.815), over 120 prompts",
            "(helpfulness on harmless prompts 0.1, harmless 0.2)",
            "beta=0.1; beta=0.2",
            "76.0 to 84.0",  # an interval of a point
            "beta=0.1 (20%)",  # broken text, and on the front
        ):
            assert words in text, words
        assert "11.0%" not in text  # a score of a run inside
        assert "not measured" not in text.split("Reproduction")[0]
    write_report(data, tmp_path / "out")
    assert (tmp_path / "out" / "figures" / "tradeoff-0.svg").read_text().count("beta=0.2") == 1
    assert f"beta=0.2,{tmp_path.name}/sweep,helpfulness,0.8,0.76" in (tmp_path / "out" / "report.csv").read_text()
    assert ReportData.from_json((tmp_path / "out" / "report.json").read_text()) == data
    assert "runs inside experiments" in " ".join(data.absent)
    assert [run.stage for run in data.runs] == ["sweep"]


def test_a_choice_that_falls_short_says_by_how_much(tmp_path: Path) -> None:
    run = write_sweep(tmp_path / "sweep")
    content = json.loads((run / "tradeoff.json").read_text())
    content["nearest"] = {
        "at_least": {"harmless": 0.995},
        "name": "beta=0.1",
        "meets": False,
        "missing": {"harmless": 0.005},
    }
    (run / "tradeoff.json").write_text(json.dumps(content))
    found = headline(gather([run]))
    assert found.sentence.startswith("None of 3 models reaches harmless of at least 99.5%; beta=0.1 is nearest: ")
    assert "none reaches it; beta=0.1 is nearest and lacks 0.5 points of harmless." in " ".join(found.details)
    content["nearest"] = None
    (run / "tradeoff.json").write_text(json.dumps(content))
    assert headline(gather([run])).sentence.startswith("2 of 3 models are Pareto-optimal in helpfulness")


def test_a_choice_is_scored_on_the_prompts_that_were_not_used_for_it(tmp_path: Path) -> None:
    run = write_sweep(tmp_path / "sweep")
    content = json.loads((run / "tradeoff.json").read_text())
    told = {"helpfulness": point_score("helpfulness", 0.75), "harmless": point_score("harmless", 0.85)}
    content["nearest"] |= {
        "held_out": True,
        "chosen_on": {"num_prompts": 60, "meets": True},
        "told_on": {"num_prompts": 60, "scores": told},
    }
    (run / "tradeoff.json").write_text(json.dumps(content))
    assert headline(gather([run])).sentence == (
        "For harmless of at least 92%, beta=0.2 was chosen of 3 models: helpfulness on harmless prompts 75% "
        "(71% to 79%) and harmless 85% (81% to 89%), on the prompts that were not used for the choice."
    )
    content["nearest"] |= {"meets": False, "missing": {"harmless": 0.07}}
    (run / "tradeoff.json").write_text(json.dumps(content))
    found = headline(gather([run]))
    assert found.sentence == (
        "beta=0.2, chosen of 3 models, reaches harmless of at least 92% on the prompts of the choice, but not on the "
        "others: helpfulness on harmless prompts 75% (71% to 79%) and harmless 85% (81% to 89%)."
    )
    assert "beta=0.2 reaches it on the prompts of the choice, but lacks 7.0 points of harmless on the others." in (
        " ".join(found.details)
    )


def test_a_model_that_reaches_the_bound_on_the_other_prompts_alone_is_not_called_the_highest(
    tmp_path: Path,
) -> None:
    run = write_sweep(tmp_path / "sweep")
    content = json.loads((run / "tradeoff.json").read_text())
    told = {"helpfulness": point_score("helpfulness", 0.75), "harmless": point_score("harmless", 0.95)}
    content["nearest"] |= {
        "held_out": True,
        "chosen_on": {"num_prompts": 60, "meets": False, "missing": {"harmless": 0.02}},
        "told_on": {"num_prompts": 60, "scores": told},
    }
    (run / "tradeoff.json").write_text(json.dumps(content))
    found = headline(gather([run]))
    assert found.sentence == (
        "None of 3 models reaches harmless of at least 92% on the prompts of the choice; beta=0.2 was nearest there, "
        "and reaches it on the others: helpfulness on harmless prompts 75% (71% to 79%) and harmless 95% (91% to 99%)."
    )
    said = " ".join(found.details)
    assert (
        "For harmless of at least 92%: none reaches it on the prompts of the choice; beta=0.2 was nearest there, and "
        "reaches it on the others." in said
    )
    assert "highest other objective" not in said


def test_where_both_objectives_are_bounded_there_is_no_other_one(tmp_path: Path) -> None:
    run = write_sweep(tmp_path / "sweep")
    assert "as measured the highest other objective" in " ".join(headline(gather([run])).details)
    content = json.loads((run / "tradeoff.json").read_text())
    content["nearest"]["at_least"] = {"helpfulness": 0.5, "harmless": 0.92}
    (run / "tradeoff.json").write_text(json.dumps(content))
    assert "as measured the furthest above it where it is reached" in " ".join(headline(gather([run])).details)


def test_a_comparison_gives_the_models_of_the_page_and_how_their_settings_were_chosen(tmp_path: Path) -> None:
    data = gather([write_compare(tmp_path / "cmp")])
    assert [(method.name, method.role) for method in data.methods] == [
        ("bfpo", "main"), ("soup", "baseline"), ("start", "start"), ("ceiling", "ceiling")
    ]  # fmt: skip
    assert data.seeds == [4, 5]
    assert data.confidence == 0.9
    assert data.num_prompts == {"harmful": 50}
    found = headline(data)
    assert found.wins
    assert "BFPO is helpful and safe more often than its baseline soup: on 85% (81% to 89%)" in found.sentence
    page, markdown = render_html(data), render_markdown(data).replace("\\", "")
    for text in (page, markdown):
        assert "85.0% / 84.0%" in text  # seed by seed
        assert "+15.0" in text
        assert "+8.0 to +21.0" in text
        assert "81.3%" in text  # the trial that was not taken
    assert "| soup | beta 0.05, learning_rate 0.001 | 81.3% | taken |" in markdown
    assert "| BFPO | beta 0.05, learning_rate 0.001 | 81.3% |  |" in markdown
    assert "| BFPO | beta 0.1, learning_rate 0.001 | 1 | **" not in markdown
    assert '<div class="scatter wide">' in page
    assert len(page) < 300_000
    assert "steps" in page
    with raises(DataError):
        gather([tmp_path / "cmp"], main="soup")


def test_beside_other_runs_a_comparison_is_a_table_of_its_own(tmp_path: Path) -> None:
    data = gather([write_compare(tmp_path / "cmp"), write_suites(tmp_path / "scores")])
    assert [method.name for method in data.methods] == ["ours", "theirs"]
    page = render_html(data)
    assert "81.0 to 89.0" in page  # of BFPO, in the table of the comparison
    assert "Trade-off of the models of" in page  # its own figure
    assert "soup," in (write_report(data, tmp_path / "out").with_suffix(".csv")).read_text()


def test_two_comparisons_name_every_method_of_the_front(tmp_path: Path) -> None:
    runs = [write_compare(tmp_path / name) for name in ("one", "two")]
    for run, front in zip(runs, (["BFPO"], ["BFPO", "soup"]), strict=True):
        content = json.loads((run / "comparison.json").read_text())
        (run / "comparison.json").write_text(json.dumps({**content, "pareto_front": front}))
    first, second = headline(gather(runs)).sentence, headline(gather(runs[::-1])).sentence
    assert first.startswith("BFPO is the only Pareto-optimal one of 4 models")
    assert second.startswith("2 of 4 models are Pareto-optimal")


def test_a_run_inside_is_on_the_page_when_it_is_asked_for(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    data = gather([sweep, sweep / "points" / "p1"])
    (method,) = data.methods
    assert method.value("helpfulness") == 0.11
    assert len(data.experiments) == 1
    assert gather([sweep / "points" / "p1" / "scores"]).experiments == []


def test_an_experiment_in_progress_says_how_far_it_is(tmp_path: Path) -> None:
    run = write_sweep(tmp_path / "sweep")
    (run / "tradeoff.json").unlink()
    for folder, status in ((run, "running"), (run / "points" / "p2" / "scores", "running")):
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "status": status}))
    data = gather([run])
    assert headline(data).sentence == "This sweep is running: 2 of the 3 runs in it so far have ended."
    assert [one.stage for one in data.runs] == ["sweep", "evaluate", "evaluate", "evaluate"]
    assert "This sweep is running" in render_html(data)


def test_models_between_two_are_listed_with_their_weights(tmp_path: Path) -> None:
    rows = [{"weight": weight, "model": f"runs/dial/models/weight-{weight:g}"} for weight in (0.0, 0.5)]
    content = {"first": "runs/a/model", "second": "runs/b/model", "models": rows}
    data = gather([write_run(tmp_path / "dial", "interpolate", models__json=content)])
    assert headline(data).sentence.startswith("2 models interpolated between two; evaluate them by bfpo sweep")
    page = render_html(data)
    for words in ("weight 0.5", "runs/dial/models/weight-0.5", "runs/a/model", "runs/b/model"):
        assert words in page


def test_damaged_or_hostile_files_change_nothing_but_words(tmp_path: Path) -> None:
    run = write_sweep(tmp_path / "hostile", (HOSTILE, "b", "c"))
    page = render_html(gather([run]))
    assert "<script>document" not in page
    assert "\x1b" not in page
    assert page.count("<script") == 1  # the page's own; there are no answers
    for name, stage in (("tradeoff", "sweep"), ("comparison", "compare"), ("models", "interpolate")):
        for text in (
            "[1]",
            '{"points": 3, "methods": {"a": 1}, "models": "x", "pareto_front": 4, "confidence": "x"}',
            "{",
        ):
            folder = write_run(tmp_path / stage, stage, {"objectives": 3, "seed": "x", "grid": []})
            (folder / f"{name}.json").write_text(text)
            data = gather([folder])
            assert not data.experiments[0].measured
            assert "holds no result" in headline(data).sentence
            render_html(data)
            render_markdown(data)


def test_the_same_experiment_gives_the_same_bytes(tmp_path: Path) -> None:
    runs = [write_sweep(tmp_path / "sweep"), write_compare(tmp_path / "cmp")]
    for name in ("a", "b"):
        result = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(tmp_path / name / "page.html")])
        assert result.exit_code == 0, result.output
    written = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert "tradeoff-0.png" in {path.name for path in written}
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_a_comparison_over_worlds_is_a_table_beside_the_comparison_of_each(tmp_path: Path) -> None:
    root = tmp_path / "grid"

    def method(name: str, title: str, value: float, fire: float) -> dict[str, Any]:
        parts = {name: {"value": one, "low": 0.0, "high": 1.0} for name, one in (("fire", fire), ("water", value))}
        score = {"metric": "helpful_and_safe", "value": value, "low": 0.1, "high": 0.9, "by_category": parts}
        about = {"name": name, "title": title, "trainings": 1, "setting": {}}
        return {**about, "score": score, "seed_values": [value, value - 0.02]}

    worlds = [
        {
            "name": name,
            "noise": noise,
            "best": "ipo",
            "not_told_from_best": alike,
            "methods": [method("bfpo", "BFPO", 0.6, 0.2), method("ipo", "IPO|x", 0.7, 0.3)],
        }
        for name, noise, alike in (("plain", 0.0, ["bfpo"]), ("noisy", 0.1, []))
    ]
    content = {"confidence": 0.95, "metric": "helpful_and_safe", "worlds": worlds}
    write_run(root, "compare", {"worlds": {"plain": {}, "noisy": {"safety_flips": 0.1}}}, worlds__json=content)
    for world in ("plain", "noisy"):
        write_compare(root / "worlds" / world)
    data = gather([root])
    assert [experiment.run.split("/")[-1] for experiment in data.experiments] == ["noisy", "plain"]
    (stage,) = data.stages
    assert stage.lines == [
        "plain: IPO|x is highest, not distinguishable from BFPO.",
        "noisy: IPO|x is highest.",
    ]
    (table,) = stage.tables
    assert table.columns == ["method", "plain", "noisy"]
    words = "60.0% (10.0% to 90.0%); worst category fire 20.0%, spread 40.0; spread of seeds 2.0"
    assert table.rows[0] == ["BFPO", words, words]
    write_report(data, tmp_path / "page")
    text = (tmp_path / "page" / "report.md").read_text()
    assert "spread of seeds 2.0" in text
    assert "IPO|x" not in text.replace("IPO\\|x", "")
