"""The rows that were left out or stand out, for the lists of a run; none is held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bfpo.preparation.mixture import Mixed

__all__ = ["contaminated_rows", "contradictory_rows", "rejected_rows"]


def rejected_rows(mixed: Mixed) -> Iterator[dict[str, Any]]:
    """Yield the rows that could not be read, each with its source and place."""
    for part in mixed.parts:
        for row in part.shard.rejects:
            yield {"stream": part.policy.stream, "source": part.policy.name, **row}


def contaminated_rows(mixed: Mixed) -> Iterator[dict[str, Any]]:
    """Yield the rows that ask an evaluation prompt, once for each suite."""
    for part in mixed.parts:
        for row in part.shard.hits:
            yield {"stream": part.policy.stream, "source": part.policy.name, **row}


def contradictory_rows(mixed: Mixed) -> Iterator[dict[str, Any]]:
    """Yield the pairs that hold a completion which is labelled both safe and unsafe."""
    pair_parts = [part for part in mixed.parts if part.policy.stream != "sft"]
    for part, found in zip(pair_parts, mixed.contradictory, strict=True):
        start = 0
        for batch in part.shard.batches():
            places = np.flatnonzero(found[start : start + len(batch)])
            start += len(batch)
            for row in batch.take(places).to_pylist():
                labels = {name: row[name] for name in ("id", "chosen_is_safe", "rejected_is_safe")}
                yield {"stream": part.policy.stream, "source": part.policy.name, **labels}
