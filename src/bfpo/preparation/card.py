"""The words of a data card: Markdown sections for people, metadata for hubs, and lines for a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bfpo.data.labels import CELLS

__all__ = ["card_head", "card_sections", "source_lines", "stream_lines"]


def source_lines(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each source: what came of its rows."""
    lines = []
    for source in sources:
        texts = [f"{source['rows']} rows"]
        if source["rejected"]:
            texts.append(f"rejected {sum(source['rejected'].values())} ({_counts(source['rejected'])})")
        texts.append(_counts(source["units"]))
        lines.append(f"{source['name']} ({source['stream']}): {'; '.join(texts)}")
    return lines


def stream_lines(name: str, facts: Mapping[str, Any]) -> list[str]:
    """Return lines for a stream: rows by split, cells of the training split, safety, languages."""
    lines = [f"{name}: {_counts(facts['rows'])}"]
    if "cells" in facts:
        lines.append(f"{name}: training pairs by cell (chosen-rejected): {_counts(facts['cells']['train'])}")
        if facts["e_safe"] is not None:
            lines.append(
                f"{name}: E_safe {facts['e_safe']:.3f}; helpful but unsafe: {facts['conflicts']} pairs "
                f"({facts['conflict_rate'] or 0:.1%})"
            )
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def card_head(data: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of a data set's card, with which the `datasets` library finds the files."""
    licences = sorted({source["licence"] for source in data["sources"] if source["licence"]})
    configs: dict[str, list[dict[str, str]]] = {}
    for file in files:
        stream, _, name = file.partition("/")
        configs.setdefault(stream, []).append({"split": name.removesuffix(".parquet"), "path": file})
    head: dict[str, Any] = {"tags": ["bfpo", "preference"]}
    if licences:
        head["license"] = licences if len(licences) > 1 else licences[0]
    head["configs"] = [{"config_name": stream, "data_files": found} for stream, found in configs.items()]
    return head


def card_sections(data: Mapping[str, Any], *, has_figure: bool) -> dict[str, str]:
    """Return the sections of the card from what `data.json` holds."""
    sections = {"Sources": _sources_table(data["sources"])}
    if warnings := data["warnings"]:
        sections["Warnings"] = "\n".join(f"- {text}" for text in warnings)
    for name, facts in data["streams"].items():
        sections[f"Stream {name}"] = _stream_text(facts)
    if has_figure:
        sections["Figure"] = "![Pairs by label cell, and the words of their completions](data.png)"
    sections["Cleaning"] = _cleaning_text(data)
    return sections


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "unknown"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _sources_table(sources: Sequence[Mapping[str, Any]]) -> str:
    columns = ("source", "stream", "rows", "rejected", "what became of the rest", "licence", "data set", "revision")
    rows = [
        (
            source["name"],
            source["stream"],
            source["rows"],
            _counts(source["rejected"]),
            _counts(source["units"]),
            source["licence"],
            source["hub_id"] or "own files",
            source["revision"] or "none",
        )
        for source in sources
    ]
    return _table(columns, rows)


def _stream_text(facts: Mapping[str, Any]) -> str:
    parts = []
    if "cells" in facts:
        for split, rows in facts["rows"].items():
            if rows:
                parts += [f"**{split}**: {rows} pairs", _two_by_two(facts["cells"][split])]
        if facts["e_safe"] is not None:
            parts.append(
                f"E_safe, the mean safety of all completions whose label is known, is {facts['e_safe']:.4f}. The more "
                f"helpful completion is unsafe and the other safe in {facts['conflicts']} pairs "
                f"({facts['conflict_rate'] or 0:.1%})."
            )
    else:
        parts.append(f"Completions: {_counts(facts['rows'])}.")
    parts.append(_lengths_table(facts["lengths"]))
    if facts.get("languages"):
        sample = sum(facts["languages"].values())
        parts.append(
            f"Languages of {sample} completions drawn at random, as py3langid guesses: {_counts(facts['languages'])}."
        )
    return "\n\n".join(parts)


def _two_by_two(cells: Mapping[str, int]) -> str:
    rows = [
        [f"chosen {chosen}", *(cells[f"{chosen}-{rejected}"] for rejected in ("safe", "unsafe"))]
        for chosen in ("safe", "unsafe")
    ]
    table = _table(("", "rejected safe", "rejected unsafe"), rows)
    unknown = cells.get("unknown", 0)
    return f"{table}\n\nand {unknown} with an unknown label" if unknown else table


def _lengths_table(lengths: Mapping[str, Any]) -> str:
    rows = []
    for name in [*(cell for cell in CELLS if cell in lengths), *(name for name in lengths if name not in CELLS)]:
        for field, units in lengths[name].items():
            for unit, spread in units.items():
                rows.append((name, field, unit, *(f"{spread[key]:,.0f}" for key in ("mean", "median", "p90", "max"))))
    return _table(("cell or source", "text", "unit", "mean", "median", "p90", "longest"), rows)


def _cleaning_text(data: Mapping[str, Any]) -> str:
    near = data["near_duplicates"]
    lines = [
        f"- Rows that repeat another of their stream to the letter: {_counts(data['duplicates'])}.",
        f"- Rows with a completion that is labelled both safe and unsafe: {data['contradictory_rows']}"
        + (" (listed in `contradictory.jsonl`)." if data["contradictory_rows"] else "."),
        f"- Different prompts: {near['prompts']}; {near['prompts_in_groups']} of them in {near['groups']} groups of "
        f"near-duplicates, of which {near['prompts_moved']} were moved to the split of their group.",
    ]
    if data["decontamination"]:
        lines.append("- Rows that ask an evaluation prompt were removed and are listed in `contamination.jsonl`:")
        columns = ("suite", "prompts", "rows removed")
        rows = [(name, found["prompts"], found["rows"]) for name, found in data["decontamination"].items()]
        return "\n".join(lines) + "\n\n" + _table(columns, rows)
    lines.append("- No evaluation prompts were given to look for.")
    return "\n".join(lines)
