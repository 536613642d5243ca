"""Text that was rendered before: recognised where it is, and not where a text only mentions a token."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from bfpo.core.errors import DataError
from bfpo.core.schema import Completion, Message
from bfpo.data.chat import ChatEncoder
from bfpo.data.tokenize import check_tokens, token_notes, tokenize_pairs
from helpers import CHATML, SPECIAL, byte_tokenizer, make_pair
from messages import raises

ALLOWED = {"allow_changes": False, "allow_rendered": False}


def mark(prompt: str, *answers: str, template: str | None = CHATML) -> str:
    turns = (Message("user", prompt),) if prompt else ()
    return ChatEncoder(byte_tokenizer(template)).encode(turns, answers, name="x").rendered


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nHow far?<|im_end|>\n<|im_start|>assistant\n",
        " <s><|im_start|>system\nBe short.<|im_end|>",
        "How far?<|im_end|>\n<|im_start|>assistant\n",
        "<|start_header_id|>user<|end_header_id|>\n\nHow far?",  # another family's
        "[INST] How far? [/INST]",
        "<start_of_turn>user\nHow far?",
    ],
)
def test_a_rendered_prompt_is_recognised(prompt: str) -> None:
    assert mark(prompt, "A mile.", "None.")


@pytest.mark.parametrize(
    "answer", ["A mile.<|im_end|>", "A mile.</s>\n", "<|im_start|>assistant\nA mile.", "A mile.<|eot_id|>"]
)
def test_a_rendered_answer_is_recognised(answer: str) -> None:
    assert mark("How far?", "None.", answer)
    assert mark("", answer)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("How far?", "A mile."),
        ("What does </s> do in a tokenizer?", "It ends a text; <|im_end|> ends a turn."),
        ("Is <|im_start|>user a role?", "Yes."),
        ("a [INST] b", "c"),
        ("<b>bold</b>", "<i>x</i>"),
        ("User:\nHow far?", "Assistant:\nA mile."),
    ],
)
@pytest.mark.parametrize("template", [CHATML, None])
def test_a_text_that_mentions_tokens_is_text(prompt: str, answer: str, template: str | None) -> None:
    assert mark(prompt, answer, template=template) == ""


@pytest.mark.parametrize("special", [False, True])
def test_thoughts_are_not_marks_of_a_rendered_text(special: bool) -> None:
    """Qwen3 and SmolLM3 have tokens for them, and templates that write them."""
    template = CHATML.replace(
        "{{ m['content'] }}", "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    )
    thoughts = [AddedToken(mark, special=special) for mark in ("<think>", "</think>")]
    chat = ChatEncoder(byte_tokenizer(template, special=[*SPECIAL, *thoughts]))
    question = (Message("user", "What is 1+1?"),)
    answer = "<think>\nOne and one.\n</think>\n\nTwo."
    assert chat.encode(question, [answer], name="x").rendered == ""
    assert chat.encode(question, [f"{answer}<|im_end|>"], name="x").rendered == "<|im_end|>"
    assert chat.encode(question, ["<|im_start|>assistant\nTwo."], name="x").rendered == "<|im_start|>"


def rows(num_rendered: int, total: int) -> dict[str, Any]:
    tokenizer = byte_tokenizer(CHATML)
    pairs = [
        make_pair(f"q{n}", f"yes {n}<|im_end|>" if n < num_rendered else f"yes {n}", id=f"p{n}") for n in range(total)
    ]
    return tokenize_pairs(pairs, tokenizer)[1].as_row()


def test_most_rows_rendered_stop_and_fewer_are_counted() -> None:
    for num_rendered in (5, 10):
        with raises(DataError, f"{num_rendered} of 10 rows", "allow_rendered_text"):
            check_tokens("data", rows(num_rendered, 10), **ALLOWED)
    check_tokens("data", rows(10, 10), allow_changes=False, allow_rendered=True)
    some = rows(4, 10)
    check_tokens("data", some, **ALLOWED)
    assert some["rendered_before"] == {"<|im_end|>": 4}
    (note,) = token_notes("data", some)
    assert "4 of 10 rows" in note
    assert "rendered_before" not in rows(0, 10)


def test_completions_to_imitate_are_checked_too() -> None:
    made = [Completion("c", (Message("user", "[INST] q [/INST]"),), "a")]
    report = tokenize_pairs(made, byte_tokenizer(CHATML))[1].as_row()
    with raises(DataError, "1 of 1 rows"):
        check_tokens("data", report, **ALLOWED)
