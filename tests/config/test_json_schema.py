"""The JSON Schema of configs: whole, and in agreement with what the configs take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import describe_keys
from bfpo.config.json_schema import json_schema
from bfpo.core.yaml_text import parse_yaml
from bfpo.runs.stages import STAGES

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])
NAMES = {name: stage.config_class() for name, stage in STAGES.items()}


def commands_of(file: Path) -> set[str]:
    """The commands that a file is for: by the command in its first comment, or by its name."""
    named = re.findall(rf"bfpo ([a-z-]+) --config \S*{file.name}", file.read_text(encoding="utf-8"))
    return {name for name in (*named, file.stem.partition("_")[0]) if name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_has_every_key_and_its_meaning(name: str) -> None:
    schema = json_schema(NAMES[name])
    jsonschema.Draft202012Validator.check_schema(schema)
    for key in describe_keys(NAMES[name]):
        places = [schema]
        for part in key.name.replace("[]", "").split("."):
            places = [place["properties"][part] for place in places if part in place.get("properties", {})]
            assert places, key.name
            if key.name.endswith(part) and "." not in key.name:
                assert places[0].get("description")
            places = [form for place in places for form in sections(place, schema)]


def sections(place: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema itself and the sections that it refers to, also as items of lists."""
    forms = [place, *place.get("anyOf", [])]
    forms += [form["items"] for form in forms if "items" in form]
    forms += [deeper for form in forms for deeper in form.get("anyOf", [])]
    return [schema["$defs"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form for form in forms]


def test_the_configs_of_the_repository_fit() -> None:
    checked = set()
    for file in FILES:
        for name in commands_of(file):
            value, _ = parse_yaml(file.read_text(encoding="utf-8"))
            error = jsonschema.exceptions.best_match(
                jsonschema.Draft202012Validator(json_schema(NAMES[name])).iter_errors(value)
            )
            assert error is None, f"{file}: {list(error.path)}: {error.message}"
            checked.add(name)
    assert {"train", "sft", "evaluate", "prepare", "compare", "clean"} <= checked


@pytest.mark.parametrize(
    ("name", "text", "fits"),
    [
        ("train", "model: m\ndata: {files: a.jsonl}\nbeta: 0.1", True),
        ("train", "model: m\ndata: {files: [a.jsonl, b.jsonl]}\nbuffer: null", True),
        ("train", "betta: 0.1", False),
        ("train", "beta: high", False),
        ("train", "beta: -1", False),
        ("train", "method: dpo_safe_last", False),
        ("train", "data: {layout: csv}", False),
        ("label", "judges: oracle", True),
        ("label", "judges: [oracle, {format: harmbench}]", True),
        ("sweep", "grid: beta=0.05,0.1", True),
        ("sweep", "grid: {beta: [0.05, 0.1]}", True),
    ],
)
def test_what_fits(name: str, text: str, fits: bool) -> None:
    assert jsonschema.Draft202012Validator(json_schema(NAMES[name])).is_valid(parse_yaml(text)[0]) == fits


@pytest.mark.parametrize("command", ["train", "gate", "chat"])
def test_the_command_line_writes_the_schema_alone(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--schema"] if command != "chat" else [command, "m", "--schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["type"] == "object"
