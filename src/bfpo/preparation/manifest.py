"""The manifest of prepared data: from what, how and with which code it was made, and the hash of every file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bfpo._version import __version__
from bfpo.core.files import file_digest
from bfpo.preparation.shards import SHARD_VERSION

__all__ = ["FORMAT", "deciding_versions", "make_manifest", "output_facts"]

FORMAT = 1
_PACKAGES = ("numpy", "pyarrow", "rensa", "scipy")


def deciding_versions() -> dict[str, str]:
    """Return the versions of the code that decides the bytes of the output."""
    return {
        "bfpo": __version__,
        "rows": str(SHARD_VERSION),
        **{package: metadata.version(package) for package in _PACKAGES},
    }


def output_facts(folder: Path, files: Iterable[Path], rows: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return hash, size and rows of each file by its path in the folder."""
    return {
        file.relative_to(folder).as_posix(): {
            "sha256": file_digest(file),
            "bytes": file.stat().st_size,
            "rows": rows[file.stem],
        }
        for file in files
    }


def make_manifest(
    *,
    settings: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    suites: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the manifest; nothing in it depends on time, place of the output, or the number of processes."""
    return {
        "format": FORMAT,
        "made_by": "bfpo prepare",
        "versions": deciding_versions(),
        "settings": dict(settings),
        "sources": list(sources),
        "decontaminated": dict(suites),
        "files": dict(outputs),
    }
