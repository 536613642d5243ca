"""The objective on TRL's trainer: loss and gradient of one batch are those of independent log-probs, to 1e-6."""

from __future__ import annotations

import runpy
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch

from bfpo import preference_loss
from bfpo.core.errors import LabelError, MissingExtraError, SettingError
from bfpo.data.tokenize import TokenPair
from messages import raises
from tiny import logp, tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")
from bfpo.integrations.trl import TRLBFPOTrainer  # noqa: E402

CELLS = [(True, True), (True, False), (False, True), (False, False)]
ROWS = [
    {
        "prompt": f"w{i} w3 w8",
        "chosen": f" w{i + 20} w9 w4 w6"[: None if i % 2 else -3],
        "rejected": f" w{i + 40} w5",
        "chosen_is_safe": CELLS[i][0],
        "rejected_is_safe": CELLS[i][1],
    }
    for i in range(4)
]


def trl_trainer(folder, rows=ROWS, settings=None, method="bfpo", others=(), **arguments: Any) -> Any:
    neutral = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}
    args = trl.DPOConfig(str(folder / "trl"), beta=0.1, **{**neutral, **sizes, **arguments})
    given = {
        "model": tiny_model(seed=1, dtype=torch.float64),
        "ref_model": tiny_model(seed=0, dtype=torch.float64),
        "train_dataset": datasets.Dataset.from_list(rows),
        "eval_dataset": datasets.Dataset.from_list(rows),
        "processing_class": tiny_tokenizer(),
    }
    return TRLBFPOTrainer(args=args, method=method, settings=settings, **{**given, **dict(others)})


def token_pairs() -> list[TokenPair]:
    tokenizer, pairs = tiny_tokenizer(), []
    for number, row in enumerate(ROWS):
        prompt, *answers = (tokenizer(str(row[name]))["input_ids"] for name in ("prompt", "chosen", "rejected"))
        answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
        ids = [np.array(part, np.int32) for part in (prompt, *answers)]
        pairs.append(TokenPair(f"pair{number}", *ids, *map(float, CELLS[number])))
    return pairs


def batch_of(trainer: Any) -> dict[str, Any]:
    return dict(next(iter(trainer.get_train_dataloader())))


def gradients(loss: torch.Tensor, model: Any) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize(
    ("method", "settings"), [("bfpo", {"alpha": 0.3}), ("bfpo", {"link": "one_sided"}), ("safedpo", {})]
)
def test_loss_and_gradient_are_ours(tmp_path, method, settings, precomputed):
    theirs = trl_trainer(tmp_path, settings=settings, method=method, precompute_ref_log_probs=precomputed)
    loss = theirs.compute_loss(theirs.model, batch_of(theirs))
    policy, reference = (tiny_model(seed=seed, dtype=torch.float64) for seed in (1, 0))
    answers = [(pair.prompt_ids, ids) for pair in token_pairs() for ids in (pair.chosen_ids, pair.rejected_ids)]
    logps, ref_logps = (torch.stack([logp(model, *one) for one in answers]) for model in (policy, reference))
    drift = (logps - ref_logps.detach()).reshape(4, 2)
    labels = torch.tensor(CELLS, dtype=torch.float64).unbind(1)
    expected = preference_loss(drift[:, 0] - drift[:, 1], *labels, method=method, beta=0.1, **settings).loss.mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    mine, right = gradients(loss, theirs.model), gradients(expected, policy)
    assert float((mine - right).norm() / right.norm()) < 1e-6


def test_a_model_that_does_more_to_its_logits_than_its_head_is_asked_for_its_own(tmp_path):
    def tripled() -> Any:
        model = tiny_model(seed=1, dtype=torch.float64)
        model.config.lm_head_multiplier = 3.0  # as Falcon-H1 names it, for TRL's reference
        model.register_forward_hook(
            lambda _, __, output: type(output)(logits=3 * output["logits"]) if "logits" in output else None
        )
        return model

    theirs = trl_trainer(tmp_path, others={"model": tripled(), "ref_model": tripled()})
    loss = theirs.compute_loss(theirs.model, batch_of(theirs))
    labels = torch.tensor(CELLS, dtype=torch.float64).unbind(1)
    at_start = preference_loss(torch.zeros(4, dtype=torch.float64), *labels, method="bfpo", beta=0.1).loss.mean()
    assert float(loss) == pytest.approx(float(at_start), rel=1e-6)  # the policy is the reference


def weights(trainer: Any) -> list[torch.Tensor]:
    return [part.detach().clone() for part in trainer.model.parameters()]


@pytest.mark.parametrize("precomputed", [False, True])
def test_it_trains_and_evaluates(tmp_path, precomputed):
    steps = {"max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trl_trainer(tmp_path, learning_rate=1e-3, precompute_ref_log_probs=precomputed, **steps)
    before = weights(trainer)
    start = trainer.evaluate()
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))
    log = trainer.state.log_history
    assert [row["step"] for row in log if "rewards/margins" in row] == [1, 2]
    assert [row["step"] for row in log if "eval_rewards/margins" in row] == [1, 2]
    answers = [(pair.prompt_ids, ids) for pair in token_pairs() for ids in (pair.chosen_ids, pair.rejected_ids)]
    policy, reference = (tiny_model(seed=seed, dtype=torch.float64) for seed in (1, 0))
    logps, ref_logps = (
        torch.stack([logp(model, *one) for one in answers]).detach().reshape(4, 2) for model in (policy, reference)
    )
    rewards = 0.1 * (logps - ref_logps)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1],
        "rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins, "rewards/accuracies": (margins > 0).double(),
    }  # fmt: skip
    for name, values in expected.items():
        assert start[f"eval_{name}"] == pytest.approx(float(values.mean()), rel=1e-5), name
        assert log[0][name] == pytest.approx(start[f"eval_{name}"], rel=1e-5), name
    after = trainer.predict(trainer.eval_dataset)
    assert after.predictions is None
    assert after.metrics["test_rewards/margins"] == pytest.approx(log[-2]["eval_rewards/margins"])


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_are_trained_against_the_model_without_them(tmp_path, bf16):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    others = {"model": tiny_model(seed=1), "ref_model": None, "peft_config": lora}
    trainer = trl_trainer(tmp_path, others=others, max_steps=2, learning_rate=1e-2, bf16=bf16)
    before = weights(trainer)
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    changed = [not torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True)]
    assert changed == [part.requires_grad for part in trainer.model.parameters()]


def test_the_tokenizer_and_the_paddings_are_those_of_trl(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model(seed=1).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    others = {"model": str(tmp_path / "start"), "ref_model": None, "processing_class": None}
    trainer = trl_trainer(tmp_path, others=others, pad_to_multiple_of=32, pad_token="w2")
    batch = batch_of(trainer)
    assert batch["input_ids"].shape[1] == 32
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {tokenizer.convert_tokens_to_ids("w2")}


@pytest.mark.parametrize(("method", "title"), [("bfpo", "BFPO"), ("safedpo", "SafeDPO")])
def test_the_model_card_names_the_method(tmp_path, method, title):
    trainer = trl_trainer(tmp_path, method=method)
    trainer.create_model_card("mine")
    card = (tmp_path / "trl" / "README.md").read_text()
    head, _, text = card.partition("\n---\n")
    assert "- bfpo\n" in head
    assert f"- {method}\n" in head
    assert "- dpo\n" not in head
    assert f"This model was trained with {title}, a method introduced in [" in text
    assert f"huggingface.co/papers/{trainer.method.paper.removeprefix('arXiv ')})" in text
    assert ("Cite BFPO as" in text) is (method == "bfpo")
    assert "2305.18290" not in text


def test_an_older_trl_is_refused(monkeypatch):
    versions = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.15.0" if name == "trl" else versions(name))
    with raises(MissingExtraError, "trl >= 1.16"):
        runpy.run_module("bfpo.integrations.trl")


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    with raises(SettingError, "loss_type", "label_smoothing"):
        trl_trainer(tmp_path, loss_type="ipo", label_smoothing=0.1)
    with raises(SettingError, "router_aux_loss_coef"):
        trl_trainer(tmp_path, router_aux_loss_coef=0.01)
    with raises(SettingError, "kto"):
        trl_trainer(tmp_path, method="kto")
    with raises(SettingError, "modpo"):
        trl_trainer(tmp_path, method="modpo")
    for name in ("compute_metrics", "data_collator"):
        with raises(SettingError, name):
            trl_trainer(tmp_path, others={name: lambda _: {}})
    ready = trl_trainer(tmp_path)
    with raises(SettingError, "return_outputs"):
        ready.compute_loss(ready.model, batch_of(ready), return_outputs=True)
    with monkeypatch.context() as patch:
        patch.setattr("bfpo.integrations.trl.DataCollatorForPreference", int)  # TRL has another collator for images
        with raises(SettingError, "images"):
            trl_trainer(tmp_path)
    bare = [{key: value for key, value in row.items() if key != "rejected_is_safe"} for row in ROWS]
    with raises(LabelError, "rejected_is_safe"):
        batch_of(trl_trainer(tmp_path, bare))
    words = [{**row, "chosen_is_safe": "safe"} for row in ROWS]
    with raises(LabelError, "chosen_is_safe", "'safe'"):
        batch_of(trl_trainer(tmp_path, words))
