"""Where a model comes from (a folder, the cache or the hub), its config, and the code that it may not bring."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig

from bfpo.core.errors import ModelError, ServerError, first_line
from bfpo.core.hub import is_lost
from bfpo.core.inputs import missing_folder
from bfpo.policy.trained import start_of

__all__ = [
    "ADAPTER",
    "cannot_load",
    "check_code",
    "check_source",
    "check_text_only",
    "configured_ends",
    "is_adapter",
    "num_embeddings",
    "num_positions",
    "read_config",
]

_HUB_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_HUB_SECONDS = 10
ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ASKS_FOR_CODE = ("trust_remote_code", "contains custom code")


def check_source(what: str, model: str | Path, *, revision: str | None = None) -> None:
    """Raise `ModelError` for a model that is neither a folder nor in the cache nor on the hub; `what` names it.

    Raises `ServerError` if the hub is lost.

    transformers requests several files and retries each; for a wrong name, or without a network, that takes a minute
    and gives the same message ten times.
    """
    if Path(model).exists():
        return
    if (problem := missing_folder(str(model), revision)) is not None:
        raise ModelError(f"{what}: {str(model)!r}: {problem}")
    try:
        _ask_hub(str(model), revision)
    except _NotThereError as error:
        kind = ServerError if is_lost(error.__cause__) else ModelError
        raise kind(
            f"{what}: {str(model)!r} is not a local folder, and {error}; allowed: a folder or hub id of a model with "
            "safetensors weights and its tokenizer"
        ) from error.__cause__


class _NotThereError(Exception):
    """The reason, as a clause, why the hub does not provide a model."""


@lru_cache(maxsize=64)  # a failure is not kept
def _ask_hub(model: str, revision: str | None) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        if any(isinstance(try_to_load_from_cache(model, name, revision=revision), str) for name in _HUB_FILES):
            return
        HfApi().model_info(model, revision=revision, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise _NotThereError("the hub has no such model, or it is private and needs a login") from error
    except RevisionNotFoundError as error:
        raise _NotThereError(f"the hub has no revision {revision} of it") from error
    except HFValidationError as error:
        raise _NotThereError(f"it is not a valid hub id ({first_line(error)})") from error
    except HfHubHTTPError:  # the hub has answered, and downloading may still be allowed
        return
    except Exception as error:  # of its HTTP client, which differs between versions
        raise _NotThereError(f"the hub cannot be reached ({first_line(error)})") from error


def read_config(model: str | Path, *, revision: str | None = None) -> Any:
    """Read a model's config from a folder or the hub, and no weights; raises `ModelError` if there is none."""
    model, revision = start_of(model, revision)
    check_source("model", model, revision=revision)
    try:
        return AutoConfig.from_pretrained(str(model), revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        raise cannot_load("model", model, error) from error


def check_code(model: str | Path, *, revision: str | None = None) -> None:
    """Raise `ModelError` for a model whose loading would run code that is not installed here, or read a pickle.

    transformers refuses Python files (`auto_map`) itself. A config can also name an attention kernel of the hub
    (`attn_implementation: owner/kernel`), which would be downloaded and run, and an adapter can be a pickle.
    """
    folder = Path(model)
    adapter = folder / ADAPTER
    if adapter.is_file() and not (folder / _ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"model: {str(model)!r} is an adapter without {_ADAPTER_WEIGHTS}; weights are read from safetensors only"
        )
    if adapter.is_file() and not (folder / "config.json").is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
            check_source("base_model_name_or_path", base)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise cannot_load("model", model, error) from error
        model, revision = base, None
    config = read_config(model, revision=revision)
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        named = getattr(part, "_attn_implementation", None)
        for kernel in named.values() if isinstance(named, dict) else [named]:
            if isinstance(kernel, str) and "/" in kernel:
                raise ModelError(
                    f"model: {str(model)!r}: its config.json names the attention kernel {kernel!r}, whose code would "
                    "be downloaded and run; remove attn_implementation from config.json, or set it to sdpa or eager"
                )


def check_text_only(model: str | Path, config: Any) -> None:
    """Raise `ModelError` for a model that also reads images, video or sound."""
    parts = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    if parts:
        raise ModelError(
            f"model: {str(model)!r} ({config.model_type}) also reads images or sound ({', '.join(parts)} in its "
            "config.json); bfpo trains language models on text only; give a model of text"
        )


def cannot_load(
    what: str, model: str | Path, error: Exception, *, kind: str = "a causal LM"
) -> ModelError | ServerError:
    """Return the error for a model of this kind, or a part of it, that transformers could not read.

    A `ServerError` if the hub is lost, so that repeating may help.
    """
    if any(words in str(error) for words in _ASKS_FOR_CODE):
        return ModelError(
            f"{what}: {str(model)!r} comes with Python code of its own (auto_map in its config.json or "
            "tokenizer_config.json), which is not run; allowed: a model that the installed transformers knows"
        )
    if is_adapter(model) and not isinstance(error, SafetensorError):
        return ModelError(
            f"{what}: {str(model)!r} is an adapter without the weights of its model ({first_line(error)}); make a "
            f"whole model of it: bfpo export {model} --out DIR"
        )
    inner = Path(model) / "model"
    hint = f"did you mean {inner}? " if (inner / "config.json").is_file() else ""
    made = ServerError if is_lost(error) else ModelError
    return made(
        f"{what}: {str(model)!r} cannot be loaded ({first_line(error)}); {hint}allowed: a folder or hub id of {kind} "
        "with safetensors weights and its tokenizer"
    )


def is_adapter(model: str | Path) -> bool:
    """Return whether a folder holds an adapter without the weights of its model; it may have a config.json."""
    return (Path(model) / ADAPTER).is_file() and not any(Path(model).glob("model*.safetensors"))


def num_embeddings(config: Any) -> int | None:
    """Return the rows of a model's embedding, one per token id, by its config; `None` if it does not say."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def configured_ends(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return every token that ends an answer by a generation config and by the tokenizer, sorted.

    Raises `ModelError` if neither names one: such a model would always reach the token limit.
    """
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    ids = {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}
    if not ids:
        raise ModelError("eos_token_id: neither the generation config nor the tokenizer names one; set it in either")
    return tuple(sorted(ids))


def num_positions(config: Any) -> int | None:
    """Return the longest text in tokens that a model was made for, by its config; `None` if it does not say."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limit = next((value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0), None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if limit is not None and isinstance(factor, (int, float)) and isinstance(original, int):
        return max(limit, int(factor * original))
    return limit
