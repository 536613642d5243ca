"""Reference log-probs on disk: one folder per model key, in it shards that carry their own proof."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bfpo.core.files import write_bytes_whole, write_text_whole
from bfpo.policy.reference.keys import LOGPS_VERSION, ROW_KEY_BYTES

__all__ = ["ReferenceCache"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_SCHEMA = pa.schema(
    [("row_key", pa.binary(ROW_KEY_BYTES)), ("chosen_logps", pa.float64()), ("rejected_logps", pa.float64())]
)

Logps = npt.NDArray[np.float64]


class ReferenceCache:
    """The cached rows of one model: summed log-probs in nats (float64) by row key.

    `root/<model key>/` holds shards `rows-<SHA-256>.parquet` (row key, chosen, rejected), each with a manifest
    `rows-<SHA-256>.json` beside it: checksum, number of rows, model key and, for people, `facts`. A shard is written
    once and never changed, so runs that write at the same time lose nothing, and the manifest comes first, so a run
    that is killed between the two leaves nothing that looks broken.
    """

    def __init__(
        self, root: str | Path, model_key: str, facts: Mapping[str, Any] | None = None, *, read_only: bool = False
    ) -> None:
        self.folder = Path(root) / model_key
        self._model_key = model_key
        self._facts = dict(facts or {})
        self._read_only = read_only

    def find(self, keys: Sequence[bytes]) -> Logps:
        """Return the log-probs of these rows, (K, 2): chosen and rejected; NaN for a row that is not here.

        A shard that is torn, changed, without a manifest or of another model is set aside under `.bad` (but in a
        read-only cache) and named in one warning; its rows count as not here.
        """
        found = np.full((len(keys), 2), np.nan)
        places = {key: place for place, key in enumerate(keys)}
        bad: list[str] = []
        for path in sorted(self.folder.glob("rows-*.parquet")):
            try:
                table = self._read(path)
            except FileNotFoundError:  # another run has just set it aside
                continue
            except (OSError, ValueError) as error:
                bad.append(f"{path.name} ({error})")
                with suppress(OSError):
                    if not self._read_only:
                        path.replace(path.with_suffix(".bad"))
                continue
            values = np.stack([table[name].to_numpy() for name in _SCHEMA.names[1:]], axis=1)
            wanted = [(places[key], row) for row, key in enumerate(table["row_key"].to_pylist()) if key in places]
            if wanted:
                here, there = np.array(wanted).T
                found[here] = values[there]
        if bad:
            logger.warning(
                "reference cache: %d of the files in %s cannot be trusted; their rows %s computed again: %s",
                len(bad),
                self.folder,
                "would be" if self._read_only else "are",
                "; ".join(bad),
            )
        return found

    def _read(self, path: Path) -> pa.Table:
        """Return the rows of a shard; raises `ValueError` where its manifest or its content is not what it must be."""
        content = path.read_bytes()
        manifest = _read_manifest(path.with_suffix(".json"))
        if manifest.get("model_key") != self._model_key:
            raise ValueError(f"belongs to the model {manifest.get('model_key')}")
        if hashlib.sha256(content).hexdigest() != manifest.get("sha256"):
            raise ValueError("torn or changed: its checksum is not that of the manifest")
        if manifest.get("format") != _FORMAT or manifest.get("logps_version") != LOGPS_VERSION:
            raise ValueError("written by another version")
        try:
            table = pq.read_table(io.BytesIO(content))
        except pa.ArrowException as error:
            raise ValueError(f"not a Parquet file: {error}") from error
        if not table.schema.equals(_SCHEMA) or table.num_rows != manifest.get("rows"):
            raise ValueError("holds other columns or another number of rows than its manifest says")
        return table

    def write(self, keys: Sequence[bytes], logps: Logps) -> None:
        """Add rows as one shard: `logps` (K, 2), chosen and rejected. Raises `OSError` where it cannot be written."""
        assert not self._read_only
        if not len(keys):
            return
        columns = [pa.array(list(keys), _SCHEMA.types[0]), pa.array(logps[:, 0]), pa.array(logps[:, 1])]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), buffer)
        content = buffer.getvalue()
        checksum = hashlib.sha256(content).hexdigest()
        manifest = {
            "format": _FORMAT,
            "model_key": self._model_key,
            "sha256": checksum,
            "rows": len(keys),
            "logps_version": LOGPS_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self._facts,
        }
        path = self.folder / f"rows-{checksum[:32]}.parquet"
        write_text_whole(path.with_suffix(".json"), json.dumps(manifest, indent=2) + "\n")
        write_bytes_whole(path, content)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError("has no manifest") from error
    except ValueError as error:  # not JSON, or not text
        raise ValueError("its manifest is not JSON") from error
    if not isinstance(manifest, dict):
        raise ValueError("its manifest is not a JSON object")
    return manifest
