"""Base classes of the configs: frozen, strict, without unknown keys; and the form that a run folder stores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import get_annotations
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

__all__ = ["ConfigPart", "FileList", "NameOf", "PathText", "StageConfig"]


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, (str, os.PathLike)) else value


PathText = Annotated[str, BeforeValidator(_path_text), Field(min_length=1)]
"""A path as text; a relative one is relative to the current directory, not to the YAML file."""

FileList = Annotated[list[PathText], BeforeValidator(_one_or_many), Field(min_length=1)]
"""One path or several."""


@dataclass(frozen=True, slots=True)
class NameOf:
    """Makes a text key, as in `Annotated[str, NameOf(names)]`, one of the names of a registry.

    `names` is called when a value is checked or described: what is registered later counts.
    """

    names: Callable[[], Sequence[str]]

    def __get_pydantic_core_schema__(self, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.names():
            raise PydanticCustomError("unknown_name", "not a known name")
        return value


class ConfigPart(BaseModel):
    """A section of a config: immutable, strictly typed; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    @classmethod
    def key_order(cls) -> list[str]:
        """Return the keys in display order: the required ones first, then the class's own, then the inherited ones."""
        names = [name for part in cls.__mro__ for name in get_annotations(part) if name in cls.model_fields]
        return sorted(dict.fromkeys(names), key=lambda name: not cls.model_fields[name].is_required())


class StageConfig(ConfigPart):
    """The whole config of one stage."""

    overruled: ClassVar[Mapping[str, str]] = {}
    """By key, another that is not read beside it: set on top of a file, the key takes the place of the file's other."""

    def unread(self) -> frozenset[str]:
        """Return the top-level keys that have no effect with these settings; they are left out of the run folder."""
        return frozenset()

    def resolved(self) -> dict[str, Any]:
        """Return every key that is read, with its value, as YAML and JSON types; loading it gives an equal run."""
        values = self.model_dump(mode="json", exclude=set(self.unread()))
        return {name: values[name] for name in self.key_order() if name in values}
