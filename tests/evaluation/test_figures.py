from __future__ import annotations

import random

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bfpo.evaluation.figures.placement import Box, place_labels
from bfpo.evaluation.figures.scatter import scatter_figure
from bfpo.evaluation.figures.style import CELL_COLOURS, METHOD_COLOURS, TOKENS
from bfpo.evaluation.figures.training import has_curves, training_figure
from bfpo.evaluation.report_data import MethodResult, ReportData
from bfpo.schema import Score
from fake_report import fake_report


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
@pytest.mark.parametrize("data", [crowded(), fake_report(full=True)], ids=["crowded", "full"])
def test_labels_of_the_scatter_do_not_overlap(data: ReportData, width: float) -> None:
    figure = scatter_figure(data, width=width)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {method.title for method in data.methods}
    extents = [text.get_window_extent(renderer) for text in axes.texts]
    assert overlaps([Box(box.x0, box.y0, box.x1, box.y1) for box in extents]) == []
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in extents)


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
