"""Base classes of config sections: frozen, strict, without unknown keys; sections with several modes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import get_annotations
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

__all__ = [
    "ConfigPart",
    "FileList",
    "NameOf",
    "Need",
    "OneOf",
    "OneOrMany",
    "PathText",
    "Seed",
    "StageConfig",
    "beside",
    "unless",
]


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, (str, os.PathLike)) else value


PathText = Annotated[str, BeforeValidator(_path_text), Field(min_length=1)]
"""A path as text; a relative one is relative to the current directory, not to the YAML file."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of numpy's and of scikit-learn's generators, which take 32 bits."""

OneOrMany = BeforeValidator(_one_or_many)
"""Takes a single text for a list of texts, as in `Annotated[list[str], OneOrMany]`."""

FileList = Annotated[list[PathText], OneOrMany, Field(min_length=1)]
"""One path or several."""


@dataclass(frozen=True, slots=True)
class NameOf:
    """Restricts a text key, as in `Annotated[str, NameOf(names)]`, to the names of a registry.

    `names` is called when a value is checked or described, so that later registrations count.
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
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    @classmethod
    def head(cls) -> type[ConfigPart]:
        """Return the class that a config names: this class, or the head of a mode."""
        return cls

    @classmethod
    def every_field(cls) -> dict[str, FieldInfo]:
        """Return the keys of all modes."""
        return dict(cls.model_fields)

    @classmethod
    def chosen(cls, value: Any) -> type[ConfigPart]:
        """Return the class of the mode that a value selects; a section without modes has one class."""
        return cls

    @classmethod
    def limits_of(cls, key: str) -> list[str]:
        """Return in words which modes have a key and which need it, as far as the modes differ."""
        return []

    @classmethod
    def key_order(cls) -> list[str]:
        """Return the keys in display order: the required ones first, then the class's own, then the inherited ones."""
        names = [name for part in cls.__mro__ for name in get_annotations(part) if name in cls.model_fields]
        return sorted(dict.fromkeys(names), key=lambda name: not cls.model_fields[name].is_required())


class OneOf(ConfigPart):
    """A section that is one of several modes, each a subclass with its own keys: `class Local(Model, mode="local")`.

    The class itself (the head) holds the keys of all modes. Constructing or validating it gives an instance of the mode
    that `mode_of` returns. A key of another mode is an error that names the modes that have it.
    """

    modes: ClassVar[dict[str, Any]] = {}
    mode: ClassVar[str] = ""
    words: ClassVar[str] = ""
    """The mode in messages; empty if it only combines other modes, which are then named in its place."""
    chosen_by: ClassVar[str] = ""
    """What stands before the names of the modes in messages: the key that selects one."""

    def __init_subclass__(cls, *, mode: str = "", words: str | None = None, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.mode = mode
        if mode:
            cls.words = f"{cls.chosen_by} {mode!r}" if words is None else words
            cls.modes[mode] = cls
        else:
            cls.modes = {}

    def __new__(cls, *args: Any, **values: Any) -> Any:
        """Make an instance of the mode that the keys select."""
        return super().__new__(cls.modes[cls.mode_of(values)] if cls.modes and not cls.mode else cls)

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the mode that the keys select; a wrong value is reported by the validation of any mode."""
        raise NotImplementedError

    @classmethod
    def called(cls, values: Mapping[str, Any]) -> str:
        """Return this mode, as given, in words."""
        return f"{cls.chosen_by} {values.get(cls.chosen_by, cls.mode)!r}"

    @classmethod
    def chosen(cls, value: Any) -> type[ConfigPart]:
        """Return the class of the mode that a value selects; the head if it selects none."""
        try:
            value = cls.spelled_out(value)
            return cls.modes[cls.mode_of(value)] if isinstance(value, dict) and not cls.mode else cls
        except ValueError:
            return cls

    @classmethod
    def spelled_out(cls, value: Any) -> Any:
        """Return the keys of a short form; any other value unchanged."""
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _as_its_mode(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, cls):
            return value
        value = cls.spelled_out(value)
        if not isinstance(value, dict):
            return handler(value)
        if not cls.mode:
            return cls.modes[cls.mode_of(value)].model_validate(value)
        others = {key: cls._modes_with(key) for key in value if key not in cls.model_fields}
        foreign: list[InitErrorDetails] = []
        for key, modes in others.items():
            if modes and value[key] is not None:
                text = f"not a key of {cls.called(value)}; it belongs to {cls._either(modes)}"
                error = PydanticCustomError("other_mode", "{text}", {"text": text})
                foreign.append(InitErrorDetails(type=error, loc=(key,), input=None))
        if foreign:
            raise ValidationError.from_exception_data(cls.__name__, foreign)
        return handler({key: given for key, given in value.items() if not others.get(key)})

    @classmethod
    def head(cls) -> type[ConfigPart]:
        """Return the head of this mode."""
        return next(part for part in cls.__mro__ if issubclass(part, OneOf) and not part.mode)

    @classmethod
    def every_field(cls) -> dict[str, FieldInfo]:
        """Return every key of all modes; of one that only some modes require, the form that is not required."""
        fields: dict[str, FieldInfo] = {}
        for part in () if cls.mode else cls.modes.values():
            for key, info in part.model_fields.items():
                if key not in fields or (fields[key].is_required() and not info.is_required()):
                    fields[key] = info
        return {**fields, **cls.model_fields}

    @classmethod
    def limits_of(cls, key: str) -> list[str]:
        """Return in words which modes have a key and which need it, as far as the modes differ."""
        if cls.mode or key in cls.model_fields:
            return []
        having = cls._modes_with(key)
        without = [part for part in cls.modes.values() if part not in having]
        needing = [part for part in having if part.model_fields[key].is_required()]
        limits = [f"not of {cls._either(without)}" if len(without) == 1 else f"only of {cls._either(having)}"]
        return limits[: len(without)] + ([f"needed by {cls._either(needing)}"] if needing else [])

    @classmethod
    def _modes_with(cls, key: str) -> list[Any]:
        return [part for part in cls.modes.values() if key in part.model_fields]

    @classmethod
    def _either(cls, modes: Sequence[Any]) -> str:
        """Return modes as `engine 'transformers' or 'vllm'`."""
        *first, last = (part.words for part in modes if part.words)
        text = f"{', '.join(first)} or {last}" if first else last
        before, _, after = text.partition(f"{cls.chosen_by} ")
        return f"{before}{cls.chosen_by} {after.replace(f'{cls.chosen_by} ', '')}" if after else text

    @classmethod
    def key_order(cls) -> list[str]:
        """Return the required keys, then (for a head) the keys of its modes, then the shared keys."""
        own = super().key_order()
        of_modes = [] if cls.mode else [name for part in cls.modes.values() for name in part.key_order()]
        needed = [name for name in own if cls.model_fields[name].is_required()]
        return list(dict.fromkeys([*needed, *(name for name in of_modes if name not in own), *own]))


@dataclass(frozen=True, slots=True)
class Need:
    """When a key is read; `words` say when not ("without buffer").

    `--set` of `overruled_by` to a value that `overrules` drops the file's key.
    """

    words: str
    is_met: Callable[[Any], bool]
    overruled_by: str | None = None
    overrules: Callable[[Any], bool] = lambda value: value is not None


def beside(other: str) -> Need:
    """Return the need of a key that is read only where `other` is given."""
    return Need(f"without {other}", lambda config: bool(getattr(config, other)))


def unless(other: str) -> Need:
    """Return the need of a key that `other` replaces."""
    return Need(f"where {other} is set", lambda config: not getattr(config, other), other)


class StageConfig(ConfigPart):
    """The whole config of one command."""

    needs: ClassVar[Mapping[str, Need]] = {}
    """Conditions of keys that are not always read. Giving an unread key is an error, and `resolved` leaves it out."""

    def idle(self) -> frozenset[str]:
        """Return the keys that are not read under these settings."""
        return frozenset(key for key, need in self.needs.items() if not need.is_met(self))

    def resolved(self) -> dict[str, Any]:
        """Return every key that is read, with its value, as YAML and JSON types; loading it repeats the run."""
        values = self.model_dump(mode="json", exclude=set(self.idle()), serialize_as_any=True)
        return {name: values[name] for name in self.head().key_order() if name in values}

    @model_validator(mode="after")
    def _no_idle_key(self) -> StageConfig:
        for key, need in self.needs.items():
            if key in self.model_fields_set and getattr(self, key) not in (None, []) and not need.is_met(self):
                raise ValueError(f"{key}: not read {need.words}; leave it out")
        return self
