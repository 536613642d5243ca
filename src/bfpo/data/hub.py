"""Files of a data set on the hub: downloaded at one revision, or one message that says which files to bring."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bfpo.core.errors import DataError, first_line

__all__ = ["download_dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def download_dataset(
    hub_id: str, *, revision: str | None, patterns: Sequence[str], advice: str | None = None
) -> tuple[Path, str]:
    """Return the local folder with the files of a data set that match `patterns`, and the commit they are of.

    Files alone are read: no code of the data set is run. `HF_HUB_OFFLINE=1` takes what was downloaded before.
    Raises `DataError` where the files cannot be had, with `advice`, or what to bring and where to put it.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # of its HTTP client too, which is another one from version to version
        failed = f"{hub_id}: cannot be downloaded at revision {revision or 'main'}: {_reason(error, hub_id)}"
        raise DataError(f"{failed}. {advice or _bring(hub_id, revision, patterns)}") from error
    folder = Path(snapshot)
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else (revision or "")


def _reason(error: BaseException, hub_id: str) -> str:
    """Say in a clause what stands between us and the files; an error of the hub may be the cause of a vaguer one."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return f"accept its conditions at {_page(hub_id)}, then log in with `hf auth login` or set HF_TOKEN"
        if isinstance(cause, RepositoryNotFoundError):
            return "the hub has no such data set, or hides it from those who are not logged in"
        if isinstance(cause, RevisionNotFoundError):
            return "the data set has no such revision"
        cause = cause.__cause__
    return first_line(error).rstrip(".")


def _page(hub_id: str) -> str:
    return f"https://huggingface.co/datasets/{hub_id}"


def _bring(hub_id: str, revision: str | None, patterns: Sequence[str]) -> str:
    return (
        f"Without the hub: bring the files {', '.join(patterns)} from {_page(hub_id)}/tree/{revision or 'main'} "
        f"and put them into ./{hub_id}/, or say with `path` where they are"
    )
