"""The table of stages, and the one way to run a stage: check the config, open the folder, run, write what became of it.

Importing this module imports neither torch nor transformers; a stage is imported when it runs. Stages never import one
another: the demo, which needs several, runs them through `run_stage`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bfpo.core.errors import BfpoError, ConfigError, RunError

if TYPE_CHECKING:
    from bfpo.config import StageConfig
    from bfpo.runs.folder import RunFolder, Status

__all__ = ["STAGES", "Stage", "check_stage", "keep_quiet", "preview_stage", "run_stage"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the table.

    `module` has `run(config, folder)` and `preview(config) -> str | list[str]`; `config` is the name of its config
    class in `bfpo.config`.
    """

    name: str
    config: str
    module: str
    help: str

    def config_class(self) -> type[StageConfig]:
        """Import and return the config class."""
        return cast("type[StageConfig]", getattr(import_module("bfpo.config"), self.config))

    def run(self) -> Callable[[Any, RunFolder], None]:
        """Import the stage and return the function that runs it."""
        return cast("Callable[[Any, RunFolder], None]", import_module(self.module).run)

    def preview(self) -> Callable[[Any], str | list[str]]:
        """Import the stage and return the function that tells what it would do."""
        return cast("Callable[[Any], str | list[str]]", import_module(self.module).preview)


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "demo", "DemoConfig", "bfpo.commands.demo", "Run the whole way on a small closed world and show the result."
        ),
        Stage("toy", "ToyConfig", "bfpo.commands.toy", "Rerun the paper's experiment with four actions."),
        Stage("prepare", "PrepareConfig", "bfpo.commands.prepare", "Mix, check, clean and split data for training."),
        Stage("sft", "SftConfig", "bfpo.commands.sft", "Train a model to imitate completions."),
        Stage("reference", "ReferenceConfig", "bfpo.commands.reference", "Compute the reference log-probs of `train`."),
        Stage("train", "AlignConfig", "bfpo.commands.train", "Train a model on preference pairs with safety labels."),
        Stage("generate", "GenerateConfig", "bfpo.commands.generate", "Sample completions of prompts from a model."),
        Stage("judge-train", "JudgeTrainConfig", "bfpo.commands.judge_train", "Train a small judge of safety."),
        Stage("judge-check", "JudgeCheckConfig", "bfpo.commands.judge_check", "Check a judge against people's labels."),
        Stage("label", "LabelConfig", "bfpo.commands.label", "Judge completions, or the safety of pairs."),
        Stage(
            "redteam",
            "RedteamConfig",
            "bfpo.commands.redteam",
            "Make pairs from a model's own answers.",
        ),
        Stage(
            "compare", "CompareConfig", "bfpo.commands.compare", "Compare every method, each at its best, on one world."
        ),
        Stage("sweep", "SweepConfig", "bfpo.commands.sweep", "Train a grid and show the trade-off."),
        Stage("interpolate", "InterpolateConfig", "bfpo.commands.interpolate", "Blend the weights of two models."),
        Stage("evaluate", "EvaluateConfig", "bfpo.commands.evaluate", "Score a model on pairs, or its completions."),
    )
}


def run_stage(name: str, config: StageConfig, out: str | Path, *, resume: bool = False) -> RunFolder:
    """Run one stage in the folder `out` and return the folder.

    A run that `resume` finds finished is left as it is. The status is written whatever happens: `finished`, `failed`
    with its message, or `interrupted` on Ctrl-C or a request to stop; the exception goes on to the caller.

    Raises `ConfigError` for a config that is not this stage's or that sets what its method does not read, `RunError`
    for a folder that cannot be used, and whatever the stage raises.
    """
    from bfpo.runs.folder import RunFolder

    stage, unread = _checked(name, config)
    folder = RunFolder.create(out, name, config.resolved(unread), resume)
    if resume and not folder.resumed and folder.is_writer:
        _log.info("nothing to go on with in %s: starting anew", folder.path)
    if folder.finished:
        _log.info("already finished, nothing to do: %s", folder.path)
        return folder
    try:
        _check_places(config)
        stage.run()(config, folder)
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
    return folder


def preview_stage(name: str, config: StageConfig) -> str:
    """Return what the stage would do: the resolved config as YAML, then the stage's own lines; nothing is written.

    Raises as `run_stage` does for a config that cannot be run.
    """
    from bfpo.core.yaml_text import dump_yaml

    stage, unread = _checked(name, config)
    _check_places(config)
    lines = stage.preview()(config)
    own = lines if isinstance(lines, str) else "\n".join(lines)
    return f"{dump_yaml(config.resolved(unread))}\n{own}".rstrip("\n")


def check_stage(name: str, config: StageConfig) -> None:
    """Raise as `run_stage` does for a config that cannot be run; no data are read and no stage is imported."""
    _checked(name, config)


def _write_status(folder: RunFolder, status: Status, error: str | None = None) -> None:
    with suppress(RunError):  # such as a full disk; what stopped the run is the news
        folder.set_status(status, error)


def _checked(name: str, config: StageConfig) -> tuple[Stage, frozenset[str]]:
    """Return the stage and the settings that its method does not read; set what must be set before any import."""
    keep_quiet()
    if name not in STAGES:
        raise ConfigError(f"stage: got {name!r}; allowed: {', '.join(STAGES)}")
    stage = STAGES[name]
    if type(config) is not stage.config_class():
        raise ConfigError(f"config of `{name}`: got a {type(config).__name__}; needed: a {stage.config}")
    return stage, _unread_settings(config)


def _check_places(config: StageConfig) -> None:
    from bfpo.config.load import check_places

    check_places(config)


def _unread_settings(config: StageConfig) -> frozenset[str]:
    from bfpo.config import METHOD_SETTINGS, MethodSettings

    if not isinstance(config, MethodSettings):
        return frozenset()
    from bfpo.objective.losses import METHODS

    unread = METHOD_SETTINGS - METHODS[config.method].reads
    given = sorted(unread & config.model_fields_set)
    if given:
        raise ConfigError(
            f"{', '.join(given)}: not read by the method {config.method!r}; leave it out, or choose a method that "
            f"reads it ({_readers(given)})"
        )
    return unread


def _readers(settings: Iterable[str]) -> str:
    from bfpo.objective.losses import METHODS

    return ", ".join(name for name, method in METHODS.items() if set(settings) <= method.reads) or "none reads them all"


def keep_quiet() -> None:
    """Turn off the libraries' reports about usage, and their progress bars in a log; they read this at import.

    Importing the trainer of transformers imports peft and with it bitsandbytes, which warns on some CPUs that a kernel
    package is missing, whether or not anything is quantised; bfpo never runs that kernel.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
