"""STAGE: every method on the closed world, from one start, each with its own setting chosen on validation prompts."""

from __future__ import annotations

from bfpo.sandbox.compare.stage import preview, run

__all__ = ["preview", "run"]
