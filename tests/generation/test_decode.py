"""Tokens of an answer to text: a continued answer keeps its first space, a cut one ends with a whole character."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bfpo.core.schema import Message
from bfpo.generation.engines import Made, Task, TransformersEngine, VllmEngine, decode
from bfpo.generation.sampling import Answer
from helpers import byte_ids, byte_tokenizer

WORDS = ["<unk>", "</s>", "▁Sure,", "▁here", "▁is", "▁the", "▁plan"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space before them, of which the first one is dropped in decoding, as SentencePiece does."""
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_continued_answer_keeps_its_first_space(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer()
    question = Message("user", "how")
    begun = Task("begun", (question, Message("assistant", "Sure, here")), (0, 2, 3))
    new = Task("new", (question,), (0,))
    answer = (4, 5, 6)
    made: list[Made] = []
    if engine == "transformers":
        monkeypatch.setattr(
            "bfpo.generation.engines.answer_batches",
            lambda model, requests, **settings: [[Answer(one.id, answer, True) for one in requests]],
        )
        TransformersEngine(None, tokenizer, {1}).complete([begun, new], made.extend)
    else:
        vllm: Any = object.__new__(VllmEngine)
        vllm._tokenizer, vllm._ends = tokenizer, {1}
        made = [vllm._made(task, SimpleNamespace(token_ids=[*answer, 1])) for task in (begun, new)]
    assert made == [Made("begun", " is the plan", True, 3), Made("new", "is the plan", True, 3)]


def test_a_text_that_ends_inside_a_character_is_no_context() -> None:
    tokenizer, ids = byte_tokenizer(), byte_ids("a€b")
    assert decode(tokenizer, ids[3:], before=ids[:3]) == tokenizer.decode(ids[3:])
    assert decode(tokenizer, ids[4:], before=ids[:4]) == "b"


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_an_answer_that_was_cut_ends_with_a_whole_character(num_bytes: int) -> None:
    ids = byte_ids("a€")[: 1 + num_bytes]
    assert decode(byte_tokenizer(), ids, finished=False) == ("a€" if num_bytes == 3 else "a")
    assert decode(byte_tokenizer(), ids).startswith("a")
    assert num_bytes == 3 or decode(byte_tokenizer(), ids) != "a"
