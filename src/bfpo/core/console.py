"""Console output: results on stdout, log records on stderr; styled on a terminal, plain text elsewhere."""

from __future__ import annotations

import logging
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["in_words", "printable", "show", "show_table", "start_logging"]


class _ConsoleHandler(logging.Handler):
    """Writes log records as plain lines; warnings and errors start with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        style = {logging.WARNING: "yellow", logging.ERROR: "red"}.get(record.levelno)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if style is not None and sys.stderr.isatty():
            from rich.console import Console

            Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def start_logging(level: int = logging.INFO) -> None:
    """Write the records of the `bfpo` loggers to stderr; repeated calls have no effect.

    Called by programs (the command line, the demo's workers), never by the library.
    """
    logger = logging.getLogger("bfpo")
    logger.setLevel(level)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
        logger.propagate = False


def printable(text: str) -> str:
    """Return untrusted text with control and invisible formatting characters escaped; keeps line breaks and tabs.

    A model's answer can then neither send escape codes to a terminal nor change the reading direction of the text.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else ascii(character)[1:-1]
        for character in text
    )


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


def show(text: str = "") -> None:
    """Write a line to stdout and flush it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout: formatted by rich on a terminal, else one line per row with aligned columns."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns) - 1)]
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        show("  ".join([*padded, line[-1]]))
