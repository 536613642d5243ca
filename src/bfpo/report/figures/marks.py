"""The colour and the marker of a model on the page."""

from __future__ import annotations

from bfpo.plots.style import CEILING_COLOUR, MARKERS, METHOD_COLOURS, START_COLOUR, TOKENS
from bfpo.report.data import MethodResult, ReportData

__all__ = ["colour_of", "marker_of", "token_of"]


def colour_of(data: ReportData, method: MethodResult) -> str:
    """Return the method's colour: the main one's is always the same, start and ceiling are grey."""
    if method.role in ("start", "ceiling"):
        return START_COLOUR if method.role == "start" else CEILING_COLOUR
    return METHOD_COLOURS[_place(data, method) % len(METHOD_COLOURS)]


def marker_of(data: ReportData, method: MethodResult) -> str:
    """Return the method's marker, so that colour is never the only difference."""
    if method.role in ("start", "ceiling"):
        return "X" if method.role == "start" else "*"
    place = _place(data, method)
    return MARKERS[(place + place // len(METHOD_COLOURS)) % len(MARKERS)]  # each pair of colour and marker is unique


def _place(data: ReportData, method: MethodResult) -> int:
    return 0 if method.role == "main" else 1 + list(data.baselines).index(method)


def token_of(data: ReportData, method: MethodResult) -> str:
    """Return the name of the page's variable that holds the method's colour."""
    return TOKENS[colour_of(data, method)]
