"""Whether the models and texts that a config names are where it says: what can only be local must be there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bfpo.config.base import ConfigPart, StageConfig
from bfpo.core.errors import ConfigError
from bfpo.core.inputs import missing_folder

__all__ = ["check_places"]

# Keys that name a model, each with the key of its revision.
_MODELS = {
    "model": "revision",
    "reference": "reference_revision",
    "margin_model": None,
    "tokenizer": None,
    "first": None,
    "second": None,
}
_TEXTS = ("chat_template", "policy")


def check_places(config: ConfigPart) -> None:
    """Raise `ConfigError` for what is not there: models that are local folders by their names, templates, policies.

    The hub is not asked; files of data are checked where they are read.
    """
    problems = list(_missing(config, ""))
    if problems:
        raise ConfigError("\n".join(problems))


def _missing(part: ConfigPart, prefix: str) -> Iterator[str]:
    unread = part.unread() if isinstance(part, StageConfig) else frozenset()
    at_server = getattr(part, "url", None) is not None  # then the model is the server's name for it
    for key in type(part).model_fields:
        value = getattr(part, key)
        if key in unread:
            continue
        if key in _MODELS and isinstance(value, str):
            problem = None if at_server else missing_folder(value, getattr(part, _MODELS[key] or "", None))
            if problem is not None:
                yield f"{prefix}{key}: got {value!r}; {problem}"
        elif key in _TEXTS and isinstance(value, str):
            if not Path(value).is_file():
                yield f"{prefix}{key}: got {value!r}; no such file"
        elif isinstance(value, ConfigPart):
            yield from _missing(value, f"{prefix}{key}.")
        elif isinstance(value, (list, dict)):
            named = value.items() if isinstance(value, dict) else enumerate(value)
            for name, item in named:
                if isinstance(item, ConfigPart):
                    place = f"{prefix}{key}.{name}." if isinstance(value, dict) else f"{prefix}{key}[{name}]."
                    yield from _missing(item, place)
