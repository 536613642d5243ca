"""STAGE: compute the reference log-probs of `bfpo train` beforehand (`bfpo reference`)."""

from __future__ import annotations

from typing import Any

from bfpo.config import ReferenceConfig
from bfpo.core.console import Plan
from bfpo.core.errors import RunError
from bfpo.data.tokenize import TokenPair
from bfpo.objective.methods import METHODS
from bfpo.policy.devices import runs_on_cpu
from bfpo.policy.reference.forward_pass import ReferencePass
from bfpo.runs.folder import RunFolder
from bfpo.training.forecast import write_forecast
from bfpo.training.inputs import (
    describe_tokens,
    load_start,
    read_start,
    reference_cache,
    row_counts,
    row_streams,
)
from bfpo.training.session import prepare_process
from bfpo.training.tokens import stage_tokens
from bfpo.training.trainer import BFPOConfig, BFPOTrainer
from bfpo.training.trainer_args import check_launcher

__all__ = ["preview", "run"]


def run(config: ReferenceConfig, folder: RunFolder) -> None:
    """Fill the cache for all pairs of `data`, `buffer` and `eval_data`; write `data.json`, the counts and the forecast.

    The trainer of `bfpo train` makes the pass with the same settings but does not train, so the numbers and their keys
    are those that training looks up. Under FSDP2 the model is sharded for the pass. Raises as `bfpo train` does, and
    `RunError` if rows could not be stored.
    """
    prepare_process(config.threads)
    args = _arguments(config, folder)
    tokens = stage_tokens(config, folder, args)
    policy = load_start(config)
    trainer = _ReferenceTrainer(
        policy.model,
        args,
        train_dataset=tokens["data"],
        buffer_dataset=tokens.get("buffer"),
        eval_dataset=tokens.get("eval_data"),
        processing_class=policy.tokenizer,
    )
    report = trainer.reference_report
    assert report is not None  # reference="precompute" on pairs without log-probs
    folder.add_facts(reference_pass=report.as_row())
    write_forecast(folder, trainer.streams, config.method_object(), reduction=config.reduction)
    if folder.is_writer and report.num_stored < report.num_computed:
        raise RunError(
            f"reference_cache: {report.num_computed - report.num_stored} of {report.num_computed} rows could not be "
            f"stored in {report.cache or reference_cache(config)} (see the log); check permissions and free space"
        )


class _ReferenceTrainer(BFPOTrainer):
    only_reads = True


def preview(config: ReferenceConfig) -> Plan:
    """Return the pairs of each section, and how many rows the cache has and lacks."""
    pair_lists: list[list[TokenPair]] = []
    start = read_start(config)
    streams = row_streams(config, start)
    lines = describe_tokens(config, start, lambda pairs: pair_lists.append(list(pairs)), streams=streams)
    policy = load_start(config)
    found = ReferencePass(
        policy.model,
        pair_lists,
        cache=reference_cache(config),
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        read_only=True,
    ).preview()
    place = f"cache: {found.cache}" if found.cache else "no cache for this model (see the log)"
    lines.append(f"{place}: {found.num_rows} rows, {found.num_reused} cached, {found.num_computed} to compute")
    return Plan(lines, {"data": row_counts(streams), "reference_pass": found.as_row()})


def _arguments(config: ReferenceConfig, folder: RunFolder) -> BFPOConfig:
    check_launcher(config.dtype)  # as `bfpo train` does: the precision is part of the cache's key
    own: dict[str, Any] = {name: getattr(config, name) for name in ("attention", "max_tokens_per_microbatch")}
    own |= {"reference": "precompute", "reference_cache": reference_cache(config)}
    return BFPOConfig(
        output_dir=str(folder.path),
        seed=config.seed,
        use_cpu=runs_on_cpu(),
        eval_strategy="no",
        bf16=config.dtype == "bfloat16",
        disable_tqdm=True,
        # What it reads beside the pairs is computed too; the margins of modpo's other model are not of this reference.
        method="bfpo" if METHODS[config.method].shifted else config.method_object(),
        **own,
    )
