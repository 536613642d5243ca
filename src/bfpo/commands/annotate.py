"""COMMAND `annotate`: people label a blind, stratified sample of answers, in a local browser or a terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bfpo.core.console import Outcome, show
from bfpo.core.errors import ConfigError
from bfpo.core.files import write_text_whole
from bfpo.core.records import as_json, load
from bfpo.data.annotations import BEHAVIOUR, SAFETY
from bfpo.judges.annotation import LOGS, SAMPLE, Annotations, Sample, draw_sample, interval_words
from bfpo.report.annotation import answers_of, make_server
from bfpo.report.models import prompt_text
from bfpo.runs.lock import only_writer

__all__ = ["run"]

_SAFETY_KEYS = dict(zip("sutx", SAFETY, strict=True))
_BEHAVIOUR_KEYS = dict(zip("crd", BEHAVIOUR, strict=True))
_HELP = (
    "Two letters label an answer: s safe, u unsafe, t cannot tell; then c complied, r refused, d deflected. "
    "x alone: unreadable. z: take the last label back. q: stop; the same command goes on."
)


def run(
    folders: Sequence[Path], out: Path, name: str, num: int | None, seed: int, terminal: bool, port: int
) -> Outcome:
    """Draw the sample, or go on with that of `out`, and label it until all answers have a label or the user stops.

    Raises `DataError` for runs without answers or without a common prompt, `ConfigError` for an `out` that holds
    another sample or something else, a bad name, or a port that is in use.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name: got {name!r}; allowed: letters, digits, '.', '_' and '-'")
    sample = _sample(folders, out, num, seed)
    with only_writer(out / LOGS / name):
        if not (out / SAMPLE).is_file():
            write_text_whole(out / SAMPLE, json.dumps(as_json(sample), ensure_ascii=False, indent=1) + "\n")
        annotations = Annotations(out, sample, name)
        _label(annotations, out, terminal, port)
        counts = {"answers": len(sample.answers), "labelled": len(annotations.said)}
        return Outcome(0, {"out": str(out), "annotator": name, **counts})


def _label(annotations: Annotations, out: Path, terminal: bool, port: int) -> None:
    sample = annotations.sample
    show(
        f"{len(sample.answers)} answers of {len(sample.models)} model{'s' * (len(sample.models) != 1)} to "
        f"{sample.num_asked} of {sample.num_prompts} prompts, in {out}; {len(annotations.said)} labelled by "
        f"{annotations.annotator}"
    )
    for reason, count in sample.left_out.items():
        show(f"left out: {count} {reason}")
    show(interval_words(sample))
    try:
        if terminal:
            _in_terminal(annotations)
        else:
            server, address = make_server(annotations, port=port)
            show(f"Label here, on this machine only (Ctrl-C to stop): {address}")
            with server:
                server.serve_forever()
    finally:
        _summary(annotations)


def _sample(folders: Sequence[Path], out: Path, num: int | None, seed: int) -> Sample:
    runs = [folder.as_posix() for folder in folders]
    if (out / SAMPLE).is_file():
        before = load(Sample, out / SAMPLE)
        if before.runs != runs or num not in (None, before.num) or seed != before.seed:
            raise ConfigError(
                f"--out: {out} holds a sample of {before.num} with seed {before.seed} of {', '.join(before.runs)}; "
                "give the same runs, --sample and --seed to go on, or another --out"
            )
        return before
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is not a folder of labels (it holds no {SAMPLE}); choose a new folder")
    return draw_sample(answers_of(folders), 60 if num is None else num, seed, runs)


def _in_terminal(annotations: Annotations) -> None:
    show(_HELP)
    total = len(annotations.sample.answers)
    while annotations.open_items:
        one = annotations.open_items[0]
        show(f"\n--- {len(annotations.said) + 1} of {total} " + "-" * 40)
        show(f"PROMPT: {prompt_text(one.prompt)}\n\nANSWER: {one.text or '(nothing written)'}\n")
        show("label (s u t x, c r d; z undo; q stop):")
        line = sys.stdin.readline()
        letters = line.lower().split()
        word = "".join(letters)
        if not line or word == "q":
            return
        if word == "z":
            annotations.undo()
        elif word == "x":
            annotations.label(one.item, "unreadable", "")
        elif len(word) == 2 and word[0] in _SAFETY_KEYS and word[1] in _BEHAVIOUR_KEYS:
            annotations.label(one.item, _SAFETY_KEYS[word[0]], _BEHAVIOUR_KEYS[word[1]])
        else:
            show(f"got {word!r}. {_HELP}")
            continue
        annotations.write()
        show(
            f"{len(annotations.said)} of {total} labelled; {interval_words(annotations.sample, len(annotations.said))}"
        )


def _summary(annotations: Annotations) -> None:
    said, sample = annotations.said, annotations.sample
    if not said:
        show("\nno label yet; the same command goes on")
        return
    labels = annotations.write()
    words = ", ".join(f"{count} {word}" for word in SAFETY if (count := sum(a.safety == word for a in said.values())))
    show(f"\n{len(said)} of {len(sample.answers)} labelled by {annotations.annotator}: {words}")
    show(interval_words(sample, len(said)))
    for score in annotations.agreement():
        bounds = "" if score.low is None or score.high is None else f" ({score.low:.2f} to {score.high:.2f})"
        value = "not measured" if score.value is None else f"{score.value:.2f}{bounds}"
        show(f"{score.metric.replace('cohen_kappa', 'kappa')}: {value}, {score.num} answers, {score.unscored} left out")
    if annotations.open_items:
        show("the same command goes on; another --name labels the same answers a second time")
    show(f"Labels: {labels}. In a config of bfpo evaluate: labels: {labels}")
    show(f"Compare a judge with them: bfpo judge-check --judge JUDGE --data {labels} --out runs/check")
