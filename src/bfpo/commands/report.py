"""COMMAND: `bfpo report`, from run folders to one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bfpo.core.console import show
from bfpo.core.errors import ConfigError, RunError
from bfpo.report.gather import gather
from bfpo.report.page import write_report

__all__ = ["run"]


def run(folders: Sequence[Path], out: Path, title: str, main: str | None) -> None:
    """Write the page of run folders to `out`, the same in Markdown, JSON and CSV beside it.

    Raises `ConfigError` for an `out` that is no page, `DataError` for a folder without a run, `RunError` where the page
    cannot be written.
    """
    if out.suffix != ".html":
        raise ConfigError(f"--out: got {out}; give a file that ends in .html, as in --out page.html")
    data = gather(folders, title=title, main=main)
    try:
        page = write_report(data, out.parent, name=out.stem)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror}); check --out, rights and space") from error
    show(f"The page: {page}")
