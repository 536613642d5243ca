"""Settings that make an experiment on the closed world small enough for a test; its numbers mean nothing."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "executor": {"workers": 2},
    "world": {
        "sft_completions": 60,
        "main_pairs": 30,
        "buffer_pairs": 30,
        "held_out_pairs": 12,
        "held_out_prompts": 24,
    },
    "model": {"hidden_size": 16, "intermediate_size": 16},
    "sft": {"steps": 2, "completions_per_step": 8},
    "align": {"steps": 2, "pairs_per_step": 4},
}
