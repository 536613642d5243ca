"""COMMAND `report`: one page from run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bfpo.core.console import Outcome, show
from bfpo.core.errors import ConfigError, RunError
from bfpo.report.gather import gather
from bfpo.report.page import write_report

__all__ = ["run"]

_MAKER = "bfpo report"


def run(folders: Sequence[Path], out: Path, title: str, main: str | None) -> Outcome:
    """Write the page of run folders to `out`, and the same as Markdown, JSON and CSV beside it.

    Raises `ConfigError` for an `out` that does not end in `.html`, `DataError` for a folder without a run, `RunError`
    if the page cannot be written, or if one of its files exists and was not made by this command.
    """
    if out.suffix != ".html":
        raise ConfigError(f"--out: got {out}; allowed: a file name that ends in .html, such as page.html")
    data = gather(folders, title=title, main=main)
    try:
        page = write_report(data, out.parent, name=out.stem, maker=_MAKER)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); check --out, permissions and free space"
        raise RunError(f"{out}: {reason}") from error
    show(f"The page: {page}")
    return Outcome(0, {"page": str(page)})
