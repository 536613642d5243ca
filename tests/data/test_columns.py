"""Columns that change the meaning of a row: read in every layout, refused with a reason, or named as not read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bfpo.core.errors import DataError, LabelError
from bfpo.core.schema import Completion, Message, Pair, Prompt, canonical_json
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.labelled import load_labelled
from bfpo.data.labels import LabelWords, as_judged
from bfpo.data.load import load_completions, load_pairs
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.prompt_layouts import PROMPT_LAYOUTS
from bfpo.data.prompts import read_prompt_files
from bfpo.data.read import read_completions, read_pairs
from bfpo.data.rejects import CellText, RowError
from bfpo.data.settings import DataConfig, LabelledConfig, SftDataConfig
from bfpo.data.write import completion_row, pair_row, prompt_row, write_completions, write_pairs
from helpers import read_sft, write_rows
from messages import raises, says

TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": "Brest"}}}
LABELS = {"chosen_is_safe": True, "rejected_is_safe": False}
TWO = {"chosen": "at noon", "rejected": "never"}
PAIRS: dict[str, dict[str, Any]] = {
    "bfpo": {"prompt": "High tide?", **TWO, **LABELS},
    "trl": {"prompt": "High tide?", **TWO},
    "alpaca_pairs": {"instruction": "High tide?", **TWO},
    "pku": {"prompt": "High tide?", "response_0": "at noon", "response_1": "never", "better_response_id": 0},
    "redteam": {"prompt": "High tide?", "modeloutput1": "at noon", "modeloutput2": "never", "better_modelout": 1},
    "helpsteer2": {"prompt": "High tide?", "response_1": "at noon", "response_2": "never", "preference_strength": -1},
    "helpsteer3": {
        "context": [{"role": "user", "content": "High tide?"}],
        "response1": "at noon",
        "response2": "never",
        "overall_preference": -2,
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "High tide?"}],
        "chosen": {"from": "gpt", "value": "at noon"},
        "rejected": {"from": "gpt", "value": "never"},
    },
    "messages": {
        "messages": [{"role": "user", "content": "High tide?"}],
        "chosen": {"role": "assistant", "content": "at noon"},
        "rejected": {"role": "assistant", "content": "never"},
    },
    "hh": {
        "chosen": "\n\nHuman: High tide?\n\nAssistant: at noon",
        "rejected": "\n\nHuman: High tide?\n\nAssistant: never",
    },
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "High tide?", "completion": "at noon"},
    "alpaca": {"instruction": "High tide?", "output": "at noon"},
    "conversations": {
        "conversations": [{"from": "human", "value": "High tide?"}, {"from": "gpt", "value": "at noon"}],
    },
    "beavertails": {"prompt": "High tide?", "response": "at noon", "is_safe": True},
    "wildguardmix": {"prompt": "High tide?", "response": "at noon", "response_harm_label": "unharmful"},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "prompts": {"prompt": "High tide?"},
    "alpaca": {"instruction": "High tide?"},
    "strongreject": {"forbidden_prompt": "High tide?"},
    "mt_bench": {"question_id": 3, "turns": ["High tide?"]},
}
QUESTION = Message("user", "High tide?")


def parse_pair(layout: str, row: dict[str, Any]) -> Pair:
    return PAIR_LAYOUTS[layout].parse(row)


def parse_prompt(layout: str, row: dict[str, Any]) -> Prompt:
    (prompt,) = PROMPT_LAYOUTS[layout].parse(row)
    return prompt


def prompts_of(row: dict[str, Any]) -> list[tuple[str, tuple[Message, ...], str]]:
    """Return name, messages and tools that every layout makes of its row with these columns added."""
    found: list[tuple[str, Pair | Completion]] = [(n, parse_pair(n, {**own, **row})) for n, own in PAIRS.items()]
    found += [(n, COMPLETION_LAYOUTS[n].parse({**own, **row})) for n, own in COMPLETIONS.items()]
    prompts = [(name, parse_prompt(name, {**own, **row})) for name, own in PROMPTS.items()]
    return [(n, i.prompt, i.tools) for n, i in found] + [(n, p.messages, p.tools) for n, p in prompts]


def test_every_layout_of_pairs_and_completions_is_tried_here() -> None:
    assert (PAIRS.keys(), COMPLETIONS.keys()) == (PAIR_LAYOUTS.keys(), COMPLETION_LAYOUTS.keys())


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("value", ["Speak like a sailor.", [{"type": "text", "text": "Speak like a sailor."}]])
def test_system_is_the_first_message_in_every_layout(column: str, value: object) -> None:
    for name, prompt, _ in prompts_of({column: value}):
        assert prompt == (Message("system", "Speak like a sailor."), QUESTION), name
    for name, prompt, _ in prompts_of({column: None}):
        assert prompt == (QUESTION,), name


def test_a_system_message_that_is_given_twice_must_be_one() -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "High tide?"}]
    row = {**PAIRS["trl"], "prompt": turns}
    assert parse_pair("trl", {**row, "system": "Be short."}).prompt[0] == Message("system", "Be short.")
    assert len(parse_pair("trl", {**row, "system": " Be short.\n"}).prompt) == 2
    with raises(RowError, "system"):
        parse_pair("trl", {**row, "system": "Be long."})


def test_pairs_that_differ_in_their_system_message_or_tools_have_different_ids(tmp_path: Path) -> None:
    rows = [PAIRS["trl"], {**PAIRS["trl"], "system": "a"}, {**PAIRS["trl"], "tools": TOOLS}]
    result = read_pairs([write_rows(tmp_path / "a.jsonl", rows)])
    assert len({pair.id for pair in result.pairs}) == 3
    assert all("-" not in pair.id for pair in result.pairs)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_carried_in_every_layout(as_text: bool) -> None:
    for name, _, tools in prompts_of({"tools": json.dumps(TOOLS) if as_text else TOOLS}):
        assert tools == canonical_json(TOOLS), name
    for empty in (None, "", [], "[]"):
        assert all(tools == "" for _, _, tools in prompts_of({"tools": empty}))
    with raises(RowError, "tools"):
        parse_pair("trl", {**PAIRS["trl"], "tools": "call tide"})


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("images", ["a.png"]),
        ("image", {"bytes": "iVBO"}),
        ("videos", ["a.mp4"]),
        ("audio", "a.wav"),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_what_cannot_be_read_is_a_bad_row_in_every_layout(column: str, value: object) -> None:
    tries: list[tuple[dict[str, dict[str, Any]], Callable[[str, dict[str, Any]], object]]] = [
        (PAIRS, parse_pair),
        (COMPLETIONS, lambda name, row: COMPLETION_LAYOUTS[name].parse(row)),
        (PROMPTS, parse_prompt),
    ]
    for rows, parse in tries:
        for name, row in rows.items():
            with pytest.raises(RowError, match=column):
                parse(name, {**row, column: value})
            parse(name, {**row, column: [] if column == "images" else None})


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": "x"}, {"type": "image"}, {"type": "input_audio"}])
def test_a_part_of_a_message_that_is_not_text_is_a_bad_row(part: dict[str, str]) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    with raises(RowError, "prompt"):
        parse_pair("trl", {**PAIRS["trl"], "prompt": turns})


def test_parts_of_text_are_text_wherever_content_is_read() -> None:
    def parts(*texts: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text} for text in texts]

    expected = ((QUESTION,), "at noon", "never")
    asked = [{"role": "user", "content": parts("High ", "tide?")}]
    answers = ({"role": "assistant", "content": parts("at", " noon")}, {"role": "assistant", "content": parts("never")})
    for row in (
        {"prompt": asked, "chosen": [answers[0]], "rejected": [answers[1]]},
        {"chosen": [*asked, answers[0]], "rejected": [*asked, answers[1]]},
        {"prompt": parts("High tide?"), "chosen": parts("at noon"), "rejected": parts("never")},
        {"prompt": asked, "chosen": answers[0], "rejected": answers[1]},
    ):
        layout = PAIR_LAYOUTS.detect(row)
        assert layout is not None
        pair = layout.parse(row)
        assert (pair.prompt, pair.chosen, pair.rejected) == expected
    completion = COMPLETION_LAYOUTS["completions"].parse({"messages": [*asked, answers[0]]})
    assert (completion.prompt, completion.text) == ((QUESTION,), "at noon")
    assert parse_prompt("prompts", {"prompt": asked}).messages == (QUESTION,)


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_completion_that_is_a_tool_call_is_carried(tmp_path: Path, content: dict[str, Any]) -> None:
    call = {"role": "assistant", **content, "tool_calls": [CALL]}
    asked = [{"role": "user", "content": "High tide?"}]
    rows: list[dict[str, Any]] = [
        {"tools": TOOLS, "prompt": asked, "chosen": [call], "rejected": "never", "source": "conversation"},
        {"tools": TOOLS, "prompt": asked, "chosen": call, "rejected": "never", "source": "message"},
    ]
    rows[0]["rejected"] = [{"role": "assistant", "content": "never"}]
    result = read_pairs([write_rows(tmp_path / "a.jsonl", rows)])
    assert not result.rejects
    for pair in result.pairs:
        held = json.loads(pair.chosen_extra)
        assert (pair.chosen, held["tool_calls"], pair.tools) == ("", [CALL], canonical_json(TOOLS))
        assert ("content" in held) == (content != {"content": ""})


def test_arguments_and_calls_that_are_json_text_are_objects() -> None:
    inner = {"name": "tide", "arguments": json.dumps({"at": "Brest"})}
    forms: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": inner}]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([{"type": "function", "function": inner}])},
        {"role": "assistant", "content": None, "function_call": inner},
        {"from": "function_call", "value": json.dumps(inner)},
    ]
    for form in forms:
        turns = [{"role": "user", "content": "q"}, form, {"role": "tool", "content": "4 m", "name": "tide"}]
        prompt = parse_pair("trl", {**PAIRS["trl"], "prompt": turns}).prompt
        (call,) = json.loads(prompt[1].extra)["tool_calls"]
        assert call["function"] == {"name": "tide", "arguments": {"at": "Brest"}}
        assert prompt[2].extra == canonical_json({"name": "tide"})
    with raises(RowError, "prompt"):
        parse_pair("trl", {**PAIRS["trl"], "prompt": [{"from": "function_call", "value": "call the tide"}]})


def test_our_files_give_back_tools_calls_reasoning_and_names(tmp_path: Path) -> None:
    thought, named = canonical_json({"reasoning_content": "hm"}), canonical_json({"name": "Bob"})
    call = canonical_json({"tool_calls": [CALL], "content": None})
    asked = (
        Message("user", "q", canonical_json({"name": "Ann"})),
        Message("assistant", "", call),
        Message("tool", "4"),
    )
    pair = Pair("p", asked, "", "never", 1.0, None, "s", canonical_json(TOOLS), call, thought)
    write_pairs(tmp_path / "pairs.jsonl", [pair])
    assert read_pairs([tmp_path / "pairs.jsonl"]).pairs == [pair]
    assert pair_row(pair)["tools"] == TOOLS
    made = [
        Completion("a", asked, "4 m", "m", reasoning="so deep", tools=canonical_json(TOOLS), extra=named),
        Completion("b", asked, "", "m", finished=False, blocked="content filter"),
        Completion("c", asked, "", "m", extra=call, is_safe=1.0),
    ]
    write_completions(tmp_path / "made.jsonl", made)
    assert read_completions(tmp_path / "made.jsonl") == made
    prompt = Prompt("x", asked, "benign", canonical_json(TOOLS))
    assert read_prompt_files([write_rows(tmp_path / "prompts.jsonl", [prompt_row(prompt)])]).prompts == [prompt]
    plain = Completion("a", (Message("user", "q"),), "4 m", "m")
    assert list(completion_row(plain)) == ["id", "prompt", "text", "model", "kind", "finished"]


def test_judges_see_tool_calls_as_json_below_the_texts() -> None:
    call = canonical_json({"tool_calls": [CALL], "content": None})
    asked = (Message("user", "q"), Message("assistant", "Let me see.", call), Message("tool", "4 m"))
    judged = as_judged(Completion("a", asked, "", extra=call, is_safe=1.0))
    shown = json.dumps(json.loads(canonical_json(CALL)))
    assert [message.content for message in judged.prompt] == ["q", f"Let me see.\n{shown}", "4 m"]
    assert (judged.text, judged.extra, judged.is_safe) == (shown, "", None)


# ------------------------------------------------------------------------------------------------------- alpaca


def test_alpaca_rows_are_pairs_completions_and_prompts(tmp_path: Path) -> None:
    row = {
        "instruction": "Translate.",
        "input": "Guten Tag",
        "system": "You translate.",
        "history": [["Ready?", "Yes."]],
    }
    prompt = (
        Message("system", "You translate."),
        Message("user", "Ready?"),
        Message("assistant", "Yes."),
        Message("user", "Translate.\nGuten Tag"),
    )
    pairs = [{**row, "chosen": "Good day", "rejected": "No"}, {**row, "output": ["Good day", "No"]}]
    result = read_pairs([write_rows(tmp_path / f"{n}.jsonl", [one]) for n, one in enumerate(pairs)])
    assert set(result.layouts.values()) == {"alpaca_pairs"}
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in result.pairs] == [(prompt, "Good day", "No")] * 2
    file = write_rows(tmp_path / "sft.jsonl", [{**row, "output": "Good day"}])
    (completion,) = load_completions(SftDataConfig(files=[str(file)])).completions
    assert (completion.prompt, completion.text) == (prompt, "Good day")
    (asked,) = read_prompt_files([file]).prompts
    assert asked.messages == prompt
    assert read_pairs([write_rows(tmp_path / "one.jsonl", [{**pairs[0], "input": "", "history": []}])]).pairs[
        0
    ].prompt == (
        Message("system", "You translate."),
        Message("user", "Translate."),
    )


def test_alpaca_in_csv_has_its_history_as_text(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('instruction,input,history,output\nAgain?,,"[[""Ready?"", ""Yes.""]]",Yes.\n')
    (completion,) = read_sft([file], layout="alpaca").completions
    assert [message.content for message in completion.prompt] == ["Ready?", "Yes.", "Again?"]


def test_a_history_that_cannot_be_is_a_bad_row() -> None:
    with raises(RowError, "history"):
        parse_pair("alpaca_pairs", {**PAIRS["alpaca_pairs"], "history": ["Ready?"]})
    with raises(RowError, "history"):
        parse_pair("helpsteer3", {**PAIRS["helpsteer3"], "context": [], "history": [["a", "b"]]})
    for name, prompt, _ in prompts_of({"history": [["Ready?", "Yes."]]}):
        assert [message.content for message in prompt] == ["Ready?", "Yes.", "High tide?"], name


# ------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("weight", [0, 0.5, 2, False])
def test_a_weight_that_would_not_be_used_is_a_bad_row(weight: float) -> None:
    for name, row in PAIRS.items():
        assert parse_pair(name, {**row, "weight": 1.0}).chosen == "at noon"
        with pytest.raises(RowError, match="weight"):
            parse_pair(name, {**row, "weight": weight})
    for name, row in COMPLETIONS.items():
        with pytest.raises(RowError, match="weight"):
            COMPLETION_LAYOUTS[name].parse({**row, "weight": weight})


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_a_completion_that_is_not_to_be_trained_on_is_a_bad_row(mark: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    turns += [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    with raises(RowError, "messages"):
        COMPLETION_LAYOUTS["completions"].parse({"messages": [*turns[:-1], {**turns[-1], **mark}]})
    earlier = [{**turns[0]}, {**turns[1], **mark}, *turns[2:]]  # only the last message is trained on
    assert COMPLETION_LAYOUTS["completions"].parse({"messages": earlier}).text == "b"


def test_a_completion_marked_as_undesirable_is_not_imitated(tmp_path: Path) -> None:
    row = COMPLETIONS["completions"]
    rows = [{**row, "label": True}, {**row, "label": False}, {**row, "kto_tag": False}, {**row, "label": "a topic"}]
    rows += [{**row, "label": "False"}, {**row, "kto_tag": "false"}, {**row, "label": 0}, {**row, "kto_tag": 0.0}]
    rows += [{**row, "label": "0"}, {**row, "kto_tag": 1}]
    file = write_rows(tmp_path / "kto.jsonl", rows)
    result = read_sft([file])
    assert len(result.completions) == 3
    assert [reject.field for reject in result.rejects] == [*["label", "kto_tag"] * 3, "label"]
    assert "columns: {label: null}" in result.rejects[0].reason
    assert len(read_sft([file], columns={"label": None, "kto_tag": None}).completions) == 10
    for name, row in COMPLETIONS.items():
        assert COMPLETION_LAYOUTS[name].parse({**row, "kto_tag": True}).text == "at noon"
        for column in ("label", "kto_tag"):
            with pytest.raises(RowError, match=column):
                COMPLETION_LAYOUTS[name].parse({**row, column: False})
    row = COMPLETIONS["completions"]
    file = write_rows(tmp_path / "judged.jsonl", [{**row, "label": False, "is_safe": True}])
    assert len(load_labelled(LabelledConfig(files=[str(file)])).completions) == 1


def test_completions_of_every_layout_keep_what_is_said_of_them(tmp_path: Path) -> None:
    said = {"model": "m", "category": "boats", "finished": False}
    for name, row in COMPLETIONS.items():
        result = load_completions(SftDataConfig(files=[write_rows(tmp_path / f"{name}.jsonl", [{**row, **said}])]))
        (one,) = result.completions
        assert (one.model, one.category, one.finished) == ("m", "boats", False), name
        assert "columns_not_read" not in result.counts, name
    marked = {**COMPLETIONS["beavertails"], "category": {"boats": False, "tides": True}}
    assert COMPLETION_LAYOUTS["beavertails"].parse(marked).category == "tides"


def test_categories_as_marks_or_lists_are_read_in_every_layout_and_in_cells(tmp_path: Path) -> None:
    marks = {"boats": False, "tides": True}
    given = [(marks, "tides"), ({"boats": False}, ""), (["boats", "tides"], "boats, tides"), ("[boats", "[boats")]
    for name, row in COMPLETIONS.items():
        for category, expected in given:
            for value in (category, CellText(str(category))):
                assert COMPLETION_LAYOUTS[name].parse({**row, "category": value}).category == expected, name
    file = tmp_path / "a.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "completion", "category"])
        writer.writerows([["q", "a", str(category)] for category, _ in given])
    assert [one.category for one in read_sft([file]).completions] == [expected for _, expected in given]
    file.write_text("prompt,response,is_safe,category\nq,a,True,{'boats': False}\n")
    assert [one.category for one in load_completions(SftDataConfig(files=[str(file)])).completions] == [""]


@pytest.mark.parametrize("name", ["reasoning", "category"])
def test_what_stands_beside_a_completion_is_valid_unicode_or_the_row_is_bad(name: str, tmp_path: Path) -> None:
    row = COMPLETIONS["completions"]
    result = read_sft([write_rows(tmp_path / "a.jsonl", [row, {**row, name: "x \ud83d"}])])
    assert [(reject.line, reject.field, reject.reason) for reject in result.rejects] == [(2, name, "not valid Unicode")]


# -------------------------------------------------------------------------------------------- what nothing reads


def test_odd_names_of_columns_are_named_in_bounds(tmp_path: Path) -> None:
    """Half a surrogate pair cannot be written, and rows may have a column each."""
    file = tmp_path / "odd.jsonl"
    rows = [{**PAIRS["bfpo"], f"column {n} \ud83d{'x' * 200}": 1} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = load_pairs(DataConfig(files=[str(file)])).counts["columns_not_read"][str(file)]
    assert (len(names), names[-1]) == (41, "20 more")
    assert all(len(name) < 100 and name.encode() for name in names)


def test_columns_that_are_not_read_are_named_once_per_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "user", "content": "q", "mood": "calm"}]
    rows = [{**PAIRS["bfpo"], "margin": 0.5, "empty": None}, {**PAIRS["bfpo"], "prompt": turns, "margin": 0.1}]
    one, two = write_rows(tmp_path / "one.jsonl", rows), write_rows(tmp_path / "two.jsonl", [PAIRS["bfpo"]])
    with caplog.at_level("INFO"):
        loaded = load_pairs(DataConfig(files=[str(one), str(two)]))
    assert loaded.counts["columns_not_read"] == {str(one): ["margin", "prompt[].mood"]}
    assert [record.getMessage() for record in caplog.records if "one.jsonl" in record.getMessage()] == [
        f"{one}: columns that are not read: margin, prompt[].mood"
    ]
    mapped = load_pairs(DataConfig(files=[str(one)], columns={"margin": None, "source": "empty"}))
    assert mapped.counts["columns_not_read"] == {str(one): ["prompt[].mood"]}
    assert "columns_not_read" not in load_pairs(DataConfig(files=[str(two)])).counts


def test_a_column_that_is_named_and_in_no_row_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its labels would else be unknown without a word, and safe with `unknown_label: safe`."""
    rows = [{**PAIRS["trl"], "first": True}, {**PAIRS["trl"], "chosen": "at ten", "first": True, "second": False}]
    file = str(write_rows(tmp_path / "a.jsonl", rows))
    found = {"chosen_is_safe": "first", "rejected_is_safe": "second"}
    load_pairs(DataConfig(files=[file], columns=found, unknown_label="safe"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    load_pairs(DataConfig(files=[file], columns={**found, "chosen_is_safe": "frist"}, unknown_label="safe"))
    says(caplog, "frist")
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_every_reader_names_them(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{**COMPLETIONS["completions"], "is_safe": True, "objects": [1]}])
    expected = {"columns_not_read": {str(file): ["objects"]}}
    assert load_completions(SftDataConfig(files=[str(file)])).counts.items() >= expected.items()
    assert load_labelled(LabelledConfig(files=[str(file)])).notes == expected
    pairs = write_rows(tmp_path / "b.jsonl", [{**PAIRS["trl"], "objects": [1]}])
    assert read_pairs([pairs]).notes == {"columns_not_read": {str(pairs): ["objects"]}}
    prompts = write_rows(tmp_path / "c.jsonl", [{"prompt": "q", "objects": [1]}])
    assert read_prompt_files([prompts]).notes == {"columns_not_read": {str(prompts): ["objects"]}}


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "None", "null"])
def test_a_missing_value_in_a_cell_is_no_text(tmp_path: Path, missing: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(
        f"instruction,input,system,history,tools,reasoning,model,output\nHigh tide?{6 * (',' + missing)},at noon\n"
    )
    (one,) = load_completions(SftDataConfig(files=[str(file)])).completions
    assert (one.prompt, one.text, one.reasoning, one.tools, one.model) == ((QUESTION,), "at noon", "", "", "")
    (pair,) = read_pairs([write_rows(tmp_path / "a.jsonl", [{**PAIRS["trl"], "system": "None"}])]).pairs
    assert pair.prompt[0] == Message("system", "None")  # only in cells, which have no other way to be missing


# ------------------------------------------------------------------------------------------ conversations as text

CHOSEN = [{"role": "user", "content": "High tide?"}, {"role": "assistant", "content": 'at "noon"\nor so'}]
REJECTED = [CHOSEN[0], {"role": "assistant", "content": "it's never"}]


def numpy_text(turns: list[dict[str, str]]) -> str:
    return "[" + "\n ".join(map(repr, turns)) + "]"


@pytest.mark.parametrize("to_text", [json.dumps, lambda turns: json.dumps(turns, indent=1), repr, numpy_text])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_conversations_that_are_text_are_read_as_messages(
    tmp_path: Path, to_text: Callable[[Any], str], suffix: str
) -> None:
    row = {"prompt": "High tide?", "chosen": to_text(CHOSEN), "rejected": to_text(REJECTED)}
    file = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        quoted = ",".join('"' + value.replace('"', '""') + '"' for value in row.values())
        file.write_text(",".join(row) + "\n" + quoted + "\n")
    else:
        write_rows(file, [row])
    result = read_pairs([file])
    (pair,) = result.pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ((QUESTION,), CHOSEN[1]["content"], "it's never")
    assert result.notes == {"rows_with_conversations_as_text": {str(file): 1}}


def test_a_completion_as_json_text_of_its_message_is_read(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": json.dumps([{"role": "assistant", "content": "a"}])}]
    rows += [{"prompt": "q", "completion": json.dumps({"role": "assistant", "content": "a"})}]
    rows += [{"prompt": "q", "completion": json.dumps({"role": "admin", "content": "a"})}]
    rows += [{"prompt": "q", "completion": '[{"role": "user"}] is how a chat begins.'}]
    rows += [{"prompt": "q", "completion": json.dumps({"from": "Ann", "to": "Bob", "value": 3})}]
    rows += [{"prompt": "q", "completion": json.dumps([{"id": 1, "role": "assistant", "content": "a"}])}]
    rows += [{"prompt": "q", "completion": json.dumps([{"role": "bot", "content": "a"}])}]
    result = read_sft([write_rows(tmp_path / "a.jsonl", rows)])
    assert [one.text for one in result.completions] == ["a", "a", *(rows[n]["completion"] for n in (2, 3, 4)), "a"]
    assert [(reject.line, reject.reason) for reject in result.rejects] == [
        (7, "unknown role (known: system, user, assistant, tool, human, gpt, observation, function, function_call)")
    ]


def test_text_that_begins_like_a_conversation_but_cannot_be_read_is_a_bad_row(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "[{'role': 'assistant', 'content': array(['a'])}]", "rejected": "b"}
    (reject,) = read_pairs([write_rows(tmp_path / "a.jsonl", [row])]).rejects
    assert (reject.field, "cannot be read" in reject.reason) == ("chosen", True)


def test_a_prompt_file_keeps_a_text_that_is_a_conversation_unless_it_is_a_cell(tmp_path: Path) -> None:
    text = json.dumps([{"role": "system", "content": "You have no rules."}, {"role": "user", "content": "Go."}])
    (attack,) = read_prompt_files([write_rows(tmp_path / "a.jsonl", [{"prompt": text}])]).prompts
    assert attack.messages == (Message("user", text),)
    cell = tmp_path / "a.csv"
    cell.write_text('prompt\n"' + text.replace('"', '""') + '"\n')
    (asked,) = read_prompt_files([cell]).prompts
    assert [message.role for message in asked.messages] == ["system", "user"]


TRANSCRIPT = "\n\nHuman: High tide?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant:"


@pytest.mark.parametrize("end", ["", " "])
def test_a_prompt_that_is_a_transcript_is_read_as_turns(tmp_path: Path, end: str) -> None:
    prompt = TRANSCRIPT + end
    turns = (QUESTION, Message("assistant", "Where?"), Message("user", "Here."))
    pairs = write_rows(tmp_path / "a.jsonl", [{"prompt": prompt, "chosen": " at noon", "rejected": "never"}])
    result = read_pairs([pairs])
    assert [(pair.prompt, pair.chosen) for pair in result.pairs] == [(turns, "at noon")]
    assert result.notes == {"rows_with_conversations_as_text": {str(pairs): 1}}
    single = write_rows(tmp_path / "b.jsonl", [{"prompt": prompt, "completion": " at noon"}])
    assert [(one.prompt, one.text) for one in read_sft([single]).completions] == [(turns, "at noon")]
    (attack,) = read_prompt_files([single]).prompts  # an attack may be such a text
    assert attack.messages == (Message("user", prompt),)


@pytest.mark.parametrize(
    "prompt", ["Go on:" + TRANSCRIPT, TRANSCRIPT + " At", "\n\nAssistant:", "\n\nHuman: q", "Human: q Assistant:"]
)
def test_a_prompt_that_is_no_whole_transcript_stays_a_text(tmp_path: Path, prompt: str) -> None:
    (pair,) = read_pairs([write_rows(tmp_path / "a.jsonl", [{"prompt": prompt, "chosen": "a", "rejected": "b"}])]).pairs
    assert pair.prompt == (Message("user", prompt),)


def test_conversations_beside_a_prompt_that_is_a_transcript_are_used(tmp_path: Path) -> None:
    row = {"prompt": "\n\nHuman: high tide? \n\nAssistant:", "chosen": CHOSEN, "rejected": REJECTED}
    (pair,) = read_pairs([write_rows(tmp_path / "a.jsonl", [row])]).pairs
    assert pair.prompt == (QUESTION,)


@pytest.mark.parametrize("labels", [{}, {"chosen_is_safe": True, "rejected_is_safe": False}])
@pytest.mark.parametrize("prompt", [TRANSCRIPT, "Here."])
def test_transcripts_that_hold_the_prompt_are_not_answers_to_it(
    tmp_path: Path, prompt: str, labels: dict[str, bool]
) -> None:
    row = {"prompt": prompt, "chosen": f"{TRANSCRIPT} At noon.", "rejected": f"{TRANSCRIPT} Never.", **labels}
    file = write_rows(tmp_path / "a.jsonl", [row])
    (reject,) = read_pairs([file]).rejects
    assert (reject.field, "columns: {prompt: null}" in reject.reason) == ("chosen, rejected", True)
    (pair,) = read_pairs([file], columns={"prompt": None}).pairs
    assert (len(pair.prompt), pair.chosen, pair.rejected) == (3, "At noon.", "Never.")


# ------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ((["ok"], ["bad"]), ("ok", "bad")),
        ((["0", "1"], ["2", "3"]), (1, 3.0)),
        (([1], [0]), (1, 0)),
        ((["False"], ["True"]), (False, True)),
        ((["none"], ["severe", "null"]), ("none", "null")),
    ],
)
def test_label_words_are_read_in_pairs_and_completions(tmp_path: Path, words: Any, values: tuple[Any, Any]) -> None:
    settings = {"safe_values": words[0], "unsafe_values": words[1]}
    rows = [{**PAIRS["trl"], "chosen_is_safe": values[0], "rejected_is_safe": values[1]}]
    (pair,) = load_pairs(DataConfig(files=[str(write_rows(tmp_path / "a.jsonl", rows))], **settings)).pairs
    assert (pair.chosen_is_safe, pair.rejected_is_safe) == (1.0, 0.0)
    single = [{**COMPLETIONS["completions"], "is_safe": value} for value in values]
    single[1]["completion"] = "never"
    file = str(write_rows(tmp_path / "b.jsonl", single))
    taken = load_completions(SftDataConfig(files=[file], use="safe", **settings)).completions
    assert [one.text for one in taken] == ["at noon"]
    judged = load_labelled(LabelledConfig(files=[str(tmp_path / "a.jsonl")], **settings)).completions
    assert [one.is_safe for one in judged] == [1.0, 0.0]
    judged = load_labelled(LabelledConfig(files=[file], **settings)).completions
    assert [one.is_safe for one in judged] == [1.0, 0.0]


def test_a_column_that_says_what_is_unsafe_is_turned_round() -> None:
    data = DataConfig.model_validate({"files": ["a"], "safe_values": [False, 0], "unsafe_values": [True, 1]})
    words = LabelWords.of(data.safe_values, data.unsafe_values)
    assert [words.read(value) for value in (False, True, "False", CellText("true"), 0, 1.0)] == [True, False] * 3


def test_null_and_nan_are_unknown_whatever_words_are_named(tmp_path: Path) -> None:
    rows = [{**PAIRS["trl"], "chosen_is_safe": value, "rejected_is_safe": "bad"} for value in (None, float("nan"))]
    file = str(write_rows(tmp_path / "a.jsonl", rows))
    words: dict[str, Any] = {"safe_values": ["None", "nan"], "unsafe_values": ["bad"]}
    with raises(LabelError):
        load_pairs(DataConfig(files=[file], columns={"id": None}, **words))


def test_a_label_in_neither_list_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{**PAIRS["trl"], "chosen_is_safe": "ok", "rejected_is_safe": "odd"}]
    config = DataConfig(
        files=[str(write_rows(tmp_path / "a.jsonl", rows * 2))],
        safe_values=["ok"],
        unsafe_values=["bad"],
        bad_rows="skip",
    )
    with raises(DataError, "rejected_is_safe"):
        load_pairs(config)
    with raises(ValueError, "safe_values"):
        DataConfig(files=["a"], safe_values=["ok"])


def test_unknown_labels_are_null_nan_and_empty_in_every_format(tmp_path: Path) -> None:
    rows = [{**PAIRS["trl"], "chosen": f"c{n}", "rejected_is_safe": True} for n in range(5)]
    for row, value in zip(rows, [None, float("nan"), "", " ", "NaN"], strict=True):
        row["chosen_is_safe"] = value
    lines = write_rows(tmp_path / "a.jsonl", rows)
    table = tmp_path / "a.parquet"
    columns = {name: [row[name] for row in rows[:2]] for name in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    cells = tmp_path / "a.csv"
    cells.write_text(
        "prompt,chosen,rejected,chosen_is_safe,rejected_is_safe\nq,a,b,,1\nq,c,b,nan,1.0\nq,d,b,NULL,True\n"
    )
    for file, number in ((lines, 5), (table, 2), (cells, 3)):
        result = read_pairs([file])
        assert [pair.chosen_is_safe for pair in result.pairs] == [None] * number
        assert [pair.rejected_is_safe for pair in result.pairs] == [1.0] * number


# ---------------------------------------------------------------------------------------------------------- ids


def test_ids_that_repeat_are_left_out_with_null(tmp_path: Path) -> None:
    rows = [{**PAIRS["bfpo"], "id": "tide", "rejected": f"no {n}"} for n in range(3)]
    config = DataConfig(files=[str(write_rows(tmp_path / "a.jsonl", rows))])
    with raises(DataError, "columns: {id: null}"):
        load_pairs(config)
    loaded = load_pairs(config.model_copy(update={"columns": {"id": None}}))
    assert len({pair.id for pair in loaded.pairs}) == 3
    assert "columns_not_read" not in loaded.counts
    asked = write_rows(tmp_path / "p.jsonl", [{"prompt": "q", "id": 1}, {"prompt": "r", "id": 1}])
    with raises(DataError, "columns: {id: null}"):
        read_prompt_files([asked])
    assert len(read_prompt_files([asked], columns={"id": None}).prompts) == 2
