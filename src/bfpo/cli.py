"""The command line: one command per stage. Stages are imported when they run, so `--help` needs no torch."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from bfpo._version import __version__
from bfpo.console import show, show_table, start_logging
from bfpo.errors import BfpoError, ConfigError, StopRequest
from bfpo.stages import STAGES, preview_stage, run_stage

__all__ = ["app", "main"]

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
    def command(
        config: ConfigFile = None,
        settings: Settings = None,
        out: Out = None,
        resume: Resume = False,
        dry_run: DryRun = False,
        keys: Keys = False,
        debug: Debug = False,
    ) -> None:
        _execute(_Request(name, config, settings or (), out, resume, dry_run, keys, debug))

    app.command(name, help=STAGES[name].help, epilog=_epilog(name))(command)


@app.command("demo", help=STAGES["demo"].help, epilog=_epilog("demo"))
def _demo(
    config: ConfigFile = None,
    settings: Settings = None,
    out: Out = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", metavar="N", help="Number of seeds; short for --set seeds=N.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All methods; short for --set full=true.")] = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    keys: Keys = False,
    debug: Debug = False,
) -> None:
    short = ([f"seeds={seeds}"] if seeds is not None else []) + (["full=true"] if full else [])
    _execute(_Request("demo", config, [*(settings or ()), *short], out, resume, dry_run, keys, debug))


for _name in STAGES:
    if _name != "demo":
        _add_command(_name)


def _execute(request: _Request) -> None:
    with _stop_signal():
        try:
            _run(request)
        except BfpoError as error:
            _fail(request, str(error), error.exit_code)
        except KeyboardInterrupt as stop:
            again = "the same command" if request.resume else "the same command and --resume"
            _fail(request, f"stopped; go on with {again}", 143 if isinstance(stop, StopRequest) else 130)
        except BrokenPipeError:  # whoever read our output has had enough, as in `--keys | head`
            raise
        except Exception as error:
            hint = "" if request.debug else "; --debug shows where"
            _fail(request, f"bfpo {request.stage} failed: {type(error).__name__}: {error}{hint}", 1)


def _fail(request: _Request, message: str, exit_code: int) -> NoReturn:
    if request.debug:
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


def _show_keys(stage: str) -> None:
    from bfpo.config import describe_keys

    keys = describe_keys(STAGES[stage].config_class())
    show_table(
        ("key", "default", "accepts", "meaning"),
        [(key.name, "(needed)" if key.default is None else key.default, key.allowed, key.description) for key in keys],
    )


def main() -> None:
    """Run the command line."""
    app()
