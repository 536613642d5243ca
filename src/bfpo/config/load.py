"""A checked config from a YAML file and `--set key=value`; all problems are reported together, with their places."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from bfpo.config.describe import allowed, describe_keys, flat_members, items_of, section_of, values_of
from bfpo.core.console import one_line
from bfpo.core.errors import ConfigError, first_line
from bfpo.core.inputs import missing_folder, no_such_file
from bfpo.core.secrets import hide_in_setting, hide_secrets
from bfpo.core.settings import ConfigPart, OneOf, StageConfig
from bfpo.core.yaml_text import parse_yaml, read_yaml

__all__ = ["check_places", "load_config", "read_template"]

ConfigT = TypeVar("ConfigT", bound=StageConfig)

_SET = "--set "
_STEP = re.compile(r"[^\[\].]+(?:\[\d{1,6}\])*")
_MAX_STEPS = 20
_PART = re.compile(r"\.?[^\[\].]+|\[\d+\]")
_ITEM = re.compile(r"\[\d+\]")
_REMOVED = {
    "pairs_per_microbatch": "max_tokens_per_microbatch bounds a forward pass in tokens now (8192 unless set)",
    "bf16": "write dtype: bfloat16, under which what trains is held in float32",
}


def load_config(cls: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Return the config of one stage: defaults < the YAML file < `overrides`, each of the form `key=value`.

    A key of a section is written with dots (`data.split.held_out=60`); a value is read as YAML. Relative paths stay
    relative to the current directory, not to the file's folder.

    Raises one `ConfigError` for all problems, each with file and line, key, value, what is allowed and, for an unknown
    key, the nearest one.
    """
    values, places = _read_file(Path(path)) if path is not None else ({}, {})
    for override in sorted(overrides, key=_depth):  # a section first, so that `--judge J` keeps `judge.threshold`
        _apply_override(cls, values, places, override)
    _drop_overruled(cls, values, places)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problems(cls, error, places, values)))
    raise ConfigError("\n".join(problems))


def read_template(file: str | None) -> str | None:
    """Return the text of a chat template file, if given; raises `ConfigError` if it cannot be read."""
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {file} cannot be read as text ({error})") from error


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    values, lines = read_yaml(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got {_show(values)}; a config is a mapping of keys to values")
    return values, {key: f"{path}:{line}" for key, line in lines.items()}


def _drop_overruled(cls: type[StageConfig], values: dict[str, Any], places: dict[str, str]) -> None:
    """Drop keys of the file that `--set` overrules, such as `num_train_epochs` under `--set max_steps=...`."""
    for key, need in cls.needs.items():
        other = need.overruled_by
        set_here = other is not None and places.get(other, "").startswith(_SET) and need.overrules(values[other])
        if set_here and key in values and not places.get(key, "").startswith(_SET):
            del values[key]


def _depth(override: str) -> int:
    return len(_PART.findall(override.partition("=")[0]))


def _apply_override(cls: type[ConfigPart], values: dict[str, Any], places: dict[str, str], override: str) -> None:
    place = f"{_SET}{one_line(hide_in_setting(override))}"
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or len(parts) > _MAX_STEPS or not all(_STEP.fullmatch(part) for part in parts):
        raise ConfigError(f"{place}: got no key=value; write for example --set beta=0.1 or --set data.limit=100")
    try:
        value, _ = parse_yaml(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(
            f"{place}: the value is not valid YAML ({problem}); put it in quotes, as in --set '{key}=\"...\"'"
        ) from error
    *steps, leaf = _PART.findall(key)
    if value is None and text.strip() and _back_to_default(cls, values, [*steps, leaf]):
        for known in [known for known in places if _PART.findall(known)[: len(steps) + 1] == [*steps, leaf]]:
            del places[known]
        return
    target: Any = values
    annotation: Any = cls
    for depth, step in enumerate(steps, start=1):
        name = "".join(steps[:depth]).lstrip(".")
        at = _index(target, step, place)
        if isinstance(target, dict) and target.get(at) is None:
            target[at] = {}
            places.setdefault(name, place)
        annotation = _annotation_at(annotation, step)
        target[at] = _as_keys(annotation, target[at], f"{place}: {name}")
        target = target[at]
        if isinstance(target, list) and len(target) == 1 and not [*steps, leaf][depth].startswith("["):
            annotation = _annotation_at(annotation, "[0]")
            target[0] = _as_keys(annotation, target[0], f"{place}: {name}[0]")
            target = target[0]
        if not isinstance(target, (dict, list)):
            raise ConfigError(f"{place}: {name} is {_show(target)}, not a section; set {name} itself")
    target[_index(target, leaf, place)] = value
    for known in [known for known in places if known == key or known.startswith((f"{key}.", f"{key}["))]:
        del places[known]
    places[key] = place


def _back_to_default(annotation: Any, target: Any, steps: Sequence[str]) -> bool:
    """Remove the key, if given, and return whether `null` stands for its default.

    It does not for a key that is required or unknown, or for which null is a value beside another default.
    """
    for place, step in enumerate(steps):
        if not step.startswith("[") and (section := items_of(annotation)) is not None:  # a list given as one item
            if isinstance(target, list) and len(target) != 1:
                return False
            annotation, target = section, target[0] if isinstance(target, list) else None
        name, section = step.lstrip("."), section_of(annotation)
        if place == len(steps) - 1:
            info = None if section is None else section.every_field().get(name)
            if section is None or info is None or (info.is_required() and not section.limits_of(name)):
                return False
            if type(None) in flat_members(info.annotation) and info.get_default(call_default_factory=True) is not None:
                return False
            if isinstance(target, dict):
                target.pop(name, None)
            return True
        annotation = _annotation_at(annotation, step)
        if isinstance(target, dict):
            target = target.get(name)
        elif isinstance(target, list) and step.startswith("[") and int(step[1:-1]) < len(target):
            target = target[int(step[1:-1])]
        else:
            target = None
    return False


def _annotation_at(annotation: Any, step: str) -> Any:
    """Return the annotation of a key of a section, or of an item of a list or mapping; `None` if there is none."""
    if (section := section_of(annotation)) is not None:
        info = section.every_field().get(step.lstrip("."))
        return None if info is None else info.annotation
    inner = [get_args(one)[-1] for one in flat_members(annotation) if get_origin(one) in (list, dict) and get_args(one)]
    return inner[0] if inner else None


def _as_keys(annotation: Any, value: Any, place: str) -> Any:
    """Return the keys that a short form, such as the name of a judge, stands for; of a list given as one item, a list.

    Any other value is unchanged. Raises `ConfigError` for a short form that cannot be used.
    """
    if not isinstance(value, str):
        return value
    if items_of(annotation) is not None:
        return [value]
    section = section_of(annotation)
    try:
        return section.spelled_out(value) if section is not None and issubclass(section, OneOf) else value
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


def _index(target: dict[str, Any] | list[Any], step: str, place: str) -> Any:
    """Return the key or index of a step of a dotted key: `.name`, or `[0]` for an item of a list."""
    number = step[1:-1] if step.startswith("[") else None
    if isinstance(target, dict):
        if number is not None:
            raise ConfigError(f"{place}: [{number}] is an index into a list, but the value is a section")
        return step.lstrip(".")
    if number is None or int(number) >= len(target):
        raise ConfigError(
            f"{place}: got {step.lstrip('.')!r} for an item of a list of {len(target)}; write [0] for its first"
        )
    return int(number)


def _problems(cls: type[ConfigPart], error: ValidationError, places: Mapping[str, str], values: Any) -> Iterator[str]:
    for details in error.errors(include_url=False, include_context=True):
        key, info, part = _locate(cls, details["loc"], values)
        place = _place(key, places)
        message = _message(cls, key, info, part, details)
        named = message.partition(":")[0]  # by a check of the whole config
        if message.endswith("; leave it out") and not places.get(named, _SET).startswith(_SET):
            place, message = places[named], f"{message}, as --set {named}=null does"
        yield f"{place}: {message}" if place else message


def _message(
    cls: type[ConfigPart], key: str, info: FieldInfo | None, part: type[ConfigPart], details: ErrorDetails
) -> str:
    kind = details["type"]
    if kind == "extra_forbidden":
        gone, given = _REMOVED.get(key.rpartition(".")[2]), str(details["loc"][-1])
        if gone is not None:
            return f"{key}: this key was removed; {gone}"
        if "." in given:
            nested = "{".join(f"{step}: " for step in given.split(".")) + "..." + "}" * given.count(".")
            return f"{key}: unknown key; in a file a key stands below its section, as in {nested}"
        return f"{key}: unknown key{_suggestion(cls, key, part)}"
    if kind == "other_mode":
        return f"{key}: {details['msg']}"
    if kind == "value_error":  # raised by our own validators, which name the key themselves
        text = str(details.get("ctx", {}).get("error", details["msg"]))
        return f"{key}{': ' if text.startswith('got ') else '.'}{text}" if key else text
    if kind == "missing":
        leaf = key.rpartition(".")[2]
        by = f" by {part.called(details['input'])}" if issubclass(part, OneOf) and part.head().limits_of(leaf) else ""
        return f"{key}: missing; needed{by}: {info.description if info else 'a value'}"
    if info is None:
        return f"{key}: got {_show(details['input'])}; {details['msg']}"
    words = "a section of keys" if section_of(info.annotation) and kind == "model_type" else allowed(info)
    none = ", not empty" if details["input"] == [] else ""
    return f"{key}: got {_show(details['input'])}; allowed: {words}{none}"


def _locate(
    cls: type[ConfigPart], loc: tuple[int | str, ...], value: Any
) -> tuple[str, FieldInfo | None, type[ConfigPart]]:
    """Return the dotted key of an error, without the parts that pydantic adds; its field; the section's class.

    Of a section with modes it is the class of the mode that `value`, the config as given, selects.
    """
    key: list[str] = []
    info: FieldInfo | None = None
    model: type[ConfigPart] | None = cls
    section = cls.chosen(value)
    for part in loc:
        if isinstance(part, int) and key and info is not None and (items := items_of(info.annotation)) is not None:
            key[-1] += f"[{part}]"
            model = items
            value = value[part] if isinstance(value, list) and part < len(value) else value
            continue
        if model is None:
            free = None if info is None else values_of(info.annotation)
            if free is None or not isinstance(value, dict) or part not in value:
                break
            key.append(str(part))  # a name that the user has chosen
            info, model, value = FieldInfo.from_annotation(free), section_of(free), value[part]
            continue
        key.append(str(part))
        section = model.chosen(value)
        info = section.every_field().get(str(part)) or model.every_field().get(str(part))
        if info is None:
            break
        model = section_of(info.annotation)
        value = value.get(part) if isinstance(value, dict) else None
    return ".".join(key), info, section


def _place(key: str, places: Mapping[str, str]) -> str:
    """Return the place of a key; for a missing key, that of its section."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        whole = ".".join(parts[:end])
        if place := places.get(whole) or places.get(whole.partition("[")[0] if end == 1 else ""):
            return place
    return ""


def _suggestion(cls: type[ConfigPart], key: str, part: type[ConfigPart]) -> str:
    names = [known.name for known in describe_keys(cls)]
    leaf = key.rpartition(".")[2]
    section = _ITEM.sub("[]", key[: len(key) - len(leaf)])
    beside = [section + name for name in part.key_order()]
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    near = [section + name for name in difflib.get_close_matches(leaf, part.key_order(), n=1)] or same_leaf
    near = near or ([] if section else difflib.get_close_matches(key, names, n=1))
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; allowed: {', '.join(beside)}"


def _show(value: object) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else hide_secrets(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


# Keys that name a model, each with the key of its revision.
_MODELS = {
    "model": "revision",
    "reference": "reference_revision",
    "margin_model": None,
    "start": "start_revision",
    "tokenizer": None,
    "first": None,
    "second": None,
}
_TEXTS = ("chat_template", "phrases", "policy")


def check_places(config: ConfigPart) -> None:
    """Raise `ConfigError` for missing local folders of models and missing files of templates and policies.

    The hub is not asked; data files are checked when they are read.
    """
    problems = list(_missing(config, ""))
    if problems:
        raise ConfigError("\n".join(problems))


def _missing(part: ConfigPart, prefix: str) -> Iterator[str]:
    idle = part.idle() if isinstance(part, StageConfig) else frozenset()
    at_server = getattr(part, "url", None) is not None  # then the model is the server's name for it
    for key in type(part).model_fields:
        value = getattr(part, key)
        if key in idle:
            continue
        if key in _MODELS and isinstance(value, str):
            problem = None if at_server else missing_folder(value, getattr(part, _MODELS[key] or "", None))
            if problem is not None:
                yield f"{prefix}{key}: got {value!r}; {problem}"
        elif key in _TEXTS and isinstance(value, str):
            if not Path(value).is_file():
                yield f"{prefix}{key}: got {value!r}; {no_such_file(value)}"
        elif isinstance(value, ConfigPart):
            yield from _missing(value, f"{prefix}{key}.")
        elif isinstance(value, (list, dict)):
            named = value.items() if isinstance(value, dict) else enumerate(value)
            for name, item in named:
                if isinstance(item, ConfigPart):
                    place = f"{prefix}{key}.{name}." if isinstance(value, dict) else f"{prefix}{key}[{name}]."
                    yield from _missing(item, place)
