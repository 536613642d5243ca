from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection

from bfpo.core.schema import Score
from bfpo.plots.plane import Box, place_labels
from bfpo.plots.style import CELL_COLOURS, METHOD_COLOURS, TOKENS
from bfpo.report.data import MethodResult, ReportData, Suite
from bfpo.report.figures.bars import refusal_figure
from bfpo.report.figures.marks import colour_of, marker_of
from bfpo.report.figures.tradeoff import refused_figure, scatter_figure
from bfpo.report.figures.training import has_curves, training_figure
from bfpo.report.page import render_html, render_markdown
from bfpo.report.tables import with_suite_means
from fake_report import fake_report

FULL = fake_report(full=True)


def overlaps(boxes: list[Box]) -> list[tuple[int, int]]:
    return [(i, j) for j in range(len(boxes)) for i in range(j) if boxes[i].overlap(boxes[j]) > 0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [4.0, 40.0, 200.0])
def test_labels_keep_apart_however_crowded(seed: int, spread: float) -> None:
    rng = random.Random(seed)
    points = [(350 + rng.gauss(0, spread), 300 + rng.gauss(0, spread)) for _ in range(11)]
    points = [(min(max(x, 10), 690), min(max(y, 10), 450)) for x, y in points]
    sizes = [(rng.uniform(30, 100), 13.0) for _ in points]
    bounds = Box(0, 0, 700, 460)
    boxes = place_labels(points, sizes, bounds)
    assert len(boxes) == 11
    assert overlaps(boxes) == []
    assert all(box.inside(bounds) for box in boxes)
    dots = [Box(x, y, x, y).padded(6) for x, y in points]
    assert not [1 for box in boxes for dot in dots if box.overlap(dot) > 0]
    assert boxes == place_labels(points, sizes, bounds)


def crowded() -> ReportData:
    """Eleven methods of which nine are all but equal, at the top of the figure."""
    rng = random.Random(5)
    methods = []
    for number in range(11):
        x, y = (0.7 + rng.gauss(0, 0.01), 0.99 + rng.gauss(0, 0.004)) if number < 9 else (0.3, 0.4 + number / 50)
        scores = [
            Score("helpfulness", x, x - 0.03, x + 0.03, 300),
            Score("harmless_harmful", min(y, 1), y - 0.02, 1.0, 100),
        ]
        role = ("main", "start", "ceiling")[number] if number < 3 else "baseline"
        methods.append(MethodResult(f"m{number}", f"Method number {number}", role, scores=scores))  # type: ignore[arg-type]
    return ReportData("t", "", methods)


@pytest.mark.parametrize("width", [7.4, 4.3])
@pytest.mark.parametrize("data", [crowded(), FULL], ids=["crowded", "full"])
def test_labels_of_the_scatter_do_not_overlap(data: ReportData, width: float) -> None:
    figure = scatter_figure(data, width=width)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for axes in figure.axes for text in axes.texts]
    named = [text.get_text() for text in texts if not text.get_text().endswith("enlarged")]
    assert sorted(named) == sorted(method.title for method in data.methods)  # in one of the panels, and once
    extents = [text.get_window_extent(renderer) for text in texts]
    assert overlaps([Box(box.x0, box.y0, box.x1, box.y1) for box in extents]) == []
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in extents)


@pytest.mark.parametrize("width", [7.4, 4.3])
def test_crowded_points_are_drawn_once_more_enlarged(width: float) -> None:
    figure = scatter_figure(crowded(), width=width)
    assert figure is not None
    whole, enlarged = figure.axes
    assert "9 models, enlarged" in {text.get_text() for text in whole.texts}
    assert len(enlarged.texts) == 9
    assert enlarged.get_xlim()[1] - enlarged.get_xlim()[0] < 0.3 * (whole.get_xlim()[1] - whole.get_xlim()[0])
    beside = enlarged.get_position().x0 > whole.get_position().x1
    below = enlarged.get_position().y1 < whole.get_position().y0
    assert (beside, below) == (width > 6, width < 6)
    drawn = [collection for collection in enlarged.collections if isinstance(collection, PathCollection)]
    pixels = enlarged.transData.transform([collection.get_offsets()[0] for collection in drawn])
    assert len(pixels) == 9
    gaps = [abs(pixels[i] - pixels[j]).max() for j in range(len(pixels)) for i in range(j)]
    assert min(gaps) > 4  # no marker lies on another


def test_few_points_apart_are_drawn_once() -> None:
    data = ReportData("t", "", crowded().methods[8:])
    figure = scatter_figure(data)
    assert figure is not None
    assert len(figure.axes) == 1


def test_the_front_is_a_step_line_from_edge_to_edge() -> None:
    points = {"a": (0.2, 0.9), "b": (0.6, 0.6), "c": (0.4, 0.5), "d": (0.8, 0.3)}
    methods = [
        MethodResult(n, n, "baseline", scores=[Score("helpfulness", x, x, x, 9), Score("harmless_harmful", y, y, y, 9)])
        for n, (x, y) in points.items()
    ]
    figure = scatter_figure(ReportData("t", "", methods))
    assert figure is not None
    (axes,) = figure.axes
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-pre"]
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    assert [tuple(map(float, step)) for step in line.get_xydata()] == [
        (left, 0.9), (0.2, 0.9), (0.6, 0.6), (0.8, 0.3), (0.8, bottom)
    ]  # fmt: skip


@pytest.mark.parametrize("width", [7.4, 4.3])
def test_titles_of_the_refusals_keep_apart_and_names_are_whole(width: float) -> None:
    methods = list(FULL.methods)
    methods[2] = replace(methods[2], title="a method with quite a long name for one line of the figure")
    figure = refusal_figure(replace(FULL, methods=methods), width=width)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    extents = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(extents) == 2
    assert overlaps([Box(box.x0, box.y0, box.x1, box.y1) for box in extents]) == []
    names = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    assert all(box.x0 >= 0 for box in (*names, *extents))
    assert all(box.x1 <= figure.bbox.x1 for box in extents)
    assert overlaps([Box(box.x0, box.y0, box.x1, box.y1) for box in names]) == []
    axes.set_xlim(-0.1, 0.1)  # as without larger rates: ticks every 2.5%
    for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        assert float(label.get_text().rstrip("%")) == pytest.approx(100 * abs(place)), "a tick says where it is"


def test_of_very_many_methods_only_those_that_matter_are_named() -> None:
    scores = [
        [Score("helpfulness", n / 40, None, None, 9), Score("harmless_harmful", 0.5, None, None, 9)] for n in range(40)
    ]
    methods = [MethodResult(f"m{n}", f"m{n}", "baseline", scores=scores[n]) for n in range(40)]
    methods[3] = replace(methods[3], role="start")
    figure = scatter_figure(ReportData("t", "", methods))
    assert figure is not None
    named = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {name for name in named if name.startswith("m")} == {"m3", "m39"}


def test_no_two_methods_share_colour_and_marker() -> None:
    methods = [MethodResult(str(n), str(n), "baseline") for n in range(60)]
    data = ReportData("t", "", methods)
    assert len({(colour_of(data, method), marker_of(data, method)) for method in methods}) == 60


def test_methods_without_both_numbers_are_left_out() -> None:
    data = crowded()
    data.methods[4].scores.pop()
    figure = scatter_figure(data)
    assert figure is not None
    assert "Method number 4" not in {text.get_text() for text in figure.axes[0].texts}
    assert scatter_figure(ReportData("t", "", [MethodResult("a", "A", "main")])) is None
    assert training_figure(ReportData("t", "", [MethodResult("a", "A", "main")])) is None


def test_damaged_logs_draw_what_there_is() -> None:
    rows = [
        {"step": 0, "main/safe-safe/beta_margin": 0.0},
        {"step": 10, "main/safe-safe/beta_margin": None},
        {"loss": 1},
    ]
    method = MethodResult("a", "A", "main", curves=[*rows, {"step": 20, "main/safe-safe/beta_margin": float("nan")}])
    assert has_curves(method)
    assert not has_curves(MethodResult("b", "B", "main", curves=rows[2:]))
    assert training_figure(ReportData("t", "", [method])) is not None


def test_every_colour_is_told_apart() -> None:
    assert len(TOKENS) == 6 + len(METHOD_COLOURS) + len(CELL_COLOURS)


def test_refusals_are_drawn_where_no_judge_of_harm_read_the_answers() -> None:
    def method(name: str, harmful: float, harmless: float, **more: Any) -> MethodResult:
        scores = {
            "h": [Score("refused_harmful", harmful, harmful - 0.1, min(1.0, harmful + 0.1), 50)],
            "x": [Score("over_refusal_full", harmless, 0.0, harmless + 0.1, 50, higher_is_better=False)],
        }
        return MethodResult(name, name, "baseline", suite_scores={**scores, **more})

    methods = [method("tuned", 0.9, 0.05), method("sft", 0.8, 0.15), method("start", 0.1, 0.02)]
    suites = [Suite("h"), Suite("x")]
    data = with_suite_means(ReportData("t", "", methods, suites=suites))
    figure = refused_figure(data)
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_xlabel().startswith("harmless prompts not refused")
    assert axes.get_ylabel().startswith("harmful prompts refused")
    page = render_html(data)
    assert "Harmful prompts refused, harmless ones answered" in page
    assert "refused.png" in render_markdown(data)
    judged = [method(one.name, 0.9, 0.1, g=[Score("harmless", 0.9, 0.8, 1.0, 50)]) for one in methods]
    data = with_suite_means(ReportData("t", "", judged, suites=[*suites, Suite("g")]))
    assert refused_figure(data) is None  # the scatter shows more
    assert scatter_figure(data) is not None
    assert refused_figure(with_suite_means(ReportData("t", "", [methods[0]], suites=[Suite("x")]))) is None
