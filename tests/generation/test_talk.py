"""Replies of a conversation: equal to those of `bfpo generate`, in parts that are whole characters."""

from __future__ import annotations

from typing import Any

import pytest

from bfpo.core.errors import ModelError, SettingError, StopRequest
from bfpo.core.schema import Message
from bfpo.data.chat import ChatEncoder
from bfpo.generation.engines import decode
from bfpo.generation.sampling import Request, answer_batches
from bfpo.generation.talk import Talk, _Watch
from helpers import CHATML, IM_END, byte_ids, byte_tokenizer
from messages import raises
from tiny import tiny_model

ENDS = (IM_END,)
SAMPLING: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}


def talk(**settings: Any) -> tuple[Talk, Any, ChatEncoder]:
    model = tiny_model(**{"vocab_size": 260, **settings})
    chat = ChatEncoder(byte_tokenizer(CHATML))
    return Talk("tiny", model, chat, ENDS), model, chat


def test_a_reply_is_that_of_generation_and_its_parts_are_its_text() -> None:
    one, model, chat = talk()
    history: list[Message] = []
    for number, text in enumerate(("hello", "and then?")):
        parts: list[str] = []
        reply = one.reply(text, f"reply-{number}", parts.append, **SAMPLING)
        history.append(Message("user", text))
        ids = tuple(chat.encode(history, (), name="here").prompt)
        (answer,) = next(answer_batches(model, [Request(f"reply-{number}", ids)], eos_token_ids=ENDS, **SAMPLING))
        shown = decode(chat.tokenizer, answer.token_ids, finished=answer.finished)
        assert reply.completion.text == shown == "".join(parts)
        assert (reply.completion.finished, reply.num_tokens) == (answer.finished, len(answer.token_ids))
        assert reply.completion.prompt == tuple(history)
        assert len(parts) > 1
        history.append(Message("assistant", reply.completion.text))


def test_a_new_conversation_forgets_and_has_its_system_prompt() -> None:
    one, *_ = talk()
    first = one.reply("hello", "a", lambda text: None, **SAMPLING)
    one.reply("more", "b", lambda text: None, **SAMPLING)
    one.reset(None)
    assert one.reply("hello", "a", lambda text: None, **SAMPLING) == first
    one.reset("be brief")
    prompt = one.reply("hello", "a", lambda text: None, **SAMPLING).completion.prompt
    assert prompt == (Message("system", "be brief"), Message("user", "hello"))


def test_a_character_is_shown_when_it_is_whole() -> None:
    parts: list[str] = []
    watch = _Watch(byte_tokenizer(), 0, parts.append)
    ids = byte_ids("aé€x")
    for end in range(1, len(ids) + 1):
        watch.show(ids[:end])
    assert parts == ["a", "é", "€", "x"]
    watch.show([*ids, *byte_ids("é")[:1]], last=True)  # half a character at the very end is shown as it is
    assert parts[-1] == "\ufffd"


def test_ctrl_c_ends_the_reply_and_keeps_it() -> None:
    one, *_ = talk()

    def stop(error: type[BaseException]) -> Any:
        parts: list[str] = []

        def on_text(text: str) -> None:
            parts.append(text)
            if len(parts) == 3:
                raise error

        return on_text

    reply = one.reply("hello", "a", stop(KeyboardInterrupt), **SAMPLING)
    assert reply.stopped
    assert not reply.completion.finished
    assert 3 <= reply.num_tokens < SAMPLING["max_new_tokens"]
    assert one.reply("more", "b", lambda text: None, **SAMPLING).completion.prompt[1].content == reply.completion.text
    with pytest.raises(StopRequest):
        one.reply("more", "c", stop(StopRequest), **SAMPLING)


def test_a_message_without_room_is_no_part_of_the_conversation() -> None:
    one, *_ = talk(max_position_embeddings=80)
    with raises(SettingError, "/reset"):
        one.reply("x" * 90, "a", lambda text: None, **SAMPLING)
    assert one.reply("x", "b", lambda text: None, **SAMPLING).completion.prompt == (Message("user", "x"),)


def test_a_message_with_a_token_that_the_model_lacks_is_no_part_of_the_conversation() -> None:
    one, *_ = talk(vocab_size=4 + 0xC0)  # no row for the first byte of a character beyond ASCII
    with raises(ModelError, "the conversation"):
        one.reply("ä", "a", lambda text: None, **SAMPLING)
    assert one.reply("x", "b", lambda text: None, **SAMPLING).completion.prompt == (Message("user", "x"),)


def test_a_reply_is_no_longer_than_the_model_has_positions() -> None:
    one, _, chat = talk(max_position_embeddings=80)
    num_prompt = len(chat.encode([Message("user", "hello")], (), name="here").prompt)
    reply = one.reply("hello", "a", lambda text: None, max_new_tokens=500, temperature=1.0, seed=3)
    assert reply.num_tokens == 80 - num_prompt
    assert not reply.completion.finished
    with raises(SettingError, "/reset"):
        one.reply("hello", "b", lambda text: None, **SAMPLING)


def test_positions_that_the_model_scales_are_counted() -> None:
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 80, "rope_theta": 10_000.0}
    one, _, chat = talk(max_position_embeddings=80, rope_parameters=scaled)
    num_prompt = len(chat.encode([Message("user", "x" * 90)], (), name="here").prompt)
    assert 80 < num_prompt < 160
    reply = one.reply("x" * 90, "a", lambda text: None, max_new_tokens=500, temperature=1.0, seed=3)
    assert reply.num_tokens == 160 - num_prompt
