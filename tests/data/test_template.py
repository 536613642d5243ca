"""Rendering a chat template: its variables, its refusals, and the bounds of its time and of its text."""

from __future__ import annotations

import signal
import time
from datetime import datetime

import pytest

from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.schema import Message
from bfpo.data import template
from bfpo.data.chat import ChatEncoder
from bfpo.data.template import ChatTemplate, with_template
from helpers import CHATML, byte_tokenizer
from messages import raises

QUESTION = (Message("user", "Which way?"),)
STYLED = CHATML.replace("assistant\n", "assistant{{ '/' + style if style is defined else '' }}\n")


def loop(body: str, depth: int = 3) -> str:
    return "{% for i in range(90000) %}" * depth + body + "{% endfor %}" * depth


@pytest.mark.parametrize(
    "endless",
    [
        loop("") + CHATML,
        loop("{% set x = i * i %}") + CHATML,
        "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ loop }}" + loop("{{ i }}", 2) + CHATML,
        CHATML + "{{ 9 ** (9 ** 9) }}",
    ],
)
def test_a_template_that_does_not_end_is_one_error(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_SECONDS", 0.4)
    with raises(ModelError, "chat_template"):
        ChatEncoder(byte_tokenizer(), endless)


def test_a_template_that_ends_for_a_probe_and_not_for_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_SECONDS", 0.4)
    chat = ChatEncoder(byte_tokenizer(), "{% if messages | length > 3 %}" + loop("") + "{% endif %}" + CHATML)
    assert chat.encode(QUESTION, ["Left."], name="x").conversations
    with raises(ModelError, "chat_template"):
        chat.encode((*QUESTION, Message("assistant", "Left."), *QUESTION), ["Right."], name="x")


def test_a_template_that_writes_far_too_much() -> None:
    with raises(ModelError, "chat_template"):
        ChatEncoder(byte_tokenizer(), loop("x" * 40, 1) + CHATML)


def test_a_template_that_writes_the_date_of_today_is_named() -> None:
    today = f"{datetime.now():%d %b %Y}"
    asks = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    dated = asks + "Today: {{ date_string }}\n" + CHATML
    note = ChatEncoder(byte_tokenizer(), dated).date_note
    assert today in note
    assert "chat_template_kwargs: {date_string: " in note
    for date in ("26 Jul 2024", today):
        assert ChatEncoder(byte_tokenizer(), dated, {"date_string": date}).date_note == ""
    fixed = ChatEncoder(byte_tokenizer(), 'Today: {{ strftime_now("%Y-%m-%d") }}\n' + CHATML).date_note
    assert "chat_template," in fixed
    assert "date_string" not in fixed
    assert ChatEncoder(byte_tokenizer(), "{% if tools %}" + asks + "{% endif %}" + CHATML).date_note == ""
    assert ChatEncoder(byte_tokenizer(), CHATML).date_note == ""


def test_a_timer_of_someone_else_continues() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        ChatTemplate(byte_tokenizer(), CHATML).render(QUESTION)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [signal.SIGALRM]


@pytest.mark.parametrize(
    "refusing",
    [
        "{{ raise_exception('no tool turns') }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 3 }}",
        "{{ 1 // 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_whatever_a_template_raises_on_a_row_is_its_refusal(refusing: str) -> None:
    chat = ChatEncoder(byte_tokenizer(), "{% if messages[0].role == 'tool' %}" + refusing + "{% endif %}" + CHATML)
    with raises(DataError, "row 5"):
        chat.encode((Message("tool", "4"), *QUESTION), ["Left."], name="row 5")


def test_variables_reach_the_template_and_unread_ones_are_refused() -> None:
    text = ChatTemplate(byte_tokenizer(), STYLED, {"style": "terse"}).render(QUESTION, generation=True)
    assert text.endswith("<|im_start|>assistant/terse\n")
    with raises(SettingError, "stlye"):
        ChatTemplate(byte_tokenizer(), STYLED, {"stlye": "terse"})


@pytest.mark.parametrize(
    ("written", "is_read"),
    [
        ("{% if style is not defined %}{% set style = 'brief' %}{% endif %}{{ style }}", True),
        ("{% generation %}{% for m in messages %}{% break %}{% endfor %}{{ style }}{% endgeneration %}", True),
        ("{{ 'a' if style | default(false) }}", True),
        ("A style. {# style #}{{ messages[0].style }}{% set x = 'style' %}", False),
        ("{% set style = 'brief' %}{{ style }}", False),
    ],
)
def test_a_variable_is_read_where_the_template_looks_it_up(written: str, is_read: bool) -> None:
    texts = (written, {"default": "{% set style = 'long' %}" + CHATML, "tool_use": written})
    for tokenizer in map(byte_tokenizer, texts):
        if is_read:
            ChatTemplate(tokenizer, None, {"style": "terse"})
            continue
        with raises(SettingError, "style"):
            ChatTemplate(tokenizer, None, {"style": "terse"})


@pytest.mark.parametrize(("begun", "head"), [("Go left,", "Go left,"), ("Go left, ", "Go left, "), ("  Go", "  Go")])
def test_an_assistant_message_at_the_end_is_continued(begun: str, head: str) -> None:
    chat = ChatEncoder(byte_tokenizer(CHATML))
    encoded = chat.encode((*QUESTION, Message("assistant", begun)), ["then right.", "or stay."], name="x")
    whole = f"<|im_start|>user\nWhich way?<|im_end|>\n<|im_start|>assistant\n{head}"
    assert chat.tokenizer.decode(encoded.prompt) == whole
    assert [chat.tokenizer.decode(ids) for ids in encoded.conversations] == [
        f"{whole}then right.<|im_end|>",
        f"{whole}or stay.<|im_end|>",
    ]
    assert (encoded.changes, encoded.openings) == ((), ())


def test_an_empty_assistant_message_at_the_end_opens_the_answer() -> None:
    chat = ChatEncoder(byte_tokenizer(CHATML))
    empty = chat.encode((*QUESTION, Message("assistant", " ")), ["a"], name="x")
    assert empty == chat.encode(QUESTION, ["a"], name="x")


@pytest.mark.parametrize(
    ("begun", "chat_template"),
    [
        (Message("assistant", "", '{"tool_calls":[{"function":{"name":"map"}}]}'), CHATML),
        (Message("assistant", "Go left"), CHATML.replace("m['content']", "m['content'] | replace('G', '-')")),
    ],
)
def test_an_assistant_message_that_cannot_be_continued_is_refused(begun: Message, chat_template: str) -> None:
    with raises(DataError, "continued" if begun.content else "tool"):
        ChatEncoder(byte_tokenizer(chat_template)).encode((*QUESTION, begun), (), name="x")


def test_a_given_template_renders_prompts_with_tools_from_the_saved_tokenizer_too() -> None:
    own, tools = {"default": CHATML, "tool_use": "tools" + CHATML, "rag": "rag" + CHATML}, '[{"name":"map"}]'
    chat = ChatEncoder(byte_tokenizer(own), STYLED)
    saved = chat.saved_tokenizer
    assert ChatTemplate(saved).render(QUESTION, tools=tools) == ChatTemplate(byte_tokenizer(STYLED)).render(QUESTION)
    assert saved.chat_template == {"default": STYLED, "rag": own["rag"]}
    assert chat.tokenizer.chat_template == own
    assert with_template(byte_tokenizer(own), CHATML).chat_template == own


@pytest.mark.parametrize("value", ["terse", 'it\'s "so"\n', True, False, None, 1.5, ["a", {"b": None}]])
def test_the_text_of_a_template_with_its_variables_renders_alike(value: object) -> None:
    shown = "{% set x = style | string %}" + CHATML.replace("assistant\n", "assistant/{{ x }}\n")
    made = ChatTemplate(byte_tokenizer(shown), variables={"style": value})
    asked = [{"role": "user", "content": "Which way?"}]
    text = byte_tokenizer(made.source).apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == made.render(QUESTION, generation=True)
    assert str(text).endswith(f"assistant/{value}\n")
