"""Attention over packed rows: kernels against one softmax at a time; delegation without a layout."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bfpo.data.pack import PackedLayout
from bfpo.policy import attention
from bfpo.policy.attention import UnknownExtraError, _flex, packed_attention, varlen_attention
from messages import raises

LENGTHS = [(3, 2, 4), (1, 1, 1), (2, 7, 1)]
LAYOUT = PackedLayout(LENGTHS)
HEADS, KEY_HEADS, WIDTH = 4, 2, 16


def tensors(
    dtype: torch.dtype = torch.float64, layout: PackedLayout = LAYOUT, heads: tuple[int, int] = (HEADS, KEY_HEADS)
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, number, layout.num_tokens, WIDTH) for number in (heads[0], heads[1], heads[1])]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return query, key, value


def by_definition(*, window: int | None = None, softcap: float | None = None, scaling: float = 0.3) -> Tensor:
    return each_query(*tensors(), LAYOUT, window=window, softcap=softcap, scaling=scaling)


def each_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scaling: float = 0.3,
) -> Tensor:
    """One query at a time: which texts it belongs to, what it sees there."""
    num_heads, group = query.shape[1], query.shape[1] // key.shape[1]
    output = torch.zeros(1, layout.num_tokens, num_heads, WIDTH, dtype=torch.float64)
    for segment in layout:
        prompt = list(range(segment.start, segment.start + segment.num_prompt))
        chosen = prompt + list(range(segment.start + segment.num_prompt, segment.rejected_start))
        rejected = prompt + list(range(segment.rejected_start, segment.stop))
        for text in (chosen, rejected):
            for place, token in enumerate(text):
                seen = text[: place + 1] if window is None else text[max(0, place + 1 - window) : place + 1]
                for head in range(num_heads):
                    scores = key[0, head // group, seen] @ query[0, head, token] * scaling
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    output[0, token, head] = torch.softmax(scores, 0) @ value[0, head // group, seen]
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


class Calls(TorchDispatchMode):
    """Counts torch's attention kernels for CPUs, forward."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.problems.append(len(args[0]))
        return function(*args, **(kwargs or {}))


# (lengths, query and key heads): one-token parts, no rejected completion, a long prompt, groups of 1, 3 and 4 heads
CASES = [
    (LENGTHS, (4, 2)),
    ([(1, 1, 1)], (3, 3)),
    ([(5, 3, 0), (1, 1, 0), (2, 4, 3)], (9, 3)),
    ([(37, 1, 2), (2, 3, 1), (1, 5, 7)], (4, 1)),
]


@pytest.mark.parametrize(("lengths", "heads"), CASES)
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (1, None), (3, None), (100, None), (None, 0.7), (3, 0.7)]
)
@pytest.mark.parametrize("together", [False, True])
def test_problem_by_problem(
    lengths: Any, heads: Any, window: int | None, softcap: float | None, together: bool, monkeypatch: Any
) -> None:
    """Values and gradients, one problem a call and all in one call."""
    monkeypatch.setattr(attention, "_CALL", 2**40 if together else 0)
    monkeypatch.setattr(attention, "_FEWEST", 0)
    layout = PackedLayout(lengths)
    results = []
    for solve in (each_query, packed_attention):
        inputs = tensors(layout=layout, heads=heads)
        first = [tensor.requires_grad_() for tensor in inputs]
        how: dict[str, Any] = {"scaling": 0.3, "softcap": softcap}
        if solve is each_query:
            output = each_query(*inputs, layout, window=window, **how)
        else:
            with Calls() as calls:
                output, _ = packed_attention(nn.Module(), *inputs, layout, sliding_window=window, **how)
        weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view_as(output)
        results.append([output.detach(), *torch.autograd.grad((weights * output).sum(), first)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    problems = sum(1 + (rejected > 0) for _, _, rejected in lengths)
    if softcap is None:
        assert calls.problems == ([problems] if together and problems > 1 else [1] * problems)


def test_many_short_texts_of_a_narrow_model_take_one_call_and_long_or_wide_ones_one_each() -> None:
    short = PackedLayout([(3 + i % 5, 2 + i % 4, 1 + i % 7) for i in range(32)])
    with Calls() as calls:
        packed_attention(nn.Module(), *tensors(torch.float32, short), short)
    assert calls.problems == [64]
    mixed = PackedLayout(
        [*short.lengths, (900, 100, 100)]
    )  # padded to the longest, 66 problems would be 66 million scores
    with Calls() as calls:
        packed_attention(nn.Module(), *tensors(torch.float32, mixed), mixed)
    assert len(calls.problems) <= 3
    assert sum(calls.problems) == 66
    wide = PackedLayout([(60, 24, 24)] * 4)
    with Calls() as calls:
        packed_attention(nn.Module(), *tensors(torch.float32, wide, (288, 96)), wide)
    assert calls.problems == [1] * 8


@pytest.mark.skipif(not attention._kernel_groups_heads(), reason="torch's kernel for CPUs wants a key for every head")
@pytest.mark.parametrize("lengths", [LENGTHS, [(3, 2, 2)] * 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_of_a_group_of_heads_are_not_repeated(lengths: Any, dtype: torch.dtype) -> None:
    layout, sizes = PackedLayout(lengths), set()

    class Heads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
                sizes.add(tuple(tensor.shape[1] for tensor in args[:3]))
            return function(*args, **(kwargs or {}))

    with Heads():
        packed_attention(nn.Module(), *tensors(dtype, layout, (9, 3)), layout)
    assert sizes == {(9, 3, 3)}


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_half_precision_on_a_cpu_rounds_nothing_but_the_result(softcap: float | None) -> None:
    """Also under autocast, from which torch's own call would come in half precision."""
    rounded = tensors(torch.bfloat16)
    exact = each_query(*(tensor.double() for tensor in rounded), LAYOUT, softcap=softcap)
    for inputs in (rounded, tuple(tensor.float() for tensor in rounded)):
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = packed_attention(nn.Module(), *inputs, LAYOUT, scaling=0.3, softcap=softcap)
        assert found.dtype == torch.bfloat16
        assert float(((found.double() - exact).abs() / exact.abs()).max()) <= 2**-8 + 1e-4
    found, _ = packed_attention(nn.Module(), *rounded, LAYOUT, scaling=0.3, softcap=softcap)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 1, 3])
def test_one_call_of_a_variable_length_kernel(window: int | None) -> None:
    found = varlen_attention(fake_flash, *tensors(), LAYOUT, scaling=0.3, window=window)
    torch.testing.assert_close(found, by_definition(window=window), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 0.7)])
def test_flex_attention(window: int | None, softcap: float | None) -> None:
    with torch.no_grad():
        found = _flex(*tensors(torch.float32), LAYOUT, scaling=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(found.double(), by_definition(window=window, softcap=softcap), rtol=1e-5, atol=1e-6)


def test_other_kernels_get_one_dtype_under_autocast() -> None:
    query, key, value = tensors(torch.float32)  # queries and keys as rotary positions leave them
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert {one.dtype for one in attention._autocast(query, key, value.to(dtype))} == {dtype}
            assert {one.dtype for one in attention._autocast(*tensors())} == {torch.float64}
    assert attention._autocast(query, key, value) == (query, key, value)


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
