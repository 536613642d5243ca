"""Answers decoded in slots are those of each prompt alone, and no row-step is spent on an answer that has ended."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from bfpo.generation import refill
from bfpo.generation.refill import Slots, Work, num_slots, shared_beginning, why_not_refilled
from bfpo.generation.sampling import Answer, Request, answer_batches
from bfpo.policy.devices import free_bytes
from tiny import FAMILIES, SIZES, VOCABULARY, tiny_model

ENDS, NEW = {1, 2, 3, 4}, 20
REQUESTS = [Request(f"p{k}", tuple((7 * k + 5 * j) % VOCABULARY for j in range(1 + (5 * k) % 13))) for k in range(14)]
OTHERS: dict[str, Any] = {  # positions that are learned, learned and found from the mask, biases of attention
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=97,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            init_std=0.3,
        )
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    ),
}
REFILLED = sorted({*FAMILIES, *OTHERS} - {"phi3"})


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return (OTHERS[family]() if family in OTHERS else tiny_model(family)).eval()


def answers(model: Any, requests: list[Request] = REQUESTS, **settings: Any) -> dict[str, Answer]:
    given: dict[str, Any] = {"eos_token_ids": ENDS, "max_new_tokens": NEW, "batch_size": 4, **settings}
    return {answer.id: answer for some in answer_batches(model, requests, **given) for answer in some}


def alone(model: Any, request: Request) -> list[int]:
    """Greedy decoding of one prompt without cache or padding, the end token included."""
    ids = list(request.prompt_ids)
    while len(ids) < len(request.prompt_ids) + NEW and (len(ids) == len(request.prompt_ids) or ids[-1] not in ENDS):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(request.prompt_ids) :]


@cache
def expected(family: str, beginning: tuple[int, ...] = ()) -> dict[str, Answer]:
    """The greedy answers of `alone`, for both values of the slack."""
    model, found = model_of(family), {}
    for request in after(beginning):
        ids = alone(model, request)
        ended = ids[-1] in ENDS
        found[request.id] = Answer(request.id, tuple(ids[:-1] if ended else ids), ended)
    return found


def in_batches(model: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Answer]:
    """The answers by `generate` of transformers, on whole padded batches."""
    with monkeypatch.context() as patch:
        patch.setattr("bfpo.generation.sampling.why_not_refilled", lambda model: "as the test wants")
        return answers(model, **settings)


@pytest.mark.parametrize("slack", [1, 64])
@pytest.mark.parametrize("family", REFILLED)
def test_greedy_answers_are_those_of_each_prompt_alone(
    family: str, slack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of six tokens too; with little slack the rows are moved back again and again."""
    monkeypatch.setattr(refill, "_SLACK", slack)
    model = model_of(family)
    padded = family == "bloom" and "prepare_inputs_for_generation" in vars(type(model))  # in transformers 5.20
    assert bool(why_not_refilled(model)) is padded
    assert answers(model, temperature=0.0) == expected(family)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_draws_depend_neither_on_slots_nor_on_company_nor_on_the_way(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    made = in_batches(model, monkeypatch, batch_size=3, top_p=0.9)
    assert len({answer.token_ids for answer in made.values()}) > 10
    for size in (1, 4, 14, None):
        assert answers(model, batch_size=size, top_p=0.9) == made
    rest = REQUESTS[5:]  # what a resumed run still has to make
    assert answers(model, rest, batch_size=2, top_p=0.9) == {one.id: made[one.id] for one in rest}


def test_every_row_step_makes_a_token_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, slots, batches = model_of("llama"), Work(), Work()
    made = answers(model, work=slots)
    assert in_batches(model, monkeypatch, work=batches) == made
    tokens = sum(len(answer.token_ids) + answer.finished for answer in made.values())
    assert slots.row_steps == tokens - len(REQUESTS)  # the first token of an answer comes of its prompt
    assert batches.row_steps > 1.3 * slots.row_steps
    assert slots.prompt_tokens == batches.prompt_tokens == sum(len(one.prompt_ids) for one in REQUESTS)
    assert slots.passes < slots.row_steps / 2


def test_equal_prompts_are_computed_once_and_drawn_apart() -> None:
    model, work = model_of("qwen2"), Work()
    copies = [Request(f"{place}/{copy}", ids) for place, ids in enumerate([(5, 6, 7), (8, 9)]) for copy in range(3)]
    made = answers(model, copies, batch_size=6, work=work)
    assert work.prompt_tokens == 5
    assert made == answers(model, copies, batch_size=1)
    assert len({answer.token_ids for answer in made.values()}) > 2


def after(beginning: tuple[int, ...]) -> list[Request]:
    return [replace(one, prompt_ids=beginning + one.prompt_ids) for one in REQUESTS]


@pytest.mark.parametrize("slack", [1, 64])
@pytest.mark.parametrize("family", REFILLED)
def test_a_shared_beginning_changes_no_answer(family: str, slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 tokens, more than a window has; the prompts have 1 to 13 of their own, so that gaps of all widths occur."""
    monkeypatch.setattr(refill, "_SLACK", slack)
    monkeypatch.setattr(refill, "_FEWEST_SAVED", 4)
    beginning = tuple(range(20, 29))
    model, requests = model_of(family), after(beginning)
    assert answers(model, requests, temperature=0.0) == expected(family, beginning)
    shared = answers(model, requests, top_p=0.9)
    with monkeypatch.context() as patch:
        patch.setattr("bfpo.generation.sampling.shared_beginning", lambda model, prompts: ())
        assert answers(model, requests, top_p=0.9) == shared


def test_a_shared_beginning_is_computed_once() -> None:
    model, work, beginning = model_of("llama"), Work(), tuple(range(20, 41))
    answers(model, after(beginning), work=work)
    assert work.prompt_tokens == len(beginning) + sum(len(one.prompt_ids) for one in REQUESTS)


class _Passes:
    """Counts the forward passes of a model, and their tokens."""

    def __init__(self, model: Any) -> None:
        self.num = self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.num += 1
        self.tokens += kwargs["input_ids"].numel()


def test_a_beginning_is_shared_where_that_saves_more_than_its_test_costs() -> None:
    """Of 9 tokens: 30 prompts save 261 of them, 29 save 252."""
    requests = [Request(str(k), (*range(20, 29), 30 + k, 7)) for k in range(30)]
    for some, shared in ((requests, 9), (requests[:29], 0), ([*requests[:29], replace(requests[0], id="again")], 0)):
        model, work = model_of("llama"), Work()
        why_not_refilled(model)
        passes = _Passes(model)
        answers(model, some, batch_size=None, work=work)
        assert work.prompt_tokens == shared + len({one.prompt_ids for one in some}) * (11 - shared)
        assert (passes.num > work.passes) == bool(shared)  # those of the test


def test_a_model_is_tested_in_few_passes_and_for_one_prompt_alone_in_none() -> None:
    model = model_of("llama")
    passes, work = _Passes(model), Work()
    together = answers(model, temperature=0.0)
    passes.num = 0
    (alone,) = answers(model, REQUESTS[3:4], temperature=0.0, work=work).values()
    assert alone == together["p3"]
    assert passes.num == work.passes == len(alone.token_ids) + alone.finished
    fresh = model_of("llama")
    passes = _Passes(fresh)
    answers(fresh, REQUESTS[3:4])
    assert fresh not in refill._reasons
    passes.num = passes.tokens = 0
    assert why_not_refilled(fresh) == ""
    assert (passes.num, passes.tokens) == (6, 5 + 1 + 8 + 3 + 2 + 3 * 7)
    passes.num = passes.tokens = 0
    assert refill._shares(fresh)
    assert (passes.num, passes.tokens) == (7, 3 + 5 + 1 + 8 + 3 + 2 + 3 * 10)


def test_prompts_of_spread_lengths_are_computed_with_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first fill of the slots, too; on a GPU, where a pass costs more than padding does, it is one pass."""
    lengths = [10 + (37 * k) % 91 + 200 * (k % 8 == 0) for k in range(32)]
    requests = [Request(str(k), tuple((5 * k + j) % VOCABULARY for j in range(size))) for k, size in enumerate(lengths)]
    model = tiny_model("llama", max_position_embeddings=512).eval()
    few, one = Work(), Work()
    given: dict[str, Any] = {"batch_size": None, "max_new_tokens": 2}
    made = answers(model, requests, work=few, **given)
    monkeypatch.setattr(refill, "_MOST_PADDING", {})
    assert answers(model, requests, work=one, **given) == made
    assert few.prompt_tokens == one.prompt_tokens == sum(lengths)
    assert few.padded_prompt_tokens <= 1.2 * sum(lengths)
    assert one.padded_prompt_tokens > 2 * sum(lengths)
    assert few.passes - one.passes <= 8


def test_what_is_shared_leaves_a_token_of_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refill, "_FEWEST_SAVED", 4)
    model, long = model_of("llama"), tuple(range(10, 30))
    assert shared_beginning(model, [long, long[:9]]) == long[:8]
    assert shared_beginning(model, [long, (*long[:6], 5, 5)]) == long[:6]
    for prompts in ([long], [long, long], [long, long[:4]], [long, (5, *long)]):  # nothing to save, or too little
        assert shared_beginning(model, prompts) == ()
    for family in ("gemma3", "mistral"):  # a gap would take room in a window
        if family in FAMILIES:
            assert shared_beginning(model_of(family), [long, long[:9]]) == ()


def test_a_prompt_longer_than_those_in_work_finds_room() -> None:
    """Rows whose columns begin near the first one are moved to the right."""
    model = model_of("llama")
    slots = Slots(model, 2, 20)
    first, second = (5, 6), tuple(range(10, 22))
    slots.add([first])
    with torch.no_grad():
        for place, ids in enumerate([first, second]):
            got = slots.add([second])[0] if place else slots.step([7])[0]
            whole = model(torch.tensor([[*ids, *([] if place else [7])]])).logits[0, -1]
            torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)
        both = slots.step([8, 9])
        for row, ids in zip(both, [(*first, 7, 8), (*second, 9)], strict=True):
            torch.testing.assert_close(row, model(torch.tensor([ids])).logits[0, -1], rtol=1e-4, atol=1e-5)


class _NoPositions(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, "position_ids": None})


class _NoCache(LlamaForCausalLM):
    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and not hasattr(past_key_values, "key_cache"):
            raise AttributeError("key_cache")
        return super().forward(*args, **kwargs)


class _NoNumbers(LlamaForCausalLM):
    """As with an attention kernel that gives NaN where a row looks at nothing."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        found = super().forward(*args, past_key_values=past_key_values, **kwargs)
        if isinstance(getattr(past_key_values, "layers", [None])[0], refill._Layer):
            found.logits = found.logits * torch.nan
        return found


def test_a_model_that_cannot_be_refilled_is_decoded_in_batches_and_the_reason_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "bfpo")
    config = model_of("llama").config
    models = {
        "logits": _NoPositions(config).eval(),
        "AttributeError": _NoCache(config).eval(),
        "nan": _NoNumbers(config).eval(),
        "of its own": model_of("phi3"),
    }
    for word, model in models.items():
        assert word in why_not_refilled(model)
        assert word in caplog.messages[-1]
        num = len(caplog.messages)
        why_not_refilled(model)
        assert len(caplog.messages) == num  # once
    made = answers(models["of its own"], temperature=0.0)
    assert list(made["p3"].token_ids) == [one for one in alone(models["of its own"], REQUESTS[3]) if one not in ENDS]


def test_slots_are_as_many_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    width = 36
    per_row = 2 * 2 * 1 * 8 * 4 * (width + 64) + 40 * SIZES["vocab_size"]  # keys and values, layers, heads, size, bytes
    for free, expected in ((None, 32), (10**12, 32), (2 * 5 * per_row, 5), (2 * 5 * per_row - 1, 4), (0, 1)):
        monkeypatch.setattr(refill, "free_bytes", lambda device, free=free: free)
        assert num_slots(model, width) == expected


def test_what_torch_has_reserved_and_does_not_use_is_free_on_the_device_of_the_model_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = {"mem_get_info": (100, 900), "memory_reserved": 70, "memory_allocated": 20}
    asked: list[int] = []

    def backend_of(device: torch.device) -> Any:
        return SimpleNamespace(**{name: lambda i, v=value: asked.append(i) or v for name, value in numbers.items()})

    monkeypatch.setattr(torch, "get_device_module", backend_of)
    assert free_bytes(torch.device("cuda", 1)) == 150
    assert asked == [1, 1, 1]
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert free_bytes(torch.device("mps")) is None
    assert free_bytes(torch.device("cpu")) not in (None, 0)
