"""A suite's files: in the user's folders, else on the hub, else an error with the reason."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bfpo.core.errors import DataError, ServerError, SettingError
from bfpo.core.inputs import matching_files
from bfpo.core.schema import Message, Prompt
from bfpo.data.fields import content_id
from bfpo.data.files import iter_rows
from bfpo.data.load import Hashes
from bfpo.data.prompts import read_prompt_files
from bfpo.data.settings import SplitConfig
from bfpo.data.sources import download_dataset
from bfpo.data.split import draw_prompts, part_of
from bfpo.suites.catalogue import Suite
from bfpo.training.trained_on import asked_in_training
from bfpo.world.datasets import held_out_prompts

__all__ = [
    "COMMITS",
    "ELSEWHERE",
    "TRAINED",
    "SuitePrompts",
    "UnreachableError",
    "check_own_files",
    "find_prompts",
    "local_files",
    "prompts_digest",
    "read_documents",
]

_WORLD_SEED = 0
ELSEWHERE = "in another part of the split"
TRAINED = "a model was trained on it"
COMMITS = "suite_commits"
"""Where `run.json` has the commits of the suites' data sets, which a resumed run reads again."""


class UnreachableError(DataError):
    """Something that a suite needs is not available; the text is the reason for skipping it."""


@dataclass(frozen=True, slots=True)
class SuitePrompts:
    """The prompts of a suite, in the order of its files, their source, and how many were left out by reason."""

    prompts: list[Prompt]
    source: str
    revision: str | None
    files: tuple[Path, ...]
    left_out: dict[str, int] = field(default_factory=dict)

    def without(self, keep: Callable[[list[Prompt]], list[Prompt]], reason: str) -> SuitePrompts:
        """Return the prompts that `keep` returns, the others counted as left out."""
        kept = keep(self.prompts)
        num = len(self.prompts) - len(kept)
        return replace(self, prompts=kept, left_out={**self.left_out, **({reason: num} if num else {})})


def find_prompts(
    suite: Suite,
    folders: Sequence[str],
    *,
    limit: int | None,
    seed: int,
    split: SplitConfig | None = None,
    trained_on: Sequence[Hashes] = (),
) -> SuitePrompts:
    """Return the prompts of a generative suite, or a seeded choice of `limit` of them, in their order.

    Left out and counted before the choice are prompts of another part of a split, and those of a training.

    Raises `UnreachableError` if the folders hold none of its files and the hub is not available, `DataError` for a
    file that cannot be read.
    """
    if suite.source.world is not None:
        found = SuitePrompts(held_out_prompts(suite.source.world, _WORLD_SEED), "the closed world", None, ())
    else:
        files, source, revision = _files(suite, folders)
        found = SuitePrompts(_read(suite, files, revision), source, revision, files)
    if suite.source.without:
        found = _without(found, suite.source.without)
    if not found.prompts:
        raise DataError.at(found.source, None, f"holds no prompt of the suite {suite.name}; at least one is needed")
    try:
        found = found.without(lambda prompts: part_of(prompts, split), ELSEWHERE)
    except SettingError as error:
        raise SettingError(f"suite {suite.name}: {error}") from error
    if trained_on:
        of_training = {one.id for one in found.prompts for hashes in trained_on if asked_in_training(one, hashes)}
        found = found.without(lambda prompts: [one for one in prompts if one.id not in of_training], TRAINED)
        if not found.prompts:
            raise UnreachableError(f"all its {len(of_training)} prompts are left out: {TRAINED}")
    return replace(found, prompts=draw_prompts(found.prompts, limit, seed))


def local_files(suite: Suite, folders: Sequence[str]) -> tuple[Path, ...]:
    """Return the files in and below the folders that match the first of the suite's names with a match.

    For a task of inspect-ai it is a single file. Raises `DataError` for a folder that does not exist.
    """
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError.at(folder, None, "suites.folders: no such folder")
    for name in suite.source.files if suite.inspect is None else suite.inspect.files:
        for folder in map(Path, folders):
            if found := sorted(path for path in folder.rglob(name) if path.is_file()):
                return tuple(found) if suite.inspect is None else (found[0],)
    return ()


def check_own_files(suites: Mapping[str, Suite], folders: Sequence[str]) -> None:
    """Raise `DataError` for a user's suite (by its file) without data files and without a data set on the hub.

    A suite of the package is skipped if its files are missing; for a user's own suite that is a mistake.
    """
    for file, suite in suites.items():
        if suite.source.files and suite.source.hub is None and not local_files(suite, folders):
            where = f"in {', '.join(folders)}" if folders else "and suites.folders is empty"
            raise DataError.at(
                file,
                None,
                f"source.files: no {' or '.join(suite.source.files)} {where}; add the folder that holds it to "
                "suites.folders (--folder DIR), or correct its name",
            )


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of the ids, messages and kinds of prompts, in order."""
    rows = [[p.id, p.kind, [[message.role, message.content] for message in p.messages]] for p in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_documents(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of files as documents of an lm-eval task: a space in a column's name becomes `_`."""
    return [
        {name.replace(" ", "_"): value for name, value in row.columns.items()}
        for file in files
        for row in iter_rows(file)
    ]


def _files(suite: Suite, folders: Sequence[str]) -> tuple[tuple[Path, ...], str, str | None]:
    """Return the files, their source in words, and the hub's commit."""
    if found := local_files(suite, folders):
        return found, ", ".join(path.name for path in found), None
    names = ", ".join(suite.source.files)
    bring = f"put {names} into a folder of suites.folders" if names else "give it a local file"
    if suite.source.hub is None:
        raise UnreachableError(f"none of its files is in suites.folders, and it is not on the hub; {bring}")
    try:
        patterns = suite.source.patterns or ("*",)
        folder, commit = download_dataset(
            suite.source.hub, revision=suite.source.revision, patterns=patterns, advice=f"Without the hub: {bring}"
        )
        # The folder also holds files of the same data set that other suites downloaded.
        return tuple(matching_files(folder, patterns)), suite.source.hub, commit
    except (DataError, ServerError) as error:
        raise UnreachableError(str(error)) from error


def _read(suite: Suite, files: Sequence[Path], revision: str | None) -> list[Prompt]:
    try:
        if suite.source.text is not None:
            prompts = _prompts_of_rows(suite, files)
        else:
            prompts = read_prompt_files(files, columns=suite.columns or None).prompts
    except DataError as error:
        if revision is None:
            raise
        raise UnreachableError(f"the files of the hub at {revision} cannot be read: {error}") from error
    kind = suite.prompt_kind
    return prompts if kind is None else [replace(prompt, kind=kind) for prompt in prompts]


def _without(found: SuitePrompts, words: Sequence[str]) -> SuitePrompts:
    """Leave out the prompts with one of these words or phrases; a star at the end stands for any ending."""
    each = (re.escape(word.removesuffix("*")) + r"\w*" * word.endswith("*") for word in words)
    pattern = re.compile(rf"\b(?:{'|'.join(each)})\b", re.IGNORECASE)

    def keep(prompts: list[Prompt]) -> list[Prompt]:
        return [one for one in prompts if not any(pattern.search(turn.content) for turn in one.messages)]

    return found.without(keep, "has a word that the suite leaves out")


def _prompts_of_rows(suite: Suite, files: Sequence[Path]) -> list[Prompt]:
    """Return the texts at a dotted name in the rows that match `where`; a repeated text counts once."""
    assert suite.source.text is not None
    prompts: dict[str, Prompt] = {}
    for file in files:
        for row in iter_rows(file):
            if any(row.columns.get(name) != value for name, value in suite.source.where.items()):
                continue
            text: Any = row.columns
            for part in suite.source.text.split("."):
                text = text.get(part) if isinstance(text, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise DataError.at(file, row.line, f"{suite.source.text}: got {text!r:.80}; a text is needed")
            messages = (Message("user", text),)
            prompts.setdefault(content_id(messages), Prompt(content_id(messages), messages, "harmful"))
    return list(prompts.values())
