"""`bfpo convert-config`: three libraries' configs, what is carried over and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import AlignConfig, SftConfig, load_config
from bfpo.config.converted import ROWS, table_rows
from messages import fails

ROOT = Path(__file__).resolve().parents[2]
AXOLOTL = """
base_model: my-sft-model
rl: dpo
datasets:
  - {path: pairs.jsonl, ds_type: json, type: chat_template.default, field_messages: conversation}
sequence_len: 2048
adapter: qlora
load_in_4bit: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: "5e-6"
warmup_ratio: 0.1
bf16: auto
gradient_checkpointing: yes
val_set_size: 0.05
flash_attention: true
wandb_project: safety
special_tokens: {pad_token: <pad>}
"""
LLAMA_FACTORY = """
model_name_or_path: my-sft-model
stage: dpo
do_train: true
dataset: mine
finetuning_type: full
pref_loss: simpo
template: qwen
per_device_train_batch_size: 1
gradient_accumulation_steps: 16
adam_beta2: 0.95
"""
TRL = {
    "output_dir": "out",
    "learning_rate": 5e-7,
    "per_device_train_batch_size": 4,
    "beta": 0.05,
    "bf16": True,
    "disable_dropout": True,
    "max_steps": 30,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "save_strategy": "steps",
    "sync_ref_model": True,
    "report_to": ["none"],
}


def convert(path: Path, *options: str):
    return CliRunner().invoke(app, ["convert-config", str(path), *options])


def converted(tmp_path: Path, text: str, name: str = "theirs.yaml"):
    (tmp_path / name).write_text(text)
    result = convert(tmp_path / name, "--out", str(tmp_path / "ours.yaml"), "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("")


def test_an_axolotl_config_with_qlora(tmp_path):
    found = converted(tmp_path, AXOLOTL)
    ours = load_config(AlignConfig, tmp_path / "ours.yaml")
    assert (ours.model, ours.data.files, ours.data.layout) == ("my-sft-model", ["pairs.jsonl"], "messages")
    assert ours.data.columns == {"messages": "conversation"}
    assert (ours.pairs_per_step, ours.max_length, ours.learning_rate, ours.warmup_steps) == (16, 2048, 5e-6, 0.1)
    assert (ours.lora.r, ours.lora.lora_alpha, ours.lora.target_modules) == (8, 16, "all-linear")
    assert (ours.quantize, ours.dtype, ours.gradient_checkpointing) == ("nf4", "bfloat16", True)
    assert (ours.report_to, ours.project, ours.method, ours.beta) == (["wandb"], "safety", "bfpo", 0.1)
    assert found["not_carried_over"].keys() == {"lora_dropout", "val_set_size", "flash_attention", "special_tokens"}
    assert found["to_do"] == []
    text = (tmp_path / "ours.yaml").read_text()
    assert "pairs_per_step: 16  # micro_batch_size, gradient_accumulation_steps" in text
    assert "#   special_tokens: no counterpart" in text


def test_a_llama_factory_config_reads_the_table_of_its_data_sets(tmp_path):
    (tmp_path / "data").mkdir()
    entry = {"file_name": "m.json", "formatting": "sharegpt", "ranking": True, "columns": {"messages": "turns"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    (tmp_path / "data" / "m.json").write_text("[]")
    found = converted(tmp_path, LLAMA_FACTORY)
    ours = load_config(AlignConfig, tmp_path / "ours.yaml")
    assert (ours.data.files, ours.data.layout) == (["data/m.json"], "sharegpt")
    assert ours.data.columns == {"conversations": "turns"}
    assert (ours.trainable, ours.lora, ours.dtype, ours.max_length) == ("all", None, "float32", 2048)
    assert (ours.learning_rate, ours.num_train_epochs, ours.lr_scheduler_type) == (5e-5, 3, "linear")  # its defaults
    assert ours.trainer_args == {"adam_beta2": 0.95}
    assert found["to_do"] == []
    assert found["not_carried_over"].keys() == {"template"}
    assert "simpo, has no counterpart" in (tmp_path / "ours.yaml").read_text()


def test_a_data_set_without_its_table_is_left_to_do(tmp_path):
    found = converted(tmp_path, LLAMA_FACTORY.replace("stage: dpo", "stage: sft"))
    ours = load_config(SftConfig, tmp_path / "ours.yaml")
    assert ours.completions_per_step == 16
    assert "mine is an entry of data/dataset_info.json" in found["to_do"][0]


def test_a_saved_dpo_config_of_trl(tmp_path):
    found = converted(tmp_path, json.dumps(TRL), "training_args.json")
    config = found["config"]
    assert (config["beta"], config["pairs_per_step"], config["max_steps"], config["dtype"]) == (0.05, 4, 30, "bfloat16")
    assert "num_train_epochs" not in config
    assert "lr_scheduler_type" not in config
    assert found["not_carried_over"].keys() == {"lr_scheduler_type", "output_dir", "sync_ref_model"}
    assert {text.partition(":")[0] for text in found["to_do"]} == {"model", "data.files"}


def test_texts_that_are_not_cut_there_are_left_to_do(tmp_path):
    found = converted(tmp_path, json.dumps({**TRL, "max_length": None}), "training_args.json")
    assert found["config"]["max_length"] == 1024
    assert any(text.startswith("max_length: ") for text in found["to_do"])


@pytest.mark.parametrize(("theirs", "key"), [(AXOLOTL, "lr_scheduler"), (LLAMA_FACTORY, "lr_scheduler_type")])
def test_a_constant_schedule_has_no_warm_up(tmp_path, theirs, key):
    found = converted(tmp_path, f"{theirs.replace('warmup_ratio: 0.1', '')}\n{key}: constant\nwarmup_ratio: 0.1\n")
    assert found["config"]["lr_scheduler_type"] == "constant"
    assert "warmup_steps" not in found["config"]
    assert "constant_with_warmup" in found["not_carried_over"]["warmup_ratio"]
    load_config(AlignConfig, tmp_path / "ours.yaml")


def test_what_is_turned_off_is_listed_if_it_is_on_by_default(tmp_path):
    off = {"dataloader_pin_memory": False, "disable_dropout": False, "remove_unused_columns": False, "adam_beta1": 0.0}
    neutral = {"fp16": False, "eval_strategy": "no", "precompute_ref_log_probs": False, "label_smoothing": 0}
    values = {**TRL, **off, **neutral, "save_strategy": "no", "run_name": "mine", "project": "huggingface"}
    found = converted(tmp_path, json.dumps(values), "training_args.json")
    named = found["not_carried_over"].keys() | found["config"]["trainer_args"].keys()
    assert named == {*off, "save_strategy", "run_name", "lr_scheduler_type", "output_dir", "sync_ref_model"}
    assert found["not_carried_over"]["run_name"] == "read with report_to only; name a tracker there"


def test_what_is_not_read_of_a_data_set_is_listed(tmp_path):
    more = '"train[:100]", name: sub, revision: abc, message_property_mappings: {role: from}, shards: null}'
    before = converted(tmp_path, AXOLOTL)["not_carried_over"].keys()
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, AXOLOTL.replace("conversation}", f"conversation, split: {more}"))["not_carried_over"]
    new = {"split", "name", "revision", "message_property_mappings"}
    assert found.keys() == before | {f"datasets: {key}" for key in new}
    (tmp_path / "ours.yaml").unlink()
    (tmp_path / "data").mkdir()
    entry = {"file_name": "m.json", "formatting": "sharegpt", "ranking": True, "num_samples": 100, "split": "test"}
    entry["columns"] = {"messages": "conversations", "system": "instructions"}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    found = converted(tmp_path, LLAMA_FACTORY)["not_carried_over"]
    assert found.keys() == {"template", "mine: num_samples", "mine: split", "mine: columns: system"}
    assert found["mine: num_samples"] == "not read; data.limit says it here"


TRL_HUB = """
model_name_or_path: m
learning_rate: 5.0e-7
output_dir: out
dataset_name: org/pairs
dataset_config: sub
dataset_train_split: train_prefs
dataset_test_split: test_prefs
dataset_streaming: true
eval_strategy: steps
eval_steps: 10
"""


def test_a_data_set_of_the_hub_of_trl(tmp_path):
    found = converted(tmp_path, TRL_HUB)
    ours = load_config(AlignConfig, tmp_path / "ours.yaml")
    assert (ours.data.hub, ours.data.subset, ours.data.hub_split) == ("org/pairs", "sub", "train_prefs")
    assert (ours.data.streaming, ours.data.files, ours.eval_steps) == (True, [], 10)
    assert found["config"]["eval_data"] == {**found["config"]["data"], "hub_split": "test_prefs"}
    assert found["not_carried_over"].keys() == {"output_dir", "eval_strategy"}
    assert found["to_do"] == []
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, TRL_HUB.replace("dataset_name: org/pairs", "dataset_name: pairs.jsonl"))
    assert (found["config"]["data"], "eval_data" in found["config"]) == ({"files": "pairs.jsonl"}, False)
    keys = {"dataset_config", "dataset_train_split", "dataset_streaming", "dataset_test_split", "eval_steps"}
    assert found["not_carried_over"].keys() >= keys


def test_files_and_mixtures_of_trl(tmp_path):
    entry = "{path: org/pairs, data_files: {train: a.parquet, test: b.parquet}, split: test, fraction: 0.5}"
    theirs = f"{TRL_HUB}datasets: [{entry}]\nstreaming: true\n"
    found = converted(tmp_path, theirs)
    assert found["config"]["data"] == {"hub": "org/pairs", "files": ["b.parquet"], "streaming": True}
    keys = {"dataset_name", "dataset_config", "dataset_train_split", "dataset_streaming", "dataset_test_split"}
    assert found["not_carried_over"].keys() == {
        *keys,
        "output_dir",
        "eval_strategy",
        "eval_steps",
        "datasets: fraction",
    }
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, theirs.replace("[{", "[{path: json, data_files: pairs.jsonl}, {"))
    assert found["config"]["data"] == {"files": "pairs.jsonl"}
    assert "left out org/pairs" in found["to_do"][0]


AXOLOTL_HUB = """
base_model: m
rl: dpo
datasets:
  - {path: org/pairs, name: sub, revision: abc, split: train, type: chatml.intel}
test_datasets:
  - {path: org/pairs, split: test, type: chatml.intel}
eval_steps: 5
"""


def test_data_sets_of_the_hub_of_axolotl(tmp_path):
    found = converted(tmp_path, AXOLOTL_HUB)
    ours = load_config(AlignConfig, tmp_path / "ours.yaml")
    assert (ours.data.hub, ours.data.subset, ours.data.revision) == ("org/pairs", "sub", "abc")
    assert (ours.data.hub_split, ours.eval_data.hub_split, ours.eval_data.hub) == ("train", "test", "org/pairs")
    assert (found["not_carried_over"], found["to_do"]) == ({}, [])
    (tmp_path / "ours.yaml").unlink()
    # For SFT the test part is what test_datasets stands for; a folder here is not taken for a name on the hub.
    found = converted(tmp_path, AXOLOTL_HUB.replace("rl: dpo\n", "").replace("split: test, ", ""))
    assert found["config"]["eval_data"] == {"hub": "org/pairs", "hub_split": "test"}
    (tmp_path / "ours.yaml").unlink()
    (tmp_path / "org" / "pairs").mkdir(parents=True)
    found = converted(tmp_path, AXOLOTL_HUB)
    assert found["config"]["data"] == {"files": "org/pairs"}
    assert found["not_carried_over"].keys() == {"datasets: name", "datasets: revision", "test_datasets: split"}


def test_a_slice_of_a_split_is_named(tmp_path):
    theirs = AXOLOTL_HUB.replace("name: sub, revision: abc, split: train", 'split: "train[:100]"')
    found = converted(tmp_path, theirs.replace("split: test", 'split: "train[100:]"'))
    assert found["config"]["data"] == found["config"]["eval_data"] == {"hub": "org/pairs", "hub_split": "train"}
    assert "'train[:100]'" in found["not_carried_over"]["datasets: split"]
    assert found["to_do"][0].startswith("eval_data: names the rows of data")


def test_llama_factory_looks_on_the_hub_first(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "m.json").write_text("[]")
    entry = {"hf_hub_url": "org/pairs", "file_name": "m.json", "ranking": True, "split": "test", "subset": "sub"}
    entries = {"mine": entry, "old": {"script_url": "old.py", "file_name": "m.json"}, "here": {"file_name": "m.json"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))
    found = converted(tmp_path, LLAMA_FACTORY)
    section = {"hub": "org/pairs", "hub_split": "test", "subset": "sub", "layout": "alpaca_pairs"}
    assert (found["config"]["data"], found["to_do"]) == (section, [])
    assert found["not_carried_over"]["mine: file_name"] == "LLaMA-Factory reads hf_hub_url in its place"
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, LLAMA_FACTORY.replace("mine", "mine, here") + "streaming: true\neval_dataset: here\n")
    assert found["config"]["data"] == {**section, "streaming": True}
    assert "streaming" not in found["not_carried_over"]
    assert found["config"]["eval_data"] == {"files": "data/m.json", "layout": "alpaca_pairs"}
    assert "left out data/m.json" in found["to_do"][0]
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, LLAMA_FACTORY.replace("mine", "old"))
    assert "script_url, old.py" in found["to_do"][0]
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, LLAMA_FACTORY.replace("mine", "org/pairs") + "dataset_dir: ONLINE\n")
    assert found["config"]["data"] == {"hub": "org/pairs", "layout": "alpaca_pairs"}


def test_the_repository_that_a_model_is_pushed_to(tmp_path):
    pushed = "push_to_hub: true\nhub_model_id: org/mine\nhub_private_repo: true\n"
    found = converted(tmp_path, TRL_HUB + pushed)
    assert (found["config"]["push_to_hub"], found["config"]["hub_private_repo"]) == ("org/mine", True)
    assert not {"push_to_hub", "hub_model_id", "hub_private_repo"} & found["not_carried_over"].keys()
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, TRL_HUB + pushed.replace("org/", ""))
    assert not {"push_to_hub", "hub_private_repo"} & found["config"].keys()
    assert found["to_do"][0].startswith("push_to_hub:")
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, TRL_HUB + pushed.replace("push_to_hub: true", "push_to_hub: false"))
    assert found["not_carried_over"].keys() >= {"hub_model_id", "hub_private_repo"}
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, f"{AXOLOTL_HUB}hub_model_id: org/mine\noptim: adafactor\n")  # it is private there
    assert (found["config"]["push_to_hub"], found["config"]["hub_private_repo"]) == ("org/mine", True)
    assert found["not_carried_over"] == {"optim": "not a key of axolotl; optim is one here"}


def test_trackers_that_are_turned_on_by_keys_of_their_own(tmp_path):
    keys = "use_tensorboard: true\nmlflow_experiment_name: safety\nmlflow_run_name: first\nuse_wandb: false\n"
    found = converted(tmp_path, AXOLOTL_HUB + keys)
    ours = load_config(AlignConfig, tmp_path / "ours.yaml")
    assert (set(ours.report_to), ours.project, ours.run_name) == ({"mlflow", "tensorboard"}, "safety", "first")
    assert found["not_carried_over"] == {}
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, f"{AXOLOTL_HUB}{keys}trackio_project_name: other\n")
    assert found["config"]["report_to"] == ["mlflow", "tensorboard", "trackio"]
    assert found["not_carried_over"] == {"trackio_project_name": "one for all trackers: safety"}
    (tmp_path / "ours.yaml").unlink()
    found = converted(tmp_path, f"{LLAMA_FACTORY}report_to: all\nuse_swanlab: true\nswanlab_run_name: first\n")
    assert (found["config"]["report_to"], found["config"]["run_name"]) == (["swanlab"], "first")
    assert found["not_carried_over"]["report_to"] == "all: name the trackers"


@pytest.mark.parametrize("theirs", [AXOLOTL, LLAMA_FACTORY])
@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("warmup_steps: 10", 10),
        ("warmup_steps: 0", 0),
        ("warmup_ratio: 0.2", 0.2),
        ("warmup_steps: 10\nwarmup_ratio: 0.2", 10),
        ("warmup_steps: 0\nwarmup_ratio: 0.2", 0.2),
    ],
)
def test_a_warm_up_is_that_of_the_file_and_steps_go_before_a_share(tmp_path, theirs, given, ours):
    found = converted(tmp_path, f"{theirs.replace('warmup_ratio: 0.1', '')}\n{given}\n")
    assert found["config"]["warmup_steps"] == ours


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: 1\n", "known library"),
        ("model: m\ndata: {files: x}\n", "needs no conversion"),
        ("base_model: m\nrl: orpo\nlearning_rate: 1.0e-6\n", "rl"),
        ("model_name_or_path: m\nstage: ppo\n", "stage"),
        ("base_model: m\nrl: kto\n", "unpaired"),
        ("model_name_or_path: m\nstage: kto\n", "unpaired"),
        ("base_model: m\nrl: dpo\nlearning_rate: fast\n", "learning_rate"),
        ("- 1\n", "known library"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, text, key):
    (tmp_path / "theirs.yaml").write_text(text)
    fails(convert(Path("theirs.yaml")), key)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("base_model: m\nrl: dpo\ndatasets: some/text\n", "datasets"),
        ("base_model: m\nrl: dpo\ndatasets: [{path: a/b}, 3]\n", "datasets"),
        ("base_model: m\nrl: dpo\ndatasets: 3\n", "datasets"),
        ("model_name_or_path: m\nstage: dpo\ndataset: a\ndataset_dir: .\n", "a"),
        ("model_name_or_path: m\nstage: dpo\ndataset: b\ndataset_dir: .\n", "b: columns"),
    ],
)
def test_data_sets_that_are_no_mappings_are_refused(tmp_path, text, key):
    (tmp_path / "dataset_info.json").write_text('{"a": "text", "b": {"columns": ["prompt"]}}')
    (tmp_path / "theirs.yaml").write_text(text)
    fails(convert(Path("theirs.yaml")), f"{key}: got")


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "theirs.yaml").write_text(AXOLOTL)
    (tmp_path / "ours.yaml").write_text("mine")
    fails(convert(Path("theirs.yaml"), "--out", "ours.yaml"), "--out")
    assert (tmp_path / "ours.yaml").read_text() == "mine"


def test_the_table_of_the_page_is_that_of_the_code():
    page = (ROOT / "docs" / "migration.md").read_text()
    lines = ["| " + " | ".join(row) + " |" for row in table_rows()]
    assert len(lines) == len(ROWS)
    assert "\n".join(lines) in page


def test_every_key_of_the_table_is_one_of_ours():
    ours = {*AlignConfig.model_fields, *SftConfig.model_fields}
    assert {name for row in ROWS for name in (row.ours, row.sft) if name} <= ours
