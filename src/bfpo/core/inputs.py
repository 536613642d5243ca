"""Input paths: readable file formats, the data files in a folder, and whether a model's local folder exists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

from bfpo.core.errors import DataError

__all__ = ["ALLOWED_KINDS", "check_files", "expand_files", "kind_of", "matching_files", "missing_folder"]

_TEXT_KINDS = (".jsonl", ".json", ".csv", ".tsv")
_COMPRESSIONS = (".gz", ".zst", ".xz")
ALLOWED_KINDS = "allowed: .jsonl, .json, .csv, .tsv (each also with .gz, .zst or .xz), .parquet"


def kind_of(path: str | Path) -> tuple[str, str] | None:
    """Return the format and compression of a file, such as `(".csv", ".gz")` or `(".csv", "")`; `None` if unknown."""
    name = Path(path).name.lower()
    if name.endswith(".parquet"):
        return ".parquet", ""
    compression = next((each for each in _COMPRESSIONS if name.endswith(each)), "")
    name = name.removesuffix(compression)
    return next(((kind, compression) for kind in _TEXT_KINDS if name.endswith(kind)), None)


def list_files(folder: Path) -> list[Path]:
    """Return the readable files in a folder and its subfolders, sorted by path; hidden files are skipped.

    Raises `DataError` if there are none.
    """
    found = {}
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        if kind_of(file) is not None and file.is_file() and not any(part.startswith(".") for part in relative.parts):
            found[relative.as_posix()] = file
    if not found:
        raise DataError.at(folder, None, f"the folder has no file in a known format; {ALLOWED_KINDS}")
    return [found[name] for name in sorted(found)]


def matching_files(folder: Path, patterns: Sequence[str], *, exact: bool = True) -> list[Path]:
    """Return the files of `list_files` whose path relative to `folder` matches one of the shell patterns.

    If none matches, raises `DataError` with `exact`, else returns all files.
    """
    files = list_files(folder)
    found = [file for file in files if any(fnmatch(file.relative_to(folder).as_posix(), each) for each in patterns)]
    if patterns and exact and not found:
        raise DataError.at(folder, None, f"none of its {len(files)} files matches {', '.join(patterns)}")
    return found or files


def expand_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the paths with each folder replaced by its files. Raises `DataError` for a folder without any."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += list_files(path) if path.is_dir() else [path]
    return files


def check_files(paths: Iterable[str | Path]) -> None:
    """Raise `DataError` for a path that does not exist, and for a folder without readable files."""
    for path in expand_files(paths):
        if not path.is_file():
            raise DataError.at(path, None, "no such file")


def missing_folder(model: str, revision: str | None = None) -> str | None:
    """Return why a model's name cannot be used if it means a local folder that does not exist, else `None`.

    A name is local if it starts with `/`, `.` or `~`, has more than one slash, or starts with the name of an existing
    folder; in the last case a `revision` makes it a hub id.
    """
    path = Path(model)
    if path.exists():
        return None
    local = model.startswith(("/", ".", "~")) or model.rstrip("/").count("/") > 1
    beside = not local and not revision and "/" in model and Path(path.parts[0]).is_dir()
    if not (local or beside):
        return None
    if model.startswith("~"):
        return "no such folder: ~ is not expanded in settings; write the full path"
    there = next(parent for parent in path.parents if parent.is_dir())
    wanted = path.relative_to(there).parts[0]
    close = get_close_matches(wanted, [item.name for item in there.iterdir() if item.is_dir()], n=1)
    hint = f"did you mean {there / close[0]}?" if close else f"{there.resolve()} has no {wanted}"
    on_hub = "; for the hub's model of this name, set its revision, such as main" if beside else ""
    return f"no such folder; {hint}{on_hub}"
