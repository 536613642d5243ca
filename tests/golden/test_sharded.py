"""A model sharded by FSDP2 is the whole model: gradients, steps, reference, saved files; two processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}

START = """
import os
import sys
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from bfpo.data.pack import collate_pairs
from bfpo.policy.load import set_trainable
from bfpo.policy.save import save_policy
from bfpo.policy.logps import sequence_logps, unwrap_causal_lm
from bfpo.policy.probe import choose_form
from bfpo.policy.reference.sources import SwappedWeights
from tiny import tiny_model, tiny_pairs, tiny_tokenizer

BATCH = collate_pairs(tiny_pairs(5, 1))

def shard(model, **settings):
    for layer in unwrap_causal_lm(model).model.layers:
        fully_shard(layer, mesh=MESH, **settings)
    fully_shard(model, mesh=MESH, **settings)

PartialState(cpu=True)
MESH = init_device_mesh("cpu", (2,))
rank = dist.get_rank()
"""

END = """
print("agreed", flush=True)
dist.barrier()
os._exit(0)  # now and then torch's threads abort the interpreter's own exit
"""

TRAINING = """
from types import SimpleNamespace
from accelerate.utils import load_fsdp_model, save_fsdp_model
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import distribute_tensor
from bfpo.training.checkpoint import state_of_trained

def made():
    model = tiny_model(dtype=torch.float64, tie_word_embeddings={tied})
    model = set_trainable(model, {trainable!r}, {lora!r}).double()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert choose_form(model, longest_text=12) == "packed"
    return model.train()

def logps(model):
    with torch.no_grad():
        return sequence_logps(model, BATCH).logps

def backward(model):
    found = sequence_logps(model, BATCH).logps
    (found * torch.linspace(-1, 2, len(found), dtype=torch.float64)).sum().backward()

def check_gradients():
    seen = 0
    for (name, one), (_, part) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert part.to_local().numel() < part.numel(), name
        assert (one.grad is None) == (part.grad is None), name
        if one.grad is not None:
            seen += 1
            error = (part.grad.full_tensor() - one.grad).norm() / one.grad.norm()
            assert error < 1e-9, (name, float(error))
    assert seen == {num_trained}, seen

def check_weights():
    for (name, one), (_, part) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert torch.allclose(part.full_tensor(), one, rtol=0, atol=1e-8), name

def bits():
    return [parameter.to_local().clone() for parameter in sharded.parameters()]

def swapped(expected):
    '''Swap, and see that the model is left as it was: its shards bit by bit, and what it computes.'''
    found = reference.logps(sharded, BATCH)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9), (found - expected).abs().max()
    return bits()

whole, sharded = made(), made()
at_start = logps(whole)
with torch.no_grad():
    if rank == 1:  # as after loading that fills the first process' weights alone
        for parameter in sharded.parameters():
            parameter.fill_(float("nan"))
reference = SwappedWeights(sharded)
shard(sharded)

# A checkpoint of moved weights is loaded before the first forward pass, the way accelerate does.
with torch.no_grad():
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.ones_like(parameter))
moved = logps(whole)
state = dict(whole.named_parameters())
sharded.load_state_dict(
    {{
        name: distribute_tensor(state[name].detach().clone(), part.device_mesh, part.placements)
        for name, part in sharded.named_parameters()
    }},
    strict=False,
    assign=True,
)
unwrap_causal_lm(sharded).tie_weights()
before = bits()
after = swapped(at_start)
assert all(torch.equal(*both) for both in zip(before, after, strict=True))
assert not torch.allclose(moved, at_start, rtol=0, atol=1e-3)
assert sum(value.numel() for value in reference._initial) == sum(
    part.to_local().numel() for part in sharded.parameters() if part.requires_grad
)
assert torch.allclose(logps(sharded), moved, rtol=0, atol=1e-9)  # after it the root is whole
after = swapped(at_start)
assert all(torch.equal(*both) for both in zip(before, after, strict=True))

for model in (whole, sharded):
    backward(model)
check_gradients()
check_weights()

# The optimizer is made after sharding.
for model in (whole, sharded):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    optimizer.zero_grad()
check_weights()
before = bits()
after = swapped(at_start)
assert all(torch.equal(*both) for both in zip(before, after, strict=True))

# Two micro-batches make a step: a swap lies between forward and backward, and between the two.
for model in (whole, sharded):
    for last in (False, True):
        if model is sharded:
            model.set_requires_gradient_sync(last)
            reference.logps(model, BATCH)
        found = sequence_logps(model, BATCH).logps
        if model is sharded:
            reference.logps(model, BATCH)
        (found * torch.linspace(-1, 2, len(found), dtype=torch.float64)).sum().backward()
check_gradients()

# A batch that fails leaves the weights as they were.
before = bits()
try:
    reference.logps(sharded, {{"input_ids": BATCH["input_ids"]}})
    raise AssertionError("no error")
except KeyError:
    pass
after = bits()
assert all(torch.equal(*both) for both in zip(before, after, strict=True))

# The weights of a checkpoint, as accelerate writes and reads them: only what trains.
plugin = SimpleNamespace(
    fsdp_version=2, state_dict_type=StateDictType.SHARDED_STATE_DICT, state_dict_config=SimpleNamespace()
)
processes = SimpleNamespace(process_index=rank, num_processes=2, is_fsdp2=True, wait_for_everyone=dist.barrier)
before = bits()
with state_of_trained(sharded):
    save_fsdp_model(plugin, processes, sharded, {folder!r} + "/checkpoint")
    with torch.no_grad():
        for parameter in sharded.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    load_fsdp_model(plugin, processes, sharded, {folder!r} + "/checkpoint")
after = bits()
assert all(torch.equal(*both) for both in zip(before, after, strict=True))
written = FileSystemReader({folder!r} + "/checkpoint/pytorch_model_fsdp_0").read_metadata().state_dict_metadata
trained = {{f"model.{{name}}" for name, parameter in sharded.named_parameters() if parameter.requires_grad}}
assert trained <= written.keys(), (trained, written.keys())
assert not [name for name in written if name[6:] in dict(sharded.named_parameters()) and name not in trained]

gathered = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    save_policy(sharded, tiny_tokenizer(), {folder!r} + "/sharded", state_dict=gathered)
    save_policy(whole, tiny_tokenizer(), {folder!r} + "/whole")
    one, other = (load_file({folder!r} + f"/{{name}}/model.safetensors") for name in ("whole", "sharded"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(other[name], value, rtol=0, atol=1e-8) for name, value in one.items())
    texts = [open({folder!r} + f"/{{name}}/config.json").read() for name in ("whole", "sharded")]
    assert texts[0] == texts[1], texts
"""

FIRST_DECIDES = """
from bfpo.core.errors import ModelError
from bfpo.policy.logps import uses_own_logits

def made(family="llama"):
    model = tiny_model(family)
    if rank == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
    return model

def choose(model, attention="auto", longest=12):
    return choose_form(model, attention, longest_text=longest, process_index=rank, num_processes=2)

if rank == 1:
    assert choose_form(made(), longest_text=12) == "padded"  # alone it would say something else
model = made()
assert choose(model) == "packed"
assert not uses_own_logits(model)
assert "bfpo" in model.config._attn_implementation, model.config._attn_implementation
sequence_logps(model, collate_pairs(tiny_pairs(5, 1), form="packed"))
model = made()
if rank == 0:
    model.register_forward_hook(
        lambda _, __, output: type(output)(logits=3 * output.logits) if "logits" in output else None
    )
choose(model)
assert uses_own_logits(model)
model = made()
if rank == 0:
    model.config.sliding_window = 6
try:
    choose(model, "packed")
    raise AssertionError("no error")
except ModelError as error:
    assert "has a window of 6 tokens" in str(error), error
assert choose(model) == "padded"
"""

PRECISION = """
from types import SimpleNamespace
from accelerate import FullyShardedDataParallelPlugin
from bfpo.training.sharding import prepare_sharding

def dtype_of_log_probs(prepared):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    if prepared:
        prepare_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), tiny_model())
    model = tiny_model()
    assert choose_form(model, longest_text=12) == "packed"
    shard(model, mp_policy=plugin.mixed_precision_policy)
    seen = []
    model.register_forward_hook(lambda _, __, output: seen.append(output["logits"].dtype))
    sequence_logps(model, BATCH).logps.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return seen

assert dtype_of_log_probs(False) == [torch.bfloat16]
assert dtype_of_log_probs(True) == [torch.float32]
"""


LOADED_BY_THE_FIRST = """
from types import SimpleNamespace
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from bfpo.training.checkpoint import state_of_trained

whole = set_trainable(tiny_model(), {trainable!r}, None)
sharded = set_trainable(tiny_model(), {trainable!r}, None)
assert choose_form(whole, longest_text=12) == choose_form(sharded, longest_text=12)
if rank == 1:
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.fill_(float("nan"))
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
)
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=rank == 0,
    device=torch.device("cpu"), torch_device_mesh=None,
)
with state_of_trained(sharded):
    fsdp2_prepare_model(accelerator, sharded)
    found = sequence_logps(sharded, BATCH).logps
    assert torch.allclose(found, sequence_logps(whole, BATCH).logps, rtol=0, atol=1e-4)
    trained = {{name for name, parameter in sharded.named_parameters() if parameter.requires_grad}}
    assert sharded.state_dict().keys() == trained
    assert 0 < len(trained) < len(dict(sharded.named_parameters()))
"""


def launch(tmp_path: Path, body: str, **settings: Any) -> None:
    script = tmp_path / "sharded.py"
    tests = str(Path(__file__).parents[1])
    script.write_text(START.format(tests=tests) + (body.format(**settings) if settings else body) + END)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
    assert done.stdout.count("agreed") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "tied", "lora", "num_trained"),
    [(["*.down_proj.weight"], False, None, 2), ("all", True, None, 20), ("all", False, LORA, 8)],
    ids=["frozen", "tied", "lora"],
)
def test_training_a_sharded_model_is_training_the_whole_one(
    tmp_path: Path, trainable: object, tied: bool, lora: object, num_trained: int
) -> None:
    """Both processes take the same batch, so that the mean over them, which FSDP takes, is that of one."""
    settings = {"trainable": trainable, "tied": tied, "lora": lora, "num_trained": num_trained}
    launch(tmp_path, TRAINING, folder=str(tmp_path), **settings)


@pytest.mark.slow
def test_the_first_process_decides_on_the_form_for_all(tmp_path: Path) -> None:
    launch(tmp_path, FIRST_DECIDES)


@pytest.mark.slow
def test_log_probs_leave_a_model_under_bfloat16_in_float32(tmp_path: Path) -> None:
    launch(tmp_path, PRECISION)


@pytest.mark.slow
def test_frozen_weights_that_the_first_process_alone_has_read_are_distributed(tmp_path: Path) -> None:
    """`fsdp_cpu_ram_efficient_loading: true`: accelerate shards empty weights and fills them from the model's state."""
    launch(tmp_path, LOADED_BY_THE_FIRST, trainable=["*.down_proj.weight"])
