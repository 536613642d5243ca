"""examples/evaluate/offline.yaml on the real files and the real model, a few prompts of each suite."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bfpo.config import EvaluateConfig, load_config
from bfpo.core.schema import Completion, Message, Pair
from bfpo.judges.ngrams import NgramSettings, fit_ngrams, fit_ranker
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.suites.catalogue import known_suites

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "evaluate" / "offline.yaml"


@pytest.fixture
def settings(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what the example needs of earlier runs: another model, a judge and a ranker."""
    monkeypatch.chdir(ROOT)  # the config names ../shared/data
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    base = shared_data / "model_stories260K" / "hf"
    shutil.copytree(base, tmp_path / "sft")
    pairs = [Pair(str(n), (Message("user", "q"),), f"she said {n}", f"he was {n} sad") for n in range(20)]
    fit_ranker(pairs, NgramSettings(), name="small").save(tmp_path / "ranker", {})
    rows = [Completion(pair.id, pair.prompt, text, "") for pair in pairs for text in (pair.chosen, pair.rejected)]
    fit_ngrams(rows, [True, False] * 20, NgramSettings(), name="small").save(tmp_path / "judge", {})
    return [
        f"models=[{{name: base, model: {base}}}, {{name: sft, model: {tmp_path / 'sft'}}}]",
        f"suites.judges={{harm: {tmp_path / 'judge'}}}",
        f"suites.ranker={tmp_path / 'ranker'}",
        f"suites.label_cache={tmp_path / 'cache'}",
        "suites.limit=2",
        "suites.max_new_tokens=8",
        "bootstrap_samples=20",
    ]


def test_every_suite_of_the_example_has_a_local_file(settings: list[str]) -> None:
    lines = preview_stage("evaluate", load_config(EvaluateConfig, EXAMPLE, settings)).splitlines()
    suites = [line for line in map(str.strip, lines) if line.partition(":")[0] in known_suites()]
    assert len(suites) == 11
    assert [line for line in suites if "; from " not in line or "from the hub" in line] == []


@pytest.mark.slow
def test_every_suite_of_the_example_is_scored(settings: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("langdetect")
    config: Any = load_config(EvaluateConfig, EXAMPLE, settings)
    run_stage("evaluate", config, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert {suite["name"]: suite["reason"] for suite in found["suites"]} == dict.fromkeys(config.suites.use)
    values = {(s["suite"], s["model"]) for s in found["scores"] if s["value"] is not None}
    assert {suite for suite, _ in values} >= {"bbq", "ifeval", "mt-bench", "truthfulqa-best", "xstest"}
    (win,) = [s for s in found["scores"] if s["metric"] == "winrate[small]"]
    assert win["value"] == 0.5  # the same model under two names
