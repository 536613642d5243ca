"""The loss of `bfpo sft` is the mean over completion tokens, however a step is cut, and costs what it must."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainingArguments

import bfpo.data.store
import bfpo.data.tokenize
import bfpo.policy.logps
from bfpo.core.errors import TrainingError
from bfpo.data.load import CompletionStream
from bfpo.data.pack import PairCollator, split_by_tokens
from bfpo.data.settings import SftDataConfig
from bfpo.data.store import TokenStore, write_tokens
from bfpo.data.streams import TwoStreamDataset
from bfpo.data.tokenize import PairTokenizer, TokenPair
from bfpo.policy.head import CHUNK_ROWS
from bfpo.policy.load import choose_trainable
from bfpo.runs.stages import run_stage
from bfpo.training.sft_trainer import SampleLoss, SftTrainer
from helpers import byte_tokenizer, write_rows
from messages import raises
from survival import run_in_two, stage_config, write_inputs
from tiny import VOCABULARY, logp, tiny_model, tiny_tokenizer

# Tokens of prompt and completion: the least that there can be, long against short both ways, more than a chunk of the
# head.
ODD = ((1, 1), (9, 1), (1, 7), (4, 4), (17, 5), (2, CHUNK_ROWS + 37), (3, 2))


def texts(lengths: Any = ODD) -> list[TokenPair]:
    rng = np.random.default_rng(0)

    def ids(num: int) -> Any:
        return rng.integers(3, VOCABULARY, size=num).astype(np.int32)

    return [
        TokenPair(f"text-{n}", ids(prompt), ids(answer), ids(0), 1.0, 1.0) for n, (prompt, answer) in enumerate(lengths)
    ]


def trainer(folder: Path, model: Any, data: Any, **settings: Any) -> SftTrainer:
    names = ("attention", "max_tokens_per_microbatch", "completions_per_microbatch", "eval_dataset")
    own = {name: settings.pop(name) for name in names if name in settings}
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": len(data),
        "max_steps": 1,
        "learning_rate": 1.0,  # with plain descent the change of the weights is the gradient
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "report_to": "none",
    }
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    made = SftTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer(), **own)
    made.remove_callback(PrinterCallback)
    return made


def by_the_definition(model: Any, data: list[TokenPair]) -> torch.Tensor:
    num_tokens = sum(len(text.chosen_ids) for text in data)
    return -torch.stack([logp(model, text.prompt_ids, text.chosen_ids) for text in data]).sum() / num_tokens


@pytest.mark.parametrize("trainable", ["all", ["*.down_proj.weight"]])
@pytest.mark.parametrize(
    "cut",
    [
        {"attention": "packed", "max_tokens_per_microbatch": None},
        {"attention": "padded", "max_tokens_per_microbatch": None},
        {"attention": "packed", "max_tokens_per_microbatch": 24},
        {"attention": "padded", "max_tokens_per_microbatch": 24},
        {"attention": "packed", "completions_per_microbatch": 2},
        {"attention": "packed", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ],
)
def test_value_and_gradient_are_those_of_the_definition(tmp_path: Path, cut: dict[str, Any], trainable: Any) -> None:
    model, data = tiny_model(dtype=torch.float64), texts()
    choose_trainable(model, trainable)
    expected = by_the_definition(model, data)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = trainer(tmp_path, model, data, **cut)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-12)
    assert gradients
    for name, parameter in model.named_parameters():
        found = before[name] - parameter.detach()
        wanted = gradients.get(name, torch.zeros_like(found))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_the_held_out_loss_is_the_mean_over_all_its_tokens(tmp_path: Path, attention: str) -> None:
    model, data = tiny_model(dtype=torch.float64), texts()
    settings = {"attention": attention, "max_tokens_per_microbatch": 30, "per_device_eval_batch_size": 3}
    made = trainer(tmp_path, model, data[:2], eval_dataset=data, **settings)
    with torch.no_grad():
        expected = float(by_the_definition(model, data))
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-12)


def test_each_token_is_computed_once_and_each_completion_token_predicted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[int, ...]] = []
    heads: list[int] = []
    inner = bfpo.policy.logps.head_logps

    def counted(head: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads.append(len(hidden))
        return inner(head, hidden, *args, **kwargs)

    monkeypatch.setattr(bfpo.policy.logps, "head_logps", counted)
    model, data = tiny_model(), texts()
    made = trainer(tmp_path, model, data, attention="packed", max_tokens_per_microbatch=30)
    made.checks_start = False
    heads.clear()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape)))
    made.train()
    assert sum(math.prod(shape) for shape in rows) == sum(len(t.prompt_ids) + len(t.chosen_ids) for t in data)
    assert sum(heads) == sum(len(text.chosen_ids) for text in data)
    assert all(shape[0] == 1 for shape in rows)
    assert sorted(shape[1] for shape in rows)[:-1] == [25, 30]  # full rows, and a longer text by itself
    assert max(shape[1] for shape in rows) == 2 + CHUNK_ROWS + 37


def test_bounds_of_tokens_and_of_completions_hold_together() -> None:
    lengths = [(2, 3, 0)] * 7
    for form in ("packed", "padded"):
        cut = split_by_tokens(lengths, form=form, max_tokens=15, max_pairs=2)  # type: ignore[arg-type]
        assert [len(group) for group in cut] == [2, 2, 2, 1]
        cut = split_by_tokens(lengths, form=form, max_tokens=10, max_pairs=4)  # type: ignore[arg-type]
        assert [len(group) for group in cut] == [2, 2, 2, 1]
        cut = split_by_tokens(lengths, form=form, max_tokens=None, max_pairs=3)  # type: ignore[arg-type]
        assert [len(group) for group in cut] == [3, 3, 1]
        assert sorted(place for group in cut for place in group) == list(range(7))


def test_rows_that_are_not_those_of_the_data_stop_the_first_step(tmp_path: Path) -> None:
    class Turned(PairCollator):
        def microbatches(self, pairs: Any, indices: Any, num_main: int) -> Any:
            return PairCollator.microbatches(self, [*pairs[1:], pairs[0]], indices, num_main)

    made = trainer(tmp_path, tiny_model(), texts(((3, 4), (5, 6))))
    made.data_collator = Turned(0, "packed")
    with raises(TrainingError, "text-0"):
        made.train()


def test_a_model_with_dropout_passes_the_check_of_its_rows(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny_model(attention_dropout=0.5), texts(), attention="packed", learning_rate=1e-3)
    made.train()
    assert math.isfinite(made.state.log_history[0]["loss"])


def test_a_run_shorter_than_its_interval_of_logs_has_a_loss(tmp_path: Path) -> None:
    model, data = tiny_model(dtype=torch.float64), texts()
    with torch.no_grad():
        expected = float(by_the_definition(model, data))
    made = trainer(tmp_path, model, data, logging_steps=10)
    made.train()
    (row,) = made.state.log_history
    assert row["loss"] == row["train_loss"] == pytest.approx(expected, rel=1e-12)


def test_the_same_rows_are_scored_before_the_first_step_and_at_the_end(tmp_path: Path) -> None:
    """Without dropout, and without a change of what is trained: its random numbers would be others."""
    data, trained = texts(), []
    for scored in (True, False):
        model = tiny_model(attention_dropout=0.5, dtype=torch.float64)
        made = trainer(tmp_path, model, data, max_tokens_per_microbatch=24, max_steps=3, learning_rate=0.1)
        sample = SampleLoss(made, num=5)
        with torch.no_grad():
            ends = [float(by_the_definition(model.eval(), [data[place] for place in sample._places]))]
        if scored:
            made.add_callback(sample)
        torch.manual_seed(0)
        made.train()
        trained.append([parameter.detach().clone() for parameter in model.parameters()])
        if scored:
            sample.score()
            with torch.no_grad():
                ends.append(float(by_the_definition(model.eval(), [data[place] for place in sample._places])))
            rows = [row for row in made.state.log_history if "sample_loss" in row]
            assert [row["step"] for row in rows] == [0, 3]
            assert [row["sample_loss"] for row in rows] == pytest.approx(ends, rel=1e-12)
            assert ends[1] < ends[0]
    for one, two in zip(*trained, strict=True):
        assert torch.equal(one, two)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """10 completions in steps of 4: the loader repeats rows at the end of an epoch, and no loss may count them."""
    inputs = write_inputs(tmp_path / "inputs")
    epochs = {"max_steps": None, "num_train_epochs": 2, "logging_steps": 1, "eval_steps": 2, "dtype": "float64"}
    config = stage_config("sft", inputs, **epochs, completions_per_microbatch=None, max_tokens_per_microbatch=16)
    run_stage("sft", config, tmp_path / "one")
    told = run_in_two("sft", config, tmp_path / "two")
    assert all(isinstance(each, list) for each in told), told
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for first, second in zip(one, two, strict=True):
        for name in first.keys() & {"loss", "eval_loss", "train_loss", "grad_norm", "sample_loss"}:
            assert second[name] == pytest.approx(first[name], rel=1e-9), name
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-9)


def test_memory_of_the_data_is_flat_in_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes a row that stay: lengths and places. The ids of a row take 1,600, and in Python lists 48 a token."""
    monkeypatch.setattr(bfpo.data.store, "_PAIRS_PER_BLOCK", 128)
    monkeypatch.setattr(bfpo.data.tokenize, "_ROWS_PER_BATCH", 32)
    tokenizer = byte_tokenizer()
    kept, peak = {}, {}

    def passes(num: int) -> Iterator[TokenStore]:
        rows = ({"prompt": f"q{i} " + "w" * 150, "completion": f"a{i} " + "v" * 250} for i in range(num))
        stream = CompletionStream(SftDataConfig(files=[str(write_rows(tmp_path / f"{num}.jsonl", rows))]))
        tracemalloc.start()
        store = write_tokens(tmp_path / f"{num}.arrow", PairTokenizer(tokenizer)(stream), {})
        data, collate = TwoStreamDataset(store), PairCollator(0)
        assert sum(len(collate([data[i]])["microbatches"][0]["targets"]) for i in range(num)) > 250 * num
        yield store

    for num in (128, 128, 640):  # the first time, what Python keeps once is made
        for store in passes(num):
            assert store.lengths.sum() > 400 * num
            kept[num], peak[num] = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    found = {name: (of[640] - of[128]) / 512 for name, of in (("kept", kept), ("peak", peak))}
    assert found["kept"] < 400, found
    assert found["peak"] < 800, found
