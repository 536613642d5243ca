"""The example of `bfpo prepare` on real pairs and prompts, where they are at hand, and training on what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfpo.config import load_config
from bfpo.core.schema import Message
from bfpo.data.split import normalised_prompt
from bfpo.runs.stages import STAGES, run_stage
from mixtures import rows_of

ROOT = Path(__file__).resolve().parents[2]
TINY = ["max_length=64", "max_completion_length=24", "max_steps=1", "model=../shared/data/model_stories260K/hf"]


def stage(name: str, config: Path, out: Path, *settings: str):
    return run_stage(name, load_config(STAGES[name].config_class(), ROOT / "examples" / config, [*settings]), out)


@pytest.mark.slow
def test_real_pairs_are_prepared_and_trained_on(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs name ../shared/data
    prepared = stage("prepare", Path("prepare/data.yaml"), tmp_path / "data")
    data = prepared.read_json("data.json")
    main, buffer, _ = data["sources"]
    assert (main["rows"], buffer["rows"], sum(buffer["rejected"].values())) == (976, 2352, 13)
    assert data["streams"]["main"]["cells"]["train"]["safe-unsafe"] == 0
    assert data["streams"]["buffer"]["rows"]["train"] == 800
    assert data["decontamination"]["truthfulqa"]["rows"] == 1
    [hit] = [json.loads(line) for line in (prepared.path / "contamination.jsonl").read_text().splitlines()]
    assert hit["line"] == 1739

    sides: dict[str, set[str]] = {}
    for stream in ("main", "buffer", "sft"):
        for split, rows in rows_of(prepared, stream).items():
            for row in rows:
                prompt = normalised_prompt([Message(**turn) for turn in row["prompt"]])
                sides.setdefault(prompt, set()).add(split)
    assert {len(splits) for splits in sides.values()} == {1}

    files = {name: prepared.path / name / "train.parquet" for name in ("main", "buffer")}
    settings = [f"data={{files: {files['main']}}}", f"buffer={{files: {files['buffer']}}}"]
    trained = stage("train", Path("real_pairs/train.yaml"), tmp_path / "train", *TINY, *settings)
    card = (trained.path / "README.md").read_text(encoding="utf-8")
    assert "| data: xstest | licence cc-by-4.0, own files |" in card
    assert "| buffer: hh-helpful | licence mit, own files |" in card
    imitation = f"data={{files: {prepared.path / 'sft' / 'train.parquet'}}}"
    stage("sft", Path("real_pairs/sft.yaml"), tmp_path / "sft", *TINY, imitation)
