"""What others build on: the public names, their signatures, and that importing them costs nothing."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest

import bfpo
import bfpo.config
from bfpo.config import StageConfig
from bfpo.objective.methods import method_settings
from bfpo.runs.stages import STAGES

PARAMETERS = {
    "preference_loss": ("margin, chosen_is_safe, rejected_is_safe, method, other_margin, beside, settings"),
    "bfpo_target": "chosen_is_safe, rejected_is_safe, alpha, safety_weight",
    "anchor": "favoured, mean_nll_chosen, mean_nll_rejected, chosen_is_safe, rejected_is_safe",
    "read_pairs": "files, layout, columns, source, labels, check",
    "load_config": "cls, path, overrides",
    "run_stage": "name, config, out, resume",
    "Pair": "id, prompt, chosen, rejected, chosen_is_safe, rejected_is_safe, source, tools, chosen_extra, "
    "rejected_extra, chosen_finished, rejected_finished, category, unpaired",
    "Message": "role, content, extra",
    "Prompt": "id, messages, kind, tools, category",
    "Completion": "id, prompt, text, model, kind, finished, is_safe, reasoning, blocked, tools, extra, category",
}


def test_every_public_name_is_there():
    for name in bfpo.__all__:
        assert getattr(bfpo, name) is not None
    assert set(bfpo.__all__) <= set(dir(bfpo))


@pytest.mark.parametrize("package", [bfpo, bfpo.config], ids=lambda package: package.__name__)
def test_names_for_the_type_checker_are_the_names_at_run_time(package):
    for home, names in package._HOMES.items():
        module = import_module(home)
        for name in names:
            assert getattr(package, name) is getattr(module, name)
            assert name in module.__all__, f"{home}.{name}"
    names = {name for names in package._HOMES.values() for name in names}
    assert names == set(package.__all__) - {"__version__"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_signatures_change_only_on_purpose(name):
    assert ", ".join(inspect.signature(getattr(bfpo, name)).parameters) == PARAMETERS[name]


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="has no attribute 'prefrence_loss'"):
        bfpo.prefrence_loss  # noqa: B018


def test_the_light_modules_import_neither_torch_nor_transformers():
    code = (
        "import sys, json\nimport bfpo, bfpo.cli, bfpo.runs.stages, bfpo.config\n"
        "import bfpo.runs.folder, bfpo.core.schema, bfpo.core.errors\n"
        "bfpo.Pair, bfpo.load_config, bfpo.run_stage\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'numpy', 'pyarrow') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == []


def test_every_error_is_ours_and_the_standard_type_it_stands_for():
    from bfpo.core import errors

    assert issubclass(errors.StopRequest, KeyboardInterrupt)  # no error
    kinds = [getattr(errors, name) for name in errors.__all__ if name not in ("BfpoError", "StopRequest", "first_line")]
    for kind in kinds:
        assert issubclass(kind, errors.BfpoError)
        assert issubclass(kind, (ValueError, RuntimeError, ImportError))
        assert kind.exit_code in (1, 2)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_stage_of_the_table_can_run_and_preview(stage):
    assert issubclass(stage.config_class(), StageConfig)
    assert list(inspect.signature(stage.run()).parameters) == ["config", "folder"]
    assert list(inspect.signature(stage.preview()).parameters) == ["config"]


def test_the_trainer_takes_every_setting_of_the_methods():
    assert {field.name for field in fields(bfpo.BFPOConfig)} >= {"method", "reduction", *method_settings()}
