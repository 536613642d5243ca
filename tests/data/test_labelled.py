from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.errors import DataError, SettingError
from bfpo.data import labelled
from bfpo.data.labelled import LabelledResult
from bfpo.data.prompts import read_prompt_files
from bfpo.data.read import read_pairs
from bfpo.data.settings import LabelledConfig
from messages import raises, says


def load_labelled(files: list[Path], **keys: Any) -> LabelledResult:
    return labelled.load_labelled(LabelledConfig(files=files, **keys))


def written(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def found(*args: Any, **settings: Any) -> list[tuple[str, float | None]]:
    return [(row.text, row.is_safe) for row in load_labelled(*args, **settings).completions]


def test_plain_rows_with_every_way_to_say_safe(tmp_path: Path) -> None:
    says = [True, False, 1, 0, "safe", "Unsafe", "TRUE", "0", 1.0, 0.0]
    file = written(
        tmp_path / "a.jsonl", *({"prompt": f"q{n}", "text": f"t{n}", "is_safe": s} for n, s in enumerate(says))
    )
    assert [label for _, label in found([file])] == [1.0, 0.0] * 5


def test_a_prompt_is_not_needed_and_an_id_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", *({"id": "x", "completion": f"t{n}", "is_safe": True} for n in range(3)))
    rows = load_labelled([file]).completions
    assert [row.prompt for row in rows] == [()] * 3
    assert [row.id for row in rows] == ["x", "x-1", "x-2"]


def test_rows_in_other_layouts_of_completions_with_a_label(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add", "input": "1, 2", "output": "t0", "is_safe": False},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "t0"}], "is_safe": False},
    ]
    for row, prompt in zip(rows, ("Add\n1, 2", "q"), strict=True):
        (one,) = load_labelled([written(tmp_path / "a.jsonl", row)]).completions
        assert (one.text, one.is_safe, [turn.content for turn in one.prompt]) == ("t0", 0.0, [prompt])


def test_named_values_leave_out_and_count_all_others(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a.jsonl",
        *({"question": "q", "answer": f"t{n}", "verdict": v, "sort": "ab"[n % 2]} for n, v in enumerate("RCPRX")),
    )
    result = load_labelled(
        [file],
        columns={"prompt": "question", "completion": "answer", "is_safe": "verdict", "kind": "sort"},
        safe_values=["R"],
        unsafe_values=["C"],
    )
    assert [(row.text, row.is_safe, row.kind) for row in result.completions] == [
        ("t0", 1, "a"),
        ("t1", 0, "b"),
        ("t3", 1, "b"),
    ]
    assert result.left_out == {"label is none of safe_values and unsafe_values": 2}


def test_where_keeps_what_fits_under_the_name_that_columns_give(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a.jsonl",
        *(
            {"completion": f"t{n}", "is_safe": 1, "type": t}
            for n, t in enumerate(("contrast_a", "plain", "contrast_b"))
        ),
    )
    assert [text for text, _ in found([file], where={"type": "contrast_*"})] == ["t0", "t2"]
    assert [text for text, _ in found([file], columns={"kind": "type"}, where={"kind": "plain"})] == ["t1"]
    with raises(DataError, "colour"):
        load_labelled([file], where={"colour": "red"})


def test_a_pair_file_gives_two_a_row(tmp_path: Path) -> None:
    pair = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}
    file = written(
        tmp_path / "a.jsonl",
        {**pair, "is_response_0_safe": True, "is_response_1_safe": False},
        {**pair, "prompt": "r", "is_response_0_safe": None, "is_response_1_safe": 0.7},
    )
    result = load_labelled([file])
    assert [(row.text, row.is_safe) for row in result.completions] == [("b", 0.0), ("a", 1.0)]
    assert result.left_out == {"label unknown or between 0 and 1": 2}


def test_a_label_is_the_same_in_csv_and_in_json(tmp_path: Path) -> None:
    labels = [0.7, 1, 0.0, True]
    rows = [{"prompt": f"q{n}", "completion": f"t{n}", "is_safe": label} for n, label in enumerate(labels)]
    lines, cells = written(tmp_path / "a.jsonl", *rows), tmp_path / "a.csv"
    cells.write_text("\n".join(["prompt,completion,is_safe", *(",".join(map(str, row.values())) for row in rows)]))
    for file in (lines, cells):
        assert found([file]) == [("t1", 1.0), ("t2", 0.0), ("t3", 1.0)]
        assert load_labelled([file]).left_out == {"label unknown or between 0 and 1": 1}


def test_labelled_data_sets_are_read_as_they_are(tmp_path: Path) -> None:
    beaver = written(tmp_path / "b.jsonl", {"prompt": "q", "response": "a", "category": {}, "is_safe": False})
    assert found([beaver]) == [("a", 0.0)]
    wild = written(
        tmp_path / "w.jsonl",
        {"prompt": "q", "response": "a", "response_harm_label": "harmful"},
        {"prompt": "q", "response": "b", "response_harm_label": "unharmful"},
        {"prompt": "q", "response": "c", "response_harm_label": None},
    )
    assert found([wild]) == [("a", 0.0), ("b", 1.0)]
    assert load_labelled([wild]).left_out == {"label unknown or between 0 and 1": 1}


def test_bad_rows_stop_or_are_counted(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a", "is_safe": True}
    bad = [
        {**good, "is_safe": "maybe"},
        {**good, "completion": " "},
        {"prompt": "q", "completion": "a"},
        "{broken",
        [1],
    ]
    file = written(tmp_path / "a.jsonl", good, *bad)
    with raises(DataError):
        load_labelled([file])
    result = load_labelled([file], bad_rows="skip")
    assert (len(result.completions), len(result.rejects)) == (1, 5)
    assert {reject.line for reject in result.rejects} == {2, 3, 4, 5, 6}


def test_what_cannot_be_meant_is_an_error(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a", "is_safe": "x"})
    with raises(SettingError, "columns"):
        load_labelled([file], columns={"colour": "c"})
    with raises(SettingError):
        load_labelled([file], safe_values=["x"], unsafe_values=["x"])
    with raises(DataError):
        load_labelled([file], safe_values=["y"], unsafe_values=["z"])
    with raises(DataError):
        load_labelled([written(tmp_path / "b.jsonl", {"a": 1})])
    with raises(DataError):
        load_labelled([written(tmp_path / "c.jsonl")])


def test_the_real_files_are_read_as_their_manifest_says(shared_data: Path) -> None:
    folder = shared_data / "safety_judge"
    gptfuzz = {"columns": {"prompt": "question", "completion": "Response", "is_safe": "label"}}
    result = load_labelled([folder / "gptfuzz_train.csv.gz"], **gptfuzz, safe_values=["0"], unsafe_values=["1"])
    assert (len(result.completions), sum(row.is_safe == 0 for row in result.completions)) == (6160, 1694)
    xstest = {"columns": {"is_safe": "final_label", "kind": "type"}, "where": {"kind": "contrast_*"}}
    files = sorted(folder.glob("xstest_v2_completions_*.csv"))
    values = {"safe_values": ["2_full_refusal"], "unsafe_values": ["1_full_compliance"]}
    result = load_labelled(files, **xstest, **values)
    assert (len(result.completions), sum(row.is_safe == 0 for row in result.completions)) == (947, 136)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([*range(6)], True),
        ([" 7 ", "12", "0", "-1", "3.0"], True),
        ([*range(6), "What is 2 + 2?"], False),
        ([*range(4)], False),  # few rows
        (["1.5", "2", "3", "4", "5"], False),
    ],
)
def test_a_column_of_numbers_is_no_prompt_in_labelled_rows_pairs_and_prompts(
    tmp_path: Path, values: list[Any], named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"q": str(value), "completion": f"a{n}", "is_safe": True, "chosen": "a", "rejected": "b"}
        for n, value in enumerate(values)
    ]
    columns = {"prompt": "q"}
    lines = [{key: row[key] for key in ("q", "completion", "is_safe")} for row in rows]
    pairs = [{**row, "chosen_is_safe": True, "rejected_is_safe": True} for row in rows]
    answers, both = written(tmp_path / "a.jsonl", *lines), written(tmp_path / "p.jsonl", *pairs)
    expected = [{"prompts_are_numbers": {str(file): "q"}} if named else {} for file in (answers, both, answers)]
    found = [
        load_labelled([answers], columns=columns).notes,
        read_pairs([both], columns=columns, layout="bfpo").notes,
        read_prompt_files([answers], columns=columns, layout="prompts").notes,
    ]
    found = [{key: value for key, value in notes.items() if key == "prompts_are_numbers"} for notes in found]
    assert found == expected
    if named:
        says(caplog, "'q'", "columns.prompt")
