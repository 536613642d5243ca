from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bfpo.core.schema import Completion, Message
from bfpo.data.labelled import load_labelled
from bfpo.data.read import read_completions
from bfpo.data.settings import LabelledConfig
from bfpo.data.thinking import MARKS, Thinking, describe_thoughts, opens_thought, split_thought, without_thought
from bfpo.data.write import write_completions
from helpers import write_rows

PROMPT = (Message("user", "What boils at 100 degrees?"),)
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(("opening", "closing"), MARKS)
@pytest.mark.parametrize("gap", ["", "\n", "\n\n", " "])
def test_every_known_pair_of_marks_at_the_beginning(opening: str, closing: str, gap: str) -> None:
    found = split_thought(f"{gap}{opening}{gap}Water, at sea level.{gap}{closing}{gap}Water does.")
    assert found is not None
    assert (found.reasoning, found.answer, found.closed) == ("Water, at sea level.", "Water does.", True)
    cut = split_thought(f"{opening}{gap}Water, at se")
    assert cut is not None
    assert (cut.reasoning, cut.answer, cut.closed) == ("Water, at se", "", False)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("Which liquid? Water.\n</think>\n\nWater does.", "Which liquid? Water.", "Water does."),
        ("Which liquid? Water.</think>Water does.", "Which liquid? Water.", "Water does."),
        ("</think>\n\nWater does.", "", "Water does."),
        ("Say water\n</think>\nwater", "Say water", "water"),
        ("I say water</think>water", "I say water", "water"),
        ("I say water</think>", "I say water", ""),
        ("Water.\n</think>\n\n</think>\n\nWater does.", "Water.", "Water does."),
        ("<think>Water.</think>\n<answer>\nWater does.\n</answer>", "Water.", "Water does."),
        ("Here is my thought process:\nWater.\nHere is my response:\nWater does.", "Water.", "Water does."),
        ("<THINK>Say water</Think> water", "Say water", "water"),
        ("<think>One.</think>\n<think>Two.</think>Water", "One.\n\nTwo.", "Water"),
        ("<think>I write `</think>` when done.\n</think>Water", "I write `</think>` when done.", "Water"),
        ("<think>Like\n```\n</think>\n```\nbut water</think>Water", "Like\n```\n</think>\n```\nbut water", "Water"),
        ("<think>So it is ``` water</think>Water", "So it is ``` water", "Water"),
        ("<think>Water</think>It ends with </think>, as ever.", "Water", "It ends with </think>, as ever."),
        (f"{ANALYSIS}Water.<|end|>{FINAL}Water does.<|return|>", "Water.", "Water does."),
        (f"<|start|>assistant{ANALYSIS}Water.<|end|>{FINAL}Water does.", "Water.", "Water does."),
        (f"{ANALYSIS}A<|end|><|start|>assistant<|channel|>commentary<|message|>B<|end|>{FINAL}C", "A\n\nB", "C"),
        ("<|channel|>final<|message|>Water", "", "Water"),
        (f"{ANALYSIS}x<|end|>{FINAL.replace('final', 'final <|constrain|>json')}[1]", "x", "[1]"),
        ("analysisThey ask about water.assistantfinalWater does.", "They ask about water.", "Water does."),
    ],
)
def test_thoughts_and_answer_apart(text: str, reasoning: str, answer: str) -> None:
    found = split_thought(text)
    assert found is not None
    assert (found.reasoning, found.answer, found.closed) == (reasoning, answer, True)
    assert answer in text[found.start :]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Water does.",
        "The tag </think> ends a thought.",
        "R1 writes its thoughts first. </think> is the tag that ends them.",
        "A thought ends with </think>. The answer comes then.",
        "Models write `</think>`.",
        "It prints:\n```html\n<b>bold</b>\n</think>\n```\nand stops.",
        "text.partition('</think>')[2]\n",
        "Use <think>some steps</think> before the answer.",
        "Write:\n<think>\nsteps\n</think>\nthen the answer.",
        "analysis of the water: assistantfinal",
        "Use:\n</think>\nand it ends.",
        "Use this.\n\n    </think>\n\nIt ends then.",
        "Set [THINK] on and [/THINK] off.",
        "gpt-oss writes <|channel|>final<|message|> before its answer.",
        "I would say </think> or </think>\n\nDone.",
    ],
)
def test_a_text_that_only_mentions_marks_is_not_cut(text: str) -> None:
    assert split_thought(text) is None


def test_what_the_prompt_has_opened() -> None:
    assert opens_thought("<|im_start|>assistant\n<think>\n")
    assert opens_thought("[/INST][THINK]")
    assert opens_thought(f"<|start|>assistant{ANALYSIS}")
    assert not opens_thought("<think>\n\n</think>\n\n")
    assert opens_thought("A: <plan>", [("<plan>", "</plan>")])
    inside = split_thought("so the tag </think> water", opened=True)
    assert inside is not None
    assert (inside.reasoning, inside.answer) == ("so the tag", "water")
    endless = split_thought("so the water", opened=True)
    assert endless is not None
    assert (endless.reasoning, endless.answer, endless.closed) == ("so the water", "", False)
    harmony = split_thought(f"Water.<|end|>{FINAL}Water does.", opened=True)
    assert harmony is not None
    assert (harmony.reasoning, harmony.answer) == ("Water.", "Water does.")
    assert split_thought("Water.\n</think>\n\nWater does.", opened=False) is None


@given(st.text(max_size=60), st.sampled_from([None, True, False]))
def test_nothing_is_invented(text: str, opened: bool | None) -> None:
    found = split_thought(f"<think>{text}", opened=opened)
    assert found is not None
    assert found.answer in text
    assert found.closed or not found.answer


def test_settings() -> None:
    whole = Completion("c", PROMPT, "<plan>boil it</plan>Water does.")
    assert without_thought(whole) == whole
    own = without_thought(whole, Thinking(marks=[["<plan>", "</plan>"]]))
    assert (own.text, own.reasoning, own.finished) == ("Water does.", "boil it", True)
    thought = Completion("c", PROMPT, "<think>boil it</think>Water does.")
    assert without_thought(thought, Thinking(judged=True)) == thought
    apart = without_thought(thought)
    assert without_thought(apart) == apart
    assert without_thought(apart, Thinking(judged=True)).text == "boil it\n\nWater does."
    assert without_thought(Completion("c", PROMPT, "all of it"), Thinking(opened=True)).finished is False
    for marks in ([["<a>"]], [["<a>", "<a>"]], [["", "x"]]):
        with pytest.raises(ValidationError):
            Thinking(marks=marks)


def rows_of(tmp_path: Path, *rows: dict[str, Any]) -> list[Completion]:
    return read_completions(write_rows(tmp_path / "c.jsonl", [{"prompt": "Q", **row} for row in rows]))


def test_completions_from_elsewhere_are_read_with_their_thoughts_apart(tmp_path: Path) -> None:
    found = rows_of(
        tmp_path,
        {"text": "<think>a</think>b"},
        {"text": "b", "reasoning_content": "a"},
        {"completion": "b", "thinking": "a"},
        {"completion": "b", "reasoning": "a", "reasoning_content": None},
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "b", "reasoning_content": "a"},
            ]
        },
        {"text": "<think>a</think>b", "reasoning": "a"},
        {"completion": [{"role": "assistant", "content": "b", "reasoning_content": "a"}]},
        {"text": {"role": "assistant", "content": "<think>a</think>b", "thinking": "a"}},
    )
    assert [(row.text, row.reasoning, row.finished, row.extra) for row in found] == [("b", "a", True, "")] * 8
    (cut,) = rows_of(tmp_path, {"text": "<think>and so on", "finished": True})
    assert (cut.text, cut.reasoning, cut.finished) == ("", "and so on", False)
    (plain,) = rows_of(tmp_path, {"text": "b", "thinking": True})
    assert (plain.text, plain.reasoning) == ("b", "")
    assert describe_thoughts([plain]) == []
    assert describe_thoughts([*found, cut, plain]) == [
        "9 of 10 answers begin with thoughts, which are not judged; without an answer behind them: 1"
    ]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rows = [
        Completion("1", PROMPT, "b. Then\n</think>\n\nDone.", reasoning="a"),
        Completion("2", PROMPT, "", finished=False, reasoning="a"),
        Completion("3", PROMPT, "b"),
    ]
    write_completions(tmp_path / "c.jsonl", rows)
    assert read_completions(tmp_path / "c.jsonl") == rows
    assert ["reasoning" in json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()] == [
        True,
        True,
        False,
    ]


def test_labelled_texts_are_their_answers_and_one_without_an_answer_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "text": "<think>a bad idea</think>b", "is_safe": True},
        {"prompt": "Q", "text": "<think>a bad idea", "is_safe": False},
    ]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    loaded = load_labelled(LabelledConfig(files=[file]))
    assert [(row.text, row.reasoning, row.is_safe) for row in loaded.completions] == [("b", "a bad idea", 1.0)]
    assert loaded.left_out == {"no answer behind the thoughts": 1}
    whole = load_labelled(LabelledConfig(files=[file], thinking=Thinking(judged=True)))
    assert [row.text for row in whole.completions] == [row["text"] for row in rows]
