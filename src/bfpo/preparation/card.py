"""Descriptions of prepared data: the facts of `data.json`, log lines, the data card and its figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bfpo.config.prepare import PrepareConfig
from bfpo.core.console import in_words
from bfpo.core.markdown import table
from bfpo.data.labels import CELLS
from bfpo.data.records import DataFile, Lengths, PairStreamFacts, SourceFacts, StreamFacts, SuiteHits, TextStyle
from bfpo.judges.refusal_text import language_of
from bfpo.preparation.compliance import OTHER, UNSAFE, compliance_warnings
from bfpo.preparation.mixture import Mixed
from bfpo.preparation.parts import SPLITS, Part
from bfpo.preparation.plan import PlannedSource, Suite
from bfpo.preparation.style import style_of
from bfpo.preparation.write import Written

__all__ = ["card_head", "card_sections", "data_lines", "describe_data", "draw_data"]

_SHARES = {"p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}
_UNITS = ("chars", "words", "tokens")
_NAMES = (*CELLS, "unknown")
_LANGUAGE_CHARS = 1000
_TEXTS = ("completion", "chosen", "rejected")
_GREY = "#748091"
_SIDES = (("chosen", 0.17, "o"), ("rejected", -0.17, "s"))

AnyStream = PairStreamFacts | StreamFacts


# -------------------------------------------------------------------------------------------------------- facts


def describe_data(
    mixed: Mixed,
    sources: Sequence[PlannedSource],
    suites: Sequence[Suite],
    config: PrepareConfig,
    written: Mapping[str, Written],
) -> DataFile:
    """Return what `data.json` holds. `written`: by stream, empty for a preview; of its sample language and style are
    read.
    """
    streams = {
        name: _stream_facts(mixed.of_stream(name), with_tokens=config.tokenizer is not None) for name in mixed.streams
    }
    warnings = [text for name, facts in streams.items() if (text := _alpha_warning(name, facts, config.alpha))]
    for name, made in written.items():
        facts = streams[name]
        if isinstance(facts, PairStreamFacts) and made.compliances:
            facts.compliance_over_refusal = {**made.compliances, **made.candidates}
            warnings += compliance_warnings(name, facts.compliance_over_refusal)
        if sampled := made.sample:
            streams[name].languages = _languages_of([row[name] for row in sampled for name in _TEXTS if name in row])
            streams[name].style, remarks = style_of(sampled, is_main=name == "main")
            warnings += [f"{name}, {len(sampled)} rows read: {remark}" for remark in remarks]
    rows = [
        SourceFacts(
            name=source.config.name,
            stream=source.config.stream,
            hub_id=source.hub_id,
            revision=source.revision,
            licence=source.licence,
            files=[str(file) for file in source.files],
            layouts=part.shard.facts["layouts"],
            rows=part.shard.facts["rows"],
            rejected=part.shard.facts["rejected_by_reason"],
            units=part.counts(),
            available=part.available,
            columns_not_read=part.shard.facts.get("columns_not_read"),
            rows_with_conversations_as_text=part.shard.facts.get("rows_with_conversations_as_text"),
            deep_refusals=None if source.deep is None else source.deep.in_words(),
        )
        for source, part in zip(sources, mixed.parts, strict=True)
    ]
    hits = {
        suite.name: SuiteHits(
            len(suite.prompts), sum(part.shard.facts["hits_by_suite"].get(suite.name, 0) for part in mixed.parts)
        )
        for suite in suites
    }
    return DataFile(rows, streams, config.alpha, warnings, hits, **mixed.counts)


def _stream_facts(parts: Sequence[Part], *, with_tokens: bool) -> AnyStream:
    """Return the facts of one stream: rows and label cells by split, E_safe, conflicts, lengths by cell.

    A row that is written several times counts each time, except in the lengths.
    """
    rows = {
        split: sum(int(part.copies[part.split == number].sum()) for part in parts)
        for number, split in enumerate(SPLITS)
    }
    num_rows, units = sum(rows.values()), _UNITS if with_tokens else _UNITS[:2]
    cut = sum(part.num_cut() for part in parts) or None
    if parts[0].source.stream == "sft":
        by_source = {part.source.name: _completion_lengths(part, units) for part in parts}
        return StreamFacts(rows, num_rows, by_source, cut_completions=cut)
    cells = [_cells(part) for part in parts]
    by_split = {split: _count_cells(parts, cells, number) for number, split in enumerate(SPLITS)}
    lengths = _lengths_by_cell(parts, cells, units)
    return PairStreamFacts(rows, num_rows, by_split, **_safety(parts), lengths=lengths, cut_completions=cut)


def _labels(part: Part, block: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the labels of some rows as they are written, (N, 2), NaN for unknown."""
    labels: npt.NDArray[np.float64] = block["labels"].astype(np.float64)
    return np.where(np.isnan(labels), 1.0, labels) if part.source.unknown_label == "safe" else labels


def _cells(part: Part) -> npt.NDArray[np.uint8]:
    """Return the index in `CELLS` of each row, `len(CELLS)` if a label is unknown."""
    numbers = np.zeros(len(part.shard), np.uint8)
    for places, block in part.shard.numbers():
        labels = _labels(part, block)
        unsafe = ~(labels > 0.5)
        numbers[places] = np.where(np.isnan(labels).any(axis=1), len(CELLS), 2 * unsafe[:, 0] + unsafe[:, 1])
    return numbers


def _count_cells(parts: Sequence[Part], cells: Sequence[npt.NDArray[np.uint8]], split: int) -> dict[str, int]:
    total = np.zeros(len(_NAMES), np.int64)
    for part, numbers in zip(parts, cells, strict=True):
        for number in range(len(_NAMES)):
            total[number] += part.copies[(part.split == split) & (numbers == number)].sum(dtype=np.int64)
    return {name: count for name, count in zip(_NAMES, total.tolist(), strict=True) if count or name in CELLS}


def _safety(parts: Sequence[Part]) -> dict[str, Any]:
    """Return E_safe, the mean safety of all completions whose label is known, and the share of conflicts.

    A conflict is a pair whose more helpful completion is unsafe and whose other one is safe.
    """
    known = total = conflicts = pairs = unsafe = 0.0
    for part in parts:
        for places, block in part.shard.numbers():
            labels, copies = _labels(part, block), part.copies[places].astype(np.float64)
            is_known = ~np.isnan(labels)
            total += float((np.where(is_known, labels, 0) * copies[:, None]).sum())
            known += float((is_known * copies[:, None]).sum())
            unsafe += float(((labels <= 0.5) * copies[:, None]).sum())
            pairs += float(copies[is_known.all(axis=1)].sum())
            conflicts += float(copies[(labels[:, 0] <= 0.5) & (labels[:, 1] > 0.5)].sum())
    return {
        "e_safe": total / known if known else None,
        "unsafe_completions": int(unsafe),
        "conflicts": int(conflicts),
        "conflict_rate": conflicts / pairs if pairs else None,
    }


def _lengths_by_cell(
    parts: Sequence[Part], cells: Sequence[npt.NDArray[np.uint8]], units: Sequence[str]
) -> dict[str, Any]:
    lengths: dict[str, Any] = {name: {} for name in _NAMES}
    for place, field in enumerate(("prompt", "chosen", "rejected")):
        for unit in units:
            columns = [part.shard.key(unit, place) for part in parts]
            for number, name in enumerate(_NAMES):
                some = np.concatenate(
                    [
                        column[(part.copies > 0) & (own == number)]
                        for column, part, own in zip(columns, parts, cells, strict=True)
                    ]
                )
                if len(some):
                    lengths[name].setdefault(field, {})[unit] = _spread(some)
    return {name: found for name, found in lengths.items() if found}


def _completion_lengths(part: Part, units: Sequence[str]) -> dict[str, Any]:
    written = part.copies > 0
    rows, is_second = part.row[written], part.side[written] == 1
    lengths: dict[str, Any] = {}
    for unit in units:
        for field, column in (("prompt", 0), ("completion", 1)):
            values = part.shard.key(unit, column)[rows]
            if field == "completion":
                values[is_second] = part.shard.key(unit, 2)[rows[is_second]]
            if len(values):
                lengths.setdefault(field, {})[unit] = _spread(values)
    return lengths


def _spread(values: npt.NDArray[Any]) -> dict[str, float]:
    """Return the mean, the values nearest to the quartiles and the ninth decile, and the largest."""
    numbers = np.sort(values)
    places = {name: round(share * (len(numbers) - 1)) for name, share in _SHARES.items()}
    return {"mean": float(values.mean()), **{name: int(numbers[place]) for name, place in places.items()}}


def _alpha_warning(stream: str, facts: AnyStream, alpha: float) -> str | None:
    """Return a warning if `alpha` does not fit the safety of this stream's completions, else `None`.

    With B1 = 3 the optimum gives an unsafe completion the factor E_safe - 2 alpha on its helpfulness: only
    `alpha > E_safe / 2` pushes unsafe completions down the more helpful they are.
    """
    if not isinstance(facts, PairStreamFacts) or not facts.unsafe_completions or facts.e_safe is None:
        return None
    e_safe = facts.e_safe
    if alpha > e_safe / 2:
        return None
    effect = "pushed up" if alpha < e_safe / 2 else "not pushed down"
    return (
        f"{stream}: alpha = {alpha:g} is not above E_safe / 2 = {e_safe / 2:.3f}: unsafe completions are then {effect} "
        f"the more helpful they are (factor E_safe - 2 alpha = {e_safe - 2 * alpha:+.3f}); train with a larger alpha"
    )


def _languages_of(texts: Sequence[str]) -> dict[str, int]:
    """Return how many texts are in each language (ISO 639), as far as can be guessed, the most frequent first."""
    counts = Counter(language_of(text[:_LANGUAGE_CHARS]) for text in texts)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# -------------------------------------------------------------------------------------------------------- words


def data_lines(data: DataFile) -> list[str]:
    """Return the lines of the log: sources, streams, what was removed, warnings."""
    lines = _source_lines(data.sources)
    for name, facts in data.streams.items():
        lines += _stream_lines(name, facts)
    for name, found in data.decontamination.items():
        lines.append(f"decontaminated against {name}: {found.rows} rows removed ({found.prompts} prompts)")
    return [*lines, *(f"warning: {text}" for text in data.warnings)]


def _source_lines(sources: Sequence[SourceFacts]) -> list[str]:
    """Return one line for each source with the counts of its rows."""
    lines = []
    for source in sources:
        texts = [f"{source.rows} rows"]
        if source.rejected:
            texts.append(f"rejected {sum(source.rejected.values())} ({_counts(source.rejected)})")
        texts.append(_counts(source.units))
        texts += [source.deep_refusals] if source.deep_refusals else []
        lines.append(f"{source.name} ({source.stream}): {'; '.join(texts)}")
    return lines


def _stream_lines(name: str, facts: AnyStream) -> list[str]:
    """Return lines for a stream: rows by split, cells of the training split, safety, languages."""
    lines = [f"{name}: {_counts(facts.rows)}"]
    if isinstance(facts, PairStreamFacts):
        lines.append(f"{name}: training pairs by cell (chosen-rejected): {_counts(facts.cells['train'])}")
        if facts.e_safe is not None:
            lines.append(
                f"{name}: E_safe {facts.e_safe:.3f}; helpful but unsafe: {facts.conflicts} pairs{_share(facts)}"
            )
    if facts.cut_completions:
        lines.append(f"{name}: {_cut_text(facts)}")
    if text := _compliance_text(facts):
        lines.append(f"{name}: {text}")
    return lines


def _compliance_text(facts: AnyStream) -> str:
    counts = facts.compliance_over_refusal if isinstance(facts, PairStreamFacts) else None
    if not counts:
        return ""
    kinds = {kind: counts[kind] for kind in (UNSAFE, OTHER) if kind in counts}
    return (
        f"training pairs that prefer an answer that complies to a refusal, by that answer: {_counts(kinds)} "
        f"({counts['read']} of {counts['candidates']} pairs on harmful prompts were read)"
    )


def _cut_text(facts: AnyStream) -> str:
    cut, total = facts.cut_completions, facts.num_rows * (1 + isinstance(facts, PairStreamFacts))
    return f"{cut} of {total} completions were cut off when they were generated; no end token follows"


def _share(facts: PairStreamFacts) -> str:
    return "" if facts.conflict_rate is None else f" ({facts.conflict_rate:.1%})"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def card_head(data: DataFile, files: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of a data set's card, with which the `datasets` library finds the files."""
    licences = sorted({source.licence for source in data.sources if source.licence})
    configs: dict[str, list[dict[str, str]]] = {}
    for file in files:
        stream, _, name = file.partition("/")
        configs.setdefault(stream, []).append({"split": name.removesuffix(".parquet"), "path": file})
    head: dict[str, Any] = {"tags": ["bfpo", "preference"]}
    if licences:
        head["license"] = licences if len(licences) > 1 else licences[0]
    head["configs"] = [{"config_name": stream, "data_files": found} for stream, found in configs.items()]
    return head


def card_sections(data: DataFile, *, has_figure: bool) -> dict[str, str]:
    """Return the sections of the card from what `data.json` holds."""
    sections = {"Sources": _sources_table(data.sources)}
    if warnings := data.warnings:
        sections["Warnings"] = "\n".join(f"- {text}" for text in warnings)
    for name, facts in data.streams.items():
        sections[f"Stream {name}"] = _stream_text(facts)
    if has_figure:
        sections["Figure"] = "![Pairs by label cell, and the words of their completions](data.png)"
    if deep := [one for one in data.sources if one.deep_refusals]:
        sections["Deep refusals"] = "\n".join(
            f"- {one.name} ({one.stream}), {one.units.get('used', 0)} rows: {one.deep_refusals}" for one in deep
        )
    sections["Cleaning"] = _cleaning_text(data)
    return sections


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = (["unknown" if value is None else in_words(value, 4) for value in row] for row in rows)
    return "\n".join(table(columns, cells))


def _sources_table(sources: Sequence[SourceFacts]) -> str:
    columns = (
        "source",
        "stream",
        "rows",
        "rejected",
        "pairs or completions by outcome",
        "licence",
        "data set",
        "revision",
    )
    rows = [
        (
            source.name,
            source.stream,
            source.rows,
            in_words(source.rejected),
            in_words(source.units),
            source.licence,
            source.hub_id or "own files",
            source.revision or "none",
        )
        for source in sources
    ]
    return _table(columns, rows)


def _stream_text(facts: AnyStream) -> str:
    parts = []
    if isinstance(facts, PairStreamFacts):
        for split, rows in facts.rows.items():
            if rows:
                parts += [f"**{split}**: {rows} pairs", _two_by_two(facts.cells[split])]
        if facts.e_safe is not None:
            parts.append(
                f"E_safe, the mean safety of all completions whose label is known, is {facts.e_safe:.4f}. The more "
                f"helpful completion is unsafe and the other safe in {facts.conflicts} pairs{_share(facts)}."
            )
    else:
        parts.append(f"Completions: {_counts(facts.rows)}.")
    if facts.cut_completions:
        parts.append(f"{_cut_text(facts)}.")
    if text := _compliance_text(facts):
        parts.append(f"{text[:1].upper()}{text[1:]}.")
    parts.append(_lengths_table(facts.lengths))
    if facts.languages:
        sample = sum(facts.languages.values())
        parts.append(
            f"Languages of {sample} completions drawn at random, as common words and py3langid say: "
            f"{_counts(facts.languages)}."
        )
    if facts.style:
        parts.append(_style_table(facts.style))
    return "\n\n".join(parts)


def _style_table(style: Mapping[str, Mapping[str, TextStyle]]) -> str:
    rows = [
        (
            cell,
            side,
            found.num,
            f"{found.median_words:g}",
            f"{found.begin_with_space:.0%}",
            "not read" if found.refuse is None else f"{found.refuse:.0%}",
            "" if found.with_that_phrase is None else f"{found.refusal_phrase} ({found.with_that_phrase:.0%})",
        )
        for cell, sides in style.items()
        for side, found in sides.items()
    ]
    columns = ("cell", "text", "read", "median words", "begin with space", "refuse", "commonest phrase of refusals")
    return _table(columns, rows)


def _two_by_two(cells: Mapping[str, int]) -> str:
    rows = [
        [f"chosen {chosen}", *(cells[f"{chosen}-{rejected}"] for rejected in ("safe", "unsafe"))]
        for chosen in ("safe", "unsafe")
    ]
    table = _table(("", "rejected safe", "rejected unsafe"), rows)
    unknown = cells.get("unknown", 0)
    return f"{table}\n\nand {unknown} with an unknown label" if unknown else table


def _lengths_table(lengths: Lengths) -> str:
    rows = []
    for name in [*(cell for cell in CELLS if cell in lengths), *(name for name in lengths if name not in CELLS)]:
        for field, units in lengths[name].items():
            for unit, spread in units.items():
                rows.append((name, field, unit, *(f"{spread[key]:,.0f}" for key in ("mean", "median", "p90", "max"))))
    return _table(("cell or source", "text", "unit", "mean", "median", "p90", "longest"), rows)


def _cleaning_text(data: DataFile) -> str:
    near = data.near_duplicates
    lines = [
        f"- Exact duplicates of another row of the stream: {_counts(data.duplicates)}.",
        f"- Rows with a completion that is labelled both safe and unsafe: {data.contradictory_rows}"
        + (" (listed in `contradictory.jsonl`)." if data.contradictory_rows else "."),
        f"- Different prompts: {near['prompts']}; {near['prompts_in_groups']} of them in {near['groups']} groups of "
        f"near-duplicates, of which {near['prompts_moved']} were moved to the split of their group.",
    ]
    if data.decontamination:
        lines.append("- Rows that match an evaluation prompt were removed and are listed in `contamination.jsonl`:")
        columns = ("suite", "prompts", "rows removed")
        rows = [(name, found.prompts, found.rows) for name, found in data.decontamination.items()]
        return "\n".join(lines) + "\n\n" + _table(columns, rows)
    lines.append("- No evaluation prompts were given.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- figure


def draw_data(streams: Mapping[str, AnyStream]) -> dict[str, bytes]:
    """Return `data.png` and `data.svg`: pairs by label cell of each stream, words of their completions by cell.

    `streams`: what `stream_facts` returns, by name. Empty if no stream holds pairs.
    """
    from matplotlib.figure import Figure

    from bfpo.plots.style import INK, MUTED, figure_style, png_bytes, svg_bytes

    pairs = {name: facts for name, facts in streams.items() if isinstance(facts, PairStreamFacts)}
    if not pairs:
        return {}
    num_bars = sum(len(_splits(facts)) for facts in pairs.values())
    num_rows = sum(len(facts.lengths) for facts in pairs.values())
    height = 1.9 + 0.42 * max(num_bars, num_rows)
    with figure_style("data"):
        figure = Figure(figsize=(11, height))
        left, right = figure.subplots(1, 2, width_ratios=(1.05, 1))
        _draw_cells(left, pairs)
        _draw_lengths(right, pairs)
        total = sum(facts.num_rows for facts in pairs.values())
        figure.text(0.012, 1 - 0.30 / height, f"{total:,} preference pairs by label cell", fontsize=13, color=INK,
                    weight="bold", va="center")  # fmt: skip
        figure.text(0.012, 1 - 0.58 / height, "A cell names the safety of the more helpful completion, then of the "
                    "other.", fontsize=9.5, color=MUTED, va="center")  # fmt: skip
        figure.subplots_adjust(left=0.12, right=0.985, top=1 - 0.95 / height, bottom=0.62 / height, wspace=0.34)
        return {"data.png": png_bytes(figure), "data.svg": svg_bytes(figure, salt="data")}


def _splits(facts: PairStreamFacts) -> list[str]:
    return [split for split, rows in facts.rows.items() if rows]


def _colours() -> dict[str, str]:
    from bfpo.plots.style import CELL_COLOURS

    return {**CELL_COLOURS, "unknown": _GREY}


def _draw_cells(axes: Any, pairs: Mapping[str, PairStreamFacts]) -> None:
    """Draw one bar per stream and split: shares of the cells, with their numbers where they fit."""
    colours, labels, y = _colours(), [], 0
    shown = [name for name in colours if any(facts.cells[s].get(name) for facts in pairs.values() for s in SPLITS)]
    for stream, facts in pairs.items():
        for split in _splits(facts):
            cells, start, rows = facts.cells[split], 0.0, facts.rows[split]
            for name, count in cells.items():
                share = count / rows
                axes.barh(y, share, left=start, height=0.62, color=colours[name], edgecolor="white", linewidth=0.8)
                if share > 0.09:
                    axes.text(start + share / 2, y, f"{count:,}", ha="center", va="center", fontsize=8, color="white")
                start += share
            labels.append(f"{stream} {split}")
            y += 1
    axes.set(yticks=range(y), yticklabels=labels, xlim=(0, 1), xlabel="share of the pairs", ylim=(y - 0.45, -0.55))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(visible=False, axis="y")
    from matplotlib.patches import Patch

    handles = [Patch(color=colours[name], label=name) for name in shown]
    axes.legend(handles=handles, ncols=len(shown), frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1),
                borderaxespad=0.2, handlelength=1.1, columnspacing=1.1)  # fmt: skip


def _draw_lengths(axes: Any, pairs: Mapping[str, PairStreamFacts]) -> None:
    """Draw the quartiles of the words of chosen and rejected completions, one row per stream and cell."""
    from bfpo.plots.style import INK

    colours, labels, y = _colours(), [], 0
    for stream, facts in pairs.items():
        for name in (*CELLS, "unknown"):
            found = facts.lengths.get(name)
            if not found:
                continue
            for side, shift, marker in _SIDES:
                words = found[side]["words"]
                axes.plot([words["p25"], words["p75"]], [y - shift] * 2, color=colours[name], lw=2.2, alpha=0.55)
                axes.plot([words["median"]], [y - shift], marker, color=colours[name], ms=5.5)
            labels.append(f"{stream}  {name}")
            y += 1
    axes.set(yticks=range(y), yticklabels=labels, xlabel="words of a completion: median and quartiles",
             ylim=(y - 0.45, -0.55))  # fmt: skip
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    handles = [axes.plot([], [], marker, color=INK, ms=5, ls="none", label=side)[0] for side, _, marker in _SIDES]
    axes.legend(handles=handles, ncols=2, frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1),
                borderaxespad=0.2, handletextpad=0.3, columnspacing=1.1)  # fmt: skip
