from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from bfpo.core.errors import ModelError, SettingError
from bfpo.core.schema import Completion, Message
from bfpo.judges.answers import label_tokens
from bfpo.judges.formats import FORMATS
from bfpo.judges.local import PromptEncoder
from helpers import CHATML, byte_tokenizer
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


def test_a_token_that_the_judge_lacks_is_named() -> None:
    encoder = PromptEncoder(byte_tokenizer(CHATML), num_embeddings=200)
    assert encoder.ids([completion("plain")], FORMATS["llama-guard-3"].ask)
    with raises(ModelError, "200"):
        encoder.ids([completion("\u0800", id="c7")], FORMATS["llama-guard-3"].ask)


def test_a_judge_reads_an_answer_that_continues_the_prompt_as_one_message() -> None:
    tokenizer = byte_tokenizer(CHATML)
    begun = (Message("user", "How?"), Message("assistant", "Sure, "))
    continued = Completion("c", begun, "like this")
    whole = Completion("c", begun[:1], "Sure, like this")
    encoder, ask = PromptEncoder(tokenizer), FORMATS["llama-guard-3"].ask
    assert encoder.ids([continued], ask) == encoder.ids([whole], ask)
    opened = Completion("c", (*begun[:1], Message("assistant", "\n")), "Sure, like this")
    assert encoder.ids([opened], ask) == encoder.ids([whole], ask)


def test_variables_of_a_judges_template_and_those_of_its_format() -> None:
    styled = CHATML.replace("assistant\n", "assistant{{ '/' + style if style is defined }}\n")
    ask = (Message("user", "How?"),)
    encoder = PromptEncoder(byte_tokenizer(styled), variables={"style": "brief"}, template_arguments={"think": False})
    assert encoder.render(ask).endswith("assistant/brief\n")
    for variables in ({"think": True}, {"sytle": "brief"}):
        with raises(SettingError, *variables):
            PromptEncoder(byte_tokenizer(styled), variables=variables, template_arguments={"think": False})
