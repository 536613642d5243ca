"""Which rows are read, and how: pairs, completions to imitate, labelled completions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from bfpo.core.remote import is_pinned, is_remote
from bfpo.core.settings import ConfigPart, FileList, NameOf, OneOrMany, PathText
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.layouts import AUTO
from bfpo.data.pair_layouts import PAIR_LAYOUTS, UNPAIRED
from bfpo.data.thinking import ThinkingKey

__all__ = [
    "ON_HUB",
    "ColumnKeys",
    "DataConfig",
    "FilesConfig",
    "LabelledConfig",
    "LeaveOut",
    "PairRowsConfig",
    "PromptSplit",
    "RowsConfig",
    "SafeWords",
    "SftDataConfig",
    "SplitConfig",
    "TemplateKwargs",
    "TrainDataConfig",
    "UnsafeWords",
    "check_words",
]

# Arguments of `apply_chat_template` that are not variables of a template, and variables that this package sets.
_NOT_VARIABLES = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding"}
    | {"continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "sanitize_control_tokens", "chat_template_kwargs"}
)


def _only_variables(values: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(_NOT_VARIABLES & values.keys()):
        raise ValueError(f"got {', '.join(taken)}, which bfpo sets itself; allowed: variables of the chat template")
    return values


TemplateKwargs = Annotated[
    dict[str, Any],
    AfterValidator(_only_variables),
    Field(description="variables that the chat template reads, such as {enable_thinking: false}"),
]
"""Values of a chat template's own variables, as `apply_chat_template` takes them."""


def _value_as_text(value: object) -> object:
    return str(value).lower() if isinstance(value, (int, float)) else value  # true and false too, as in LabelWords


Words = list[Annotated[str, BeforeValidator(_value_as_text)]]
"""Values of a label, as text."""

ColumnKeys = Annotated[
    dict[str, str | None],
    Field(description="our column name: its name in the files, where they differ; null leaves the column out"),
]
SafeWords = Annotated[
    Words, Field(description="values of safety labels that mean safe, where they are not true, false or in [0, 1]")
]
UnsafeWords = Annotated[Words, Field(description="values of safety labels that mean unsafe")]


def _data_set_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is None:
        raise ValueError(f"got {name!r}; needed: the name of a data set of the hub, ORG/NAME")
    return name


def check_words(safe: list[str], unsafe: list[str]) -> None:
    """Raise `ValueError` if only one of two settings of label values is given."""
    if bool(safe) != bool(unsafe):
        raise ValueError("safe_values, unsafe_values: give both or none")


class SplitConfig(ConfigPart):
    """A split by prompt: no prompt is in two parts."""

    held_out: int | None = Field(
        default=None, ge=1, description="number of prompts held out (the part test, the others are train)"
    )
    parts: dict[str, float] = Field(
        default={},
        description="in place of held_out: parts by name with their shares, such as {redteam: 0.7, test: 0.3}; the "
        "hash of a prompt's first turn decides: it is in the same part of every file of pairs or prompts",
    )
    seed: int = Field(default=0, ge=0, description="seed of the split")
    part: str = Field(default="train", description="which part is used here")

    @model_validator(mode="after")
    def _one_rule(self) -> SplitConfig:
        if bool(self.parts) == (self.held_out is not None):
            raise ValueError("held_out, parts: give one of them")
        if self.parts and (min(self.parts.values()) <= 0 or abs(sum(self.parts.values()) - 1) > 1e-6):
            shares = ", ".join(f"{name}: {share:g}" for name, share in self.parts.items())
            raise ValueError(f"parts: got {{{shares}}}; needed: shares above 0 whose sum is 1")
        if self.part not in (names := list(self.parts) or ["train", "test"]):
            raise ValueError(f"part: got {self.part!r}; allowed: {', '.join(names)}")
        return self


PromptSplit = Annotated[
    SplitConfig | None, Field(description="use only one part of a split by prompt; null = no split")
]


ON_HUB = ("hub", "revision", "subset", "hub_split")
"""Keys of `RowsConfig` that name a data set of the hub; `bfpo.runs.hub_data` puts its files in their place."""


class RowsConfig(ConfigPart):
    """Rows on disk or on the hub, whatever their labels. Relative paths are read from the current directory."""

    files: Annotated[list[PathText], OneOrMany] = Field(
        default=[],
        description="one path or a list: .jsonl, .json, .csv, .tsv (also .gz, .zst, .xz), .parquet, .arrow; folders of "
        "them (of several splits, train is read), or patterns such as data/train-*; with hub: names or patterns in it",
    )
    hub: Annotated[str, AfterValidator(_data_set_name)] | None = Field(
        default=None,
        description="data set of the hub, ORG/NAME, read from the hub's cache; null = files of this machine",
    )
    streaming: bool = Field(
        default=False,
        description="read hub over the network as rows are needed, without a copy of its files on this disk; limit "
        "then takes the first rows, and reading ends with them",
    )
    revision: str | None = Field(
        default=None, description="commit, tag or branch of hub; null = the newest, or that of the table of data sets"
    )
    subset: str | None = Field(default=None, min_length=1, description="subset of hub; null = its default one")
    hub_split: str | None = Field(
        default=None, min_length=1, description="split of hub, also as text under split; null = train"
    )
    columns: ColumnKeys = Field(default_factory=dict)
    safe_values: SafeWords = Field(default=[])
    unsafe_values: UnsafeWords = Field(default=[])
    source: str | None = Field(default=None, description="name of the source; null keeps the rows' own")
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop", description="a row that cannot be read stops the run or is skipped"
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="number of rows to use, drawn at random with the run's seed (with streaming the first ones); "
        "null = all",
    )
    split: PromptSplit = None

    @model_validator(mode="before")
    @classmethod
    def _split_of_the_hub(cls, values: object) -> object:
        """Take `split: train` beside hub as the split of the data set, as `datasets` calls it."""
        if isinstance(values, dict) and values.get("hub") and isinstance(values.get("split"), str):
            values = dict(values)
            if values.get("hub_split") is not None:
                raise ValueError("split, hub_split: give one of them as the split of hub")
            values["hub_split"] = values.pop("split")
        return values

    @model_validator(mode="after")
    def _where_the_rows_are(self) -> RowsConfig:
        check_words(self.safe_values, self.unsafe_values)
        if not self.files and self.hub is None:
            raise ValueError("files, hub: give one of them: files of this machine, or a data set of the hub, ORG/NAME")
        named = [name for name in self.files if is_remote(name)]
        if unclear := [name for name in named if not is_pinned(name)]:
            raise ValueError(f"files: got {unclear[0]!r}; name a data set of the hub by hub, with streaming: true")
        if self.streaming and self.hub is None and not named:
            raise ValueError("streaming: not read without hub; leave it out")
        for key in ON_HUB[1:]:
            if self.hub is None and getattr(self, key) is not None:
                raise ValueError(f"{key}: not read without hub; leave it out")
            if self.files and key in ("subset", "hub_split") and getattr(self, key) is not None:
                raise ValueError(f"{key}: not read where files name the files of hub; leave one of the two out")
        return self


class PairRowsConfig(RowsConfig):
    """Preference pairs on disk, whatever their labels."""

    layout: Annotated[str, NameOf(lambda: (AUTO, *PAIR_LAYOUTS.names))] = Field(
        default=AUTO, description="form of the rows; auto finds it from the columns"
    )


class FilesConfig(RowsConfig):
    """Rows on disk and how to read them, labels included."""

    unknown_label: Literal["error", "safe", "drop"] = Field(
        default="error", description="what an unknown safety label is: an error, taken as safe, or its row dropped"
    )


class DataConfig(FilesConfig, PairRowsConfig):
    """Preference pairs on disk, to train or to test on."""


class TrainDataConfig(DataConfig):
    """Preference pairs on disk, or single answers, to train on."""

    layout: Annotated[str, NameOf(lambda: (AUTO, *PAIR_LAYOUTS.names, UNPAIRED))] = Field(
        default=AUTO,
        description="form of the rows; auto finds that of pairs from the columns; unpaired = single answers",
    )


LeaveOut = Annotated[
    list[Literal["refused", "incoherent", "cut"]],
    Field(
        description="completions that are not learned: those that decline, in full or in part; empty, looping or "
        "off-language ones; and those that were cut at the token limit"
    ),
]
"""Kinds of a model's own answers that are left out."""


class SftDataConfig(FilesConfig):
    """Completions to imitate, or a pair file of which some completions are imitated."""

    layout: Annotated[str, NameOf(lambda: (AUTO, *COMPLETION_LAYOUTS.names, *PAIR_LAYOUTS.names))] = Field(
        default=AUTO,
        description="form of the rows, completions = {prompt, completion} or {messages}; auto finds it",
    )
    use: Literal["all", "chosen", "safe"] = Field(
        default="all",
        description="of pairs: all completions, the chosen, or those labelled safe (also of labelled completions)",
    )
    leave_out: LeaveOut = Field(default=[])


class LabelledConfig(ConfigPart):
    """Completions that people have labelled safe or unsafe; a pair file gives two a row."""

    files: FileList = Field(description="JSON lines, CSV or Parquet, one path or a list")
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="our column name (id, prompt, completion, is_safe, kind): its name in the files, where they differ",
    )
    safe_values: Words = Field(
        default=[], description="values of is_safe that mean safe, where it is not true or false; others are left out"
    )
    unsafe_values: Words = Field(default=[], description="values of is_safe that mean unsafe")
    where: dict[str, str] = Field(
        default_factory=dict,
        description="only rows whose column (the file's name) fits a pattern such as contrast_*",
    )
    thinking: ThinkingKey = None
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop", description="a row that cannot be read stops the run or is skipped"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> LabelledConfig:
        check_words(self.safe_values, self.unsafe_values)
        return self
