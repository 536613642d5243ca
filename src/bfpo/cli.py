"""The command line, one command per stage. A stage is imported when it runs, so that `--help` does not load torch."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from bfpo._version import __version__
from bfpo.core.console import Outcome, show, show_error, show_json, show_table, start_logging
from bfpo.core.errors import BfpoError, ConfigError, StopRequest, first_line
from bfpo.core.processes import is_first_process
from bfpo.core.secrets import hide_in_values
from bfpo.runs.stages import STAGES, keep_quiet, plan_stage, run_stage

if TYPE_CHECKING:
    from bfpo.config import StageConfig

__all__ = ["app", "main"]

app = typer.Typer(
    name="bfpo",
    help="Align a language model to be helpful and safe, from preference pairs with safety labels.",
    epilog="Start with: bfpo demo --out runs/demo. Settings of a command: bfpo COMMAND --keys.",
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
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One setting, overrides the file; null: its default; may be repeated."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder, new or empty.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out; no effect on a finished run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, with data counts, and exit.")]
_KEYS_HELP = "List the settings and their allowed values, and exit."
Keys = Annotated[bool, typer.Option("--keys", help=_KEYS_HELP)]
_SCHEMA_HELP = "Write the JSON Schema of the config file, for editors, and exit."
Schema = Annotated[bool, typer.Option("--schema", help=_SCHEMA_HELP)]
_JSON_HELP = "Write one JSON object to stdout, and all text to stderr."
AsJson = Annotated[bool, typer.Option("--json", help=_JSON_HELP)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True, slots=True)
class ShortOption:
    """An option `--NAME` as shorthand for `--set KEY=VALUE`; `kind` is text, a number, a flag, or a list of text.

    `positional`: given by position, without a name.
    """

    name: str
    key: str
    help: str
    kind: type = str
    metavar: str | None = None
    positional: bool = False

    def parameter(self) -> Parameter:
        """Return the parameter that typer turns into the option."""
        text = f"{self.help} Short for --set {self.key}={'true' if self.kind is bool else self.metavar}."
        if self.kind is list:
            text = text.replace("Short", "May be repeated; short")
        annotation: Any = list[str] if self.kind is list else self.kind
        option: Any = typer.Option(f"--{self.name}", metavar=self.metavar, help=text)
        if self.positional:
            option = typer.Argument(metavar=self.metavar, help=text, show_default=False)
        default = False if self.kind is bool else None
        accepted = annotation if self.kind is bool else annotation | None
        return Parameter(
            self._argument, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[accepted, option]
        )

    @property
    def _argument(self) -> str:
        return self.name.replace("-", "_")

    def settings(self, values: Mapping[str, Any]) -> Iterator[str]:
        """Yield the option's setting if the option was used; the value is quoted, so that it is not parsed as YAML."""
        value = values[self._argument]
        if value is not None and value is not False and value != []:
            yield f"{self.key}={json.dumps(value, ensure_ascii=False)}"


_MAX_REQUESTS = ShortOption("max-requests", "max_requests", "Maximum number of requests to servers.", int, "N")

SHORT_OPTIONS: dict[str, tuple[ShortOption, ...]] = {
    "demo": (
        ShortOption("seeds", "seeds", "Number of seeds.", int, "N"),
        ShortOption("full", "full", "Eight methods in place of four.", bool),
    ),
    "generate": (
        ShortOption("model", "model", "Model: folder, hub id, or name on the server.", str, "M"),
        ShortOption("prompts", "prompts", "Prompts: file or folder.", str, "FILE"),
        _MAX_REQUESTS,
    ),
    "compare": (
        ShortOption("seeds", "seeds", "Number of seeds.", int, "N"),
        ShortOption("quick", "quick", "Two settings per method instead of four.", bool),
    ),
    "sweep": (
        ShortOption("grid", "grid", "Keys of train and their values, such as beta=0.05,0.1,alpha=0,0.5.", str, "K=V,V"),
        ShortOption("at-least", "at_least", "Constraint on the chosen model: harmless=0.95.", str, "METRIC=X"),
    ),
    "interpolate": (
        ShortOption("first", "first", "The model at weight 0.", str, "A", positional=True),
        ShortOption("second", "second", "The model at weight 1.", str, "B", positional=True),
        ShortOption("weights", "weights", "Weights of B, such as 0,0.25,0.5.", str, "W,W"),
    ),
    "judge-train": (ShortOption("data", "data.files", "Labelled completions.", list, "FILE"),),
    "clean": (
        ShortOption("data", "data.files", "Pairs.", list, "FILE"),
        ShortOption("policy", "policy", "Contradicted labels: keep, drop, soften or flip.", str, "P"),
        _MAX_REQUESTS,
    ),
    "judge-check": (
        ShortOption("judge", "judge", "Judge: oracle, a folder of judge-train, or FORMAT[:MODEL].", str, "J"),
        ShortOption("data", "data.files", "Completions with human labels.", list, "FILE"),
        _MAX_REQUESTS,
    ),
    "label": (_MAX_REQUESTS,),
    "evaluate": (
        ShortOption("suites", "suites.use", "Suites, sets of suites, or .yaml files.", list, "NAME"),
        ShortOption("folder", "suites.folders", "Folder of suite files.", list, "DIR"),
        ShortOption("model", "model", "Model: folder or hub id.", str, "M"),
    ),
    "redteam": (
        ShortOption("model", "model", "Model under attack: folder or hub id.", str, "M"),
        ShortOption("prompts", "prompts", "File of prompts.", str, "FILE"),
        ShortOption("harmless", "harmless", "File of harmless prompts, whose refusals are needless.", str, "FILE"),
        ShortOption("start", "start", "Start model, whose answers to them are chosen.", str, "M"),
        ShortOption("judge", "judges", "Judge: oracle, a folder of judge-train, or FORMAT[:MODEL].", list, "J"),
        ShortOption("ranker", "ranker", "Ranker: oracle, reward-model:MODEL, pairrm, or pairwise:MODEL.", str, "R"),
        _MAX_REQUESTS,
    ),
}


def _show_version(asked: bool) -> None:
    if asked:
        show(f"bfpo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


def _add_command(name: str) -> None:
    """Add the command of a stage: the common options and the stage's own short options."""
    shorts = SHORT_OPTIONS.get(name, ())

    before = {"config": ConfigFile, "settings": Settings, "out": Out}
    after = {"resume": Resume, "dry_run": DryRun, "keys": Keys, "schema": Schema, "as_json": AsJson, "debug": Debug}

    def command(**values: Any) -> None:
        settings = [*(values["settings"] or ()), *(text for short in shorts for text in short.settings(values))]
        _execute(name, settings, **{key: values[key] for key in ("config", "out", *after)})

    # typer takes the options from the signature.
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            *(Parameter(key, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for key, kind in before.items()),
            *(short.parameter() for short in shorts),
            *(Parameter(key, Parameter.KEYWORD_ONLY, default=False, annotation=kind) for key, kind in after.items()),
        ]
    )
    app.command(name, help=STAGES[name].help, epilog=f"Settings and their allowed values: bfpo {name} --keys.")(command)


for _name in STAGES:
    _add_command(_name)


@app.command("doctor")
def _doctor(
    config: ConfigFile = None,
    settings: Settings = None,
    processes: Annotated[int, typer.Option("--processes", metavar="N", min=1, help="Processes, one per GPU.")] = 1,
    sharding: Annotated[
        Literal["none", "zero2", "fsdp"],
        typer.Option(
            "--sharding", metavar="none|zero2|fsdp", help="How the processes are sharded; fsdp also stands for ZeRO-3."
        ),
    ] = "none",
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GIB", help="Memory per process, instead of this machine's.")
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Read data and weights too: what the setting asks of a sample of the pairs.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show this machine, or whether a training fits it. With --config the exit code is 1 if it does not fit."""
    options = {"processes": processes, "sharding": sharding, "memory_gib": memory, "data": data}
    _call("doctor", debug, config, settings or (), **options, as_json=as_json)


Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of any command, or folders of them.")]
Main = Annotated[
    str | None,
    typer.Option("--main", metavar="MODEL", help="Main model; default: the only one of method bfpo."),
]


@app.command("report")
def _report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", metavar="PAGE.html", help="The page; also as .md, .json and .csv.")],
    title: Annotated[str, typer.Option("--title", help="Title of the page.")] = "Report",
    main_model: Main = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make one page from run folders. It shows scores, intervals, training curves, and answers side by side."""
    _call("report", debug, runs, out, title, main_model, as_json=as_json)


@app.command("watch")
def _watch(
    runs: Runs,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0: any free port.")] = 8765,
    every: Annotated[int, typer.Option("--every", metavar="SECONDS", min=1, help="Time between updates.")] = 10,
    main_model: Main = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Serve the page of a run in progress, until Ctrl-C. Only browsers on this machine can open it."""
    _call("watch", debug, runs, port, every, main_model, as_json=as_json)


@app.command("annotate")
def _annotate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of generate, evaluate or redteam.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the labels; goes on if it has some.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Who labels.")],
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=1, help="Answers of each model; default: 60.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sample.")] = 0,
    terminal: Annotated[bool, typer.Option("--terminal", help="Label here instead of in a browser.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0: any free port.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Label a blind sample of models' answers. This is done in a browser on this machine or in a terminal."""
    _call("annotate", debug, runs, out, name, sample, seed, terminal, port, as_json=as_json)


@app.command("convert-config")
def _convert_config(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Config of TRL, axolotl or LLaMA-Factory, YAML or JSON.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.yaml", help="The new config, a new file; default: stdout.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Convert a config of TRL, axolotl or LLaMA-Factory. The new one lists what is not carried over."""
    _call("convert-config", debug, file, out, as_json=as_json)


@app.command("export")
def _export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Run of train or sft, a checkpoint of one, model folder, LoRA adapter, or hub id."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the model, new or empty.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option("--dtype", help="Number type of the weights.")
    ] = "bfloat16",
    gguf: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option("--gguf", help="Also write a GGUF file of this number type, for llama.cpp (extra gguf)."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="R", help="Commit, tag or branch of a model on the hub.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Push the folder to this repository of the hub.")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="What a new repository is; default: as its owner has it on the hub."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a model as a plain folder, and push it. Adapters are merged, and all weights have one number type."""
    _call("export", debug, model, out, dtype, gguf, revision, push, private, as_json=as_json)


def _show_keys(config: type[StageConfig]) -> Outcome:
    from bfpo.config import describe_keys

    columns = ("key", "default", "accepts", "meaning")
    rows = [(key.name, key.default, key.allowed, key.description) for key in describe_keys(config)]
    show_table(columns, [(name, "(needed)" if default is None else default, *rest) for name, default, *rest in rows])
    return Outcome(0, {"keys": [dict(zip(columns, row, strict=True)) for row in rows]})


def _show_schema(config: type[StageConfig]) -> Outcome:
    from bfpo.config.json_schema import json_schema

    schema = json_schema(config)
    sys.stdout.write(json.dumps(schema, indent=1) + "\n")
    return Outcome(0, {"schema": schema})


def _show_early(ctx: typer.Context, param: typer.CallbackParam, value: bool) -> bool:
    """Show the keys or the schema of a command that is no stage, before its arguments are missed.

    `--json` is read as early as these two, in any order: what is asked is shown when both are known.
    """
    known = {**ctx.params, str(param.name): value}
    asked = next((show for name, show in (("keys", _show_keys), ("schema", _show_schema)) if known.get(name)), None)
    if asked is not None and "as_json" in known:
        command = str(ctx.info_name)
        config = getattr(import_module("bfpo.config"), f"{command.capitalize()}Config")
        _perform(command, False, known["as_json"], lambda: asked(config))
    return value


_EARLY: dict[str, Any] = {"is_eager": True, "callback": _show_early}
EarlyKeys = Annotated[bool, typer.Option("--keys", help=_KEYS_HELP, **_EARLY)]
EarlySchema = Annotated[bool, typer.Option("--schema", help=_SCHEMA_HELP, **_EARLY)]
EarlyJson = Annotated[bool, typer.Option("--json", help=_JSON_HELP, **_EARLY)]


@app.command("chat")
def _chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model: folder, run of train or sft, or hub id.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="OTHER", help="Second model, which gets the same messages.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="J", help="Judge of the replies: a folder of judge-train, or FORMAT[:MODEL]."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="T", help="Sampling temperature, 0: most probable token; default: 0.7."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", help="Sample from the tokens with this probability; default: 1."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", help="Longest reply in tokens; default: 512.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of the sampling; default: 0.")] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    keys: EarlyKeys = False,
    schema: EarlySchema = False,
    as_json: EarlyJson = False,
    debug: Debug = False,
) -> None:
    """Talk to a model, or to two side by side. Messages come from the terminal, or from stdin, one a line."""
    given = {"model": model, "against": against, "judge": judge, "system": system, "temperature": temperature}
    given |= {"top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    short = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
    _call("chat", debug, config, [*(settings or ()), *short], as_json=as_json)


@app.command("gate")
def _gate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Evaluation of the model; one of several: RUN/models/NAME.")
    ],
    against: Annotated[
        Path, typer.Option("--against", metavar="START", help="Evaluation of its start model, likewise.")
    ],
    config: ConfigFile = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of gate.json and gate.html; default: RUN.")
    ] = None,
    keys: EarlyKeys = False,
    schema: EarlySchema = False,
    as_json: EarlyJson = False,
    debug: Debug = False,
) -> None:
    """Test conditions on a model against its start model. Exit code: 0 pass, 3 fail, 4 cannot be told, 2 bad input."""
    _call("gate", debug, run, against, config, settings or (), out, as_json=as_json)


def _execute(
    stage: str,
    settings: Sequence[str],
    *,
    config: Path | None,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    keys: bool,
    schema: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Run a stage, or only show its keys, the schema of its config or what it would do."""

    def action() -> Outcome:
        if keys or schema:
            return (_show_keys if keys else _show_schema)(STAGES[stage].config_class())
        from bfpo.config import load_config

        loaded: Any = load_config(STAGES[stage].config_class(), config, settings)
        if dry_run:
            text, planned = plan_stage(stage, loaded)
            show(text)
            return Outcome(0, {"config": hide_in_values(loaded.resolved()), "planned": planned, "text": text})
        if out is None:
            raise ConfigError("--out: missing; give a new or empty folder, such as --out runs/first")
        folder = run_stage(stage, loaded, out, resume=resume)
        # Another process of a launcher has nothing to list, and may end before the first one has made the folder.
        places = folder.path.iterdir() if folder.is_writer else ()
        files = sorted(path.name for path in places if not path.name.startswith("."))
        return Outcome(0, {"out": str(out), "files": files, "record": folder.record})

    again = "the same command" if resume else "the same command and --resume"
    _perform(stage, debug, as_json, action, None if keys or schema or dry_run else out, again)


def _call(command: str, debug: bool, *arguments: Any, as_json: bool, **options: Any) -> None:
    """Run a command that is not a stage."""

    def action() -> Outcome:
        keep_quiet()
        outcome: Outcome = import_module(f"bfpo.commands.{command.replace('-', '_')}").run(*arguments, **options)
        return outcome

    _perform(command, debug, as_json, action)


def _perform(
    command: str,
    debug: bool,
    as_json: bool,
    action: Callable[[], Outcome],
    out: Path | None = None,
    resume_with: str | None = None,
) -> NoReturn:
    """Do it and exit; an exception or a signal becomes one message and an exit code. All output as JSON is made here.

    `out`: the run folder, if there is one that `--resume` could continue.
    """
    status, failure = "finished", None
    with _stop_on_sigterm():
        try:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                start_logging()
                outcome = action()
        except BrokenPipeError:  # the reader of our output has exited, as in `--keys | head`
            raise
        except (Exception, KeyboardInterrupt) as error:
            failure = error
            message, code = _words_for(command, error, debug, resume_with)
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            facts: dict[str, Any] = {"error": {"kind": type(error).__name__, "message": message}}
            if out is not None:
                facts |= {"out": str(out), "resumable": (out / "run.json").is_file()}
            outcome = Outcome(code, facts)
            _show_problem(message, debug, counted=isinstance(error, ConfigError))
    if as_json and is_first_process():
        from bfpo.core.records import as_json as json_values

        head = {"command": command, "status": status, "exit_code": outcome.exit_code}
        show_json(json_values({**head, **outcome.facts}))
    raise typer.Exit(outcome.exit_code) from failure


def _words_for(command: str, error: BaseException, debug: bool, resume_with: str | None) -> tuple[str, int]:
    """Return the message and the exit code of an exception."""
    if isinstance(error, BfpoError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        text = "stopped" if resume_with is None else f"stopped; continue with {resume_with}"
        return text, 143 if isinstance(error, StopRequest) else 130
    if isinstance(error, RecursionError):
        return f"bfpo {command}: an input nests lists or objects too deeply to be read; shorten it", 2
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported for every command
        then = "" if resume_with is None else f", then continue with {resume_with}"
        return (
            f"bfpo {command}: out of memory on the GPU ({first_line(error)}); make the batch smaller (batch_size or "
            f"..._per_microbatch, see bfpo {command} --keys) or end what else uses the GPU{then}"
        ), 1
    hint = "" if debug else "; use --debug for the traceback"
    return f"bfpo {command} failed: {type(error).__name__}: {error}{hint}", 1


def _show_problem(message: str, debug: bool, *, counted: bool) -> None:
    """Show what is wrong; `counted`: each line is a problem of its own."""
    if debug:
        show_error(traceback.format_exc().rstrip())
    problems = message.split("\n")
    text = message if len(problems) == 1 or not counted else "\n  ".join([f"{len(problems)} problems:", *problems])
    show_error(f"error: {text}")


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    def stop(number: int, frame: object) -> NoReturn:
        raise StopRequest

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line; a character that the encoding of stdout lacks is written as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as end:
        gc.freeze()  # at its end Python would look for cycles in all objects, which the process gives back anyway
        if _leave_process_group():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


def _leave_process_group() -> bool:
    """Destroy the process group that a launcher has set up; return whether there was one.

    Such a process must exit without the interpreter's clean-up: threads of gloo sometimes make torch abort in it, and
    the launcher would then report a finished run as failed.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    distributed.destroy_process_group()
    return True
