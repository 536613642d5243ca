"""Files of any data set on the hub: which are read, at which commit, under which licence.

The data set's card says which files a subset and a split have; without that, names do. Only files are read; no code
of a data set is run, and the package `datasets` is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bfpo.core.errors import DataError
from bfpo.core.inputs import choose_files, kind_of, matching_files, reason_outside
from bfpo.core.remote import remote_name
from bfpo.data.hub_stream import names_on_hub
from bfpo.data.sources import NO_HUB, SOURCES, download_dataset

__all__ = ["HubFiles", "find_hub_files"]

_CARD = "README.md"
_STATE = "state.json"  # names the shards of a data set that was saved with `save_to_disk`
_KINDS = ("*.parquet", "*.arrow", "*.json*", "*.csv*", "*.tsv*")
_MOST_NAMES = 8


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files of a data set in a fixed order, in the hub's cache or on the hub, their commit, and the licence."""

    hub_id: str
    files: tuple[Path, ...]
    commit: str
    licence: str | None

    def as_source(self) -> dict[str, str | None]:
        """Return the data set as run records and cards name sources."""
        return {"name": self.hub_id, "licence": self.licence, "hub_id": self.hub_id, "revision": self.commit}


def find_hub_files(
    hub_id: str,
    *,
    revision: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    patterns: Sequence[str] = (),
    streaming: bool = False,
) -> HubFiles:
    """Return the files of a data set, downloaded into the hub's cache unless they are there.

    `patterns` name files in the data set and come first. Else a data set of the table of sources has its own, unless a
    subset or another split than `train` is asked for; else the card's list of a subset and a split decides; else the
    split must be in the files' names. The split is `train` unless given. A data set of the table is read at the
    revision there, whichever files are, unless `revision` is given. `HF_HUB_OFFLINE=1` uses earlier downloads.
    `streaming`: the same files, named on the hub (`remote_name`) and not downloaded.

    Raises `DataError` for a data set that cannot be downloaded, and for a subset or split that is missing or not clear,
    `ServerError` if the hub is lost.
    """
    known = next((source for source in SOURCES.values() if source.hub_id == hub_id), None)
    if known is not None:
        revision = revision or known.revision
        if not patterns and subset is None and split in (None, "train"):
            patterns = known.patterns
    folder, commit = _download(hub_id, revision, [_CARD, *([_STATE, f"*/{_STATE}"] if streaming else patterns)])
    about = _card(folder)
    wanted = _Wanted(hub_id, commit, about, subset, split, patterns)
    if streaming:
        found = _on_hub(wanted, folder)
    else:
        found = wanted.files(folder, lambda names: _download(hub_id, commit, names))
    licence = known.licence if known is not None else None
    return HubFiles(hub_id, tuple(found), commit, licence or _licence(about))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked of a data set, whose card is `about`."""

    hub_id: str
    commit: str
    about: Mapping[str, Any]
    subset: str | None
    split: str | None
    patterns: Sequence[str]

    def files(self, folder: Path, fetch: Callable[[Sequence[str]], object]) -> list[Path]:
        """Return the files in `folder`, into which `fetch` puts those that match patterns."""
        if self.patterns:
            return matching_files(folder, self.patterns)
        if listed := _listed(self.hub_id, self.about, self.subset, self.split):
            fetch(listed)
            return matching_files(folder, listed)
        return _by_name(self.hub_id, folder, self.commit, self.subset, self.split, fetch)


def _on_hub(wanted: _Wanted, about: Path) -> list[Path]:
    """Return the names on the hub of the files that a folder with all files would have; `about` has its small ones."""
    with TemporaryDirectory() as place:
        outline = Path(place)  # of files that are empty, so that both ways choose the same ones
        for name in names_on_hub(wanted.hub_id, wanted.commit):
            if kind_of(name) is not None and reason_outside(name) is None:
                file, small = outline / name, about / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(small.read_bytes() if file.name == _STATE and small.is_file() else b"")
        try:
            found = wanted.files(outline, lambda names: None)
        except DataError as error:
            root = remote_name(wanted.hub_id, wanted.commit, "")
            raise DataError(str(error).replace(f"{place}/", root).replace(place, root.rstrip("/"))) from error
        names = [file.relative_to(outline).as_posix() for file in found]
    return [Path(remote_name(wanted.hub_id, wanted.commit, name)) for name in names]


def _download(hub_id: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str]:
    return download_dataset(
        hub_id,
        revision=revision,
        patterns=patterns,
        advice=NO_HUB,
    )


def _card(folder: Path) -> Mapping[str, Any]:
    """Return the metadata of the data set's card, empty without one."""
    from huggingface_hub import metadata_load

    file = folder / _CARD
    try:
        return (metadata_load(file) if file.is_file() else None) or {}
    except Exception:  # of YAML, and of what is not a mapping
        return {}


def _licence(about: Mapping[str, Any]) -> str | None:
    value = about.get("license")
    return ", ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def _listed(hub_id: str, about: Mapping[str, Any], subset: str | None, split: str | None) -> list[str]:
    """Return the patterns that the card gives for a subset and a split; empty if it lists none."""
    configs = about.get("configs")
    rows = configs if isinstance(configs, list) else []
    rows = [row for row in rows if isinstance(row, dict) and row.get("data_files")]
    if not rows:
        return []
    names = [str(row.get("config_name", "default")) for row in rows]
    marked = [name for name, row in zip(names, rows, strict=True) if row.get("default") is True or name == "default"]
    wanted = subset or (names[0] if len(names) == 1 else marked[0] if len(marked) == 1 else None)
    if wanted not in names:
        got = f"got {subset!r}" if subset else "missing"
        raise DataError(f"{hub_id}: subset: {got}; allowed: {_some(names)}")
    files = rows[names.index(wanted)]["data_files"]
    by_split = _by_split(files)
    chosen = split or ("train" if "train" in by_split else next(iter(by_split)) if len(by_split) == 1 else None)
    if chosen not in by_split:
        got = f"got {split!r}" if split else "missing"
        raise DataError(f"{hub_id}: split: {got}; allowed: {_some(list(by_split))}")
    return by_split[chosen]


def _by_split(files: Any) -> dict[str, list[str]]:
    """Return the patterns of each split, as cards write them: one path, a list, or a list of splits with paths."""
    found: dict[str, list[str]] = {}
    for row in files if isinstance(files, list) else [files]:
        split, paths = (str(row.get("split", "train")), row.get("path")) if isinstance(row, dict) else ("train", row)
        found.setdefault(split, []).extend(map(str, paths if isinstance(paths, list) else [paths]))
    return found


def _by_name(
    hub_id: str,
    folder: Path,
    commit: str,
    subset: str | None,
    split: str | None,
    fetch: Callable[[Sequence[str]], object],
) -> list[Path]:
    """Return the files whose names tell the split; without a split, those of `choose_files`."""
    below = "" if subset is None else f"{subset}/"
    patterns = [f"{below}*{split or 'train'}*"]
    fetch(patterns)
    found = _matching(folder, patterns)
    if not found and split is None:
        patterns = [f"{below}{kind}" for kind in _KINDS]
        fetch(patterns)
        found = _matching(folder, patterns)
        found = choose_files(folder / below).files if found else []
    if not found:
        sought = ", ".join(f"{key} {value!r}" for key, value in (("subset", subset), ("split", split)) if value)
        named = f"with {sought} in its name" if sought else "in a format that is read"
        raise DataError(f"{hub_id}: at {commit} there is no file {named}; set `files` to names or patterns in it")
    folders = sorted({_subset_of(file.relative_to(folder), split or "train") for file in found})
    if len(folders) > 1:
        raise DataError(
            f"{hub_id}: holds several subsets: {_some(folders)}; set subset to one of them, or `files` to names or "
            "patterns in the data set"
        )
    return found


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    try:
        return matching_files(folder, patterns)
    except DataError:  # nothing that can be read, or nothing that matches
        return []


def _subset_of(file: Path, split: str) -> str:
    """Return the folders that a file is in, without those that name the split or only hold data."""
    return "/".join(part for part in file.parent.parts if part != "data" and split not in part)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return f"{shown}, ... ({len(names)})" if len(names) > _MOST_NAMES else shown
