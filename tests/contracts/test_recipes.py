"""Every recipe and example config is one that its stage takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bfpo.config import EvaluateConfig, GateConfig, RedteamConfig, load_config
from bfpo.runs.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {"accelerate", "cluster"}  # those have tests of their own
OURS = [path for path in ROOT.glob("recipes/**/*.yaml") if path.parent.name not in NOT_OURS]
# Files named for what they make or are about, in folders that are not named after their stage either.
STAGE_OF = {
    "data": "prepare",
    "ranker": "judge-train",
    "probe": "judge-train",
    "gptfuzz": "judge-check",
    "xstest": "judge-check",
}
CONFIGS = sorted([*OURS, *ROOT.glob("examples/**/*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_loads(path):
    names = (path.stem, *reversed(path.relative_to(ROOT).parts[:-1]))
    stage = STAGE_OF.get(path.stem) or next(name for name in names if name in STAGES or name == "gate")
    assert load_config(GateConfig if stage == "gate" else STAGES[stage].config_class(), path, [])


def test_there_are_recipes():
    assert ROOT / "recipes" / "mistral-7b" / "train.yaml" in CONFIGS
    assert ROOT / "recipes" / "mistral-7b" / "data.yaml" in CONFIGS


def test_the_red_team_round_of_the_real_model_asks_its_last_model_training_prompts_alone():
    folder = ROOT / "recipes" / "smollm2-135m"
    config = load_config(RedteamConfig, folder / "redteam.yaml", [])
    models = load_config(EvaluateConfig, folder / "evaluate.yaml", []).models
    assert (config.start, config.model) == (models[0].model, models[-1].model)
    assert config.harmless is not None
    asked = {Path(file).name for file in (config.prompts, config.harmless)}
    run = (folder / "run.sh").read_text()
    assert all(f"$OUT/prompts/{name}" in run.replace("${round}", "2") for name in asked)  # what its rounds ask, too
    assert not any(name.startswith(("dev", "report")) for name in asked)
