"""How much memory a training process takes, counted on a model without weights."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bfpo.core.errors import ModelError, SettingError
from bfpo.policy.head import CHUNK_ROWS
from bfpo.policy.recompute import Recompute, set_recompute
from bfpo.policy.skeleton import Sizes, Skeleton, make_skeleton

__all__ = [
    "Measured",
    "MemoryEstimate",
    "PassMemory",
    "Plan",
    "Sharding",
    "count_pass",
    "divide",
    "estimate_memory",
    "host_bytes",
    "measure",
]

Sharding = Literal["none", "zero2", "fsdp"]


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes of one forward and backward pass besides weights and gradients.

    `saved`: what the forward pass keeps for the backward pass. `peak`: the most that was alive at a time, temporary
    tensors included.
    """

    saved: int
    peak: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What determines the memory of one training process.

    `config`: of transformers; `margin`: that of a second model, run once before training. `tokens`: of one forward
    pass. `swaps`: whether a copy of the first trainable weights is kept as the reference. `on_cpu`: whether the memory
    of the process is that of its host.
    """

    config: Any
    tokens: int
    trainable: Any = "all"
    lora: Mapping[str, Any] | None = None
    dtype: str = "float32"
    checkpointing: Recompute = False
    swaps: bool = False
    processes: int = 1
    sharding: Sharding = "none"
    margin: Any = None
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one process at its peak.

    `working`: temporary tensors of a pass. `head`: a chunk of logits with its softmax, and the gradient of the hidden
    states (a frozen head stores it in the forward pass), as if every token were one of a completion. `exchange`:
    buckets of gradients (several processes, not sharded) or weights gathered for the current block and the next one
    (sharded). `margin`: what the pass of the margin model, before training, needs beyond all of these; its working
    space is taken to be that of the model that trains, as both have the same start. `saving`: what the last save needs
    beyond all of these: on a CPU, with the optimizer state still there, a merged copy of the weights with an adapter.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    working: int
    head: int
    exchange: int
    margin: int = 0
    saving: int = 0

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, slots=True)
class Measured:
    """A model without weights and the memory of a pass over it; it holds for any number of processes.

    `margin_bytes`: the weights of the margin model, 0 without one.
    """

    skeleton: Skeleton
    counted: PassMemory
    margin_bytes: int = 0


def estimate_memory(plan: Plan) -> MemoryEstimate:
    """Return what one process of the plan needs; raises as `measure` does."""
    return divide(measure(plan), plan)


def measure(plan: Plan) -> Measured:
    """Make the plan's model without weights and count a pass over it.

    Raises `ModelError` for a model whose forward pass cannot be run without weights and as `make_skeleton` does,
    `SettingError` for numbers below 1, an unknown sharding and as `set_recompute` does.
    """
    for name, value in (("tokens", plan.tokens), ("processes", plan.processes)):
        if value < 1:
            raise SettingError(f"{name}: got {value}; allowed: 1 or more")
    if plan.sharding not in get_args(Sharding):
        raise SettingError(f"sharding: got {plan.sharding!r}; allowed: {', '.join(get_args(Sharding))}")
    skeleton = make_skeleton(
        plan.config, trainable=plan.trainable, lora=plan.lora, dtype=plan.dtype, masters=plan.sharding == "none"
    )
    with skeleton.mode:
        try:
            counted = count_pass(
                skeleton.causal_lm,
                plan.tokens,
                bfloat16=plan.dtype == "bfloat16",
                checkpointing=plan.checkpointing,
            )
        except SettingError:
            raise
        except Exception as error:  # a forward pass that reads values has its own errors
            name = type(skeleton.causal_lm).__name__
            raise ModelError(
                f"model: the activations of {name} cannot be counted without its weights "
                f"({type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]})"
            ) from error
    return Measured(skeleton, counted, _margin_bytes(plan))


def _margin_bytes(plan: Plan) -> int:
    """Return the bytes of the margin model's weights, which are frozen."""
    if plan.margin is None:
        return 0
    sizes = make_skeleton(plan.margin, dtype=plan.dtype, masters=False).sizes
    return (sizes.num_frozen + sizes.num_trainable) * sizes.computed_bytes + sizes.buffer_bytes


def divide(measured: Measured, plan: Plan) -> MemoryEstimate:
    """Return the memory of one of `plan.processes`, from a measurement of the same plan with any number of them.

    `zero2` divides gradients and optimizer state (with it the float32 masters that bfloat16 needs; weights and
    gradients are then bfloat16), `fsdp` (and ZeRO-3) also the weights; see section 5 of ZeRO (arXiv 1910.02054). AdamW
    holds two numbers for every one that trains.
    """
    sizes, counted = measured.skeleton.sizes, measured.counted
    share = plan.processes if plan.sharding != "none" else 1
    computed, held = sizes.computed_bytes, sizes.held_bytes
    weights = sizes.num_frozen * computed + sizes.num_trainable * held + sizes.buffer_bytes
    trained_bytes = sizes.num_trainable * held
    gradients, optimizer, exchange = trained_bytes, 2 * trained_bytes, 0
    if plan.sharding == "none":
        exchange = trained_bytes if plan.processes > 1 else 0
    elif plan.sharding == "zero2":
        masters = trained_bytes if computed != held else 0
        weights = (sizes.num_frozen + sizes.num_trainable) * computed + sizes.buffer_bytes
        gradients, optimizer = sizes.num_trainable * computed, 2 * trained_bytes + masters
        trained_bytes = sizes.num_trainable * computed
    elif share > 1:
        exchange = (2 * sizes.num_in_layer + sizes.num_outside) * computed
    weights_share = share if plan.sharding == "fsdp" else 1
    training = MemoryEstimate(
        weights=_part(weights, weights_share),
        gradients=_part(gradients, share),
        optimizer=_part(optimizer, share),
        reference=_part(trained_bytes, weights_share) if plan.swaps else 0,
        activations=counted.saved,
        working=counted.peak - counted.saved,
        head=_head_bytes(measured.skeleton, plan.tokens, sizes),
        exchange=exchange,
    )
    if plan.on_cpu:
        held = training.weights + training.gradients + training.optimizer + training.reference
        saving = max(0, held + sizes.num_adapted * computed - training.total)
        training = dataclasses.replace(training, saving=saving)
    if not measured.margin_bytes:
        return training
    before = training.weights + measured.margin_bytes + training.working + training.head
    return dataclasses.replace(training, margin=max(0, before - training.total))


def host_bytes(measured: Measured, plan: Plan) -> int:
    """Return the bytes of the first process' host that the last save needs; 0 on a CPU, where `divide` counts them.

    The model goes there whole. That of sharded processes is gathered first, so that weights with an adapter are there
    twice, without and with it.
    """
    sizes = measured.skeleton.sizes
    gathered = plan.sharding == "fsdp" and plan.processes > 1
    model = sizes.num_frozen * sizes.computed_bytes + sizes.num_trainable * sizes.held_bytes
    return 0 if plan.on_cpu else model + gathered * sizes.num_adapted * sizes.computed_bytes


def _part(total: int, processes: int) -> int:
    return -(-total // processes)


def _head_bytes(skeleton: Skeleton, tokens: int, sizes: Sizes) -> int:
    head = skeleton.causal_lm.get_output_embeddings()
    vocabulary, hidden = head.weight.shape
    softmax_bytes = max(4, sizes.computed_bytes)
    chunk = 2 * min(CHUNK_ROWS, tokens) * vocabulary * softmax_bytes
    return int(chunk + tokens * hidden * sizes.computed_bytes)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages made inside it that are still alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def forget(self, tensors: list[Tensor]) -> list[Any]:
        """Do not count the storages of these tensors; returns what must be kept alive for as long."""
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._known.update({id(storage): weakref.ref(storage) for storage in storages})
        return storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def count_pass(
    model: Any,
    tokens: int,
    *,
    bfloat16: bool = False,
    checkpointing: Recompute = False,
) -> PassMemory:
    """Run a forward and a backward pass of a causal LM over a row of `tokens` tokens, and count its memory.

    The backbone alone: the head never holds all logits. Gradients exist beforehand, as after an earlier micro-batch.
    Counts real tensors as well as fake ones; run it in the model's fake mode.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    live = _LiveBytes()
    kept = live.forget([*parameters, *model.buffers(), *(p.grad for p in trainable if p.grad is not None)])
    set_recompute(model, checkpointing, preserve_rng_state=False)
    try:
        with live:
            with _saved_storages({id(storage) for storage in kept}) as saved_bytes, _autocast(device, bfloat16):
                output = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            saved = saved_bytes()
            if output.requires_grad:
                gradient = torch.empty_like(output)
                before = gradient.nbytes  # counted with the head, which passes it on
                output.backward(gradient)
                del gradient
            else:
                before = 0
        return PassMemory(saved=saved, peak=max(saved, live.peak - before))
    finally:
        set_recompute(model, False)
        for parameter in trainable:
            parameter.grad = None


@contextlib.contextmanager
def _saved_storages(left_out: set[int]) -> Iterator[Callable[[], int]]:
    """Record the storages saved for the backward pass; the function yielded sums the bytes of those still alive."""
    found: dict[int, weakref.ref[Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in left_out:
            found[id(storage)] = weakref.ref(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(s.nbytes() for s in (reference() for reference in found.values()) if s is not None)


def _autocast(device: torch.device, bfloat16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
