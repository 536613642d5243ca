"""The catalogue of suites, one YAML file each: prompts, source, judge and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from bfpo.core.errors import ConfigError
from bfpo.core.inputs import reason_outside
from bfpo.core.yaml_text import read_yaml

__all__ = [
    "FOLDER",
    "InspectTask",
    "Source",
    "Suite",
    "SuiteJudge",
    "known_sets",
    "known_suites",
    "load_suites",
    "own_suites",
]

FOLDER = Path(__file__).parent
_SETS = "sets.yaml"
Direction = Literal["higher", "lower", "half"]


def _inside(name: str) -> str:
    if (reason := reason_outside(name)) is not None:
        raise ValueError(f"got {name!r}: {reason}; a suite names only what is inside the folders that its user gives")
    return name


Inside = Annotated[str, AfterValidator(_inside)]
"""A relative path or pattern without `..`: a suite may come from somebody else."""


def _no_file(judge: str) -> str:
    if judge.lower().endswith((".yaml", ".yml")):
        raise ValueError(
            f"got {judge!r}; a suite may not name a judge's file, since its url would get the answers; name the file "
            "in suites.judges"
        )
    return judge


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Source(_Part):
    """The source of the prompts (or the documents of a task); local files take precedence over the hub.

    `files` are names, with wildcards, to look for in the user's folders. `revision` is a commit of the hub's data set;
    without one the newest is used and reported. `text` and `where` read prompts from rows of another layout: the dotted
    name of the text, and values that a row must have. A prompt with a word or phrase of `without` is left out
    and counted; a star at the end stands for any ending.
    """

    hub: str | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    patterns: tuple[str, ...] = Field(default=(), strict=False)
    files: tuple[Inside, ...] = Field(default=(), strict=False)
    world: Literal["validation", "test"] | None = None
    text: str | None = None
    where: dict[str, str | bool | int] = {}
    without: Annotated[tuple[Annotated[str, Field(pattern=r"^\w([^*]*\w)?\*?$")], ...], Field(strict=False)] = ()


class SuiteJudge(_Part):
    """The judge: a role for which the user may name a judge, and the default judge in its short form."""

    role: Literal["harm", "ranker"]
    default: Annotated[str, AfterValidator(_no_file)] | None = None


class Sampling(_Part):
    """How completions are sampled."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)


class InspectTask(_Part):
    """A task of inspect-ai: `PACKAGE/TASK`, or `FILE.py@TASK` from `tasks/` here or the working directory.

    The first of `files` (names) found in the user's folders is the task's argument `file`. With `grader`, the user's
    grader has inspect-ai's role `grader`. The metric is divided by `largest`, its largest possible value.
    """

    task: Inside = Field(pattern=r"^[^@]+\.py@\w+$|^[^@/]+/[\w-]+$")
    arguments: dict[str, str | bool | int | float | None] = {}
    files: tuple[Inside, ...] = Field(default=(), strict=False)
    grader: bool = False
    largest: float = Field(default=1.0, gt=0)


class Suite(_Part):
    """One suite; `metrics` maps a metric to its better direction (`half`: 0.5 is the ideal).

    A `generative` suite has prompts, sampling and a judge (except for refusals, which are always judged). A
    `discriminative` one has a `task` of lm-eval: a file of lm-eval, of `tasks/` here or of the working directory. One
    of kind `inspect` is a task of inspect-ai, which has its own prompts.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    title: str
    summary: str
    kind: Literal["generative", "discriminative", "inspect"]
    licence: str
    source: Source = Source()
    judge: SuiteJudge | None = None
    metrics: dict[str, Direction] = Field(min_length=1)
    sampling: Sampling | None = None
    columns: dict[str, str | None] = {}
    prompt_kind: Literal["harmful", "benign", "borderline"] | None = None
    outputs: Literal["alpaca_eval"] | None = None
    task: Inside | None = None
    inspect: InspectTask | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Suite:
        if self.kind == "generative" and (self.sampling is None or self.task is not None):
            raise ValueError("a generative suite needs sampling, and has no task")
        if self.kind == "discriminative" and (self.task is None or self.sampling is not None or self.judge is not None):
            raise ValueError("a discriminative suite needs a task, and has neither sampling nor judge")
        if (self.kind == "inspect") != (self.inspect is not None):
            raise ValueError("a suite of kind inspect has inspect (a task of inspect-ai), and no other suite has")
        if self.kind == "inspect":
            if self.model_fields_set & {"source", "task", "sampling", "judge", "columns", "prompt_kind", "outputs"}:
                raise ValueError("a suite of kind inspect has no source, task, sampling, judge, columns or outputs")
            if len(self.metrics) != 1:
                raise ValueError("a suite of kind inspect has one metric, by its name in inspect-ai's log")
            return self
        if not (self.source.hub or self.source.files or self.source.world):
            raise ValueError("source: hub, files or world is needed")
        return self

    def at(self, commit: str | None) -> Suite:
        """Return the suite with its data set at a commit of the hub, unless it names one itself."""
        if commit is None or self.source.revision is not None:
            return self
        return self.model_copy(update={"source": self.source.model_copy(update={"revision": commit})})


@cache
def known_suites() -> dict[str, Suite]:
    """Return the suites that come with the package, by name."""
    return {path.stem: _read(path) for path in sorted(FOLDER.glob("*.yaml")) if path.name != _SETS}


@cache
def known_sets() -> dict[str, tuple[str, ...]]:
    """Return the sets of suites by name, each in the order of a report."""
    sets: dict[str, list[str]] = read_yaml(FOLDER / _SETS)[0]
    return {name: tuple(suites) for name, suites in sets.items()}


def load_suites(names: Iterable[str]) -> list[Suite]:
    """Return the suites of the named sets, suites and `.yaml` files, in order, each once.

    Raises `ConfigError` for an unknown name, an invalid file, or two suites of one name.
    """
    suites: dict[str, Suite] = {}
    for name in names:
        for suite in _found(name):
            if suites.setdefault(suite.name, suite) != suite:
                raise ConfigError(f"suites: {name} is named {suite.name!r}, as is another suite; rename one")
    return list(suites.values())


def own_suites(names: Iterable[str]) -> dict[str, Suite]:
    """Return the suites that are user's files, by file."""
    return {name: _read(Path(name)) for name in names if _is_file(name)}


def _is_file(name: str) -> bool:
    return name.lower().endswith((".yaml", ".yml"))


def _found(name: str) -> list[Suite]:
    if _is_file(name):
        return [_read(Path(name))]
    if name in known_sets():
        return [known_suites()[each] for each in known_sets()[name]]
    if name in known_suites():
        return [known_suites()[name]]
    allowed = [*known_sets(), *known_suites()]
    close = get_close_matches(name, allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(f"suites.use: got {name!r}{hint}; allowed: {', '.join(allowed)}, or a .yaml file of a suite")


def _read(path: Path) -> Suite:
    values, _ = read_yaml(path, "the suite")
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(map(_problem, error.errors()))
        raise ConfigError(f"{path}: not a suite: {problems}; docs/evaluation.md describes the format") from error


def _problem(details: ErrorDetails) -> str:
    key, value = ".".join(map(str, details["loc"])), details["input"]
    shown = isinstance(value, str | int | float | None) and details["type"] != "value_error"  # which says it itself
    got = f"got {value!r}; " if shown else ""
    return f"{key}: {got}{details['msg']}"
