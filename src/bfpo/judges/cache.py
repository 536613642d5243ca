"""Verdicts and comparisons on disk, for resumed and other runs: nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from bfpo.core.errors import DiskFullError, RunError
from bfpo.core.schema import Comparison, Completion, Verdict

__all__ = ["OpinionCache", "comparison_key", "verdict_key"]

_log = logging.getLogger(__name__)

_FORMAT = 1  # of a row's JSON and of the keys
_SECONDS_FOR_A_LOCK = 60.0
_KEYS_PER_QUERY = 500
_OWN_FIELDS = frozenset({"completion_id", "judge", "first_id", "second_id", "ranker"})  # of this run, not of the text


def verdict_key(completion: Completion, version: str, vote: int = 0) -> str:
    """Return the key of a judge's verdict: prompt and text, the judge's version, the vote's number; not the id."""
    return _digest(["verdict", version, vote, _turns(completion), completion.text])


def comparison_key(first: Completion, second: Completion, version: str) -> str:
    """Return the key of a ranker's comparison of two completions of one prompt, in this order."""
    return _digest(["comparison", version, _turns(first), first.text, second.text])


def _turns(completion: Completion) -> list[list[str]]:
    return [[message.role, message.content] for message in completion.prompt]


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()


class OpinionCache:
    """The file `opinions.sqlite` in `folder`, used as a context manager.

    Every `keep` is one transaction: a killed process leaves only whole rows, and several processes can share the
    folder. The first row of a key stays. A file that is not a database is renamed to `.bad`, with a warning. Raises
    `RunError` for a folder that cannot be used, `DiskFullError` if there is no space.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "opinions.sqlite"
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._connection = self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                bad = self.path.with_name(f"{self.path.name}.{os.getpid()}.bad")
                self.path.replace(bad)
                _log.warning("label cache: %s is not a database (%s); renamed to %s", self.path, error, bad.name)
                self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_SECONDS_FOR_A_LOCK, isolation_level=None, check_same_thread=False
        )
        connection.execute("CREATE TABLE IF NOT EXISTS opinions (key TEXT PRIMARY KEY, row TEXT) WITHOUT ROWID")
        return connection

    def __enter__(self) -> OpinionCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def find_verdicts(self, keys: Iterable[str], judge: str) -> dict[str, Verdict]:
        """Return the cached verdicts by key, with this judge's name and without a completion's id."""
        return {key: Verdict("", judge, **row) for key, row in self._find(keys)}

    def find_comparisons(self, keys: Iterable[str], ranker: str) -> dict[str, Comparison]:
        """Return the cached comparisons by key, with this ranker's name and without ids."""
        return {key: Comparison("", "", ranker, **row) for key, row in self._find(keys)}

    def keep(self, opinions: Mapping[str, Verdict | Comparison]) -> None:
        """Store opinions by key, all of them or none."""
        rows = [
            (key, json.dumps({name: value for name, value in asdict(opinion).items() if name not in _OWN_FIELDS}))
            for key, opinion in opinions.items()
        ]
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany("INSERT OR IGNORE INTO opinions VALUES (?, ?)", rows)
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise

    def _find(self, keys: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        wanted = list(keys)
        for start in range(0, len(wanted), _KEYS_PER_QUERY):
            part = wanted[start : start + _KEYS_PER_QUERY]
            marks = ", ".join("?" * len(part))
            with self._errors():
                found = self._connection.execute(f"SELECT key, row FROM opinions WHERE key IN ({marks})", part)
                rows = found.fetchall()
            yield from ((key, json.loads(row)) for key, row in rows)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate errors of the database or the disk."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if "full" in str(error):
                raise DiskFullError(
                    f"{self.path}: the disk or the quota is full; the cache is kept. Free some space and continue with "
                    "--resume"
                ) from error
            raise RunError(
                f"{self.path}: the cache of verdicts cannot be used ({error}); check label_cache and permissions"
            ) from error
