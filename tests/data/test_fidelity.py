"""Templates that keep the text of a conversation pass; what others delete, move or open differently is named."""

from __future__ import annotations

from typing import Any

import pytest

from bfpo.core.schema import Completion, Message, Pair, canonical_json
from bfpo.data.chat import ChatEncoder
from bfpo.data.tokenize import tokenize_pairs
from helpers import byte_tokenizer, make_pair

# Small templates of our own with the habits of the families that they are named after.
HONEST = {
    "default": None,
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "smollm2": "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "<s>{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}",
    "llama2": "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
    "<s>[INST] {{ ns.s + m.content.strip() }} [/INST]{% set ns.s = '' %}{% else %} {{ m.content.strip() }} </s>"
    "{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "gemma": "<s>{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content | trim + '\n\n' %}{% else %}<|im_start|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ ns.s + m.content | trim }}<|im_end|>\n"
    "{% set ns.s = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "phi": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}",
    "mistral": "<s>{% for m in messages %}{% if m.role == 'system' %}[SYS]{{ m.content }}[/SYS]"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}</s>{% endif %}"
    "{% endfor %}",
    "qwen3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set r = m.reasoning_content or '' %}{% set c = m.content %}{% if not r and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{% if loop.last %}<think>\n{{ r.strip('\n') }}\n</think>\n\n{% endif %}{{ c.strip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
}
ANSWER_ONLY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
R1 = ANSWER_ONLY + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
LAST_USER = (
    "<s>{% if messages[0].role == 'system' %}{% set given = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and given is defined %}[INST] {{ given }}\n\n{{ m.content }}[/INST]"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def conversation(system: str = "Speak like a sailor.", texts: tuple[str, ...] = ("Is it late?",)) -> tuple[Any, ...]:
    turns = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    return (Message("system", system), *turns) if system else tuple(turns)


def report_of(template: str | None, prompt: tuple[Message, ...], chosen: str = "Aye, it is.", **extra: str) -> Any:
    pair = Pair("p7", prompt, chosen, "No.", 1, 0, **extra)
    return tokenize_pairs([pair], byte_tokenizer(template))[1]


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("system", ["", "Speak like a sailor.", "s", "  Indented\n\n rules.\n"])
@pytest.mark.parametrize("texts", [("Is it late?",), (" u \n",), ("Where?", "At sea.", "Since when?")])
@pytest.mark.parametrize("answer", ["Aye, it is.", "4", "\n- one\n- two  \n", 'He said "no\\yes".'])
def test_honest_templates_pass(name: str, system: str, texts: tuple[str, ...], answer: str) -> None:
    report = report_of(HONEST[name], conversation(system, texts), answer)
    assert report.template_changes == {}
    assert "template_changes" not in report.as_row()
    if name != "qwen3":
        assert report.openings == {}


def test_reasoning_in_the_completion_is_kept_by_a_template_that_reformats_it() -> None:
    thinking = Completion("c", conversation(), "<think>\n\nLook at the sun.</think>Aye.")
    (_, report), plain = (
        tokenize_pairs([thinking], byte_tokenizer(HONEST["qwen3"])),
        report_of(HONEST["qwen3"], conversation()),
    )
    assert (report.template_changes, report.openings) == ({}, {})
    assert plain.openings == {'training writes "<think>\\n\\n</think>" before the answer, generation does not': 1}


def test_reasoning_that_is_stripped_and_an_opening_that_training_lacks() -> None:
    report = report_of(R1, conversation(), "<think>\nLook at the sun.\n</think>\n\nAye.")
    assert report.template_changes == {"the reasoning of the completion is deleted": 1}
    assert report.first_changed == {"the reasoning of the completion is deleted": "pair p7"}
    assert report.openings == {'generation opens "<think>", training does not': 1}


@pytest.mark.parametrize("answer", ["<b>Aye</b>, it is.", "<think", "<"])
def test_an_opening_that_begins_like_the_answer_is_named_in_full(answer: str) -> None:
    assert report_of(R1, conversation(), answer).openings == {'generation opens "<think>", training does not': 1}


def test_a_tool_result_that_the_template_writes_as_json_and_the_answer_quotes() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
        "{{ m['content'] | tojson if m['role'] == 'tool' else m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    )
    turns = (Message("user", "When is high tide?"), Message("tool", '{"high tide": "noon"}'))
    assert report_of(template, turns, 'It says {"high tide": "noon"}.').template_changes == {}
    assert report_of(template, turns, "At noon.").template_changes == {}


def test_reasoning_under_a_key_that_the_template_does_not_read() -> None:
    thoughts = canonical_json({"reasoning_content": "The sun has set."})
    lost = {"the reasoning of the completion is deleted": 1}
    assert report_of(HONEST["chatml"], conversation(), chosen_extra=thoughts).template_changes == lost
    assert report_of(HONEST["qwen3"], conversation(), chosen_extra=thoughts).template_changes == {}
    asked = Completion("c", conversation(), "Aye.", reasoning="The sun has set.")
    assert tokenize_pairs([asked], byte_tokenizer(HONEST["chatml"]))[1].template_changes == lost
    assert tokenize_pairs([asked], byte_tokenizer(HONEST["qwen3"]))[1].template_changes == {}


@pytest.mark.parametrize("system", ["Speak like a sailor.", "s", "user", "INST"])
def test_a_system_text_that_is_written_only_before_a_last_user_turn(system: str) -> None:
    report = report_of(LAST_USER, conversation(system))
    assert report.template_changes.keys() == {
        "a system message is deleted or changed",
        "a user message is part of the completion",
    }
    assert report.openings == {}  # they would hold the prompt
    assert report_of(LAST_USER, conversation("")).template_changes == {}
    behind = LAST_USER.replace("{{ given }}\n\n{{ m.content }}", "{{ m.content }}\n\n{{ given }}")
    assert report_of(behind, conversation("Speak like a sailor.")).openings == {}


def test_earlier_reasoning_a_moved_turn_and_a_rewritten_answer_have_reasons_of_their_own() -> None:
    thinking = conversation("", ("Where?", "<think>Hm, a map.</think>At sea.", "When?"))
    assert report_of(R1, thinking).template_changes == {"the reasoning of an assistant message is deleted": 1}
    swapped = "{% for m in messages | reverse %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    report = report_of(swapped, conversation("", ("Where are you?", "Out at sea.", "Since which day?")))
    assert any("is moved" in reason for reason in report.template_changes)
    shouting = HONEST["chatml"].replace("{{ m.content }}", "{{ m.content if m.role == 'user' else m.content[:40] }}")  # type: ignore[union-attr]
    report = report_of(shouting, conversation(""), "Aye. " * 20)
    assert report.template_changes == {"the completion is deleted or changed": 1}


TOOL = {"type": "function", "function": {"name": "tide_at", "description": "Height of the sea.", "parameters": {}}}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "tide_at", "arguments": {"port": "Brest", "day": 3}}}]}
WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | tojson if m.role == 'tool' else m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "changes"),
    [
        (WITH_TOOLS, []),
        (WITH_TOOLS.replace("{{ tools | tojson }}", ""), ["the tools are deleted or changed"]),
        (
            WITH_TOOLS.replace("{{ call.function | tojson }}", "{{ call.function.name }}"),
            ["a tool call of an assistant message is deleted or changed"],
        ),
    ],
)
def test_tools_calls_and_answers_of_tools_are_looked_for(template: str, changes: list[str]) -> None:
    prompt = (
        Message("user", "How high is it?"),
        Message("assistant", "", canonical_json(CALL)),
        Message("tool", '{"height": "4 m\n"}'),
    )
    report = report_of(template, prompt, tools=canonical_json([TOOL]))
    assert list(report.template_changes) == changes


def test_a_call_in_the_completion_that_the_template_does_not_write() -> None:
    report = report_of(HONEST["chatml"], conversation(), chosen_extra=canonical_json(CALL))
    assert report.template_changes == {"a tool call of the completion is deleted or changed": 1}


def test_a_prompt_alone_is_checked_too() -> None:
    dropping = HONEST["chatml"].replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")  # type: ignore[union-attr]
    for system in ("Speak like a sailor.", "s"):
        encoded = ChatEncoder(byte_tokenizer(dropping)).encode(conversation(system), (), name="x")
        assert encoded.changes == ("a system message is deleted or changed",)


def test_text_with_control_tokens_counts_as_kept() -> None:
    report = report_of(HONEST["llama3"], conversation("", ("What is </s> and <|im_end|>?",)), "An <|im_end|> token.")
    assert report.template_changes == {}


def test_special_thinking_tokens_that_are_cut_leave_no_stray_mark() -> None:
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = byte_tokenizer(R1, special=special)
    (pair,), report = tokenize_pairs([make_pair(chosen="<think>so</think>Aye.", rejected="No.")], tokenizer)
    assert tokenizer.decode(pair.chosen_ids) == "Aye.<|im_end|>"
    assert pair.chosen_ids[-1] == 3
    assert report.template_changes == {"the reasoning of the completion is deleted": 1}
