"""Reference log-probs on disk: one folder per model key, with shards that carry their own checksums."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bfpo.core.errors import ModelError
from bfpo.core.files import write_bytes_whole, write_text_whole
from bfpo.policy.logps import unwrap_causal_lm

if TYPE_CHECKING:
    from bfpo.data.tokenize import TokenPair

__all__ = ["LOGPS_VERSION", "ReferenceCache", "describe_tensors", "model_key", "row_key"]

logger = logging.getLogger(__name__)

Logps = npt.NDArray[np.float64]

LOGPS_VERSION = 1
"""Increase it whenever `bfpo.policy.logps` gives other numbers for the same tokens and weights."""

_ROW_KEY_BYTES = 16

# Keys of a config that do not change log-probs; a key that is not known to be harmless counts.
_CONFIG_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "architectures",
        "attn_implementation",
        "dtype",  # read from the tensors themselves
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
# Parts of parameter names that PEFT (the first three) and torch.compile put around a model's own.
_WRAPPER_PARTS = frozenset({"base_layer", "original_module", "token_adapter", "_orig_mod"})

_FORMAT = 1


@cache
def _schema() -> Any:
    """Return the columns of a shard. pyarrow is imported where a shard is: a pass without a cache does not need it."""
    import pyarrow as pa

    return pa.schema(
        [("row_key", pa.binary(_ROW_KEY_BYTES)), ("chosen_logps", pa.float64()), ("rejected_logps", pa.float64())]
    )


def row_key(pair: TokenPair) -> bytes:
    """Return the digest of a pair's token ids as they are after truncation, boundaries included; 16 bytes.

    Labels and the pair's id do not count.
    """
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    digest = hashlib.blake2b(np.array([len(ids) for ids in parts], "<i8").tobytes(), digest_size=_ROW_KEY_BYTES)
    for ids in parts:
        digest.update(np.ascontiguousarray(ids, "<i4").tobytes())
    return digest.digest()


def model_key(model: nn.Module, *, mixed_precision: str = "no") -> str:
    """Return the digest of all that determines a model's log-probs besides the tokens, adapter off; 32 hex digits.

    Counted: name, shape, dtype and bytes of every parameter and persistent buffer, the config without names, versions
    and performance settings, the model's class, `mixed_precision` (as accelerate names it: "no", "bf16" or "fp16"), the
    precision of float32 products, the reduction (sums) and `LOGPS_VERSION`. An adapter is left out and a PEFT model has
    the key of its bare base. Learning rate, seed and length limits never count.

    Raises `ModelError` if the content cannot be read: parameters on the meta device, sharded or partitioned over
    processes, of a kind without plain bytes, or changed by a merged adapter.
    """
    base: Any = unwrap_causal_lm(model)
    tensors = dict(_own_tensors(base, adapted=hasattr(model, "disable_adapter")))
    config = base.config.to_dict() if hasattr(base, "config") else {}
    facts = {
        "class": type(getattr(base, "_orig_mod", base)).__name__,
        "config": _with_effect(config),
        "mixed_precision": mixed_precision,
        "matmul_precision": _matmul_precision(),
        "reduction": "sum",
        "logps_version": LOGPS_VERSION,
        "tensors": describe_tensors(tensors),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def _own_tensors(base: nn.Module, *, adapted: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield name and content of the base model's tensors, by the names that they have without an adapter."""
    for name, parameter in base.named_parameters():
        # ds_id: DeepSpeed's ZeRO-3 leaves an empty tensor in each process
        if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
            raise ModelError(f"the parameter {name} is on the meta device or partitioned over processes")
    adapter = tuple(_adapter_prefixes(base)) if adapted else ()
    for name, value in base.state_dict().items():
        if not isinstance(value, Tensor) or (adapter and name.startswith(adapter)):
            continue
        yield ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS), value


def _adapter_prefixes(base: nn.Module) -> Iterator[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in base.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if getattr(module, "merged", False):
            raise ModelError(f"an adapter is merged into {name}")
        prefix = f"{name}." if name else ""
        yield from (prefix + layer for layer in (*module.adapter_layer_names, *module.other_param_names))


def describe_tensors(tensors: Mapping[str, Tensor]) -> list[tuple[str, list[int], str, str]]:
    """Return name, shape, dtype and digest of each tensor, by name; one shared by two names is read once."""
    names = sorted(tensors)
    distinct: dict[tuple[Any, ...], Tensor] = {_identity(tensors[name]): tensors[name] for name in names}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        digests = dict(zip(distinct, pool.map(_tensor_digest, distinct.values()), strict=True))
    return [
        (name, list(tensors[name].shape), str(tensors[name].dtype), digests[_identity(tensors[name])]) for name in names
    ]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    try:
        return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()
    except (RuntimeError, NotImplementedError) as error:
        raise _no_plain_bytes(tensor) from error


def _tensor_digest(tensor: Tensor) -> str:
    try:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise _no_plain_bytes(tensor) from error
    return hashlib.sha256(content.data).hexdigest()


def _no_plain_bytes(tensor: Tensor) -> ModelError:
    return ModelError(f"a parameter of the kind {type(tensor).__name__} ({tensor.dtype}) has no plain bytes")


def _with_effect(config: Any) -> Any:
    """Return a config without the keys that do not change log-probs, in its sections too."""
    if isinstance(config, Mapping):
        return {str(key): _with_effect(value) for key, value in config.items() if key not in _CONFIG_WITHOUT_EFFECT}
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [_with_effect(value) for value in config]
    return config


def _matmul_precision() -> str:
    """Return how float32 products are computed: TF32 changes a log-prob by far more than rounding does."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer interface, which the older one then refuses to read
        return str(torch.backends.cuda.matmul.fp32_precision)


# Shards on disk


class ReferenceCache:
    """The cached rows of one model: summed log-probs in nats (float64) by row key.

    `root/<model key>/` holds shards `rows-<SHA-256>.parquet` (row key, chosen, rejected), each with a manifest
    `rows-<SHA-256>.json` next to it: checksum, number of rows, model key and, for people, `facts`. A shard is written
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
        """Return the log-probs of these rows, (K, 2): chosen and rejected; NaN for a missing row.

        A shard that is damaged, without a manifest or of another model is renamed to `.bad` (not in a read-only cache)
        and named in one warning; its rows count as missing.
        """
        found = np.full((len(keys), 2), np.nan)
        places = {key: place for place, key in enumerate(keys)}
        bad: list[str] = []
        for path in sorted(self.folder.glob("rows-*.parquet")):
            try:
                table = self._read(path)
            except FileNotFoundError:  # another run has just renamed it
                continue
            except (OSError, ValueError) as error:
                bad.append(f"{path.name} ({error})")
                with suppress(OSError):
                    if not self._read_only:
                        path.replace(path.with_suffix(".bad"))
                continue
            values = np.stack([table[name].to_numpy() for name in _schema().names[1:]], axis=1)
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

    def _read(self, path: Path) -> Any:
        """Return the rows of a shard; raises `ValueError` if its manifest or its content is not valid."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = path.read_bytes()
        manifest = _read_manifest(path.with_suffix(".json"))
        if manifest.get("model_key") != self._model_key:
            raise ValueError(f"belongs to the model {manifest.get('model_key')}")
        if hashlib.sha256(content).hexdigest() != manifest.get("sha256"):
            raise ValueError("damaged: its checksum differs from that of the manifest")
        if manifest.get("format") != _FORMAT or manifest.get("logps_version") != LOGPS_VERSION:
            raise ValueError("written by another version")
        try:
            table = pq.read_table(io.BytesIO(content))
        except pa.ArrowException as error:
            raise ValueError(f"not a Parquet file: {error}") from error
        if not table.schema.equals(_schema()) or table.num_rows != manifest.get("rows"):
            raise ValueError("holds other columns or another number of rows than its manifest says")
        return table

    def write(self, keys: Sequence[bytes], logps: Logps) -> None:
        """Add rows as one shard: `logps` (K, 2), chosen and rejected. Raises `OSError` if it cannot be written."""
        assert not self._read_only
        if not len(keys):
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.array(list(keys), _schema().types[0]), pa.array(logps[:, 0]), pa.array(logps[:, 1])]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(columns, schema=_schema()), buffer)
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
