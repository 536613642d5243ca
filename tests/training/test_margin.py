"""MODPO: the margins of the model of safety reach the pair they are of, whatever the order of the batch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bfpo.config import AlignConfig
from bfpo.core.errors import ModelError, SettingError
from bfpo.data.pack import on_device
from bfpo.policy.load import load_policy
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from bfpo.training import margin
from bfpo.training.margin import margin_logps
from bfpo.training.trainer import BFPOConfig
from messages import raises
from tiny import logp, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer


def test_the_loss_of_a_step_is_that_of_a_loop_over_its_pairs(tmp_path: Path) -> None:
    main, buffer, held_out = tiny_pairs(5, 1), tiny_pairs(7, 2), tiny_pairs(3, 3)
    start, safety = tiny_model(seed=0).double().eval(), tiny_model(seed=9).eval()
    save_policy(safety, tiny_tokenizer(), tmp_path / "safety")
    lists = [main, buffer, held_out]
    args = BFPOConfig(output_dir=str(tmp_path), use_cpu=True)
    others = margin_logps(str(tmp_path / "safety"), lists, args, vocabulary=tiny_tokenizer().get_vocab())
    settings = {"method": "modpo", "safety_share": 0.3, "max_tokens_per_microbatch": 30}
    trainer = tiny_trainer(
        tmp_path, main=main, buffer=buffer, eval_dataset=held_out, margin_logps=others, max_steps=1, **settings
    )
    trainer.model.train()
    safety = safety.double()
    items = [trainer.train_dataset[i] for i in (3, 0, 4)]
    seen = 0
    for microbatch in trainer.data_collator(items)["microbatches"]:
        figures, total = trainer.pair_losses(trainer.model, on_device(microbatch, trainer.args.device))
        for p, (index, is_buffer) in enumerate(
            zip(microbatch["pair_index"].tolist(), microbatch["is_buffer"].tolist(), strict=True)
        ):
            pair = (buffer if is_buffer else main)[index]
            sides = [
                logp(m, pair.prompt_ids, ids) for m in (safety, start) for ids in (pair.chosen_ids, pair.rejected_ids)
            ]
            other = float((sides[0] - sides[2]) - (sides[1] - sides[3]))
            expected = math.log1p(math.exp(0.1 * 0.3 * other / 0.7))
            assert float(total[p]) == pytest.approx(expected, rel=1e-4)
            assert float(figures.loss_at_start[p]) == pytest.approx(expected, rel=1e-4)
            assert abs(other) > 0.5
            seen += 1
    assert seen == 6
    trainer.train()  # the check of the first step takes the margins in
    metrics = trainer.evaluate()
    assert metrics["eval_num_pairs"] == 3


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with raises(SettingError, "margin_logps"):
        tiny_trainer(tmp_path, method="modpo")
    with raises(SettingError, "margin_logps"):
        tiny_trainer(tmp_path, margin_logps=[torch.zeros(12, 2)])
    with raises(SettingError):
        tiny_trainer(tmp_path, method="modpo", margin_logps=[torch.zeros(3, 2)])
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "safety")
    args = BFPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with raises(ModelError):
        margin_logps(str(tmp_path / "safety"), [tiny_pairs(2)], args, vocabulary={"a": 0})
    with raises(ValueError, "margin_model"):
        AlignConfig(model="m", data={"files": "d"}, method="modpo")
    with raises(ValueError, "margin_model"):
        AlignConfig(model="m", data={"files": "d"}, margin_model="m")


def test_every_process_reads_the_model_of_the_margins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this variable some versions of transformers fill weights in the first process of a machine alone."""
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "safety")
    name, seen = "FSDP_CPU_RAM_EFFICIENT_LOADING", []
    monkeypatch.setenv(name, "true")

    def load(*given: Any, **settings: Any) -> Any:
        seen.append(os.environ[name])
        return load_policy(*given, **settings)

    monkeypatch.setattr(margin, "load_policy", load)
    args = BFPOConfig(output_dir=str(tmp_path), use_cpu=True)
    margin_logps(str(tmp_path / "safety"), [tiny_pairs(2)], args, vocabulary=tiny_tokenizer().get_vocab())
    assert (seen, os.environ[name]) == (["false"], "true")


def test_a_model_of_safety_may_do_more_to_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than its head gives, as Falcon-H1 and RecurrentGemma do."""
    save_policy(tiny_model(seed=9), tiny_tokenizer(), tmp_path / "safety")

    def load(*given: Any, **settings: Any) -> Any:
        policy = load_policy(*given, **settings)
        policy.model.register_forward_hook(
            lambda _, __, output: type(output)(logits=3 * output.logits) if "logits" in output else None
        )
        return policy

    monkeypatch.setattr(margin, "load_policy", load)
    pairs, args = tiny_pairs(3), BFPOConfig(output_dir=str(tmp_path), use_cpu=True)
    folder = str(tmp_path / "safety")
    (found,) = margin_logps(folder, [pairs], args, vocabulary=tiny_tokenizer().get_vocab())
    model = load(folder).model.eval()
    expected = [[logp(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)] for pair in pairs]
    assert found.tolist() == [pytest.approx([one.item() for one in row], rel=1e-4) for row in expected]


def test_modpo_trains_from_the_command_lines_config(tmp_path: Path) -> None:
    for name, seed in (("start", 0), ("safety", 5)):
        save_policy(tiny_model(max_position_embeddings=128, seed=seed), tiny_tokenizer(), tmp_path / name)
    row = {"prompt": "w3 w4", "chosen": "w5", "rejected": "w6 w7", "chosen_is_safe": True, "rejected_is_safe": False}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**row, "id": str(i)}) + "\n" for i in range(6)))
    config = AlignConfig(
        model=str(tmp_path / "start"),
        margin_model=str(tmp_path / "safety"),
        method="modpo",
        beta=0.1,
        data={"files": str(tmp_path / "pairs.jsonl")},
        reference_cache=str(tmp_path / "cache"),
        trainable="all",
        max_steps=1,
        pairs_per_step=2,
        threads=1,
    )
    folder = run_stage("train", config, tmp_path / "run")
    assert folder.finished
    assert len(list((tmp_path / "cache").glob("*"))) == 2  # the start's rows and the safety model's
