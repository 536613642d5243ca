"""The command line: one command per stage. Stages are imported when they run, so `--help` needs no torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from bfpo._version import __version__
from bfpo.core.console import show, show_table, start_logging
from bfpo.core.errors import BfpoError, ConfigError, StopRequest
from bfpo.runs.stages import STAGES, keep_quiet, preview_stage, run_stage

__all__ = [
    "SHORT_OPTIONS",
    "ShortOption",
    "app",
    "main",
]


@dataclass(frozen=True, slots=True)
class ShortOption:
    """An option `--NAME` that is short for `--set KEY=VALUE`; `kind` is text, a number, a flag, or a list of text.

    `positional`: it is given by its place, without a name.
    """

    name: str
    key: str
    help: str
    kind: type = str
    metavar: str | None = None
    positional: bool = False

    def parameter(self) -> Parameter:
        """Return the parameter from which typer makes the option."""
        text = f"{self.help} Short for --set {self.key}={'true' if self.kind is bool else self.metavar}."
        if self.kind is list:
            text = text.replace("Short", "May be repeated; short")
        annotation: Any = list[str] if self.kind is list else self.kind
        option: Any = typer.Option(f"--{self.name}", metavar=self.metavar, help=text)
        if self.positional:
            option = typer.Argument(metavar=self.metavar, help=text, show_default=False)
        default = False if self.kind is bool else None
        wanted = annotation if self.kind is bool else annotation | None
        return Parameter(self._argument, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[wanted, option])

    @property
    def _argument(self) -> str:
        return self.name.replace("-", "_")

    def settings(self, given: Mapping[str, Any]) -> Iterator[str]:
        """Yield the setting that the option stands for, if it was given; a value is never read as YAML."""
        value = given[self._argument]
        if value is not None and value is not False and value != []:
            yield f"{self.key}={json.dumps(value, ensure_ascii=False)}"


_MAX_REQUESTS = ShortOption("max-requests", "max_requests", "Most requests to servers.", int, "N")

SHORT_OPTIONS: dict[str, tuple[ShortOption, ...]] = {
    "demo": (
        ShortOption("seeds", "seeds", "Number of seeds.", int, "N"),
        ShortOption("full", "full", "All methods.", bool),
    ),
    "generate": (
        ShortOption("model", "model", "The model: folder, hub id, or a server's name for it.", str, "M"),
        ShortOption("prompts", "prompts", "The prompts: file or folder.", str, "FILE"),
        _MAX_REQUESTS,
    ),
    "compare": (
        ShortOption("seeds", "seeds", "Number of seeds.", int, "N"),
        ShortOption("quick", "quick", "Two settings for each method in place of four.", bool),
    ),
    "sweep": (
        ShortOption("grid", "grid", "Keys of train and their values, such as beta=0.05,0.1,alpha=0,0.5.", str, "K=V,V"),
        ShortOption("at-least", "at_least", "What the named model must reach: harmless=0.95.", str, "METRIC=X"),
    ),
    "interpolate": (
        ShortOption("first", "first", "The model at weight 0.", str, "A", positional=True),
        ShortOption("second", "second", "The model at weight 1.", str, "B", positional=True),
        ShortOption("weights", "weights", "Shares of B, such as 0,0.25,0.5.", str, "W,W"),
    ),
    "judge-train": (ShortOption("data", "data.files", "Labelled completions.", list, "FILE"),),
    "judge-check": (
        ShortOption("judge", "judge", "The judge: oracle, a folder of judge-train, FORMAT or FORMAT:MODEL.", str, "J"),
        ShortOption("data", "data.files", "Completions that people have labelled.", list, "FILE"),
        _MAX_REQUESTS,
    ),
    "label": (_MAX_REQUESTS,),
    "evaluate": (
        ShortOption("suites", "suites.use", "Suites, sets of them, or .yaml files.", list, "NAME"),
        ShortOption("folder", "suites.folders", "Folder with files of suites.", list, "DIR"),
        ShortOption("model", "model", "The model: folder or hub id.", str, "M"),
    ),
    "redteam": (
        ShortOption("model", "model", "The model under attack: folder or hub id.", str, "M"),
        ShortOption("prompts", "prompts", "File of prompts.", str, "FILE"),
        ShortOption("judge", "judges", "Who judges: oracle, a folder of judge-train, FORMAT[:MODEL].", list, "J"),
        ShortOption("ranker", "ranker", "Who ranks: oracle, reward-model:MODEL, pairrm, pairwise:MODEL.", str, "R"),
        _MAX_REQUESTS,
    ),
}
"""The short options by command."""


app = typer.Typer(
    name="bfpo",
    help="Align a language model to be helpful and safe, from preference pairs with safety labels.",
    epilog="Start with: bfpo demo --out runs/demo. The settings of a command: bfpo COMMAND --keys.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        help="Settings from a YAML file; paths in it are relative to the current directory.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting on top of the file; may be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run's folder, new or empty.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out; a finished one is left alone.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, with the data's counts, and stop.")]
Keys = Annotated[bool, typer.Option("--keys", help="List the settings with what they accept, and stop.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked on the command line."""

    stage: str
    config: Path | None
    settings: Sequence[str]
    out: Path | None
    resume: bool
    dry_run: bool
    keys: bool
    debug: bool


@dataclass(frozen=True, slots=True)
class _Question:
    """What was asked of `bfpo doctor`."""

    config: Path | None
    settings: Sequence[str]
    processes: int
    sharding: str
    memory_gib: float | None
    as_json: bool
    debug: bool


def _show_version(asked: bool) -> None:
    if asked:
        show(f"bfpo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Hold the options of the program itself."""


def _epilog(name: str) -> str:
    return f"The settings, with what they accept: bfpo {name} --keys."


def _add_command(name: str) -> None:
    """Add the command of a stage: what all have, and the stage's own short options between."""
    shorts = SHORT_OPTIONS.get(name, ())

    def command(**given: Any) -> None:
        settings = [*(given["settings"] or ()), *(text for short in shorts for text in short.settings(given))]
        _execute(
            _Request(
                name,
                given["config"],
                settings,
                given["out"],
                given["resume"],
                given["dry_run"],
                given["keys"],
                given["debug"],
            )
        )

    # typer reads the options off the signature.
    before = {"config": ConfigFile, "settings": Settings, "out": Out}
    after = {"resume": Resume, "dry_run": DryRun, "keys": Keys, "debug": Debug}
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            *(Parameter(key, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for key, kind in before.items()),
            *(short.parameter() for short in shorts),
            *(Parameter(key, Parameter.KEYWORD_ONLY, default=False, annotation=kind) for key, kind in after.items()),
        ]
    )
    app.command(name, help=STAGES[name].help, epilog=_epilog(name))(command)


for _name in STAGES:
    _add_command(_name)


@app.command("doctor")
def _doctor(
    config: ConfigFile = None,
    settings: Settings = None,
    processes: Annotated[int, typer.Option("--processes", metavar="N", min=1, help="Processes, one per GPU.")] = 1,
    sharding: Annotated[
        Literal["none", "zero2", "fsdp"],
        typer.Option("--sharding", help="What the processes divide; fsdp also stands for ZeRO-3."),
    ] = "none",
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GIB", help="Memory per process in place of this machine's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, sizes in bytes.")] = False,
    debug: Debug = False,
) -> None:
    """Show this machine, or with --config whether that training fits it (exit status 1 where not)."""
    _examine(_Question(config, settings or (), processes, sharding, memory, as_json, debug))


Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of any stage; those below count too.")]
Main = Annotated[
    str | None, typer.Option("--main", metavar="MODEL", help="The model that the page is about; else the one of bfpo.")
]


@app.command("report")
def _report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", metavar="PAGE.html", help="The page; the same in .md, .json and .csv.")],
    title: Annotated[str, typer.Option("--title", help="The title of the page.")] = "Report",
    main_model: Main = None,
    debug: Debug = False,
) -> None:
    """Make one page of what run folders hold: scores, intervals, training, answers side by side."""
    _look("report", "bfpo.commands.report", debug, runs, out, title, main_model)


@app.command("watch")
def _watch(
    runs: Runs,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 = any free one.")] = 8765,
    every: Annotated[int, typer.Option("--every", metavar="SECONDS", min=1, help="Time between two looks.")] = 10,
    main_model: Main = None,
    debug: Debug = False,
) -> None:
    """Show the same page of a run in progress in a browser on this machine, until Ctrl-C."""
    _look("watch", "bfpo.commands.watch", debug, runs, port, every, main_model)


def _look(command: str, module: str, debug: bool, *arguments: Any) -> None:
    """Run a command that only reads run folders."""
    with _handled(command, debug):
        start_logging()
        keep_quiet()
        import_module(module).run(*arguments)


def _examine(question: _Question) -> None:
    with _handled("doctor", question.debug):
        start_logging()
        keep_quiet()
        status = import_module("bfpo.commands.doctor").run(
            question.config,
            question.settings,
            processes=question.processes,
            sharding=question.sharding,
            memory_gib=question.memory_gib,
            as_json=question.as_json,
        )
        raise typer.Exit(status)


def _execute(request: _Request) -> None:
    again = "the same command" if request.resume else "the same command and --resume"
    with _handled(request.stage, request.debug, again):
        _run(request)


@contextmanager
def _handled(command: str, debug: bool, again: str | None = None) -> Iterator[None]:
    """Turn what stops a command into one message and an exit status."""
    with _stop_signal():
        try:
            yield
        except typer.Exit:
            raise
        except BfpoError as error:
            _fail(debug, str(error), error.exit_code)
        except KeyboardInterrupt as stop:
            text = "stopped" if again is None else f"stopped; go on with {again}"
            _fail(debug, text, 143 if isinstance(stop, StopRequest) else 130)
        except BrokenPipeError:  # whoever read our output has had enough, as in `--keys | head`
            raise
        except Exception as error:
            hint = "" if debug else "; --debug shows where"
            _fail(debug, f"bfpo {command} failed: {type(error).__name__}: {error}{hint}", 1)


def _fail(debug: bool, message: str, exit_code: int) -> NoReturn:
    if debug:
        traceback.print_exc()
    problems = message.split("\n")
    text = message if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems:", *problems])
    sys.stderr.write(f"error: {text}\n")
    raise typer.Exit(exit_code)


@contextmanager
def _stop_signal() -> Iterator[None]:
    def stop(number: int, frame: object) -> NoReturn:
        raise StopRequest

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(request: _Request) -> None:
    start_logging()
    if request.keys:
        _show_keys(request.stage)
        return
    from bfpo.config import load_config

    config: Any = load_config(STAGES[request.stage].config_class(), request.config, request.settings)
    if request.dry_run:
        show(preview_stage(request.stage, config))
        return
    if request.out is None:
        raise ConfigError("--out: missing; give a folder that is new or empty, as in --out runs/first")
    run_stage(request.stage, config, request.out, resume=request.resume)


def _leave_process_group() -> bool:
    """Return whether this is one of several processes, and end what their launcher began.

    Such a process must leave without the interpreter's clean-up: threads of gloo make torch abort in it now and then,
    and the launcher would take a run that has finished for one that failed.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    distributed.destroy_process_group()
    return True


def _show_keys(stage: str) -> None:
    from bfpo.config import describe_keys

    keys = describe_keys(STAGES[stage].config_class())
    show_table(
        ("key", "default", "accepts", "meaning"),
        [(key.name, "(needed)" if key.default is None else key.default, key.allowed, key.description) for key in keys],
    )


def main() -> None:
    """Run the command line."""
    try:
        app()
    except SystemExit as end:
        if _leave_process_group():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
