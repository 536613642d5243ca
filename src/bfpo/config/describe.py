"""The allowed values of config keys in words, for `bfpo COMMAND --keys` and for error messages."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from bfpo.core.settings import ConfigPart, NameOf

__all__ = [
    "Key",
    "allowed",
    "bounds_of",
    "describe_keys",
    "flat_members",
    "items_of",
    "members_of",
    "section_of",
    "values_of",
]

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a config, with dots for its sections; `default` is `None` for a required key."""

    name: str
    allowed: str
    default: str | None
    description: str


def members_of(annotation: Any, facts: Sequence[Any] = ()) -> list[tuple[Any, list[Any]]]:
    """Return the members of a union, also inside `Annotated`, each with what is annotated of it; `facts`: of all."""
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        more = [item for fact in own for item in (fact.metadata if isinstance(fact, FieldInfo) else [fact])]
        return members_of(inner, [*facts, *more])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members_of(part, facts)]
    return [(annotation, list(facts))]


def flat_members(annotation: Any) -> list[Any]:
    """Return the members of a union, also inside `Annotated`; a plain type is its only member."""
    return [member for member, _ in members_of(annotation)]


def bounds_of(facts: Iterable[Any]) -> list[tuple[type, float]]:
    """Return the bounds among what is annotated: the kind (`Ge`, `Gt`, `Le`, `Lt`) and the number of each."""
    return [(type(fact), getattr(fact, type(fact).__name__.lower())) for fact in facts if type(fact) in _SIGNS]


def section_of(annotation: Any) -> type[ConfigPart] | None:
    """Return the section class of a key, `None` for a plain value."""
    for member in flat_members(annotation):
        # In Python 3.10 `list[str]` counts as a type.
        if get_origin(member) is None and isinstance(member, type) and issubclass(member, ConfigPart):
            return member
    return None


def items_of(annotation: Any) -> type[ConfigPart] | None:
    """Return the section class of a list's items, `None` for any other value."""
    for member in flat_members(annotation):
        if get_origin(member) is list:
            return section_of(get_args(member)[0])
    return None


def values_of(annotation: Any) -> Any:
    """Return the annotation of the values of a mapping with free keys, `None` for any other value."""
    for member in flat_members(annotation):
        if get_origin(member) is dict:
            return get_args(member)[1]
    return None


def _member_words(member: Any, bounds: Mapping[Any, str]) -> str:
    if member is type(None):
        return "null"
    if get_origin(member) is Literal:
        return ", ".join(str(value) for value in get_args(member))
    if get_origin(member) is list:
        section = items_of(member)
        keys = "" if section is None else ", ".join(section.key_order())
        return f"a list of sections with the keys {keys}" if keys else f"a list of {_item_words(get_args(member)[0])}"
    if get_origin(member) is dict or member is dict:
        return "a section of free keys"
    if (part := section_of(member)) is not None:
        return "a section with the keys " + ", ".join(part.key_order())
    return f"{_NAMES.get(member, str(member))}{bounds.get(member, '')}"


def _item_words(annotation: Any) -> str:
    """Return the items of a list in words, such as `numbers >= 0 and <= 1`."""
    plurals = {int: "whole numbers", float: "numbers"}
    (member, facts), *others = members_of(annotation)
    if get_origin(member) is Literal and not others:
        return f"these: {_member_words(member, {})}"
    return "text" if others or member not in plurals else plurals[member] + _bounds_words(facts)


def _text_words(metadata: Sequence[Any]) -> str:
    """Return what is asked of a text, such as ` that matches ^[a-z]+$, of at most 60 characters`."""
    found = [f" that matches {item.pattern}" for item in metadata if getattr(item, "pattern", None)]
    if not found and any(isinstance(item, MinLen) for item in metadata):
        found = [" that is not empty"]
    found += [f" of at most {item.max_length} characters" for item in metadata if isinstance(item, MaxLen)]
    return ",".join(found)


def _bounds_words(metadata: Iterable[Any]) -> str:
    limits = [f"{_SIGNS[kind]} {number:.10g}" for kind, number in bounds_of(metadata)]
    return f" {' and '.join(limits)}" if limits else ""


def allowed(info: FieldInfo) -> str:
    """Return the allowed values of a key in words, such as `a number > 0, or null`."""
    for item in info.metadata:
        if isinstance(item, NameOf):
            return ", ".join(item.names())
    numbers = _bounds_words(info.metadata)
    bounds = {int: numbers, float: numbers, str: _text_words(info.metadata)}
    return ", or ".join(_member_words(member, bounds) for member in flat_members(info.annotation))


def _default_words(info: FieldInfo) -> str | None:
    if info.is_required():
        return None
    factory = cast("Callable[[], Any] | None", info.default_factory)
    value = info.default if factory is None else factory()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_keys(config: type[ConfigPart], prefix: str = "") -> Iterator[Key]:
    """Yield every key of a config, a section's keys after the section, and each key of several modes once."""
    fields = config.every_field()
    for name in config.key_order():
        info = fields[name]
        section, items = section_of(info.annotation), items_of(info.annotation)
        default, kind = _default_words(info), "a section"
        if items is not None:
            kind, default = "a list of sections", "none" if default == "[]" else default
        elif section is None:
            kind = allowed(info)
        else:
            kind += ", or null" if type(None) in flat_members(info.annotation) else ""
            default = default if default in (None, "null") else "as below"
        limits = config.limits_of(name)
        if limits and default is None:
            default, kind = "null", f"{kind}, or null"
        only = f" ({'; '.join(limits)})" if limits else ""
        yield Key(prefix + name, kind, default, (info.description or "") + only)
        if items is not None or section is not None:
            yield from describe_keys(items or section or ConfigPart, prefix + name + ("." if items is None else "[]."))
