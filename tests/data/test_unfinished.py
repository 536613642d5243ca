"""An answer that was cut when it was generated stays marked, from its file to the ids, and gets no end token."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from bfpo.core.errors import DataError
from bfpo.core.schema import Comparison, Completion, Message, Pair, Verdict
from bfpo.data.labels import completions_of_pair
from bfpo.data.load import load_pairs
from bfpo.data.read import read_pairs
from bfpo.data.settings import DataConfig
from bfpo.data.tokenize import token_notes, tokenize_pairs
from bfpo.data.write import pair_row, write_pairs
from bfpo.judges.pairing import choose_pairs
from helpers import CHATML, EOS, IM_END, byte_ids, byte_tokenizer, write_rows
from messages import raises
from mixtures import prepare, row, rows_of, source

ASKED = (Message("user", "q"),)
SIDES = ("chosen_finished", "rejected_finished")


def pair(chosen: bool, rejected: bool, number: int = 0) -> Pair:
    return Pair(str(number), ASKED, "yes", "no", 1, 0, "s", chosen_finished=chosen, rejected_finished=rejected)


@pytest.mark.parametrize(("template", "end"), [(None, EOS), (CHATML, IM_END)])
@pytest.mark.parametrize("finished", list(product([True, False], repeat=2)))
def test_only_a_finished_answer_gets_an_end_token(template: str | None, end: int, finished: tuple[bool, bool]) -> None:
    tokenizer = byte_tokenizer() if template is None else byte_tokenizer(template)
    (made,), report = tokenize_pairs([pair(*finished)], tokenizer)
    for text, ids, whole in zip(("yes", "no"), (made.chosen_ids, made.rejected_ids), finished, strict=True):
        assert ids.tolist() == [*byte_ids(text), *([end] if whole else [])]
    row = report.as_row()
    assert row.get("num_unfinished", 0) == finished.count(False)
    assert ("num_unfinished" in row) is (False in finished)
    assert token_notes("data", row) == (
        [f"data: {finished.count(False)} completions were cut off when they were generated; no end token follows"]
        if False in finished
        else []
    )
    sft, cut = tokenize_pairs(completions_of_pair(pair(*finished)), tokenizer)
    for one, ids in zip(sft, (made.chosen_ids, made.rejected_ids), strict=True):
        assert one.chosen_ids.tolist() == ids.tolist()
    assert cut.num_unfinished == finished.count(False)


@pytest.mark.parametrize("ending", ["</s>", "\n</s>", " <|im_end|>\n", "\n\n", ""])
def test_nothing_that_the_template_writes_at_the_end_of_a_turn_follows_an_answer_that_was_cut(ending: str) -> None:
    """As Llama 2 (a space) and DeepSeek Coder (a line break)."""
    written = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}"
    written += "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    template = written.replace("END", f"{{{{ {json.dumps(ending)} }}}}")
    (made,), _ = tokenize_pairs([pair(True, False)], byte_tokenizer(template))
    assert made.rejected_ids.tolist() == byte_ids("no")
    assert made.chosen_ids.tolist()[:3] == byte_ids("yes")
    assert made.chosen_ids.tolist()[-1] in (EOS, IM_END)


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_an_answer_that_training_cuts_has_no_end_token(limit: int) -> None:
    (made,), report = tokenize_pairs([pair(True, False)], byte_tokenizer(), max_completion_length=limit)
    assert made.chosen_ids.tolist() == [*byte_ids("yes"), EOS][:limit]
    assert made.rejected_ids.tolist() == byte_ids("no")[:limit]
    assert report.completion_truncated == (limit < 4) + (limit < 2)  # "no" has no end token that could be cut


@pytest.mark.parametrize("finished", list(product([True, False], repeat=2)))
def test_files_say_it_only_where_it_is_so(tmp_path: Path, finished: tuple[bool, bool]) -> None:
    one = pair(*finished)
    assert [name for name in pair_row(one) if name in SIDES] == [
        name for name, whole in zip(SIDES, finished, strict=True) if not whole
    ]
    write_pairs(tmp_path / "pairs.jsonl", [one])
    assert read_pairs([tmp_path / "pairs.jsonl"]).pairs == [one]
    (tmp_path / "pairs.csv").write_text(
        "prompt,chosen,rejected,chosen_is_safe,rejected_is_safe,chosen_finished,rejected_finished\n"
        f"q,yes,no,1,0,{str(finished[0]).lower()},{'' if finished[1] else 'false'}\n"
    )
    (read,) = read_pairs([tmp_path / "pairs.csv"]).pairs
    assert (read.chosen_finished, read.rejected_finished) == finished


LAYOUTS: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}],
     "rejected": [{"role": "assistant", "content": "b"}]},
    {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"prompt": "q", "modeloutput1": "a", "modeloutput2": "b", "better_modelout": 1},
    {"instruction": "q", "chosen": "a", "rejected": "b"},
]  # fmt: skip


@pytest.mark.parametrize("given", LAYOUTS)
def test_every_layout_reads_it(tmp_path: Path, given: dict[str, Any]) -> None:
    found = read_pairs([write_rows(tmp_path / "rows.jsonl", [given | {"rejected_finished": False}])])
    assert [(one.chosen_finished, one.rejected_finished) for one in found.pairs] == [(True, False)]
    assert found.notes == {}  # the column is one that is read
    (plain,) = read_pairs([write_rows(tmp_path / "rows.jsonl", [given])]).pairs
    assert plain.id != found.pairs[0].id


def test_another_type_is_an_error(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [pair_row(pair(True, True)) | {"chosen_finished": "cut"}])
    with raises(DataError, f"{file}:1", "chosen_finished"):
        load_pairs(DataConfig(files=[str(file)]))


def test_pairs_of_judged_completions_keep_it() -> None:
    answers = [Completion("a", ASKED, "yes", finished=False), Completion("b", ASKED, "no")]
    verdicts = [Verdict("a", "j", "safe"), Verdict("b", "j", "unsafe")]
    for better, cut in ((1.0, (False, True)), (0.0, (True, False))):
        (made,) = choose_pairs(answers, verdicts, [Comparison("a", "b", "r", better)]).pairs
        assert (made.chosen_finished, made.rejected_finished) == cut


def test_prepare_keeps_it_and_writes_no_column_without_it(tmp_path: Path) -> None:
    plain = [row(number) for number in range(40)]
    cut = [one | ({"rejected_finished": False} if number % 4 == 0 else {}) for number, one in enumerate(plain)]
    before = prepare(tmp_path / "before", [source(tmp_path / "a.jsonl", plain)])
    after = prepare(
        tmp_path / "after", [source(tmp_path / "b.jsonl", cut), source(tmp_path / "c.jsonl", cut, stream="sft")]
    )
    assert not set(SIDES) & set(pyarrow.parquet.read_schema(before.path / "main/train.parquet").names)
    rows = [one for split in rows_of(after).values() for one in split]
    assert {one["id"].split(":")[1] for one in rows if not one["rejected_finished"]} == {
        f"r{n}" for n in range(0, 40, 4)
    }
    assert all(one["chosen_finished"] for one in rows)
    completions = [one for split in rows_of(after, "sft").values() for one in split]
    assert {one["id"].split(":")[1] for one in completions if not one["finished"]} == {f"r{n}" for n in range(0, 40, 4)}
    streams = json.loads((after.path / "data.json").read_text())["streams"]
    assert [facts.get("cut_completions") for facts in streams.values()] == [10, 10]
    assert "cut_completions" not in (before.path / "data.json").read_text()
    card = (after.path / "README.md").read_text()
    assert card.count("10 of 80 completions were cut off when they were generated; no end token follows") == 2
    read = load_pairs(DataConfig(files=[str(after.path / "main/train.parquet")])).pairs
    assert {one.rejected_finished for one in read} == {True, False}
