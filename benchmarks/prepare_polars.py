"""WORKER: what `bfpo prepare` visibly does with a file of transcripts, as a script of polars and rensa.

    python -m benchmarks.prepare_polars FILE FOLDER

It reads chosen and rejected transcripts, drops rows that cannot be used and exact duplicates, keeps prompts that nearly
repeat each other in one split (MinHash of their words), writes the three splits, counts label cells, lengths and the
languages of 2,000 answers, and prints the counts. It has no message with file and line, no resume, no bounded memory,
no manifest, no reading of refusals, card or figure, and reads one layout.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PERMUTATIONS, BANDS, THRESHOLD, SEED = 128, 16, 0.8, 1
TEXTS = ("prompt", "chosen", "rejected")
LABELS = ("chosen_is_safe", "rejected_is_safe")


def prepare(file: Path, folder: Path) -> dict[str, Any]:
    """Write the splits and return the counts."""
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
    lengths: dict[str, Any] = {f"{text}_chars": pl.col(text).str.len_chars().quantile(0.5) for text in TEXTS}
    lengths |= {f"{text}_words": pl.col(text).str.count_matches(r"\S+").quantile(0.5) for text in TEXTS}
    cells = rows.group_by(*LABELS).agg(pl.len(), **lengths)
    return {
        "rows": num_rows,
        "rejected": num_rows - num_good,
        "duplicates": num_good - len(rows),
        "cells": {cell_name(*row[:2]): row[2] for row in cells.select(*LABELS, "len").iter_rows()},
        "splits": dict(rows["split"].value_counts().iter_rows()),
        "languages": languages(rows["chosen"].sample(min(2000, len(rows)), seed=SEED).to_list()),
    }


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
    sys.stdout.write(json.dumps(prepare(Path(sys.argv[1]), Path(sys.argv[2]))))
