"""STAGE: the whole way on the closed world: data, SFT, every method from one start, answers, verdicts, the page."""

from __future__ import annotations

from bfpo.sandbox.demo.stage import preview, run

__all__ = ["preview", "run"]
