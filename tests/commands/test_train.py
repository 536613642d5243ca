"""`sft` and `train` from files to a saved model, stopped and resumed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import AlignConfig, ReferenceConfig, SftConfig
from bfpo.core.errors import ConfigError, DataError, ModelError, RunError, SettingError
from bfpo.data.chat import DEFAULT_CHAT_TEMPLATE
from bfpo.policy.load import load_tokenizer
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.training.callbacks import MetricsCallback
from bfpo.training.rehearsal import sampled_forecast
from messages import raises
from tiny import tiny_model, tiny_tokenizer

CELLS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A model folder, pairs of all cells on 12 prompts, a buffer of safe pairs, completions."""
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), tmp_path / "start")
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"w{i} w3",
            "chosen": f"w{i % 7} w{i % 5} w9",
            "rejected": f"w{i % 3} w11",
            "chosen_is_safe": CELLS[i % 4][0],
            "rejected_is_safe": CELLS[i % 4][1],
        }
        for i in range(12)
    ]
    write(tmp_path / "pairs.jsonl", rows)
    write(tmp_path / "safe.jsonl", [{**row, "chosen_is_safe": True, "rejected_is_safe": True} for row in rows[:5]])
    write(tmp_path / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def align(folder: Path, **settings: Any) -> AlignConfig:
    split = {"held_out": 3, "seed": 1}
    defaults: dict[str, Any] = {
        "model": str(folder / "start"),
        "data": {"files": str(folder / "pairs.jsonl"), "split": split},
        "buffer": {"files": str(folder / "safe.jsonl")},
        "eval_data": {"files": str(folder / "pairs.jsonl"), "split": {**split, "part": "test"}},
        "beta": 0.1,
        "learning_rate": 1e-3,
        "trainable": "all",
        "max_steps": 6,
        "pairs_per_step": 4,
        "max_tokens_per_microbatch": 24,
        "logging_steps": 2,
        "save_steps": 2,
        "eval_steps": 3,
        "threads": 1,
    }
    return AlignConfig(**{**defaults, **settings})


def with_lora(config: AlignConfig) -> AlignConfig:
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    return AlignConfig(**{**config.model_dump(exclude={"trainable"}, exclude_unset=True), "lora": lora})


def sft(data: Path, **settings: Any) -> SftConfig:
    defaults: dict[str, Any] = {
        "model": str(data / "start"),
        "data": {"files": str(data / "sft.jsonl")},
        "learning_rate": 1e-3,
        "max_steps": 5,
        "completions_per_step": 4,
        "completions_per_microbatch": 4,
        "logging_steps": 1,
        "threads": 1,
    }
    return SftConfig(**{**defaults, **settings})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_train_writes_everything(data: Path) -> None:
    out = data / "run"
    folder = run_stage("train", align(data), out)
    assert folder.status == "finished"
    assert (out / "model" / "tokenizer.json").exists()
    assert json.loads((out / "model" / "config.json").read_text())["use_cache"] is True
    counts = json.loads((out / "data.json").read_text())
    assert counts["data"]["pairs"] == 9
    assert sum(counts["data"]["cells"].values()) == 9
    assert counts["eval_data"]["pairs"] == 3
    assert {path.name for path in (out / "tokens").iterdir()} == {"data.arrow", "buffer.arrow", "eval_data.arrow"}
    rows = folder.read_metrics()
    assert [row["step"] for row in rows if "main/loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [3, 6]
    assert folder.record["reference"] == "precompute"
    assert folder.record["divergence"] is None
    assert "eval_accuracy" in folder.record["metrics"]
    assert "parameters train (100.0%)" in folder.record["trainable"]
    assert "Held-out pairs" in (out / "README.md").read_text()
    assert (out / "rejects.jsonl").read_text() == ""
    assert not list(out.glob(".model*"))


class MachineDownError(Exception):
    """As if the machine had gone down."""


@pytest.mark.parametrize("recomputed", [False, "selective"])
def test_a_killed_run_resumes_to_the_same_weights(
    data: Path, monkeypatch: pytest.MonkeyPatch, recomputed: bool | str
) -> None:
    config = align(data)
    run_stage("train", config, data / "straight")
    on_log = MetricsCallback.on_log

    def dying(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        on_log(self, args, state, control, logs, **kwargs)
        if state.global_step == 3 and "eval_loss" in logs:
            raise MachineDownError

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCallback, "on_log", dying)
        with pytest.raises(MachineDownError):
            run_stage("train", config, data / "killed")
    assert not (data / "killed" / "model").exists()
    half = data / "killed" / "checkpoints" / "checkpoint-4"  # the next one, cut off in the middle
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with raises(RunError, "--resume"):
        run_stage("train", config, data / "killed")
    with raises(RunError, "learning_rate"):
        run_stage("train", align(data, learning_rate=0.002), data / "killed", resume=True)
    folder = run_stage("train", align(data, gradient_checkpointing=recomputed), data / "killed", resume=True)
    assert folder.status == "finished"
    assert same(data / "straight", data / "killed")
    steps = [row["step"] for row in folder.read_metrics() if "main/loss" in row]
    assert steps == [2, 4, 6]
    assert [row["step"] for row in folder.read_metrics() if "eval_loss" in row] == [3, 6]


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_killed_after_its_last_step_needs_no_further_one(
    data: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    config = with_lora(align(data)) if lora else align(data, eval_steps=None)
    run_stage("train", config, data / "straight")

    def dying(*args: Any, **kwargs: Any) -> None:
        raise MachineDownError

    with monkeypatch.context() as patch:
        patch.setattr("bfpo.training.session.save_model_folder", dying)
        with pytest.raises(MachineDownError):
            run_stage("train", config, data / "killed")
    run_stage("train", config, data / "killed", resume=True)
    assert same(data / "straight", data / "killed")


@pytest.mark.parametrize("lora", [False, True])
def test_a_sharded_run_saves_the_weights_that_its_processes_gather(
    data: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """With one process the gathered weights are the model's own; the model itself is emptied before it is saved."""
    config = with_lora(align(data)) if lora else align(data, eval_steps=None)
    run_stage("train", config, data / "straight")

    def gathered(trainer: Any) -> Any:
        state = {name: tensor.clone() for name, tensor in trainer.model_wrapped.state_dict().items()}
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.zero_()
        return state

    monkeypatch.setattr("bfpo.training.session.whole_state", gathered)
    run_stage("train", config, data / "gathered")
    first, second = weights(data / "straight"), weights(data / "gathered")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_lora_is_trained_and_merged(data: Path) -> None:
    folder = run_stage("train", with_lora(align(data)), data / "run")
    assert "lora_A" in folder.record["trainable"]
    start, end = load_file(data / "start" / "model.safetensors"), weights(data / "run")
    assert start.keys() == end.keys()
    changed = {name.split(".")[-2] for name, value in end.items() if not torch.equal(value, start[name])}
    assert changed == {"q_proj", "down_proj"}


TEMPLATE = "{% for m in messages %}{{ m['content'] }} <s> {% endfor %}"


@pytest.mark.parametrize("trains", ["part", "lora"])
@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_model_and_checkpoints_hold_the_chat_template_of_the_training(
    data: Path, template: str | None, trains: str
) -> None:
    """The start has none; where the config names none either, it is the default one."""
    settings: dict[str, Any] = {"max_steps": 1, "save_steps": 1}
    if trains == "lora":
        settings["lora"] = {"r": 2, "target_modules": ["q_proj"]}
    else:
        settings["trainable"] = ["*.down_proj.weight"]
    if template is not None:
        (data / "chat.jinja").write_text(template)
        settings["chat_template"] = str(data / "chat.jinja")
    run_stage("sft", sft(data, **settings), data / "run")
    checkpoint, exported = data / "run" / "checkpoints" / "checkpoint-1", data / "exported"
    done = CliRunner().invoke(app, ["export", str(checkpoint), "--out", str(exported)])
    assert done.exit_code == 0, done.output
    for folder in (data / "run" / "model", checkpoint, exported):
        assert load_tokenizer(folder).chat_template == (template or DEFAULT_CHAT_TEMPLATE)
    bos, eos = 1, 2
    for folder in (data / "run" / "model", exported):
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        assert ends == ([bos, eos] if template else eos)


def test_sft_lowers_the_loss(data: Path) -> None:
    config = sft(data, max_steps=30, learning_rate=1e-2, eval_data={"files": str(data / "sft.jsonl")})
    folder = run_stage("sft", config, data / "run")
    losses = [row["loss"] for row in folder.read_metrics() if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert folder.record["metrics"]["eval_loss"] < 0.5 * losses[0]


@pytest.mark.parametrize("wanted", ["selective", True])
def test_recomputed_activations_change_no_weight(data: Path, monkeypatch: pytest.MonkeyPatch, wanted: Any) -> None:
    """Of `train`, of `sft`, and of `sft` from random weights; `to_json_string` is what trackers log."""
    json_of: list[str] = []
    begin = MetricsCallback.on_train_begin
    monkeypatch.setattr(
        MetricsCallback,
        "on_train_begin",
        lambda self, args, *more, **kwargs: json_of.append(args.to_json_string()) or begin(self, args, *more, **kwargs),
    )
    recomputed: list[bool] = []
    forward = LlamaDecoderLayer.forward

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.training:
            recomputed.append(layer.gradient_checkpointing)
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    tokenizer, config = str(data / "start"), {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    init = {"model": None, "init": {"config": config, "tokenizer": tokenizer}}
    for name, stage, make in (("train", "train", align), ("sft", "sft", sft), ("init", "sft", partial(sft, **init))):
        for number, setting in enumerate((False, wanted)):
            recomputed.clear()
            run_stage(stage, make(data, gradient_checkpointing=setting), data / f"{name}-{number}")
            assert recomputed
            assert set(recomputed) == {setting is not False}
        assert same(data / f"{name}-0", data / f"{name}-1"), name
    assert len(json_of) == 6


@pytest.mark.parametrize("wanted", ["selective", True])
def test_a_model_that_cannot_recompute_is_refused_before_training(
    data: Path, monkeypatch: pytest.MonkeyPatch, wanted: Any
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    for stage, make in (("train", align), ("sft", sft)):
        with raises(SettingError, "gradient_checkpointing"):
            run_stage(stage, make(data, gradient_checkpointing=wanted), data / stage)


def test_sft_from_scratch_on_the_safe_completions_of_pairs(data: Path) -> None:
    init = {
        "config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
        "tokenizer": str(data / "start"),
    }
    config = SftConfig(
        **{**sft(data).model_dump(exclude={"model"}, exclude_unset=True), "init": init}
        | {"data": {"files": str(data / "pairs.jsonl"), "use": "safe"}}
    )
    run_stage("sft", config, data / "run")
    counts = json.loads((data / "run" / "data.json").read_text())["data"]
    assert counts["completions"] == 12
    assert counts["pairs"] == 12


def test_preview_tells_counts_and_parameters_and_writes_nothing(data: Path) -> None:
    before = sorted(path.name for path in data.iterdir())
    text = preview_stage("train", align(data, trainable=["*.down_proj.weight"]))
    assert "data: 9 pairs; by cell (chosen-rejected) safe-safe" in text
    assert "buffer: 5 pairs" in text
    assert "768 of" in text
    assert "12 completions" in preview_stage("sft", sft(data))
    assert sorted(path.name for path in data.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "kind", "key"),
    [
        ({"trainable": ["*.gate.weight"]}, ModelError, "*.gate.weight"),
        ({"model": "missing"}, ModelError, "missing"),
        ({"data": {"files": "missing.jsonl"}}, (DataError, RunError), "missing.jsonl"),
        ({"chat_template": "missing.jinja"}, ConfigError, "chat_template"),
    ],
)
def test_bad_input(data: Path, settings: dict[str, Any], kind: Any, key: str) -> None:
    with raises(kind, key):
        run_stage("train", align(data, **settings), data / "run")
    assert json.loads((data / "run" / "run.json").read_text())["status"] == "failed"


def test_processes_must_share_a_step_evenly(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with raises(ConfigError, "pairs_per_step"):
        run_stage("train", align(data), data / "run")


def test_rejected_rows_are_written_and_counted(data: Path) -> None:
    with (data / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": "w1", "chosen": 3}\n')
    with raises(DataError, "pairs.jsonl:13"):
        run_stage("train", align(data), data / "stops")
    source = {"files": str(data / "pairs.jsonl"), "bad_rows": "skip"}
    run_stage("train", align(data, data=source, eval_data=None, eval_steps=None, max_steps=1), data / "skips")
    rejects = [json.loads(line) for line in (data / "skips" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["input"], row["line"]) for row in rejects] == [("data", 13)]


def test_a_pointwise_method_trains_on_single_answers_from_files(data: Path) -> None:
    rows = [{"prompt": f"w{i} w3", "completion": f"w{i % 7} w9", "label": i % 3 > 0} for i in range(12)]
    write(data / "answers.jsonl", rows)
    answers = {"files": str(data / "answers.jsonl"), "layout": "unpaired"}
    config = align(data, method="kto", data=answers, anchor_weight=0.1, anchor_scale="gradient", reference="swap")
    folder = run_stage("train", config, data / "kto")
    assert folder.status == "finished"
    assert json.loads((data / "kto/data.json").read_text())["data"]["cells"]["unsafe-safe"] == 4
    rows = folder.read_metrics()
    assert all({"state/main", "state/buffer"} <= row.keys() for row in rows if "main/loss" in row)
    assert rows[0]["main/loss_at_start"] == pytest.approx(0.5)  # one answer a row, w (1 - sigmoid(0))
    assert rows[0]["buffer/loss_at_start"] == pytest.approx(1.0)  # two
    text = preview_stage("train", config)
    assert "expected first loss: 1.5" in text
    filled = ReferenceConfig.model_validate({**config.resolved(), "reference": "precompute"})
    record = run_stage("reference", filled, data / "reference").record
    assert record["reference_pass"]["num_pairs"] == 12 + 5 + 3
    with raises(SettingError, "--data", "single answers"):
        sampled_forecast(config)


def test_categories_of_the_data_get_their_margins(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    write(data / "named.jsonl", [{**row, "category": ["theft", "fraud"][i % 2]} for i, row in enumerate(rows)])
    config = align(data, method="cat_dpo", data={"files": str(data / "named.jsonl")})
    rows = run_stage("train", config, data / "named").read_metrics()
    shown = [{name for name in row if name.startswith("state/")} for row in rows if "main/loss" in row]
    assert shown[0] == {"state/no category", "state/fraud", "state/theft"}
    assert "no pair has a category" not in caplog.text
    run_stage("train", align(data, method="cat_dpo"), data / "unnamed")
    assert "no pair has a category" in caplog.text
