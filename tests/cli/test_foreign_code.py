"""No command runs Python code, kernels or pickles that come with a model, whatever is typed at a question."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import AlignConfig
from bfpo.core.errors import ModelError, RunError
from bfpo.policy.load import load_policy
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from bfpo.training import callbacks
from messages import fails, raises
from tiny import tiny_model, tiny_tokenizer

CODE = "from pathlib import Path\nPath({mark!r}).write_text('ran')\nclass C:\n    pass\n"
CLASSES = {
    "AutoConfig": "foreign.C",
    "AutoModelForCausalLM": "foreign.C",
    "AutoModelForSequenceClassification": "foreign.C",
    "AutoModelForImageTextToText": "foreign.C",
}


class Inputs:
    """A plain model, one with Python code, and the files that the commands need."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mark = root / "ran"
        save_policy(tiny_model(), tiny_tokenizer(), self.plain)
        self.foreign.mkdir()
        for file in self.plain.iterdir():
            shutil.copy(file, self.foreign)
        (self.foreign / "foreign.py").write_text(CODE.format(mark=str(self.mark)))
        self.edit("config.json", model_type="foreign", architectures=["C"], auto_map=CLASSES)
        classes = {"AutoTokenizer": ["foreign.C", "foreign.C"]}
        self.edit("tokenizer_config.json", tokenizer_class="C", auto_map=classes)
        labels = {"chosen_is_safe": True, "rejected_is_safe": True}
        self.rows("pairs", [{"prompt": f"w{n}", "chosen": "w1 w2", "rejected": "w3", **labels} for n in range(4)])
        self.rows("prompts", [{"id": "1", "prompt": "w1", "kind": "harmful"}])
        answers = [{"id": f"{n}", "prompt": "w1", "completion": f"w{n}", "is_safe": n % 2 > 0} for n in range(4)]
        self.rows("answers", answers)
        data = {"data": {"files": str(root / "pairs.jsonl")}}
        self.write("train.yaml", model=str(self.foreign), **data)
        self.write("generate.yaml", prompts=str(root / "prompts.jsonl"))

    @property
    def plain(self) -> Path:
        return self.root / "plain"

    @property
    def foreign(self) -> Path:
        return self.root / "foreign"

    def edit(self, name: str, **keys: Any) -> None:
        path = self.foreign / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    def training(self) -> AlignConfig:
        data = {"files": str(self.root / "pairs.jsonl")}
        steps = {"max_steps": 1, "pairs_per_step": 2, "reference_cache": str(self.root / "cache")}
        return AlignConfig.model_validate({"model": str(self.plain), "data": data, **steps})

    def rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(self, name: str, **keys: Any) -> None:
        (self.root / name).write_text(json.dumps(keys))


@pytest.fixture(scope="module")
def trained(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step, with its checkpoint."""
    return run_stage("train", inputs.training(), tmp_path_factory.mktemp("trained") / "run").path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("foreign"))


PAIRS, PROMPTS, ANSWERS = "data.files=pairs.jsonl", "prompts=prompts.jsonl", "completions=answers.jsonl"
COMMANDS: dict[str, list[str]] = {
    "doctor": ["doctor", "--config", "train.yaml"],
    "train": ["train", "--config", "train.yaml"],
    "train from margins": ["train", "model=plain", "margin_model=foreign", "method=modpo", PAIRS],
    "sweep": [
        "sweep", "--dry-run", "train=train.yaml", "generate=generate.yaml", "grid=beta=0.1",
        "objectives=[harmless, finished]",
    ],
    "evaluate": ["evaluate", "model=foreign", "reference=plain", PAIRS],
    "evaluate, the reference": ["evaluate", "model=plain", "reference=foreign", PAIRS],
    "evaluate, suites": ["evaluate", "model=foreign", "suites.use=demo"],
    "evaluate, judge": ["evaluate", ANSWERS, "judge=llama-guard-3:foreign"],
    "generate": ["generate", "model=foreign", PROMPTS],
    "generate, dry run": ["generate", "--dry-run", "model=foreign", PROMPTS],
    "sft from random weights": ["sft", "init={tokenizer: foreign, config: {}}", "data.files=answers.jsonl"],
    "sft": ["sft", "model=foreign", "data.files=answers.jsonl", "data.unknown_label=safe", "max_steps=1"],
    "reference": ["reference", "--config", "train.yaml"],
    "label": ["label", ANSWERS, "judges=llama-guard-3:foreign"],
    "label, image-text": ["label", ANSWERS, "judges=[{format: llama-guard-4, model: foreign}]"],
    "label, classifier": ["label", ANSWERS, "judges=[{format: classifier, model: foreign, safe_label: 1}]"],
    "label, ranker": ["label", ANSWERS, "judges=refusal-phrases", "ranker=reward-model:foreign"],
    "label, PairRM": ["label", ANSWERS, "judges=refusal-phrases", "ranker={format: pairrm, model: foreign}"],
    "judge-train": ["judge-train", "kind=classifier", "model=foreign", "data.files=answers.jsonl"],
    "judge-check": ["judge-check", "judge=llama-guard-3:foreign", "data.files=answers.jsonl"],
    "redteam": ["redteam", "model=foreign", PROMPTS, "judges=oracle", "ranker=oracle"],
    "interpolate": ["interpolate", "first=foreign", "second=foreign"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_code_of_a_model_is_not_run(name: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs.root)
    command, *rest = COMMANDS[name]
    options = [part for text in rest for part in (["--set", text] if "=" in text else [text])]
    out = [] if command == "doctor" or "--dry-run" in rest else ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [command, *options, *out], input="y\n" * 20)
    assert not inputs.mark.exists()
    result.stderr_bytes = result.stderr_bytes[result.stderr_bytes.rindex(b"error: ") :]  # without lines of the log
    fails(result, "foreign", "auto_map")


class Payload:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.mark, "ran")


@pytest.fixture
def copy(inputs: Inputs, tmp_path: Path) -> Path:
    """A copy of the plain model."""
    return Path(shutil.copytree(inputs.plain, tmp_path / "copy"))


def test_a_known_architecture_with_code_beside_it_is_loaded_without_the_code(inputs: Inputs, copy: Path) -> None:
    shutil.copy(inputs.foreign / "foreign.py", copy)
    (copy / "custom_generate").mkdir()
    shutil.copy(inputs.foreign / "foreign.py", copy / "custom_generate" / "generate.py")
    for name, classes in (("config.json", CLASSES), ("tokenizer_config.json", {"AutoTokenizer": ["foreign.C", None]})):
        described = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**described, "auto_map": classes}))
    assert type(load_policy(copy).model).__module__.startswith("transformers.")
    assert not inputs.mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_named_in_a_config_is_refused(key: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**described, key: "someone/kernel"}))
    if AutoConfig.from_pretrained(copy, trust_remote_code=False)._attn_implementation != "someone/kernel":
        pytest.skip("this transformers does not read the key")  # 5.0 puts its own argument in its place
    monkeypatch.setattr("bfpo.policy.load.AutoModelForCausalLM.from_pretrained", None)  # not reached
    with raises(ModelError, "someone/kernel"):
        load_policy(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_weights_in_a_pickle_are_refused(name: str, inputs: Inputs, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict() | {"more": Payload(inputs.mark)}, copy / name)
    rows = str(inputs.root / "answers.jsonl")
    classifier = f"judges=[{{format: classifier, model: {copy}, safe_label: 1}}]"
    for command in (
        ["generate", "--set", f"model={copy}", "--set", f"prompts={inputs.root / 'prompts.jsonl'}"],
        ["label", "--set", f"completions={rows}", "--set", classifier],
        ["label", "--set", f"completions={rows}", "--set", "judges=oracle", "--set", f"ranker=reward-model:{copy}"],
        ["judge-train", "--set", "kind=classifier", "--set", f"model={copy}", "--set", f"data.files={rows}"],
        ["interpolate", str(copy), str(inputs.plain)],
    ):
        result = CliRunner().invoke(app, [*command, "--out", str(copy.parent / command[0])])
        assert result.exit_code == 2, result.stderr
        assert "safetensors" in result.stderr
    assert not inputs.mark.exists()


def test_an_adapter_is_read_from_safetensors_only_and_its_base_is_checked(inputs: Inputs, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_policy(tiny_model(), tiny_tokenizer(), adapter)
    for name in ("config.json", "model.safetensors"):
        (adapter / name).unlink()
    described = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(inputs.plain),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(inputs.mark)))
    with raises(ModelError, "adapter_model.safetensors"):
        load_policy(adapter)
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    with raises(ModelError, "safetensors"):
        load_policy(adapter)
    (adapter / "adapter_config.json").write_text(
        json.dumps({**described, "base_model_name_or_path": str(inputs.foreign)})
    )
    with raises(ModelError, "auto_map"):
        load_policy(adapter)
    assert not inputs.mark.exists()


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "model.bin", "deep"]
)
def test_a_checkpoint_is_read_without_building_objects(
    name: str, inputs: Inputs, trained: Path, tmp_path: Path
) -> None:
    config = inputs.training()
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "model")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"interrupted"'))
    checkpoint = run / "checkpoints" / "checkpoint-1"
    if name == "deep":
        (checkpoint / "trainer_state.json").write_text("[" * 100_000)
    elif name == "model.bin":
        (checkpoint / "trained.safetensors").unlink()
        torch.save(Payload(inputs.mark), checkpoint / "pytorch_model.bin")
    else:
        torch.save({"state": Payload(inputs.mark)}, checkpoint / name)
    callbacks._mark(checkpoint)
    if name in ("training_args.bin", "rng_state.pth"):  # not read, as training was at its end
        run_stage("train", config, run, resume=True)
    else:
        with raises(RunError, "checkpoints"):
            run_stage("train", config, run, resume=True)
    assert not inputs.mark.exists()
