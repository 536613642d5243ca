"""STAGE: compute the reference log-probs of `bfpo train` beforehand (`bfpo reference`)."""

from __future__ import annotations

from typing import Any

from bfpo.config import ReferenceConfig
from bfpo.data.load import LoadedPairs, load_pairs
from bfpo.data.tokenize import TokenizeReport, TokenPair
from bfpo.errors import RunError
from bfpo.policy.load import Policy, load_policy
from bfpo.policy.reference_pass import ReferencePass
from bfpo.runs import RunFolder
from bfpo.training.inputs import pair_sections, reference_cache, tokenize
from bfpo.training.session import data_settings, describe_data, prepare_process, report_data, runs_on_cpu
from bfpo.training.trainer import BFPOConfig, BFPOTrainer

__all__ = ["preview", "run"]

Tokens = dict[str, tuple[list[TokenPair], TokenizeReport]]


def run(config: ReferenceConfig, folder: RunFolder) -> None:
    """Fill the cache for all pairs of `data`, `buffer` and `eval_data`; write `data.json` and the counts (`run.json`).

    The trainer of `bfpo train` does the pass, under the same settings, and does not train: so the numbers and their key
    are those that training looks for. Raises as `bfpo train` does, and `RunError` where rows could not be stored.
    """
    prepare_process(config.threads)
    for name, section in pair_sections(config).items():
        folder.add_data(name, section.files)
    loaded, policy, tokens = _inputs(config)
    report_data(folder, {name: (rows, tokens[name][1]) for name, rows in loaded.items()})
    trainer = BFPOTrainer(
        policy.model,
        _arguments(config, folder),
        train_dataset=tokens["data"][0],
        buffer_dataset=tokens["buffer"][0] if "buffer" in tokens else None,
        eval_dataset=tokens["eval_data"][0] if "eval_data" in tokens else None,
        processing_class=policy.tokenizer,
    )
    report = trainer.reference_report
    assert report is not None  # reference="precompute" on pairs without log-probs
    folder.add_facts(reference_pass=report.as_row())
    if folder.is_writer and report.num_stored < report.num_computed:
        raise RunError(
            f"reference_cache: {report.num_computed - report.num_stored} of {report.num_computed} rows could not be "
            f"stored in {report.cache or reference_cache(config)} (see the log); check rights and space"
        )


def preview(config: ReferenceConfig) -> list[str]:
    """Return the pairs of each section, and how many rows the cache has and lacks."""
    loaded, policy, tokens = _inputs(config)
    lines = ["; ".join(describe_data(name, rows.counts, tokens[name][1].as_row())) for name, rows in loaded.items()]
    found = ReferencePass(
        policy.model,
        [pairs for pairs, _ in tokens.values()],
        cache=reference_cache(config),
        mixed_precision="bf16" if config.bf16 else "no",
    ).preview()
    place = f"cache: {found.cache}" if found.cache else "no cache for this model (see the log)"
    return [*lines, f"{place}: {found.num_rows} rows, {found.num_reused} there, {found.num_computed} to compute"]


def _inputs(config: ReferenceConfig) -> tuple[dict[str, LoadedPairs], Policy, Tokens]:
    loaded = {
        name: load_pairs(**data_settings(section, seed=config.seed)) for name, section in pair_sections(config).items()
    }
    # The reference has no adapter, and which of its weights train is nothing to it.
    policy = load_policy(config.model, dtype=config.dtype, revision=config.revision, seed=config.seed)
    return loaded, policy, {name: tokenize(config, rows, policy.tokenizer) for name, rows in loaded.items()}


def _arguments(config: ReferenceConfig, folder: RunFolder) -> BFPOConfig:
    own: dict[str, Any] = {name: getattr(config, name) for name in ("bf16", "attention", "max_tokens_per_microbatch")}
    own |= {"reference": "precompute", "reference_cache": reference_cache(config)}
    return BFPOConfig(
        output_dir=str(folder.path),
        seed=config.seed,
        use_cpu=runs_on_cpu(),
        eval_strategy="no",
        disable_tqdm=True,
        **own,
    )
