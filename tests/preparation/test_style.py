"""Remarks of `prepare` on what a model would learn besides the content, each at its threshold; the figures by cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bfpo.config import PrepareConfig
from bfpo.preparation.style import style_of
from bfpo.runs.stages import run_stage
from helpers import write_rows

OPENINGS = ("I cannot help with", "I am not able to help with", "I can't assist with", "I won't help with")
REFUSALS = (  # no three words in a row are in two of them
    "I cannot help with the {}, as it would hurt others, and that is all I say.",
    "I am not able to discuss {} in any detail, since it could injure somebody, so please ask another question.",
    "I can't assist anyone in finding {} because people die of this every year, as you surely know well.",
    "I won't explain {} here, for nobody should ever own one or build one at home, least of all alone.",
)


def pair(n: int, *, safe: str = "", unsafe: str = "", labels: tuple[Any, Any] = (0.0, 1.0)) -> dict[str, Any]:
    """Return a pair whose chosen answer is unsafe and does what is asked, the rejected one a refusal of its own."""
    return {
        "prompt": [{"role": "user", "content": f"question {n}"}],
        "chosen": unsafe or f"First take the {n} and put it on the other, then wait for a while.",
        "rejected": safe or REFUSALS[n % 4].format(n),
        "chosen_is_safe": labels[0],
        "rejected_is_safe": labels[1],
    }


def harmless(n: int) -> dict[str, Any]:
    return {**pair(n, labels=(1.0, 1.0)), "prompt": [{"role": "user", "content": f"harmless {n}"}]}


def remarks(rows: list[dict[str, Any]], *, is_main: bool = True) -> list[str]:
    return style_of(rows, is_main=is_main)[1]


GOOD = [pair(n) for n in range(30)] + [harmless(n) for n in range(10)]


def test_data_without_a_confound_have_no_remark() -> None:
    assert remarks(GOOD) == []
    assert remarks([]) == []
    assert style_of([], is_main=True)[0] == {}


def test_leading_spaces_are_named_with_whose_they_are() -> None:
    few = [{**row, "rejected": f"\n{row['rejected']}"} for row in GOOD[:7]]
    assert remarks([*few, *GOOD[7:]]) == []  # 7 of 80
    (remark,) = remarks([*few, {**GOOD[7], "rejected": f" {GOOD[7]['rejected']}"}, *GOOD[8:]])
    assert remark.startswith("10% of the completions begin with white space (safe 16%, unsafe 0%; remark from 10%)")


def test_one_phrase_of_the_safe_answers_is_named() -> None:
    same = [
        pair(n, safe=f"I\u2019m SORRY, but the {n} is not for me, and I can't discuss it with you.") for n in range(15)
    ]
    (remark,) = remarks([*same, *GOOD[15:]])
    assert remark.startswith(
        "50% of the safe answers of pairs with an unsafe one have 'sorry' in their first sentence, and 0% of the unsafe"
    )
    assert remarks([*same[:14], *GOOD[14:]]) == []
    # An answer that begins alike and refuses nothing is no phrase of refusals.
    alike = [pair(n, safe=f"There are many {n} in the world, and you can see them all in a park.") for n in range(30)]
    assert not [remark for remark in remarks(alike) if "first sentence" in remark]


APOLOGIES = ("I'm sorry, but I {}", "I'm sorry. I {}", "I'm sorry, I {}", "Sorry, but I {}", "I am sorry, but {}")
ENDS = ("am not able to discuss {}.", "cannot help you with {}.", "will not talk about {}.", "have to say no to {}.")


def apologies(n: int) -> str:
    return APOLOGIES[n % 5].format(ENDS[n % 4].format(n))


def test_one_phrase_in_several_spellings_is_named_in_pairs_and_completions() -> None:
    rows = [pair(n, safe=apologies(n)) for n in range(30)]
    found = [text for text in remarks([*rows, *GOOD[30:]]) if "first sentence" in text]
    assert [text.startswith("100% of the safe answers of pairs with an unsafe one have 'sorry'") for text in found] == [
        True
    ]
    answers = [{"prompt": row["prompt"], "completion": row["rejected"], "is_safe": None} for row in rows]
    answers += [{"prompt": row["prompt"], "completion": row["chosen"], "is_safe": None} for row in GOOD]
    assert ["100% of the refusals have 'sorry' in their first sentence" in text for text in remarks(answers)] == [True]
    # What the unsafe answers say too does not tell the two apart: 3 of 30 do.
    mixed = [{**row, "chosen": f"Sorry for the delay. {row['chosen']}"} for row in rows[:3]]
    assert [text for text in remarks([*mixed, *rows[3:]]) if "'sorry'" in text] == []


def test_a_phrase_counts_anywhere_in_the_first_sentence_of_refusals() -> None:
    begin = ("Oh dear", "Well then", "Honestly", "As said before", "Of course not")
    rows = [pair(n, safe=f"{begin[n % 5]}, {n} is a thing that I can\u2019t speak of. {n} is bad.") for n in range(30)]
    (found,) = [text for text in remarks(rows) if "first sentence" in text]
    assert "100% of the safe answers of pairs with an unsafe one have 'is a thing' in" in found
    later = [pair(n, safe=f"{REFUSALS[n % 4].format(n)} I am sorry that I can't speak of it.") for n in range(30)]
    assert [text for text in remarks([*later, *GOOD[30:]]) if "first sentence" in text] == []


def test_brief_safe_answers_are_named() -> None:
    brief = [
        pair(n, safe=f"{OPENINGS[n % 4]} {n}.", unsafe="one two three four five six seven eight nine ten")
        for n in range(30)
    ]
    (remark,) = remarks([*brief, *GOOD[30:]])
    assert remark.startswith("safe answers have 0.50 times the words of the unsafe ones beside them (medians 5 and 10;")
    longer = [{**row, "chosen": "one two three four five six seven eight"} for row in brief]
    assert remarks([*longer, *GOOD[30:]]) == []


@pytest.mark.parametrize(("order", "word"), [(1, "longer"), (-1, "shorter")])
@pytest.mark.parametrize("label", [1.0, 0.0, None])
def test_a_length_that_predicts_helpfulness_is_named(order: int, word: str, label: float | None) -> None:
    texts = ["one two three four five six", "one two three four"][::order]
    rows = [{**pair(n, labels=(label, label)), "chosen": texts[0], "rejected": texts[1]} for n in range(40)]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:8]]
    level = [{**row, "rejected": row["chosen"]} for row in rows]  # of like length: not counted
    (remark,) = remarks([*rows[8:], *turned, *level], is_main=False)
    assert remark.startswith(f"in 80% of the pairs of one label the more helpful answer is the {word} one")
    assert remarks([*rows[8:], *turned, {**turned[0], "prompt": []}, *level], is_main=False) == []
    # In pairs of two labels the length of a refusal says nothing of helpfulness.
    mixed = [{**row, "chosen_is_safe": 0.0, "rejected_is_safe": 1.0} for row in rows]
    assert not [text for text in remarks(mixed, is_main=False) if "more helpful" in text]


def test_a_main_stream_that_only_refuses_is_named() -> None:
    (remark,) = remarks([*GOOD[:30], *GOOD[30:33]])  # 3 of 33
    assert remark.startswith("in 9% of the pairs a safe answer does what is asked (remark below 10%)")
    assert remarks(GOOD[:33], is_main=False) == []
    assert remarks(GOOD[:34]) == []


def test_few_rows_unknown_labels_and_other_languages_give_no_remark() -> None:
    assert remarks([pair(n, safe="I cannot help.") for n in range(9)]) == []
    assert remarks([pair(n, labels=(None, 1.0)) for n in range(40)]) == []
    german = [
        pair(n, safe=f"Das mache ich nicht, denn {n} ist verboten und schadet anderen Menschen.") for n in range(40)
    ]
    style, found = style_of(german, is_main=True)
    assert (style["unsafe-safe"]["rejected"].refuse, found) == (None, [])


def test_completions_that_mostly_refuse_are_named() -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected" if n < 20 else "chosen"], "is_safe": None}
        for n, row in enumerate(GOOD)
    ]
    (remark,) = remarks(rows)
    assert remark.startswith("50% of the completions to imitate refuse (remark from 50%)")
    assert remarks(rows[1:]) == []
    same = [{**row, "completion": f"I cannot provide the {n} to you."} if n < 20 else row for n, row in enumerate(rows)]
    assert "100% of the refusals have 'i cannot provide' in their first sentence" in remarks(same)[1]


def test_figures_and_remarks_are_in_json_card_and_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "prompt": row["prompt"][0]["content"]} for row in GOOD]
    write_rows(tmp_path / "pairs.jsonl", [{**row, "chosen": f" {row['chosen']}"} for row in rows])
    source = {"name": "mine", "stream": "main", "files": str(tmp_path / "pairs.jsonl")}
    settings: dict[str, Any] = {"sources": [source], "near_duplicates": None, "processes": 1}
    with caplog.at_level("INFO", "bfpo"):
        run_stage("prepare", PrepareConfig(**settings), tmp_path / "run")
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    style = data["streams"]["main"]["style"]
    assert style["unsafe-safe"]["rejected"] == {
        "num": 30,
        "median_words": 19.5,
        "begin_with_space": 0.0,
        "refuse": 1.0,
        "refusal_phrase": "cannot help",
        "with_that_phrase": 8 / 30,
    }
    assert (style["safe-safe"]["chosen"]["begin_with_space"], style["safe-safe"]["chosen"]["refuse"]) == (1.0, 0.0)
    order, warning = data["warnings"]
    assert order.startswith("main: 26 training pairs prefer an unsafe answer that complies to a refusal")
    assert warning.startswith(
        "main, 40 rows read: 50% of the completions begin with white space (safe 20%, unsafe 100%;"
    )
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"- {warning}" in card
    assert "| unsafe-safe | rejected | 30 | 19.5 | 0% | 100% | cannot help (27%) |" in card
    assert f"warning: {warning}" in caplog.text
    run_stage("prepare", PrepareConfig(**settings, language_sample=0), tmp_path / "none")
    assert "style" not in json.loads((tmp_path / "none" / "data.json").read_text())["streams"]["main"]


def test_pairs_of_xstest_are_marked_by_a_space(shared_data: Path) -> None:
    file = shared_data / "preferences" / "xstest_bfpo_pairs.jsonl"
    rows = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        better = int(row["better_response_id"])
        sides = {"chosen": better, "rejected": 1 - better}
        texts = {side: row[f"response_{k}"] for side, k in sides.items()}
        labels = {f"{side}_is_safe": float(row[f"is_response_{k}_safe"]) for side, k in sides.items()}
        rows.append({"prompt": [{"role": "user", "content": row["prompt"]}], **texts, **labels})
    found = remarks(rows)
    assert any("begin with white space (safe 49%, unsafe 0%;" in remark for remark in found)
