"""The table of docs/scaling.md is what `bfpo doctor` counts; this file, run as a program, writes it anew."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from bfpo.config import LoraConfig
from bfpo.policy.memory import Plan, estimate_memory, measure
from bfpo.training.diagnosis import GIB, fits, least_processes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128256, True),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "14B": (5120, 17920, 40, 40, 10, 100352, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "70B": (8192, 28672, 80, 64, 8, 128256, False),
}
WAYS: dict[str, dict[str, Any]] = {
    "down_proj": {"trainable": ["*.down_proj.weight"]},
    "LoRA": {"lora": LoraConfig().model_dump()},
    "all": {},
}
CARDS = (24, 48, 80)
MOST = 256


def shape_config(name: str) -> LlamaConfig:
    hidden, intermediate, layers, heads, key_value_heads, vocabulary, tied = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


@cache
def row(name: str, way: str) -> str:
    plan = Plan(shape_config(name), 8192, dtype="bfloat16", checkpointing=True, **WAYS[way])
    sharded = dataclasses.replace(plan, sharding="fsdp")
    memory, parts = estimate_memory(plan), measure(sharded)
    kept = memory.weights + memory.gradients + memory.optimizer
    cells = [name, way, *(f"{size / GIB:.1f}" for size in (kept, memory.total - kept, memory.total))]
    for card in CARDS:
        least = (1, memory) if fits(memory.total, card * GIB) else least_processes(parts, sharded, card * GIB, MOST)
        cells.append("no" if least is None else f"{least[0]} ({least[1].total / GIB:.1f})")
    return f"| {' | '.join(cells)} |"


def rows_of_the_page() -> list[str]:
    return re.findall(r"^\| \d+B \| (?:down_proj|LoRA|all) .*$", PAGE.read_text(), re.MULTILINE)


def wanted() -> list[tuple[str, str]]:
    return [(name, way) for name in SHAPES for way in WAYS]


def test_the_page_gives_the_shapes_that_are_counted() -> None:
    text = PAGE.read_text()
    for name, (*sizes, tied) in SHAPES.items():
        assert f"| {name} | {' | '.join(map(str, sizes))} | {'yes' if tied else 'no'} |" in text


def test_the_first_rows_of_the_table_are_what_is_counted() -> None:
    assert rows_of_the_page()[0] == row("1B", "down_proj")
    assert len(rows_of_the_page()) == len(wanted())


@pytest.mark.slow
def test_the_table_is_what_is_counted() -> None:
    assert rows_of_the_page() == [row(*cell) for cell in wanted()]


if __name__ == "__main__":
    made = "\n".join(row(*cell) for cell in wanted())
    before, after = PAGE.read_text().split("<!-- table -->\n")[0], PAGE.read_text().split("<!-- end -->")[1]
    head = (
        "| model | trains | weights, gradients, optimizer | the rest | one GPU | 24 GiB | 48 GiB | 80 GiB |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    PAGE.write_text(f"{before}<!-- table -->\n{head}{made}\n<!-- end -->{after}")
