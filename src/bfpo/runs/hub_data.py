"""Sections of data that name a data set of the hub -> the same sections with its files, on this machine or the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from bfpo.core.errors import DataError, ServerError
from bfpo.core.remote import file_name, is_remote
from bfpo.core.settings import ConfigPart
from bfpo.data.hub_files import HubFiles, find_hub_files
from bfpo.data.settings import ON_HUB, RowsConfig

__all__ = ["files_of_record", "with_hub_files"]

_log = logging.getLogger(__name__)

Part = TypeVar("Part", bound=ConfigPart)


def with_hub_files(
    config: Part, commits: Mapping[str, str] | None = None, streamed: Mapping[str, HubFiles] | None = None
) -> tuple[Part, dict[str, HubFiles]]:
    """Return the config with `files` in place of each `hub`, and what was found, by the section's key.

    By the same keys, `commits` are those that a run began with, which are read again wherever the branch is now, and
    `streamed` the files of such a run on the hub, which is then not asked.
    Raises as `find_hub_files` does, with the key.
    """
    found: dict[str, HubFiles] = {}
    return _replaced(config, "", commits or {}, streamed or {}, found), found


def files_of_record(record: Mapping[str, Any]) -> dict[str, HubFiles]:
    """Return the files on the hub that a run has recorded, by the section's key."""
    found = {}
    for name, commit in record.get("hub_data", {}).items():
        files = tuple(Path(file) for file in record.get("data", {}).get(name, {}) if is_remote(file))
        for source in record.get("sources", {}).get(name, [])[:1]:
            found[name] = HubFiles(source["hub_id"], files, commit, source["licence"])
    return {name: files for name, files in found.items() if files.files}


def _replaced(
    part: Part, prefix: str, commits: Mapping[str, str], streamed: Mapping[str, HubFiles], found: dict[str, HubFiles]
) -> Part:
    changes: dict[str, Any] = {}
    for key in type(part).model_fields:
        value = getattr(part, key)
        name = f"{prefix}{key}"
        if isinstance(value, RowsConfig) and value.hub is not None:
            files = streamed.get(name) or _find(value, name, commits.get(name))
            found[name] = files
            changes[key] = value.model_copy(
                update={**dict.fromkeys(ON_HUB), "files": [file_name(file) for file in files.files]}
            )
        elif isinstance(value, ConfigPart):
            new = _replaced(value, f"{name}.", commits, streamed, found)
            if new is not value:
                changes[key] = new
    return part.model_copy(update=changes) if changes else part


def _find(data: RowsConfig, name: str, commit: str | None) -> HubFiles:
    assert data.hub is not None  # the only caller asks
    try:
        found = find_hub_files(
            data.hub,
            revision=commit or data.revision,
            subset=data.subset,
            split=data.hub_split,
            patterns=data.files,
            streaming=data.streaming,
        )
    except (DataError, ServerError) as error:
        raise type(error)(f"{name}.hub: {error}") from error
    num = len(found.files)
    count = "1 file" if num == 1 else f"{num} files"
    where = "read over the network" if data.streaming else "in the hub's cache"
    _log.info("%s: %s at %s, %s %s", name, data.hub, found.commit[:12], count, where)
    if data.streaming and data.limit is not None:
        _log.info("%s: streaming: limit takes the first %s rows that can be used, and draws none", name, data.limit)
    return found
