"""AlpacaEval's own annotators: its package in a process of its own, and what it found read back."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo.suites.files import UnreachableError

__all__ = ["Annotated", "alpaca_eval_command", "annotate"]

_ANNOTATIONS, _LEADERBOARD = "annotations.json", "leaderboard.csv"


@dataclass(frozen=True, slots=True)
class Annotated:
    """By instruction p(better than the reference), `None` where it has none, and the characters that it has more.

    `at_equal_length` is the package's own length-controlled win rate, `None` where it gave none.
    """

    preferences: dict[str, tuple[float | None, int]]
    at_equal_length: float | None


def alpaca_eval_command(outputs: Path, reference: Path | None, annotators: str, python: str, out: Path) -> list[str]:
    """Return the command that annotates outputs.

    Against outputs of one's own (`reference`) it takes the plain win rate: the package's length-controlled one is
    fitted to its own reference, and reads from the hub how others fared against that.
    """
    against = [] if reference is None else ["--reference_outputs", str(reference.absolute())]
    metric = [] if reference is None else ["--fn_metric", "get_winrate", "--sort_by", "win_rate"]
    return [
        *(python, "-m", "alpaca_eval.main", "evaluate"),
        *("--model_outputs", str(outputs.absolute())),
        *against,
        *("--annotators_config", annotators, "--output_path", str(out.absolute())),
        *("--precomputed_leaderboard", "None", "--is_cache_leaderboard", "False"),
        *("--caching_path", str(out.absolute() / "cache.json")),
        *metric,
    ]


def annotate(
    outputs: Path, reference: Path | None, annotators: str, *, python: str | None, out: Path, keep: bool
) -> Annotated:
    """Return what the annotators say of `outputs`; with `keep`, annotations that are there are read, not made.

    `python` is the interpreter that has the package (`None`: this one). Raises `UnreachableError` with the reason where
    it is not installed or its run fails; what it wrote is in `out`.
    """
    interpreter = python or sys.executable
    if not (keep and list(out.rglob(_ANNOTATIONS))):
        out.mkdir(parents=True, exist_ok=True)
        _check_installed(interpreter)
        done = _run(alpaca_eval_command(outputs, reference, annotators, interpreter, out))
        (out / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise UnreachableError(f"alpaca_eval failed: {last:.300} (all it said is in {out / 'log.txt'})")
    return _read(out)


def _check_installed(interpreter: str) -> None:
    done = _run([interpreter, "-c", "import alpaca_eval"])
    if done.returncode:
        raise UnreachableError(
            f"{interpreter} has no alpaca_eval; pip install 'bfpo[alpaca-eval]', or set suites.alpaca_eval.python to "
            "the interpreter of an environment that has it"
        )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise UnreachableError(f"suites.alpaca_eval.python: {command[0]} cannot be run ({error.strerror})") from error


def _read(out: Path) -> Annotated:
    found = sorted(out.rglob(_ANNOTATIONS))
    try:
        rows: list[dict[str, Any]] = json.loads(found[0].read_text(encoding="utf-8"))
        preferences = {
            row["instruction"]: (_share(row["preference"]), len(row["output_2"]) - len(row["output_1"])) for row in rows
        }
        with found[0].with_name(_LEADERBOARD).open(encoding="utf-8", newline="") as file:
            (model,) = csv.DictReader(file)
        rate = model.get("length_controlled_winrate")
        return Annotated(preferences, float(rate) / 100 if rate else None)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UnreachableError(f"what alpaca_eval left in {out} cannot be read ({type(error).__name__})") from error


def _share(preference: float | None) -> float | None:
    """Return p(better) of a preference: 1 is the reference's win, 2 the model's, between them a share, 0 a draw."""
    if preference is None:
        return None
    if not (preference == 0 or 1 <= preference <= 2):
        raise ValueError(preference)
    return 0.5 if preference == 0 else float(preference) - 1
