"""YAML 1.2 scalars (`1e-5` is a number, `no` is text), bounds on size and depth, and the line of each key.

A file may come from somebody else: aliases cannot make it larger than the limits, and tags make no objects.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from bfpo.core.console import one_line
from bfpo.core.errors import ConfigError, first_line

__all__ = ["dump_yaml", "parse_yaml", "read_yaml"]

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 40
_MAX_VALUES = 50_000
"""Values in a document, with those behind each alias counted every time."""
_MAX_DIGITS = 400


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2: only null, true/false, decimal integers and floats are not text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - upstream's name

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._measured: dict[int, tuple[int, int]] = {}  # by the id of a node: values in it, levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node as upstream does, within the bounds."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", "tag:yaml.org,2002:str"):
            short = tag.replace("tag:yaml.org,2002:", "!!")
            raise _problem(f"the tag {short!r} is not allowed; write a plain value", mark)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _problem(f"values are nested more than {_MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._measured:
                raise _problem("an alias stands within the value that it names", mark)
        elif node is not None:
            self._measured[id(node)] = self._measure(node, mark)
        return node

    def _measure(self, node: yaml.Node, mark: yaml.Mark) -> tuple[int, int]:
        """Return the number of values in a node and of its levels, what is behind aliases included."""
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
        measured = [self._measured[id(child)] for child in children]
        size, levels = 1 + sum(size for size, _ in measured), 1 + max((levels for _, levels in measured), default=0)
        if size > _MAX_VALUES:
            raise _problem(f"it holds more than {_MAX_VALUES} values, counted with its aliases", mark)
        if levels > _MAX_DEPTH:
            raise _problem(f"aliases nest values more than {_MAX_DEPTH} levels deep", mark)
        return size, levels


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, mark)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same value."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - upstream's name


_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    breaks = any(character in text for character in "\x85\u2028\u2029")  # YAML folds these into spaces unless escaped
    quoted = breaks or text == "<<"  # a plain one would be a merge key
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > _MAX_DIGITS:
        raise _problem(f"a whole number of more than {_MAX_DIGITS} digits", node.start_mark)
    return int(loader.construct_scalar(node))  # PyYAML reads 010 as octal


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _problem("a key must be text", key_node.start_mark)
        if key_node.value == "<<" and key_node.style is None:
            raise _problem("merge keys (<<) are not read; write the keys themselves", key_node.start_mark)
        if key_node.value in mapping:
            raise _problem(f"the key {key_node.value!r} is given twice", key_node.start_mark)
        mapping[key_node.value] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _key_lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            name = f"{prefix}{key_node.value}"
            lines[name] = key_node.start_mark.line + 1
            lines.update(_key_lines(value_node, f"{name}."))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            name = f"{prefix.removesuffix('.')}[{index}]"
            lines[name] = item.start_mark.line + 1
            lines.update(_key_lines(item, f"{name}."))
    return lines


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """Return the value of one YAML document and the line of every dotted key; `key[0]` is the first item of a list.

    Raises `yaml.YAMLError`, mostly with a mark, for invalid YAML, a duplicate key, a key that is not text, a tag that
    makes an object, and what is beyond the bounds: 1 MiB, 40 levels, 50,000 values.
    """
    if len(text) > _MAX_BYTES:
        raise yaml.YAMLError(f"it has more than {_MAX_BYTES} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        value = loader.construct_document(node) if node is not None else None
    finally:
        loader.dispose()
    return value, _key_lines(node)


def read_yaml(path: str | Path, what: str = "the config file") -> tuple[Any, dict[str, int]]:
    """Return what `parse_yaml` does for a file.

    Raises `ConfigError` with file and line for a file that cannot be read, is no regular file (a pipe could be empty
    for ever), is too large, not UTF-8 or not valid YAML.
    """
    path, name = Path(path), one_line(path)
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ConfigError(f"{name}: is a pipe or a device; save {what} as a file")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{name}: is larger than {_MAX_BYTES} bytes; {what} cannot be that large")
        return parse_yaml(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(f"{name}: {what} is not UTF-8 text; save it as UTF-8") from error
        reason = getattr(error, "strerror", None) or error  # a name with a zero byte is a ValueError
        raise ConfigError(f"{name}: cannot read {what} ({reason}); check its name") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{place}: not valid YAML: {problem}") from error


def dump_yaml(value: Any) -> str:
    """Return a value as YAML, keys in their order; `parse_yaml` reads the same value back."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return str(text)
