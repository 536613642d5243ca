"""The table of stages, and how a stage is run: check the config, open the run folder, run, write the status.

Importing this module does not import torch or transformers; a stage is imported when it runs. Stages do not import one
another: those that need others, such as the demo, run them through `run_stage`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bfpo.core.console import Plan
from bfpo.core.errors import BfpoError, ConfigError, RunError
from bfpo.core.provenance import RunFile, run_digest, run_of_model

if TYPE_CHECKING:
    from bfpo.config import StageConfig
    from bfpo.runs.folder import RunFolder, Status

__all__ = ["STAGES", "Stage", "check_stage", "keep_quiet", "plan_stage", "preview_stage", "run_stage"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the table.

    `module` has `run(config, folder)` and `preview(config)`, which returns a text, lines or a `Plan`; `config` is the
    name of its config class in `bfpo.config`. `by_all`: run by every process of a launcher, else by the first alone.
    """

    name: str
    config: str
    module: str
    help: str
    by_all: bool = False

    def config_class(self) -> type[StageConfig]:
        """Import and return the config class."""
        return cast("type[StageConfig]", getattr(import_module("bfpo.config"), self.config))

    def run(self) -> Callable[[Any, RunFolder], None]:
        """Import the stage and return the function that runs it."""
        run = cast("Callable[[Any, RunFolder], None]", import_module(self.module).run)
        if self.by_all:
            return run

        @wraps(run)
        def by_first(config: Any, folder: RunFolder) -> None:
            if folder.is_writer:
                run(config, folder)

        return by_first

    def preview(self) -> Callable[[Any], str | list[str] | Plan]:
        """Import the stage and return the function that describes what it would do."""
        return cast("Callable[[Any], str | list[str] | Plan]", import_module(self.module).preview)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("demo", "DemoConfig", "bfpo.commands.demo", "Run the whole pipeline on a small synthetic world."),
        Stage("toy", "ToyConfig", "bfpo.commands.toy", "Rerun the paper's experiment with four actions."),
        Stage("prepare", "PrepareConfig", "bfpo.commands.prepare", "Mix, check, clean and split training data."),
        Stage("sft", "SftConfig", "bfpo.commands.sft", "Train a model to imitate completions.", by_all=True),
        Stage(
            "reference",
            "ReferenceConfig",
            "bfpo.commands.reference",
            "Compute the reference log-probs of `train`.",
            by_all=True,
        ),
        Stage(
            "train",
            "AlignConfig",
            "bfpo.commands.train",
            "Train a model on preference pairs with safety labels.",
            by_all=True,
        ),
        Stage("generate", "GenerateConfig", "bfpo.commands.generate", "Sample completions of prompts from a model."),
        Stage("judge-train", "JudgeTrainConfig", "bfpo.commands.judge_train", "Train a small judge or ranker."),
        Stage("judge-check", "JudgeCheckConfig", "bfpo.commands.judge_check", "Compare a judge with human labels."),
        Stage("label", "LabelConfig", "bfpo.commands.label", "Judge completions, or label the safety of pairs."),
        Stage("clean", "CleanConfig", "bfpo.commands.clean", "Find wrong safety labels of pairs and drop them."),
        Stage("redteam", "RedteamConfig", "bfpo.commands.redteam", "Make pairs from a model's own answers."),
        Stage("compare", "CompareConfig", "bfpo.commands.compare", "Compare methods, each with its best settings."),
        Stage("sweep", "SweepConfig", "bfpo.commands.sweep", "Train a grid of settings and show the trade-off."),
        Stage("interpolate", "InterpolateConfig", "bfpo.commands.interpolate", "Blend the weights of two models."),
        Stage("tamper", "TamperConfig", "bfpo.commands.tamper", "Attack models by a few LoRA steps and ask them."),
        Stage(
            "evaluate", "EvaluateConfig", "bfpo.commands.evaluate", "Score a model: on pairs, completions or suites."
        ),
    )
}


def run_stage(name: str, config: StageConfig, out: str | Path, *, resume: bool = False) -> RunFolder:
    """Run one stage in the folder `out` and return the folder.

    With `resume`, a finished run is left unchanged. The final status is always written: `finished`, `failed` with its
    message, or `interrupted` (Ctrl-C or SIGTERM); exceptions are re-raised.

    Raises `ConfigError` for a config of another stage, `RunError` for a folder that cannot be used or that another
    process is writing to, and the errors of the stage.
    """
    from bfpo.runs.folder import RunFolder
    from bfpo.runs.lock import only_writer

    stage = _checked(name, config)
    with only_writer(Path(out)):
        return _run_in_folder(stage, config, RunFolder.create(out, name, config.resolved(), resume), resume)


def _run_in_folder(stage: Stage, config: StageConfig, folder: RunFolder, resume: bool) -> RunFolder:
    if resume and not folder.resumed and folder.is_writer:
        _log.info("nothing to resume in %s: starting a new run", folder.path)
    if folder.finished:
        if folder.is_writer:
            _log.info("already finished, nothing to do: %s", folder.path)
        _say_remarks(folder)
        return folder
    try:
        _check_places(config)
        if model_runs := _model_runs(folder.config):
            folder.add_facts(model_runs=model_runs)
        stage.run()(_with_hub_files(config, folder), folder)
    except Exception as error:
        text = str(error) if isinstance(error, BfpoError) else f"{type(error).__name__}: {error}"
        _write_status(folder, "failed", text)
        raise
    except BaseException:
        _write_status(folder, "interrupted")
        raise
    folder.set_status("finished")
    if folder.is_writer:
        _log.info("finished in %.0f s: %s", folder.record["seconds"], folder.path)
    _say_remarks(folder)
    return folder


def _with_hub_files(config: StageConfig, folder: RunFolder | None = None) -> StageConfig:
    """Return the config with the files of data sets of the hub; a run records them, and is resumed with the same."""
    from bfpo.runs.hub_data import files_of_record, with_hub_files

    before = {} if folder is None else folder.record
    config, found = with_hub_files(config, before.get("hub_data"), files_of_record(before))
    if folder is not None and found:
        sources = {name: [files.as_source()] for name, files in found.items()}
        folder.add_facts(
            hub_data={name: files.commit for name, files in found.items()},
            sources={**folder.record.get("sources", {}), **sources},
        )
    return config


def _say_remarks(folder: RunFolder) -> None:
    """Log what there is to remark on a training, the weightiest last."""
    for remark in folder.record.get("remarks", ()) if folder.is_writer else ():
        _log.log(logging.WARNING if remark["level"] == "warning" else logging.INFO, "%s", remark["text"])


def _model_runs(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of the runs that the models of a config are from, by path."""
    from bfpo.core.records import load

    named = [config, *(one for one in config.get("models") or [] if isinstance(one, dict))]
    values = [one.get(key) for one in named for key in ("model", "reference", "first", "second")]
    runs = {path: run_of_model(path) for path in values if isinstance(path, str)}
    found = {path: run_digest(load(RunFile, run / "run.json", [])) for path, run in runs.items() if run is not None}
    return {path: digest for path, digest in sorted(found.items()) if digest}


def preview_stage(name: str, config: StageConfig) -> str:
    """Return the resolved config as YAML and what the stage would do with it; writes nothing.

    Raises as `run_stage` does for a config that cannot be run.
    """
    return plan_stage(name, config)[0]


def plan_stage(name: str, config: StageConfig) -> tuple[str, Mapping[str, Any]]:
    """Return the text of `preview_stage`, and its figures by name, as far as the stage gives them; raises likewise."""
    from bfpo.core.yaml_text import dump_yaml

    stage = _checked(name, config)
    _check_places(config)
    found = stage.preview()(_with_hub_files(config))
    plan = found if isinstance(found, Plan) else Plan([found] if isinstance(found, str) else found)
    own = "\n".join(plan.lines)
    return f"{dump_yaml(config.resolved())}\n{own}".rstrip("\n"), plan.facts


def check_stage(name: str, config: StageConfig) -> None:
    """Raise as `run_stage` does for a config that cannot be run; reads no data and imports no stage."""
    _checked(name, config)


def _write_status(folder: RunFolder, status: Status, error: str | None = None) -> None:
    with suppress(RunError):  # such as a full disk; the error that stopped the run matters more
        folder.set_status(status, error)


def _checked(name: str, config: StageConfig) -> Stage:
    """Return the stage; calls `keep_quiet` before any import."""
    keep_quiet()
    if name not in STAGES:
        raise ConfigError(f"stage: got {name!r}; allowed: {', '.join(STAGES)}")
    stage = STAGES[name]
    if type(config).head() is not stage.config_class():
        raise ConfigError(f"config of `{name}`: got a {type(config).__name__}; needed: {stage.config}")
    return stage


def _check_places(config: StageConfig) -> None:
    from bfpo.config.load import check_places

    check_places(config)


def keep_quiet() -> None:
    """Turn off the libraries' telemetry and, without a terminal, their progress bars; they read this at import.

    Also silences bitsandbytes, imported through transformers and peft: on some CPUs it warns of a missing kernel
    package even if nothing is quantised. bfpo never runs that kernel.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
