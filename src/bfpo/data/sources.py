"""Data sets by name: where their files are, their layout and licence; and how the files are found."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from bfpo.core.errors import DataError, ServerError, SettingError, first_line
from bfpo.core.hub import is_lost
from bfpo.core.inputs import matching_files, no_such_file

__all__ = [
    "NO_HUB",
    "SOURCES",
    "ResolvedSource",
    "Source",
    "SourceKind",
    "download_dataset",
    "find_source",
    "hub_failure",
    "hub_reason",
    "resolve_files",
]

_log = logging.getLogger(__name__)
SourceKind = Literal["pairs", "completions"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
NO_HUB = "Without the hub: set `files` in place of `hub`, to files of the data set on this machine"


@dataclass(frozen=True, slots=True)
class Source:
    """A data set: `layout` is a name of `PAIR_LAYOUTS` or `COMPLETION_LAYOUTS`, or "auto".

    `hub_id` is its repository on the hub, `None` if it has none; `patterns` the files of its training split there (as
    `fnmatch`, a star also matches `/`). `revision` is the pinned commit; `None` takes the newest, which is reported.
    `licence` is an SPDX name in lower case, `None` if unknown.
    """

    name: str
    summary: str
    kind: SourceKind
    layout: str
    hub_id: str | None = None
    patterns: tuple[str, ...] = ()
    revision: str | None = None
    licence: str | None = None

    @property
    def url(self) -> str | None:
        """The page of the data set."""
        return None if self.hub_id is None else f"https://huggingface.co/datasets/{self.hub_id}"


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """A data set with its files on this machine, in a fixed order.

    `revision` is their commit on the hub, `None` for local files (`origin` is then "local").
    """

    source: Source
    files: tuple[Path, ...]
    origin: Literal["local", "hub"]
    revision: str | None

    @property
    def licence(self) -> str | None:
        """The licence of the data set, `None` if unknown."""
        return self.source.licence


def find_source(name: str) -> Source:
    """Return the data set of this name or hub id; raises `SettingError` for any other."""
    for source in SOURCES.values():
        if name in (source.name, source.hub_id):
            return source
    close = get_close_matches(name, SOURCES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise SettingError(f"source: got {name!r}{hint}; allowed: {', '.join(SOURCES)}")


def resolve_files(
    source: Source | str,
    path: str | Path | None = None,
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
) -> ResolvedSource:
    """Return the files of a data set: those at `path`, else of a local folder with its name, else from the hub.

    The local folder is `./<hub id>` or `./<name>`; the hub is then not used. `revision` and `patterns` replace the
    table's. In a folder, the files that match the patterns are taken; if none does, all readable ones, unless the
    folder has the hub id as its name or `patterns` are given. Raises `SettingError` for an unknown name or a revision
    of a path, `DataError` for files that cannot be found, and as `download_dataset`.
    """
    found = find_source(source) if isinstance(source, str) else source
    wanted = found.patterns if patterns is None else tuple(patterns)
    local = _local_path(found) if path is None else Path(path)
    if path is not None and revision is not None:
        raise SettingError(f"revision: got {revision!r} together with path {str(path)!r}; only the hub has revisions")
    if local is not None:
        if revision is not None:
            _log.warning(
                "%s: the files of this folder are read, whatever their revision; %s was asked for, which only the hub "
                "has: check that they are of it, or rename the folder",
                local,
                revision,
            )
        mirrors = path is None and local.as_posix() == found.hub_id
        return ResolvedSource(found, _files_at(local, wanted, exact=mirrors or patterns is not None), "local", None)
    if found.hub_id is None:
        raise SettingError(f"path: source {found.name!r} is not on the hub; set the file or folder to read")
    folder, commit = download_dataset(found.hub_id, revision=revision or found.revision, patterns=wanted or ("*",))
    return ResolvedSource(found, _files_at(folder, wanted, exact=True), "hub", commit)


def _local_path(source: Source) -> Path | None:
    names = [name for name in (source.hub_id, source.name) if name is not None]
    return next((Path(name) for name in names if Path(name).is_dir()), None)


def _files_at(path: Path, patterns: Sequence[str], *, exact: bool) -> tuple[Path, ...]:
    if not path.is_dir():
        if not path.is_file():
            raise DataError.at(path, None, no_such_file(path, "file or folder"))
        return (path,)
    return tuple(matching_files(path, patterns, exact=exact))


# ----------------------------------------------------------------------------------------------------- download


def download_dataset(
    hub_id: str, *, revision: str | None, patterns: Sequence[str], advice: str | None = None
) -> tuple[Path, str]:
    """Return the local folder with the files of a data set that match `patterns`, and their commit.

    Only files are read; no code of the data set is run. `HF_HUB_OFFLINE=1` uses earlier downloads. Raises as
    `hub_failure` if the files cannot be downloaded, with `advice`, else with how to provide them by hand.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # also of its HTTP client, which differs between versions
        advice = advice or _manual_download(hub_id, revision, patterns)
        raise hub_failure(error, hub_id, revision, "downloaded", advice) from error
    folder = Path(snapshot)
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else (revision or "")


def hub_failure(
    error: BaseException, hub_id: str, revision: str | None, what: str, advice: str = NO_HUB
) -> DataError | ServerError:
    """Return the error for a data set that cannot be `what` ("downloaded"), with the reason and what to do.

    A `ServerError` if the hub is lost, so that repeating may help.
    """
    reason = hub_reason(error, hub_id)
    kind = ServerError if is_lost(error) else DataError
    return kind(f"{hub_id}: cannot be {what} at revision {revision or 'main'}: {reason}. {advice}")


def hub_reason(error: BaseException, hub_id: str) -> str:
    """Return why the hub failed in one clause; an error of the hub may be the cause of a vaguer one."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return f"accept its conditions at {_page(hub_id)}, then log in with `hf auth login` or set HF_TOKEN"
        if isinstance(cause, RepositoryNotFoundError):
            return "the hub has no such data set, or it is private and needs a login"
        if isinstance(cause, RevisionNotFoundError):
            return "the data set has no such revision"
        cause = cause.__cause__
    return first_line(error).rstrip(".")


def _page(hub_id: str) -> str:
    return f"https://huggingface.co/datasets/{hub_id}"


def _manual_download(hub_id: str, revision: str | None, patterns: Sequence[str]) -> str:
    return (
        f"Without the hub: download the files {', '.join(patterns)} from {_page(hub_id)}/tree/{revision or 'main'} "
        f"and put them into ./{hub_id}/, or set `path` to their folder"
    )


# -------------------------------------------------------------------------------------------------------- table


_HUB_SOURCES = (
    Source(
        name="pku-saferlhf",
        summary="two answers to a red-team question, the more helpful one, a safety label for each",
        kind="pairs",
        layout="pku",
        hub_id="PKU-Alignment/PKU-SafeRLHF",
        patterns=("*train*",),
        revision="ff7ba91063016c78a225b0f74e1c0860bb18230f",
        licence="cc-by-nc-4.0",
    ),
    Source(
        name="pku-saferlhf-30k",
        summary="the 30K part of PKU-SafeRLHF that the paper mixes in",
        kind="pairs",
        layout="pku",
        hub_id="PKU-Alignment/PKU-SafeRLHF-30K",
        patterns=("*train*",),
        licence="cc-by-nc-4.0",
    ),
    Source(
        name="ultrafeedback-binarized",
        summary="helpfulness pairs scored by GPT-4, no safety labels",
        kind="pairs",
        layout="trl",
        hub_id="HuggingFaceH4/ultrafeedback_binarized",
        patterns=("data/train_prefs-*.parquet",),
        licence="mit",
    ),
    Source(
        name="hh-rlhf",
        summary="multi-turn transcripts ordered by helpfulness, no safety labels",
        kind="pairs",
        layout="hh",
        hub_id="Anthropic/hh-rlhf",
        patterns=("helpful-*/train.jsonl.gz",),
        licence="mit",
    ),
    Source(
        name="hh-rlhf-harmless",
        summary="the part of HH-RLHF where chosen means less harmful, not more helpful; no safety labels",
        kind="pairs",
        layout="hh",
        hub_id="Anthropic/hh-rlhf",
        patterns=("harmless-base/train.jsonl.gz",),
        licence="mit",
    ),
    Source(
        name="helpsteer2",
        summary="helpfulness preferences of human annotators, ties among them, no safety labels",
        kind="pairs",
        layout="helpsteer2",
        hub_id="nvidia/HelpSteer2",
        patterns=("preference/preference.jsonl.gz",),
        licence="cc-by-4.0",
    ),
    Source(
        name="helpsteer3",
        summary="helpfulness preferences after conversations in many languages, ties among them, no safety labels",
        kind="pairs",
        layout="helpsteer3",
        hub_id="nvidia/HelpSteer3",
        patterns=("preference/train.jsonl.gz",),
        licence="cc-by-4.0",
    ),
    Source(
        name="beavertails",
        summary="single answers to red-team questions, each labelled safe or not (its 30K part)",
        kind="completions",
        layout="beavertails",
        hub_id="PKU-Alignment/BeaverTails",
        patterns=("round0/30k/train.jsonl.gz",),
        licence="cc-by-nc-4.0",
    ),
    Source(
        name="wildguardmix",
        summary="single answers to plain and adversarial prompts, labelled harmful or not; access on request",
        kind="completions",
        layout="wildguardmix",
        hub_id="allenai/wildguardmix",
        patterns=("train/wildguard_train.parquet",),
        licence="odc-by",
    ),
    Source(
        name="ultrachat-200k",
        summary="multi-turn dialogues to imitate",
        kind="completions",
        layout="completions",
        hub_id="HuggingFaceH4/ultrachat_200k",
        patterns=("data/train_sft-*.parquet",),
        licence="mit",
    ),
)

_LOCAL_SOURCES = (
    Source("bfpo-redteam", "the red-team file of BFPO's authors", "pairs", "redteam"),
    Source("sharegpt", "pairs as ShareGPT turns", "pairs", "sharegpt"),
    Source("bfpo", "pairs in our columns", "pairs", "bfpo"),
    Source("trl", "pairs in TRL's columns", "pairs", "trl"),
    Source("pairs", "pairs in any layout, found from the columns or mapped by `columns`", "pairs", "auto"),
    Source(
        "completions",
        "completions to imitate: prompt with completion or text, or messages",
        "completions",
        "completions",
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in (*_HUB_SOURCES, *_LOCAL_SOURCES)}
