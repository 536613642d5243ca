"""Config of `bfpo prepare`: the mixture file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from bfpo.core.settings import ConfigPart, FileList, Need, PathText, StageConfig, beside
from bfpo.data.settings import ColumnKeys, LeaveOut, SafeWords, UnsafeWords, check_words
from bfpo.execution.settings import ExecutedRuns

__all__ = [
    "DeepRefusalsConfig",
    "HeldOutConfig",
    "MixtureSourceConfig",
    "NearDuplicatesConfig",
    "PrepareConfig",
    "SuiteConfig",
]


class DeepRefusalsConfig(ConfigPart):
    """Refusals after a harmful beginning, from pairs of an unsafe answer and a safe one that declines."""

    most_words: int = Field(
        default=40,
        ge=1,
        description="most words of the unsafe answer that are given; each row's number is from 1 to it",
    )
    transitions: list[str] = Field(
        default=["\n\n"],
        min_length=1,
        description="texts between the beginning and the refusal, one drawn for each row",
    )


class MixtureSourceConfig(ConfigPart):
    """One source of the mixture: a data set of the table by its name, or any files."""

    name: str = Field(
        min_length=1,
        description="a data set of the table, or any name beside files; it begins the ids of its rows",
    )
    files: FileList | None = Field(
        default=None, description="files or a folder on this machine; null = where the table says (folder or hub)"
    )
    layout: str | None = Field(
        default=None, description="form of the rows (docs/data.md); null = the table's, else found from the columns"
    )
    columns: ColumnKeys = Field(default_factory=dict)
    safe_values: SafeWords = Field(default=[])
    unsafe_values: UnsafeWords = Field(default=[])
    revision: str | None = Field(default=None, description="revision on the hub; null = the table's")
    licence: str | None = Field(default=None, description="licence, kept in the manifest; null = the table's")
    stream: Literal["main", "buffer", "sft"] = Field(
        default="main", description="where its rows go: main and buffer are pairs, sft are completions"
    )
    use: Literal["all", "chosen", "safe"] | None = Field(
        default=None,
        description="of pairs in the sft stream: every completion, the more helpful one, or those labelled safe "
        "(null = all)",
    )
    count: int | None = Field(
        default=None, ge=1, description="number of training rows, drawn by a hash; null = by weight, else all"
    )
    weight: float | None = Field(default=None, gt=0, description="share of total, in place of count")
    oversample: bool = Field(default=False, description="repeat rows where more are asked for than there are")
    unknown_label: Literal["error", "safe", "drop", "keep"] = Field(
        default="error",
        description="what an unknown safety label is: an error, taken as safe, its row dropped, or kept as unknown",
    )
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop", description="a row that cannot be read stops the run or is skipped"
    )
    leave_out: LeaveOut = Field(default=[])
    deep_refusals: DeepRefusalsConfig | None = Field(
        default=None,
        description="make each row a refusal after the first words of the unsafe answer, of pairs that have both: a "
        "completion in the sft stream, else a pair against the rest of that answer; null = rows as they are",
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> MixtureSourceConfig:
        check_words(self.safe_values, self.unsafe_values)
        return self

    @model_validator(mode="after")
    def _name_begins_ids(self) -> MixtureSourceConfig:
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise ValueError(f"name: got {self.name!r}; allowed: letters, digits and ._+- (it begins the ids of rows)")
        return self

    @model_validator(mode="after")
    def _keys_that_are_read(self) -> MixtureSourceConfig:
        if self.count is not None and self.weight is not None:
            raise ValueError("weight: not read where count is set; leave one of the two out")
        if self.oversample and self.count is None and self.weight is None:
            raise ValueError("oversample: not read without count or weight; give one of them")
        if self.use is not None and self.stream != "sft":
            raise ValueError(f"use: not read in the {self.stream} stream, which takes pairs; leave it out")
        if self.use is not None and self.deep_refusals is not None:
            raise ValueError("use: not read beside deep_refusals, which takes the refusals; leave it out")
        if self.leave_out and self.stream != "sft":
            raise ValueError(f"leave_out: not read in the {self.stream} stream, which takes pairs; leave it out")
        return self


class HeldOutConfig(ConfigPart):
    """Shares of the prompts that are held out."""

    validation: float = Field(default=0.05, ge=0, lt=1, description="share of the prompts in the validation split")
    test: float = Field(default=0.05, ge=0, lt=1, description="share of the prompts in the test split")

    @model_validator(mode="after")
    def _something_to_train_on(self) -> HeldOutConfig:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test: got {self.validation + self.test:g}; allowed: below 1, for training")
        return self


class NearDuplicatesConfig(ConfigPart):
    """Near-duplicate prompts, found by MinHash of their character n-grams."""

    threshold: float = Field(
        default=0.8, ge=0.4, le=1, description="Jaccard similarity of two prompts' n-grams that makes them one"
    )
    characters: int = Field(default=5, ge=2, le=50, description="characters of an n-gram")
    permutations: int = Field(
        default=128,
        ge=16,
        le=1024,
        description="MinHash permutations; more cost time and make similarities more precise",
    )


class SuiteConfig(ConfigPart):
    """Evaluation prompts to remove from the data."""

    name: str = Field(min_length=1, description="name of the suite in the counts")
    files: FileList = Field(description="files of prompts, one path or a list")
    columns: dict[str, str | None] = Field(
        default_factory=dict, description="our column name (prompt, id): its name in the files, where they differ"
    )


class PrepareConfig(StageConfig, ExecutedRuns):
    """`bfpo prepare`: sources -> pairs and completions in fixed splits, checked, with a data card and a manifest."""

    sources: list[MixtureSourceConfig] = Field(min_length=1, description="what is mixed, one section each")
    total: int | None = Field(default=None, ge=1, description="training rows that the sources with a weight share")
    seed: int = Field(default=0, ge=0, description="seed of the splits and of the drawing")
    splits: HeldOutConfig = Field(default_factory=HeldOutConfig, description="what is held out, by prompt")
    near_duplicates: NearDuplicatesConfig | None = Field(
        default_factory=NearDuplicatesConfig,
        description="keep prompts that nearly repeat each other in one split; null = not looked for",
    )
    decontaminate: list[SuiteConfig] = Field(
        default_factory=list, description="evaluation prompts: rows that ask them are removed"
    )
    contained_words: int = Field(
        default=8, ge=3, description="an evaluation prompt of so many words is also looked for inside longer prompts"
    )
    duplicates: Literal["drop", "keep"] = Field(
        default="drop", description="an exact duplicate of another row of its stream is dropped or kept"
    )
    contradictory_labels: Literal["keep", "drop"] = Field(
        default="keep",
        description="rows that label one completion of a prompt both safe and unsafe are kept or dropped",
    )
    alpha: float = Field(default=0.5, description="the shift that training will use, to check against E_safe / 2")
    tokenizer: PathText | None = Field(
        default=None, description="tokenizer.json, or its folder, to count tokens with; null = characters and words"
    )
    language_sample: int = Field(
        default=2000,
        ge=0,
        description="completions of each stream that are read for language and style, and of pairs that are read for "
        "answers preferred to a refusal; 0 = none",
    )
    cache: PathText | None = Field(
        default=None,
        description="folder that keeps what was read of each source for other runs; null = the run's, until it ends",
    )

    @model_validator(mode="after")
    def _weights_have_a_total(self) -> PrepareConfig:
        weighted = [source.name for source in self.sources if source.weight is not None]
        if weighted and self.total is None:
            raise ValueError(f"total: missing; the weights of {', '.join(weighted)} are shares of it")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> PrepareConfig:
        times = Counter((source.stream, source.name) for source in self.sources)
        for (stream, name), count in times.items():
            if count > 1:
                raise ValueError(
                    f"sources: got {name!r} {count} times in the {stream} stream; names must differ there, since "
                    "they begin the ids of rows"
                )
        suites = Counter(suite.name for suite in self.decontaminate)
        if again := [name for name, count in suites.items() if count > 1]:
            raise ValueError(f"decontaminate: got {', '.join(again)} twice; names of suites must differ")
        return self

    needs: ClassVar[Mapping[str, Need]] = {
        "contained_words": beside("decontaminate"),
        "total": Need("where no source has a weight", lambda config: any(it.weight for it in config.sources)),
    }
