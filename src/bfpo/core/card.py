"""The card of a run: `README.md` with the metadata that model hubs read, the results, and how to run it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bfpo.core.yaml_text import dump_yaml

__all__ = ["CardSection", "render_card"]

CardSection = str | Mapping[str, object]
"""Markdown text, or facts by name (a table)."""


def render_card(
    title: str,
    sections: Mapping[str, CardSection],
    *,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    head: Mapping[str, Any] | None = None,
) -> str:
    """Return the card as Markdown; an empty section is left out. `head` replaces the metadata of a model."""
    if head is None:
        head = {"library_name": "transformers", "tags": ["bfpo", *tags]}
        head |= {} if base_model is None else {"base_model": base_model}
    parts = [f"---\n{dump_yaml(dict(head))}---", f"# {title}"]
    for name, content in sections.items():
        if content:
            parts += [f"## {name}", content if isinstance(content, str) else _table(content)]
    return "\n\n".join(parts) + "\n"


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _table(facts: Mapping[str, object]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
