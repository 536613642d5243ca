"""Which run a model is from: by the digest of that run, by its folder, or by the end of a path that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from bfpo.core.provenance import run_above, run_digest
from bfpo.report.read import Run, named_parts, resolve

__all__ = ["Place", "place_of_model", "place_of_run", "run_at"]


@dataclass(frozen=True, slots=True)
class Place:
    """A run, or a model in none: the run's digest, its folder, the path up to a telling name; empty if unknown.

    `inside`: the path of a model in that folder, such as `model` or `checkpoints/checkpoint-10`; `None` if unknown.
    """

    digest: str = ""
    folder: Path | None = None
    parts: tuple[str, ...] = ()
    inside: str | None = None

    def is_same(self, other: Place) -> bool:
        """Return whether two places are one; the ends of paths count only where one of the folders is not there."""
        if None not in (self.inside, other.inside) and self.inside != other.inside:
            return False
        if self.digest and other.digest:
            return self.digest == other.digest
        if self.folder is not None and other.folder is not None:
            return self.folder == other.folder
        return self.tail(other) > 0

    def tail(self, other: Place) -> int:
        """Return how many last parts of the paths are the same."""
        pairs = zip(reversed(self.parts), reversed(other.parts), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def place_of_run(run: Run) -> Place:
    """Return the place of a run folder."""
    folder = run.path.resolve()
    return Place(run_digest(run.record), folder, named_parts(folder))


def place_of_model(path: str | None, by: Run) -> Place:
    """Return the place of a model that a run names by its path: of the run that it is in, if it is in one."""
    if not path:
        return Place()
    found = resolve(path, by)
    folder = None if found is None else (run_above(found) or found).resolve()
    inside = None if found is None or folder is None else found.resolve().relative_to(folder).as_posix()
    return Place(by.record.model_runs.get(path, ""), folder, named_parts(folder or Path(path)), inside)


def run_at(place: Place, runs: Sequence[tuple[Run, Place]]) -> Run | None:
    """Return the run of a model, out of runs with their places.

    Of several that only the end of its path could mean, the one that shares most of it; `None` if there is none, or if
    two share as much.
    """
    same = [(run, one) for run, one in runs if one.is_same(place)]
    longest = max((place.tail(one) for _, one in same), default=0)
    best = [run for run, one in same if place.tail(one) == longest]
    return best[0] if len(best) == 1 else None
