"""Paths: readable file formats, the data files in a folder and their splits, names inside it, missing models."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath

from bfpo.core.errors import DataError
from bfpo.core.remote import is_remote

__all__ = [
    "ALLOWED_KINDS",
    "FolderChoice",
    "check_files",
    "choose_files",
    "expand_files",
    "kind_of",
    "matching_files",
    "missing_folder",
    "no_such_file",
    "reason_outside",
]

_TEXT_KINDS = (".jsonl", ".json", ".csv", ".tsv")
_COMPRESSIONS = (".gz", ".zst", ".xz")
_TABLES = (".parquet", ".arrow")
ALLOWED_KINDS = "allowed: .jsonl, .json, .csv, .tsv (each also with .gz, .zst or .xz), .parquet, .arrow"

_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
_SHARD = re.compile(r"(?P<name>.+?)[-_.]\d+[-_.]of[-_.]\d+")
_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_WORDS |= {"dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}


def kind_of(path: str | Path) -> tuple[str, str] | None:
    """Return the format and compression of a file, such as `(".csv", ".gz")` or `(".csv", "")`; `None` if unknown."""
    name = Path(path).name.lower()
    table = next((kind for kind in _TABLES if name.endswith(kind)), None)
    if table is not None:
        return table, ""
    compression = next((each for each in _COMPRESSIONS if name.endswith(each)), "")
    name = name.removesuffix(compression)
    return next(((kind, compression) for kind in _TEXT_KINDS if name.endswith(kind)), None)


def list_files(folder: Path) -> list[Path]:
    """Return the data files in a folder and its subfolders, sorted by path.

    Hidden files and the metadata of data sets are skipped; of a folder that `datasets` saved, its shards are taken.
    Raises `DataError` if there are none.
    """
    found = {}
    saved = {state.parent: _shards(state) for state in folder.rglob("state.json") if state.is_file()}
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        if kind_of(file) is None or not file.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        shards = next((saved[parent] for parent in file.parents if saved.get(parent)), None)
        if file.name not in _METADATA and (shards is None or file in shards):
            found[relative.as_posix()] = file
    if not found:
        raise DataError.at(folder, None, f"the folder has no file in a known format; {ALLOWED_KINDS}")
    return [found[name] for name in sorted(found)]


def _shards(state: Path) -> list[Path]:
    """Return the Arrow files that `Dataset.save_to_disk` wrote, empty for another file of that name.

    Raises `DataError` if one is missing.
    """
    try:
        names = [str(each["filename"]) for each in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    for name in names:
        if not (state.parent / name).is_file():
            raise DataError.at(state, None, f"names the shard {name}, which is not in its folder")
    return [state.parent / name for name in names]


@dataclass(frozen=True, slots=True)
class FolderChoice:
    """The files of a folder that are read; `split` is "" if they name none, `left_out` counts files of other splits."""

    files: list[Path]
    split: str
    left_out: dict[str, int]


def choose_files(folder: Path) -> FolderChoice:
    """Return the data files of a folder that are read: those of the split `train` if their names tell several splits.

    A split is named by a file or a folder (`test.jsonl`, `train/0000.parquet`), before the number of a shard
    (`train_prefs-00000-of-00002.parquet`), or by `dataset_dict.json`. Raises `DataError` if there are several and it is
    not clear which is meant.
    """
    by_split: dict[str, list[Path]] = {}
    for file in list_files(folder):
        by_split.setdefault(_split_of(file, folder), []).append(file)
    names = [name for name in by_split if name]
    to_train = ["train"] if "train" in names else [name for name in names if _words_of(name)[:1] == ["train"]]
    if not names or (len(names) == 1 and ("" not in by_split or to_train)):
        files = [file for found in by_split.values() for file in found]
        return FolderChoice(sorted(files, key=lambda file: file.relative_to(folder).as_posix()), "".join(names), {})
    if len(to_train) == 1 and "" not in by_split:
        (split,) = to_train
        others = {name: len(files) for name, files in sorted(by_split.items()) if name != split}
        return FolderChoice(by_split[split], split, others)
    counted = ", ".join(f"{name or 'without a split'} ({len(files)})" for name, files in sorted(by_split.items()))
    example = to_train[0] if to_train else sorted(names)[0]
    raise DataError.at(
        folder,
        None,
        f"holds files of several splits: {counted}; name the files to read, for example "
        f"files: {_pattern_of(by_split[example])}",
    )


def _split_of(file: Path, folder: Path) -> str:
    """Return the split that a file's path below `folder` names, "" if none."""
    for parent in file.relative_to(folder).parents:
        about = folder / parent.parent / "dataset_dict.json"
        if parent.name and about.is_file():
            return parent.name
    shard = _SHARD.match(file.name)
    if shard is not None and (_words_of(shard["name"]) or file.parent.name == "data"):
        return _WORDS.get(shard["name"], shard["name"])
    places = [file.name.split(".")[0], *(parent.name for parent in file.relative_to(folder).parents)]
    return next((words[0] for place in places if (words := _words_of(place))), "")


def _words_of(name: str) -> list[str]:
    """Return the splits that the words of a name are."""
    return [_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _WORDS]


def _pattern_of(files: Sequence[Path]) -> str:
    """Return one path, a pattern or a folder, that stands for these files of a split."""
    first = files[0]
    shard = _SHARD.match(first.name)
    if shard is not None and not first.name.startswith("data-"):
        return str(first.with_name(f"{shard['name']}-*{first.suffix}"))
    return str(first if len(files) == 1 and shard is None and not first.stem.isdigit() else first.parent)


def matching_files(folder: Path, patterns: Sequence[str], *, exact: bool = True) -> list[Path]:
    """Return the files of `list_files` whose path relative to `folder` matches one of the shell patterns.

    If none matches, raises `DataError` with `exact`, else returns those of `choose_files`.
    """
    files = list_files(folder)
    found = [file for file in files if any(fnmatch(file.relative_to(folder).as_posix(), each) for each in patterns)]
    if patterns and exact and not found:
        raise DataError.at(folder, None, f"none of its {len(files)} files matches {', '.join(patterns)}")
    return found or choose_files(folder).files


def expand_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the paths with each folder replaced by its files, and each pattern (`data/train-*`) by its matches.

    Raises `DataError` for a folder or a pattern without files, and for a folder as `choose_files`.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if is_remote(path):
            files.append(path)
        elif path.is_dir():
            files += choose_files(path).files
        elif glob.has_magic(str(path)) and not path.exists():
            files += _matches(path)
        else:
            files.append(path)
    return files


def _matches(pattern: Path) -> list[Path]:
    found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    files = [file for file in found if file.is_file() and kind_of(file) is not None and file.name not in _METADATA]
    if not files:
        raise DataError.at(pattern, None, f"no file in a known format matches; {ALLOWED_KINDS}")
    return files


def check_files(paths: Iterable[str | Path]) -> None:
    """Raise `DataError` for a path that does not exist, and for a folder without readable files; no hub is asked."""
    for path in expand_files(paths):
        if not path.is_file() and not is_remote(path):
            raise DataError.at(path, None, no_such_file(path))


def no_such_file(path: str | Path, what: str = "file") -> str:
    """Return the message for a path of a setting that does not exist; a home folder or a variable is not expanded."""
    sign = "~" if str(path).startswith("~") else "$" if "$" in str(path) else ""
    return f"no such {what}" + (f": {sign} is not expanded in settings; write the full path" if sign else "")


def reason_outside(name: str) -> str | None:
    """Return why a relative path, or a pattern, from somebody else could name something outside its folder, or `None`.

    Links are not looked at.
    """
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or name.startswith("~"):
        return "it is not relative"
    if ".." in name.replace("\\", "/").split("/"):
        return "it contains .."
    if not name.strip() or "\0" in name:
        return "it is not a name"
    return None


def missing_folder(model: str, revision: str | None = None) -> str | None:
    """Return why a model's name cannot be used if it means a local folder that does not exist, else `None`.

    A name is local if it starts with `/`, `.`, `~` or `$`, has more than one slash, or starts with the name of an
    existing folder; in the last case a `revision` makes it a hub id.
    """
    path = Path(model)
    if path.exists():
        return None
    local = model.startswith(("/", ".", "~", "$")) or model.rstrip("/").count("/") > 1
    beside = not local and not revision and "/" in model and Path(path.parts[0]).is_dir()
    if not (local or beside):
        return None
    if model.startswith("~") or "$" in model:
        return no_such_file(model, "folder")
    there = next(parent for parent in path.parents if parent.is_dir())
    wanted = path.relative_to(there).parts[0]
    close = get_close_matches(wanted, [item.name for item in there.iterdir() if item.is_dir()], n=1)
    hint = f"did you mean {there / close[0]}?" if close else f"{there.resolve()} has no {wanted}"
    on_hub = "; for the hub's model of this name, set its revision, such as main" if beside else ""
    return f"no such folder; {hint}{on_hub}"
