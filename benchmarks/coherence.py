"""BENCHMARK: how often coherence misreads good text, and how much word salad a start model misses.

    python -m benchmarks.coherence --xstest FOLDER --gptfuzz FOLDER [--model START] [--num 150] [--out FOLDER]

The folders are those of `benchmarks.refusals`. Their answers are good text written by people and large models, except a
few that loop or answer in another language, so a reason is an error until it has been looked at; `--show` prints them.
With `--model` the bound is calibrated on the questions, and a sample of `--num` answers is read, as they are and with
their words in random order.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.process import program, write_results
from benchmarks.refusals import gptfuzz_answers, xstest_rows
from bfpo.core.markdown import table
from bfpo.core.schema import Completion, Message
from bfpo.execution.settings import LocalExecutor
from bfpo.scores.records import CoherenceBound
from bfpo.stats import rate_interval
from bfpo.suites.coherence import CoherenceReader, make_reader, word_salad


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show a table as Markdown and write the results where `--out` says."""
    options = parse(arguments)
    sets: dict[str, list[Completion]] = {}
    if options.xstest is not None:
        sets["XSTest"] = [_completion(row.question, row.text) for row in xstest_rows(options.xstest)]
    if options.gptfuzz is not None:
        sets["GPTFuzz"] = [_completion(question, text) for question, text in gptfuzz_answers(options.gptfuzz)]
    runs = [row for name, answers in sets.items() for row in measured(name, answers, CoherenceReader(), options.show)]
    bound: CoherenceBound | None = None
    if options.model is not None:
        drawn = {
            name: random.Random(0).sample(answers, min(options.num, len(answers))) for name, answers in sets.items()
        }
        prompts = [answer.prompt for answers in drawn.values() for answer in answers]
        reader = make_reader((options.model, None), prompts, LocalExecutor(), dtype="bfloat16")
        bound = reader.bound
        for name, answers in drawn.items():
            runs += measured(f"{name}, sample", answers, reader, options.show)
            runs += measured(f"{name}, shuffled", [word_salad(answer) for answer in answers], reader, False)
    lines = table(
        ["data", "answers", "reason", "share"], ([row[k] for k in ("data", "num", "reason", "words")] for row in runs)
    )
    sys.stdout.write("\n".join(lines) + "\n")
    if options.out is not None:
        write_results(options.out, "coherence", settings={"bound": asdict(bound) if bound else None}, runs=runs)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--xstest", type=Path, help="folder with xstest_v2_completions_*.csv")
    parser.add_argument("--gptfuzz", type=Path, help="folder with gptfuzz_evaluate.csv.gz and gptfuzz_questions.csv")
    parser.add_argument("--model", help="start model: folder or hub id; without it only the text is read")
    parser.add_argument("--num", type=int, default=150, help="answers of each set that the start model reads")
    parser.add_argument("--show", action="store_true", help="print the answers that are not coherent")
    parser.add_argument("--out", type=Path, help="folder of the JSON file; without it none is written")
    return parser.parse_args(arguments)


def _completion(question: str, text: str) -> Completion:
    return Completion("", (Message("user", question),), text)


def measured(name: str, answers: Sequence[Completion], reader: CoherenceReader, show: bool) -> list[dict[str, Any]]:
    """Return the share of answers with each reason, and with any, with 95% intervals over prompts."""
    readings = reader.read(answers)
    found = Counter(reason for one in readings for reason in one.incoherent or ())
    prompts = [answer.prompt[0].content for answer in answers]
    rows = []
    for reason in ("any", *found):
        hits = [bool(one.incoherent) if reason == "any" else reason in (one.incoherent or ()) for one in readings]
        share = rate_interval(hits, prompts)
        bounds = "" if share.low is None or share.high is None else f" ({share.low:.2%} to {share.high:.2%})"
        words = f"{sum(hits)}: {share.value:.2%}{bounds}"
        rows.append({"data": name, "num": len(answers), "reason": reason, "share": asdict(share), "words": words})
    for answer, one in zip(answers, readings, strict=True):
        if show and one.incoherent:
            sys.stdout.write(f"{name} {one.incoherent} {answer.text[:200]!r} ... {answer.text[-120:]!r}\n")
    return rows


if __name__ == "__main__":
    program(main)
