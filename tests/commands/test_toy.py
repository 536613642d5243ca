"""The `toy` stage: what it writes, and that its words follow its numbers."""

from __future__ import annotations

import json

import pytest
import torch

from bfpo.commands.toy import preview, render_table, summarise
from bfpo.config import ToyConfig
from bfpo.objective.tabular_training import TabularRun, all_assignments, train_tabular
from bfpo.runs.stages import run_stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run of the stage at the paper's settings."""
    return run_stage("toy", ToyConfig(), tmp_path_factory.mktemp("toy") / "run")


def test_the_report_holds_the_bounds(folder):
    report = json.loads((folder.path / "toy.json").read_text())
    assert report["settings"] == {
        "steps": 1800, "learning_rate": 0.01, "batch_size": 32, "beta": 1.0, "alpha": 0.5, "seed": 0,
    }  # fmt: skip
    methods = {method["name"]: method for method in report["methods"]}
    assert methods["bfpo"]["num_right"] == 16
    assert methods["bfpo"]["max_deviation"] < 0.03
    assert {name: method["num_right"] for name, method in methods.items() if name != "bfpo"} == {
        "bfpo_alpha_0": 4, "dpo": 2, "ipo": 2, "linear_sum": 5, "bfpo_one_sided": 16, "bfpo_logistic": 16,
    }  # fmt: skip
    for method in methods.values():
        assert len(method["assignments"]) == 16
        for outcome in method["assignments"]:
            assert sum(outcome["final"]) == pytest.approx(1)
            assert (outcome["closed_form"] is None) == (method["name"] in ("dpo", "bfpo_one_sided", "bfpo_logistic"))


def test_the_table_says_what_the_numbers_say(folder):
    text = (folder.path / "toy.md").read_text()
    assert "| BFPO | both factors | 16 of 16 | 0 | 0.0" in text
    assert "| DPO | helpfulness order only | 2 of 16 | 0 | no closed form |" in text
    assert "steps 1800, learning_rate 0.01, batch_size 32, beta 1.0, alpha 0.5, seed 0" in text
    assert "| 1010 | y1 > y3 > y4 > y2 |" in text


def test_the_figures_are_pictures(folder):
    assert (folder.path / "toy.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = (folder.path / "toy.svg").read_text()
    assert "</svg>" in svg
    assert "BFPO gets the order right in 16 of 16 worlds" in svg


def _run_ending_at(final: list[float]) -> TabularRun:
    probabilities = torch.tensor(final, dtype=torch.float64).expand(1, 1, 16, 4).contiguous()
    return TabularRun(("bfpo",), all_assignments(), probabilities, torch.tensor([0]), probabilities[None])


def test_a_small_drop_is_a_tie_and_a_tie_is_not_right():
    # All safe wants y1 > y2 > y3 > y4; the first step here is 0.11 nats, just under the threshold.
    report = summarise(_run_ending_at([0.38, 0.34, 0.17, 0.11]), beta=1.0, alpha=0.5)
    outcome = report["methods"][0]["assignments"][0]
    assert outcome["safe"] == "1111"
    assert outcome["order"] == "tie"
    assert report["methods"][0]["num_right"] == 0
    right = summarise(_run_ending_at([0.39, 0.33, 0.17, 0.11]), beta=1.0, alpha=0.5)
    assert right["methods"][0]["assignments"][0]["order"] == "right"
    wrong = summarise(_run_ending_at([0.33, 0.39, 0.17, 0.11]), beta=1.0, alpha=0.5)
    assert wrong["methods"][0]["assignments"][0]["order"] == "wrong"


def test_the_threshold_follows_beta():
    report = summarise(_run_ending_at([0.39, 0.33, 0.17, 0.11]), beta=0.5, alpha=0.5)
    assert report["order_threshold_nats"] == 0.25
    assert report["methods"][0]["assignments"][0]["order"] == "tie"


def test_a_run_too_short_to_learn_is_shown_as_it_is():
    trained = train_tabular(all_assignments(), steps=2)
    report = summarise(trained, beta=1.0, alpha=0.5)
    assert all(method["num_right"] == 0 for method in report["methods"])
    assert report["methods"][0]["max_deviation"] > 0.03
    assert "0 of 16" in render_table(report, {"steps": 2})


def test_label_noise_is_in_the_result_and_scales_what_counts_as_a_drop(tmp_path):
    folder = run_stage("toy", ToyConfig(steps=40, label_noise=0.2), tmp_path / "toy")
    report = json.loads((folder.path / "toy.json").read_text())
    assert report["settings"]["label_noise"] == 0.2
    assert report["order_threshold_nats"] == pytest.approx(0.125 * 0.6)
    bfpo = next(method for method in report["methods"] if method["name"] == "bfpo")
    mixed = next(one for one in bfpo["assignments"] if one["safe"] == "1010")
    assert mixed["closed_form"] == pytest.approx([0.347, 0.164, 0.299, 0.190], abs=1e-3)


def test_preview_says_what_would_run():
    assert preview(ToyConfig(steps=5)) == [
        "trains 7 methods (bfpo, bfpo_alpha_0, dpo, ipo, linear_sum, bfpo_one_sided, bfpo_logistic) on 16 assignments "
        "of safety to 4 actions",
        "112 policies of 4 parameters, 5 steps of 32 pairs",
    ]
