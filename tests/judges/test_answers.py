from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from bfpo.core.errors import ModelError
from bfpo.judges.answers import label_tokens
from bfpo.judges.formats import FORMATS
from bfpo.judges.local import PromptEncoder
from helpers import byte_tokenizer
from messages import raises
from scripted import completion


def test_a_text_without_a_template_starts_as_the_tokenizer_lets_texts_start() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    for name in ("harmbench", "wildguard", "shieldgemma"):  # the second writes <s> itself
        ids = PromptEncoder(tokenizer).ids([completion("a <s> b")], FORMATS[name].ask)
        assert ids[0] == 0
        assert ids.count(0) == 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_real_tokenizers_tell_the_words_apart(shared_data: Path, family: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shared_data / "tokenizers" / f"{family}_tokenizer.json"))
    encoder = PromptEncoder(tokenizer)
    for made in FORMATS.values():
        labels = label_tokens(encoder, f"Answer:\n\n{made.answer_prefix}", [made.safe_words, made.unsafe_words])
        first = [{tokenizer.decode([token]).strip().lower()[:2] for token in group} for group in labels.groups]
        assert first[0] <= {"no", "sa"}
        assert first[1] <= {"ye", "un", "co"}


def test_a_space_alone_is_no_word() -> None:
    encoder = PromptEncoder(byte_tokenizer())
    assert label_tokens(encoder, "", [("A", " A"), ("B",)]).groups == ((4 + 65,), (4 + 66,))
    shared = label_tokens(encoder, "x", [(" no",), (" yes",)])
    assert (shared.shared, shared.groups) == ((4 + 32,), ((4 + 110,), (4 + 121,)))
    with raises(ModelError):
        label_tokens(encoder, "", [(" A",), ("B",)])
