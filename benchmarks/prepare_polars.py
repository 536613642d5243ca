"""WORKER: what `bfpo prepare` visibly does with a file of transcripts, as a script of polars and rensa.

    python -m benchmarks.prepare_polars FILE FOLDER [figure]

It reads chosen and rejected transcripts, drops rows that cannot be used and exact duplicates, keeps prompts that nearly
repeat each other in one split (MinHash of their words), writes the three splits, counts label cells, lengths and the
languages of 2,000 answers, and prints the counts. With `figure` it draws them too, as the data card does. It has no
message with file and line, no resume, no bounded memory, no manifest, no reading of refusals and no card, and reads one
layout.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SCRIPT, DRAWN = "polars and rensa", "polars, rensa and a figure"
"""What the script is called in results, without and with a figure."""
PERMUTATIONS, BANDS, THRESHOLD, SEED = 128, 16, 0.8, 1
TEXTS = ("prompt", "chosen", "rejected")
QUARTILES = (0.25, 0.5, 0.75)
LABELS = ("chosen_is_safe", "rejected_is_safe")


def prepare(file: Path, folder: Path, *, figure: bool = False) -> dict[str, Any]:
    """Write the splits, and the figure if it is asked for, and return the counts."""
    import polars as pl

    def turn(column: str) -> Any:
        return pl.col(column).str.extract_groups(r"(?s)^(?<prompt>.*)\n\nAssistant:(?<answer>.*)$")

    rows = pl.read_ndjson(file).with_columns(turn("chosen").alias("c"), turn("rejected").alias("r"))
    rows = rows.with_columns(
        prompt=pl.col("c").struct.field("prompt"),
        other=pl.col("r").struct.field("prompt"),
        chosen=pl.col("c").struct.field("answer").str.strip_chars(),
        rejected=pl.col("r").struct.field("answer").str.strip_chars(),
    ).drop("c", "r")
    num_rows = len(rows)
    good = (pl.col("prompt") == pl.col("other")) & (pl.col("chosen") != pl.col("rejected"))
    rows = rows.filter(good & (pl.col("chosen") != "") & (pl.col("rejected") != "")).drop("other")
    num_good = len(rows)
    rows = rows.unique([*TEXTS, *LABELS], keep="first", maintain_order=True)
    plain = pl.col("prompt").str.to_lowercase().str.replace_all(r"\s+", " ")
    rows = rows.with_columns(plain=plain).with_columns(key=pl.col("plain").hash(SEED))
    prompts = rows.unique("key", maintain_order=True).select("key", "plain")
    prompts = prompts.with_columns(group=pl.Series(similar(prompts["plain"].to_list()))).drop("plain")
    prompts = prompts.with_columns(place=pl.col("key").min().over("group") % 10_000)
    split = pl.when(pl.col("place") < 500).then(pl.lit("test")).when(pl.col("place") < 1000)
    rows = rows.join(prompts.drop("group"), on="key", maintain_order="left")
    rows = rows.with_columns(split=split.then(pl.lit("validation")).otherwise(pl.lit("train")))
    for (name,), part in rows.group_by("split", maintain_order=True):
        part.select(*TEXTS, *LABELS).write_parquet(folder / f"{name}.parquet", compression="zstd", compression_level=3)
    rows = rows.with_columns(**{f"{text}_words": pl.col(text).str.count_matches(r"\S+") for text in TEXTS})
    lengths: dict[str, Any] = {f"{text}_chars": pl.col(text).str.len_chars().quantile(0.5) for text in TEXTS}
    lengths |= {f"{text}_words": pl.col(f"{text}_words").quantile(0.5) for text in TEXTS}
    cells = rows.group_by(*LABELS).agg(pl.len(), **lengths)
    if figure:
        draw(rows, folder)
    return {
        "rows": num_rows,
        "rejected": num_rows - num_good,
        "duplicates": num_good - len(rows),
        "cells": {cell_name(*row[:2]): row[2] for row in cells.select(*LABELS, "len").iter_rows()},
        "splits": dict(rows["split"].value_counts().iter_rows()),
        "languages": languages(rows["chosen"].sample(min(2000, len(rows)), seed=SEED).to_list()),
    }


def draw(rows: Any, folder: Path) -> None:
    """Draw the label cells of each split, and the quartiles of the words of each completion by cell."""
    import polars as pl
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 4))
    left, right = page.subplots(1, 2)
    counts = rows.group_by("split", *LABELS).agg(pl.len()).sort("split", *LABELS)
    for split in ("train", "validation", "test"):
        start = 0.0
        found = counts.filter(pl.col("split") == split)
        for place, number in enumerate(found["len"].to_list()):
            share = number / found["len"].sum()
            left.barh(split, share, left=start, color=f"C{place}")
            left.text(start + share / 2, split, f"{number:,}", ha="center", va="center", fontsize=8)
            start += share
    words = {f"{text}_{q}": pl.col(f"{text}_words").quantile(q) for text in TEXTS[1:] for q in QUARTILES}
    for place, row in enumerate(rows.group_by(*LABELS).agg(**words).sort(*LABELS).iter_rows(named=True)):
        for text, shift in zip(TEXTS[1:], (-0.17, 0.17), strict=True):
            low, middle, high = (row[f"{text}_{q}"] for q in QUARTILES)
            right.plot([low, high], [place + shift] * 2, color=f"C{place}")
            right.plot(
                [middle], [place + shift], "o", color=f"C{place}", label=cell_name(row[LABELS[0]], row[LABELS[1]])
            )
    right.legend(fontsize=8)
    for name in ("data.png", "data.svg"):
        page.savefig(folder / name)


def cell_name(chosen: bool, rejected: bool) -> str:
    """Return the name of a label cell."""
    return "-".join("safe" if safe else "unsafe" for safe in (chosen, rejected))


def similar(texts: list[str]) -> list[int]:
    """Return the group of each text: a chain of similar ones, by their words, joins two."""
    from rensa import RMinHash, RMinHashLSH

    sketches = RMinHash.from_token_sets([text.split() for text in texts], PERMUTATIONS, SEED)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=BANDS)
    index.insert_many(sketches, 0)
    parents = list(range(len(texts)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = place = parents[parents[place]]
        return place

    for place, found in enumerate(index.query_all(sketches)):
        for other in found:
            if other < place and sketches[place].jaccard(sketches[other]) >= THRESHOLD:
                parents[root(place)] = root(other)
    return [root(place) for place in range(len(texts))]


def languages(texts: list[str]) -> dict[str, int]:
    """Return how many texts are in each language."""
    import py3langid

    return dict(Counter(str(py3langid.classify(text[:1000])[0]) for text in texts).most_common())


if __name__ == "__main__":
    file, folder, *more = sys.argv[1:]
    sys.stdout.write(json.dumps(prepare(Path(file), Path(folder), figure=more == ["figure"])))
