"""`bfpo reference`, and what `bfpo train` finds of it: which changes of a config cost which forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bfpo.config import AlignConfig, ReferenceConfig, load_config
from bfpo.core.errors import ConfigError, RunError
from bfpo.core.records import load
from bfpo.data.load import load_pairs
from bfpo.data.settings import DataConfig
from bfpo.data.tokenize import tokenize_pairs
from bfpo.policy.reference import forward_pass as reference_pass
from bfpo.policy.save import save_policy
from bfpo.runs.stages import plan_stage, preview_stage, run_stage
from bfpo.training.forecast import ForecastFile
from bfpo.training.trainer import BFPOTrainer
from messages import raises, says
from tiny import tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer

LENGTHS = [2, 3, 4, 5, 6, 7]  # words of the chosen answers
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
MARKED = "{% for m in messages %}{% if 'w1 ' in m['content'] %}w9 {% endif %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model, six pairs, three for the buffer, two held out; each stream with a prompt of its own kind."""
    save_policy(tiny_model(max_position_embeddings=64), tiny_tokenizer(), tmp_path / "start")
    for name, numbers in (("main", range(6)), ("buffer", range(10, 13)), ("held_out", range(20, 22))):
        rows = [
            {
                "id": f"{name}{i}",
                "prompt": f"w{i} w3",
                "chosen": " ".join(f"w{30 + i + k}" for k in range(LENGTHS[i % 6])),
                "rejected": "w11",
                "chosen_is_safe": bool(i % 2),
                "rejected_is_safe": True,
            }
            for i in numbers
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return tmp_path


def settings(files: Path, **changed: Any) -> dict[str, Any]:
    return {
        "model": str(files / "start"),
        "data": {"files": str(files / "main.jsonl")},
        "buffer": {"files": str(files / "buffer.jsonl")},
        "eval_data": {"files": str(files / "held_out.jsonl")},
        "chat_template": str(files / "template.jinja"),
        "reference_cache": str(files / "cache"),
        "reference": "precompute",
        "beta": 0.1,
        "max_steps": 2,
        "pairs_per_step": 2,
        "threads": 1,
        **changed,
    }


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of each forward pass of the reference."""
    seen: list[int] = []
    inner = reference_pass.own_logps

    def spy(model: Any, batch: Any) -> torch.Tensor:
        logps = inner(model, batch)
        seen.append(len(logps) // 2)
        return logps

    monkeypatch.setattr(reference_pass, "own_logps", spy)
    return seen


def reference(files: Path, out: str, **changed: Any) -> dict[str, Any]:
    """Run the stage and return the counts in its folder."""
    folder = run_stage("reference", ReferenceConfig(**settings(files, **changed)), files / out)
    counts: dict[str, Any] = folder.record["reference_pass"]
    return counts


def test_training_finds_every_row_whatever_its_learning_rate(files: Path, passed: list[int]) -> None:
    counts = reference(files, "reference")
    assert (counts["num_pairs"], counts["num_rows"], counts["num_computed"], counts["num_stored"]) == (11, 11, 11, 11)
    assert counts["cache"] == str(files / "cache" / counts["model_key"])
    assert sum(passed) == 11
    passed.clear()
    changes = {"learning_rate": 0.5, "seed": 7, "method": "ipo"}, {"lora": {"r": 2, "target_modules": ["q_proj"]}}
    for number, changed in enumerate(changes):
        config = AlignConfig(**settings(files, max_steps=1, **changed))
        folder = run_stage("train", config, files / f"train-{number}")
        found = folder.record["reference_pass"]
        assert (found["num_reused"], found["num_computed"], found["model_key"]) == (11, 0, counts["model_key"])
    assert passed == []


def test_the_forecast_costs_no_forward_pass_and_is_that_of_training(
    files: Path, passed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    rare = {"method": "ipo", "beta": 50.0}  # asks for .01 nats
    with caplog.at_level("INFO"):
        run_stage("reference", ReferenceConfig(**settings(files, **rare)), files / "reference")
    assert sum(passed) == 11
    passed.clear()
    assert "main unsafe-safe" in caplog.text
    assert "buffer unsafe-safe" in caplog.text
    folder = run_stage("train", AlignConfig(**settings(files, **rare)), files / "train")
    assert passed == []
    said = load(ForecastFile, folder.path / "forecast.json")
    assert said == load(ForecastFile, files / "reference" / "forecast.json")
    assert sum(group.pairs for group in said.groups) == 6 + 3
    assert (said.method, said.beta, said.has_target) == ("ipo", 50.0, True)
    assert any(record.levelname == "WARNING" and record.message == said.warning for record in caplog.records) == bool(
        said.warning
    )
    for name in ("dpo_h", "modpo"):  # a method of two models needs only one of them here
        more = {"margin_model": str(files / "start")} if name == "modpo" else {}
        folder = run_stage("reference", ReferenceConfig(**settings(files, method=name, **more)), files / name)
        assert not load(ForecastFile, folder.path / "forecast.json").has_target


def test_without_log_probs_beforehand_there_is_no_forecast_and_that_is_said(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = AlignConfig(**{**settings(files, reference="swap"), "reference_cache": None})
    with caplog.at_level("INFO"):
        folder = run_stage("train", config, files / "train")
    assert not (folder.path / "forecast.json").exists()
    says(caplog, "forecast: none")


def test_a_change_computes_exactly_the_rows_that_it_touches(files: Path, passed: list[int]) -> None:
    """In tokens, a pair is prompt 2, chosen 3 to 8 with the end token, rejected 2; two of the 11 pairs have 8."""
    reference(files, "first")
    assert counts_of(reference(files, "again")) == (11, 0)
    assert counts_of(reference(files, "shorter", max_length=9)) == (9, 2)
    assert counts_of(reference(files, "completions", max_completion_length=7)) == (9, 2)
    (files / "template.jinja").write_text(MARKED)  # another text for one prompt only
    assert counts_of(reference(files, "template")) == (10, 1)
    assert counts_of(reference(files, "precision", dtype="float64")) == (0, 11)
    assert counts_of(reference(files, "autocast", dtype="bfloat16")) == (0, 11)
    assert sum(passed) == 11 + 2 + 2 + 1 + 11 + 11


def counts_of(report: dict[str, Any]) -> tuple[int, int]:
    return report["num_reused"], report["num_computed"]


def test_cached_values_are_those_of_a_fresh_pass_after_each_cut(files: Path) -> None:
    for number, max_length in enumerate((1024, 9, 6)):
        reference(files, f"run-{number}", max_length=max_length, reference_cache=str(files / "shared"))
        loaded = load_pairs(DataConfig(files=[files / "main.jsonl"]))
        pairs, _ = tokenize_pairs(loaded.pairs, tiny_tokenizer(), max_length=max_length, chat_template=TEMPLATE)
        made = [
            tiny_trainer(
                files / "trainer",
                model=tiny_model(max_position_embeddings=64),
                main=pairs,
                reference="precompute",
                reference_cache=cache,
            )
            for cache in (str(files / "shared"), None)
        ]
        assert [trainer.reference_report.num_computed for trainer in made] == [0, 6]
        cached, fresh = ([pair.ref_chosen_logps for pair in trainer.streams[0]] for trainer in made)
        assert cached == pytest.approx(fresh, rel=1e-5)


def test_a_preview_leaves_a_torn_shard_where_it_is(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Path(reference(files, "first")["cache"])
    (shard,) = cache.glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:-30])
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert "11 rows, 0 cached, 11 to compute" in preview_stage("reference", ReferenceConfig(**settings(files)))
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    says(caplog, shard.name, mask=r"\w{16,}")


def test_what_would_be_computed(files: Path) -> None:
    config = ReferenceConfig(**settings(files))
    text, planned = plan_stage("reference", config)
    assert text.endswith(": 11 rows, 0 cached, 11 to compute")
    assert [planned["reference_pass"][f"num_{name}"] for name in ("rows", "reused", "computed")] == [11, 0, 11]
    assert planned["data"]["data"]["pairs"] == 6
    assert "data: 6 pairs" in text
    assert not (files / "cache").exists()
    counts = reference(files, "run")
    text = preview_stage("reference", config)
    assert text.endswith(f"cache: {counts['cache']}: 11 rows, 11 cached, 0 to compute")


def test_a_finished_and_a_failed_run(files: Path) -> None:
    (files / "cache").write_text("a file where the folder should be")
    config = ReferenceConfig(**settings(files))
    with raises(RunError):
        run_stage("reference", config, files / "run")
    (files / "cache").unlink()
    record = json.loads((files / "run" / "run.json").read_text())
    for key in ("method", "beta", "alpha", "safety_weight", "reduction"):  # as before these keys were recorded
        del record["config"][key]
    (files / "run" / "run.json").write_text(json.dumps(record))
    folder = run_stage("reference", config, files / "run", resume=True)
    assert folder.status == "finished"
    assert folder.record["reference_pass"]["num_stored"] == 11


def test_it_takes_the_config_of_training_and_keeps_what_it_reads(files: Path) -> None:
    config_file = files / "train.yaml"
    config_file.write_text(
        "model: start\nmethod: ipo\nlearning_rate: 1.0e-6\ndata: {files: main.jsonl}\nmax_steps: 9\n"
    )
    config = load_config(ReferenceConfig, config_file)
    assert config.resolved().keys() == {
        *(
            "model",
            "revision",
            "dtype",
            "quantize",
            "trainable",
            "lora",
            "data",
            "buffer",
            "eval_data",
            "chat_template",
            "chat_template_kwargs",
            "allow_template_changes",
            "allow_rendered_text",
            "max_length",
        ),
        *("max_completion_length", "seed", "threads", "reference_cache", "token_cache", "attention"),
        *("max_tokens_per_microbatch", "method", "beta", "reduction"),
    }
    resolved = load_config(ReferenceConfig, config_file, ["beta=0.02", "reduction=mean"]).resolved()
    assert ReferenceConfig(**resolved).resolved() == resolved
    shifted = {"model": "m", "data": {"files": "a"}, "method": "modpo", "margin_model": "n"}
    assert ReferenceConfig(**ReferenceConfig(**shifted).resolved()).margin_model == "n"
    with raises(ConfigError):
        load_config(ReferenceConfig, config_file, ["reference=swap"])
    with raises(ConfigError, "reference_cache"):
        load_config(AlignConfig, config_file, ["reference=swap", "reference_cache=there"])
    assert "reference_cache" not in AlignConfig(model="m", data={"files": "a"}, reference="swap").resolved()


def test_without_a_folder_the_cache_is_the_users(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    counts = reference(files, "run", reference_cache=None)
    assert Path(counts["cache"]).parent == tmp_path / "xdg" / "bfpo" / "reference"


def test_auto_counts_only_what_the_cache_lacks(tmp_path: Path) -> None:
    """12 pairs, 2 steps of 4: inside the steps the reference runs for 8 pairs, beforehand for what is not known."""

    def made(num_known: int) -> BFPOTrainer:
        cache = str(tmp_path / str(num_known))
        if num_known:
            known = tiny_pairs(12)[:num_known]
            tiny_trainer(tmp_path, main=known, reference="precompute", reference_cache=cache)
        return tiny_trainer(tmp_path, main=tiny_pairs(12), max_steps=2, reference_cache=cache)

    assert [made(num).reference_name for num in (0, 3, 4)] == ["swap", "swap", "precompute"]


def test_a_resumed_run_keeps_the_choice_of_auto(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    config = AlignConfig(**settings(files, reference="auto", max_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr("bfpo.commands.train.train_in_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stage("train", config, files / "run")
    reference(files, "reference")
    assert run_stage("train", config, files / "run", resume=True).record["reference"] == "swap"
    assert run_stage("train", config, files / "later").record["reference"] == "precompute"


def test_a_library_user_has_no_cache_unless_asked(tmp_path: Path, own_cache_folder: Path) -> None:
    before = sorted(own_cache_folder.rglob("*"))
    trainer = tiny_trainer(tmp_path, reference="precompute")
    assert trainer.reference_report is not None
    assert trainer.reference_report.cache is None
    assert sorted(own_cache_folder.rglob("*")) == before
