"""Keys of a judge or ranker that is named in its short form: each applies, in whatever order it is given."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import EvaluateConfig, LabelConfig, RedteamConfig, load_config
from bfpo.core.errors import ConfigError
from bfpo.core.schema import Completion
from bfpo.judges.judges import make_judge
from bfpo.judges.ngrams import NgramSettings, fit_ngrams
from bfpo.judges.settings import TrainedSpec
from messages import fails, raises
from tiny import tiny_model, tiny_tokenizer

ROW = {"id": "a", "prompt": "q", "completion": "w1", "text": "w1", "is_safe": True}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A judge of n-grams in `judge`, a guard in `guard.yaml`, one row in `rows.jsonl`, a prompt in `prompts.txt`."""
    monkeypatch.chdir(tmp_path)
    rows = [Completion(str(n), (), text) for n, text in enumerate(("w1 w2", "w8 w9"))]
    (tmp_path / "judge").mkdir()
    fit_ngrams(rows, [True, False], NgramSettings()).save(tmp_path / "judge", {})
    (tmp_path / "guard.yaml").write_text("format: qwen3guard\ncontroversial: safe\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "prompts.txt").write_text("q\n")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_model().config.save_pretrained(tmp_path / "model")
    return tmp_path


COMMANDS: dict[str, tuple[list[str], list[str], str]] = {
    "judge-check": (["--data", "rows.jsonl"], ["--judge", "{}"], "judge"),
    "evaluate": (["--set", "completions=rows.jsonl"], ["--set", "judge={}"], "judge"),
    "label": (["--set", "completions=rows.jsonl"], ["--set", "judges={}"], "judges[0]"),
    "redteam": (
        ["--model", "model", "--prompts", "prompts.txt", "--ranker", "oracle", "--set", "num_completions=2"],
        ["--judge", "{}"],
        "judges[0]",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("named", "key", "value"),
    [("judge", "threshold", 0.25), ("guard.yaml", "batch_size", 3), ("qwen3guard:model", "dtype", "bfloat16")],
)
def test_a_key_of_a_named_judge_applies(folder: Path, command: str, named: str, key: str, value: Any) -> None:
    others, judge, place = COMMANDS[command]
    judge = [part.format(named) for part in judge]
    for given in ([*judge, "--set", f"{place}.{key}={value}"], ["--set", f"{place}.{key}={value}", *judge]):
        result = CliRunner().invoke(app, [command, *others, *given, "--dry-run"])
        assert result.exit_code == 0, result.output
        config = yaml.safe_load(result.output.split("\n\n")[0])
        found = config["judges"][0] if "judges" in config else config["judge"]
        assert found[key] == value
        assert found["format"] == {"judge": "trained"}.get(named, "qwen3guard")
        assert found.get("controversial") == ("safe" if named == "guard.yaml" else None)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_key_that_a_named_judge_does_not_have_is_refused(folder: Path, command: str) -> None:
    others, judge, place = COMMANDS[command]
    given = [*(part.format("judge") for part in judge), "--set", f"{place}.controversial=safe"]
    result = CliRunner().invoke(app, [command, *others, *given, "--dry-run"])
    fails(result, "controversial", "trained")


def test_of_a_single_judge_the_number_can_be_left_out() -> None:
    for settings in permutations(["completions=c.jsonl", "judges=qwen3guard:m", "judges.batch_size=3"]):
        [judge] = load_config(LabelConfig, None, settings).judges
        assert (judge.source, judge.model_dump()["batch_size"]) == ("m", 3)
    with raises(ConfigError, "judges.batch_size"):
        load_config(LabelConfig, None, ["completions=c.jsonl", "judges=[oracle, qwen3guard]", "judges.batch_size=3"])


def test_keys_apply_to_a_ranker_and_to_a_judge_of_suites_and_of_a_file(tmp_path: Path) -> None:
    redteam = ["model=m", "prompts=p.txt", "judges=oracle", "ranker.batch_size=5", "ranker=reward-model:r"]
    ranker = load_config(RedteamConfig, None, redteam).ranker
    assert (ranker.source, ranker.model_dump()["batch_size"]) == ("r", 5)
    suites = ["suites.use=demo", "model=m", "suites.judges.harm.batch_size=5", "suites.judges.harm=qwen3guard:g"]
    harm = load_config(EvaluateConfig, None, suites).suites.judges["harm"]  # type: ignore[attr-defined]
    assert (harm.source, harm.batch_size) == ("g", 5)
    (tmp_path / "c.yaml").write_text("completions: c.jsonl\njudge: qwen3guard:g\n")
    judge = load_config(EvaluateConfig, tmp_path / "c.yaml", ["judge.batch_size=5"]).judge  # type: ignore[attr-defined]
    assert (judge.source, judge.batch_size) == ("g", 5)
    (tmp_path / "c.yaml").write_text("completions: c.jsonl\njudge: {format: qwen3guard, model: g, batch_size: 5}\n")
    judge = load_config(EvaluateConfig, tmp_path / "c.yaml", ["judge=qwen3guard:h"]).judge  # type: ignore[attr-defined]
    assert (judge.source, judge.batch_size) == ("h", None)  # another judge, which the file's keys are not about


@pytest.mark.parametrize("named", ["missing.yaml", "3", "[oracle]"])
def test_a_judge_that_cannot_be_named_so_is_an_error(named: str) -> None:
    with raises(ConfigError, "judge"):
        load_config(EvaluateConfig, None, ["completions=c.jsonl", f"judge={named}", "judge.batch_size=3"])


def test_the_threshold_of_a_trained_judge_can_be_changed(folder: Path) -> None:
    texts = [Completion("a", (), "w1 w9")]
    plain = make_judge(TrainedSpec(model="judge"))
    [verdict] = plain.judge(texts)
    assert verdict.p_safe is not None
    low, high = (make_judge(TrainedSpec(model="judge", threshold=verdict.p_safe + by)) for by in (-0.01, 0.01))
    assert [low.judge(texts)[0].label, high.judge(texts)[0].label] == ["safe", "unsafe"]
    assert len({plain.version, low.version, high.version}) == 3
