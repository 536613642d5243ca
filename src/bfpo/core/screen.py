"""Replies of one model or two while they are made: one after the other, or side by side on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bfpo.core.console import one_line, printable, show

__all__ = ["ReplyScreen", "replies_on_screen"]

_PER_SECOND = 8
_NARROWEST = 60  # columns of a terminal in which two replies are side by side


class ReplyScreen(Protocol):
    """Shows replies by their place."""

    def part(self, place: int, text: str) -> None:
        """Show more text of a reply."""

    def end(self, place: int, remarks: str) -> None:
        """End a reply, with what is to be said of it."""


@contextmanager
def replies_on_screen(names: Sequence[str], console: Console | None = None) -> Iterator[ReplyScreen]:
    """Show replies of the models with these names: two side by side on a terminal that is wide enough."""
    console = console or Console(file=sys.stdout)
    if len(names) == 1 or not console.is_terminal or console.width < _NARROWEST:
        yield _InTurn(names)
        return
    with Live(console=console, auto_refresh=True, refresh_per_second=_PER_SECOND) as live:
        yield _SideBySide(names, live)


class _InTurn:
    def __init__(self, names: Sequence[str]) -> None:
        self._names = [one_line(name) for name in names]
        self._begun: set[int] = set()

    def part(self, place: int, text: str) -> None:
        if place not in self._begun:
            self._begun.add(place)
            sys.stdout.write(f"{self._names[place]}> ")
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    def end(self, place: int, remarks: str) -> None:
        self.part(place, "\n")
        if remarks:
            show(f"[{remarks}]")


class _SideBySide:
    def __init__(self, names: Sequence[str], live: Live) -> None:
        self._titles = [one_line(name) for name in names]
        self._texts = [Text() for _ in names]
        self._remarks = [Text(style="dim") for _ in names]
        self._live = live
        self._draw()

    def part(self, place: int, text: str) -> None:
        self._texts[place].append(printable(text))

    def end(self, place: int, remarks: str) -> None:
        self._remarks[place].append(printable(remarks))

    def _draw(self) -> None:
        table = Table(expand=True)
        for title in self._titles:
            table.add_column(Text(title), ratio=1)
        table.add_row(*self._texts)
        table.add_row(*self._remarks)
        self._live.update(table)
