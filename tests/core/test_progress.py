from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from bfpo.core.progress import CountProgress

logger = logging.getLogger("bfpo.test")


def count(
    caplog: pytest.LogCaptureFixture, *, terminal: bool, total: int | None = 10, **settings: object
) -> tuple[str, list[str]]:
    """What a terminal shows and what the log says of five steps of 3."""
    caplog.set_level(logging.INFO, "bfpo")
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with CountProgress("reference", total, logger, console=console, **settings) as progress:  # type: ignore[arg-type]
        for _ in range(5):
            progress.advance(3)
    return console.file.getvalue(), [record.getMessage() for record in caplog.records]  # type: ignore[attr-defined]


def test_lines_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    shown, lines = count(caplog, terminal=False, seconds_between_lines=0.0)
    assert shown == ""
    assert [line.partition("  (")[0] for line in lines] == [f"reference: {n} of 10" for n in (3, 6, 9, 10, 10)]
    assert all(line.endswith(" s left)") for line in lines)
    assert lines[-1].endswith("about 0 s left)")


def test_the_time_left_is_that_of_the_rest_at_the_same_speed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, *(100.0 + 40.0 * n for n in range(1, 6))])
    monkeypatch.setattr("bfpo.core.progress.time.monotonic", lambda: next(times))
    _, lines = count(caplog, terminal=False, total=15)
    assert [line.partition("  ")[2] for line in lines] == [
        f"({done} s, about {left} s left)" for done, left in ((40, 160), (80, 120), (120, 80), (160, 40), (200, 0))
    ]


def test_a_short_count_and_a_silent_one_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert count(caplog, terminal=False) == ("", [])
    assert count(caplog, terminal=False, shown=False, seconds_between_lines=0.0) == ("", [])
    assert count(caplog, terminal=True, shown=False) == ("", [])


def test_a_bar_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    shown, lines = count(caplog, terminal=True, seconds_between_lines=0.0)
    assert "reference" in shown
    assert "10/10" in shown
    assert lines == []


def test_an_unknown_total_shows_the_count_alone(caplog: pytest.LogCaptureFixture) -> None:
    _, lines = count(caplog, terminal=False, total=None, seconds_between_lines=0.0)
    assert [line.partition("  (")[0] for line in lines] == [f"reference: {n}" for n in (3, 6, 9, 12, 15)]
    assert not any("left" in line for line in lines)
    shown, _ = count(caplog, terminal=True, total=None)
    assert "reference 15" in shown
    assert "/" not in shown
