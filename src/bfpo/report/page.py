"""A report as one self-contained HTML page, as Markdown, JSON and CSV, and its figures."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from bfpo.core.characters import visible
from bfpo.core.errors import RunError
from bfpo.core.files import write_bytes_whole
from bfpo.judges.quality import calibration_figure
from bfpo.plots.style import inline_svg, png_bytes, svg_bytes
from bfpo.report.answers import answer_block
from bfpo.report.data import FactTable, ReportData
from bfpo.report.experiments import experiment_view, is_the_table
from bfpo.report.figures.bars import refusal_figure, spread_figure
from bfpo.report.figures.depth import depth_figures
from bfpo.report.figures.marks import token_of
from bfpo.report.figures.tradeoff import experiment_figure, refused_figure, scatter_figure
from bfpo.report.figures.training import (
    curve_figure,
    drift_figure,
    has_curves,
    loss_figure,
    margin_figure,
    training_figure,
)
from bfpo.report.headline import headline
from bfpo.report.sections import CSV_COLUMNS, csv_text
from bfpo.report.view import few_samples, page_view
from bfpo.suites.depth_tables import about_prefill, depth_tables

__all__ = ["environment", "render_html", "render_markdown", "source_hash", "write_report"]

# Titles are escaped text; the answers are a compressed block: neither can look like a section.
_SECTION = re.compile(r'<section id="([\w-]+)"[^>]*>\s*<h2>(.*?)</h2>')
_CONTENTS = '<nav id="contents" aria-label="Contents">'
_HEAD = 2048  # bytes at the start of a file in which its mark is
_MARKDOWN = re.compile(r"([\\`*_\[\]#|<~&$])")


def write_report(data: ReportData, folder: str | Path, *, name: str = "report", maker: str | None = None) -> Path:
    """Write `NAME.html`, `NAME.md`, `NAME.json`, `NAME.csv` and figures into a folder; return the path of the page.

    The figures are in `figures/`, or in `NAME_figures/` for another name. The page is self-contained: it includes
    styles, script and figures and forbids network access. Texts of models are never parsed as markup; invisible
    characters (control codes, changes of direction) are shown as symbols. The same data give the same bytes. With
    `maker` every file carries this mark, and only files that carry it are replaced.

    Raises `SettingError` for numbers that are not finite, `OSError` if a file cannot be written, and, with `maker`,
    `RunError` before anything is written if a file or link is in the way.
    """
    folder = Path(folder)
    json_text = data.to_json()
    data = _visible(data)
    place = "figures" if name == "report" else f"{name}_figures"
    files = {
        folder / place / f"{title}.{suffix}": content
        for title, figure in _figures(data).items()
        for suffix, content in (
            ("svg", svg_bytes(figure, salt=title, maker=maker)),
            ("png", png_bytes(figure, maker=maker)),
        )
    }
    texts = {"html": _page(data, maker=maker), "md": _markdown(data, place), "json": json_text, "csv": csv_text(data)}
    if maker is not None:
        texts["md"] = _marks(maker)[".md"] + texts["md"]
        texts["json"] = texts["json"].replace("{", _marks(maker)[".json"], 1)
    files |= {folder / f"{name}.{suffix}": text.encode("utf-8") for suffix, text in texts.items()}
    if maker is not None:
        _check_ours(files, folder / place, maker)
    for path, content in files.items():
        write_bytes_whole(path, content)
    return folder / f"{name}.html"


def _marks(maker: str) -> dict[str, str]:
    """Return by file type what a file of the page has near its start."""
    return {
        ".html": f'<meta name="generator" content="{maker}">',
        ".md": f"[//]: # ({maker})\n\n",
        ".json": f'{{\n "generator": "{maker}",',
        ".csv": f"{','.join(CSV_COLUMNS)}\n",
        ".svg": f"<dc:title>{maker}</dc:title>",
        ".png": f"Software\0{maker}",
    }


def _check_ours(files: Iterable[Path], figures: Path, maker: str) -> None:
    """Raise `RunError` if a file to be written exists without the mark of its type, or is a link."""
    wrong = [figures] if figures.is_symlink() or (figures.exists() and not figures.is_dir()) else []
    wrong += [path for path in files if os.path.lexists(path) and not _is_ours(path, _marks(maker)[path.suffix])]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RunError(
            f"--out: {', '.join(map(str, wrong[:3]))}{more} would be replaced, but {maker} did not make "
            f"{'it' if len(wrong) == 1 else 'them'} (links are not followed); choose another name for the page"
        )


def _is_ours(path: Path, mark: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return mark.encode("utf-8") in file.read(_HEAD)


def render_html(data: ReportData, *, refresh_seconds: int | None = None) -> str:
    """Return the page as one HTML document; with `refresh_seconds` it reloads after that time."""
    return _page(_visible(data), refresh_seconds)


def render_markdown(data: ReportData) -> str:
    """Return the report in Markdown; it refers to `figures/scatter.png` and `figures/training.png`."""
    return _markdown(_visible(data), "figures")


def _figures(data: ReportData) -> dict[str, Figure]:
    found = {
        "scatter": scatter_figure(data),
        "refused": refused_figure(data),
        "training": training_figure(data),
        "refusal": refusal_figure(data),
    }
    found |= {
        f"tradeoff-{place}": experiment_figure(one)
        for place, one in enumerate(data.experiments)
        if not is_the_table(data, one)
    }
    found |= {name: figure for run in _depth(data) for name, _, figure in run["figures"]}
    spreads = {f"margins-{place}": spread_figure(m) for place, m in enumerate(data.methods) if m.margins}
    return {name: figure for name, figure in found.items() if figure is not None} | spreads


def source_hash(text: str) -> str:
    """Return the source expression of an inline script or style in a content security policy, without its quotes."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _page(data: ReportData, refresh_seconds: int | None = None, maker: str | None = None) -> str:
    made = environment(autoescape=True)
    script = made.loader.get_source(made, "report.js")[0] if made.loader else ""
    parts = page_view(data)
    view = {
        **parts,
        "data": data,
        "headline": headline(data),
        "scatter": _scatter(data),
        "refused": _refused(data),
        **_training(data),
        "experiments": _experiments(data),
        "depth": [
            {**run, "figures": [_panel(title, figure, name, title) for name, title, figure in run["figures"]]}
            for run in _depth(data)
        ],
        "stages": _with_curves(parts["stages"]),
        "agreement": _with_calibration(data, parts["agreement"]),
        "answers": answer_block(data),
        "refresh_seconds": refresh_seconds,
        "mark": None if maker is None else Markup(_marks(maker)[".html"]),
        "script": Markup(script),  # the only script that the page allows
        "script_hash": source_hash(script),
    }
    return _with_contents(made.get_template("report.html").render(view))


def _with_contents(page: str) -> str:
    """Return the page with a list of its sections, which are those that it has."""
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in _SECTION.findall(page))
    return page.replace(_CONTENTS, f"{_CONTENTS}<ul>{links}</ul>", 1)


def _markdown(data: ReportData, figures: str) -> str:
    view = {
        **page_view(data),
        "data": data,
        "headline": headline(data),
        "figures": figures,
        "experiments": [
            {**experiment_view(data, one), "figure": not is_the_table(data, one) and experiment_figure(one) is not None}
            for one in data.experiments
        ],
        "depth": _depth(data),
        "scatter": scatter_figure(data) is not None,
        "refused": refused_figure(data) is not None,
        "panels": any(map(has_curves, data.methods)),
        "refusal": refusal_figure(data) is not None,
        "samples": few_samples(data),
        "margins": [(place, m.title) for place, m in enumerate(data.methods) if m.margins],
    }
    text = environment(autoescape=False).get_template("report.md").render(view)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def environment(*, autoescape: bool) -> Environment:
    """Return the templates of the package, with the filters `zip`, `md` and `code`."""
    made = Environment(
        loader=PackageLoader("bfpo.report", "templates"), autoescape=autoescape, undefined=StrictUndefined
    )
    made.filters["zip"] = lambda first, second: zip(first, second, strict=True)
    made.filters["md"] = _escape_markdown
    made.filters["code"] = _inline_code
    return made


# ----------------------------------------------------------------------------------------------------------- figures


def _scatter(data: ReportData) -> dict[str, Any] | None:
    wide, narrow = scatter_figure(data), scatter_figure(data, width=4.3, height=4.6)
    if wide is None or narrow is None:
        return None
    metrics = ("helpfulness", "harmless_harmful")
    left_out = [m.title for m in data.methods if any(m.score(metric) is None for metric in metrics)]
    description = "Scatter of helpfulness against harmlessness; the numbers are in the table of methods"
    return {**_two_widths(wide, narrow, "", description), "left_out": ", ".join(left_out)}


def _refused(data: ReportData) -> dict[str, Any] | None:
    wide, narrow = refused_figure(data), refused_figure(data, width=4.3, height=4.6)
    if wide is None or narrow is None:
        return None
    description = "Scatter of refused harmful prompts against harmless ones not refused; the numbers are in the suites"
    return _two_widths(wide, narrow, "refused", description)


def _two_widths(wide: Figure, narrow: Figure, prefix: str, description: str) -> dict[str, Any]:
    """Return a figure in two widths; `pair`: it has a second panel and needs twice the width."""
    return {
        "wide": Markup(inline_svg(wide, f"{prefix}wide", description)),
        "narrow": Markup(inline_svg(narrow, f"{prefix}narrow", description)),
        "pair": len(wide.axes) > 1,
    }


def _experiments(data: ReportData) -> list[dict[str, Any]]:
    """Return the view of each experiment with its figure; an experiment that is the page's table has none."""
    found = []
    for place, experiment in enumerate(data.experiments):
        wide, narrow = experiment_figure(experiment), experiment_figure(experiment, width=4.3, height=4.6)
        label = _attribute(f"Trade-off of the models of {experiment.run}; the numbers are in the table below")
        shown = None
        if wide is not None and narrow is not None and not is_the_table(data, experiment):
            shown = _two_widths(wide, narrow, f"tradeoff{place}", label)
        found.append({**experiment_view(data, experiment), "figure": shown})
    return found


def _depth(data: ReportData) -> list[dict[str, Any]]:
    """Return what each run measured of depth: about it, tables, and figures with their names and titles."""
    return [
        {
            "run": run,
            "about": about_prefill(found),
            "tables": [FactTable(*table) for table in depth_tables(found)],
            "figures": [(f"depth-{at}-{nth}", *one) for nth, one in enumerate(depth_figures(found))],
        }
        for at, (run, found) in enumerate(data.depth.items())
    ]


def _with_curves(views: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the views of the results of single runs with the figures of their curves."""
    found = []
    for place, view in enumerate(views):
        one = view["result"]
        label = _attribute(f"Loss over the steps of {one.run}")
        figure = Markup(inline_svg(curve_figure(one.curves), f"curves{place}", label)) if one.curves else None
        more = []
        for number, (title, curves) in enumerate(one.behaviour.items()):
            drawn = curve_figure(curves, shares=all(0 <= y <= 1 for points in curves.values() for _, y, *_ in points))
            more.append((title, Markup(inline_svg(drawn, f"behaviour{place}-{number}", _attribute(title)))))
        found.append({**view, "figure": figure, "behaviour": more})
    return found


def _with_calibration(data: ReportData, views: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the views of the agreements with the figures of their calibration."""
    found = []
    for place, (one, view) in enumerate(zip(data.agreement, views, strict=True)):
        figure = None
        if one.calibration:
            drawn = calibration_figure(one.calibration, judge=one.judge, confidence=one.confidence)
            label = _attribute(f"Calibration of {one.judge}: p(safe) against the share that people call safe")
            figure = Markup(inline_svg(drawn, f"calibration{place}", label))
        found.append({**view, "figure": figure})
    return found


def _training(data: ReportData) -> dict[str, Any]:
    trained = [method for method in data.methods if has_curves(method)]
    size = (4.6, 2.6) if len(trained) in (1, 2, 4) else (3.5, 2.5)  # two columns or three
    panels = [
        _panel(m.title, margin_figure(m, width=size[0], height=size[1]), f"margin{place}", f"Margins of {m.title}")
        for place, m in enumerate(trained)
    ]
    soundness = [
        _panel(title, figure, name, title)
        for title, name, figure in (
            ("loss / its value at step 0", "loss", loss_figure(data, width=4.6, height=2.7)),
            ("log-prob drift, nats per token", "drift", drift_figure(data, width=4.6, height=2.7)),
        )
        if trained
    ]
    spreads = [
        _panel(m.title, spread_figure(m), f"spread{place}", f"Margins of the evaluated pairs, {m.title}")
        for place, m in enumerate(data.methods)
        if m.margins
    ]
    refusal = [refusal_figure(data, width=width) for width in (7.4, 4.3)]
    label = "Over-refusal and harm of each method; the numbers are in the table of methods"
    return {
        "spreads": spreads,
        "refusal": [
            {"name": name, "svg": Markup(inline_svg(figure, f"refusal-{name}", label))}
            for name, figure in zip(("wide", "narrow"), refusal, strict=True)
            if figure is not None
        ],
        "panels": panels,
        "soundness": soundness,
        "trained": [{"title": method.title, "token": token_of(data, method)} for method in trained],
    }


def _panel(title: str, figure: Figure, name: str, description: str) -> dict[str, Any]:
    return {"title": title, "svg": Markup(inline_svg(figure, name, _attribute(description)))}


# ------------------------------------------------------------------------------------------------ unsafe characters


def _visible(data: ReportData) -> ReportData:
    """Return the data with every invisible character replaced by a symbol."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return visible(value.replace("\r\n", "\n"))
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return value

    return TypeAdapter(ReportData).validate_python(clean(asdict(data)))


def _attribute(text: str) -> str:
    return html.escape(text, quote=True)


def _escape_markdown(text: str) -> str:
    """Return text escaped for Markdown, on one line."""
    line = " ".join(str(text).split())
    return _MARKDOWN.sub(r"\\\1", line)


def _inline_code(text: str) -> str:
    """Return text, which may contain back-ticks, as inline code; line breaks become a symbol."""
    line = text.replace("\n", " ⏎ ").strip()
    if not line:
        return "(nothing written)"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if fence != "`" else f"`{line}`"
