"""What a dry-run says of a training is what the training then does; it writes nothing, and a slow step ends it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import bfpo.commands.train
import bfpo.training.diagnosis
import bfpo.training.inputs
import bfpo.training.rehearsal
from bfpo.commands.doctor import run as doctor
from bfpo.config import AlignConfig, SftConfig
from bfpo.core.errors import SettingError
from bfpo.data.template import ChatTemplate
from bfpo.policy.save import save_policy
from bfpo.runs.stages import plan_stage, preview_stage, run_stage
from bfpo.training.inputs import read_start
from bfpo.training.rehearsal import Rows, sampled_forecast, token_rows
from messages import raises, says
from tiny import tiny_model, tiny_tokenizer

CELLS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rehearsal")
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), root / "start")
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"w{i} w3",
            "chosen": "w9 " * (1 + i % 4),
            "rejected": f"w{i % 3} w11",
            "chosen_is_safe": CELLS[i % 4][0],
            "rejected_is_safe": CELLS[i % 4][1],
        }
        for i in range(9)
    ]
    for name, some in (("pairs", rows), ("buffer", rows[:5])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (root / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (root / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    return root


def align(files: Path, **more: Any) -> AlignConfig:
    given = {"beta": 0.1, "pairs_per_step": 9, "threads": 1, "reference_cache": str(files / "cache")}
    given |= {"chat_template": str(files / "template.jinja"), **more}
    return AlignConfig(model=str(files / "start"), data={"files": str(files / "pairs.jsonl")}, **given)


def said(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    assert found, text
    return found[1].replace(",", "")


def test_a_dry_run_of_train_says_what_the_training_then_does(files: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "buffer": {"files": str(files / "buffer.jsonl")},
        "buffer_weight": 2.0,
        "num_train_epochs": 2.5,
        "warmup_steps": 0.4,
        "logging_steps": 1,
        "anchor_weight": 0.5,
    }
    config = align(files, **settings)
    before = sorted(files.rglob("*"))
    text, planned = plan_stage("train", config)
    assert sorted(files.rglob("*")) == before
    folder = run_stage("train", config, tmp_path / "run")
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "learning_rate" in row]
    steps = int(said(text, r"optimizer steps: ([\d,]+) \(1 are"))
    assert steps == len(logged) == 3
    rates = [row["learning_rate"] for row in logged]
    assert int(said(text, r"warm-up: (\d+) of")) == 2 == rates.index(max(rates)) + 1  # it ends at the peak
    # All 9 main pairs are in the first step, with 9 of the buffer's five: the whole buffer and four of it again.
    main, buffer = logged[0]["main/loss"], logged[0]["buffer/loss"]
    assert logged[0]["preference_loss"] == pytest.approx(main + 2 * buffer)
    found = float(said(text, r"expected first loss: ([\d.]+) \("))
    losses = [np.square([0.5, 1.0, 1.0, 0.5] * 2 + [0.5]).mean(), np.square([0.5, 1.0, 1.0, 0.5, 0.5]).mean()]
    assert found == pytest.approx((losses[0] + 2 * losses[1]) / 0.01, rel=1e-5)
    assert main == pytest.approx(losses[0] / 0.01, rel=1e-5)
    assert "without the anchor" in text
    anchor = float(said(text, r"anchor of the first steps: about ([\d.e+]+), that of 8 pairs now"))
    assert planned["expected_anchor_loss"] == pytest.approx(anchor, rel=1e-3)
    assert anchor == pytest.approx(logged[0]["anchor_loss"], rel=0.5)  # of other pairs
    assert " in all; scaled" in text
    counts = [2 + (2 + i % 4) + 3 for i in range(9)]  # with an end token each
    assert f"a step: 9 + 9 pairs, about {sum(counts) + 9 * sum(counts[:5]) / 5:,.0f} tokens" in text
    assert "measured steps of 4 + 4 pairs" in text
    assert float(said(text, r"time of a step: about ([\d.]+) s")) > 0
    assert "reference log-probs before it" in text
    data = json.loads((folder.path / "data.json").read_text())
    for counts_of in data.values():
        del counts_of["tokens"]
    assert json.loads(json.dumps(planned["data"])) == data
    assert list(data["buffer"]["cells"].values()) == [2, 1, 1, 1]
    assert [planned[name] for name in ("steps", "steps_per_epoch", "warmup_steps")] == [3, 1, 2]
    assert planned["tokens_per_step"] == round(sum(counts) + 9 * sum(counts[:5]) / 5)
    assert planned["expected_first_loss"] == pytest.approx(found, rel=1e-5)
    assert f"{planned['trainable_parameters']:,} of " in text
    assert min(planned["seconds_per_step"], planned["reference_seconds"]) > 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "dpo_safe_first"}, "expected first loss: 0.693147; what"),
        ({"method": "ipo", "max_steps": 7, "pairs_per_step": 2, "reference": "swap", "reference_cache": None},
         "optimizer steps: 7 (5 are a pass over the data), warm-up: 1 of them"),
        ({"eval_data": {"files": "buffer.jsonl"}, "eval_steps": 2}, "in all without held-out evaluations; scaled"),
        ({"method": "modpo", "margin_model": "start"}, "expected first loss: not known beforehand"),
        ({"lora": {"r": 2, "target_modules": ["q_proj"]}, "max_steps": 1}, "warm-up: 1 of them"),
    ],
)  # fmt: skip
def test_every_kind_of_training_has_a_dry_run(
    files: Path, more: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    text, planned = plan_stage("train", align(files, **more))
    assert words in text
    assert (planned["expected_first_loss"] is None) == ("not known beforehand" in text)
    assert "time of a step: about" in text
    # A reference inside the steps is part of their time; one before them is said beside it.
    assert ("reference log-probs before it" in text) == (more.get("reference") != "swap")


def test_a_row_is_rendered_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Any] = []
    render_turns = ChatTemplate.render_turns

    def counted(self: Any, turns: Any, **more: Any) -> str:
        rendered.append(turns)
        return render_turns(self, turns, **more)

    monkeypatch.setattr(ChatTemplate, "render_turns", counted)
    counts, said_of_data = [], []
    for kept in (0, 2**22):
        monkeypatch.setattr(bfpo.training.inputs, "_KEPT_CHARACTERS", kept)
        rendered.clear()
        said_of_data.append(token_rows(align(files), read_start(align(files)))[0])
        counts.append(len(rendered))
    assert counts[0] - counts[1] == 9 * 3  # prompt, chosen and rejected
    assert said_of_data[0] == said_of_data[1]


def test_a_slow_step_is_the_last_that_is_measured(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfpo.training.rehearsal, "_SLOW", -1.0)
    assert "from 1 measured step of 4 pairs" in preview_stage("train", align(files))


def test_what_does_not_fit_is_not_measured(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfpo.commands.train, "fits_here", lambda config: False)
    text, planned = plan_stage("train", align(files))
    assert "time of a step: not measured" in text
    assert planned["seconds_per_step"] is None
    assert "optimizer steps: 1 " in text


@pytest.mark.parametrize("kind", ["mixtral", "falcon"])
def test_a_model_whose_memory_cannot_be_counted_is_measured(
    files: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "mixtral":
        shape |= {"intermediate_size": 16, "num_key_value_heads": 2, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    save_policy(model, tiny_tokenizer(), files / kind)
    config = align(files, trainable=["*"]).model_copy(update={"model": str(files / kind)})
    monkeypatch.setattr(bfpo.training.diagnosis, "_available", lambda *_: 2**40)
    text = preview_stage("train", config)
    assert "time of a step: about" in text
    says(caplog, "memory", mask=r"without its weights \(.*\)")


def test_a_dry_run_of_sft_measures_its_first_loss(files: Path, tmp_path: Path) -> None:
    config = SftConfig(
        model=str(files / "start"),
        data={"files": str(files / "sft.jsonl")},
        completions_per_step=4,
        completions_per_microbatch=4,
        max_steps=1,
        logging_steps=1,
        threads=1,
    )
    text, planned = plan_stage("sft", config)
    assert "optimizer steps: 1 (3 are a pass over the data)" in text
    assert "measured steps of 4 completions" in text
    loss = float(said(text, r"expected first loss: ([\d.]+) nats per token"))
    assert planned["expected_first_loss"] == pytest.approx(loss, rel=1e-3)
    assert (planned["data"]["data"]["completions"], planned["steps"], planned["seconds_per_step"] > 0) == (9, 1, True)
    folder = run_stage("sft", config, tmp_path / "run")
    assert loss == pytest.approx(folder.record["metrics"]["train_loss"], rel=0.5)


@pytest.mark.usefixtures("eight_gpus")
def test_on_a_machine_with_several_gpus_one_is_used(files: Path, tmp_path: Path) -> None:
    assert "time of a step: about" in preview_stage("train", align(files))
    sft = SftConfig(
        model=str(files / "start"), data={"files": str(files / "sft.jsonl")}, completions_per_step=4, threads=1
    )
    assert "measured steps of 4 completions" in preview_stage("sft", sft)
    found, _ = sampled_forecast(align(files), most=4)
    assert sum(group.pairs for group in found.groups) == 4
    with raises(SettingError, "8 GPUs"):  # a training would leave seven unused
        run_stage("train", align(files), tmp_path / "run")


def test_a_sample_is_drawn_evenly_and_every_row_is_counted() -> None:
    seen = np.zeros(10)
    for seed in range(2000):
        rows = Rows[int](lambda row: row + 1, seed=seed, most=3)
        rows.add(range(6))
        rows.add(range(6, 10))
        assert rows.tokens == list(range(1, 11))
        assert len(set(rows.sample)) == 3
        assert rows.sampled_tokens(2) == sum(rows.sample[:2]) + 2
        seen[rows.sample] += 1
    assert np.abs(seen / 2000 - 0.3).max() < 0.05  # five standard errors


def test_doctor_samples_the_pairs(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model: {files}/start\ndata: {{files: {files}/pairs.jsonl}}\nbuffer: {{files: {files}/buffer.jsonl}}\n"
        f"method: ipo\nbeta: 1000\nreference_cache: {tmp_path}/cache\n"
    )
    options: dict[str, Any] = {"processes": 1, "sharding": "none", "memory_gib": None, "data": True}
    outcome = doctor(path, [], **options)
    assert outcome.exit_code == 0
    text = capsys.readouterr().out
    assert "reference log-probs of 9 of 9 + 5 of 5 pairs, drawn at random" in text
    assert "buffer unsafe-safe" in text
    assert list(tmp_path.glob("cache/*/*.parquet"))
    groups = json.loads(json.dumps(outcome.facts))["forecast"]["groups"]
    assert sum(group["pairs"] for group in groups) == 14
    with raises(SettingError, "--data"):
        sft = [f"model={files}/start", f"data.files={files}/sft.jsonl", "completions_per_step=8"]
        doctor(None, sft, **options)
    with raises(SettingError, "--data"):
        doctor(None, [], **options)
