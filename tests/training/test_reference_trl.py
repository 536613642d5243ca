"""Two defects of the reference cache of TRL 1.16, reproduced on TRL, and that this cache has neither.

Its key is the fingerprint of the data set, which carries the training arguments through a closure and misses how the
collator cuts. Needs `trl`; another version may have repaired either, which `VERSION` guards.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bfpo.data.tokenize import TokenPair
from bfpo.policy.reference import forward_pass as reference_pass
from tiny import tiny_model, tiny_tokenizer, tiny_trainer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
VERSION = ".".join(trl.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VERSION != "1.16", reason=f"the defects are those of TRL 1.16, this is {trl.__version__}"),
]

ROWS = [{"prompt": f"w{i} w3 w8", "chosen": f" w{i + 20} w9 w4 w6", "rejected": f" w{i + 40} w5"} for i in range(6)]


@contextmanager
def counting(model: Any) -> Any:
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def trl_values(folder: Path, **settings: Any) -> tuple[list[float], int]:
    """The chosen reference log-probs that TRL trains on, and how many forward passes they cost."""
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder))
    arguments = trl.DPOConfig(
        output_dir=str(folder / "out"),
        precompute_ref_log_probs=True,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **settings,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model()
    with counting(model) as calls:
        trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return list(trainer.train_dataset["ref_chosen_logps"]), len(calls)


def our_values(folder: Path, max_length: int | None = None, **settings: Any) -> tuple[list[float], int]:
    """The same with our trainer, on the tokens that `keep_end` leaves: the last `max_length` of each sequence."""
    pairs = [cut_at_the_start(row, i, max_length) for i, row in enumerate(ROWS)]
    calls: list[int] = []
    inner = reference_pass.own_logps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_pass, "own_logps", lambda *given: calls.append(1) or inner(*given))
        trainer = tiny_trainer(
            folder / "ours",
            model=tiny_model(),
            main=pairs,
            reference="precompute",
            reference_cache=str(folder / "cache"),
            **settings,
        )
    return [float(pair.ref_chosen_logps or 0) for pair in trainer.streams[0]], len(calls)


def cut_at_the_start(row: dict[str, str], number: int, max_length: int | None) -> TokenPair:
    tokenizer = tiny_tokenizer()
    prompt, chosen, rejected = (tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
    chosen, rejected = [*chosen, tokenizer.eos_token_id], [*rejected, tokenizer.eos_token_id]
    if max_length is not None:  # the prompt of a pair is one; here it is that of the longer answer
        prompt = prompt[len(prompt) + max(len(chosen), len(rejected)) - max_length :]
    ids = [np.array(part, np.int32) for part in (prompt, chosen, rejected)]
    return TokenPair(f"pair{number}", *ids, 1.0, 1.0)


def true_values(max_length: int | None) -> list[float]:
    """Each chosen completion by the definition, alone and without padding."""
    model, values = tiny_model(), []
    for number, row in enumerate(ROWS):
        pair = cut_at_the_start(row, number, max_length)
        ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]], dtype=torch.int64)
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(pair.prompt_ids)
        values.append(sum(float(scores[start - 1 + t, int(token)]) for t, token in enumerate(pair.chosen_ids)))
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_json(str(tmp_path / "rows.jsonl"))
    return tmp_path


def test_a_changed_learning_rate(folder: Path) -> None:
    first, cost = trl_values(folder, learning_rate=1e-6)
    assert cost > 0
    assert trl_values(folder, learning_rate=1e-6) == (first, 0)  # its cache does work
    again, cost_again = trl_values(folder, learning_rate=2e-6)
    assert again == first
    assert cost_again == cost  # the defect: all is computed again

    ours, cost = our_values(folder, learning_rate=1e-6)
    assert cost > 0
    assert our_values(folder, learning_rate=2e-6) == (ours, 0)
    assert ours == pytest.approx(first, rel=1e-5)


def test_a_changed_max_length_that_keeps_the_end(folder: Path) -> None:
    whole, cut = true_values(None), true_values(6)
    assert whole != pytest.approx(cut, rel=1e-2)
    settings = {"truncation_mode": "keep_end", "learning_rate": 1e-6}
    assert trl_values(folder, max_length=32, **settings)[0] == pytest.approx(whole, rel=1e-5)
    stale, cost = trl_values(folder, max_length=6, **settings)
    assert cost == 0
    assert stale == pytest.approx(whole, rel=1e-5)  # the defect: the values of the longer sequences
    fresh = folder / "fresh"
    fresh.mkdir()
    (fresh / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    assert trl_values(fresh, max_length=6, **settings)[0] == pytest.approx(cut, rel=1e-5)  # what they should be

    assert our_values(folder)[0] == pytest.approx(whole, rel=1e-5)
    ours, cost = our_values(folder, max_length=6)
    assert cost > 0
    assert ours == pytest.approx(cut, rel=1e-5)
