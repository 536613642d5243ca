"""WORKER: parts of a training step, one at a time, as its standard input asks for them; timed in CPU seconds.

It runs with the `bfpo` of one commit and uses only what all commits compared have.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CASES", "ERROR_CASE", "Case"]

Lengths = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A forward (and backward) pass of a Llama with random weights over one packed row; `lengths` in tokens."""

    title: str
    lengths: Lengths
    hidden: int
    heads: int
    key_heads: int
    layers: int = 1
    vocabulary: int = 4096
    trains: str = "down_proj"
    dtype: str = "float32"
    backward: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def quick(self) -> Case:
        """Return the smoke form."""
        return Case(self.title, self.lengths[:1], 32, 2, 1, 1, 64, self.trains, self.dtype, self.backward)


CHAT: Lengths = ((120, 140, 110), (60, 170, 150))
CASES = {
    "grouped": Case("step, 9 heads in 3 groups, `down_proj`", CHAT, 576, 9, 3, layers=2),
    "tied": Case(
        "step, tied head of 32,768, everything trains", ((40, 60, 60),), 576, 9, 3, vocabulary=32_768, trains="all"
    ),
    "narrow": Case(
        "step, 32 short pairs, width 64, 2 layers",
        tuple((10 + i % 5, 6 + i % 4, 5 + i % 7) for i in range(32)),
        64,
        4,
        4,
        layers=2,
    ),
    "bfloat16": Case("step, 9 heads in 3 groups, bfloat16", CHAT, 576, 9, 3, layers=4, dtype="bfloat16"),
    "two rows": Case(
        "forward, 2 rows of a head of 49,152, bfloat16",
        ((2, 1, 1),),
        576,
        9,
        3,
        vocabulary=49_152,
        dtype="bfloat16",
        backward=False,
    ),
}
ERROR_CASE = Case("log-probs", CHAT, 576, 9, 3, layers=2, settings={"initializer_range": 0.06})


def make(case: Case, dtype: str) -> tuple[Any, Any]:
    """Return the model, ready for packed rows, and a micro-batch."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bfpo.data.pack import collate_pairs
    from bfpo.data.tokenize import TokenPair
    from bfpo.policy.probe import choose_form

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        tie_word_embeddings=case.trains == "all",
        **case.settings,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.float64 if dtype == "float64" else torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.trains == "all" or case.trains in name)
        if dtype == "bfloat16" and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    generator = np.random.default_rng(0)
    pairs = []
    for i, lengths in enumerate(case.lengths):
        prompt, chosen, rejected = (generator.integers(3, case.vocabulary, n).astype(np.int32) for n in lengths)
        pairs.append(TokenPair(str(i), prompt, chosen, rejected, 1.0, 0.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        choose_form(model, "packed", longest_text=max(p + max(c, r) for p, c, r in case.lengths))
    return model.train(), collate_pairs(pairs)


def runner(case: Case, dtype: str | None = None) -> Callable[[], list[float]]:
    """Return a function that does the pass and returns the log-probs."""
    import torch

    from bfpo.data.pack import PackedLayout
    from bfpo.policy.logps import sequence_logps

    dtype = dtype or case.dtype
    model, batch = make(case, dtype)

    def once() -> list[float]:
        batch["layout"] = PackedLayout(batch["layout"].lengths)  # every step has a layout of its own
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), torch.set_grad_enabled(case.backward):
            logps = sequence_logps(model, batch).logps
        if case.backward:
            loss: Any = logps.square().mean()
            loss.backward()
        model.zero_grad()
        found: list[float] = logps.tolist()
        return found

    return once


def serve() -> None:
    """Answer one line of JSON by another until the input ends: CPU seconds of a pass, or its log-probs."""
    import torch

    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    known: dict[str, Callable[[], list[float]]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "dtype" in asked:
            case = ERROR_CASE.quick() if settings["quick"] else ERROR_CASE
            answer: dict[str, Any] = {"logps": runner(case, asked["dtype"])()}
        else:
            name = asked["case"]
            if name not in known:
                known[name] = runner(CASES[name].quick() if settings["quick"] else CASES[name])
                known[name]()  # the first pass warms up
            started = time.process_time()
            known[name]()
            answer = {"seconds": time.process_time() - started}
        sys.stdout.write("measured " + json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
