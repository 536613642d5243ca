from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bfpo.core.errors import ModelError, SettingError
from bfpo.data.pack import Form, collate_pairs
from bfpo.policy.logps import sequence_logps, use_own_logits
from bfpo.policy.probe import choose_form
from messages import raises
from tiny import tiny_model, tiny_pairs

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
