"""Layouts: rows to pairs by hand, and the reason for every row that is none."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.schema import Message, Pair
from bfpo.data.load import load_pairs
from bfpo.data.messages import transcript_turns, turns_with_beginning
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.rejects import RowError
from bfpo.data.settings import DataConfig
from messages import raises

Q = Message("user", "q")
USER = {"role": "user", "content": "q"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parse(layout: str, row: dict[str, Any]) -> Pair:
    return PAIR_LAYOUTS[layout].parse(row)


OURS: dict[str, Any] = {
    "id": "7",
    "prompt": "q",
    "chosen": "a",
    "rejected": "b",
    "chosen_is_safe": True,
    "rejected_is_safe": None,
    "source": "here",
}
PKU: dict[str, Any] = {
    "prompt": "q",
    "response_0": "zero",
    "response_1": "one",
    "better_response_id": 1,
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}


def test_our_columns() -> None:
    assert parse("bfpo", OURS) == Pair("7", (Q,), "a", "b", 1.0, None, "here")
    turns = [{"role": "system", "content": "s"}, USER]
    assert parse("bfpo", {**OURS, "prompt": turns, "id": 7}).prompt == (Message("system", "s"), Q)
    assert parse("bfpo", {**OURS, "prompt": ""}).prompt == parse("bfpo", {**OURS, "prompt": []}).prompt == ()
    assert parse("bfpo", {**OURS, "extra": object()}) == parse("bfpo", OURS)


@pytest.mark.parametrize(("label", "value"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (0.3, 0.3), (None, None)])
def test_labels(label: object, value: float | None) -> None:
    assert parse("bfpo", {**OURS, "rejected_is_safe": label}).rejected_is_safe == value
    assert parse("pku", {**PKU, "is_response_0_safe": label}).rejected_is_safe == value


def test_the_better_pku_response_is_chosen_and_keeps_its_label() -> None:
    one, zero = parse("pku", PKU), parse("pku", {**PKU, "better_response_id": 0})
    assert (one.chosen, one.rejected, one.chosen_is_safe, one.rejected_is_safe) == ("one", "zero", 0.0, 1.0)
    assert (zero.chosen, zero.rejected, zero.chosen_is_safe, zero.rejected_is_safe) == ("zero", "one", 1.0, 0.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b")]},
        {"prompt": [USER], "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
        {"prompt": "q", "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
        {"prompt": "q", "chosen": [answer("a")], "rejected": [answer("b")]},
        {"chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
    ],
)
def test_every_way_to_write_a_trl_row(row: dict[str, Any]) -> None:
    pair = parse("trl", row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Q,), "a", "b")
    assert pair.chosen_is_safe is None
    assert PAIR_LAYOUTS.detect(row) is PAIR_LAYOUTS["trl"]


def test_trl_conversations_of_several_turns_share_all_but_the_last() -> None:
    start = [USER, answer("x"), USER]
    pair = parse("trl", {"chosen": [*start, answer("a")], "rejected": [*start, answer("b")], "chosen_is_safe": 0.5})
    assert pair.prompt == (Q, Message("assistant", "x"), Q)
    assert (pair.chosen, pair.rejected, pair.chosen_is_safe) == ("a", "b", 0.5)


def test_a_question_beside_conversations_that_share_a_system_message_alone_is_kept() -> None:
    system = {"role": "system", "content": "s"}
    both = {"chosen": [system, answer("a")], "rejected": [system, answer("b")]}
    first = Message("system", "s")
    assert parse("trl", {"prompt": "q", **both}).prompt == (first, Q)
    assert parse("trl", {"prompt": [system], **both}).prompt == (first,)
    assert parse("trl", {"prompt": [system, USER], "chosen": [answer("a")], "rejected": [answer("b")]}).prompt == (
        first,
        Q,
    )


def test_hh_transcripts() -> None:
    start = "\n\nHuman: one\n\ntwo\n\nAssistant: three\n\nHuman: four"
    row = {"chosen": f"{start}\n\nAssistant: Human: odd", "rejected": f"{start}\n\nAssistant:  b "}
    pair = parse("hh", row)
    assert pair.prompt == (Message("user", "one\n\ntwo"), Message("assistant", "three"), Message("user", "four"))
    assert (pair.chosen, pair.rejected, pair.chosen_is_safe) == ("Human: odd", "b", None)
    assert PAIR_LAYOUTS.detect(row) is PAIR_LAYOUTS["hh"]


def test_a_transcript_with_a_known_beginning_has_the_turns_that_it_has_alone() -> None:
    draw, num_found = random.Random(0), 0
    pieces = ["\n\nHuman:", "\n\nAssistant:", "\n\n", "\n", " ", "Human:", "Assistant:", " one", "two "]
    for _ in range(20_000):
        parts = draw.choices(pieces, k=draw.randint(1, 8))
        text, other = ("".join(parts[:end] + draw.choices(pieces, k=end % 3)) for end in (len(parts), len(parts) - 1))
        if turns := transcript_turns(text):
            found = turns_with_beginning(text, turns, other)
            assert found in ((), transcript_turns(other)), (text, other)
            num_found += bool(found)
    assert num_found > 100


PKU_ALL: dict[str, Any] = {
    **PKU,
    "prompt_source": "Alpaca3-70B",
    "response_0_source": "Alpaca3-8B",
    "response_1_source": "Alpaca3-8B",
    "response_0_harm_category": {"Violence": False},
    "response_1_harm_category": {"Violence": True},
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "safer_response_id": 0,
    "response_0_sha256": "a",
    "response_1_sha256": "b",
}


@pytest.mark.parametrize(
    "columns",
    [
        ("safer_response_id",),
        ("safer_response_id", "prompt_source", "response_0_source", "response_1_source"),
        ("safer_response_id", "response_0_harm_category", "response_0_severity_level", "response_1_severity_level"),
        tuple(PKU_ALL),
    ],
)
def test_every_layout_that_pku_saferlhf_has_had(columns: tuple[str, ...]) -> None:
    row = {**PKU, **{name: PKU_ALL[name] for name in columns}}
    assert PAIR_LAYOUTS.detect(row) is PAIR_LAYOUTS["pku"]
    found = parse("pku", row)
    assert replace(found, category="") == parse("pku", PKU)  # the safer response is not the chosen one
    assert found.category == ("Violence" if "response_1_harm_category" in columns else "")


@pytest.mark.parametrize("write", [str, json.dumps])
def test_the_categories_of_pku_saferlhf_in_a_csv_file(tmp_path: Path, write: Any) -> None:
    """A table is written with dictionaries as Python prints them."""
    file = tmp_path / "a.csv"
    row = {key: write(value) if isinstance(value, dict) else value for key, value in PKU_ALL.items()}
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(row))
        writer.writeheader()
        writer.writerows([row, *({**row, "response_1_harm_category": text} for text in ("violent", "{[]: True}"))])
    loaded = load_pairs(DataConfig(files=[str(file)], bad_rows="skip"))
    assert [pair.category for pair in loaded.pairs] == ["Violence"]
    assert [(reject.line, reject.field) for reject in loaded.rejects] == [
        (number, "response_1_harm_category") for number in (3, 4)
    ]


def test_a_map_of_a_parquet_file_is_an_object(tmp_path: Path) -> None:
    import pyarrow.parquet

    harms = pyarrow.map_(pyarrow.string(), pyarrow.bool_())
    marks = [[("Theft", False), ("Violence", True)], [], None]
    columns = {key: pyarrow.array([value] * 3) for key, value in PKU.items()}
    columns |= {f"response_{k}_harm_category": pyarrow.array(marks, harms) for k in (0, 1)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    loaded = load_pairs(DataConfig(files=[str(tmp_path / "a.parquet")]))
    assert [pair.category for pair in loaded.pairs] == ["Violence", "", ""]


REDTEAM: dict[str, Any] = {
    "prompt": "q",
    "modeloutput1": "one",
    "modeloutput2": "two",
    "better_modelout": 2,
    "is_modelout1_safe": True,
    "is_modelout2_safe": 0,
}


@pytest.mark.parametrize(
    ("better", "texts", "labels"),
    [(1, ("one", "two"), (1.0, 0.0)), (2, ("two", "one"), (0.0, 1.0)), ("2", ("two", "one"), (0.0, 1.0))],
)
def test_the_red_team_file_of_the_authors(better: object, texts: object, labels: object) -> None:
    pair = parse("redteam", {**REDTEAM, "better_modelout": better})
    assert ((pair.chosen, pair.rejected), (pair.chosen_is_safe, pair.rejected_is_safe)) == (texts, labels)


HELPSTEER2: dict[str, Any] = {"prompt": "q", "response_1": "one", "response_2": "two", "preference_strength": -2}
HELPSTEER3: dict[str, Any] = {"context": [USER], "response1": "one", "response2": "two", "overall_preference": 1}


def test_helpsteer_prefers_by_sign() -> None:
    pair = parse("helpsteer2", HELPSTEER2)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.chosen_is_safe) == ((Q,), "one", "two", None)
    assert parse("helpsteer2", {**HELPSTEER2, "preference_strength": 3}).chosen == "two"
    assert (parse("helpsteer3", HELPSTEER3).prompt, parse("helpsteer3", HELPSTEER3).chosen) == ((Q,), "two")
    turns = "q\n<extra_id_1>Assistant\nx\n<extra_id_1>User\nq"
    assert parse("helpsteer2", {**HELPSTEER2, "prompt": turns}).prompt == (Q, Message("assistant", "x"), Q)


SHAREGPT: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "q"}],
    "chosen": {"from": "gpt", "value": "a"},
    "rejected": {"from": "gpt", "value": "b"},
}


def test_sharegpt_turns() -> None:
    pair = parse("sharegpt", {**SHAREGPT, "system": "s"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("system", "s"), Q), "a", "b")
    assert parse("sharegpt", SHAREGPT).prompt == (Q,)


AXOLOTL: dict[str, Any] = {"messages": [USER], "chosen": answer("a"), "rejected": answer("b")}


@pytest.mark.parametrize("change", [{}, {"chosen": [answer("a")], "rejected": [answer("b")]}])
def test_messages_are_the_prompt_of_single_answers(change: dict[str, Any]) -> None:
    row = {**AXOLOTL, **change}
    assert PAIR_LAYOUTS.detect(row) is PAIR_LAYOUTS["messages"]
    pair = parse("messages", {**row, "system": "s"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("system", "s"), Q), "a", "b")


def test_numbers_of_a_column_with_gaps_are_ids() -> None:
    assert parse("trl", {**TRL, "id": 7.0}).id == "7"
    assert len(parse("trl", {**TRL, "id": float("nan")}).id) == 16


def test_ultrafeedback_is_a_conversation_beside_its_prompt() -> None:
    turns = {key: [USER, answer(key)] for key in ("chosen", "rejected")}
    row = {"prompt": "q", "prompt_id": "x", **turns, "messages": turns["chosen"], "score_chosen": 8.0}
    assert PAIR_LAYOUTS.detect(row) is PAIR_LAYOUTS["trl"]
    assert parse("trl", row) == replace(parse("trl", turns), id=parse("trl", row).id)


def test_an_id_made_from_content_depends_on_content_alone() -> None:
    row = {key: value for key, value in OURS.items() if key != "id"}
    made = parse("bfpo", row).id
    assert made == parse("bfpo", {**row, "source": "elsewhere", "extra": 1}).id == parse("bfpo", {**row, "id": None}).id
    changed = [{"prompt": "r"}, {"chosen": "c"}, {"rejected": "c"}, {"rejected_is_safe": 0}]
    assert len({made, *(parse("bfpo", {**row, **change}).id for change in changed)}) == 5
    content = '[[["user", "q"]], "a", "b", 1.0, null]'
    assert made == hashlib.sha256(content.encode()).hexdigest()[:16]


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


TRL = {"prompt": "q", "chosen": "a", "rejected": "b"}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
BAD = [
    ("bfpo", without(OURS, "prompt"), "prompt"),
    ("bfpo", without(OURS, "chosen"), "chosen"),
    ("bfpo", without(OURS, "rejected_is_safe"), "rejected_is_safe"),
    ("bfpo", {**OURS, "chosen": 3}, "chosen"),
    ("bfpo", {**OURS, "chosen": None}, "chosen"),
    ("bfpo", {**OURS, "prompt": 3}, "prompt"),
    ("bfpo", {**OURS, "prompt": ["q"]}, "prompt"),
    ("bfpo", {**OURS, "prompt": [{"role": "user"}]}, "prompt"),
    ("bfpo", {**OURS, "prompt": [{"role": "wizard", "content": "q"}]}, "prompt"),
    ("bfpo", {**OURS, "prompt": [{"role": ["user"], "content": "q"}]}, "prompt"),
    ("bfpo", {**OURS, "prompt": [{"role": "user", "content": None}]}, "prompt"),
    ("bfpo", {**OURS, "chosen": "\ud800"}, "chosen"),
    ("bfpo", {**OURS, "chosen": ""}, "chosen"),
    ("bfpo", {**OURS, "rejected": " \n"}, "rejected"),
    ("bfpo", {**OURS, "rejected": "a"}, "chosen = rejected"),
    ("bfpo", {**OURS, "rejected": " a\n"}, "chosen = rejected"),
    ("bfpo", {**OURS, "chosen_is_safe": 1.5}, "chosen_is_safe"),
    ("bfpo", {**OURS, "chosen_is_safe": -1}, "chosen_is_safe"),
    ("bfpo", {**OURS, "chosen_is_safe": 10**400}, "chosen_is_safe"),
    ("bfpo", {**OURS, "chosen_is_safe": "true"}, "chosen_is_safe"),
    ("bfpo", {**OURS, "id": 1.5}, "id"),
    ("bfpo", {**OURS, "id": True}, "id"),
    ("bfpo", {**OURS, "source": 3}, "source"),
    ("pku", without(PKU, "response_1"), "response_1"),
    ("pku", without(PKU, "better_response_id"), "better_response_id"),
    ("pku", {**PKU, "better_response_id": 2}, "better_response_id"),
    ("pku", {**PKU, "better_response_id": True}, "better_response_id"),
    ("pku", {**PKU, "better_response_id": "1"}, "better_response_id"),
    ("pku", {**PKU, "better_response_id": None}, "better_response_id"),
    ("pku", {**PKU, "better_response_id": [1]}, "better_response_id"),
    ("pku", {**PKU, "response_1": " "}, "response_1"),
    ("pku", {**PKU, "response_1": "zero"}, "response_1 = response_0"),
    ("pku", {**PKU, "is_response_1_safe": 7}, "is_response_1_safe"),
    ("redteam", {**REDTEAM, "better_modelout": 0}, "better_modelout"),
    ("redteam", {**REDTEAM, "better_modelout": "x"}, "better_modelout"),
    ("redteam", without(REDTEAM, "modeloutput2"), "modeloutput2"),
    ("redteam", {**REDTEAM, "is_modelout1_safe": 2}, "is_modelout1_safe"),
    ("helpsteer2", {**HELPSTEER2, "preference_strength": 0}, "preference_strength"),
    ("helpsteer2", {**HELPSTEER2, "preference_strength": 4}, "preference_strength"),
    ("helpsteer2", {**HELPSTEER2, "preference_strength": "2"}, "preference_strength"),
    ("helpsteer2", {**HELPSTEER2, "preference_strength": float("nan")}, "preference_strength"),
    ("helpsteer3", {**HELPSTEER3, "context": "text", "overall_preference": 0}, "overall_preference"),
    ("helpsteer3", without(HELPSTEER3, "context"), "context"),
    ("sharegpt", {**SHAREGPT, "chosen": {"from": "human", "value": "a"}}, "chosen"),
    ("sharegpt", {**SHAREGPT, "conversations": "q"}, "conversations"),
    ("sharegpt", {**SHAREGPT, "conversations": [{"from": "bot", "value": "q"}]}, "conversations"),
    ("sharegpt", {**SHAREGPT, "conversations": [{"from": ["gpt"], "value": "q"}]}, "conversations"),
    ("trl", without(TRL, "prompt"), "prompt"),
    ("trl", without(TRL, "rejected"), "rejected"),
    ("trl", {**TRL, "chosen": [USER, answer("a")]}, "rejected"),
    ("trl", {"chosen": [], "rejected": []}, "chosen"),
    (
        "trl",
        {"chosen": [USER, answer("a")], "rejected": [USER, answer("a"), USER, answer("b")]},
        "rejected",
    ),
    ("trl", {"chosen": [USER], "rejected": [USER]}, "chosen"),
    ("trl", {"chosen": [USER, answer("a")], "rejected": [USER, answer("a")]}, "chosen = rejected"),
    ("trl", {"prompt": [USER], "chosen": [answer("a"), USER], "rejected": [answer("b")]}, "chosen"),
    ("hh", {**HH, "rejected": "\n\nHuman: other\n\nAssistant: b"}, "chosen, rejected"),
    ("hh", {**HH, "chosen": "just text"}, "chosen"),
    ("hh", {**HH, "chosen": ""}, "chosen"),
    ("hh", {**HH, "chosen": "\n\nHuman: q"}, "chosen"),
    ("hh", {**HH, "rejected": "\n\nHuman: q\n\nAssistant:"}, "rejected"),
    ("hh", {**HH, "rejected": [USER]}, "rejected"),
    ("hh", {"question": "q", "chosen": answer("a"), "rejected": answer("b")}, "chosen"),
    ("hh", {"question": "q", "chosen": "a", "rejected": "b"}, "chosen"),
    ("trl", {"question": "q", "chosen": [answer("a")], "rejected": [answer("b")]}, "chosen, rejected"),
    ("messages", {**AXOLOTL, "chosen": USER}, "chosen"),
    ("trl", {"prompt": None, "chosen": [answer("a")], "rejected": [answer("b")]}, "prompt"),
    ("messages", {"messages": [USER, answer("a ")], "chosen": answer("a"), "rejected": answer("b")}, "chosen"),
    ("sharegpt", {"conversations": [USER, answer("b")], "chosen": answer("a"), "rejected": answer("b")}, "rejected"),
    ("trl", {"prompt": [USER, answer("a")], "chosen": "a", "rejected": "b"}, "chosen"),
]


@pytest.mark.parametrize(("layout", "row", "field"), BAD)
def test_bad_rows_say_field_and_reason(layout: str, row: dict[str, Any], field: str) -> None:
    with raises(RowError) as caught:
        parse(layout, row)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (OURS, "bfpo"),
        (PKU, "pku"),
        (without(PKU, "is_response_0_safe", "is_response_1_safe"), "pku"),
        (REDTEAM, "redteam"),
        (HELPSTEER2, "helpsteer2"),
        (HELPSTEER3, "helpsteer3"),
        (SHAREGPT, "sharegpt"),
        (TRL, "trl"),
        ({**TRL, "chosen_is_safe": 1}, "trl"),
        ({**OURS, "chosen": [answer("a")], "rejected": [answer("b")]}, "trl"),
        ({"instruction": "q", "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]}, "trl"),
        ({"instruction": "q", "chosen": [answer("a")], "rejected": [answer("b")]}, "alpaca_pairs"),
        ({"instruction": "q", "output": [answer("a"), answer("b")]}, "alpaca_pairs"),
        (HH, "hh"),
        ({"prompt": "q", "completion": "a"}, None),
        ({}, None),
    ],
)
def test_the_columns_decide_the_layout(row: dict[str, Any], name: str | None) -> None:
    layout = PAIR_LAYOUTS.detect(row)
    assert (layout.name if layout else None) == name
