"""Gradients through weights sharded by FSDP2 are those of the whole model: two processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from bfpo.data.pack import collate_pairs
from bfpo.policy.load import choose_trainable
from bfpo.policy.logps import sequence_logps
from tiny import tiny_model, tiny_pairs

def made():
    model = tiny_model(dtype=torch.float64, tie_word_embeddings={tied})
    choose_trainable(model, {trainable!r})
    return model.train()

def backward(model):
    logps = sequence_logps(model, collate_pairs(tiny_pairs(5, 1))).logps
    weights = torch.linspace(-1, 2, len(logps), dtype=torch.float64)
    (logps * weights).sum().backward()
    return logps.detach()

dist.init_process_group("gloo")
whole = made()
logps = backward(whole)
sharded = made()
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert torch.allclose(backward(sharded), logps, rtol=0, atol=1e-9)
seen = 0
for (name, one), (_, part) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
    assert part.to_local().numel() < part.numel(), name
    assert (one.grad is None) == (part.grad is None), name
    if one.grad is not None:
        seen += 1
        error = (part.grad.full_tensor() - one.grad).norm() / one.grad.norm()
        assert error < 1e-9, (name, float(error))
assert seen == {num_trained}, seen
print("agreed", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "tied", "num_trained"),
    [(["*.down_proj.weight"], False, 2), ("all", True, 20)],
    ids=["frozen", "tied"],
)
def test_sharded_gradients_are_those_of_the_whole_model(
    tmp_path: Path, trainable: object, tied: bool, num_trained: int
) -> None:
    """Both processes take the same batch, so that the mean over them, which FSDP takes, is that of one."""
    script = tmp_path / "sharded.py"
    script.write_text(
        SCRIPT.format(tests=str(Path(__file__).parents[1]), trainable=trainable, tied=tied, num_trained=num_trained)
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
