"""Style and export of figures; each colour is a token that a page can replace by its own."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = [
    "CEILING_COLOUR",
    "CELL_COLOURS",
    "INK",
    "MARKERS",
    "METHOD_COLOURS",
    "MUTED",
    "PAPER",
    "START_COLOUR",
    "TOKENS",
    "figure_style",
    "inline_svg",
    "png_bytes",
    "short_name",
    "svg_bytes",
]

# Every colour is a unique hex string, so that a page can replace it by its own (dark) colour.
INK, MUTED, RULE, PAPER = "#1b2430", "#5a6675", "#d8dee7", "#fffffe"
METHOD_COLOURS = (
    "#0b62ad",
    "#c8501a",
    "#0a8f6c",
    "#a3488f",
    "#a87a00",
    "#5a4bb5",
    "#7a4b22",
    "#1d8ba3",
    "#7b7f1c",
    "#b23a55",
)
START_COLOUR, CEILING_COLOUR = "#748091", "#2a3442"
CELL_COLOURS = {
    "safe-safe": "#4396d3",
    "safe-unsafe": "#0a57a0",
    "unsafe-safe": "#b03c06",
    "unsafe-unsafe": "#df8423",
}
TOKENS = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    START_COLOUR: "m-start",
    CEILING_COLOUR: "m-ceiling",
    **{colour: f"m-{place}" for place, colour in enumerate(METHOD_COLOURS)},
    **{colour: f"c-{cell}" for cell, colour in CELL_COLOURS.items()},
}
MARKERS = ("o", "s", "^", "D", "v", "P", "<", "p", ">", "h")
FONT = "DejaVu Sans"


@contextmanager
def figure_style(salt: str) -> Iterator[None]:
    """Context with the style of all figures; `salt` makes the SVG ids unique to a figure."""
    settings: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": [FONT],
        "font.size": 10,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "text.color": INK,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,  # a title may hold any character
    }
    with mpl.rc_context(settings):
        yield


def short_name(name: str, most: int = 36) -> str:
    """Return a name for a figure: of a longer one than `most` characters the start and the end."""
    if len(name) <= most:
        return name
    end = most // 3
    return f"{name[: most - end - 1]}…{name[-end:]}"


def png_bytes(figure: Figure, *, dpi: int = 160, maker: str | None = None) -> bytes:
    """Return the figure as PNG, the same bytes for the same data; `maker` is named in its metadata."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": maker})
    return buffer.getvalue()


def svg_bytes(figure: Figure, *, salt: str = "bfpo", maker: str | None = None) -> bytes:
    """Return the figure as SVG, text kept as text, the same bytes for the same data; `maker` as in `png_bytes`."""
    buffer = io.BytesIO()
    with figure_style(salt):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": maker})
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return SVG to embed in a page: colours and font are CSS variables, ids start with `name`.

    `description` is the text for screen readers, as escaped HTML.
    """
    text = svg_bytes(figure, salt=name).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(rf"'{FONT}'(?:, [^;\"]*?)?(?=[;\"])", "var(--font)", text)
    text = re.sub("|".join(TOKENS), lambda found: f"var(--{TOKENS[found.group()]})", text)
    head = re.search(r"<svg[^>]*>", text)
    assert head is not None
    box = re.search(r'viewBox="([^"]+)"', head.group())
    assert box is not None
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg viewBox="{box.group(1)}" role="img" aria-label="{description}" class="figure" {names}>'
    return opening + text[head.end() :]
