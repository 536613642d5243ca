"""What is trained on: model sizes, a word-level tokenizer, and random pairs as token ids and as text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bfpo.data.tokenize import TokenPair

__all__ = [
    "LORA",
    "MODELS",
    "ModelShape",
    "Trains",
    "make_model",
    "make_pairs",
    "make_texts",
    "make_tokenizer",
    "pairs_of_length",
    "real_model",
    "shape_of",
    "text_rows",
]

UNKNOWN, BOS, EOS = range(3)
FIRST_WORD = 3
TRAINABLE = "down_proj.weight"
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}  # the defaults of bfpo

Trains = Literal["down_proj", "all", "lora", "qlora"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama with random weights; the head is not tied to the embeddings unless `tied`.

    `key_heads`: the key-value heads, `None` for as many as `heads`.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int | None = None
    tied: bool = False

    def attention_weights(self) -> int:
        """Return the weights of a layer's attention: queries, keys, values, output."""
        return 2 * self.hidden**2 + 2 * self.hidden**2 * (self.key_heads or self.heads) // self.heads

    def layer_weights(self) -> int:
        """Return the weights of a layer, norms left out."""
        return self.attention_weights() + 3 * self.hidden * self.intermediate

    def parameters(self) -> int:
        """Return the number of parameters, norms left out."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.layers * self.layer_weights()


MODELS = {
    "XS": ModelShape(vocabulary=512, hidden=64, intermediate=128, layers=2, heads=2),  # for the smoke form and tests
    "S": ModelShape(vocabulary=4096, hidden=256, intermediate=896, layers=2, heads=4),
    "M": ModelShape(vocabulary=32_000, hidden=512, intermediate=1792, layers=6, heads=8),
    # The shapes of Llama 3.2 1B and Llama 3.1 8B, as in docs/scaling.md.
    "1B": ModelShape(128_256, hidden=2048, intermediate=8192, layers=16, heads=32, key_heads=8, tied=True),
    "8B": ModelShape(128_256, hidden=4096, intermediate=14_336, layers=32, heads=32, key_heads=8),
}
"""S has 4 million parameters, M 56 million."""


def make_model(
    shape: ModelShape, *, seed: int = 0, device: str = "cpu", half: bool = False, trains: Trains = "down_proj"
) -> Any:
    """Return the model on its device with what trains chosen; the same weights for a seed and device.

    By default float32, and every `down_proj` trains and nothing else. With `half` frozen weights are bfloat16, and what
    trains is float32.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bfpo.policy.load import load_policy, set_trainable

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads or shape.heads,
        max_position_embeddings=8192,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=shape.tied,
        dtype=torch.bfloat16 if half else torch.float32,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if trains == "qlora":  # weights are quantised while they are read from files
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            make_tokenizer(shape.vocabulary).save_pretrained(folder)
            del model
            dtype = "bfloat16" if half else "float32"
            return load_policy(folder, lora=LORA, quantize="nf4", dtype=dtype, masters=True).model
    if trains == "lora":
        model = set_trainable(model, "all", LORA)
    else:
        set_trainable(model, "all" if trains == "all" else [f"*.{TRAINABLE}"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def real_model(folder: str, *, trains: Trains = "all", half: bool = False) -> Any:
    """Return the model of a folder with everything or every `down_proj` training; `half` as for `make_model`."""
    from bfpo.policy.load import load_policy

    trainable = "all" if trains == "all" else [f"*.{TRAINABLE}"]
    model = load_policy(folder, trainable=trainable, dtype="bfloat16" if half else "float32").model
    for parameter in model.parameters():
        parameter.detach().sum()  # weights mapped from a file are resident once they were read
    return model


def shape_of(folder: str) -> ModelShape:
    """Return the sizes of the model in a folder."""
    from bfpo.policy.source import read_config

    config = read_config(folder)
    return ModelShape(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        tied=bool(config.tie_word_embeddings),
    )


def make_tokenizer(vocabulary: int, *, end: int = EOS) -> Any:
    """Return a tokenizer in which the word `w{i}` is token `i`, so that text and ids say the same.

    `end` is the end token; it and the first two have words of their own (`_word`).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {_word(i, end): i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_pairs(num: int, *, vocabulary: int, seed: int, scale: float = 1.0) -> list[TokenPair]:
    """Return random pairs of the lengths of chat data.

    Log-normal: prompts of 50-500 tokens (median 150), completions of 50-400 (median 160), the end token included.
    `scale` shortens all of it, for smoke runs.
    """
    generator = np.random.default_rng(seed)
    prompts = _lengths(generator, num, median=150 * scale, low=50 * scale, high=500 * scale)
    completions = _lengths(generator, 2 * num, median=160 * scale, low=50 * scale, high=400 * scale)
    sizes = [(int(prompts[i]), int(completions[2 * i]), int(completions[2 * i + 1])) for i in range(num)]
    return _random_pairs(sizes, vocabulary, generator)


def make_texts(num: int, *, vocabulary: int, seed: int, scale: float = 1.0) -> list[TokenPair]:
    """Return random prompts with one completion each, of the lengths of HH-RLHF.

    Log-normal as its chosen answers after their dialogues: prompts of 10-480 tokens (median 86), completions of 8-240
    (median 40), the end token included. `scale` shortens all of it, for smoke runs.
    """
    generator = np.random.default_rng(seed)
    prompts = _lengths(generator, num, median=86 * scale, low=10 * scale, high=480 * scale, sigma=1.1)
    completions = _lengths(generator, num, median=40 * scale, low=8 * scale, high=240 * scale, sigma=0.8)
    return _random_pairs(
        [(int(a), int(b), 0) for a, b in zip(prompts, completions, strict=True)], vocabulary, generator
    )


def pairs_of_length(num: int, *, length: int, vocabulary: int, seed: int) -> list[TokenPair]:
    """Return random pairs whose prompts and completions all have `length // 2` tokens."""
    half = length // 2
    return _random_pairs([(half, half, half)] * num, vocabulary, np.random.default_rng(seed))


def _lengths(
    generator: np.random.Generator, num: int, *, median: float, low: float, high: float, sigma: float = 0.6
) -> npt.NDArray[np.int64]:
    drawn = median * np.exp(sigma * generator.standard_normal(num))
    return np.clip(np.rint(drawn), max(2, low), max(2, high)).astype(np.int64)


def _random_pairs(
    sizes: Sequence[tuple[int, int, int]], vocabulary: int, generator: np.random.Generator
) -> list[TokenPair]:
    def words(count: int, *, ended: bool) -> npt.NDArray[np.int32]:
        ids = generator.integers(FIRST_WORD, vocabulary, size=count).astype(np.int32)
        if ended and count:
            ids[-1] = EOS
        return ids

    return [
        TokenPair(
            pair_id=f"pair-{i}",
            prompt_ids=words(prompt, ended=False),
            chosen_ids=words(chosen, ended=True),
            rejected_ids=words(rejected, ended=True),
            chosen_is_safe=float(generator.integers(2)),
            rejected_is_safe=float(generator.integers(2)),
        )
        for i, (prompt, chosen, rejected) in enumerate(sizes)
    ]


def text_rows(pairs: Sequence[TokenPair], *, end: int = EOS) -> list[dict[str, str]]:
    """Return the pairs as text that `make_tokenizer` reads back to the same ids."""
    return [
        {
            "prompt": _text(pair.prompt_ids, end),
            "chosen": " " + _text(pair.chosen_ids, end),
            "rejected": " " + _text(pair.rejected_ids, end),
        }
        for pair in pairs
    ]


def _text(ids: npt.NDArray[np.int32], end: int) -> str:
    return " ".join(_word(i, end) for i in ids.tolist())


def _word(token: int, end: int) -> str:
    return {UNKNOWN: "<unk>", BOS: "<s>", end: "</s>"}.get(token, f"w{token}")
