"""How many CPU threads torch takes; torch is imported only where a number is given."""

from __future__ import annotations

__all__ = ["use_threads"]


def use_threads(threads: int | None) -> None:
    """Set the CPU threads of torch, where a number is given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
