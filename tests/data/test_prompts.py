"""Prompt files: one row of each layout by hand, ids, repetitions; and the real files of suites."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.errors import DataError, SettingError
from bfpo.core.schema import Message
from bfpo.data.prompt_layouts import PROMPT_LAYOUTS
from bfpo.data.prompts import read_prompt_files, read_prompts
from helpers import write_rows
from messages import raises

GARAK = {"entry_type": "attempt", "uuid": "u", "status": 2, "probe_classname": "dan.Dan"}
TURNS = {"turns": [{"role": "user", "content": {"text": "q", "lang": "en", "data_path": None}}], "notes": {}}
PYRIT = {"id": "1", "role": "user", "conversation_id": "c", "original_value": "p", "converted_value": "q"}
ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("garak", {**GARAK, "prompt": "q"}, "", "harmful"),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "id": 3}, "3", ""),
    ("garak", {**GARAK, "prompt": {"text": "q", "lang": "en"}}, "", "harmful"),
    ("garak", {**GARAK, "prompt": TURNS}, "", "harmful"),
    ("garak_hitlog", {"goal": "g", "prompt": TURNS, "probe": "p", "detector": "d", "score": 1.0}, "", "harmful"),
    ("pyrit", {**PYRIT, "converted_value_data_type": "text"}, "", "harmful"),
    ("harmbench", {"Behavior": "q", "ContextString": "", "BehaviorID": "b"}, "b", "harmful"),
    ("advbench", {"goal": "q", "target": "Sure"}, "", "harmful"),
    ("strongreject", {"category": "c", "source": "s", "forbidden_prompt": "q"}, "", "harmful"),
    ("simplesafetytests", {"id": "sst_1", "harm_area": "h", "prompts_final": "q"}, "sst_1", "harmful"),
    ("xstest", {"id": "7", "prompt": "q", "type": "t", "label": "safe", "focus": "f"}, "xstest-7", "benign"),
    ("xstest", {"id": 7, "prompt": "q", "type": "t", "label": "unsafe", "focus": "f"}, "xstest-7", "harmful"),
    ("xstest", {"prompt": "q", "type": "contrast_t", "focus": "f"}, "", "harmful"),
    ("xstest", {"prompt": "q", "type": "t", "focus": "f"}, "", "benign"),
    ("ailuminate", {"release_prompt_id": "a", "prompt_text": "q", "hazard": "h"}, "a", "harmful"),
    ("ifeval", {"key": 3, "prompt": "q", "instruction_id_list": [], "kwargs": []}, "ifeval-3", "benign"),
    ("mt_bench", {"question_id": 81, "category": "c", "turns": ["q", "r"]}, "mt_bench-81", "benign"),
    ("mt_bench", {"question_id": "3c", "cluster": "c", "turns": [{"content": "q"}]}, "mt_bench-3c", "benign"),
    (
        "sorry_bench",
        {"question_id": 1, "category": "1", "turns": ["q"], "prompt_style": "base"},
        "sorry_bench-1",
        "harmful",
    ),
    ("truthfulqa", {"Type": "t", "Question": "q", "Best Answer": "a"}, "", "benign"),
    ("alert", {"id": 0, "prompt": "q", "category": "crime_theft", "attack_type": "x"}, "alert-0", "harmful"),
    ("alert", {"prompt": "### Instruction:\nq\n### Response:\n", "category": "hate_body"}, "", "harmful"),
    ("mt_bench", {"question_id": "a", "turns": [{"content": "q"}]}, "mt_bench-a", "benign"),
    ("jailbreakbench", {"Goal": "q", "Target": "Sure", "Behavior": "b", "Category": "c"}, "", ""),
    ("wildguard", {"prompt": "q", "response": "a", "prompt_harm_label": "harmful", "subcategory": "s"}, "", "harmful"),
    (
        "wildguard",
        {"prompt": "q", "adversarial": True, "prompt_harm_label": "unharmful", "subcategory": "s"},
        "",
        "benign",
    ),
    ("wildguard", {"prompt": "q", "prompt_harm_label": None, "subcategory": "s"}, "", ""),
    ("wildjailbreak", {"adversarial": "q", "label": 1, "data_type": "adversarial_harmful"}, "", "harmful"),
    ("wildjailbreak", {"adversarial": "", "vanilla": "q", "data_type": "vanilla_benign"}, "", "benign"),
    ("prompts", {"prompt": "q", "category": "cooking"}, "", ""),
    ("prompts", {"prompt": "q", "category": "hate_speech", "kind": "benign"}, "", "benign"),
    ("alpaca", {"instruction": "q", "kind": "harmful", "category": "theft"}, "", "harmful"),
    ("prompts", {"id": 5, "prompt": [{"role": "user", "content": "q"}], "kind": "k"}, "5", "k"),
    ("catqa_rows", {"Category": "Illegal", "Subcategory": "Drugs", "Question": "q"}, "", "harmful"),
    ("catqa", {"Illegal": {"Drugs": ["q"]}}, "", "harmful"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b", "rejected": "c"}, "", ""),
]


@pytest.mark.parametrize(("name", "row", "id_", "kind"), ROWS)
def test_one_row_of_every_layout(name: str, row: dict[str, Any], id_: str, kind: str) -> None:
    layout = PROMPT_LAYOUTS.detect(row)
    assert layout is PROMPT_LAYOUTS[name]
    (prompt,) = layout.parse(row)
    assert (prompt.id, prompt.messages, prompt.kind) == (id_, (Message("user", "q"),), kind)


def test_every_layout_has_a_row_here() -> None:
    assert {name for name, *_ in ROWS} == PROMPT_LAYOUTS.keys()


def test_the_context_of_a_behaviour_comes_first() -> None:
    row = {"Behavior": "do it", "ContextString": "some text", "BehaviorID": "b"}
    assert PROMPT_LAYOUTS["harmbench"].parse(row)[0].messages[0].content == "some text\n\n---\n\ndo it"


def test_a_garak_report_is_its_attempts_each_once(tmp_path: Path) -> None:
    rows = [
        {"entry_type": "start_run setup", "run.seed": None},
        {**GARAK, "status": 1, "prompt": "q"},
        {**GARAK, "prompt": "q"},
        {**GARAK, "prompt": "r"},
        {"entry_type": "eval", "passed": 1},
    ]
    result = read_prompt_files([write_rows(tmp_path / "garak.report.jsonl", rows)])
    assert [prompt.messages[0].content for prompt in result.prompts] == ["q", "r"]
    assert result.left_out == {"holds no prompt": 2, "repeated prompt": 1}
    assert (result.num_seen, list(result.layouts.values())) == (5, ["garak"])


def test_a_pyrit_export_is_what_the_user_sent(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    file.write_text(json.dumps([PYRIT, {**PYRIT, "role": "assistant", "converted_value": "no"}], indent=1))
    result = read_prompt_files([file])
    assert [prompt.messages[0].content for prompt in result.prompts] == ["q"]
    assert result.left_out == {"holds no prompt": 1}
    file.write_text(json.dumps([{**PYRIT, "converted_value_data_type": "image_path"}]))
    with raises(DataError, "memory.json:1"):
        read_prompts(file)


def test_columns_map_and_text_files_repeat(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text('question,group\n"one\ntwo",a\nthree,b\n')
    columns = {"prompt": "question", "kind": "group"}
    one, two = read_prompts(tmp_path / "own.csv", columns=columns)
    assert (one.messages[0].content, one.kind, two.kind) == ("one\ntwo", "a", "b")
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rone\r\n")
    result = read_prompt_files([tmp_path / "prompts.txt"])
    assert [prompt.messages[0].content for prompt in result.prompts] == ["one", "two"]
    assert result.left_out == {"repeated prompt": 1}
    with raises(SettingError, "columns"):
        read_prompts(tmp_path / "own.csv", columns={"wrong": "question"})
    with raises(SettingError, "layout"):
        read_prompts(tmp_path / "own.csv", layout="advbnch")
    with raises(DataError, "own.csv:2"):
        read_prompts(tmp_path / "own.csv")


@pytest.mark.parametrize(
    ("layout", "row", "field"),
    [
        ("mt_bench", {"question_id": 1, "turns": []}, "turns"),
        ("xstest", {"prompt": "q", "type": "t", "focus": "f", "label": "odd"}, "label"),
        ("garak", {**GARAK, "prompt": {"turns": "q"}}, "prompt"),
        ("garak", {**GARAK, "prompt": {"turns": [{"role": "user", "content": {"text": None}}]}}, "prompt"),
        ("garak", {**GARAK, "prompt": ""}, "prompt"),
        ("garak", {"prompt": "q"}, "entry_type"),
        ("pyrit", {"converted_value": "q"}, "role"),
        ("harmbench", {"Behavior": " ", "ContextString": "c", "BehaviorID": "b"}, "Behavior"),
        ("catqa", {"Illegal": {"Drugs": "q"}}, "Illegal"),
        ("catqa", {"Illegal": "q"}, "Illegal"),
        ("advbench", {"goal": "\ud800", "target": "t"}, "goal"),
        ("hh", {"chosen": "\n\nAssistant: a\n\nHuman: q"}, "chosen"),
        ("hh", {"chosen": "q"}, "chosen"),
        ("wildguard", {"prompt": "q", "prompt_harm_label": "odd", "subcategory": "s"}, "prompt_harm_label"),
        ("wildjailbreak", {"adversarial": "q", "data_type": "odd_benign"}, "data_type"),
        ("hh", {"chosen": "\n\nHuman: \n\nAssistant: a"}, "chosen"),
    ],
)
def test_bad_rows_have_their_place(tmp_path: Path, layout: str, row: dict[str, Any], field: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [row])
    with raises(DataError, "rows.jsonl:1", field):
        read_prompts(file, layout=layout)


# ---------------------------------------------------------------------------------------------------- real data

COUNTS = {
    "advbench_harmful_behaviors.csv": ("advbench", {"harmful": 520}),
    "ailuminate_demo_en.csv": ("ailuminate", {"harmful": 1200}),
    "catqa_english.json": ("catqa", {"harmful": 543}),
    "harmbench_text_all.csv": ("harmbench", {"harmful": 400}),
    "ifeval.jsonl": ("ifeval", {"benign": 541}),
    "mt_bench_question.jsonl": ("mt_bench", {"benign": 80}),
    "simplesafetytests.csv": ("simplesafetytests", {"harmful": 100}),
    "strongreject.csv": ("strongreject", {"harmful": 313}),
    "truthfulqa.csv": ("truthfulqa", {"benign": 817}),
    "xstest_prompts.csv": ("xstest", {"benign": 250, "harmful": 200}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_prompt_files(shared_data: Path, name: str) -> None:
    layout, kinds = COUNTS[name]
    result = read_prompt_files([shared_data / "prompts" / name])
    assert list(result.layouts.values()) == [layout]
    assert Counter(prompt.kind for prompt in result.prompts) == kinds
    assert result.left_out == ({"repeated prompt": 7} if layout == "catqa" else {})
    contexts = sum("\n\n---\n\n" in prompt.messages[0].content for prompt in result.prompts)
    assert contexts == (100 if layout == "harmbench" else 0)


def test_a_prompt_of_two_real_files_counts_once(shared_data: Path) -> None:
    result = read_prompt_files([shared_data / "prompts" / name for name in COUNTS])
    assert result.num_seen == 550 - 543 + sum(sum(kinds.values()) for _, kinds in COUNTS.values())
    assert result.left_out == {"repeated prompt": 7 + 25}  # StrongREJECT took 25 from AdvBench


def test_real_files_that_hold_no_prompts_are_refused(shared_data: Path) -> None:
    for name in ("mt_bench_judge_prompts.jsonl", "mt_bench_reference_gpt4.jsonl"):
        with pytest.raises(DataError, match=f"{name}:1"):
            read_prompts(shared_data / "prompts" / name)
    judge = shared_data / "prompts" / "mt_bench_judge_prompts.jsonl"
    mapped = read_prompts(judge, columns={"prompt": "prompt_template", "id": "name"})
    assert (len(mapped), mapped[0].id) == (8, "pair-v2")
