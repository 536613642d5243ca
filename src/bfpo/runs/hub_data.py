"""Sections of data that name a data set of the hub -> the same sections with its files on this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from bfpo.core.errors import DataError
from bfpo.core.settings import ConfigPart
from bfpo.data.hub_files import HubFiles, find_hub_files
from bfpo.data.settings import ON_HUB, RowsConfig

__all__ = ["with_hub_files"]

_log = logging.getLogger(__name__)

Part = TypeVar("Part", bound=ConfigPart)


def with_hub_files(config: Part, commits: Mapping[str, str] | None = None) -> tuple[Part, dict[str, HubFiles]]:
    """Return the config with `files` in place of each `hub`, and what was found, by the section's key.

    `commits`: by the same keys, the commits that a run began with, which are read again wherever the branch is now.
    Raises `DataError` as `find_hub_files` does, with the key.
    """
    found: dict[str, HubFiles] = {}
    return _replaced(config, "", commits or {}, found), found


def _replaced(part: Part, prefix: str, commits: Mapping[str, str], found: dict[str, HubFiles]) -> Part:
    changes: dict[str, Any] = {}
    for key in type(part).model_fields:
        value = getattr(part, key)
        name = f"{prefix}{key}"
        if isinstance(value, RowsConfig) and value.hub is not None:
            files = _find(value, name, commits.get(name))
            found[name] = files
            changes[key] = value.model_copy(
                update={**dict.fromkeys(ON_HUB), "files": [str(file) for file in files.files]}
            )
        elif isinstance(value, ConfigPart) and (new := _replaced(value, f"{name}.", commits, found)) is not value:
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
        )
    except DataError as error:
        raise DataError(f"{name}.hub: {error}") from error
    num = len(found.files)
    count = "1 file" if num == 1 else f"{num} files"
    _log.info("%s: %s at %s, %s in the hub's cache", name, data.hub, found.commit[:12], count)
    return found
