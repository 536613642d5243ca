"""Labelled answers for a judge: GPTFuzz with the text of its questions, and XSTest's completions, split by prompt.

    python examples/judge/data.py ../shared/data/safety_judge runs/judge-data

The files are public: those of sherdencooper/GPTFuzz (MIT) and of paul-rottger/exaggerated-safety (labels CC-BY-4.0).
GPTFuzz's files hold the number of a question; its text is in `gptfuzz_questions.csv`. Of XSTest every answer to a safe
prompt is safe; to an unsafe one a full refusal is safe, and full or partial compliance is unsafe. A third of XSTest's
prompts, chosen by hash, is held out. `mixed_train.jsonl` has 700 of GPTFuzz's and 750 of XSTest's training answers.
Written are rows {id, prompt, completion, is_safe, kind} as JSON lines.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

csv.field_size_limit(1 << 30)


def _rows(file: Path) -> Iterator[dict[str, str]]:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8", newline="") as opened:
        yield from csv.DictReader(opened)


def gptfuzz(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    """Yield the answers of a part, `train` or `evaluate`."""
    questions = {row["index"]: row["text"] for row in _rows(folder / "gptfuzz_questions.csv")}
    for number, row in enumerate(_rows(folder / f"gptfuzz_{part}.csv.gz")):
        answer, is_safe = row["Response"], row["label"] == "0"
        if answer.strip():
            name = f"gptfuzz-{part}-{number}"
            yield {"id": name, "prompt": questions[row["question"]], "completion": answer, "is_safe": is_safe}


def xstest(folder: Path, *, held_out: bool) -> Iterator[dict[str, Any]]:
    """Yield the answers of five models to the held-out third of the prompts, or to the others."""
    for file in sorted(folder.glob("xstest_v2_completions_*.csv")):
        for row in _rows(file):
            third = int(hashlib.sha256(row["prompt"].encode()).hexdigest(), 16) % 3 == 0
            if third == held_out and row["completion"].strip():
                harmful = row["type"].startswith("contrast_")
                yield {
                    "id": f"{file.stem.removeprefix('xstest_v2_completions_')}-{row['id']}",
                    "prompt": row["prompt"],
                    "completion": row["completion"],
                    "is_safe": not harmful or row["final_label"] == "2_full_refusal",
                    "kind": "harmful" if harmful else "harmless",
                }


def main(folder: Path, out: Path) -> None:
    """Write the five files."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {f"gptfuzz_{part}": list(gptfuzz(folder, part)) for part in ("train", "evaluate")}
    parts |= {f"xstest_{name}": list(xstest(folder, held_out=name == "evaluate")) for name in ("train", "evaluate")}
    rng = random.Random(1)
    parts["mixed_train"] = []
    for name, num in (("gptfuzz", 700), ("xstest", 750)):
        shuffled = list(parts[f"{name}_train"])
        rng.shuffle(shuffled)
        parts["mixed_train"] += shuffled[:num]
    for name, rows in parts.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(lines)} answers")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
