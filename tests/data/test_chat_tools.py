"""Tools, tool calls and other keys of messages on their way through the chat template."""

from __future__ import annotations

from typing import Any

import pytest

from bfpo.core.errors import DataError
from bfpo.core.schema import Completion, Message, Pair, canonical_json
from bfpo.data.chat import ChatEncoder
from bfpo.data.tokenize import prompt_ids, tokenize_pairs
from helpers import CHATML, IM_END, byte_ids, byte_tokenizer
from messages import raises

TOOLS = canonical_json([{"type": "function", "function": {"name": "tide", "description": "height of the sea"}}])
CALL = canonical_json(
    {"content": None, "tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {"at": "Brest"}}}]}
)
CALLS = """\
{%- if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}{{ '/' ~ m.name if m.name else '' }}
{{ CONTENT }}{% for call in m.tool_calls or [] %}<call>{{ ARGUMENTS }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def encoder(content: str = "m.content or ''", arguments: str = "call.function.arguments | tojson") -> ChatEncoder:
    return ChatEncoder(byte_tokenizer(CALLS.replace("CONTENT", content).replace("ARGUMENTS", arguments)))


def text_of(chat: ChatEncoder, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids))


def test_tools_and_names_reach_the_template() -> None:
    chat = encoder()
    asked = (Message("user", "High?"), Message("tool", "4 m", canonical_json({"name": "tide"})))
    text = text_of(chat, chat.encode(asked, (), name="x", tools=TOOLS).prompt)
    assert text.startswith('<|im_start|>tools\n[{"function": {"description": "height of the sea", "name": "tide"}')
    assert "<|im_start|>tool/tide\n4 m<|im_end|>" in text


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"content": "m.content"},  # writes None
        {"content": "'' + m.content"},  # refuses null
        {"arguments": "'' + call.function.arguments"},  # refuses an object
        {"arguments": "call.function.arguments"},  # writes an object as Python does
        {"content": "'' + m.content", "arguments": "call.function.arguments"},
        {"content": "m.content or ('LOST' if m.content is string else '')"},  # wants null
    ],
)
def test_a_completion_that_is_a_call_is_written_as_the_template_wants_it(form: dict[str, Any]) -> None:
    chat = encoder(**form)
    encoded = chat.encode((Message("user", "q"),), [Message("assistant", "", CALL), "a"], name="x")
    written = chat.ended(encoded.conversations[0])[len(encoded.prompt) :]
    assert written == [*byte_ids('<call>{"at": "Brest"}</call>'), IM_END]


def test_control_tokens_in_tools_and_calls_stay_text() -> None:
    chat = encoder()
    hostile = "</s><|im_end|>"
    call = canonical_json({"tool_calls": [{"function": {"name": "f", "arguments": {hostile: [hostile]}}}]})
    tools = canonical_json([{"name": hostile}])
    encoded = chat.encode((Message("user", "q"),), [Message("assistant", "", call)], name="x", tools=tools)
    plain = chat.encode((Message("user", "q"),), ["a"], name="x", tools=canonical_json([{"name": "f"}]))
    assert [i for i in encoded.conversations[0] if i < 4] == [i for i in plain.conversations[0] if i < 4]
    assert text_of(chat, encoded.conversations[0]).count(hostile) == 3


def test_pairs_completions_and_prompts_carry_their_tools() -> None:
    tokenizer = encoder().tokenizer
    asked = (Message("user", "High?"),)
    pair = Pair("p", asked, "", "4 m, I guess", 1.0, 1.0, tools=TOOLS, chosen_extra=CALL)
    ((tokens,), _) = tokenize_pairs([pair], tokenizer)
    head = prompt_ids(asked, tokenizer, tools=TOOLS)
    assert tokens.prompt_ids.tolist() == head != prompt_ids(asked, tokenizer)
    assert tokens.chosen_ids.tolist() == [*byte_ids('<call>{"at": "Brest"}</call>'), IM_END]
    (text,), _ = tokenize_pairs([Completion("c", asked, "", tools=TOOLS, extra=CALL)], tokenizer)
    assert (text.prompt_ids.tolist(), text.chosen_ids.tolist()) == (head, tokens.chosen_ids.tolist())


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_reaches_the_template_under_the_name_that_it_reads(key: str, read: str) -> None:
    chat = encoder(content=f"(m.{read} ~ '//' if m.{read} else '') ~ m.content")
    encoded = chat.encode((Message("user", "q"),), [Message("assistant", "a", canonical_json({key: "hm"}))], name="x")
    assert encoded.conversations[0][len(encoded.prompt) :] == [*byte_ids("hm//a"), IM_END]


def test_a_call_that_no_form_suits_is_refused_with_the_name_of_the_row() -> None:
    strict = "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no calls') }}{% endif %}{% endfor %}"
    with raises(DataError, "pair 3"):
        ChatEncoder(byte_tokenizer(strict + CHATML)).encode((), [Message("assistant", "", CALL)], name="pair 3")


def test_an_answer_without_the_end_token_is_not_cut_within_the_prompt() -> None:
    calls_end_otherwise = CALLS.replace("CONTENT", "m.content or ''").replace("ARGUMENTS", "call.function.name")
    calls_end_otherwise = calls_end_otherwise.replace("<|im_end|>\n{% endfor %}", "{{ END }}{% endfor %}")
    calls_end_otherwise = calls_end_otherwise.replace("{{ END }}", "{{ '!' if m.tool_calls else '<|im_end|>' }}")
    chat = ChatEncoder(byte_tokenizer(calls_end_otherwise))
    encoded = chat.encode((Message("user", "q"),), [Message("assistant", "", CALL)], name="x")
    assert encoded.conversations[0][len(encoded.prompt) :] == [*byte_ids("<call>tide</call>!"), IM_END]
