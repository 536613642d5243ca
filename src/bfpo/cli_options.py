"""Short options of commands: the keys that are given most often, by a name of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any

import typer

__all__ = ["SHORT_OPTIONS", "ShortOption"]


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
