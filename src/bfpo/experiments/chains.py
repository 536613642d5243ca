"""What an experiment is made of: stages in a row, and rows that wait for one another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bfpo.config import StageConfig

__all__ = ["Chain", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of a chain; `out` is its run folder."""

    stage: str
    config: StageConfig
    out: Path


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Stages that run one after another in one process; `needs` names what must have ended before, of the same seed.

    `memory` is an estimate in bytes, 0 where nobody keeps account.
    """

    name: str
    seed: int
    steps: tuple[Step, ...]
    needs: tuple[str, ...] = ()
    memory: int = 0

    @property
    def title(self) -> str:
        """Return how the chain is called in progress lines."""
        return f"seed {self.seed} {self.name}"
