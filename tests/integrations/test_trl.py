"""The objective on TRL's trainer: loss and gradient of one batch are those of independent log-probs, to 1e-6."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bfpo import preference_loss
from bfpo.core.errors import LabelError, SettingError
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


def trl_trainer(folder, rows=ROWS, settings=None, method="bfpo", **arguments: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    args = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        beta=0.1, save_strategy="no", disable_tqdm=True, **arguments,
    )  # fmt: skip
    return TRLBFPOTrainer(
        tiny_model(seed=1, dtype=torch.float64),
        tiny_model(seed=0, dtype=torch.float64),
        args,
        method=method,
        settings=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


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


def test_it_trains_and_evaluates(tmp_path):
    trainer = trl_trainer(tmp_path, max_steps=2, learning_rate=1e-3)
    before = [part.clone() for part in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


def test_what_cannot_be_read_is_refused(tmp_path):
    with raises(SettingError, "loss_type", "label_smoothing"):
        trl_trainer(tmp_path, loss_type="ipo", label_smoothing=0.1)
    with raises(SettingError, "router_aux_loss_coef"):
        trl_trainer(tmp_path, router_aux_loss_coef=0.01)
    with raises(SettingError, "kto"):
        trl_trainer(tmp_path, method="kto")
    with raises(SettingError, "modpo"):
        trl_trainer(tmp_path, method="modpo")
    bare = [{key: value for key, value in row.items() if key != "rejected_is_safe"} for row in ROWS]
    with raises(LabelError, "rejected_is_safe"):
        batch_of(trl_trainer(tmp_path, bare))
    words = [{**row, "chosen_is_safe": "safe"} for row in ROWS]
    with raises(LabelError, "chosen_is_safe", "'safe'"):
        batch_of(trl_trainer(tmp_path, words))
