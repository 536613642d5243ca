"""A dry-run finds what is missing as the run would, before anything is loaded or asked, and speaks of itself alone."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import load_config
from bfpo.core.errors import BfpoError
from bfpo.policy.save import save_policy
from bfpo.runs.stages import STAGES, keep_quiet, preview_stage, run_stage
from messages import raises
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dry")
    save_policy(tiny_model(), tiny_tokenizer(), root / "model")
    (root / "prompts.txt").write_text("w1 w2\nw3\n")
    row = {"id": "a", "prompt": "w1", "completion": "w2", "text": "w2", "is_safe": True, "kind": "benign"}
    (root / "answers.jsonl").write_text(json.dumps(row) + "\n")
    (root / "judge" / "model").mkdir(parents=True)
    (root / "judge" / "model" / "judge.json").write_text("{}")
    return root


@pytest.fixture(autouse=True)
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)


GENERATE = ["model=./model", "prompts=prompts.txt"]
REDTEAM = [*GENERATE, "judges=oracle", "ranker=oracle"]
LABEL = ["completions=answers.jsonl", "judges=oracle"]
CHECK = ["data.files=answers.jsonl", "judge=oracle"]
SUITES = ["suites.use=demo", "models=[{name: a, model: ./model}]"]
COMPLETIONS = ["completions=answers.jsonl"]


@pytest.mark.parametrize(
    ("stage", "settings", "key"),
    [
        ("generate", [*GENERATE, "model=./modle"], "model"),
        ("generate", [*GENERATE, "prompts=absent.txt"], "absent.txt"),
        ("generate", [*GENERATE, "chat_template=absent.jinja"], "chat_template"),
        ("redteam", [*REDTEAM, "model=a/b/c"], "model"),
        ("redteam", [*REDTEAM, "prompts=absent.txt"], "absent.txt"),
        ("redteam", [*REDTEAM, "judges=./absent"], "judge"),
        ("redteam", [*REDTEAM, "ranker=pairwise:./absent"], "ranker.model"),
        ("label", [*LABEL, "judges=[oracle, judge]"], "judge"),
        ("label", [*LABEL, "judges=[oracle, 'llama-guard-3:./absent']"], "judges[1].model"),
        ("label", [*LABEL, "ranker=./absent"], "ranker"),
        ("label", [*LABEL, "completions=absent.jsonl"], "absent.jsonl"),
        ("judge-check", [*CHECK, "judge=./absent"], "judge"),
        ("judge-check", [*CHECK, "data.files=absent.jsonl"], "absent.jsonl"),
        ("evaluate", [*SUITES, "models[0].model=./absent"], "models[0].model"),
        ("evaluate", [*SUITES, "suites.judges.harm=./absent"], "judge"),
        (
            "evaluate",
            [*SUITES, "suites.ranker=reward-model:./absent", "suites.baseline=a"],
            "suites.ranker.model",
        ),
        ("evaluate", [*SUITES, "suites.reuse=absent"], "suites.reuse"),
        ("evaluate", [*COMPLETIONS, "judge=shieldgemma:./absent"], "judge.model"),
        ("evaluate", [*COMPLETIONS, "judge={format: shieldgemma, policy: no.txt}"], "judge.policy"),
    ],
)
def test_what_is_missing_is_an_error_of_the_dry_run_as_of_the_run(
    stage: str, settings: list[str], key: str, tmp_path: Path
) -> None:
    config = load_config(STAGES[stage].config_class(), None, settings)
    for start in (lambda: preview_stage(stage, config), lambda: run_stage(stage, config, tmp_path / "run")):
        with raises(BfpoError, key) as error:
            start()
        assert error.value.exit_code == 2


def test_what_a_server_calls_its_model_is_no_folder() -> None:
    settings = ["model=a/b/c", "prompts=prompts.txt", "engine=server", "url=http://localhost:9/v1"]
    shown = preview_stage("generate", load_config(STAGES["generate"].config_class(), None, settings))
    assert "requests go to a/b/c" in shown


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("generate", GENERATE), ("redteam", REDTEAM), ("label", LABEL), ("evaluate", SUITES), ("evaluate", COMPLETIONS)],
)
def test_stages_that_do_not_train_do_not_speak_of_it(stage: str, settings: list[str]) -> None:
    given = [part for setting in settings for part in ("--set", setting)]
    shown: Any = CliRunner().invoke(app, [stage, *given, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "parameter" not in shown.output


def test_a_warning_of_bitsandbytes_about_a_kernel_that_is_not_used_is_not_shown() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    logger.setLevel(logging.NOTSET)
    try:
        keep_quiet()
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
        assert logging.getLogger("bitsandbytes").level == logging.NOTSET
    finally:
        logger.setLevel(before)
    spec = find_spec("bitsandbytes")  # the name is that of the module which warns
    if spec is not None and spec.origin is not None:
        assert (Path(spec.origin).parent / "backends" / "cpu" / "ops.py").is_file()
