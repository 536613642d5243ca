"""The margins of another model that modpo reads: its log-probs of the pairs, computed once by the reference pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bfpo.core.errors import ModelError, SettingError
from bfpo.data.pack import collate_pairs, longest_text, on_device
from bfpo.data.store import reference_logps
from bfpo.data.tokenize import TokenPair
from bfpo.objective.methods import METHODS, Method
from bfpo.policy.load import load_policy, load_tokenizer, pad_token_id
from bfpo.policy.probe import choose_form
from bfpo.policy.reference.forward_pass import MAX_TOKENS, ReferencePass
from bfpo.policy.source import num_embeddings
from bfpo.training.arguments import BFPOConfig

__all__ = ["check_margin_logps", "margin_logps"]


def margin_logps(
    model: str,
    lists: Sequence[Sequence[TokenPair]],
    args: BFPOConfig,
    *,
    vocabulary: Mapping[str, int],
    dtype: str = "float32",
) -> list[Tensor]:
    """Return the model's summed log-probs of the pairs of each list, (P, 2) float64 of chosen and rejected, in nats.

    The reference pass computes them, so they are read from and added to the cache `args.reference_cache`, and processes
    share the work. `vocabulary`: of the tokenizer that made the pairs. Raises `ModelError` for a model that cannot be
    loaded or whose tokens differ.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer.get_vocab() != dict(vocabulary):
        raise ModelError(
            f"margin_model: {model} has another vocabulary than the model in training; use one that was trained from "
            "the same start"
        )
    with _read_by_every_process():
        other = load_policy(model, dtype=dtype).model.to(args.device)
    look_up = ReferencePass(
        other,
        lists,
        cache=args.reference_cache,
        process_index=args.process_index,
        num_processes=args.world_size,
    )
    pad = pad_token_id(tokenizer, num_embeddings(other.config))
    form = choose_form(
        other,
        args.attention,
        longest_text=max(map(longest_text, lists)),
        process_index=args.process_index,
        num_processes=args.world_size,
    )

    def collate(some: Sequence[TokenPair]) -> dict[str, Any]:
        return on_device(collate_pairs(some, pad_token_id=pad, form=form), args.device)

    found, _ = look_up.run(collate=collate, max_tokens=args.max_tokens_per_microbatch or MAX_TOKENS)
    columns = [reference_logps(pairs) for pairs in found]
    return [torch.from_numpy(np.stack(pair, axis=1)) for pair in columns if pair is not None]


@contextmanager
def _read_by_every_process() -> Iterator[None]:
    """Load whole weights under `fsdp_cpu_ram_efficient_loading: true` too, where those of other processes are empty.

    This model is not sharded, so nothing fills them later.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    held = os.environ.get(name)
    if held is not None:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if held is not None:
            os.environ[name] = held


def check_margin_logps(
    method: Method, values: Sequence[Tensor] | None, lists: Sequence[Sequence[TokenPair]]
) -> list[Tensor] | None:
    """Return the log-probs as a list; raise `SettingError` where a method needs them and has none, or the other way
    round, and where sizes differ.
    """
    if method.shifted != (values is not None):
        shifted = ", ".join(name for name, each in METHODS.items() if each.shifted)
        raise SettingError(
            f"margin_logps: got {'none' if values is None else 'some'} with the method {method.name!r}; allowed: with "
            f"{shifted}, which needs them, and with no other"
        )
    if values is None:
        return None
    wanted = [(len(pairs), 2) for pairs in lists]
    given = [tuple(value.shape) for value in values]
    if given != wanted:
        raise SettingError(f"margin_logps: got shapes {given}; allowed: {wanted}, one for each list of pairs")
    return [value.double() for value in values]
