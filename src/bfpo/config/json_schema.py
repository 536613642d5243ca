"""The JSON Schema of a config file, with which editors complete keys, show their meaning and mark wrong values."""

from __future__ import annotations

from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from bfpo.config.describe import bounds_of, members_of, section_of
from bfpo.core.settings import ConfigPart, NameOf, OneOf

__all__ = ["json_schema"]

_TYPES: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string"}
_BOUNDS = {Ge: "minimum", Gt: "exclusiveMinimum", Le: "maximum", Lt: "exclusiveMaximum"}
_TEXT = {"type": "string"}


def json_schema(config: type[ConfigPart]) -> dict[str, Any]:
    """Return the schema (draft 2020-12) of a config's file.

    A section has the keys of all its modes, and no key is required, since `--set` may complete a file: what the schema
    refuses is wrong, what it accepts may still be refused by the command. Short forms are text.
    """
    sections: dict[str, Any] = {}
    schema = _section(config, sections)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": sections}


def _section(section: type[ConfigPart], sections: dict[str, Any]) -> dict[str, Any]:
    fields = section.every_field()
    # A validator of the whole section that comes before the types reads text and single values for lists and maps.
    decorators = section.__pydantic_decorators__.model_validators.values()
    is_loose = any(one.info.mode == "before" for one in decorators)
    keys = {name: _value(fields[name], sections, is_loose=is_loose) for name in section.key_order()}
    return {"type": "object", "properties": keys, "additionalProperties": False}


def _value(info: FieldInfo, sections: dict[str, Any], *, is_loose: bool = False) -> dict[str, Any]:
    """Return the schema of a key: its forms, its meaning."""
    forms: list[dict[str, Any]] = []
    for member, facts in members_of(info.annotation, info.metadata):
        forms += _forms(member, facts, sections, is_loose=is_loose)
    unique = [form for place, form in enumerate(forms) if form not in forms[:place]]
    schema: dict[str, Any] = {"anyOf": unique} if len(unique) > 1 else dict(unique[0])
    return {**schema, "description": info.description} if info.description else schema


def _forms(member: Any, facts: list[Any], sections: dict[str, Any], *, is_loose: bool) -> list[dict[str, Any]]:
    """Return the forms that a member of a key's type can have in a file."""
    is_read_before = any(isinstance(fact, BeforeValidator) for fact in facts)
    if member is NoneType:
        return [{"type": "null"}]
    if names := [fact for fact in facts if isinstance(fact, NameOf)]:
        return [{"enum": list(names[0].names())}]
    if get_origin(member) is Literal:
        return [{"enum": list(get_args(member))}]
    if get_origin(member) is list:
        items = _value(FieldInfo.from_annotation(get_args(member)[0]), sections)
        alone = [items] if is_read_before else []
        return [{"type": "array", "items": items}, *alone, *([_TEXT] if is_loose else [])]
    if get_origin(member) is dict:
        values = True if is_loose else _value(FieldInfo.from_annotation(get_args(member)[1]), sections)
        return [{"type": "object", "additionalProperties": values}, *([_TEXT] if is_loose else [])]
    if (part := section_of(member)) is not None:
        if part.__name__ not in sections:
            sections[part.__name__] = {}  # for a section that is its own part
            sections[part.__name__] = _section(part, sections)
        is_short = is_read_before or any("spelled_out" in vars(one) for one in part.__mro__ if one is not OneOf)
        return [{"$ref": f"#/$defs/{part.__name__}"}, *([_TEXT] if is_short else [])]
    if member not in _TYPES:
        return [{}]
    bounds = {_BOUNDS[kind]: number for kind, number in bounds_of(facts)}
    return [{"type": _TYPES[member], **(bounds if member in (int, float) else {})}]
