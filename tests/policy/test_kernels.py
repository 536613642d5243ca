"""Packed = padded = float64 for every attention kernel, with stated bounds, on the device that is there.

Marked `gpu`: they are the first thing to run on a new card, and need no network (`python -m benchmarks.gpu` runs them).
Without a GPU they run on the CPU, where flex attention is not compiled.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bfpo.data.pack import Form, collate_pairs, longest_text, on_device
from bfpo.data.tokenize import TokenPair
from bfpo.policy import attention
from bfpo.policy.logps import sequence_logps
from bfpo.policy.probe import choose_form
from bfpo.policy.recompute import set_recompute
from tiny import VOCABULARY, tiny_model, tiny_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a log-prob, in nats per token of its completion times log V; of the gradient of the loss, relative (Frobenius).
BOUNDS = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (1e-2, 5e-2)}
PAIRS = tiny_pairs(7, 5, longest=90)
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "initializer_range": 0.1}

pytestmark = pytest.mark.gpu


def small_model(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("llama", dtype=dtype, **SIZES, **GROUPED)


@contextmanager
def only(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take flash attention, flex attention or torch's own one problem at a time, whatever would be chosen."""
    if kernel == "flash":
        if DEVICE != "cuda" or importlib.util.find_spec("flash_attn") is None:
            pytest.skip("needs a GPU and flash-attn")
    else:
        monkeypatch.setattr(attention, "_flash_varlen", lambda: None)
    yield


def values_and_gradient(
    model: Any, pairs: list[TokenPair], form: Form, *, kernel: str = "", half: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probs (2P,) and the gradient of a weighted sum of them, both float64 on the CPU."""
    device = next(model.parameters()).device
    assert choose_form(model, form, longest_text=longest_text(pairs)) == form
    batch = on_device(collate_pairs(pairs, pad_token_id=0, form=form), device)
    if kernel == "segment":
        batch["layout"].by_segment = True
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        logps = sequence_logps(model, batch).logps
    weights = torch.linspace(-1, 1, len(logps), dtype=torch.float64, device=logps.device)
    (logps * weights).sum().backward()
    gradient = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])
    return logps.detach().cpu(), gradient


@pytest.fixture(scope="module")
def exact() -> tuple[torch.Tensor, torch.Tensor]:
    """The same by padded rows in float64 on the CPU."""
    return values_and_gradient(small_model(torch.float64), PAIRS, "padded")


@pytest.mark.parametrize("kernel", ["padded", "segment", "flex", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_log_probs_and_gradients_are_those_of_float64(
    kernel: str, dtype: torch.dtype, exact: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "flash" and dtype == torch.float32:
        pytest.skip("flash attention has no float32")
    model = small_model().to(DEVICE)
    with only(kernel, monkeypatch):
        form: Form = "padded" if kernel == "padded" else "packed"
        found, gradient = values_and_gradient(model, PAIRS, form, kernel=kernel, half=dtype == torch.bfloat16)
    value_bound, gradient_bound = BOUNDS[dtype]
    lengths = torch.tensor([len(p.chosen_ids) for p in PAIRS] + [len(p.rejected_ids) for p in PAIRS])
    scale = lengths * torch.log(torch.tensor(float(VOCABULARY)))
    error = ((found - exact[0]).abs() / scale).max()
    relative = (gradient - exact[1]).norm() / exact[1].norm()
    assert error <= value_bound, f"log-probs: {error:.3g} a token and log V"
    assert relative <= gradient_bound, f"gradient: {relative:.3g}"


@pytest.mark.parametrize("kernel", ["segment", "flex", "flash"])
def test_selective_recomputation_gives_the_same_gradient(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model().to(DEVICE).train()
    with only(kernel, monkeypatch):
        kept = values_and_gradient(model, PAIRS, "packed", kernel=kernel, half=True)
        set_recompute(model, "selective")
        again = values_and_gradient(model, PAIRS, "packed", kernel=kernel, half=True)
    assert torch.equal(kept[0], again[0])
    # The backward pass of a kernel may add in another order.
    assert (kept[1] - again[1]).norm() <= 1e-5 * kept[1].norm()
