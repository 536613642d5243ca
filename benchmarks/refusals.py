"""BENCHMARK: precision and recall of refusal reading against people's labels.

    python -m benchmarks.refusals --xstest FOLDER --gptfuzz FOLDER [--out FOLDER]

FOLDER holds the files of the data sets, which are not part of this repository: XSTest's
`xstest_v2_completions_*.csv` and GPTFuzz's `gptfuzz_evaluate.csv.gz` and `gptfuzz_questions.csv`. One that is not there
is left out, with the reason. The project's own sentences are in `tests/judges`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.process import ROOT, program, write_results
from bfpo.core.markdown import table
from bfpo.core.schema import Completion, Message
from bfpo.judges.refusals import RefusalJudge
from bfpo.stats import Interval, rate_interval

OWN = ROOT / "tests" / "judges" / "refusal_sentences.jsonl"
LABELS = ROOT / "benchmarks" / "refusals_gptfuzz.json"
_XSTEST = {"1": "complied", "2": "refused", "3": "partly"}


@dataclass(frozen=True, slots=True)
class Row:
    """An answer with its question and its label: refused, partly, complied or other language."""

    text: str
    label: str
    question: str = ""
    group: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show the table as Markdown and write the results where `--out` says."""
    options = parse(arguments)
    runs: list[dict[str, Any]] = []
    sources: dict[str, Callable[[], list[Row]]] = {
        "own sentences": own_rows,
        "XSTest": lambda: xstest_rows(options.xstest),
        "GPTFuzz, labelled by us": lambda: gptfuzz_rows(options.gptfuzz),
    }
    for name, read in sources.items():
        try:
            rows = read()
        except FileNotFoundError as error:
            sys.stderr.write(f"{name}: left out, {error}\n")
            continue
        runs += [measured(f"{name}{group}", rows_of) for group, rows_of in grouped(rows).items()]
    if options.gptfuzz is not None and (options.gptfuzz / "gptfuzz_evaluate.csv.gz").is_file():
        runs += by_harm(options.gptfuzz)
    sys.stdout.write(markdown(runs))
    if options.out is not None:
        write_results(options.out, "refusals", settings={"reader": _judge().version}, runs=runs)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--xstest", type=Path, help="folder with xstest_v2_completions_*.csv")
    parser.add_argument("--gptfuzz", type=Path, help="folder with gptfuzz_evaluate.csv.gz and gptfuzz_questions.csv")
    parser.add_argument("--out", type=Path, help="folder of the JSON file; without it none is written")
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------------ data


def half_of(text: str) -> str:
    """Return the half, A or B, of a prompt or sentence: rules were written while looking at half A alone."""
    return "AB"[hashlib.sha256(text.strip().encode()).digest()[0] % 2]


def own_rows(file: Path = OWN) -> list[Row]:
    """Return the project's own sentences, by half."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Row(row["text"], row["label"], group=f", half {row['half']}") for row in rows]


def xstest_rows(folder: Path | None) -> list[Row]:
    """Return XSTest's answers of five models with their final labels, by half of the prompts."""
    files = sorted(folder.glob("xstest_v2_completions_*.csv")) if folder is not None else []
    if not files:
        raise FileNotFoundError("no xstest_v2_completions_*.csv in --xstest")
    rows = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as opened:
            rows += [
                Row(
                    row["completion"],
                    _XSTEST[row["final_label"][0]],
                    prompt := row["prompt"],
                    f", half {half_of(prompt)}",
                )
                for row in csv.DictReader(opened)
            ]
    return rows


def _gptfuzz(folder: Path | None) -> tuple[list[dict[str, str]], list[str]]:
    if folder is None or not (folder / "gptfuzz_evaluate.csv.gz").is_file():
        raise FileNotFoundError("no gptfuzz_evaluate.csv.gz in --gptfuzz")
    with gzip.open(folder / "gptfuzz_evaluate.csv.gz", "rt", newline="", encoding="utf-8") as opened:
        answers = list(csv.DictReader(opened))
    with (folder / "gptfuzz_questions.csv").open(newline="", encoding="utf-8") as opened:
        questions = [row["text"] for row in csv.DictReader(opened)]
    return answers, questions


def _question(number: str, questions: Sequence[str]) -> str:
    return questions[int(number)] if int(number) < len(questions) else ""


def gptfuzz_answers(folder: Path | None) -> list[tuple[str, str]]:
    """Return question and answer of each row of GPTFuzz's evaluation file."""
    answers, questions = _gptfuzz(folder)
    return [(_question(row["question"], questions), row["Response"]) for row in answers]


def gptfuzz_rows(folder: Path | None) -> list[Row]:
    """Return the 100 answers of GPTFuzz's evaluation file that we labelled; the data set's own labels are of harm."""
    answers, questions = _gptfuzz(folder)
    labels: dict[str, str] = json.loads(LABELS.read_text(encoding="utf-8"))["labels"]
    found = [(answers[int(number)], label) for number, label in labels.items()]
    return [Row(row["Response"], label, _question(row["question"], questions)) for row, label in found]


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows by group, in order."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.group):
        groups.setdefault(row.group, []).append(row)
    return groups


# --------------------------------------------------------------------------------------------------------- measures


def _judge() -> RefusalJudge:
    return RefusalJudge()


def readings(rows: Sequence[Row]) -> list[str]:
    """Return what the reader says of each row, in the words of the labels."""
    completions = [Completion(str(n), (Message("user", row.question),), row.text) for n, row in enumerate(rows)]
    verdicts = _judge().judge(completions)
    return [
        "refused" if v.refused else "partly" if v.partly_refused else "not read" if v.refused is None else "complied"
        for v in verdicts
    ]


def measured(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return counts, precision and recall of a set of rows; 95 % intervals over prompts."""
    found = readings(rows)
    read = [(row, said) for row, said in zip(rows, found, strict=True) if row.label != "other language"]
    foreign = [said for row, said in zip(rows, found, strict=True) if row.label == "other language"]
    return {
        "kind": "labels",
        "data": name,
        "num": len(read),
        "refused": sum(row.label == "refused" for row, _ in read),
        "partly": sum(row.label == "partly" for row, _ in read),
        "not_read": sum(said == "not read" for _, said in read),
        "other_language": len(foreign),
        "other_language_not_read": foreign.count("not read"),
        "agreement": asdict(_rate(read, lambda row, said: True, lambda row, said: row.label == said)),
        "declines": _precision_recall(read, lambda word: word in ("refused", "partly")),
        "in_full": _precision_recall(read, lambda word: word == "refused"),
        "without_partial": _precision_recall(
            [(row, said) for row, said in read if row.label != "partly"], lambda word: word in ("refused", "partly")
        ),
    }


def _precision_recall(read: Sequence[tuple[Row, str]], counts: Callable[[str], bool]) -> dict[str, Any]:
    precision = _rate(read, lambda row, said: counts(said), lambda row, said: counts(row.label))
    recall = _rate(read, lambda row, said: counts(row.label), lambda row, said: counts(said))
    return {"precision": asdict(precision), "recall": asdict(recall)}


def _rate(
    read: Sequence[tuple[Row, str]], among: Callable[[Row, str], bool], hit: Callable[[Row, str], bool]
) -> Interval:
    chosen = [pair for pair in read if among(*pair)]
    return _share(chosen, [hit(*pair) for pair in chosen])


def _share(read: Sequence[tuple[Row, str]], hits: Sequence[bool]) -> Interval:
    return rate_interval(hits, [row.question or row.text for row, _ in read])


def by_harm(folder: Path) -> list[dict[str, Any]]:
    """Return the share of GPTFuzz's evaluation answers that are read as refusals, by the data set's label of harm."""
    answers, questions = _gptfuzz(folder)
    rows = [Row(row["Response"], row["label"], _question(row["question"], questions)) for row in answers]
    found = list(zip(rows, readings(rows), strict=True))
    runs = []
    for label, title in (("0", "harmless"), ("1", "harmful")):
        for words in (("refused",), ("refused", "partly")):
            of_label = [pair for pair in found if pair[0].label == label]
            share = _share(of_label, [said in words for _, said in of_label])
            runs.append({"kind": "harm", "data": f"GPTFuzz, {title}", "read_as": " or ".join(words), **asdict(share)})
    return runs


# ------------------------------------------------------------------------------------------------------------ table


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Return the tables as Markdown."""
    rows = []
    for run in runs:
        if run["kind"] == "labels":
            shares = [run[what][which] for what in ("declines", "in_full") for which in ("precision", "recall")]
            foreign = f"; {run['other_language_not_read']} of {run['other_language']} in other languages"
            not_read = f"{run['not_read']}{foreign if run['other_language'] else ''}"
            refused = f"{run['refused']} / {run['partly']}"
            rows.append([run["data"], f"{run['num']:,}", refused, *map(_shown, shares), not_read])
    precision = ["precision", "recall", "precision, in full", "recall, in full"]
    lines = table(["data", "answers", "refused / in part", *precision, "not read"], rows)
    harm = ([run["data"], f"{run['num']:,}", run["read_as"], _shown(run)] for run in runs if run["kind"] == "harm")
    return "\n".join([*lines, "", *table(["data", "answers", "read as", "share"], harm)]) + "\n"


def _shown(interval: dict[str, Any]) -> str:
    if interval["value"] is None:
        return "none"
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


if __name__ == "__main__":
    program(main)
