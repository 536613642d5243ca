"""Where a model is: a folder, or the hub, which is asked once whether it has it before its files are."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from bfpo.core.errors import ModelError, first_line
from bfpo.core.inputs import missing_folder

__all__ = ["check_source"]

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_SECONDS = 10


def check_source(what: str, model: str | Path, *, revision: str | None = None) -> None:
    """Raise `ModelError` for a model that is neither a folder nor at hand nor on the hub; `what` names it.

    transformers asks the hub for several files and repeats each question; of a name that is wrong, or without a
    network, that takes a minute and says the same ten times.
    """
    if Path(model).exists():
        return
    if (problem := missing_folder(str(model), revision)) is not None:
        raise ModelError(f"{what}: {str(model)!r}: {problem}")
    try:
        _ask_hub(str(model), revision)
    except _NotThereError as error:
        raise ModelError(
            f"{what}: {str(model)!r} is no folder here, and {error}; allowed: a folder or hub id of a model with "
            "safetensors weights and its tokenizer"
        ) from error.__cause__


class _NotThereError(Exception):
    """Says in a clause why the hub does not give a model."""


@lru_cache(maxsize=64)  # a failure is not kept
def _ask_hub(model: str, revision: str | None) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        if any(isinstance(try_to_load_from_cache(model, name, revision=revision), str) for name in _FILES):
            return
        HfApi().model_info(model, revision=revision, timeout=_SECONDS)
    except RepositoryNotFoundError as error:
        raise _NotThereError("the hub has no such model, or hides it from those who are not logged in") from error
    except RevisionNotFoundError as error:
        raise _NotThereError(f"the hub has no revision {revision} of it") from error
    except HFValidationError as error:
        raise _NotThereError(f"is no name for one of the hub ({first_line(error)})") from error
    except HfHubHTTPError:  # it has answered, and the question for the files may be allowed
        return
    except Exception as error:  # of its HTTP client, which is another one from version to version
        raise _NotThereError(f"the hub cannot be reached ({first_line(error)})") from error
