"""Console output: results on stdout, log records and errors on stderr; styled on a terminal, plain text elsewhere.

Texts of models, servers, data and configs are in what is printed. All of it goes through `printable`, so that a
terminal shows it and obeys none of it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bfpo.core.characters import visible

__all__ = [
    "Outcome",
    "Plan",
    "aligned",
    "in_words",
    "level_text",
    "one_line",
    "printable",
    "show",
    "show_error",
    "show_json",
    "show_table",
    "start_logging",
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended: its exit code, and its own keys of what `--json` writes."""

    exit_code: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command would do: lines for people, and their figures as data (`planned` of `--dry-run --json`)."""

    lines: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: Plan) -> Plan:
        """Return both, one after the other."""
        return Plan([*self.lines, *other.lines], {**self.facts, **other.facts})


class _ConsoleHandler(logging.Handler):
    """Writes log records as plain lines; warnings and errors start with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record))  # a traceback, too
        style = {logging.WARNING: "yellow", logging.ERROR: "red"}.get(record.levelno)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if style is not None and sys.stderr.isatty():
            from rich.console import Console

            Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


class _Record(logging.LogRecord):
    """A record whose message is `printable`; a text in it that is not the whole message stays on one line."""

    def getMessage(self) -> str:  # noqa: N802 - upstream's name
        args = self.args
        if isinstance(args, tuple) and self.msg != "%s":
            args = tuple(one_line(each) if isinstance(each, (str, Path)) else each for each in args)
        return printable(str(self.msg) % args if args else str(self.msg))


def start_logging(level: int = logging.INFO) -> None:
    """Write the records of the `bfpo` loggers to stderr; repeated calls have no effect.

    Records of other loggers, which have handlers of their own, are escaped as those of `bfpo` are. Called by programs
    (the command line, the workers of an experiment), never by the library.
    """
    logging.setLogRecordFactory(_Record)
    logger = logging.getLogger("bfpo")
    logger.setLevel(level)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
        logger.propagate = False


def printable(text: str) -> str:
    """Return untrusted text with control and invisible characters escaped; keeps line breaks and tabs.

    A model's answer can then neither send escape codes to a terminal nor change the reading direction of the text.
    """
    return visible(text, lambda character: ascii(character)[1:-1])


def one_line(value: object) -> str:
    """Return `printable` text without line breaks and tabs, such as a file's name in a message."""
    return printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")


def in_words(value: Any, digits: int = 6) -> str:
    """Return a plain value as cards and pages show it: none, yes, a number to `digits` digits, `a, b`, `a: 1; b: 2`."""
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {in_words(item, digits)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(in_words(item, digits) for item in value) or "none"
    return str(value)


def level_text(confidence: float) -> str:
    """Return the level of intervals in per cent, such as `95%` or `99.9%`, which is not rounded."""
    return f"{100 * confidence:.10g}%"


def show(text: str = "") -> None:
    """Write a line to stdout and flush it."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """Write a JSON value to stdout, in ASCII: a terminal obeys none of its texts either."""
    sys.stdout.write(json.dumps(value, indent=2).replace("\x7f", "\\u007f") + "\n")
    sys.stdout.flush()


def show_error(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(printable(text) + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout: formatted by rich on a terminal, else one line per row with aligned columns."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        Console().print(table)
        return
    for text in aligned(columns, rows):
        show(text)


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as one line per row with aligned columns, the titles first."""
    lines = [[printable(cell) for cell in line] for line in (columns, *rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns) - 1)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=False)] for line in lines)
    return ["  ".join([*cells, line[-1]]) for cells, line in zip(padded, lines, strict=True)]
