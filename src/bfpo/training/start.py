"""Where a run starts: the frozen reference, and the pairs with its log-probs where they are computed beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Trainer

from bfpo.data.columns import reference_logps
from bfpo.data.pack import Form, collate_pairs, on_device
from bfpo.data.tokenize import TokenPair
from bfpo.policy.reference.forward_pass import MAX_TOKENS, ReferencePass, ReferenceReport
from bfpo.policy.reference.reference import Reference, choose_reference, make_reference
from bfpo.training.sharding import is_sharded

__all__ = ["Start", "start_reference"]


@dataclass(frozen=True, slots=True)
class Start:
    """The reference with its name, the streams and the held-out lists as they are to be trained and evaluated on, and
    what the pass did, if there was one.
    """

    reference: Reference
    name: str
    streams: list[Sequence[TokenPair]]
    held_out: dict[str, Sequence[TokenPair]]
    report: ReferenceReport | None = None


def start_reference(
    trainer: Trainer,
    requested: Reference | str,
    *,
    streams: Sequence[Sequence[TokenPair]],
    held_out: Mapping[str, Sequence[TokenPair]],
    pad_token_id: int,
    form: Form,
) -> Start:
    """Return the reference of a trainer whose model is still what it starts from, and run its pass where it has one.

    `requested`: a name, of which "auto" is resolved here, or an object of the protocol. Raises as `choose_reference`,
    `make_reference` and the pass do.
    """
    if not isinstance(requested, str):
        return Start(requested, type(requested).__name__, list(streams), dict(held_out))
    lists = [*streams, *held_out.values()]
    known = all(reference_logps(pairs) is not None for pairs in lists)
    if requested == "auto" and known:
        requested = "precompute"
    looked_up = _look_up(trainer, lists) if requested in ("auto", "precompute") and not known else None
    sharded = is_sharded(trainer)  # then held-out rows count too: no row is computed here
    name = choose_reference(
        requested,  # type: ignore[arg-type]  # it refuses other names
        num_to_compute=looked_up.num_missing(None if sharded else range(len(streams))) if looked_up else 0,
        num_pairs_seen=len(streams) * _num_main_pairs_seen(trainer, len(streams[0])),
        has_adapter=hasattr(trainer.model, "disable_adapter"),
        sharded=sharded,
    )
    report = None
    if name == "precompute" and looked_up is not None:
        lists, report = _run(trainer, looked_up, pad_token_id=pad_token_id, form=form)
    model: Any = trainer.model
    evals = dict(zip(held_out, lists[len(streams) :], strict=True))
    return Start(make_reference(name, model), name, lists[: len(streams)], evals, report)


def _num_main_pairs_seen(trainer: Trainer, num_main: int) -> int:
    args = trainer.args
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return int(args.max_steps * per_step) if args.max_steps > 0 else math.ceil(args.num_train_epochs * num_main)


def _look_up(trainer: Any, lists: Sequence[Sequence[TokenPair]]) -> ReferencePass:
    return ReferencePass(
        trainer.model,
        lists,
        cache=trainer.args.reference_cache,
        mixed_precision=str(trainer.accelerator.mixed_precision),
        process_index=trainer.args.process_index,
        num_processes=trainer.args.world_size,
    )


def _run(
    trainer: Any, looked_up: ReferencePass, *, pad_token_id: int, form: Form
) -> tuple[list[Sequence[TokenPair]], ReferenceReport]:
    def collate(some: Sequence[TokenPair]) -> dict[str, Any]:
        return on_device(collate_pairs(some, pad_token_id=pad_token_id, form=form), trainer.args.device)

    with trainer.accelerator.autocast():
        return looked_up.run(collate=collate, max_tokens=trainer.args.max_tokens_per_microbatch or MAX_TOKENS)
