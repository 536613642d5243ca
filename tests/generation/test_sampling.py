from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, TemperatureLogitsWarper, TopPLogitsWarper

from bfpo.core.errors import ModelError, SettingError
from bfpo.generation import sampling
from bfpo.generation.sampling import Answer, Request, answer_batches, end_token_ids, opening_logps
from messages import raises
from tiny import logp, tiny_model

VOCAB, END, OTHER_END = 40, 1, 2


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.6,  # far from ties, which rounding could decide either way
    )
    return LlamaForCausalLM(config)


REQUESTS = [
    Request(f"p{number}", tuple(3 + (7 * number + 5 * place) % (VOCAB - 3) for place in range(1 + number % 6)))
    for number in range(14)
]


def answers(model: Any, requests: list[Request] = REQUESTS, **settings: Any) -> dict[str, Answer]:
    defaults = {"eos_token_ids": {END, OTHER_END}, "max_new_tokens": 12}
    batches = answer_batches(model, requests, **{**defaults, **settings})
    return {answer.id: answer for batch in batches for answer in batch}


def one_by_one(model: Any, request: Request, num_tokens: int) -> list[int]:
    """Greedy decoding without cache, padding or `generate`."""
    ids = list(request.prompt_ids)
    for _ in range(num_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in (END, OTHER_END):
            break
        ids.append(token)
    return ids[len(request.prompt_ids) :]


def test_greedy_is_the_argmax_of_each_prompt_alone(model: Any) -> None:
    got = answers(model, temperature=0.0, batch_size=5)
    for request in REQUESTS:
        expected = one_by_one(model, request, 12)
        assert list(got[request.id].token_ids) == expected
        assert got[request.id].finished == (len(expected) < 12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_and_company_change_nothing(model: Any, temperature: float) -> None:
    together = answers(model, temperature=temperature, batch_size=len(REQUESTS))
    assert together == answers(model, temperature=temperature, batch_size=1)
    assert together == answers(model, list(reversed(REQUESTS)), temperature=temperature, batch_size=3)
    alone = answers(model, REQUESTS[4:5], temperature=temperature)
    assert alone["p4"] == together["p4"]


def test_seed_and_id_decide_the_draws(model: Any) -> None:
    first, again, other = (answers(model, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    same_prompt = answers(model, [Request(f"copy {number}", (5, 6)) for number in range(6)])
    assert len({answer.token_ids for answer in same_prompt.values()}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.3, 0.5)])
def test_draws_are_those_of_the_definition_bit_for_bit(dtype: torch.dtype, temperature: float, top_p: float) -> None:
    """At the first number above u times the total, also for fewer rows than before and for more."""
    draw = sampling._Draw(temperature, top_p, 0, 8)
    for place, rows in enumerate((5, 5, 3, 9)):
        scores = 4 * torch.randn(rows, 503, dtype=dtype, generator=torch.Generator().manual_seed(place))
        given = scores.clone()
        scaled = scores.double() / temperature
        if top_p < 1:
            scaled = TopPLogitsWarper(top_p)(torch.zeros(0), scaled)  # type: ignore[arg-type]
        sums = scaled.softmax(-1).cumsum(-1)
        uniform = [float(sampling._uniforms(0, str(row), 8)[place]) for row in range(rows)]
        expected = [int((some > u * some[-1]).nonzero()[0]) for some, u in zip(sums, uniform, strict=True)]
        assert draw.tokens(scores, [(str(row), place) for row in range(rows)]) == expected
        assert torch.equal(draw._room[1, :rows], sums)  # type: ignore[index]
        assert torch.equal(scores, given)


def test_a_draw_makes_no_copies_of_the_logits() -> None:
    class Large(TorchDispatchMode):
        places: set[int] = set()  # noqa: RUF012

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.numel() >= 4 * 1000:
                self.places.add(made.untyped_storage().data_ptr())
            return made

    draw, scores = sampling._Draw(0.7, 1.0, 0, 8), torch.randn(4, 1000)
    rows = [(str(row), 0) for row in range(4)]
    draw.tokens(scores, rows)
    kept = draw._room
    assert kept is not None
    with Large() as large:
        draw.tokens(scores, rows)
        draw.tokens(scores[:3], rows[:3])
    assert large.places == {kept.untyped_storage().data_ptr()}
    assert draw._room is kept


def test_draws_follow_the_models_distribution(model: Any) -> None:
    prompt = (9, 4, 11)
    requests = [Request(str(number), prompt) for number in range(4000)]
    drawn = answers(model, requests, max_new_tokens=1, batch_size=4000, temperature=2.0)
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    for answer in drawn.values():
        for token in answer.token_ids:
            counts[token] += 1
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / 2.0).softmax(-1)
    expected[[END, OTHER_END]] = 0.0  # an end token is not part of an answer
    assert (counts / 4000 - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_top_p_keeps_the_smallest_set_that_reaches_it(model: Any) -> None:
    prompt = (9, 4, 11)
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    ranked = probabilities.argsort(descending=True)
    size = int((probabilities[ranked].cumsum(0) < 0.5).sum()) + 1
    allowed = {int(token) for token in ranked[:size]}
    drawn = answers(model, [Request(str(n), prompt) for n in range(300)], max_new_tokens=1, batch_size=300, top_p=0.5)
    assert {token for answer in drawn.values() for token in answer.token_ids} <= allowed


def test_stops_at_every_end_token(model: Any) -> None:
    greedy = answers(model, temperature=0.0, eos_token_ids={END})
    source = next(answer for answer in greedy.values() if len(answer.token_ids) > 3)
    stop = source.token_ids[2]
    cut = answers(model, temperature=0.0, eos_token_ids={END, stop})[source.id]
    assert cut.token_ids == source.token_ids[: source.token_ids.index(stop)]
    assert cut.finished


@pytest.mark.parametrize("processors", [[], [TemperatureLogitsWarper(1.0)]])
def test_random_numbers_are_kept_for_unfinished_answers_only(
    model: Any, processors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[Any] = []
    original = sampling._Draw

    def kept_draw(*args: Any) -> Any:
        draws.append(original(*args))
        return draws[0]

    monkeypatch.setattr(sampling, "_Draw", kept_draw)
    requests = [Request(f"{number}", (3 + number % 9,)) for number in range(40)]
    given: dict[str, Any] = {"eos_token_ids": {END, OTHER_END}, "max_new_tokens": 30, "batch_size": 4}
    kept = [len(draws[0]._streams) for _ in answer_batches(model, requests, processors=processors, **given)]
    assert max(kept) < 4
    assert len(kept) >= 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_are_named(model: Any, temperature: float) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[5, 3] = float("nan")
    with raises(ModelError, "not finite"):
        answers(broken, REQUESTS[:1], temperature=temperature)
    with raises(ModelError, "not finite"):
        answers(broken, REQUESTS[:4], temperature=temperature, processors=[TemperatureLogitsWarper(1.0)])


def test_leaves_the_model_as_it_was(model: Any) -> None:
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=1, max_length=3)
    model.train()
    plain = model.generation_config
    try:
        got = answers(model, temperature=0.0)
        assert model.generation_config is plain
        assert model.training
    finally:
        model.generation_config = GenerationConfig()
        model.eval()
    assert got == answers(model, temperature=0.0)


def test_end_tokens_come_from_both_places(model: Any) -> None:
    class Tokenizer:
        eos_token_id: int | None = 7

    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=[5, 3])
        assert end_token_ids(model, Tokenizer()) == (3, 5, 7)
        model.generation_config = GenerationConfig()
        Tokenizer.eos_token_id = None
        with raises(ModelError, "eos_token_id"):
            end_token_ids(model, Tokenizer())
    finally:
        model.generation_config = own


def test_no_room_is_an_error(model: Any) -> None:
    with raises(SettingError, "p5"):
        answers(model, max_new_tokens=60)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_the_log_probs_of_openings_are_those_of_one_text_at_a_time(family: str) -> None:
    """Prompts longer than the sliding window, openings of different lengths and numbers, a batch that is not full."""
    model = tiny_model(family, dtype=torch.float64).eval().requires_grad_(False)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [9, 8, 7]]
    openings = [[[5, 6, 7, 8], [3]], [[1]], [[7, 8], [9, 9, 9, 2, 2], [0]]]
    found = opening_logps(model, prompts, openings, batch_size=2)
    expected = [[float(logp(model, ids, one)) for one in some] for ids, some in zip(prompts, openings, strict=True)]
    assert [len(some) for some in found] == [2, 1, 3]
    for some, wanted in zip(found, expected, strict=True):
        assert some == pytest.approx(wanted, abs=1e-9)
