"""Attention over packed rows: kernels against one softmax at a time; delegation without a layout."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bfpo.data.pack import PackedLayout
from bfpo.policy.attention import UnknownExtraError, _flex, packed_attention, varlen_attention
from messages import raises

LAYOUT = PackedLayout([(3, 2, 4), (1, 1, 1), (2, 7, 1)])
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, LAYOUT.num_tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return query, key, value


def by_definition(*, window: int | None = None, softcap: float | None = None, scaling: float = 0.3) -> Tensor:
    """One query at a time: which texts it belongs to, what it sees there."""
    query, key, value = tensors()
    output = torch.zeros(1, LAYOUT.num_tokens, HEADS, WIDTH, dtype=torch.float64)
    for segment in LAYOUT:
        prompt = list(range(segment.start, segment.start + segment.num_prompt))
        chosen = prompt + list(range(segment.start + segment.num_prompt, segment.rejected_start))
        rejected = prompt + list(range(segment.rejected_start, segment.stop))
        for text in (chosen, rejected):
            for place, token in enumerate(text):
                seen = text[: place + 1] if window is None else text[max(0, place + 1 - window) : place + 1]
                for head in range(HEADS):
                    scores = key[0, head // 2, seen] @ query[0, head, token] * scaling
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    output[0, token, head] = torch.softmax(scores, 0) @ value[0, head // 2, seen]
    return output


def fake_flash(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *longest: int, **how: Any
) -> Tensor:
    """What `flash_attn_varlen_func` is documented to do: causal, aligned at the last query and key of each problem."""
    assert how["causal"] is True
    assert longest == (int(q_starts.diff().max()), int(k_starts.diff().max()))
    output = torch.zeros_like(q)
    left, right = how["window_size"]
    for n in range(len(q_starts) - 1):
        queries, keys = q[q_starts[n] : q_starts[n + 1]], k[k_starts[n] : k_starts[n + 1]]
        values = v[k_starts[n] : k_starts[n + 1]]
        for i in range(len(queries)):
            last = i + len(keys) - len(queries)
            first = 0 if left < 0 else max(0, last - left)
            assert right in (-1, 0)
            for head in range(HEADS):
                scores = keys[first : last + 1, head // 2] @ queries[i, head] * how["softmax_scale"]
                output[q_starts[n] + i, head] = torch.softmax(scores, 0) @ values[first : last + 1, head // 2]
    return output


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_by_segment(window: int | None) -> None:
    found, _ = packed_attention(nn.Module(), *tensors(), LAYOUT, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(found, by_definition(window=window), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("window", [None, 3])
def test_soft_capped_scores(window: int | None) -> None:
    found, _ = packed_attention(nn.Module(), *tensors(), LAYOUT, scaling=0.3, sliding_window=window, softcap=0.7)
    torch.testing.assert_close(found, by_definition(window=window, softcap=0.7), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_one_call_of_a_variable_length_kernel(window: int | None) -> None:
    found = varlen_attention(fake_flash, *tensors(), LAYOUT, scaling=0.3, window=window)
    torch.testing.assert_close(found, by_definition(window=window), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 0.7)])
def test_flex_attention(window: int | None, softcap: float | None) -> None:
    with torch.no_grad():
        found = _flex(*tensors(torch.float32), LAYOUT, scaling=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(found.double(), by_definition(window=window, softcap=softcap), rtol=1e-5, atol=1e-6)


def test_the_default_scale_is_that_of_the_width() -> None:
    found, _ = packed_attention(nn.Module(), *tensors(), LAYOUT)
    torch.testing.assert_close(found, by_definition(scaling=WIDTH**-0.5), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("extras", "key"), [({"s_aux": torch.zeros(HEADS)}, "s_aux"), ({"is_causal": False}, "causal")]
)
def test_extras_that_are_not_served(extras: dict[str, Any], key: str) -> None:
    with raises(UnknownExtraError, key):
        packed_attention(nn.Module(), *tensors(), LAYOUT, **extras)
    packed_attention(nn.Module(), *tensors(), LAYOUT, s_aux=None, is_causal=True, position_ids=torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu(dtype: torch.dtype, window: int | None) -> None:
    query, key, value = (tensor.to("cuda", dtype).requires_grad_() for tensor in tensors())
    found, _ = packed_attention(nn.Module(), query, key, value, LAYOUT, scaling=0.3, sliding_window=window)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.double().cpu(), by_definition(window=window), rtol=tolerance, atol=tolerance)
    found.sum().backward()
    assert torch.isfinite(query.grad).all()  # type: ignore[arg-type]


@pytest.mark.gpu
def test_the_installed_flash_attention() -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    from flash_attn import flash_attn_varlen_func

    query, key, value = (tensor.to("cuda", torch.bfloat16) for tensor in tensors())
    found = varlen_attention(flash_attn_varlen_func, query, key, value, LAYOUT, scaling=0.3, window=3)
    torch.testing.assert_close(found.double().cpu(), by_definition(window=3), rtol=3e-2, atol=3e-2)
