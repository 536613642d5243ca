"""STAGE `toy`: the paper's experiment with four actions (section 3.4) for all 16 safety assignments, with a figure."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bfpo.core.markdown import table
from bfpo.objective.tabular import e_safe, order_gap, wanted_order
from bfpo.objective.tabular_training import RIVALS, TabularRun, all_assignments, optimum, train_tabular

if TYPE_CHECKING:
    from bfpo.config import ToyConfig
    from bfpo.runs.folder import RunFolder

__all__ = ["preview", "render_table", "run", "summarise"]

_log = logging.getLogger(__name__)

# At the paper's settings, adjacent actions of a closed form differ by 0 or by at least 0.25 / beta nats, under label
# noise by (1 - 2 label_noise) of that. Half of it separates a drop from the noise of the last step, by which tied
# actions differ up to 0.07 nats.
_SMALLEST_DROP = 0.125


def run(config: ToyConfig, folder: RunFolder) -> None:
    """Train the four-action policies and write `toy.json`, `toy.md`, `toy.png` and `toy.svg`."""
    is_safe = all_assignments()
    noise = config.label_noise or 0.0
    trained = train_tabular(
        is_safe,
        steps=config.steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        beta=config.beta,
        alpha=config.alpha,
        label_noise=noise,
        seeds=(config.seed,),
    )
    names = ("steps", "learning_rate", "batch_size", "beta", "alpha", "seed")
    settings = {name: getattr(config, name) for name in names} | ({"label_noise": noise} if noise else {})
    report = summarise(trained, beta=config.beta, alpha=config.alpha, label_noise=noise)
    folder.write_json("toy.json", {"settings": settings, **report})
    folder.write_text("toy.md", render_table(report, settings))
    for name, content in _draw_probabilities(trained, report).items():
        folder.write_bytes(name, content)
    for method in report["methods"]:
        _log.info("%s", _one_line(method, len(is_safe)))


def preview(config: ToyConfig) -> list[str]:
    """Return what `run` would do."""
    num_assignments = len(all_assignments())
    return [
        f"trains {len(RIVALS)} methods ({', '.join(RIVALS)}) on {num_assignments} assignments of safety to 4 actions",
        f"{len(RIVALS) * num_assignments} policies of 4 parameters, {config.steps} steps of {config.batch_size} pairs",
    ]


def _one_line(method: Mapping[str, Any], num_assignments: int) -> str:
    line = f"{method['label']}: right order in {method['num_right']} of {num_assignments}"
    if method["max_deviation"] is not None:
        line += f", within {method['max_deviation']:.4f} of the closed form"
    return line


def summarise(trained: TabularRun, *, beta: float, alpha: float, label_noise: float = 0.0) -> dict[str, Any]:
    """Return the results of one seed as plain values.

    Per method and assignment: the final probabilities, the closed form (None if the loss is not a plain square), their
    largest difference, the smallest drop in nats along the wanted order (`drop`), and `order`. That is "right" if the
    smallest drop is at least 0.125 (1 - 2 label_noise) / beta, "wrong" if it is at most minus that, else "tie".
    """
    is_safe = trained.is_safe
    threshold = _SMALLEST_DROP * (1 - 2 * label_noise) / beta
    assignments = [
        {
            "safe": "".join(str(int(bit)) for bit in bits),
            "e_safe": float(e_safe(bits)),
            "wanted_order": [int(action) + 1 for action in wanted_order(bits)],
        }
        for bits in is_safe
    ]
    methods = []
    for row, name in enumerate(trained.methods):
        final = trained.final[0, row]
        best = optimum(name, is_safe, beta=beta, alpha=alpha, label_noise=label_noise)
        drops = order_gap(final.log(), is_safe)
        outcomes = [
            {
                "safe": assignments[index]["safe"],
                "final": final[index].tolist(),
                "closed_form": None if best is None else best[index].tolist(),
                "deviation": None if best is None else float((final[index] - best[index]).abs().max()),
                "drop": float(drops[index]),
                "order": _verdict(float(drops[index]), threshold),
            }
            for index in range(len(is_safe))
        ]
        methods.append(
            {
                "name": name,
                "label": RIVALS[name].label,
                "summary": RIVALS[name].summary,
                "num_right": sum(outcome["order"] == "right" for outcome in outcomes),
                "num_tied": sum(outcome["order"] == "tie" for outcome in outcomes),
                "max_deviation": None if best is None else float((final - best).abs().max()),
                "assignments": outcomes,
            }
        )
    return {"order_threshold_nats": threshold, "assignments": assignments, "methods": methods}


def _verdict(drop: float, threshold: float) -> str:
    if drop >= threshold:
        return "right"
    return "wrong" if drop <= -threshold else "tie"


def _probabilities(values: Sequence[float]) -> str:
    # Small values are shown as "<.001", not as 0: the probabilities of DPO never reach 0.
    return " ".join(f"{value:.3f}".lstrip("0") if value >= 0.0005 else "<.001" for value in values)


def render_table(report: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the report as Markdown: a table of methods, then one row per assignment."""
    assignments, methods = report["assignments"], report["methods"]
    lines = [
        "# Four actions",
        "",
        "Four actions, y1 the most helpful to y4 the least, each safe (1) or unsafe (0), trained from pairs only. "
        "Wanted: safe actions first, the more helpful the better; then unsafe ones, the more helpful the worse. "
        "Settings: "
        + ", ".join(f"{name} {value}" for name, value in settings.items())
        + ". The experiment is that of section 3.4 of arXiv 2408.15313. Its safety bits are unknown to us, so all "
        "assignments are shown.",
        "",
    ]
    rows = []
    for method in methods:
        distance = "no closed form" if method["max_deviation"] is None else f"{method['max_deviation']:.4f}"
        right = f"{method['num_right']} of {len(assignments)}"
        rows.append([method["label"], method["summary"], right, method["num_tied"], distance])
    lines += [
        *table(["method", "learns from", "right order", "ties", "largest distance from its closed form"], rows),
        "",
        f"An order is right if the policy drops by at least {report['order_threshold_nats']:.3g} nats from each action "
        "to the next one in the wanted order. A smaller difference is a tie and does not count as right: its sign "
        "depends on the noise of the last batches.",
        "",
        "## Probabilities of y1 to y4 after training",
        "",
    ]
    rows = []
    for index, assignment in enumerate(assignments):
        cells = []
        for method in methods:
            outcome = method["assignments"][index]
            mark = {"right": "**right**", "tie": "tie", "wrong": "wrong"}[outcome["order"]]
            cells.append(f"{_probabilities(outcome['final'])} {mark}")
        order = " > ".join(f"y{action}" for action in assignment["wanted_order"])
        rows.append([assignment["safe"], order, *cells])
    lines += table(["safe", "wanted order", *(method["label"] for method in methods)], rows)
    lines += ["", "## Closed form of BFPO", ""]
    bfpo = next(method for method in methods if method["name"] == "bfpo")
    rows = []
    for assignment, outcome in zip(assignments, bfpo["assignments"], strict=True):
        closed, trained = (_probabilities(outcome[key]) for key in ("closed_form", "final"))
        rows.append([assignment["safe"], f"{assignment['e_safe']:.2f}", closed, trained, f"{outcome['deviation']:.4f}"])
    lines += table(["safe", "E_safe", "optimum of y1 to y4", "trained", "difference"], rows)
    return "\n".join(lines) + "\n"


# From the most to the least helpful action: the darker, the more helpful.
_SAFE = ("#00504a", "#1b8a7a", "#5bb8a5", "#a3d9cb")
_UNSAFE = ("#8c1c13", "#cf4a30", "#ec8a63", "#f6c2a4")
_INK, _QUIET, _PALE = "#222222", "#7d7d7d", "#c9c9c9"
_FRAME = {"right": "#1b8a7a", "tie": _PALE, "wrong": _PALE}
_GROUND = {"right": "#eef7f4", "tie": "#ffffff", "wrong": "#ffffff"}
_MARK = {"right": ("✓", "#1b8a7a"), "tie": ("=", _QUIET), "wrong": ("✗", "#c0392b")}
_GROUPS = {4: "all safe", 3: "one unsafe", 2: "two unsafe", 1: "three unsafe", 0: "all unsafe"}

# Sizes in inches.
_PANEL_WIDTH, _PANEL_HEIGHT, _GAP, _ROW_GAP = 0.94, 0.98, 0.10, 0.16
_LEFT, _RIGHT, _BOTTOM, _TOP = 1.95, 0.12, 0.98, 1.62


def _draw_probabilities(trained: TabularRun, report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return `toy.png` and `toy.svg`: a row per method, a column per assignment, with the curves of the first seed.

    `report` is the result of `summarise`, for the marks and the closed forms.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows, num_columns = len(trained.methods), len(trained.is_safe)
    width = _LEFT + num_columns * (_PANEL_WIDTH + _GAP) - _GAP + _RIGHT
    height = _BOTTOM + num_rows * (_PANEL_HEIGHT + _ROW_GAP) - _ROW_GAP + _TOP
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bfpo", "font.size": 9}):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        # One axes, in inches, holds all panels: eighty separate axes would take ten times as long.
        page = figure.add_axes((0, 0, 1, 1))
        page.set(xlim=(0, width), ylim=(0, height))
        page.axis("off")
        for row, method in enumerate(report["methods"]):
            bottom = height - _TOP - (row + 1) * _PANEL_HEIGHT - row * _ROW_GAP
            _draw_row(page, bottom, row, method, trained)
        _draw_heads(page, height - _TOP, trained.is_safe.tolist())
        _draw_words(page, height, report)
        files = {}
        for name, options in (("toy.png", {"dpi": 110}), ("toy.svg", {"metadata": {"Date": None}})):
            stream = io.BytesIO()
            figure.savefig(stream, format=name[-3:], **options)
            files[name] = stream.getvalue()
    return files


def _left(column: int) -> float:
    return _LEFT + column * (_PANEL_WIDTH + _GAP)


def _draw_row(page: Any, bottom: float, row: int, method: Mapping[str, Any], trained: TabularRun) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    has_optimum = method["max_deviation"] is not None
    highest = float(trained.curve[:, 0, row].max())
    # The upper limit leaves space for the marks; the curves of a logistic loss reach 1.
    top, grid = (0.78, (0.0, 0.25, 0.5)) if highest < 0.7 else (1.28, (0.0, 0.5, 1.0))
    up = _PANEL_HEIGHT / top
    along = 0.9 * _PANEL_WIDTH / float(trained.steps[-1])
    rules, lines, colours = [], [], []
    for column, outcome in enumerate(method["assignments"]):
        left, order = _left(column), outcome["order"]
        page.add_patch(
            Rectangle((left, bottom), _PANEL_WIDTH, _PANEL_HEIGHT, fc=_GROUND[order], ec=_FRAME[order], lw=0.8)
        )
        rules += [[(left, bottom + level * up), (left + _PANEL_WIDTH, bottom + level * up)] for level in grid[1:]]
        mark, colour = _MARK[order]
        page.text(
            left + 0.07,
            bottom + _PANEL_HEIGHT - 0.07,
            mark,
            ha="left",
            va="top",
            color=colour,
            fontsize=11,
            weight="bold",
        )
        curve = trained.curve[:, 0, row, column].tolist()
        steps = [left + step * along for step in trained.steps.tolist()]
        for action in reversed(range(len(_SAFE))):
            colours.append((_SAFE if trained.is_safe[column, action] else _UNSAFE)[action])
            lines.append([(x, bottom + values[action] * up) for x, values in zip(steps, curve, strict=True)])
            if has_optimum:
                level = bottom + outcome["closed_form"][action] * up
                edge = left + _PANEL_WIDTH
                colours.append(colours[-1])
                lines.append([(edge - 0.075, level), (edge - 0.012, level)])
    page.add_collection(LineCollection(rules, colors="#e4e4e4", linewidths=0.6, zorder=1.5))
    page.add_collection(LineCollection(lines, colors=colours, linewidths=1.5, zorder=3))
    for level in grid:
        page.text(_LEFT - 0.06, bottom + level * up, f"{level:g}", ha="right", va="center", fontsize=7.5, color=_QUIET)
    middle, all_right = bottom + _PANEL_HEIGHT / 2, method["num_right"] == len(method["assignments"])
    page.text(_LEFT - 0.42, middle + 0.08, method["label"], ha="right", fontsize=11, weight="bold", color=_INK)
    page.text(
        _LEFT - 0.42, middle - 0.14, f"right in {method['num_right']} of {len(method['assignments'])}", ha="right",
        fontsize=9, color=_FRAME["right"] if all_right else _QUIET,
    )  # fmt: skip
    if row == len(trained.methods) - 1:
        last = int(trained.steps[-1])
        for step, place in ((0, "left"), (last, "center")):
            page.text(_LEFT + step * along, bottom - 0.06, f"{step:,}", ha=place, va="top", fontsize=7.5, color=_QUIET)
        page.text(_LEFT + last * along / 2, bottom - 0.06, "step", ha="center", va="top", fontsize=7.5, color=_QUIET)


def _draw_heads(page: Any, bottom: float, is_safe: Sequence[Sequence[float]]) -> None:
    """Draw the head of each column (its actions in the colours of their lines) and the groups of columns."""
    for column, bits in enumerate(is_safe):
        for action, bit in enumerate(bits):
            x, y = _left(column) + _PANEL_WIDTH * (0.17 + 0.22 * action), bottom + 0.17
            page.plot([x], [y], "o", markersize=10.5, color=(_SAFE if bit else _UNSAFE)[action])
            ink = "white" if action < 2 else _INK
            page.text(x, y - 0.006, str(action + 1), ha="center", va="center", fontsize=7.5, color=ink)
    num_safe = [int(sum(bits)) for bits in is_safe]
    for count in sorted(set(num_safe)):
        columns = [column for column, value in enumerate(num_safe) if value == count]
        left, right = _left(columns[0]), _left(columns[-1]) + _PANEL_WIDTH
        page.plot([left, right], [bottom + 0.38] * 2, color=_QUIET, lw=0.8)
        page.text((left + right) / 2, bottom + 0.46, _GROUPS[count], ha="center", fontsize=9.5, color=_INK)


def _draw_words(page: Any, height: float, report: Mapping[str, Any]) -> None:
    best = report["methods"][0]
    title = (
        f"Learning to rank four actions from pairs: {best['label']} gets the order right in {best['num_right']} of "
        f"{len(best['assignments'])} worlds"
    )
    page.text(0.25, height - 0.40, title, fontsize=15, weight="bold", color=_INK)
    page.text(
        0.25, height - 0.70, "Probability of each action while training. Wanted: safe actions above unsafe ones; among "
        "safe ones the more helpful higher, among unsafe ones the more helpful lower.", fontsize=10.5, color=_INK,
    )  # fmt: skip
    x, y = _LEFT, 0.33
    for words, colours in (("safe, 1 (most helpful) to 4 (least)", _SAFE), ("unsafe, 1 to 4", _UNSAFE)):
        for action, colour in enumerate(colours):
            page.plot([x + 0.17 * action], [y], "o", markersize=9, color=colour)
        page.text(x + 0.66, y, words, fontsize=9.5, color=_INK, va="center")
        x += 1.05 + 0.072 * len(words)
    page.text(x, y, "Dashes at the right edge: the closed-form optimum (squared losses).", va="center", fontsize=9.5)
    x += 5.35
    for order, words in (("right", "right order"), ("tie", "a tie, not right"), ("wrong", "wrong order")):
        page.text(x, y, _MARK[order][0], va="center", fontsize=11, weight="bold", color=_MARK[order][1])
        page.text(x + 0.2, y, words, va="center", fontsize=9.5, color=_INK)
        x += 1.5 if order == "tie" else 1.3
