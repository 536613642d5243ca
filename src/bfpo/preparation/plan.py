"""What is read for a mixture: the sources with their files, and the evaluation suites."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo.config.prepare import MixtureSourceConfig, SuiteConfig
from bfpo.core.errors import DataError, SettingError
from bfpo.core.files import file_digest
from bfpo.core.schema import Prompt
from bfpo.data.fields import ColumnNames
from bfpo.data.layouts import AUTO
from bfpo.data.notes import FileNotes
from bfpo.data.prompts import read_prompts
from bfpo.data.sources import SOURCES, SourceKind, resolve_files
from bfpo.preparation.deep import DeepRefusals
from bfpo.preparation.rows import kind_of_layout, reader_of

__all__ = ["PlannedSource", "Suite", "plan_source", "read_suite"]


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source of the mixture with its files found; `digests` are their SHA-256, `limit` rows are read of each."""

    config: MixtureSourceConfig
    files: tuple[Path, ...]
    digests: tuple[str, ...]
    kind: SourceKind
    layout: str
    hub_id: str | None
    revision: str | None
    licence: str | None
    limit: int | None = None

    @property
    def deep(self) -> DeepRefusals | None:
        """What makes its rows refusals after a harmful beginning; `None` for rows as they are."""
        if (asked := self.config.deep_refusals) is None:
            return None
        return DeepRefusals(asked.most_words, tuple(asked.transitions), as_pairs=self.config.stream != "sft")

    @property
    def gives_pairs(self) -> bool:
        """Whether its usable rows are pairs."""
        return self.kind == "pairs" and (self.deep is None or self.deep.as_pairs)

    def as_row(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """Return its entry in the manifest; `files`: hash and size by path."""
        return {
            "name": self.config.name,
            "stream": self.config.stream,
            "hub_id": self.hub_id,
            "revision": self.revision,
            "licence": self.licence,
            "files": {self._place_of(file): facts for file, facts in files.items()},
        }

    def _place_of(self, file: str) -> str:
        """Return the path of a file, relative to its data set if it is from the hub: the same on every machine."""
        parts = Path(file).parts
        return "/".join(parts[parts.index(self.revision) + 1 :]) if self.revision in parts else file


def plan_source(config: MixtureSourceConfig, *, limit: int | None = None) -> PlannedSource:
    """Find the files of a source: its own, else those of the table of data sets.

    Raises `SettingError` for an invalid name, layout or stream, `DataError` for files that cannot be found.
    """
    name, row, commit = config.name, SOURCES.get(config.name), None
    if config.files is None:
        resolved = resolve_files(name, revision=config.revision)  # raises with the known names
        files, commit = list(resolved.files), resolved.revision
    else:
        if config.revision is not None:
            raise SettingError(
                f"{name}: revision {config.revision!r} cannot be combined with files; leave one of them out"
            )
        files = FileNotes().files(config.files)
    for file in files:
        if not file.is_file():
            raise DataError.at(file, None, f"no such file; it is named in the mixture under {name}")
    layout = config.layout or (AUTO if row is None else row.layout)
    kind = kind_of_layout(layout) or ("pairs" if config.stream != "sft" else _kind_of_files(files, config.columns))
    if kind == "completions" and config.stream != "sft":
        raise SettingError(f"{name}: holds completions, the {config.stream} stream takes pairs; set stream: sft")
    if kind == "completions" and config.use == "chosen":
        raise SettingError(f"{name}: use: chosen selects from pairs, but it holds completions; set all or safe")
    if kind == "completions" and config.deep_refusals is not None:
        raise SettingError(f"{name}: deep_refusals: made from pairs, and it holds completions; leave it out")
    if kind == "pairs" and config.leave_out:
        raise SettingError(f"{name}: leave_out: read only of completions, and it holds pairs; leave it out")
    digests = tuple(_digest_of(file, name) for file in files)
    hub_id, licence = (None, None) if row is None else (row.hub_id, row.licence)
    return PlannedSource(config, tuple(files), digests, kind, layout, hub_id, commit, config.licence or licence, limit)


def _kind_of_files(files: Iterable[Path], columns: ColumnNames) -> SourceKind:
    """Return what the rows of the first file that has any are."""
    readers = (reader_of(file, layout=AUTO, columns=columns) for file in files)
    return next((reader.kind for reader in readers if reader is not None), "pairs")


def _digest_of(file: Path, name: str) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise DataError.at(file, None, f"cannot be read ({error.strerror}); it is named under {name}") from error


@dataclass(frozen=True, slots=True)
class Suite:
    """The evaluation prompts of one suite."""

    name: str
    files: list[Path]
    prompts: list[Prompt]
    digest: str


def read_suite(config: SuiteConfig) -> Suite:
    """Read the prompts of a suite; raises `DataError` if a file cannot be read or holds no prompt."""
    files = [Path(file) for file in config.files]
    prompts = [prompt for file in files for prompt in read_prompts(file, columns=config.columns)]
    if not prompts:
        raise DataError(f"decontaminate: {config.name} holds no prompt ({', '.join(map(str, files))})")
    content = repr([(prompt.id, prompt.messages) for prompt in prompts])
    return Suite(config.name, files, prompts, hashlib.sha256(content.encode()).hexdigest())
