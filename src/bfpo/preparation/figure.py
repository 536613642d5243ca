"""The figure of a data card: the label cells of each stream, and how long their completions are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bfpo.data.labels import CELLS

__all__ = ["draw_data"]

_SPLITS = ("train", "validation", "test")
_GREY = "#748091"
_SIDES = (("chosen", 0.17, "o"), ("rejected", -0.17, "s"))


def draw_data(streams: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """Return `data.png` and `data.svg`: pairs by label cell of each stream, words of their completions by cell.

    `streams`: what `stream_facts` returns, by name. Empty where no stream holds pairs.
    """
    from matplotlib.figure import Figure

    from bfpo.plots.style import INK, MUTED, figure_style, png_bytes, svg_bytes

    pairs = {name: facts for name, facts in streams.items() if "cells" in facts}
    if not pairs:
        return {}
    num_bars = sum(len(_splits(facts)) for facts in pairs.values())
    num_rows = sum(len(facts["lengths"]) for facts in pairs.values())
    height = 1.9 + 0.42 * max(num_bars, num_rows)
    with figure_style("data"):
        figure = Figure(figsize=(11, height))
        left, right = figure.subplots(1, 2, width_ratios=(1.05, 1))
        _draw_cells(left, pairs)
        _draw_lengths(right, pairs)
        total = sum(facts["num_rows"] for facts in pairs.values())
        figure.text(0.012, 1 - 0.30 / height, f"{total:,} preference pairs by label cell", fontsize=13, color=INK,
                    weight="bold", va="center")  # fmt: skip
        figure.text(0.012, 1 - 0.58 / height, "A cell names the safety of the more helpful completion, then of the "
                    "other.", fontsize=9.5, color=MUTED, va="center")  # fmt: skip
        figure.subplots_adjust(left=0.12, right=0.985, top=1 - 0.95 / height, bottom=0.62 / height, wspace=0.34)
        return {"data.png": png_bytes(figure), "data.svg": svg_bytes(figure, salt="data")}


def _splits(facts: Mapping[str, Any]) -> list[str]:
    return [split for split, rows in facts["rows"].items() if rows]


def _colours() -> dict[str, str]:
    from bfpo.plots.style import CELL_COLOURS

    return {**CELL_COLOURS, "unknown": _GREY}


def _draw_cells(axes: Any, pairs: Mapping[str, Mapping[str, Any]]) -> None:
    """One bar a stream and split: shares of the cells, with their numbers where there is room."""
    colours, labels, y = _colours(), [], 0
    shown = [name for name in colours if any(facts["cells"][s].get(name) for facts in pairs.values() for s in _SPLITS)]
    for stream, facts in pairs.items():
        for split in _splits(facts):
            cells, start, rows = facts["cells"][split], 0.0, facts["rows"][split]
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


def _draw_lengths(axes: Any, pairs: Mapping[str, Mapping[str, Any]]) -> None:
    """Quartiles of the words of the chosen and rejected completions, one row a stream and cell."""
    from bfpo.plots.style import INK

    colours, labels, y = _colours(), [], 0
    for stream, facts in pairs.items():
        for name in (*CELLS, "unknown"):
            found = facts["lengths"].get(name)
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
