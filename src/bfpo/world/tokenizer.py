"""A word-level tokenizer for the closed world, so that a model of a hundred thousand parameters can learn it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo.world.world import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "build_tokenizer", "save_tokenizer"]

_PAD, _UNKNOWN, _USER, _ASSISTANT, _END = "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    f"{{%- if message['role'] == 'assistant' -%}}{_ASSISTANT}{{{{ message['content'] }}}}{_END}"
    f"{{%- else -%}}{_USER}{{{{ message['content'] }}}}"
    "{%- endif -%}{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{_ASSISTANT}{{%- endif -%}}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per word with its leading space, or mark; decoding gives the text back."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [_PAD, _UNKNOWN, _USER, _ASSISTANT, _END, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=_UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    core.decoder = decoders.Fuse()
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # its constructor has no types
    return make(
        tokenizer_object=core,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=[_USER, _ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer as a folder that `transformers` loads."""
    build_tokenizer().save_pretrained(str(folder))
