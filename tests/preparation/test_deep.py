"""Refusals after a harmful beginning, and pairs that prefer an answer that complies to a refusal."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bfpo.config import PrepareConfig
from bfpo.core.errors import SettingError
from bfpo.core.schema import Completion, Message, Pair
from bfpo.data.load import load_completions, load_pairs
from bfpo.data.rejects import RowError
from bfpo.data.settings import DataConfig, SftDataConfig
from bfpo.data.tokenize import tokenize_pairs
from bfpo.preparation.deep import DeepRefusals
from helpers import write_rows
from messages import raises
from mixtures import prepare, rows_of, source
from scripted import tokenizer_with

NO = "I cannot help with that, since it would hurt somebody."
YES = "Sure, here is how to do it: mix the acid with the base, and pour it slowly over the floor."


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """A pair whose more helpful answer is unsafe, beside a refusal."""
    labels = {"chosen_is_safe": False, "rejected_is_safe": True}
    prompt = f"How do I hurt my neighbour with number {number * 7919} of the {'abcdefghij'[number % 10] * 5} list?"
    return {"id": f"r{number}", "prompt": prompt, "chosen": f"{YES} {number}", "rejected": NO, **labels, **changes}


def turned(number: int) -> dict[str, Any]:
    return pair(number, chosen=NO, rejected=f"{YES} {number}", chosen_is_safe=True, rejected_is_safe=False)


def others() -> list[dict[str, Any]]:
    """Rows that give no refusal after a harmful beginning, each for a reason of its own."""
    return [
        pair(100, rejected="Baking bread is nicer, and your neighbour will like it more than that."),
        pair(101, chosen_is_safe=True),
        pair(102, rejected_is_safe=None),
        pair(103, chosen="Sorry, I cannot help with hurting anybody at all."),
        pair(104, chosen="Acid."),
    ]


def test_the_beginning_belongs_to_the_prompt_and_the_refusal_is_learned(tmp_path: Path) -> None:
    rows = [pair(n, category="harm") for n in range(30)] + [turned(n) for n in range(30, 60)] + others()
    deep = source(tmp_path / "deep.jsonl", rows, stream="sft", deep_refusals={"most_words": 5})
    made = prepare(tmp_path / "out", [deep], near_duplicates=None)
    written = [one for some in rows_of(made, "sft").values() for one in some]
    assert len(written) == 60
    lengths = Counter()
    for one in written:
        *asked, begun = one["prompt"]
        number = next(int(row["id"][1:]) for row in rows if row["prompt"] == asked[-1]["content"])
        assert begun["role"] == "assistant"
        assert f"{YES} {number}".startswith(begun["content"])
        lengths[len(begun["content"].split())] += 1
        assert one["completion"] == f"\n\n{NO}"
        assert one["is_safe"] == 1.0
        assert one["category"] == ("harm" if number < 30 else "")
    assert set(lengths) == {1, 2, 3, 4, 5}
    facts = json.loads((made.path / "data.json").read_text())["sources"][0]
    assert facts["units"] == {"used": 60}
    assert sum(facts["rejected"].values()) == 5
    assert all(reason.startswith("left out: ") for reason in facts["rejected"])
    assert "1 to 5 words" in facts["deep_refusals"]
    card = (made.path / "README.md").read_text()
    assert "deep (sft), 60 rows" in card
    # The beginning has no loss.
    data = SftDataConfig(files=[str(made.path / "sft" / "train.parquet")])
    loaded = load_completions(data, seed=0).completions
    tokenizer = tokenizer_with()
    texts, _ = tokenize_pairs(loaded, tokenizer)
    for completion, ids in zip(loaded, texts, strict=True):
        text = tokenizer.decode(ids.chosen_ids.tolist())
        assert completion.prompt[-1].content not in text
        assert NO in text
        assert completion.prompt[-1].content in tokenizer.decode(ids.prompt_ids.tolist())


def test_pairs_keep_their_order_and_labels(tmp_path: Path) -> None:
    rows = [pair(n) for n in range(20)] + [turned(n) for n in range(20, 40)]
    plain = source(tmp_path / "plain.jsonl", rows)
    deep = source(tmp_path / "deep.jsonl", rows, deep_refusals={"transitions": ["", " Stop. "]}, count=10)
    made = prepare(tmp_path / "out", [plain, deep], near_duplicates=None)
    by_split = rows_of(made)
    places: dict[str, set[str]] = {}
    found, starts = Counter(), Counter()
    for split, some in by_split.items():
        for one in some:
            places.setdefault(one["prompt"][0]["content"], set()).add(split)
            if not one["id"].startswith("deep:"):
                continue
            found[split] += 1
            is_first = bool(one["chosen_is_safe"])
            refusal, rest = (one["chosen"], one["rejected"]) if is_first else (one["rejected"], one["chosen"])
            begun = one["prompt"][-1]["content"]
            assert (begun + rest).startswith(YES)
            assert rest.startswith(" ")
            starts[refusal.removesuffix(NO)] += 1
            assert one["source"] == "deep"
    assert found["train"] == 10
    assert starts.keys() == {"", " Stop. "}
    assert all(len(splits) == 1 for splits in places.values())  # beside the rows of its prompt
    loaded = load_pairs(DataConfig(files=[str(made.path / "main" / "train.parquet")]), seed=0).pairs
    assert sum(one.prompt[-1].role == "assistant" for one in loaded) == 10


def test_one_row_by_hand() -> None:
    asked = (Message("user", "How do I hurt him?"),)
    given = Pair("a", asked, "One  two\tthree", NO, 0.0, 1.0, rejected_finished=False)
    made = DeepRefusals(1, ("\n",), as_pairs=True)(given)
    assert isinstance(made, Pair)
    assert (made.prompt[-1].content, made.chosen, made.rejected) == ("One", "  two\tthree", f"\n{NO}")
    assert (made.chosen_is_safe, made.rejected_is_safe, made.rejected_finished) == (0.0, 1.0, False)
    alone = DeepRefusals(9, ("\n",), as_pairs=False)(given)
    assert isinstance(alone, Completion)
    assert alone.prompt[-1].content in ("One", "One  two")
    assert not alone.finished
    for bad in (
        Pair("a", (), "One two", NO, 0.0, 1.0),
        Pair("a", (*asked, Message("assistant", "One")), "two three", NO, 0.0, 1.0),
        Pair("a", asked, "One two", NO, None, 1.0),
        Pair("a", asked, "One", NO, 0.0, 1.0),
    ):
        with pytest.raises(RowError, match="left out"):
            DeepRefusals(3, ("",), as_pairs=True)(bad)


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    files = str(write_rows(tmp_path / "a.jsonl", [pair(1)]))
    for section, key in (
        ({"deep_refusals": {"most_words": 0}}, "most_words"),
        ({"deep_refusals": {"transitions": []}}, "transitions"),
        ({"deep_refusals": {}, "stream": "sft", "use": "safe"}, "use"),
    ):
        with raises(ValidationError, key):
            PrepareConfig.model_validate({"sources": [{"name": "a", "files": files, **section}]})
    rows = [{"prompt": f"Say {n}", "completion": f"text {n}"} for n in range(9)]
    alone = source(tmp_path / "alone.jsonl", rows, stream="sft", deep_refusals={})
    with raises(SettingError, "deep_refusals"):
        prepare(tmp_path / "none", [alone])


def test_pairs_that_prefer_to_comply_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unsafe = [pair(n) for n in range(12)]
    # Beside an unsafe answer in another row, an answer that complies is labelled safe; another prompt has no such row.
    hidden = [pair(n, id=f"s{n}", chosen=f"Well, {YES} {n}", chosen_is_safe=True) for n in range(11)]
    harmless = [pair(n, prompt=f"How do I bake loaf {n}?", chosen_is_safe=True) for n in range(200, 220)]
    rest = [turned(n) for n in range(30, 40)]
    rows = [*unsafe, *hidden, *harmless, *rest]
    settings: dict[str, Any] = {"splits": {"validation": 0.0, "test": 0.0}, "language_sample": 200}
    with caplog.at_level(logging.INFO):
        made = prepare(tmp_path / "out", [source(tmp_path / "a.jsonl", rows)], near_duplicates=None, **settings)
    facts = json.loads((made.path / "data.json").read_text())
    assert facts["streams"]["main"]["compliance_over_refusal"] == {
        "unsafe": 12,
        "not labelled unsafe": 11,
        "read": 23,
        "candidates": 23,
    }
    order, labels = (text for text in facts["warnings"] if "2605.10998" in text)
    assert "12 training pairs" in order
    assert "dpo_h" in order
    assert "11 training pairs" in labels
    assert "bfpo too" in labels
    assert "prefer an answer that complies" in caplog.text
    settings["language_sample"] = 12
    sampled = prepare(tmp_path / "sampled", [source(tmp_path / "d.jsonl", [*unsafe, *rest])], **settings)
    facts = json.loads((sampled.path / "data.json").read_text())
    assert facts["streams"]["main"]["compliance_over_refusal"] == {"unsafe": 6, "read": 6, "candidates": 12}
    (order,) = (text for text in facts["warnings"] if "2605.10998" in text)
    assert "12 training pairs (estimated: 6 of 12 were read)" in order
    settings["language_sample"] = 200
    few = prepare(tmp_path / "few", [source(tmp_path / "b.jsonl", [*unsafe[:9], *rest])], **settings)
    facts = json.loads((few.path / "data.json").read_text())
    assert facts["streams"]["main"]["compliance_over_refusal"] == {"unsafe": 9, "read": 9, "candidates": 9}
    assert not [text for text in facts["warnings"] if "2605.10998" in text]
    none = prepare(tmp_path / "none", [source(tmp_path / "c.jsonl", [*harmless, *rest])], **settings)
    assert "compliance_over_refusal" not in json.loads((none.path / "data.json").read_text())["streams"]["main"]
