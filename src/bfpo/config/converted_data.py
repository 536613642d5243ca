"""Data sets that a config of TRL, axolotl or LLaMA-Factory names, as data sections of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bfpo.config.converted_source import FILL_IN, NOTHING, Library, Source
from bfpo.core.errors import ConfigError
from bfpo.core.hub import check_repository
from bfpo.core.inputs import kind_of

__all__ = ["HELD_OUT", "data_section", "eval_section", "is_evaluated"]

HELD_OUT = "hold prompts out with data.split (held_out), and name part: test in eval_data"
_SPLIT = re.compile(r"\w+(\.\w+)*")  # without a slice, such as train[:100], or a sum, such as train+test
_ELSEWHERE = {"num_samples": "limit", "fraction": "limit", "columns": "columns", "folder": "files", "data_dir": "files"}
_USUAL = {"ds_type": "json", "ranking": True, "chat_template": "tokenizer_default"}
_SHAREGPT = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
_ALPACA = {
    **{"prompt": "instruction", "query": "input", "response": "output"},
    **{"history": "history", "system": "system", "chosen": "chosen", "rejected": "rejected"},
}
# In this order LLaMA-Factory looks where an entry's rows are (USE_MODELSCOPE_HUB and USE_OPENMIND_HUB change it).
_PLACES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")


def data_section(source: Source) -> dict[str, Any]:
    """Return the section of the data sets that the row's key names; what is left to do is noted.

    Raises `ConfigError` for a table of data sets that cannot be read.
    """
    key, found = source.ours, list(_DATA[source.library](source))
    if not found:
        source.to_do.append(f"{key}.files: the file names none; give .jsonl, .csv or .parquet files, or hub")
        return {"files": FILL_IN}
    if len(found) > 1 and any("hub" in one for one in found):
        names = [[one.get("hub"), one.get("subset"), *one.get("files", [])] for one in found[1:]]
        others = ", ".join(" ".join(filter(None, each)) for each in names)
        source.to_do.append(
            f"{key}: left out {others}; a section takes one data set of the hub, or files: download them (hf download "
            "ORG/NAME --repo-type dataset) and join all by bfpo prepare"
        )
        found = found[:1]
    if "hub" in found[0]:
        source.notes.append(f"{found[0]['hub']} is no path here, and so a data set of the hub")
        return found[0]
    files = [file for one in found for file in one.pop("files")]
    for file in files:
        if file != FILL_IN and not Path(file).exists() and not any(character in file for character in "*?["):
            source.to_do.append(f"{key}.files: {file} is not here; name its file or folder on this disk")
    same = all(one == found[0] for one in found)
    if not same:
        source.to_do.append(f"{key}: the sets have different forms, which one section cannot have; see bfpo prepare")
    return {"files": files[0] if len(files) == 1 else files, **(found[0] if same else {})}


def eval_section(source: Source) -> dict[str, Any] | None:
    """Return the section of the held-out rows, `None` without any."""
    if is_evaluated(source):
        return data_section(source)
    source.flag("dataset_test_split", HELD_OUT)
    return None


def is_evaluated(source: Source) -> bool:
    """Return whether the file names rows to evaluate on."""
    values = source.values
    if source.library == "trl":
        evaluates = values.get("eval_strategy") not in NOTHING and not values.get("datasets")
        return evaluates and _on_hub(str(values.get("dataset_name")))
    return bool(values.get("test_datasets") or values.get("eval_dataset"))


def _on_hub(name: str) -> bool:
    """Return whether a name is ORG/NAME and neither a path here nor that of a file elsewhere."""
    try:
        return kind_of(check_repository(name)) is None and not Path(name).exists()
    except ValueError:
        return False


def _place(
    source: Source, name: str, given: Mapping[str, tuple[str, Any]], files: Sequence[str] = ()
) -> dict[str, Any]:
    """Return where the rows are: on the hub, or files; `given`: our key -> theirs and its value, of the hub only."""
    section: dict[str, Any] = {"files": list(files) or [name]}
    if on_hub := _on_hub(name):
        section = {"hub": name, **({"files": list(files)} if files else {})}
    for ours, (theirs, value) in given.items():
        if value in NOTHING:
            continue
        if not on_hub or (files and ours in ("hub_split", "subset")):
            if (ours, value) != ("hub_split", "train"):
                where = "where files name the files of data.hub" if on_hub else "without data.hub"
                source.lost[theirs] = f"data.{ours} is not read {where}"
        elif ours == "hub_split" and not _SPLIT.fullmatch(str(value)):
            section[ours] = re.split(r"[\[+]", str(value))[0]
            source.lost[theirs] = (
                f"got {value!r}; here all of {section[ours]} is read: data.limit draws rows, data.split (held_out) "
                "holds prompts out"
            )
        else:
            section[ours] = value
    return section


def _files(item: Mapping[str, Any]) -> list[str]:
    """Return the files of an entry, of several splits those of the one it asks for."""
    files = item.get("data_files")
    named = files.get(item.get("split") or "train", list(files.values())) if isinstance(files, dict) else files
    named = [named] if isinstance(named, str) else named or []
    return [str(file) for one in named for file in (one if isinstance(one, list) else [one])]


def _entry(source: Source, item: Mapping[str, Any], key: str, default: str | None = None) -> Iterator[dict[str, Any]]:
    """Return where the rows of an entry of `datasets` are, by subset; `default`: the split of one that names none."""
    files, names, split = _files(item), item.get("name"), item.get("split")
    if files:  # which are all of one split, or were chosen by it
        default, split = None, None if isinstance(item["data_files"], dict) else split
    for name in names if isinstance(names, list) else [names]:
        given = {
            "hub_split": (f"{key}: split", split),
            "subset": (f"{key}: name", name),
            "revision": (f"{key}: revision", item.get("revision")),
            "streaming": ("streaming", source.values.get("streaming")),
        }
        place = _place(source, str(item.get("path")), given, files)
        yield {"hub_split": default, **place} if default and "hub" in place else place
        if "subset" not in place:
            break


def _unread(source: Source, place: str, entry: Mapping[str, Any], read: set[str]) -> None:
    """Note the keys of a data set that are not carried over."""
    for key, value in entry.items():
        if key not in read and value not in NOTHING and value != _USUAL.get(key):
            here = f"data.{_ELSEWHERE[key]} says it here" if key in _ELSEWHERE else "see data.layout and data.columns"
            source.lost[f"{place}: {key}"] = f"not read; {here}"


_OF_ENTRY = {"path", "data_files", "split", "name", "revision"}


def _trl_data(source: Source) -> Iterator[dict[str, Any]]:
    values, name = source.values, source.values.get("dataset_name")
    for item in _mappings(source.path, "datasets", values.get("datasets")):
        _unread(source, "datasets", item, _OF_ENTRY)
        yield from _entry(source, item, "datasets")
    keys = {
        "hub_split": "dataset_test_split" if source.ours == "eval_data" else "dataset_train_split",
        "subset": "dataset_config",
        "streaming": "dataset_streaming",
    }
    if values.get("datasets"):
        for key in ("dataset_name", *keys.values()):
            source.flag(key, "TRL does not read it beside datasets")
    elif name:
        source.flag("streaming", "TRL reads it beside datasets only; dataset_streaming is that of dataset_name")
        given = {ours: (key, values.get(key, source.defaults.get(key))) for ours, key in keys.items()}
        yield _place(source, str(name), given)


def _axolotl_data(source: Source) -> Iterator[dict[str, Any]]:
    key = source.keys()[0]
    # Of a data set without a split, preference training takes train, and SFT the part that the key names.
    split = "test" if key == "test_datasets" and source.stage == "sft" else None
    for item in _mappings(source.path, key, source.one()):
        given = item.get("type")
        kind = given if isinstance(given, str) else ""
        messages = item.get("field_messages", "messages")
        form: dict[str, Any] = {}
        columns: dict[str, str] = {}
        if kind.startswith("chat_template") and source.stage == "train":
            columns = {
                "messages": messages,
                "chosen": item.get("field_chosen", "chosen"),
                "rejected": item.get("field_rejected", "rejected"),
            }
            form["layout"] = "messages"
        elif kind.startswith("chat_template"):
            columns = {"messages": messages}
            form["layout"] = "completions"
        elif kind:
            source.notes.append(f"type {kind}: the layout is found from the columns")
        form |= _renamed(columns)
        read = {*_OF_ENTRY, "ds_type", *(f"field_{name}" for name in columns), *(["type"] if kind else [])}
        _unread(source, key, item, read)
        for place in _entry(source, item, key, split):
            yield {**place, **form}


def _llama_factory_data(source: Source) -> Iterator[dict[str, Any]]:
    given = source.one() or []
    names = given if isinstance(given, list) else [one.strip() for one in str(given).split(",")]
    folder = str(source.values.get("dataset_dir") or "data")
    table = next(
        (one for one in (Path(folder), source.path.parent / folder) if (one / "dataset_info.json").is_file()), None
    )
    entries = {} if table is None else _read_table(table / "dataset_info.json")
    for name in map(str, names):
        entry: Any = {"hf_hub_url": name} if folder == "ONLINE" else entries.get(name)
        if table is not None and name in entries:
            (entry,) = _mappings(table / "dataset_info.json", name, [entry])
            _mappings(table / "dataset_info.json", f"{name}: columns", [entry.get("columns", {})])
        if entry is None:
            source.to_do.append(
                f"{source.ours}.files: {name} is an entry of {folder}/dataset_info.json, which is not here"
            )
            yield {"files": [name]}
            continue
        sharegpt = entry.get("formatting", "alpaca") != "alpaca"
        layouts = ("sharegpt", "conversations") if sharegpt else ("alpaca_pairs", "alpaca")
        known = _SHAREGPT if sharegpt else _ALPACA
        columns = {known[key]: value for key, value in entry.get("columns", {}).items() if key in known}
        _unread(source, name, entry, {*_PLACES, "split", "subset", "formatting", "columns"})
        _unread(source, f"{name}: columns", entry.get("columns", {}), set(known))
        form = {"layout": layouts[source.stage == "sft"], **_renamed(columns)}
        yield {**_place_of_entry(source, name, entry, table or Path()), **form}


def _mappings(path: Path, key: str, value: Any) -> list[Mapping[str, Any]]:
    """Return the entries of a list of mappings; raises `ConfigError` for anything else."""
    items = value or []
    for item in items if isinstance(items, list) else [items]:
        if not isinstance(item, Mapping) or item is items:
            raise ConfigError(f"{path}: {key}: got {item!r}; a list of mappings is needed to convert it")
    return list(items)


def _place_of_entry(source: Source, name: str, entry: Mapping[str, Any], table: Path) -> dict[str, Any]:
    first, *others = [key for key in _PLACES if key in entry] or ["file_name"]
    for key in others:
        source.lost[f"{name}: {key}"] = f"LLaMA-Factory reads {first} in its place"
    where = str(entry.get(first) or name)
    if first not in ("hf_hub_url", "file_name"):
        source.to_do.append(
            f"{source.ours}.files: {name} has its rows by {first}, {where}, which bfpo does not read; name files"
        )
        return {"files": [FILL_IN]}
    given = {
        "hub_split": (f"{name}: split", entry.get("split")),
        "subset": (f"{name}: subset", entry.get("subset")),
        "streaming": ("streaming", source.values.get("streaming")),
    }
    return _place(source, where, given) if first == "hf_hub_url" else _place(source, "", given, [str(table / where)])


def _read_table(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); correct it") from error
    return found if isinstance(found, dict) else {}


def _renamed(columns: Mapping[str, str]) -> dict[str, Any]:
    other = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return {"columns": other} if other else {}


_DATA: dict[Library, Callable[[Source], Iterator[dict[str, Any]]]] = {
    "trl": _trl_data,
    "axolotl": _axolotl_data,
    "llama_factory": _llama_factory_data,
}
