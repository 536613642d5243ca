"""Bi-Factorial Preference Optimization: align language models to be helpful and safe with one supervised loss.

The public names below are imported on first use, so that `import bfpo` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bfpo._version import __version__
from bfpo.core.lazy import imported_on_use

if TYPE_CHECKING:
    from bfpo.config import load_config
    from bfpo.core.errors import BfpoError
    from bfpo.core.schema import Comparison, Completion, Message, Pair, Prompt, Score, Verdict
    from bfpo.data.prompts import read_prompts
    from bfpo.data.read import read_completions, read_pairs
    from bfpo.data.write import write_completions, write_pairs
    from bfpo.objective.losses import anchor, bfpo_target, loss_at_start, preference_loss
    from bfpo.objective.methods import BFPO, METHODS, Method, PairLoss
    from bfpo.policy.load import Policy, load_policy
    from bfpo.runs.stages import run_stage
    from bfpo.training.trainer import BFPOConfig, BFPOTrainer

__all__ = [
    "BFPO",
    "METHODS",
    "BFPOConfig",
    "BFPOTrainer",
    "BfpoError",
    "Comparison",
    "Completion",
    "Message",
    "Method",
    "Pair",
    "PairLoss",
    "Policy",
    "Prompt",
    "Score",
    "Verdict",
    "__version__",
    "anchor",
    "bfpo_target",
    "load_config",
    "load_policy",
    "loss_at_start",
    "preference_loss",
    "read_completions",
    "read_pairs",
    "read_prompts",
    "run_stage",
    "write_completions",
    "write_pairs",
]

_HOMES = {
    "bfpo.config": ("load_config",),
    "bfpo.data.prompts": ("read_prompts",),
    "bfpo.data.read": ("read_completions", "read_pairs"),
    "bfpo.data.write": ("write_completions", "write_pairs"),
    "bfpo.core.errors": ("BfpoError",),
    "bfpo.objective.losses": ("anchor", "bfpo_target", "loss_at_start", "preference_loss"),
    "bfpo.objective.methods": ("BFPO", "METHODS", "Method", "PairLoss"),
    "bfpo.policy.load": ("Policy", "load_policy"),
    "bfpo.core.schema": ("Comparison", "Completion", "Message", "Pair", "Prompt", "Score", "Verdict"),
    "bfpo.runs.stages": ("run_stage",),
    "bfpo.training.trainer": ("BFPOConfig", "BFPOTrainer"),
}
__getattr__ = imported_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
