"""Single answers: rows to pairs without a rejected side, their tokens, and the rows of a micro-batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bfpo.config import AlignConfig
from bfpo.core.errors import DataError
from bfpo.core.schema import Message, Pair
from bfpo.data.load import PairStream, load_pairs
from bfpo.data.pack import PackedLayout, collate_pairs, split_by_tokens
from bfpo.data.pair_layouts import PAIR_LAYOUTS, UNPAIRED_LAYOUTS
from bfpo.data.rejects import RowError
from bfpo.data.settings import DataConfig, TrainDataConfig
from bfpo.data.tokenize import tokenize_pairs
from bfpo.policy.attention import register_packed
from bfpo.policy.logps import sequence_logps
from messages import raises
from tiny import logp, tiny_model, tiny_pairs, tiny_tokenizer

ROW: dict[str, Any] = {"prompt": "q", "completion": "a"}


def parse(row: dict[str, Any]) -> Pair:
    return UNPAIRED_LAYOUTS["unpaired"].parse(row)


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ({"label": True}, 1.0),
        ({"label": False}, 0.0),
        ({"kto_tag": False}, 0.0),
        ({"is_safe": 0.25}, 0.25),
        ({"label": True, "is_safe": 0.25}, 0.25),
        ({"label": False, "is_safe": True}, 0.0),
        ({"label": None, "is_safe": True}, 1.0),
        ({"label": True, "is_safe": None}, None),
        ({"kto_tag": True, "is_safe": float("nan")}, None),
        ({"label": False, "is_safe": None}, 0.0),
        ({"is_safe": None}, None),
        ({}, None),
    ],
)
def test_an_answer_is_desirable_if_it_is_labelled_so_and_safe(given: dict[str, Any], label: float | None) -> None:
    pair = parse({**ROW, **given, "id": 3, "source": "here", "category": ["theft", "fraud"]})
    other = None if label is None else 1 - label
    expected = Pair("3", (Message("user", "q"),), "a", "", label, other, "here", category="theft, fraud", unpaired=True)
    assert pair == expected


def test_text_thoughts_and_ends_are_those_of_completions() -> None:
    pair = parse({"prompt": [{"role": "user", "content": "q"}], "text": "a", "finished": False, "label": 1})
    assert (pair.chosen, pair.chosen_finished, pair.chosen_is_safe) == ("a", False, 1.0)
    assert "why" in parse({**ROW, "reasoning": "why"}).chosen_extra
    assert parse(ROW).id == parse(ROW).id != parse({**ROW, "completion": "b"}).id


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "q", "label": True}, "text"),
        ({"completion": "a", "label": True}, "prompt"),
        ({**ROW, "completion": " "}, "completion"),
        ({**ROW, "label": "good"}, "label"),
        ({**ROW, "is_safe": 2}, "is_safe"),
    ],
)
def test_a_row_that_is_none(row: dict[str, Any], field: str) -> None:
    with raises(RowError, field):
        parse(row)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_only_training_reads_them_and_never_by_guessing(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [{**ROW, "label": True}])
    with raises(DataError, "columns", "unpaired", "kto"):
        load_pairs(DataConfig(files=[file]))
    with raises(ValueError, "layout"):
        DataConfig(files=[file], layout="unpaired")
    with raises(ValueError, "unpaired", "dpo_h"):
        AlignConfig(model="m", method="dpo_h", data={"files": [file], "layout": "unpaired"})
    assert "unpaired" not in PAIR_LAYOUTS.names
    assert AlignConfig(model="m", method="kto", data={"files": [file], "layout": "unpaired"}).data.layout == "unpaired"


def test_unknown_labels_splits_and_words_are_those_of_pairs(tmp_path: Path) -> None:
    labels = ("good", "bad", None, "good")
    rows = [{"prompt": f"q{i}", "completion": "a", "is_safe": label} for i, label in enumerate(labels)]
    settings = {"files": [written(tmp_path / "a.jsonl", rows)], "layout": "unpaired"}
    settings |= {"safe_values": ["good"], "unsafe_values": ["bad"]}
    dropped = load_pairs(TrainDataConfig(**settings, unknown_label="drop"))
    assert [pair.chosen_is_safe for pair in dropped.pairs] == [1, 0, 1]
    assert dropped.counts["cells"] == {"safe-safe": 0, "safe-unsafe": 2, "unsafe-safe": 1, "unsafe-unsafe": 0}
    taken = list(PairStream(TrainDataConfig(**settings, unknown_label="safe")))
    assert [pair.chosen_is_safe for pair in taken] == [1, 0, 1, 1]
    assert all(pair.unpaired for pair in taken)


def test_tokens_are_those_of_a_pair_without_its_rejected_side() -> None:
    whole = Pair("1", (Message("user", "w1 w2"),), "w3 w4", "w5", 1.0, 0.0)
    single = replace(whole, rejected="", unpaired=True)
    tokens, report = tokenize_pairs([whole, single], tiny_tokenizer())
    assert tokens[1].prompt_ids.tolist() == tokens[0].prompt_ids.tolist()
    assert tokens[1].chosen_ids.tolist() == tokens[0].chosen_ids.tolist()
    assert len(tokens[1].rejected_ids) == 0
    assert report.num_identical == 0
    with raises(DataError, "rejected"):
        tokenize_pairs([replace(whole, rejected="")], tiny_tokenizer())


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_log_probs_beside_pairs_are_those_of_single_texts(form: Any) -> None:
    none = np.zeros(0, np.int32)
    pairs = [replace(p, rejected_ids=none) if i in (0, 2, 3) else p for i, p in enumerate(tiny_pairs(5, 3))]
    batch = collate_pairs(pairs, form=form)
    if form == "padded":
        assert batch["input_ids"].shape[0] == 7  # no row for what is absent
    model = tiny_model(dtype=torch.float64).eval()
    if form == "packed":
        model.set_attn_implementation(register_packed(model.config._attn_implementation))
    found = sequence_logps(model, batch)
    for n, (logps, tokens) in enumerate(zip(found.logps.tolist(), found.num_tokens.tolist(), strict=True)):
        pair = pairs[n % 5]
        ids = pair.chosen_ids if n < 5 else pair.rejected_ids
        assert tokens == len(ids)
        assert logps == (pytest.approx(float(logp(model, pair.prompt_ids, ids)), rel=1e-9) if len(ids) else 0)


def test_an_absent_side_is_no_problem_of_attention_and_takes_no_room() -> None:
    index = PackedLayout([(2, 3, 0), (1, 2, 2)]).varlen(torch.device("cpu"))
    assert index.query_starts.tolist() == [0, 5, 8, 10]
    assert index.key_starts.tolist() == [0, 5, 8, 11]
    lengths = [(2, 3, 0)] * 4
    assert split_by_tokens(lengths, form="padded", max_tokens=10) == [[0, 1], [2, 3]]
    assert split_by_tokens([(2, 3, 3)] * 4, form="padded", max_tokens=10) == [[0], [1], [2], [3]]
    with raises(DataError, "chosen"):
        collate_pairs([replace(tiny_pairs(1)[0], chosen_ids=np.zeros(0, np.int32))])
