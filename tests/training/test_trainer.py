from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from bfpo.core.errors import SettingError, TrainingError
from bfpo.data.labels import CELLS
from bfpo.data.store import write_tokens
from bfpo.data.tokenize import TokenPair
from bfpo.policy import probe
from bfpo.policy.load import load_policy
from bfpo.policy.logps import unwrap_causal_lm
from bfpo.policy.save import save_policy
from bfpo.training.trainer import BFPOConfig, BFPOTrainer
from messages import raises
from tiny import logp, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer


def expected_pair_loss(model: Any, start: Any, pair: TokenPair, *, beta: float, anchor_weight: float) -> Tensor:
    """The paper's loss of one pair, and the anchor, written out."""
    chosen, rejected = (logp(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids))
    with torch.no_grad():
        ref_chosen, ref_rejected = (logp(start, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids))
    target = 1.5 * pair.chosen_is_safe - 0.5 * pair.rejected_is_safe - 0.5
    loss = ((chosen - ref_chosen) - (rejected - ref_rejected) - target / beta) ** 2
    favoured, ids, is_safe = (
        (chosen, pair.chosen_ids, pair.chosen_is_safe)
        if target > 0
        else (rejected, pair.rejected_ids, pair.rejected_is_safe)
    )
    return loss + anchor_weight / beta**2 * is_safe * -favoured / len(ids)


def moved(model: Any) -> Any:
    """Another point of the same model, so that margins are not zero."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("anchor_weight", [0.0, 0.7])
def test_loss_and_gradient_of_a_step_on_two_streams(tmp_path: Path, anchor_weight: float) -> None:
    main, buffer = tiny_pairs(5, 1), tiny_pairs(5, 2)
    trainer = tiny_trainer(
        tmp_path,
        main=main,
        buffer=buffer,
        model=tiny_model(dtype=torch.float64),
        buffer_weight=0.25,
        anchor_weight=anchor_weight,
    )
    start = tiny_model(dtype=torch.float64)
    model = moved(trainer.model).train()
    items = [trainer.train_dataset[i] for i in range(5)]
    loss = trainer.compute_loss(model, trainer.data_collator(items)["microbatches"][0])
    loss.backward()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    settings = {"beta": 0.1, "anchor_weight": anchor_weight}
    pairs_of = {"main": main, "buffer": [item.buffer for item in items]}
    means = {
        name: torch.stack([expected_pair_loss(model, start, pair, **settings) for pair in pairs]).mean()
        for name, pairs in pairs_of.items()
    }
    expected = means["main"] + 0.25 * means["buffer"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-6, atol=1e-6 * float(parameter.grad.norm()))


@pytest.mark.parametrize("reference", ["precompute", "swap"])
def test_pairs_on_disk_train_as_those_in_a_list(tmp_path: Path, reference: str) -> None:
    weights = []
    for kept in (list, lambda pairs: write_tokens(tmp_path / f"{pairs[0].pair_id}.arrow", pairs)):
        streams = {
            "main": kept(tiny_pairs(8, 1)),
            "buffer": kept(tiny_pairs(3, 2)),
            "eval_dataset": kept(tiny_pairs(4, 3)),
        }
        trainer = tiny_trainer(tmp_path, **streams, reference=reference)
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        weights[-1].append(torch.tensor(trainer.evaluate()["eval_loss"]))
    assert all(map(torch.equal, *weights))


def test_reduction_mean_divides_by_the_tokens_of_each_completion(tmp_path: Path) -> None:
    main = tiny_pairs(4, 3)
    trainer = tiny_trainer(tmp_path, main=main, model=tiny_model(dtype=torch.float64), reduction="mean", method="ipo")
    start, model = tiny_model(dtype=torch.float64), moved(trainer.model).train()
    loss = trainer.compute_loss(model, one_microbatch(trainer, range(4)))
    losses = []
    for pair in main:
        ratios = [
            (logp(model, pair.prompt_ids, ids) - logp(start, pair.prompt_ids, ids)) / len(ids)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        losses.append((ratios[0] - ratios[1] - 0.5 / 0.1) ** 2)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-9, atol=0)


def one_microbatch(trainer: BFPOTrainer, indices: Any) -> Any:
    (microbatch,) = trainer.data_collator([trainer.train_dataset[i] for i in indices])["microbatches"]
    return microbatch


class LogCollector(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(logs))


def test_logs_by_stream_and_cell(tmp_path: Path) -> None:
    main, buffer = tiny_pairs(8, 4), tiny_pairs(3, 5, cells="safe")
    collector = LogCollector()
    trainer = tiny_trainer(tmp_path, main=main, buffer=buffer, callbacks=[collector], max_steps=2)
    trainer.train()
    first = collector.rows[0]
    assert first["main/num_pairs"] == first["buffer/num_pairs"] == 4
    assert first["buffer/safe-safe/num_pairs"] == 4
    assert "buffer/unsafe-safe/num_pairs" not in first
    cells = [name for name in first if name.startswith("main/") and name.endswith("-safe/num_pairs")]
    assert (
        sum(first[name] for name in first if name.startswith("main/") and name.count("/") == 2 and name in cells) <= 4
    )
    assert first["buffer/normalised_loss"] == pytest.approx(0.25, rel=1e-4)
    assert first["loss"] == pytest.approx(first["main/loss"] + first["buffer/loss"], rel=1e-5)
    assert first["main/normalised_loss"] == pytest.approx(first["main/loss"] * 0.1**2)
    assert first["main/normalised_loss"] == pytest.approx(first["main/loss_at_start"], rel=1e-4)
    assert collector.rows[1]["buffer/favoured_drift"] > 0
    # Before the first update every margin is 0 up to rounding: neither right nor wrong.
    assert first["main/accuracy"] == first["buffer/accuracy"] == 0.5
    assert first["main/tied_pairs"] == first["buffer/tied_pairs"] == 4
    assert not any(name in first for name in ("preference_loss", "anchor_loss"))


@pytest.mark.parametrize("method", ["bfpo", "dpo_h"])
def test_the_ratio_to_the_start_is_of_the_loss_without_the_anchor(tmp_path: Path, method: str) -> None:
    main, buffer = tiny_pairs(8, 4), tiny_pairs(8, 5, cells="safe")
    collector = LogCollector()
    settings = {"method": method, "anchor_weight": 2.0, "buffer_weight": 0.25, "learning_rate": 1e-2}
    trainer = tiny_trainer(
        tmp_path, main=main, buffer=buffer, callbacks=[collector], max_steps=6, logging_steps=2, **settings
    )
    trainer.train()
    rows = [row for row in collector.rows if "loss_over_start" in row and "learning_rate" in row]
    assert len(rows) == 3
    scale = 0.1**2 if method == "bfpo" else 1.0
    for row in rows:
        observed = row["main/loss"] + 0.25 * row["buffer/loss"]
        implied = (row["main/loss_at_start"] + 0.25 * row["buffer/loss_at_start"]) / scale
        pull = 2.0 / scale * (row["main/anchor"] + 0.25 * row["buffer/anchor"])
        assert row["loss_over_start"] == pytest.approx(observed / implied, rel=1e-9)
        assert row["preference_loss"] == pytest.approx(observed, rel=1e-9)
        assert row["anchor_loss"] == pytest.approx(pull, rel=1e-9)
        assert row["loss"] == pytest.approx(observed + pull, rel=1e-6)
    # A loss of half its start is called that, though the anchor is most of the sum.
    assert rows[-1]["loss_over_start"] != pytest.approx(rows[-1]["loss"] / rows[0]["loss"], rel=0.01)


def test_evaluation_by_cell(tmp_path: Path) -> None:
    held_out = tiny_pairs(7, 6)
    trainer = tiny_trainer(tmp_path, eval_dataset=held_out, max_steps=4, learning_rate=5e-3)
    trainer.train()
    metrics = trainer.evaluate()
    start, model = tiny_model(), trainer.model
    right, losses = [], []
    with torch.no_grad():
        for pair in held_out:
            drift = [
                float(logp(model, pair.prompt_ids, ids) - logp(start, pair.prompt_ids, ids))
                for ids in (pair.chosen_ids, pair.rejected_ids)
            ]
            target = 1.5 * pair.chosen_is_safe - 0.5 * pair.rejected_is_safe - 0.5
            right.append((drift[0] - drift[1]) * target > 0)
            losses.append((drift[0] - drift[1] - target / 0.1) ** 2)
    assert metrics["eval_num_pairs"] == 7
    assert metrics["eval_accuracy"] == pytest.approx(sum(right) / 7)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 7, rel=1e-4)
    assert sum(metrics.get(f"eval_{cell}/num_pairs", 0) for cell in CELLS) == 7


# ------------------------------------------------------------------------------------------- a wrong wiring stops


class DoubledLoss(BFPOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


class OwnLoss(BFPOTrainer):
    """A loss that is not ours, and hands nothing on."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        figures, _ = self.pair_losses(model, inputs)
        return 0.0 * figures.margin.sum() + model.get_input_embeddings().weight.sum() * 0.0


class ForeignReference:
    """Log-probs of some other model."""

    def logps(self, model: Any, batch: Any) -> Tensor:
        return -20.0 * torch.bincount(batch["sequence"]).double()


class SwappedRows(BFPOTrainer):
    """Chosen and rejected change places: at margin 0 no loss shows it."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        for microbatch in inputs["microbatches"]:
            num_pairs = len(microbatch["pair_index"])
            microbatch["sequence"] = (microbatch["sequence"] + num_pairs) % (2 * num_pairs)
        return super().training_step(model, inputs, num_items_in_batch)


class SwappedLabels(BFPOTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        for microbatch in inputs["microbatches"]:
            chosen, rejected = microbatch["chosen_is_safe"], microbatch["rejected_is_safe"]
            microbatch["chosen_is_safe"], microbatch["rejected_is_safe"] = rejected, chosen
        return super().training_step(model, inputs, num_items_in_batch)


FIGURES = r"(?<=the loss is )[\d.]+|(?<=largest \|margin\| is )[\d.]+(?:e-\d+)?|-[\d.]+(?= in a (packed )?row)"


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer": DoubledLoss},
        {"trainer": OwnLoss},
        {"reference": ForeignReference()},
        {"trainer": SwappedRows},
        {"trainer": SwappedLabels, "main": tiny_pairs(12, cells="conflict")},
    ],
)
@pytest.mark.parametrize("method", ["bfpo", "safedpo"])
def test_a_wrong_wiring_stops_before_the_first_update(tmp_path: Path, settings: dict[str, Any], method: str) -> None:
    trainer = tiny_trainer(tmp_path, method=method, **settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with raises(TrainingError, mask=FIGURES):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_dropout_is_found_by_the_first_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, model=tiny_model(attention_dropout=0.5), reference="swap")
    with raises(TrainingError, mask=FIGURES):
        trainer.train()


def mixing(model: Any) -> Any:
    """Let each token of a row change the next one outside attention, as a convolution does."""

    def mix(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        mixed = hidden + 0.3 * torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    causal_lm = unwrap_causal_lm(model)
    causal_lm.model.layers[0].register_forward_hook(mix)
    return model


@pytest.mark.parametrize("reference", ["swap", "adapter_off"])
def test_rows_that_disturb_each_other_are_found_under_every_reference(
    tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped weights see the same rows as the policy: the margin is 0 whatever the rows do."""
    monkeypatch.setattr(probe, "_check_exactly", lambda *_: None)
    monkeypatch.setattr(probe, "_check_packed", lambda *_: set())
    model = tiny_model()
    if reference == "adapter_off":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = tiny_trainer(tmp_path, model=mixing(model), reference=reference)
    assert trainer.form == "packed"
    with raises(TrainingError, "attention", mask=FIGURES):
        trainer.train()
    padded = tiny_trainer(tmp_path / "padded", model=mixing(tiny_model()), attention="padded", max_steps=1)
    padded.train()


def test_the_check_of_the_start_can_be_left_out(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, trainer=DoubledLoss, check_start=False).train()


@pytest.mark.parametrize(
    "method", ["bfpo", "ipo", "dpo_h", "dpo_s", "dpo_mix", "dpo_safe_first", "safedpo", "bso", "linear_sum"]
)
@pytest.mark.parametrize("anchor_weight", [0.0, 0.5])
def test_every_method_passes_the_check(tmp_path: Path, method: str, anchor_weight: float) -> None:
    buffer = tiny_pairs(12, 8, cells="safe")
    tiny_trainer(tmp_path, buffer=buffer, method=method, anchor_weight=anchor_weight, max_steps=1).train()


def test_logps_that_are_not_finite_name_the_pair(tmp_path: Path) -> None:
    main = tiny_pairs(4)
    trainer = tiny_trainer(tmp_path, main=main)
    with torch.no_grad():
        trainer.model.lm_head.weight[int(main[2].chosen_ids[0])] = float("inf")
    with raises(TrainingError):
        trainer.train()


# ------------------------------------------------------------------------------------------------- divergence


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.mark.parametrize(("learning_rate", "num_warnings"), [(0.1, 0), (1.0, 1)])
def test_a_tenfold_learning_rate_diverges_and_says_so_once(
    tmp_path: Path, learning_rate: float, num_warnings: int
) -> None:
    records = Records()
    logger = logging.getLogger("bfpo.training")
    logger.addHandler(records)
    try:
        trainer = tiny_trainer(
            tmp_path,
            main=tiny_pairs(16, 7, cells="conflict"),
            max_steps=40,
            logging_steps=5,
            learning_rate=learning_rate,
        )
        trainer.train()
    finally:
        logger.removeHandler(records)
    assert len(records.texts) == num_warnings
    assert trainer.watch is not None
    last = [row for row in trainer.state.log_history if "loss_over_start" in row][-1]
    assert (last["loss_over_start"] > 1) == bool(num_warnings)
    if num_warnings:
        assert "Lower learning_rate: it is 1, try 0.1" in records.texts[0]
        assert trainer.watch.message == records.texts[0]
        assert sum(row.get("diverging", 0) for row in trainer.state.log_history) == 1


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"beta": 0.0}, "beta"),
        ({"method": "bpfo"}, "method"),
        ({"safety_weight": 1.0}, "safety_weight"),
        ({"reduction": "max"}, "reduction"),
        ({"buffer_weight": -1.0}, "buffer_weight"),
        ({"anchor_weight": -0.1}, "anchor_weight"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with raises(SettingError, key):
        BFPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_unknown_reference(tmp_path: Path) -> None:
    with raises(SettingError, "reference"):
        tiny_trainer(tmp_path, reference="frozen")


def test_the_tokenizer_pads_with_its_end_token_where_it_has_no_other(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    assert tiny_tokenizer().pad_token_id is None
    assert trainer.data_collator.pad_token_id == tiny_tokenizer().eos_token_id


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_a_padding_token_that_the_embedding_lacks_is_neither_read_nor_saved(tmp_path: Path, attention: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    args = BFPOConfig(
        str(tmp_path), attention=attention, max_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    trainer = BFPOTrainer(tiny_model(), args, train_dataset=tiny_pairs(4), processing_class=tokenizer)
    trainer.train()
    assert tokenizer.pad_token_id == trainer.model.get_input_embeddings().num_embeddings
    save_policy(trainer.model, tokenizer, tmp_path / "model")
    assert load_policy(tmp_path / "model").model.config.pad_token_id is None


@pytest.mark.parametrize("anchor_weight", [0.0, 0.7])
def test_the_logged_loss_is_the_mean_of_what_the_gradients_are_of(tmp_path: Path, anchor_weight: float) -> None:
    """10 pairs by 4: every third step is a short one, which a mean over pairs would weigh less."""
    settings: dict[str, Any] = {
        "main": tiny_pairs(10, 1),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "buffer_weight": 0.25,
        "anchor_weight": anchor_weight,
        "max_steps": 7,
    }
    rows: dict[int, list[dict[str, float]]] = {}
    for every in (1, 3):
        trainer = tiny_trainer(tmp_path, model=tiny_model(), buffer=tiny_pairs(5, 2), logging_steps=every, **settings)
        trainer.train()
        rows[every] = trainer.state.log_history
    losses = [row["loss"] for row in rows[1] if "loss" in row]
    for row in rows[1][:-1]:
        parts = row["main/loss"] + 0.25 * row["buffer/loss"]
        if anchor_weight:
            parts += anchor_weight / 0.1**2 * (row["main/anchor"] + 0.25 * row["buffer/anchor"])
        assert row["loss"] == pytest.approx(parts, rel=1e-12)
    assert [row["loss"] for row in rows[3] if "loss" in row] == [
        pytest.approx(sum(losses[:3]) / 3, rel=1e-12),
        pytest.approx(sum(losses[3:6]) / 3, rel=1e-12),
        pytest.approx(losses[6], rel=1e-12),
    ]
    assert rows[3][-1]["train_loss"] == pytest.approx(sum(losses) / 7, rel=1e-12)
    assert rows[3][-1]["main/num_pairs"] == 4  # what came after the last row


def test_a_second_training_starts_its_sums_anew(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, logging_steps=2, learning_rate=0.0, check_start=False, data_seed=1)
    rows = []
    for _ in range(2):
        trainer.train()
        rows.append(trainer.state.log_history[-1])
    assert rows[0]["main/num_pairs"] == rows[1]["main/num_pairs"] == 4
    assert rows[0]["train_loss"] == rows[1]["train_loss"]


def test_a_process_with_fewer_micro_batches_repeats_the_cheapest_pair_at_weight_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, of which the other has two micro-batches more."""
    main, buffer = tiny_pairs(8, 1), tiny_pairs(8, 2)
    made = tiny_trainer(tmp_path, main=main, buffer=buffer, reference="swap", max_tokens_per_microbatch=20)
    places = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])]  # of this process, of the other

    def gather(mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([mine, mine + 2 if mine.numel() == 1 else places[1]])

    monkeypatch.setattr(type(made.args), "world_size", 2)
    monkeypatch.setattr(made.accelerator, "gather", gather)
    microbatches, all_main = made._share_of_step(places[:1])
    assert all_main.tolist() == list(range(8))
    fillers, own = microbatches[:2], microbatches[2:]
    assert all("is_filler" in one for one in fillers)
    assert own
    assert not any("is_filler" in one for one in own)
    sizes = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in [*main, *buffer]]
    assert [one["input_ids"].numel() for one in fillers] == [min(sizes)] * 2
    for one in fillers:
        loss = made.compute_loss(made.model, one, num_items_in_batch=8)
        loss.backward()  # which every process must run
        assert float(loss.detach()) == 0
    gradients = [parameter.grad for parameter in made.model.parameters()]
    assert not any(gradient is not None and gradient.any() for gradient in gradients)
    assert any(gradient is not None for gradient in gradients)
