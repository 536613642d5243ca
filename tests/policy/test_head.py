"""Log-probs from hidden states: values and gradients by definition in float64, and what is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bfpo.policy.head import LogitTransform, head_logps

ROWS, WIDTH, VOCABULARY, CHUNK = 37, 5, 211, 8


def make_head(dtype: torch.dtype, *, bias: bool, trains: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return head.to(dtype).requires_grad_(trains), hidden.to(dtype), targets


def by_definition(head: nn.Linear, hidden: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    logps = []
    for row, target in zip(hidden.double(), targets.tolist(), strict=True):
        scores = head.weight.double() @ row + (0 if head.bias is None else head.bias.double())
        scores = scores * transform.scale
        if transform.softcap is not None:
            scores = transform.softcap * torch.tanh(scores / transform.softcap)
        logps.append(scores[target] - torch.log(torch.exp(scores - scores.max()).sum()) - scores.max())
    return torch.stack(logps)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", [(1.0, None), (0.25, None), (1.0, 4.0), (0.5, 3.0)])
@pytest.mark.parametrize("chunk_rows", [1, CHUNK, ROWS, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_value_and_gradient(
    trains: bool, bias: bool, transform: Any, chunk_rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    transform = LogitTransform(*transform)
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    results = []
    for exact in (True, False):
        head, hidden, targets = make_head(torch.float64 if exact else dtype, bias=bias, trains=trains)
        if exact:  # the same numbers, as the dtype holds them
            head, hidden = head.to(dtype).double(), hidden.to(dtype).double()
        hidden.requires_grad_()
        if exact:
            logps = by_definition(head, hidden, targets, transform)
        else:
            logps = head_logps(head, hidden, targets, transform=transform, chunk_rows=chunk_rows)
            assert logps.dtype == dtype
        (weights * logps.double()).sum().backward()
        gradients = [hidden.grad, *(parameter.grad for parameter in head.parameters())]
        results.append((logps.detach().double(), gradients))
    (expected, expected_gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert float((one.double() - other).norm() / other.norm()) < tolerance


def test_extreme_logits_stay_finite() -> None:
    head = nn.Linear(1, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
    hidden = torch.tensor([[1e30], [-1e30], [0.0]]).requires_grad_()
    logps = head_logps(head, hidden, torch.tensor([0, 2, 1]))
    assert logps.tolist() == pytest.approx([0.0, 0.0, -1.0986123])
    logps.sum().backward()
    assert torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


class LargestTensor(TorchDispatchMode):
    """Sees every tensor that an operation makes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        mine = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *(leaf.numel() for leaf in mine)])
        return output


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)])
def test_nothing_larger_than_a_chunk_of_the_vocabulary_is_made(trains: bool, transform: LogitTransform) -> None:
    head, hidden, targets = make_head(torch.float32, bias=True, trains=trains)
    hidden.requires_grad_()
    with LargestTensor() as seen:
        head_logps(head, hidden, targets, transform=transform, chunk_rows=CHUNK).sum().backward()
    assert seen.numel == CHUNK * VOCABULARY
    with LargestTensor() as whole:
        head(hidden).log_softmax(-1)
    assert whole.numel == ROWS * VOCABULARY  # the hook does see what it should


def test_a_frozen_head_keeps_one_row_of_hidden_states_and_nothing_of_the_vocabulary() -> None:
    head, hidden, targets = make_head(torch.float32, bias=False, trains=False)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head_logps(head, hidden.requires_grad_(), targets, chunk_rows=CHUNK)
    assert saved == [ROWS * WIDTH]


class Made(TorchDispatchMode):
    """Counts tensors of at least `size` numbers that get memory of their own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.numel() >= self.size and leaf.data_ptr() not in given:
                self.count += 1
        return output


@pytest.mark.parametrize(("trains", "chunk_rows"), [(False, CHUNK), (True, CHUNK), (True, ROWS)])
def test_all_chunks_share_one_buffer_of_logits(trains: bool, chunk_rows: int) -> None:
    """In every pass; a head that trains computes all chunks but the last again in the backward pass."""
    head, hidden, targets = make_head(torch.float32, bias=True, trains=trains)
    with Made(CHUNK * VOCABULARY) as forward:
        logps = head_logps(head, hidden.requires_grad_(), targets, chunk_rows=chunk_rows)
    with Made(CHUNK * VOCABULARY) as backward:
        logps.sum().backward()
    assert (forward.count, backward.count) == (1, int(trains and chunk_rows < ROWS))


@pytest.mark.parametrize(
    ("trains", "chunk_rows", "rows_times_products"),
    [(False, CHUNK, 2 * ROWS), (True, CHUNK, 4 * ROWS - CHUNK), (True, ROWS, 3 * ROWS), (True, 1000, 3 * ROWS)],
)
def test_operations_of_the_head(trains: bool, chunk_rows: int, rows_times_products: int) -> None:
    """The last chunk is a full one, and a head that trains does not compute it again."""
    head, hidden, targets = make_head(torch.float32, bias=False, trains=trains)
    with FlopCounterMode(display=False) as counter:
        head_logps(head, hidden.requires_grad_(), targets, chunk_rows=chunk_rows).sum().backward()
    assert counter.get_total_flops() == rows_times_products * 2 * WIDTH * VOCABULARY


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)])
@pytest.mark.parametrize("chunk_rows", [CHUNK, ROWS])
def test_a_head_that_trains_can_be_run_backward_again(transform: LogitTransform, chunk_rows: int) -> None:
    """The chunk that the forward pass left is used up by the first backward pass."""
    found = []
    for exact in (True, False):
        head, hidden, targets = make_head(torch.float64, bias=True, trains=True)
        hidden.requires_grad_()
        if exact:
            logps = by_definition(head, hidden, targets, transform)
        else:
            logps = head_logps(head, hidden, targets, transform=transform, chunk_rows=chunk_rows)
        for weights in (torch.linspace(-1, 2, ROWS, dtype=torch.float64), torch.ones(ROWS, dtype=torch.float64)):
            gradients = torch.autograd.grad((weights * logps).sum(), [hidden, *head.parameters()], retain_graph=True)
            found += gradients
    half = len(found) // 2
    for one, other in zip(found[half:], found[:half], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trains", [False, True])
def test_no_row_at_all(trains: bool) -> None:
    head, hidden, targets = make_head(torch.float32, bias=True, trains=trains)
    hidden = hidden[:0].requires_grad_()
    logps = head_logps(head, hidden, targets[:0], chunk_rows=CHUNK)
    logps.sum().backward()
    assert (logps.shape, hidden.grad is not None) == ((0,), True)
    for parameter in head.parameters():
        assert not trains or torch.equal(parameter.grad, torch.zeros_like(parameter))  # type: ignore[arg-type]


def test_a_head_that_trains_under_bfloat16_has_float32_gradients_of_its_float32_weight() -> None:
    head, hidden, targets = make_head(torch.float32, bias=True, trains=True)
    head_logps(head, hidden.requires_grad_(), targets).sum().backward()
    exact = [hidden.grad, *(parameter.grad for parameter in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = head_logps(head, hidden, targets, chunk_rows=CHUNK)
        logps.sum().backward()  # inside: autocast must not reach the backward pass
    assert logps.dtype == torch.float32
    for one, other in zip((hidden.grad, *(p.grad for p in head.parameters())), exact, strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype == torch.float32
        assert 0 < float((one - other).norm() / other.norm()) < 0.02


def test_under_bfloat16_nothing_of_the_size_of_the_weight_is_made_but_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products are added some rows of the weight at a time."""
    gradients = []
    for rows in (VOCABULARY, 17):
        monkeypatch.setattr("bfpo.policy.head._WEIGHT_ROWS", rows)
        head, hidden, targets = make_head(torch.float32, bias=True, trains=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = head_logps(head, hidden.requires_grad_(), targets, chunk_rows=4)
        with Made(VOCABULARY * WIDTH) as made:
            logps.sum().backward()
        assert made.count == (1 if rows < VOCABULARY else 1 + -(-ROWS // 4))
        gradients.append(head.weight.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2**-8, atol=1e-4)


def test_a_head_that_trains_on_hidden_states_that_do_not() -> None:
    head, hidden, targets = make_head(torch.float64, bias=False, trains=True)
    gradients = []
    for needed in (True, False):
        head.zero_grad()
        head_logps(head, hidden.requires_grad_(needed), targets, chunk_rows=CHUNK).sum().backward()
        gradients.append(head.weight.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_computing_in_bfloat16_keeps_softmax_and_result_in_float32() -> None:
    head, hidden, targets = make_head(torch.float32, bias=True, trains=False)
    exact = head_logps(head, hidden, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_logps(head, hidden.requires_grad_(), targets)
    assert found.dtype == torch.float32
    assert 0 < float((found.detach() - exact).abs().max()) < 0.2  # logits of size 10 with 8 bits
    found.sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LogitTransform()),
        ({"logit_scale": 0.0625}, LogitTransform(0.0625)),
        ({"logits_scaling": 8.0}, LogitTransform(0.125)),
        ({"final_logit_softcapping": 30.0}, LogitTransform(1.0, 30.0)),
    ],
)
def test_what_a_config_says_of_logits(settings: dict[str, float], expected: LogitTransform) -> None:
    from transformers import LlamaConfig

    assert LogitTransform.of(LlamaConfig(**settings)) == expected
