"""A model's folder -> a repository on the hub, with the login of the hub's own tools."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from bfpo.core.errors import ConfigError, ServerError, first_line

__all__ = ["check_repository", "is_lost", "open_repository", "push_folder"]

_log = logging.getLogger(__name__)

# Of an earlier model in the repository: readers would take these in place of the new weights, or put them on top.
_REPLACED = [
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors"),
]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_repository(repository: str) -> str:
    """Return the name; raises `ValueError` for one that is not ORG/NAME."""
    if _NAME.fullmatch(repository) is None:
        raise ValueError(f"got {repository!r}; needed: ORG/NAME, such as acme/aligned-1b")
    return repository


def open_repository(repository: str, *, private: bool | None, key: str) -> None:
    """Create the repository of a model, unless it is there: a missing login is then known before the work.

    `private`: `None` leaves it to the owner's default on the hub; one that is there keeps what it is. `key`: the
    setting that names the repository, for messages.

    Raises `ConfigError` where the hub is switched off or refuses, `ServerError` where it cannot be reached or is busy.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, repo_type="model", private=private, exist_ok=True)
    except Exception as error:  # also of its HTTP client, which differs between versions
        raise _failure(f"{key}: {repository}", error) from error


def push_folder(folder: Path, repository: str, *, message: str, key: str, again: str) -> str:
    """Upload the files of a folder in one commit, hidden ones left out, and return the commit's page.

    Weights and adapters there that the folder does not have are removed in it, so that nobody loads them for the new.
    Raises as `open_repository` does; nothing of the folder changes. `again`: how to repeat it, for that message.
    """
    from huggingface_hub import HfApi

    try:
        done = HfApi().upload_folder(
            folder_path=folder,
            repo_id=repository,
            repo_type="model",
            commit_message=message,
            ignore_patterns=[".*", "**/.*"],
            delete_patterns=_REPLACED,
        )
    except Exception as error:
        failure = _failure(f"{key}: {repository}", error)
        raise type(failure)(f"{failure}; the model is whole in {folder}: {again}") from error
    _log.info("pushed %s to %s", folder, done.commit_url)
    return str(done.commit_url)


def is_lost(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is a hub that cannot be reached, is busy or fails: repeating may help."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    while error is not None and not isinstance(error, OfflineModeIsEnabled):
        if isinstance(error, HfHubHTTPError):
            if (status := _status(error)) is not None:
                return status in (408, 429) or status >= 500
        elif isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
            return True
        error = error.__cause__
    return False


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _failure(place: str, error: Exception) -> ConfigError | ServerError:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        reason = (
            "the hub is switched off (HF_HUB_OFFLINE); unset it, or push later with `bfpo export RUN --out DIR --push "
            "ORG/NAME`"
        )
    elif isinstance(error, LocalTokenNotFoundError) or status == 401:
        reason = "there is no valid login; set HF_TOKEN to a token that may write, or run `hf auth login`"
    elif status == 403:
        reason = "the login may not write there; take a token that may write, and a name of your own or of your group"
    elif is_lost(error) or (status is None and not isinstance(error, ValueError)):
        answer = "cannot be reached" if status is None else f"answers {status}"
        return ServerError(f"{place}: the hub {answer} ({first_line(error)}); check the network and try again later")
    else:
        reason = first_line(error).rstrip(".") if status is None else f"the hub answers {status}: {first_line(error)}"
    return ConfigError(f"{place}: {reason}")
