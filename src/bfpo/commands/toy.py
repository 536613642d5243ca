"""STAGE `toy`: the paper's experiment with four actions (section 3.4), for all 16 assignments of safety."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bfpo.commands.toy_figure import draw_probabilities
from bfpo.objective.tabular import e_safe, order_gap, wanted_order
from bfpo.objective.tabular_training import RIVALS, TabularRun, all_assignments, optimum, train_tabular

if TYPE_CHECKING:
    from bfpo.config import ToyConfig
    from bfpo.core.runs import RunFolder

__all__ = ["preview", "render_table", "run", "summarise"]

_log = logging.getLogger(__name__)

# At the paper's settings every closed form changes by at least 0.25 / beta nats from one action to the next, or by 0.
# Half of that tells a drop from the noise of the last step, in which tied actions differ by up to 0.07 nats.
_SMALLEST_DROP = 0.125


def run(config: ToyConfig, folder: RunFolder) -> None:
    """Train the four-action policies and write `toy.json`, `toy.md`, `toy.png` and `toy.svg`."""
    is_safe = all_assignments()
    trained = train_tabular(
        is_safe,
        steps=config.steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        beta=config.beta,
        alpha=config.alpha,
        seeds=(config.seed,),
    )
    settings = {
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "beta": config.beta,
        "alpha": config.alpha,
        "seed": config.seed,
    }
    report = summarise(trained, beta=config.beta, alpha=config.alpha)
    folder.write_json("toy.json", {"settings": settings, **report})
    folder.write_text("toy.md", render_table(report, settings))
    for name, content in draw_probabilities(trained, report).items():
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


def summarise(trained: TabularRun, *, beta: float, alpha: float) -> dict[str, Any]:
    """Return the figures of one seed's run as plain values.

    Per method and assignment: final probabilities, the closed form (None for DPO), their largest difference, the
    smallest drop in nats along the wanted order (`drop`), and `order`: "right" if every drop is at least 0.125 / beta,
    "tie" if some drop is within that of 0 and none is below, "wrong" if some drop is negative beyond it.
    """
    is_safe = trained.is_safe
    threshold = _SMALLEST_DROP / beta
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
        best = optimum(name, is_safe, beta=beta, alpha=alpha)
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
    # DPO's tail is real: what rounds to nothing is shown as smaller, not as nothing.
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
        + ". The experiment is that of section 3.4 of arXiv 2408.15313; the safety bits there are not known to us, so "
        "here are all of them.",
        "",
        "| method | learns from | right order | ties | largest distance from its closed form |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        distance = "no finite optimum" if method["max_deviation"] is None else f"{method['max_deviation']:.4f}"
        lines.append(
            f"| {method['label']} | {method['summary']} | {method['num_right']} of {len(assignments)} | "
            f"{method['num_tied']} | {distance} |"
        )
    lines += [
        "",
        f"An order is right if the policy drops by at least {report['order_threshold_nats']:.3g} nats from each action "
        "to the next one wanted. A smaller difference is a tie, and a tie is not right: which of the two comes out "
        "ahead is then the noise of the last batches.",
        "",
        "## Probabilities of y1 to y4 after training",
        "",
        "| safe | wanted order | " + " | ".join(method["label"] for method in methods) + " |",
        "|---|---|" + "---|" * len(methods),
    ]
    for index, assignment in enumerate(assignments):
        cells = []
        for method in methods:
            outcome = method["assignments"][index]
            mark = {"right": "**right**", "tie": "tie", "wrong": "wrong"}[outcome["order"]]
            cells.append(f"{_probabilities(outcome['final'])} {mark}")
        order = " > ".join(f"y{action}" for action in assignment["wanted_order"])
        lines.append(f"| {assignment['safe']} | {order} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Closed form of BFPO",
        "",
        "| safe | E_safe | optimum of y1 to y4 | trained | difference |",
        "|---|---|---|---|---|",
    ]
    bfpo = next(method for method in methods if method["name"] == "bfpo")
    for assignment, outcome in zip(assignments, bfpo["assignments"], strict=True):
        lines.append(
            f"| {assignment['safe']} | {assignment['e_safe']:.2f} | {_probabilities(outcome['closed_form'])} | "
            f"{_probabilities(outcome['final'])} | {outcome['deviation']:.4f} |"
        )
    return "\n".join(lines) + "\n"
