"""The table of docs/scaling.md is what `bfpo doctor` counts; this file, run as a program, writes it anew."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from benchmarks.flops import needed_flops
from benchmarks.workload import ModelShape
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


def test_the_calculation_of_a_step_takes_the_table_and_the_needed_operations() -> None:
    """8B on 8 GPUs by DDP, 70B on 64 by FSDP2; pairs of 150, 160 and 160 tokens, 40% of 989 TFLOP/s."""
    page, pair = PAGE.read_text().split("## By calculation")[1].split("\n## ")[0], (150, 160, 160)
    tokens = sum(pair)
    table = {name: line.split(" | ") for line in rows_of_the_page() for name in SHAPES if f"{name} | down_proj" in line}
    needed, forward, again, rate, trained, whole = ([0.0, 0.0] for _ in range(6))
    for k, name in enumerate(("8B", "70B")):
        hidden, intermediate, layers, heads, key_heads, vocabulary, _ = SHAPES[name]
        shape = ModelShape(vocabulary, hidden, intermediate, layers, heads, key_heads)
        # Where all weights train, layers and head take three times their forward pass.
        all_train = needed_flops(shape, [pair], trains="all")
        forward[k] = (all_train / 3 - 2 * hidden * vocabulary * (pair[1] + pair[2])) / tokens / 1e9
        needed[k] = needed_flops(shape, [pair]) / tokens / 1e9
        again[k] = needed[k] + forward[k]
        rate[k] = 0.4 * 989e3 / again[k]
        trained[k], whole[k] = layers * hidden * intermediate / 1e9, shape.parameters() / 1e9
    saved = f"{12 * trained[0]:.0f} GB; with ZeRO-2 {16 * trained[0]:.0f} GB | {12 * trained[1]:.0f} GB |"
    kept, rest = map(float, table["70B"][2:4])
    for line in (
        f"| {needed[0]:.1f} (forward {forward[0]:.1f}) | {needed[1]:.0f} (forward {forward[1]:.0f}) |",
        f"| {again[0]:.0f} | {again[1]:.0f} |",
        f"| {round(rate[0], -2):,.0f} | {round(rate[1], -1):.0f} |",
        f"DDP: {table['8B'][4]} GiB and {4e9 * trained[0] / GIB:.1f} of gradient buckets each",
        f"FSDP2: {kept} / 64 + {rest} = {kept / 64 + rest:.1f} GiB each",
        f"float32 gradients of {trained[0]:.2f} B weights, {4 * trained[0]:.1f} GB",
        f"{2 * whole[1]:.0f} GB in bfloat16 each time",
        f"float32 gradients of {trained[1]:.1f} B weights, {4 * trained[1]:.0f} GB",
        f"| a checkpoint | {saved}",
        f"A micro-batch of 8,192 tokens takes {8192 / round(rate[1], -1):.1f} s",
    ):
        assert line in page, line


if __name__ == "__main__":
    made = "\n".join(row(*cell) for cell in wanted())
    before, after = PAGE.read_text().split("<!-- table -->\n")[0], PAGE.read_text().split("<!-- end -->")[1]
    head = (
        "| model | trains | weights, gradients, optimizer | the rest | one GPU | 24 GiB | 48 GiB | 80 GiB |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    PAGE.write_text(f"{before}<!-- table -->\n{head}{made}\n<!-- end -->{after}")
