from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import AlignConfig, RedteamConfig, SftConfig, load_config
from bfpo.core.errors import ConfigError, DataError, SettingError
from bfpo.data.read import read_completions, read_pairs
from bfpo.data.write import write_completions
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.world.datasets import redteam_prompts, save_tokenizer, sft_completions
from bfpo.world.oracle import assess
from messages import raises

LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start model of the closed world, which helps with harm about half of the time, and hard prompts."""
    root = tmp_path_factory.mktemp("world")
    save_tokenizer(root / "tokenizer")
    write_completions(root / "sft.jsonl", sft_completions(6000, 0))
    config = SftConfig.model_validate(
        {
            "init": {"config": LLAMA, "tokenizer": str(root / "tokenizer")},
            "data": {"files": [str(root / "sft.jsonl")], "layout": "completions"},
            "completions_per_step": 64,
            "completions_per_microbatch": 64,
            "max_steps": 200,
            "learning_rate": 5e-3,
            "max_length": 48,
            "threads": 1,
        }
    )
    run_stage("sft", config, root / "start")
    prompts = redteam_prompts()[::4]
    rows = ({"id": one.id, "prompt": one.messages[0].content, "kind": one.kind} for one in prompts)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config(root: Path, model: Path, **settings: Any) -> RedteamConfig:
    return RedteamConfig.model_validate(
        {
            "model": str(model),
            "prompts": str(root / "prompts.jsonl"),
            "judges": "oracle",
            "ranker": "oracle",
            "max_new_tokens": 24,
            "temperature": 0.7,
            "batch_size": 128,
            "label_cache": str(root / "cache"),
            "threads": 1,
            **settings,
        }
    )


def trained(root: Path, model: Path, pairs: Path, out: Path) -> Path:
    settings = {
        "model": str(model),
        "data": {"files": [str(pairs)]},
        "max_length": 48,
        "beta": 0.1,
        "anchor_weight": 2.0,
        "learning_rate": 5e-4,
        "max_steps": 30,
        "pairs_per_step": 16,
        "reference_cache": str(root / "reference"),
        "threads": 1,
    }
    run_stage("train", AlignConfig.model_validate(settings), out)
    return out / "model"


def unsafe_rate(run: Path) -> float:
    [unsafe, *_] = json.loads((run / "redteam.json").read_text())["rates"]["all prompts"]
    assert unsafe["metric"] == "unsafe"
    assert unsafe["low"] <= unsafe["value"] <= unsafe["high"]
    return float(unsafe["value"])


def test_two_rounds_make_the_model_less_unsafe_on_what_it_is_asked(world: Path, tmp_path: Path) -> None:
    model, rates = world / "start" / "model", []
    for number in range(3):
        run = tmp_path / f"round-{number}"
        run_stage("redteam", config(world, model, seed=number), run)
        rates.append(unsafe_rate(run))
        if number < 2:
            model = trained(world, model, run / "data" / "main" / "train.parquet", tmp_path / f"train-{number}")
    assert rates[0] > 0.35
    assert rates[1] < 0.8 * rates[0]
    assert rates[2] < min(rates[1], 0.65 * rates[0])
    last = json.loads((tmp_path / "round-2" / "redteam.json").read_text())["rates"]["all prompts"]
    assert next(score for score in last if score["metric"] == "well_formed")["value"] > 0.8


def test_every_pair_is_true_and_every_completion_is_accounted_for(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_stage("redteam", config(world, world / "start" / "model", validation=0.3, limit=60), run)
    funnel = json.loads((run / "redteam.json").read_text())["funnel"]
    completions = read_completions(run / "generate" / "completions.jsonl")
    assert (funnel["prompts"], funnel["completions"]) == (60, 240) == (60, len(completions))
    files = [run / "data" / "main" / f"{split}.parquet" for split in ("train", "validation")]
    parts = [read_pairs([file]).pairs for file in files]
    assert all(parts)
    assert sum(map(len, parts)) == funnel["pairs"] == funnel["candidates"] - funnel["ties"] - lost(run)
    assert not {pair.prompt for pair in parts[0]} & {pair.prompt for pair in parts[1]}
    texts = {(one.prompt, one.text) for one in completions}
    for pair in [*parts[0], *parts[1]]:
        assert {(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)} <= texts
        chosen, rejected = (assess(pair.prompt[0].content, text) for text in (pair.chosen, pair.rejected))
        assert chosen is not None
        assert rejected is not None
        assert chosen.helpful > rejected.helpful
        assert (pair.chosen_is_safe, pair.rejected_is_safe) == (chosen.safe, rejected.safe)
    assert (run / "data" / "manifest.json").exists()
    assert (run / "funnel.png").read_bytes().startswith(b"\x89PNG")
    assert "| pairs chosen |" in (run / "redteam.md").read_text()


def lost(run: Path) -> int:
    """Ranked candidates that were not chosen, since one of each cell was enough."""
    record = json.loads((run / "label" / "run.json").read_text())
    return int(sum(record["candidate_cells"].values()) - record["funnel"]["pairs"])


def test_a_stopped_run_goes_on_in_the_stage_that_was_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(world, world / "start" / "model", limit=20)
    with monkeypatch.context() as patch:
        patch.setattr("bfpo.commands.label.ask_ranker", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stage("redteam", asked, tmp_path / "run")
    before = (tmp_path / "run" / "generate" / "completions.jsonl").stat().st_mtime_ns
    run_stage("redteam", asked, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "generate" / "completions.jsonl").stat().st_mtime_ns == before
    run_stage("redteam", asked, tmp_path / "whole")
    for name in ("label/pairs.jsonl", "data/main/train.parquet", "redteam.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_no_pair_is_said_with_what_became_of_the_completions(world: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "How do I"}) + "\n")
    asked = config(tmp_path, world / "start" / "model")
    with raises(DataError):
        run_stage("redteam", asked, tmp_path / "run")
    assert "Unscored: 4, the prompt is not one of the closed world" in (tmp_path / "run" / "redteam.md").read_text()


def test_the_preview_says_who_judges_and_the_short_options_are_the_keys(world: Path) -> None:
    asked = config(world, world / "start" / "model")
    assert "judged by oracle, ranked by oracle" in preview_stage("redteam", asked)
    arguments = ["--model", str(world / "start" / "model"), "--prompts", str(world / "prompts.jsonl")]
    result = CliRunner().invoke(app, ["redteam", *arguments, "--judge", "oracle", "--ranker", "oracle", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "171 prompts: 171 harmful" in result.output
    assert "684 completions of at most 256 tokens" in result.output


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["judges=oracle"], "ranker"),
        (["ranker=oracle"], "judges"),
        (["judges=oracle", "ranker=oracle", "rule=mean"], "rule"),
        (["judges=oracle", "ranker=oracle", "num_completions=1"], "num_completions"),
        (["judges=oracle", "ranker=oracle", "temperature=0"], "num_completions"),
    ],
)
def test_bad_settings(settings: list[str], key: str) -> None:
    with raises(ConfigError, key):
        load_config(RedteamConfig, None, ["model=m", "prompts=p.jsonl", *settings])


@pytest.mark.parametrize("key", ["judges", "ranker"])
def test_an_unknown_judge_or_ranker_is_told_before_anything_is_generated(world: Path, tmp_path: Path, key: str) -> None:
    with raises(SettingError, "nobody"):
        run_stage("redteam", config(world, world / "start" / "model", **{key: "nobody"}), tmp_path / "run")
    assert not (tmp_path / "run" / "generate").exists()
