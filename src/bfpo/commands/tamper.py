"""STAGE `tamper`: a short LoRA attack on each model, and what the model does after each number of its steps."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from bfpo.config import SftConfig, TamperConfig
from bfpo.config.evaluate import SuitesJob
from bfpo.config.tamper import TamperedModel
from bfpo.core.console import show
from bfpo.core.provenance import RunFile
from bfpo.core.records import load
from bfpo.core.schema import Completion
from bfpo.experiments.tamper import (
    attack_folder,
    collect_tamper,
    draw_tamper,
    evaluation_folder,
    seeds_of,
    tamper_markdown,
)
from bfpo.generation.server import RequestBudget
from bfpo.judges.refusals import RefusalJudge
from bfpo.policy.devices import use_threads
from bfpo.policy.save import save_adapted
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import run_stage
from bfpo.suites.run import preview_suites
from bfpo.training.inputs import describe_tokens, read_start, row_streams
from bfpo.training.packed import on_first_gpu
from bfpo.training.session import CHECKPOINTS

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)
_MOST_REFUSALS = 0.05  # share of the completions of an attack that may decline without a warning


def run(config: TamperConfig, folder: RunFolder) -> None:
    """Write `tamper.json`, `.md`, `.png` and `.svg`; below `models/NAME/` the attack, and an evaluation a point.

    Adapters stay as checkpoints of the attack; a merged model is on the disk only while it is asked, except the last.
    A resumed run does only what is missing. Raises the errors of `bfpo sft` and `bfpo evaluate`.
    """
    use_threads(config.threads)
    folder.kept = "attacks and evaluations so far are kept"
    folder.add_data("data", config.data.files)
    attack = config.attack_on(config.models[0], config.seed)
    rows = list(row_streams(attack, read_start(attack))["data"])
    warnings = _doubts(config, rows)
    for warning in warnings:
        _log.warning("%s", warning)
    _check_models(config)
    with RequestBudget(config.suites.max_requests).shared():
        for model in config.models:
            _tamper(config, model, folder.path)
    result = collect_tamper(config, folder.path, _settings(config, len(rows)), warnings)
    folder.write_json("tamper.json", result)
    text = tamper_markdown(result)
    folder.write_text("tamper.md", text)
    for name, content in draw_tamper(result).items():
        folder.write_bytes(name, content)
    folder.write_card("Tampering", {"Tampering": text})
    show(text)


def preview(config: TamperConfig) -> list[str]:
    """Return the data of the attack as the first model reads it, its settings, and the suites; loads no weights."""
    attack = config.attack_on(config.models[0], config.seed)
    start = read_start(attack)
    streams = row_streams(attack, start)
    lines, rows = describe_tokens(attack, start, streams=streams), list(streams["data"])
    _check_models(config)
    job: Any = config.evaluation_of(config.models[0].model, config.models[0].name, config.models[0].revision)
    assert isinstance(job, SuitesJob)
    settings = ", ".join(f"{key} {value}" for key, value in _settings(config, len(rows)).items())
    return [
        *lines,
        *(f"warning: {doubt}" for doubt in _doubts(config, rows)),
        f"attack: {settings}",
        f"{len(config.models)} models ({', '.join(model.name for model in config.models)}), {config.seeds} attacks on "
        f"each, asked after {', '.join(map(str, config.steps))} steps",
        *preview_suites(job)[1:],
    ]


def _check_models(config: TamperConfig) -> None:
    """Raise `ModelError` for a model without a tokenizer that can be read, before the first is attacked."""
    for model in config.models[1:]:
        read_start(config.attack_on(model, config.seed))


def _settings(config: TamperConfig, num: int) -> dict[str, Any]:
    """Return what an attack is, for the files and the page."""
    return {
        "completions": num,
        "per step": config.completions_per_step,
        "learning rate": f"{config.learning_rate:g}",
        "rank": config.lora.r,
        "alpha": f"{config.lora.lora_alpha:g}",
    }


def _doubts(config: TamperConfig, rows: Sequence[Completion]) -> list[str]:
    """Return why the data may not be the attack that the config says."""
    refusals = sum(bool(verdict.refused) for verdict in RefusalJudge().judge(rows))
    other = {"harmful": ("benign", "borderline"), "benign": ("harmful",)}[config.attack]
    unlike = sum(row.kind in other for row in rows)
    doubts = []
    if refusals > _MOST_REFUSALS * len(rows):
        doubts.append(
            f"{refusals} of {len(rows)} completions of the attack decline, and teach refusals; data.leave_out: "
            "[refused] leaves them out"
        )
    if unlike:
        doubts.append(f"{unlike} of {len(rows)} prompts of the {config.attack} attack are of kind {' or '.join(other)}")
    return doubts


def _tamper(config: TamperConfig, model: TamperedModel, root: Path) -> None:
    start = evaluation_folder(root, model.name, 0, config.seed)
    _evaluate(config, model.model, f"{model.name}.step-0", start, model.revision)
    for seed in seeds_of(config):
        attack = config.attack_on(model, seed)
        place = attack_folder(root, model.name, seed)
        with on_first_gpu():
            run_stage("sft", attack, place, resume=True)
        for step in config.steps[1:]:
            out = evaluation_folder(root, model.name, step, seed)
            _evaluate_after(config, attack, place, step, f"{model.name}.step-{step}", out)


def _evaluate_after(config: TamperConfig, attack: SftConfig, place: Path, step: int, name: str, out: Path) -> None:
    """Evaluate the model after some steps, which is merged for it and removed again; a finished evaluation is kept."""
    if _is_finished(out):
        return
    merged = place / f"step-{step}"  # inside the run of the attack, whose prompts it was trained on
    try:
        assert attack.model is not None
        shutil.rmtree(merged, ignore_errors=True)
        adapter = place / CHECKPOINTS / f"checkpoint-{step}"
        save_adapted(attack.model, adapter, merged, dtype=attack.dtype, revision=attack.revision)
        _evaluate(config, str(merged), name, out)
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _evaluate(config: TamperConfig, model: str, name: str, out: Path, revision: str | None = None) -> None:
    _log.info("asking %s", name)
    with redirect_stdout(StringIO()):  # its table is in its folder
        run_stage("evaluate", config.evaluation_of(model, name, revision), out, resume=True)


def _is_finished(out: Path) -> bool:
    return (out / "run.json").is_file() and load(RunFile, out / "run.json").status == "finished"
