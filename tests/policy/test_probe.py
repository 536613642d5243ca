"""The way a model's log-probs go: found by asking it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from bfpo.core.errors import ModelError, SettingError
from bfpo.data.pack import collate_pairs
from bfpo.policy import probe
from bfpo.policy.logps import sequence_logps, uses_own_logits
from bfpo.policy.probe import choose_form
from messages import raises, says
from tiny import FAMILIES, VOCABULARY, tiny_model, tiny_pairs

PAIRS = tiny_pairs(5, 3)


def mamba() -> Any:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2))


def bloom() -> Any:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2))


def prompt_tuned() -> Any:
    return get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def window_in_the_mask_only() -> Any:
    """A sliding window that attention is not told of: only the mask would hold it."""
    model = tiny_model()
    model.config.sliding_window = 6
    return model


# Which of these it is depends on the version of transformers.
REASONS = (
    r"cannot change its attention|does not run on packed rows[^(]* \(.*\)|gives other log-probs [^;]*"
    r"|has layers of type [a-z_]*, which mix tokens outside attention|mixes tokens outside attention, in [^;]*"
)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (mamba, "MambaForCausalLM"),
        (bloom, "BloomForCausalLM"),
        (prompt_tuned, "LlamaForCausalLM"),
        (window_in_the_mask_only, "LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_packed_is_padded_and_says_why(make: Any, key: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with caplog.at_level(logging.INFO, logger="bfpo"):
        assert choose_form(model, longest_text=12) == "padded"
    says(caplog, "padded", key, mask=REASONS)
    with raises(ModelError, key, mask=REASONS):
        choose_form(make(), "packed", longest_text=12)


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
HEADS = {"head_dim": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
# Models that mix the tokens of a row outside their attention, or scale it by the place in the row.
MIXERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "convolution": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "linear attention": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**HEADS, **LINEAR}),
    "convolution in the attention": ("ZayaConfig", "ZayaForCausalLM", HEADS),
    "temperature": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {**HEADS, **EXPERTS, "attn_temperature_tuning": True, "floor_scale": 8, "no_rope_layers": [1, 0]},
    ),
}


def mixer(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    config, model, sizes = MIXERS[kind]
    if not hasattr(transformers, model):
        pytest.skip(f"{model} is not in this version of transformers")
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **sizes))
    return made.to(dtype)


@pytest.mark.parametrize("by_numbers", [False, True], ids=["config", "numbers"])
@pytest.mark.parametrize("kind", MIXERS)
def test_fresh_weights_in_bfloat16_hide_no_mixing(
    kind: str, by_numbers: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Log-probs of fresh weights depend on the text by less than bfloat16 rounds, and the error is a part of that."""
    if by_numbers:
        monkeypatch.setattr(probe, "_check_config", lambda _: None)
    with caplog.at_level(logging.INFO, logger="bfpo"):
        assert choose_form(mixer(kind), longest_text=64) == "padded"
    assert ("gives other log-probs on packed rows" in caplog.text) == by_numbers


@pytest.mark.parametrize("kind", MIXERS)
def test_mixing_is_known_without_weights(kind: str) -> None:
    assert choose_form(mixer(kind).to("meta"), longest_text=64) == "padded"


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_attention_in_bfloat16_is_packed(family: str) -> None:
    assert choose_form(tiny_model(family).to(torch.bfloat16), "packed", longest_text=12) == "packed"


def test_log_probs_that_do_not_depend_on_the_text_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    with caplog.at_level(logging.INFO, logger="bfpo"):
        assert choose_form(model, longest_text=12) == "padded"
    says(caplog, "padded", "LlamaForCausalLM", mask=r"(?<=rounding by )[\d.e-]+")


def test_a_model_that_cannot_be_packed_is_left_as_it_was() -> None:
    model = mamba()
    expected = sequence_logps(mamba(), collate_pairs(PAIRS, form="padded")).logps
    choose_form(model, longest_text=12)
    torch.testing.assert_close(sequence_logps(model, collate_pairs(PAIRS, form="padded")).logps, expected)


def test_windows_that_attention_is_told_of_are_served() -> None:
    assert choose_form(tiny_model("mistral"), longest_text=12) == "packed"
    assert choose_form(tiny_model("gemma3"), longest_text=12) == "packed"


def test_logits_that_the_head_does_not_give(caplog: pytest.LogCaptureFixture) -> None:
    """A model of one's own that does something more to its logits: they are taken whole."""
    batch = collate_pairs(PAIRS, form="padded")
    plain = sequence_logps(tiny_model(), batch).logps
    model = tiny_model()
    model.register_forward_hook(
        lambda _, __, output: type(output)(logits=3 * output.logits) if "logits" in output else None
    )
    with caplog.at_level(logging.INFO, logger="bfpo"):
        choose_form(model, longest_text=12)
    says(caplog, "logits")
    found = sequence_logps(model, batch).logps.detach()
    assert not torch.allclose(found, plain, rtol=0.1)
    ids = torch.tensor([[*PAIRS[0].prompt_ids.tolist(), *PAIRS[0].chosen_ids.tolist()]])
    scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
    first = len(PAIRS[0].prompt_ids)
    expected = sum(scores.detach()[first - 1 + i, int(token)] for i, token in enumerate(PAIRS[0].chosen_ids))
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_autocast_is_no_reason(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Weights of float32, all of which train, under bfloat16 autocast."""
    with caplog.at_level(logging.INFO, logger="bfpo"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose_form(tiny_model(seed=seed), longest_text=12) == "packed"
    assert caplog.messages == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_large_logits_is_no_reason(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """A trained model finds random tokens so unlikely that half precision rounds their log-probs by nats."""
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(200)
    with caplog.at_level(logging.INFO, logger="bfpo"):
        assert choose_form(model.to(dtype), longest_text=12) == "packed"
    assert caplog.messages == []


def gpt2() -> Any:
    """Small random weights, which hide much; positions are learnt."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.parametrize("make", [gpt2, lambda: tiny_model("gpt_neox")], ids=["learnt", "rotary"])
def test_positions_that_a_model_makes_itself_are_a_reason(make: Any) -> None:
    model = make()
    if choose_form(make(), longest_text=12) != "packed":
        pytest.skip(f"{type(model).__name__} of this version of transformers cannot be packed")
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    assert choose_form(model, longest_text=12) == "padded"


def test_asking_changes_nothing() -> None:
    model = tiny_model(attention_dropout=0.3).train()
    model.lm_head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4)
    state = torch.get_rng_state()
    choose_form(model, longest_text=12)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.lm_head.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_weights_is_judged_by_its_config() -> None:
    with torch.device("meta"):
        assert choose_form(tiny_model(), longest_text=12) == "packed"
        assert choose_form(tiny_model("mistral"), longest_text=6) == "packed"
        assert choose_form(tiny_model("mistral"), longest_text=7) == "padded"


def test_unknown_name() -> None:
    with raises(SettingError, "attention"):
        choose_form(tiny_model(), "flash", longest_text=12)


def test_own_logits_hold_for_the_model_when_it_is_compiled() -> None:
    model = tiny_model()
    model.register_forward_hook(
        lambda _, __, output: type(output)(logits=3 * output.logits) if "logits" in output else None
    )
    choose_form(model, longest_text=12)
    assert uses_own_logits(torch.compile(model, backend="eager"))
    assert not uses_own_logits(torch.compile(tiny_model(), backend="eager"))


def test_experts_are_packed() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    assert choose_form(model, "packed", longest_text=12) == "packed"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_texts_that_would_scale_the_positions_of_others_are_refused(rope: dict[str, Any]) -> None:
    limit = 32
    longest = 32 if rope["rope_type"] == "dynamic" else 64
    model = tiny_model(rope_parameters=rope, max_position_embeddings=longest)
    assert choose_form(model, longest_text=limit) == "packed"
    for attention in ("auto", "padded"):
        with raises(ModelError, "max_length"):
            choose_form(model, attention, longest_text=limit + 1)


def test_texts_beyond_learned_positions_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    choose_form(model, longest_text=32)
    with raises(ModelError):
        choose_form(model, longest_text=33)


def test_a_model_that_does_not_run_says_so() -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel\nfor this dtype")

    model = tiny_model()
    model.model.layers[0].register_forward_pre_hook(fails)
    with raises(ModelError, "LlamaForCausalLM"):
        choose_form(model, longest_text=12)
