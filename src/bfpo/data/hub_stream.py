"""Files of data sets on the hub, read by ranges over the network as they are needed, without a copy on this disk."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from io import SEEK_CUR, SEEK_END, SEEK_SET, BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, cast

from bfpo.core.errors import DataError, ServerError
from bfpo.core.hub import is_lost
from bfpo.core.remote import file_name
from bfpo.data.sources import hub_failure, hub_reason

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["names_on_hub", "open_lines", "open_packed", "open_table", "remote_facts"]

_FIRST_BYTES = 1 << 18  # of a file that is read from its beginning: enough to find its layout
_MOST_BYTES = 1 << 23
_READ_BYTES = 1 << 16
_SECONDS = 30.0  # between two lines of progress
_log = logging.getLogger(__name__)


def names_on_hub(hub_id: str, commit: str) -> list[str]:
    """Return the paths of all files of a data set at a commit, sorted.

    Raises as `hub_failure` if the hub cannot be asked.
    """
    from huggingface_hub import HfFileSystem

    root = f"datasets/{hub_id}@{commit}"
    try:
        found = HfFileSystem().find(root)
    except Exception as error:  # also of its HTTP client, which differs between versions
        raise hub_failure(error, hub_id, commit, "read") from error
    return [str(name).removeprefix(f"{root}/") for name in found]


def remote_facts(path: str | Path) -> dict[str, Any]:
    """Return what the hub says of the content of a file, which is not read: its digest and its size in bytes.

    The digest is the SHA-256 of large files, and of others, which git keeps, the SHA-1 of their git object. Raises
    `DataError` if the hub cannot be asked, `ServerError` if it is lost.
    """
    from huggingface_hub import HfFileSystem

    name = file_name(path)
    try:
        about = HfFileSystem().info(name)
    except Exception as error:
        kind = ServerError if is_lost(error) else DataError
        raise kind(f"{name}: the hub cannot be asked: {hub_reason(error, _hub_id(name))}") from error
    large = about.get("lfs")
    digest = {"git_sha1": about["blob_id"]} if large is None else {"sha256": large["sha256"]}
    return {**digest, "bytes": about["size"]}


def open_lines(path: str | Path) -> BinaryIO:
    """Open a file to be read from its beginning on, by ranges that grow while it is; raises as `_HubFile`."""
    return cast(BinaryIO, BufferedReader(_HubFile(file_name(path), ahead=_FIRST_BYTES), _READ_BYTES))


def open_packed(path: str | Path) -> BinaryIO:
    """Open a file likewise for a decompressor: a read gives what is at hand, no more; raises as `_HubFile`."""
    return cast(BinaryIO, _HubFile(file_name(path), ahead=_FIRST_BYTES))


def open_table(path: str | Path) -> BinaryIO:
    """Open a file of which a reader takes what it needs, each time by one request; raises as `_HubFile`."""
    return cast(BinaryIO, _HubFile(file_name(path), ahead=0))


def _hub_id(name: str) -> str:
    return name.removeprefix("hf://datasets/").partition("@")[0]


@lru_cache(maxsize=4)
def _first_bytes(endpoint: str, name: str, num: int) -> bytes:
    """Return the beginning of a file, which finding its layout and reading it share; it is the same at a commit."""
    from huggingface_hub import HfFileSystem

    del endpoint  # only tells hubs apart
    with HfFileSystem().open(name, "rb", cache_type="none") as file:
        return bytes(file.read(num))


class _HubFile(RawIOBase):
    """A file on the hub; `ahead`: bytes asked for beyond what is read, doubled while it is read in order, or 0.

    Raises `OSError` if it cannot be read, and `ServerError` if the hub is lost; `huggingface_hub` tries again before.
    """

    _said: ClassVar[float] = time.monotonic()

    def __init__(self, name: str, *, ahead: int) -> None:
        from huggingface_hub import HfFileSystem

        self._name, self._ahead = name, ahead
        self._place, self._start, self._held = 0, 0, b""
        try:
            hub = HfFileSystem()
            self._file = hub.open(name, "rb", cache_type="none")
            self._size = int(self._file.size)
            if ahead and self._size:
                self._held = _first_bytes(hub.endpoint, name, min(ahead, self._size))
        except Exception as error:
            raise self._failure(error) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._place = max(0, offset + {SEEK_SET: 0, SEEK_CUR: self._place, SEEK_END: self._size}[whence])
        return self._place

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._size - self._place)
        if wanted <= 0:
            return 0
        if not self._start <= self._place < self._start + len(self._held):
            self._fetch(wanted)
        first = self._place - self._start
        part = self._held[first : first + wanted]
        view[: len(part)] = part
        self._place += len(part)
        return len(part)

    def _fetch(self, wanted: int) -> None:
        if self._place == self._start + len(self._held):
            self._ahead = min(2 * self._ahead, _MOST_BYTES)
        num = min(self._ahead or wanted, self._size - self._place)
        self._held = b""
        try:
            self._file.seek(self._place)
            self._held, self._start = bytes(self._file.read(num)), self._place
        except Exception as error:
            raise self._failure(error) from error
        if len(self._held) != num:
            raise self._lost(f"the hub sent {len(self._held)} of {num} bytes")
        self._say()

    def _failure(self, error: Exception) -> OSError | ServerError:
        reason = hub_reason(error, _hub_id(self._name))
        return self._lost(reason) if is_lost(error) else OSError(reason)

    def _lost(self, reason: str) -> ServerError:
        return ServerError(f"{self._name}: cannot be read to its end: {reason}; check the network and try again later")

    def _say(self) -> None:
        if time.monotonic() - _HubFile._said >= _SECONDS:
            _HubFile._said = time.monotonic()
            millions = [number / 1e6 for number in (self._place, self._size)]
            _log.info("reading %s: at %.0f of %.0f MB", self._name, *millions)
