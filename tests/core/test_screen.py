"""Replies on a terminal: one after the other, or two side by side; nothing that a model writes is obeyed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bfpo.core.screen import replies_on_screen


def test_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    with replies_on_screen(["one", "two"]) as screen:
        screen.part(0, "a b")
        screen.part(0, " c")
        screen.end(0, "judge: safe")
        screen.end(1, "")
    assert capsys.readouterr().out == "one> a b c\n[judge: safe]\ntwo> \n"


def test_two_side_by_side_on_a_wide_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=20, color_system=None)
    with replies_on_screen(["one", "[b]two"], console) as screen:
        screen.part(0, "left [b]words")
        screen.part(1, "right\x1b[2J words")
        screen.end(0, "judge: safe")
        screen.end(1, "judge: unsafe")
    last = out.getvalue().splitlines()[-6:]
    assert any("one" in line and "[b]two" in line for line in out.getvalue().splitlines())
    assert any("left [b]words" in line and "right\\x1b[2J words" in line for line in last)
    assert any("judge: safe" in line and "judge: unsafe" in line for line in last)
    assert "\x1b[2J" not in out.getvalue()


def test_in_turn_on_a_narrow_one(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40)
    with replies_on_screen(["one", "two"], console) as screen:
        screen.part(0, "a\x1b[2J")
        screen.end(0, "")
    assert capsys.readouterr().out == "one> a\\x1b[2J\n"
