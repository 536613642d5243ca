"""Runs that commit 0c9cfb2 began, before the packages were reordered, resume; its configs resolve to the same keys.

`run_of_0c9cfb2.tar.gz` holds inputs, three runs of that commit that were killed (`train` and `sft` while the second
checkpoint was written, `generate` after two batches), without the pickled arguments, which nothing reads, and what the
same runs left when nothing stopped them. `resolved_configs.json` holds configs and what they resolved to there.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from bfpo.config import load_config
from bfpo.runs.stages import STAGES, check_stage, run_stage

GOLDEN = Path(__file__).parent
# Keys that did not exist at that commit, with the values that leave everything as it was.
NEW: dict[str, Any] = {
    "reuse": None,
    "labels": None,
    "label_cache": None,
    "thinking": None,
    "behaviour": None,
    "context": None,
    "max_answer_tokens": None,
    "chat_template_kwargs": {},
    "allow_template_changes": False,
    "bad_rows": "stop",
    "allow_rendered_text": False,
    "extra_body": {},
    "phrases": None,
    "safe_values": [],
    "unsafe_values": [],
    "threshold": None,
    "base_model": None,
    "harmless": None,
    "windows": False,
    "max_answer_words": None,
    "balanced": False,
    "coherence": None,
    "leave_out": [],
    "probe": None,
    "split": None,
    "push_to_hub": None,
    "hub": None,
    "revision": None,
    "subset": None,
    "hub_split": None,
    "streaming": False,
    "hub_private_repo": None,
    "parts": {},
    "each": {},
    "trained_on": "keep",
    "incoherent": "drop",
    "link": "squared",
    "guard": None,
    "label_noise": None,
    "depth": None,
    "deep_refusals": None,
    "anchor_scale": "loss",
    "attention": "auto",
    "max_tokens_per_microbatch": 8192,
    "token_cache": None,
    "report_to": [],
    "project": None,
    "run_name": None,
    "run_tags": [],
    "optim": "adamw_torch_fused",
    "best": None,
    "trainer_args": {},
    "executor": {"backend": "local", "workers": "auto", "gpus_per_worker": None},
}
# Keys that are gone, with what another key has in their place.
GONE = {"processes"}
# New keys whose default is another one in `bfpo compare`; a comparison of before goes on with the value in NEW alone.
OF_COMPARE: dict[str, Any] = {"anchor_scale": "gradient"}
# What was the default, of keys whose default now says that the command finds the value.
WAS: dict[str, Any] = {
    "api_key_env": "OPENAI_API_KEY",
    "temperature": 1.0,
    "completions_per_microbatch": 8,
    "dtype": "float32",
    "batch_size": 16,
    "pairs_per_batch": 16,
}
# Keys that a command read there too, but did not record.
RECORDED = {"reference": {"method", "beta", "alpha", "safety_weight", "link", "reduction"}}
CONFIGS = json.loads((GOLDEN / "resolved_configs.json").read_text(encoding="utf-8"))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(GOLDEN / "run_of_0c9cfb2.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def go_on(command: str) -> Any:
    config: Any = load_config(STAGES[command].config_class(), Path(command) / "config.yaml", [])
    return run_stage(command, config, command, resume=True)


def without_new(value: Any) -> Any:
    """Return a resolved config without the new keys; one that does not hold its default stays."""
    if isinstance(value, list):
        return [without_new(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: without_new(item)
        for key, item in value.items()
        if key not in GONE and (key not in NEW or item not in (NEW[key], OF_COMPARE.get(key, NEW[key])))
    }
    return {key: WAS[key] if key in WAS and item in (None, "auto") else item for key, item in kept.items()}


def rows_until(step: int, folder: Path) -> list[Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] <= step]


@pytest.mark.skipif(np.__version__ < "2", reason="the random states of the checkpoints are arrays of numpy 2")
@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_training_goes_on_from_its_checkpoint_and_ends_in_the_same_weights(
    old: Path, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows_before = rows_until(2, old / command)
    with caplog.at_level("INFO"):
        folder = go_on(command)
    assert "starting again from the beginning" not in caplog.text
    assert folder.record["status"] == "finished"
    assert folder.record["starts"] == 2
    assert rows_before
    assert rows_until(2, old / command) == rows_before
    expected, found = (
        load_file(old / f"expected-{command}.safetensors"),
        load_file(old / command / "model/model.safetensors"),
    )
    assert expected.keys() == found.keys()
    start = load_file(old / "inputs" / "start" / "model.safetensors")
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=1e-6)
    assert any((weights - start[name]).abs().max() > 1e-3 for name, weights in expected.items())


def test_a_generation_keeps_the_answers_that_it_has(old: Path) -> None:
    partial = (old / "generate" / "completions.partial.jsonl").read_text().splitlines()
    kept = [row for row in map(json.loads, partial) if "text" in row]
    go_on("generate")
    found = [json.loads(line) for line in (old / "generate" / "completions.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (old / "expected-completions.jsonl").read_text().splitlines()]
    assert 0 < len(kept) < len(expected)
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    assert [row["text"] for row in found[: len(kept)]] == [row["text"] for row in expected[: len(kept)]]
    assert all(row.keys() == {"id", "prompt", "text", "model", "kind", "finished"} for row in found)


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_config_resolves_to_the_keys_and_values_of_before(number: int) -> None:
    case = CONFIGS[number]
    config: Any = STAGES[case["command"]].config_class().model_validate(case["given"])
    check_stage(case["command"], config)
    unrecorded = RECORDED.get(case["command"], set())
    found = {key: value for key, value in config.resolved().items() if key not in unrecorded}
    assert without_new(found) == without_new(case["resolved"])
    if case["given"].get("kind") == "ranker":  # resolved there to keys that it then refused
        return
    text = yaml.safe_dump(case["resolved"])
    again: Any = STAGES[case["command"]].config_class().model_validate(yaml.safe_load(text))
    found = {key: value for key, value in again.resolved().items() if key not in unrecorded}
    assert without_new(found) == without_new(case["resolved"])
