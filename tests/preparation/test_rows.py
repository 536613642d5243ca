"""The columns of a block against the definition of each, written as a loop over rows."""

from __future__ import annotations

import gc
import json
import math
import random
import sys
import unicodedata
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from subprocess import run
from typing import Any

from bfpo.core.schema import Completion, Message, Pair
from bfpo.data.labels import NO_WORDS
from bfpo.data.split import normalised_prompt
from bfpo.execution.settings import ExecutorConfig
from bfpo.preparation.rows import Block, BlockReader, RawBlock, RowReader
from bfpo.preparation.workers import Readers

TEXTS = (
    "plain",
    "  Two  words ",
    "Straße ﬁ İ",
    "\u3000全角 ＡＢＣ",
    "\u00a0x\u2003y",
    "ǅ emoji 😀",
    "a\x1cb\ny",
    "7:ab",
)


def block_of(rows: list[dict[str, Any]], layout: str) -> Block:
    reader = BlockReader({}, near=None, contained_words=8)
    raw = RawBlock(RowReader("rows.jsonl", layout, NO_WORDS), list(enumerate(rows, start=1)))
    return reader(raw)


def hashed(*texts: str) -> Any:
    return blake2b("".join(f"{len(text)}:{text}" for text in texts).encode(), digest_size=8)


def number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little")


def normalised_slowly(messages: tuple[Message, ...]) -> str:
    turns = (f"{turn.role}: {unicodedata.normalize('NFKC', turn.content)}" for turn in messages)
    return "\n".join(" ".join(unicodedata.normalize("NFKC", turn.casefold()).split()) for turn in turns)


def drawn_rows(num: int) -> list[dict[str, Any]]:
    draw = random.Random(3)
    rows = []
    for i in range(num):
        turns = [{"role": role, "content": draw.choice(TEXTS)} for role in ("system", "user", "assistant", "user")]
        row = {
            "prompt": draw.choice([turns, turns[1:2], draw.choice(TEXTS), ""]),
            "chosen": f"{draw.choice(TEXTS)} yes",
            "rejected": f"{draw.choice(TEXTS)} no",
            "chosen_is_safe": draw.choice([True, False, None, 0.3]),
            "rejected_is_safe": draw.choice([1, 0, None]),
        }
        rows.append(row | ({"id": f"row {i}"} if i % 3 else {}) | ({"chosen_finished": False} if i % 5 == 0 else {}))
    return rows


def test_the_columns_of_pairs_are_those_of_a_loop_over_rows() -> None:
    rows = drawn_rows(200)
    block = block_of(rows, "bfpo")
    assert len(block.keys) == len(rows)
    assert not block.rejects
    for row, keys, written in zip(rows, block.keys, block.batch.to_pylist(), strict=True):
        pair = Pair(
            written["id"],
            tuple(Message(turn["role"], turn["content"]) for turn in written["prompt"]),
            row["chosen"],
            row["rejected"],
            row["chosen_is_safe"],
            row["rejected_is_safe"],
        )
        said = hashed(*(part for turn in pair.prompt for part in (turn.role, turn.content)))
        completions = []
        for text in (pair.chosen, pair.rejected):
            copy = said.copy()
            copy.update(b"\0" + text.encode())
            completions.append(number(copy))
        finished = (row.get("chosen_finished", True), True)
        labels = (pair.chosen_is_safe, pair.rejected_is_safe)
        cut = () if all(finished) else finished
        text = normalised_slowly(pair.prompt) or f"{pair.chosen}\n{pair.rejected}"
        assert keys["id"] == number(hashed(pair.id))
        assert keys["id_is_given"] == ("id" in row)
        assert keys["prompt"] == number(hashed(text))
        assert keys["content"] == number(hashed(*map(repr, (*completions, *labels, *cut))))
        assert keys["completions"].tolist() == completions
        assert keys["cut"].tolist() == [not it for it in finished]
        for found, label in zip(keys["labels"].tolist(), labels, strict=True):
            assert math.isnan(found) if label is None else abs(found - label) < 1e-7
        fields = ([turn.content for turn in pair.prompt], [pair.chosen], [pair.rejected])
        assert keys["chars"].tolist() == [sum(map(len, texts)) for texts in fields]
        assert keys["words"].tolist() == [sum(len(text.split()) for text in texts) for texts in fields]
        assert (written["chosen"], written["rejected"]) == (pair.chosen, pair.rejected)
        assert (written["chosen_is_safe"], written["rejected_is_safe"]) == labels
        assert (written["chosen_finished"], written["rejected_finished"]) == finished


def test_a_completion_has_no_second_side() -> None:
    block = block_of([{"prompt": "Ask", "completion": "Say it", "is_safe": True}], "completions")
    (keys,), (row,) = block.keys, block.batch.to_pylist()
    assert row["chosen"] == "Say it"
    assert row["rejected"] is None
    assert row["rejected_is_safe"] is None
    assert math.isnan(keys["labels"][1])
    assert keys["chars"].tolist() == [3, 6, 0]
    assert not keys["cut"].any()
    assert Completion("x", (Message("user", "Ask"),), "Say it").finished is row["chosen_finished"]


def test_a_block_without_usable_rows_is_empty() -> None:
    block = block_of([{"prompt": "Ask", "chosen": "", "rejected": "x", **dict.fromkeys(LABELS)}], "bfpo")
    assert len(block.keys) == len(block.batch) == 0
    assert [reject.line for reject in block.rejects] == [1]


LABELS = ("chosen_is_safe", "rejected_is_safe")


def test_prompts_are_normalised_as_before_the_short_way_for_ascii() -> None:
    for text in (*TEXTS, "".join(map(chr, range(128))), "K\u212a", "ΑΣ", "\u0345"):
        turns = (Message("user", text), Message("assistant", text[::-1]))
        assert normalised_prompt(turns) == normalised_slowly(turns)


def test_reading_loads_neither_statistics_nor_figures(tmp_path: Path) -> None:
    program = "import json, sys, bfpo.commands.prepare; print(json.dumps(sorted(sys.modules)))"
    done = run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"scipy.stats", "matplotlib", "torch", "transformers"}


def test_the_garbage_collector_is_off_while_blocks_are_read_and_then_as_it_was() -> None:
    def make() -> BlockReader:
        return BlockReader({}, near=None, contained_words=8)

    states = []
    with suppress(ValueError), Readers(make, ExecutorConfig()):
        states.append(gc.isenabled())
        raise ValueError
    assert [*states, gc.isenabled()] == [False, True]
