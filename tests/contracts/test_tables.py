"""Tables that name the same things in two places agree, and no setting is accepted and not read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

import bfpo
import bfpo.config
from bfpo.config import AlignConfig, ChatConfig, EvaluateConfig, GateConfig, MethodSettings, SftConfig
from bfpo.config.describe import describe_keys
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.objective.methods import METHODS, method_settings
from bfpo.runs.stages import STAGES
from messages import raises

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(bfpo.__file__).parent


def choices(config, key: str) -> tuple[str, ...]:
    return get_args(config.model_fields[key].annotation)


def test_the_config_offers_every_method_and_every_setting():
    assert choices(MethodSettings, "method") == tuple(METHODS)
    keys = list(MethodSettings.model_fields)
    assert keys == ["method", *method_settings(), "reduction"]
    for name, setting in method_settings().items():
        assert MethodSettings.model_fields[name].default == setting.default
        assert MethodSettings.model_fields[name].description == setting.description


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_config_has_the_settings_of_its_method_alone(method):
    config = MethodSettings(method=method)
    assert config.resolved().keys() == {"method", "reduction", *METHODS[method].settings()}
    assert config.method_object() == METHODS[method]()
    foreign = method_settings().keys() - METHODS[method].settings().keys()
    for name in sorted(foreign):
        with raises(ValueError, name, method):
            MethodSettings(method=method, **{name: method_settings()[name].default})


def test_the_config_offers_every_layout():
    pairs = "bfpo, trl, pku, hh, redteam, helpsteer2, helpsteer3, sharegpt, messages, alpaca_pairs"
    completions = "completions, alpaca, conversations, beavertails, wildguardmix"
    keys = {key.name: key.allowed for key in describe_keys(AlignConfig)}
    assert keys["data.layout"] == keys["buffer.layout"] == f"auto, {pairs}, unpaired"
    assert {key.name: key.allowed for key in describe_keys(SftConfig)}["data.layout"] == f"auto, {completions}, {pairs}"
    assert (PAIR_LAYOUTS.names, COMPLETION_LAYOUTS.names) == (tuple(pairs.split(", ")), tuple(completions.split(", ")))
    assert not PAIR_LAYOUTS.keys() & COMPLETION_LAYOUTS.keys()


def test_evaluation_knows_which_half_reads_a_key():
    pairs_only = EvaluateConfig(model="m", reference="r", data={"files": "a"}).resolved().keys()
    completions_only = EvaluateConfig(completions="c").resolved().keys()
    suites_alone = EvaluateConfig(suites={"use": "demo"}, models=[{"name": "m", "model": "m"}]).resolved().keys()
    foreign = method_settings().keys() - METHODS["bfpo"].settings().keys()
    assert pairs_only | completions_only | suites_alone == EvaluateConfig.every_field().keys() - foreign
    assert not suites_alone & {"completions", "judge", "model", "data", "method", "max_length"}
    assert pairs_only & completions_only == {"confidence", "bootstrap_samples", "seed", "threads"}


CONFIGS = {name: stage.config_class() for name, stage in STAGES.items()} | {"gate": GateConfig, "chat": ChatConfig}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_setting_is_named_where_settings_are_read(config):
    read = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "settings.py")
    sources = [PACKAGE / path for path in read if "config" not in path.parts]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in sources)))
    whole = ("lora.", "model.")  # sections that are handed on as they are
    keys = [key for key in describe_keys(config) if not key.name.startswith(whole)]
    assert [key.name for key in keys if key.name.rpartition(".")[2] not in words] == []


def test_defaults_of_train_hold_together():
    config = AlignConfig(model="m", data={"files": "a"})
    assert config.max_tokens_per_microbatch >= config.max_length


NOT_OURS = {"accelerate", "cluster"}  # those have tests of their own
OURS = [path for path in ROOT.glob("recipes/**/*.yaml") if path.parent.name not in NOT_OURS]
RECIPES = sorted([*OURS, *ROOT.glob("examples/**/*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(ROOT)) for path in RECIPES])
def test_every_recipe_is_the_config_of_a_stage(path):
    def loads(config) -> bool:
        try:
            bfpo.config.load_config(config, path)
        except bfpo.BfpoError:
            return False
        return True

    assert any(loads(config) for config in CONFIGS.values()), (
        f"{path} fits no command; run it with --dry-run to see why"
    )


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Zhang", "Torr", "Elhoseiny", "Bibi"]
    assert paper["year"] == 2025
    assert paper["identifiers"][0]["value"] == "arXiv:2408.15313"


def test_every_beta_says_what_it_asks_for() -> None:
    """Each beta of a recipe, an example or the README names its nats per answer, 1 / beta, on its line."""
    files = [*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("examples/**/*.yaml"), ROOT / "README.md"]
    found = 0
    for file in files:
        for line in file.read_text().splitlines():
            if beta := re.search(r"\bbeta(?:: |=)([\d.]+)", line):
                found += 1
                assert re.search(rf"\b{1 / float(beta[1]):g} nats\b", line), f"{file.name}: {line}"
    assert found >= 9
