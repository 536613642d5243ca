from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bfpo.core.errors import ModelError, SettingError
from bfpo.data.pack import Form, collate_pairs
from bfpo.policy.head import tied_embedding
from bfpo.policy.logps import sequence_logps, use_own_logits
from bfpo.policy.probe import choose_form
from messages import raises
from tiny import SIZES, VOCABULARY, logp, tiny_model, tiny_pairs

PAIRS = tiny_pairs(5, 3)
TOKENS = {
    "prompt": sum(len(pair.prompt_ids) for pair in PAIRS),
    "completion": sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in PAIRS),
}


def packed_model(**settings: Any) -> Any:
    model = tiny_model(**settings)
    assert choose_form(model, longest_text=12) == "packed"
    return model


class Wrapped(nn.Module):
    """What data parallelism does: the model is `.module` and the signature says nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_every_token_goes_through_the_model_once_and_completions_alone_through_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = packed_model()
    backbone: list[int] = []
    head: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, __: backbone.append(inputs[0].shape[:-1].numel()))
    from bfpo.policy import logps as module

    left_over: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: left_over.append(inputs[0].shape[:-1].numel()))
    inner = module.head_logps

    def counted(linear: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        head.append(len(hidden))
        return inner(linear, hidden, *args, **kwargs)

    monkeypatch.setattr(module, "head_logps", counted)
    sequence_logps(model, collate_pairs(PAIRS))
    assert backbone == [TOKENS["prompt"] + TOKENS["completion"]]
    assert head == [TOKENS["completion"]]
    assert left_over == [0]  # the head's own forward pass has nothing to do


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_wrappers_and_adapters_are_seen_through(form: Form) -> None:
    batch = collate_pairs(PAIRS, form=form)
    expected = sequence_logps(packed_model(), batch).logps
    torch.testing.assert_close(sequence_logps(Wrapped(packed_model()), batch).logps, expected, rtol=0, atol=0)
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert choose_form(adapted, longest_text=12) == "packed"
    torch.testing.assert_close(sequence_logps(Wrapped(adapted), batch).logps, expected, rtol=1e-6, atol=0)


def test_an_adapter_on_the_head() -> None:
    """The head's own forward runs, chunk by chunk; its gradient is that of whole logits."""
    gradients = []
    for own in (False, True):
        model = tiny_model(dtype=torch.float64)
        torch.manual_seed(3)
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        )
        if own:
            use_own_logits(adapted)
        logps = sequence_logps(adapted, collate_pairs(PAIRS, form="padded"), chunk_rows=3).logps
        (logps * torch.arange(1.0, 11.0)).sum().backward()
        gradients.append((logps.detach(), [p.grad for p in adapted.parameters() if p.grad is not None]))
    (logps, some), (expected, other) = gradients
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=0)
    assert len(some) == 2
    for one, two in zip(some, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_hooks_are_gone_afterwards_and_the_model_works_as_before() -> None:
    model = packed_model()
    ids = torch.arange(3, 15)[None]
    before = tiny_model()(input_ids=ids).logits
    sequence_logps(model, collate_pairs(PAIRS))
    with pytest.raises(KeyError):
        sequence_logps(model, {"input_ids": ids})
    assert not model._forward_hooks
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    left = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = model.generate(left, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = tiny_model().generate(left, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)


class NoHead(nn.Module):
    config = tiny_model().config

    def get_output_embeddings(self) -> None:
        return None


def test_what_has_no_log_probs() -> None:
    batch = collate_pairs(PAIRS)
    with raises(SettingError, "median"):
        sequence_logps(tiny_model(), batch, reduction="median")  # type: ignore[arg-type]
    with raises(ModelError, "NoHead"):
        sequence_logps(NoHead(), collate_pairs(PAIRS, form="padded"))
    with raises(ModelError, "sdpa"):
        sequence_logps(tiny_model(), batch)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for again in (False, True):
        model = packed_model(dtype=torch.float64).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("down_proj" in name)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sequence_logps(model, collate_pairs(PAIRS)).logps.pow(2).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# A head tied to the embedding, both training

PADDING = 7


def tied_model(family: str = "llama", **settings: Any) -> Any:
    return tiny_model(family, tie_word_embeddings=True, pad_token_id=PADDING, **settings).train()


def tied_pairs() -> list[Any]:
    """Pairs in which the padding token, whose embedding does not train, is text."""
    pairs = tiny_pairs(5, 3)
    pairs[0].prompt_ids[-1] = pairs[1].chosen_ids[0] = pairs[2].rejected_ids[-1] = PADDING
    return pairs


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(model: Any, expected: dict[str, Tensor]) -> None:
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert float((one - expected[name]).norm() / expected[name].norm()) < 1e-6, name  # the norms are float32


def by_the_definition(model: Any, pairs: list[Any], weights: Tensor) -> dict[str, Tensor]:
    """Gradients of the weighted sum of the log-probs, chosen ones first, from the model's own logits."""
    sides = [(pair, pair.chosen_ids) for pair in pairs] + [(pair, pair.rejected_ids) for pair in pairs]
    torch.stack(
        [w * logp(model, pair.prompt_ids, ids) for w, (pair, ids) in zip(weights, sides, strict=True)]
    ).sum().backward()
    found = gradients_of(model)
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "cohere"])
@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize("chunk_rows", [3, 256])
def test_gradients_of_a_tied_head_are_those_of_the_definition(family: str, form: Form, chunk_rows: int) -> None:
    """Over two micro-batches, and after a second backward pass of the first."""
    model, pairs = tied_model(family, dtype=torch.float64), tied_pairs()
    weights = torch.linspace(-1, 2, 10, dtype=torch.float64)
    expected = by_the_definition(model, pairs, weights)
    choose_form(model, form, longest_text=12)
    for some, share in ((pairs[:2], [0, 1, 5, 6]), (pairs[2:], [2, 3, 4, 7, 8, 9])):
        found = sequence_logps(model, collate_pairs(some, form=form), chunk_rows=chunk_rows).logps
        (0.5 * (weights[share] * found).sum()).backward(retain_graph=True)
        (0.5 * (weights[share] * found).sum()).backward()
    check_gradients(model, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_model_with_a_tied_head(reentrant: bool) -> None:
    weights = torch.linspace(-1, 2, 10, dtype=torch.float64)
    model, pairs = tied_model(dtype=torch.float64), tied_pairs()
    expected = by_the_definition(model, pairs, weights)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    (weights * sequence_logps(model, collate_pairs(pairs, form="padded")).logps).sum().backward()
    check_gradients(model, expected)


def test_gradients_of_a_part_of_a_tied_model() -> None:
    """Of a layer alone, of the embedding alone, and of a head whose hidden states do not lead to the embedding."""
    weights = torch.linspace(-1, 2, 10, dtype=torch.float64)
    model, pairs = tied_model(dtype=torch.float64), tied_pairs()
    expected = by_the_definition(model, pairs, weights)
    total = (weights * sequence_logps(model, collate_pairs(pairs, form="padded")).logps).sum()
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        (one,) = torch.autograd.grad(total, [model.get_parameter(name)], retain_graph=True)
        torch.testing.assert_close(one, expected[name], rtol=1e-10, atol=1e-12)
    model.model.norm.register_forward_hook(lambda _, __, hidden: hidden.detach())
    batch, found = collate_pairs(pairs, form="padded"), []
    for untied in (False, True):
        if untied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        (weights * sequence_logps(model, batch).logps).sum().backward()
        found.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)


class MadeOfShape(TorchDispatchMode):
    """Names of the operations that give a tensor of this shape memory of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.names = shape, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.shape == self.shape and leaf.data_ptr() not in given:
                self.names.append(function.overloadpacket.__name__)
        return output


@pytest.mark.parametrize("chunk_rows", [3, 256])
def test_the_gradient_of_a_tied_weight_is_made_once(chunk_rows: int) -> None:
    """No zeros of its size, no second one for the embedding, no sum of two, no copy."""
    model = tied_model()
    with MadeOfShape(VOCABULARY, SIZES["hidden_size"]) as made:
        sequence_logps(model, collate_pairs(tied_pairs(), form="padded"), chunk_rows=chunk_rows).logps.sum().backward()
    assert made.names == ["mm"]
    assert tied_embedding(model, model.lm_head) is model.model.embed_tokens


@pytest.mark.parametrize("tied", [False, True])
def test_under_autocast_a_head_that_trains_is_cast_once(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied).train()
    batch = collate_pairs(tied_pairs(), form="padded")
    with MadeOfShape(VOCABULARY, SIZES["hidden_size"]) as made, torch.autocast("cpu", dtype=torch.bfloat16):
        logps = sequence_logps(model, batch).logps
        assert made.names == ["_to_copy"]
        assert torch.is_autocast_enabled("cpu")
    with MadeOfShape(VOCABULARY, SIZES["hidden_size"]) as made:
        logps.sum().backward()
    assert made.names.count("zeros_like") == 1  # the float32 gradient, to which products of bfloat16 are added
    assert "_to_copy" not in made.names
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_autocast_comes_back_after_a_head_that_fails() -> None:
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            sequence_logps(model, collate_pairs(PAIRS, form="padded"))
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_an_embedding_that_keeps_a_gradient_of_its_own() -> None:
    """Not tied, frozen, rounded, scaled or limited."""
    model = tied_model()
    assert tied_embedding(model.requires_grad_(False), model.lm_head) is None
    for other in (tiny_model(), tied_model(dtype=torch.bfloat16), tied_model("gemma3")):
        assert tied_embedding(other, other.lm_head) is None
    for setting in ("sparse", "scale_grad_by_freq", "max_norm"):
        limited = tied_model()
        setattr(limited.model.embed_tokens, setting, 1.0)
        assert tied_embedding(limited, limited.lm_head) is None
