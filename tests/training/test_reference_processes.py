"""The cache of reference log-probs under a launcher with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bfpo.policy.load import set_trainable
from tiny import tiny_model, tiny_pairs, tiny_trainer

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from tiny import tiny_model, tiny_pairs, tiny_trainer
trainer = tiny_trainer(
    Path({folder!r}), model=tiny_model(dtype=torch.float64), main=tiny_pairs({num}, 1), buffer=tiny_pairs(7, 2),
    reference="precompute", reference_cache={cache!r},
)
rows = [[(pair.ref_chosen_logps, pair.ref_rejected_logps) for pair in pairs] for pairs in trainer.streams]
report = trainer.reference_report.as_row()
torch.save({{"rows": rows, "report": report}}, f"{out}-{{trainer.args.process_index}}.pt")
"""


SHARDED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from bfpo.policy.load import set_trainable
from bfpo.training.trainer import BFPOTrainer
from tiny import tiny_model, tiny_pairs, tiny_trainer

class Sharded(BFPOTrainer):
    # accelerate itself turns FSDP2 on for GPUs alone
    only_reads = True

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        self.is_fsdp_enabled = True

model = set_trainable(tiny_model(), "all", {lora!r})
trainer = tiny_trainer(
    Path({folder!r}), trainer=Sharded, model=model, main=tiny_pairs({num}, 1), buffer=tiny_pairs(7, 2),
    reference="precompute", reference_cache={cache!r}, max_tokens_per_microbatch=60,
)
for module in model.modules():
    if isinstance(module, FSDPModule):
        module.reshard()  # the last ones stay whole after a forward pass
assert all(hasattr(parameter, "placements") for parameter in model.parameters())
assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
rows = [[(pair.ref_chosen_logps, pair.ref_rejected_logps) for pair in pairs] for pairs in trainer.streams]
report = trainer.reference_report.as_row()
torch.save({{"rows": rows, "report": report}}, f"{out}-{{trainer.args.process_index}}.pt")
dist.barrier()
"""


def launch(tmp_path: Path, name: str, num: int, script_text: str = SCRIPT, **settings: Any) -> list[dict[str, Any]]:
    out = tmp_path / name
    script = tmp_path / f"{name}.py"
    text = script_text.format(
        **settings,
        tests=str(Path(__file__).parents[1]),
        folder=str(tmp_path / "run"),
        num=num,
        cache=str(tmp_path / "cache"),
        out=out,
    )
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    one = tiny_trainer(
        tmp_path,
        model=tiny_model(dtype=torch.float64),
        main=tiny_pairs(24, 1),
        buffer=tiny_pairs(7, 2),
        reference="precompute",
    )
    expected = [[(pair.ref_chosen_logps, pair.ref_rejected_logps) for pair in pairs] for pairs in one.streams]
    for name, num, computed in (("first", 20, 27), ("larger", 24, 4)):
        ranks = launch(tmp_path, name, num)
        assert ranks[0]["rows"] == ranks[1]["rows"]
        report = ranks[0]["report"]
        assert (report["num_computed"], report["num_stored"]) == (computed, computed)
        assert ranks[1]["report"]["num_stored"] == 0  # the first one writes
        for found, right in zip(ranks[0]["rows"], expected, strict=True):
            assert sum(found, ()) == pytest.approx(sum(right[: len(found)], ()), rel=1e-12)
    assert len(list((tmp_path / "cache").glob("*/*.parquet"))) == 2
    alone = tiny_trainer(
        tmp_path,
        model=tiny_model(dtype=torch.float64),
        main=tiny_pairs(24, 1),
        reference="precompute",
        reference_cache=str(tmp_path / "cache"),
    )
    assert alone.reference_report is not None
    assert alone.reference_report.num_computed == 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "down_proj"]}], ids=["whole", "adapter"])
def test_the_reference_of_a_sharded_model_is_that_of_the_whole_one(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    """FSDP2 over two processes, an odd number of batches, and a cache that the whole model then finds."""
    made = {"main": tiny_pairs(24, 1), "buffer": tiny_pairs(7, 2), "reference": "precompute"}
    one = tiny_trainer(tmp_path, model=set_trainable(tiny_model(), "all", lora), **made)
    expected = [[(pair.ref_chosen_logps, pair.ref_rejected_logps) for pair in pairs] for pairs in one.streams]
    ranks = launch(tmp_path, "sharded", 24, SHARDED, lora=lora)
    assert ranks[0]["rows"] == ranks[1]["rows"]
    assert ranks[0]["report"]["num_stored"] == ranks[0]["report"]["num_computed"] == 31
    for found, right in zip(ranks[0]["rows"], expected, strict=True):
        assert sum(found, ()) == pytest.approx(sum(right, ()), abs=1e-5)
    cache = str(tmp_path / "cache")
    later = tiny_trainer(tmp_path, model=set_trainable(tiny_model(), "all", lora), reference_cache=cache, **made)
    assert later.reference_report is not None
    assert later.reference_report.num_computed == 0
