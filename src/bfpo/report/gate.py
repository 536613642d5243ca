"""The verdict of `bfpo gate` in words: lines for a console, a page, and tables of the page of an evaluation."""

from __future__ import annotations

from typing import Any

from bfpo.core.characters import visible
from bfpo.core.console import level_text
from bfpo.report.data import FactTable
from bfpo.report.page import environment
from bfpo.report.read import Run
from bfpo.report.wording import percent, points
from bfpo.scores.scores import metric_title
from bfpo.suites.records import GateCondition, GateFile, GateGroup
from bfpo.suites.scores import SUITE_METRICS

__all__ = ["GATE", "GATE_PAGE", "gate_lines", "gate_tables", "render_gate"]

GATE, GATE_PAGE = "gate.json", "gate.html"

_TITLES = {
    "harmless": "harmless",
    "over_refusal": "over-refusal",
    "helpfulness": "helpfulness",
    "capability": "capability",
    "coherence": "coherence",
    "worst": "worst harmless rate",
}
_STYLES = {"pass": "good", "fail": "bad", "cannot tell": "note"}
_WORDS = {"pass": "pass", "fail": "fail", "cannot tell": "cannot be told"}
_NAMED = 3  # most suites that a title names


def gate_lines(file: GateFile) -> list[str]:
    """Return one line for each condition with bound, limit and verdict, then the verdict on all of them."""
    none = [f"no condition on: {_not_asked(file)}"] if file.not_asked else []
    return [*map(_line, file.conditions), *none, _sentence(file)]


def _not_asked(file: GateFile) -> str:
    return ", ".join(_TITLES[name] for name in file.not_asked)


def _line(row: GateCondition) -> str:
    head = f"{_title(row)}: "
    if row.bound is not None:
        value = "not measured on any item" if row.value is None else _value(row)
        head += f"{value} ({_bound(row)}); "
    why = f" ({row.reason})" if row.reason else ""
    return f"{head}{_limit(row)}: {_WORDS[row.verdict]}{why}"


def _title(row: GateCondition) -> str:
    names = ", ".join(row.suites) if len(row.suites) <= _NAMED else f"{len(row.suites)} suites"
    suites = f", {names}" if names else ""
    kinds = "; ".join(metric_title(name, SUITE_METRICS) for name in row.metrics)
    declined = kinds and any(name.startswith("refused") for name in row.metrics)
    if _is_rise(row) or (declined and row.condition == "harmless"):
        return (kinds or _TITLES[row.condition]) + suites
    return (f"worst rate ({kinds})" if declined and row.condition == "worst" else _TITLES[row.condition]) + suites


def _is_rise(row: GateCondition) -> bool:
    return row.condition == "over_refusal"


def _value(row: GateCondition) -> str:
    assert row.value is not None
    return percent(row.value, 1) if row.condition == "worst" else f"{points(row.value)} points"


def _bound(row: GateCondition) -> str:
    assert row.bound is not None
    number = percent(row.bound, 1) if row.condition == "worst" else points(row.bound)
    return f"{'at most' if _is_rise(row) else 'at least'} {number}"


def _limit(row: GateCondition) -> str:
    number = percent(row.limit, 1) if row.condition == "worst" else points(row.limit)
    return f"{'allowed: at most' if _is_rise(row) else 'needed: at least'} {number}"


def _sentence(file: GateFile) -> str:
    each = [row.verdict for row in file.conditions]
    against = f"conditions against {file.start.name}"
    if file.verdict == "pass":
        return f"PASS: {file.run.name} meets all {len(each)} {against}"
    if file.verdict == "fail":
        return f"FAIL: {file.run.name} does not meet {each.count('fail')} of {len(each)} {against}"
    num = each.count("cannot tell")
    return (
        f"CANNOT BE TOLD: {num} of {len(each)} {against} can neither be shown to hold for {file.run.name} nor to fail"
    )


def gate_tables(run: Run, shown: str) -> list[FactTable]:
    """Return the conditions of each gate on a model of an evaluation, titled by its verdict."""
    names = [file.relative_to(run.path).as_posix() for at in ("", "models/*/") for file in run.path.glob(at + GATE)]
    found = [file for name in sorted(names) if (file := run.load(GateFile, name)).conditions]
    return [
        FactTable(f"{_sentence(file)} ({shown})", _columns(file), list(map(_cells, file.conditions))) for file in found
    ]


def _columns(file: GateFile) -> list[str]:
    bound = f"bound, {level_text(file.confidence)}"
    return ["condition", "model", "start", "difference", bound, "limit", "items", "verdict"]


def _cells(row: GateCondition) -> list[str]:
    bound = "" if row.bound is None else _bound(row)
    verdict = _WORDS[row.verdict] + (f": {row.reason}" if row.reason else "")
    return [
        _title(row),
        _share(row.run),
        _share(row.start),
        _difference(row),
        bound,
        _limit(row),
        str(row.num),
        verdict,
    ]


def _share(value: float | None) -> str:
    return "" if value is None else percent(value, 1)


def _difference(row: GateCondition) -> str:
    return "" if row.value is None or row.condition == "worst" else points(row.value)


def render_gate(file: GateFile) -> str:
    """Return the page: one HTML document without a script, whose texts are escaped. The same record gives the same."""
    rows = [
        {
            "title": _title(row),
            "about": "; ".join([*row.metrics, ", ".join(row.suites)] if len(row.suites) > _NAMED else row.metrics),
            "run": _share(row.run),
            "start": _share(row.start),
            "value": _difference(row),
            "bound": "" if row.bound is None else _bound(row),
            "limit": _limit(row),
            "num": row.num,
            "missing": row.num_missing,
            "word": _WORDS[row.verdict],
            "style": _STYLES[row.verdict],
            "reason": row.reason,
        }
        for row in file.conditions
    ]
    groups = [_group(one) for row in file.conditions for one in row.groups or ()]
    models = [
        (
            word,
            one.name,
            one.model,
            one.revision or one.url or "",
            one.weights or "not recorded",
            one.run or "not recorded",
        )
        for word, one in (("model", file.run), ("start", file.start))
    ]
    suites = [
        (
            one.title,
            one.prompts_sha256 or "not recorded",
            one.judge,
            one.judge_version or "not recorded",
            one.num_too_long or 0,
        )
        for one in file.suites
    ]
    view: dict[str, Any] = {
        "sentence": _sentence(file),
        "word": _WORDS[file.verdict],
        "style": _STYLES[file.verdict],
        "rows": rows,
        "groups": groups,
        "models": models,
        "suites": suites,
        "file": file,
        "confidence": level_text(file.confidence),
        "fail_confidence": percent(file.fail_confidence, 2),
        "not_asked": _not_asked(file),
    }
    # Tags and line breaks are the template's own: no text of a file has one that is not escaped or replaced.
    return environment(autoescape=True).get_template("gate.html").render(_clean(view)) + "\n"


def _group(row: GateGroup) -> tuple[str, ...]:
    rate = "not measured" if row.value is None else percent(row.value, 1)
    bound = "" if row.bound is None else f"at least {percent(row.bound, 1)}"
    needed = "" if row.prompts_needed is None else f"about {row.prompts_needed:,}"
    name = f"{row.suite}, {row.group}" if row.group else f"{row.suite}, all"
    return (name, rate, bound, str(row.num), str(row.num_missing), needed, _WORDS[row.verdict])


def _clean(value: Any) -> Any:
    """Return the view with every invisible character of its texts as a symbol."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value
