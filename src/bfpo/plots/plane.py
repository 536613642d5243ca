"""Models in the plane of two scores: intervals, Pareto front, labels without overlap, and an inset of dense points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bfpo.plots.style import INK, MUTED, PAPER, figure_style, short_name

__all__ = ["MOST_LABELS", "Box", "Mark", "draw_plane", "place_labels"]

MOST_LABELS = 24
"""With more points than this, only the important ones are labelled."""

_CLOSE, _LEAST_CROWD = 19.0, 3  # markers closer than this touch, in pixels at 100 dpi; least markers in a crowd
_SIDE_BY_SIDE = 6.0  # from this width on, in inches, the enlarged panel is to the right, else below

# Candidate positions of a label around its point (pixels, radians) and passes over all labels.
_DISTANCES = (11.0, 14.0, 22.0, 32.0, 44.0, 58.0, 74.0, 92.0, 112.0, 134.0, 158.0)
_ANGLES = tuple(math.radians(angle) for angle in (0, 180, 45, 135, 315, 225, 90, 270, 22.5, 157.5, 337.5, 202.5))
_SWEEPS = 4


@dataclass(frozen=True, slots=True)
class Mark:
    """One model; `x` and `y` are (value, low, high), `None` without interval; `seeds` are the single trainings."""

    title: str
    x: tuple[float, float | None, float | None]
    y: tuple[float, float | None, float | None]
    colour: str
    marker: str = "o"
    size: float = 62.0
    hollow: bool = False
    bold: bool = False
    ring: str | None = None
    seeds: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the area of the intersection, in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0

    def inside(self, other: Box) -> bool:
        """Return whether this box lies within another."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top

    def padded(self, by: float) -> Box:
        """Return the box enlarged by `by` pixels on each side."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)


def draw_plane(
    marks: Sequence[Mark],
    front: Sequence[tuple[float, float]],
    titles: tuple[str, str],
    *,
    width: float,
    height: float,
    name: str,
) -> Figure:
    """Return the figure, sizes in inches; `front` is the Pareto front sorted by x, `titles` are those of the axes.

    If several markers touch, a second panel shows that part of the plane enlarged and with its labels: to the right
    in a wide figure, below in a narrow one.
    """
    with figure_style(name):
        figure = Figure(figsize=(width, height), dpi=100)
        axes = figure.add_axes((0.62 / width, 0.55 / height, 1 - 0.8 / width, 1 - 0.75 / height))
        _limit_axes(axes, marks)
        crowd = _crowd(axes, marks)
        enlarged = None
        if crowd:
            wide = width >= _SIDE_BY_SIDE
            _make_room(figure, axes, width, height, wide)
            crowd = _crowd(axes, marks) or crowd  # more markers may touch in the smaller panel
            enlarged = _second_axes(figure, width, height, wide)
        _draw(axes, marks, front)
        axes.set_xlabel(f"{titles[0]}  →")
        axes.set_ylabel(f"{titles[1]}  →")
        apart = [mark for mark in marks if mark not in crowd]
        frame = _frame(axes, crowd) if enlarged is not None else None
        _label(figure, axes, apart, marks, front, frame, f"{len(crowd)} models, enlarged")
        if enlarged is not None:
            _enlarge(figure, enlarged, marks, crowd, front, titles)
    return figure


def _make_room(figure: Figure, axes: Any, width: float, height: float, wide: bool) -> None:
    """Widen or lengthen the figure for a second panel; the first keeps its position."""
    if wide:
        whole = 1.42 * width
        figure.set_size_inches(whole, height)
        axes.set_position((0.62 / whole, 0.55 / height, 0.5 - 0.72 / whole, 1 - 0.75 / height))
    else:
        whole = 1.86 * height
        figure.set_size_inches(width, whole)
        axes.set_position((0.62 / width, 0.5 + 0.47 / whole, 1 - 0.8 / width, 0.5 - 0.6 / whole))


def _second_axes(figure: Figure, width: float, height: float, wide: bool) -> Any:
    across, up = figure.get_size_inches()
    if wide:
        return figure.add_axes((0.5 + 0.62 / across, 0.55 / up, 0.5 - 0.78 / across, 1 - 0.95 / up))
    return figure.add_axes((0.62 / across, 0.55 / up, 1 - 0.8 / across, 0.5 - 0.85 / up))


def _draw(axes: Any, marks: Sequence[Mark], front: Sequence[tuple[float, float]]) -> None:
    for mark in marks:
        for score, other, line in ((mark.x, mark.y, axes.hlines), (mark.y, mark.x, axes.vlines)):
            if score[1] is not None and score[2] is not None:
                line(other[0], score[1], score[2], color=mark.colour, linewidth=1.3, alpha=0.55, zorder=2)
    if front:
        axes.step(*zip(*_steps(axes, front), strict=True), where="pre", color=INK, linewidth=1.2, alpha=0.6, zorder=2.5)
    for mark in marks:
        if len(mark.seeds) > 1:
            axes.scatter(*zip(*mark.seeds, strict=True), s=9, color=mark.colour, alpha=0.6, linewidths=0, zorder=3)
        if mark.ring is not None:
            axes.scatter(
                [mark.x[0]], [mark.y[0]], s=190, facecolor="none", edgecolor=mark.ring, linewidths=1.6, zorder=3
            )
        axes.scatter(
            [mark.x[0]],
            [mark.y[0]],
            s=mark.size,
            marker=mark.marker,
            facecolor=PAPER if mark.hollow else mark.colour,
            edgecolor=mark.colour if mark.hollow else PAPER,
            linewidths=1.7 if mark.hollow else 0.8,
            zorder=5 if mark.bold else 4,
        )


def _steps(axes: Any, front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the staircase that bounds the region dominated by the front, extended to the axes."""
    (low, _), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    return [(min(low, front[0][0]), front[0][1]), *front, (front[-1][0], min(bottom, front[-1][1]))]


def _limit_axes(axes: Any, marks: Sequence[Mark]) -> None:
    for side, set_limits in ((0, axes.set_xlim), (1, axes.set_ylim)):
        scores = [(mark.x, mark.y)[side] for mark in marks]
        seeds = [seed[side] for mark in marks for seed in mark.seeds]
        values = [value for score in scores for value in score if value is not None] + seeds
        low, high = min(values), max(values)
        room = max(0.06, 0.1 * (high - low))
        # Scores are in [0, 1]; the margin of 0.03 keeps markers from being cut.
        set_limits(max(low - room, -0.03), min(high + room, 1.03))
        middle, least = (low + high) / 2, 0.3
        if high - low + 2 * room < least:
            set_limits(*_within_unit(middle - least / 2, middle + least / 2))


def _within_unit(low: float, high: float) -> tuple[float, float]:
    shift = max(0.0, -0.03 - low) - max(0.0, high - 1.03)
    return low + shift, high + shift


def _places(axes: Any, marks: Sequence[Mark]) -> list[tuple[float, float]]:
    return [tuple(axes.transData.transform((mark.x[0], mark.y[0]))) for mark in marks]


def _crowd(axes: Any, marks: Sequence[Mark]) -> list[Mark]:
    """Return the largest group of marks connected by touching markers; empty below `_LEAST_CROWD`."""
    places = _places(axes, marks)
    group = list(range(len(marks)))
    for one in range(len(marks)):
        for other in range(one):
            (x, y), (a, b) = places[one], places[other]
            if math.hypot(x - a, y - b) < _CLOSE and group[one] != group[other]:
                joined, left = group[one], group[other]
                group = [joined if own == left else own for own in group]
    largest = max(dict.fromkeys(group), key=group.count)
    found = [mark for mark, own in zip(marks, group, strict=True) if own == largest]
    return found if len(found) >= _LEAST_CROWD else []


def _frame(axes: Any, crowd: Sequence[Mark]) -> Box:
    """Draw a frame around crowded points; return it in pixels."""
    places = _places(axes, crowd)
    across, up = [x for x, _ in places], [y for _, y in places]
    box = Box(min(across), min(up), max(across), max(up)).padded(11.0)
    (left, bottom), (right, top) = axes.transData.inverted().transform([(box.left, box.bottom), (box.right, box.top)])
    axes.add_patch(
        Rectangle(
            (left, bottom), right - left, top - bottom, fill=False, edgecolor=MUTED, linewidth=0.9, zorder=6,
            clip_on=False,
        )
    )  # fmt: skip
    return box


def _enlarge(
    figure: Figure, axes: Any, marks: Sequence[Mark], crowd: Sequence[Mark], front: Sequence[tuple[float, float]],
    titles: tuple[str, str],
) -> None:  # fmt: skip
    for side, set_limits in ((0, axes.set_xlim), (1, axes.set_ylim)):
        values = [(mark.x, mark.y)[side][0] for mark in crowd]
        low, high = min(values), max(values)
        room = max(0.22 * (high - low), 0.006)
        set_limits(low - room, high + room)
    inside = [mark for mark in marks if mark in crowd or _inside(axes, mark)]
    _draw(axes, inside, front)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(MUTED)
    axes.set_title("enlarged", fontsize=9.5, color=MUTED, loc="left")
    axes.set_xlabel(f"{titles[0]}  →")
    axes.locator_params(nbins=5)
    _label(figure, axes, inside, inside, front)


def _inside(axes: Any, mark: Mark) -> bool:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return bool(left <= mark.x[0] <= right and bottom <= mark.y[0] <= top)


def _label(
    figure: Figure,
    axes: Any,
    labelled: Sequence[Mark],
    drawn: Sequence[Mark],
    front: Sequence[tuple[float, float]],
    frame: Box | None = None,
    note: str = "",
) -> None:
    """Write the title of each mark near its point, and the note at the frame; distant labels get a line."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    labelled = [mark for mark in labelled if mark.title]
    styles: list[dict[str, Any]] = [
        {"fontsize": 10.5 if m.bold else 9.5, "weight": "bold" if m.bold else "normal", "color": INK} for m in labelled
    ]
    texts = [short_name(mark.title) for mark in labelled]
    points = _places(axes, labelled)
    bars = [*_bars(axes, drawn), *_front_bars(axes, front)]
    if frame is not None:
        texts.append(note)
        styles.append({"fontsize": 9.0, "style": "italic", "color": MUTED})
        points.append(((frame.left + frame.right) / 2, frame.bottom))
        bars += [frame.padded(2.0)] * 40  # a high cost keeps labels out of the frame
    sizes = []
    for text, style in zip(texts, styles, strict=True):
        drawn_text = axes.text(0, 0, text, **style)
        extent = drawn_text.get_window_extent(renderer)
        drawn_text.remove()
        sizes.append((extent.width, extent.height))
    around = axes.get_window_extent(renderer)
    edge = figure.bbox.x1 - 4 if around.x1 > 0.8 * figure.bbox.x1 else around.x1 + 12
    bounds = Box(around.x0 + 3, around.y0 + 3, edge, min(around.y1 + 14, figure.bbox.y1 - 2))
    others = [place for place in _places(axes, drawn) if place not in points]
    boxes = place_labels(points, sizes, bounds, point_radius=6.5, bars=bars, dots=others)
    to_data = axes.transData.inverted()
    for text, style, point, box in zip(texts, styles, points, boxes, strict=True):
        nearest = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
        if math.hypot(nearest[0] - point[0], nearest[1] - point[1]) > 16:
            line = np.array([to_data.transform(point), to_data.transform(nearest)])
            axes.plot(*line.T, color=MUTED, linewidth=0.7, zorder=3.5, clip_on=False)
        x, y = to_data.transform(((box.left + box.right) / 2, (box.bottom + box.top) / 2))
        axes.text(x, y, text, ha="center", va="center", zorder=6, **style)


def _front_bars(axes: Any, front: Sequence[tuple[float, float]]) -> Iterator[Box]:
    steps = [tuple(axes.transData.transform(step)) for step in _steps(axes, front)] if front else []
    for (x, y), (right, below) in pairwise(steps):
        yield Box(x, min(y, below), x, max(y, below)).padded(2.0)
        yield Box(min(x, right), below, max(x, right), below).padded(2.0)


def _bars(axes: Any, marks: Sequence[Mark]) -> Iterator[Box]:
    """Yield the error bars in pixels, clipped to the axes."""
    (least, most), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for mark in marks:
        (x, low, high), (y, lower, upper) = mark.x, mark.y
        ends = [(low, y, high, y)] if low is not None and high is not None else []
        ends += [(x, lower, x, upper)] if lower is not None and upper is not None else []
        for a, b, c, d in ends:
            corners = [(min(max(one, least), most), min(max(other, bottom), top)) for one, other in ((a, b), (c, d))]
            (left, down), (right, up) = (axes.transData.transform(corner) for corner in corners)
            yield Box(left, down, right, up).padded(1.5)


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    *,
    point_radius: float = 7.0,
    bars: Sequence[Box] = (),
    dots: Sequence[tuple[float, float]] = (),
) -> list[Box]:
    """Return a box per label, near its point; all lengths in pixels.

    `sizes` are widths and heights, `dots` points without a label. Labels stay within `bounds`. The cost of a position
    is mainly its overlap with other labels and with points, then that with `bars`, then its distance. Each label is
    placed in turn, in several passes. Deterministic.
    """
    covered = [Box(x, y, x, y).padded(point_radius) for x, y in (*points, *dots)]
    options = [
        sorted(_options(point, size, bounds, covered, bars), key=lambda option: option[0])
        for point, size in zip(points, sizes, strict=True)
    ]
    placed: list[Box | None] = [None] * len(points)
    # Labels of the most crowded points are placed first.
    order = sorted(range(len(points)), key=lambda index: -_crowding(points, index))
    for _ in range(_SWEEPS):
        for index in order:
            others = [box for place, box in enumerate(placed) if box is not None and place != index]
            placed[index] = _cheapest(options[index], others)
    return [box for box in placed if box is not None]


def _cheapest(options: Sequence[tuple[float, Box]], others: Sequence[Box]) -> Box:
    """Return the best option, given the other labels; `options` are sorted by their cost without these."""
    best_cost, best = math.inf, options[0][1]
    for own, box in options:
        if own >= best_cost:
            break
        wide = Box(box.left - 6.0, box.bottom - 1.5, box.right + 6.0, box.top + 1.5)  # more space between words
        cost = own + 1000.0 * sum(wide.overlap(other) for other in others)
        if cost < best_cost:
            best_cost, best = cost, box
    return best


def _options(
    point: tuple[float, float], size: tuple[float, float], bounds: Box, dots: Sequence[Box], bars: Sequence[Box]
) -> list[tuple[float, Box]]:
    """Return (cost, box) of every position within bounds, or of all positions if none is."""
    places = []
    for distance in _DISTANCES:
        for rank, angle in enumerate(_ANGLES):
            # The distance is to the label's nearest edge or corner, not to its centre.
            x = point[0] + math.cos(angle) * distance + _sign(math.cos(angle)) * size[0] / 2
            y = point[1] + math.sin(angle) * distance + _sign(math.sin(angle)) * size[1] / 2
            box = Box(x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)
            places.append((distance + 0.2 * rank, box))
    inside = [place for place in places if place[1].inside(bounds)] or places
    return [(cost + _on_figure(box.padded(1.0), dots, bars), box) for cost, box in inside]


def _on_figure(box: Box, dots: Sequence[Box], bars: Sequence[Box]) -> float:
    """Return the cost of covering points (high) and error bars (low)."""
    return 1000.0 * sum(map(box.overlap, dots)) + 2.0 * sum(map(box.overlap, bars))


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 1e-9 else math.copysign(1.0, value)


def _crowding(points: Sequence[tuple[float, float]], index: int) -> float:
    x, y = points[index]
    return sum(1.0 / (10.0 + math.hypot(x - other[0], y - other[1])) for other in points)
