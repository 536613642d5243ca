"""Where to put the labels of points so that none covers another label, a point or an error bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "place_labels"]

_DISTANCES = (11.0, 14.0, 22.0, 32.0, 44.0, 58.0, 74.0, 92.0, 112.0, 134.0, 158.0)
_ANGLES = tuple(math.radians(angle) for angle in (0, 180, 45, 135, 315, 225, 90, 270, 22.5, 157.5, 337.5, 202.5))
_SWEEPS = 4


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the area that two boxes share, in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0

    def inside(self, other: Box) -> bool:
        """Return whether this box lies within another."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top

    def padded(self, by: float) -> Box:
        """Return the box grown by some pixels on each side."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)


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

    `sizes` are widths and heights, `dots` points without a label. Labels stay within `bounds` and are kept apart from
    one another and from every point before anything else, then from `bars`; among the rest the nearest place wins. Each
    label is placed in turn, then a few more times with the others known. Deterministic.
    """
    covered = [Box(x, y, x, y).padded(point_radius) for x, y in (*points, *dots)]
    options = [
        sorted(_options(point, size, bounds, covered, bars), key=lambda option: option[0])
        for point, size in zip(points, sizes, strict=True)
    ]
    placed: list[Box | None] = [None] * len(points)
    # Labels with the most crowded points choose first.
    order = sorted(range(len(points)), key=lambda index: -_crowd(points, index))
    for _ in range(_SWEEPS):
        for index in order:
            others = [box for place, box in enumerate(placed) if box is not None and place != index]
            placed[index] = _cheapest(options[index], others)
    return [box for box in placed if box is not None]


def _cheapest(options: Sequence[tuple[float, Box]], others: Sequence[Box]) -> Box:
    """Return the best of the options, which are sorted by their cost without the other labels."""
    best_cost, best = math.inf, options[0][1]
    for own, box in options:
        if own >= best_cost:
            break
        wide = Box(box.left - 6.0, box.bottom - 1.5, box.right + 6.0, box.top + 1.5)  # words need more room beside them
        cost = own + 1000.0 * sum(wide.overlap(other) for other in others)
        if cost < best_cost:
            best_cost, best = cost, box
    return best


def _options(
    point: tuple[float, float], size: tuple[float, float], bounds: Box, dots: Sequence[Box], bars: Sequence[Box]
) -> list[tuple[float, Box]]:
    """Return (cost, box) of every place within bounds, or of all places if none is."""
    places = []
    for distance in _DISTANCES:
        for rank, angle in enumerate(_ANGLES):
            # The label's nearest edge or corner, not its centre, is at the distance.
            x = point[0] + math.cos(angle) * distance + _sign(math.cos(angle)) * size[0] / 2
            y = point[1] + math.sin(angle) * distance + _sign(math.sin(angle)) * size[1] / 2
            box = Box(x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)
            places.append((distance + 0.2 * rank, box))
    inside = [place for place in places if place[1].inside(bounds)] or places
    return [(cost + _on_figure(box.padded(1.0), dots, bars), box) for cost, box in inside]


def _on_figure(box: Box, dots: Sequence[Box], bars: Sequence[Box]) -> float:
    """Return the cost of covering points, which must not be, and error bars, which is a pity."""
    return 1000.0 * sum(map(box.overlap, dots)) + 2.0 * sum(map(box.overlap, bars))


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 1e-9 else math.copysign(1.0, value)


def _crowd(points: Sequence[tuple[float, float]], index: int) -> float:
    x, y = points[index]
    return sum(1.0 / (10.0 + math.hypot(x - other[0], y - other[1])) for other in points)
