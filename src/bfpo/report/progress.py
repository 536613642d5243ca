"""A training run on the page: its step, the time left, and the loss by label cell, from its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bfpo.core.progress import TrainingProgress
from bfpo.core.schema import Score
from bfpo.data.labels import CELLS
from bfpo.report.data import FactTable, StageResult
from bfpo.report.read import Run
from bfpo.report.wording import cell_title, count_text, duration, number, percent, with_interval
from bfpo.stats import wilson
from bfpo.training.forecast import FORECAST, ForecastFile, forecast_table
from bfpo.training.records import PROBE_FILE, ProbeAnswer, ProbeFile

__all__ = ["forecast_facts", "forecast_said", "training_result"]

_OF_START = "loss_of_start"  # of the same pairs
_ROWS = 10  # rows of the log whose means the table by cell shows
_POINTS = 400  # largest number of points of a curve
_DRAWN = 1e100  # a larger value is not drawn: the axis could not hold it
_STREAMS = {"main": "main stream", "buffer": "buffer", "eval": "held-out pairs"}
# Columns of the tables by cell; a column without any value is left out.
_COLUMNS = {
    "normalised_loss": "normalised loss",
    "loss_at_start": "loss at margin 0",
    "loss_of_start": "loss of that at margin 0",
    "beta_margin": "β · margin",
    "target": "target",
    "accuracy": "right sign",
    "past_target": "past the target",
    "past_gradient": "of the gradient by those past it",
    "favoured_drift_per_token": "drift of the favoured, nats per token",
}
_TOKENS = {
    "prompt_truncated": "prompts cut",
    "completion_truncated": "completions cut",
    "num_unfinished": "completions cut off when they were generated, without an end token",
    "num_without_prompt": "rows without a prompt",
    "num_identical": "pairs whose completions are the same after rendering or cutting",
    "num_boundary_moved": "texts whose tokens change where the completion begins",
}

_RENDERED = ("template_changes", "openings")  # counts by reason

Row = Mapping[str, Any]


def training_result(run: Run, shown: str) -> StageResult:
    """Return the state of a run of `train` or `sft`, its loss, and its tables by label cell."""
    rows = [row for row in run.rows(dict, "metrics.jsonl") if _is_number(row.get("step"))]
    progress = run.load(TrainingProgress, "progress.json")
    status = run.record.status or "of unknown status"
    what = {"sft": "by imitation", "judge-train": "as a judge"}.get(run.stage, f"by {run.setting('method', str)}")
    expected, probe = run.load(ForecastFile, FORECAST), run.load(ProbeFile, PROBE_FILE)
    lines = [*_remarks(run), *_loss_lines(run, rows), *forecast_said(expected)]
    if status == "failed" and run.record.error:
        lines.insert(0, f"Error: {run.record.error}")
    tables = [
        *_behaviour(probe),
        *(_by_cell(rows, stream) for stream in _STREAMS),
        forecast_facts(expected),
        _data(run),
    ]
    return StageResult(
        run=shown,
        stage=run.stage,
        status=status,
        title=f"Training of {shown} {what}",
        sentence=_state(run, shown, rows, progress),
        lines=lines,
        tables=[table for table in tables if table.rows],
        curves=_curves(rows) if run.stage != "train" else {},
        behaviour=_behaviour_curves(rows, probe),
    )


def forecast_facts(found: ForecastFile) -> FactTable:
    """Return the table of what the setting asks of the pairs; empty without a forecast."""
    title, columns, rows = forecast_table(found)
    shown = [[cell_title(cell), *(text.replace("-", "−") for text in figures)] for cell, *figures in rows]
    return FactTable(title, columns, shown)


def forecast_said(found: ForecastFile) -> list[str]:
    """Return what was said before the first step of a setting that cannot change behaviour."""
    return [f"Before the first step: {found.warning}."] if found.warning else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -------------------------------------------------------------------------------------------------- state and time


def _state(run: Run, shown: str, rows: Sequence[Row], progress: TrainingProgress) -> str:
    status = run.record.status or "of unknown status"
    step = max([progress.step, *(int(row["step"]) for row in rows)])
    total = progress.max_steps or _total_steps(run, rows)
    if status == "finished":
        took = "" if run.record.seconds is None else f" in {duration(run.record.seconds)}"
        return f"The training of {shown} has finished: {step:,} step{'s' if step != 1 else ''}{took}."
    if not step:
        return f"The training of {shown} is {status} and has logged no step yet."
    of_total = f" of {total:,} ({percent(step / total)})" if total else ""
    if status != "running":
        does = {"failed": "failed", "interrupted": "was interrupted"}.get(status, f"is {status}")
        return f"The training of {shown} {does} at step {step:,}{of_total}."
    seconds = None if progress.seconds_left is None else max(0.0, progress.seconds_left)
    unit = 60 if (seconds or 0) >= 600 else 1
    left = "unknown time" if seconds is None else f"about {duration(unit * round(seconds / unit))}"
    at = f", as of {progress.updated}" if progress.updated else ""
    return f"The training of {shown} is at step {step:,}{of_total}, with {left} left{at}."


def _total_steps(run: Run, rows: Sequence[Row]) -> int | None:
    """Return the steps of the whole training: from its config, else from how far in its epochs a row is."""
    if (steps := run.setting("max_steps", int)) is not None:
        return steps
    epochs = run.record.config.get("num_train_epochs")
    for row in reversed(rows):
        if _is_number(epochs) and _is_number(row.get("epoch")) and row["epoch"] > 0 and row["step"] > 0:
            step, epoch = int(row["step"]), float(row["epoch"])
            return max(step, round(step * float(epochs or 0) / epoch))
    return None


# ------------------------------------------------------------------------------------------------------- the loss


def _loss_lines(run: Run, rows: Sequence[Row]) -> Iterator[str]:
    logged = [row for row in rows if _is_number(row.get("loss"))]
    found = _mean(_last(rows, "main"), "main")
    loss, start = found.get("normalised_loss"), found.get("loss_at_start")
    if loss is not None and start:
        yield (
            f"Normalised loss (a squared loss times β²) of the main stream over the last {found['rows']} rows of the "
            f"log: {number(loss)}, "
            f"{percent(loss / start)} of what the labels of the same pairs imply at margin 0 ({number(start)})."
        )
    elif logged:
        first, last = logged[0], logged[-1]
        yield (
            f"Loss: {number(last['loss'])} at step {int(last['step']):,}, {number(first['loss'])} at step "
            f"{int(first['step']):,}."
        )
    held = [row for row in rows if _is_number(row.get("eval_loss"))]
    if held and run.stage == "sft":
        value = float(held[-1]["eval_loss"])
        yield (
            f"Held-out loss: {number(value)} nats per token (perplexity {number(math.exp(min(value, 100.0)))}) at step "
            f"{int(held[-1]['step']):,}."
        )
    if any(row.get("diverging") for row in rows):
        yield "The loss diverges: it is far above its value at the start."


def _last(rows: Sequence[Row], stream: str) -> list[Row]:
    """Return the last rows with metrics of a stream; of held-out pairs the last one."""
    name = f"{stream}_num_pairs" if stream == "eval" else f"{stream}/num_pairs"
    found = [row for row in rows if _is_number(row.get(name))]
    return found[-1:] if stream == "eval" else found[-_ROWS:]


def _mean(rows: Sequence[Row], prefix: str) -> dict[str, Any]:
    """Return the means of a stream or cell over rows, weighted by their pairs, and the numbers of pairs and rows."""
    given = [row for row in rows if _is_number(row.get(f"{prefix}/num_pairs"))]
    pairs = sum(int(row[f"{prefix}/num_pairs"]) for row in given)
    found: dict[str, Any] = {"pairs": pairs, "rows": len(given)}
    for name in _COLUMNS:
        known = [row for row in given if _is_number(row.get(f"{prefix}/{name}"))]
        weight = sum(row[f"{prefix}/num_pairs"] for row in known)
        if weight:
            found[name] = sum(row[f"{prefix}/num_pairs"] * row[f"{prefix}/{name}"] for row in known) / weight
    if found.get("loss_at_start") and "normalised_loss" in found:
        found[_OF_START] = found["normalised_loss"] / found["loss_at_start"]
    return found


def _by_cell(rows: Sequence[Row], stream: str) -> FactTable:
    """Return the table of a stream by label cell; empty without metrics of it."""
    last = _last(rows, stream)
    between = "_" if stream == "eval" else "/"
    means = {cell: _mean(last, f"{stream}{between}{cell}") for cell in CELLS}
    means = {cell: found for cell, found in means.items() if found["pairs"]}
    names = [name for name in _COLUMNS if any(name in found for found in means.values())]
    if not means:
        return FactTable("", [], [])
    steps = sorted({int(row["step"]) for row in last})
    when = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    return FactTable(
        f"Loss by label cell, {_STREAMS[stream]}, {when}",
        ["more helpful over less helpful", "pairs", *(_COLUMNS[name] for name in names)],
        [[cell_title(cell), f"{found['pairs']:,}", *(_figure(found, name) for name in names)]
         for cell, found in means.items()],
    )  # fmt: skip


def _figure(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if value is None:
        return "not measured"
    if name == "accuracy":
        return percent(value, 1)
    return percent(value) if name in (_OF_START, "past_target", "past_gradient") else number(value)


# ----------------------------------------------------------------------------------------------------- behaviour


def _remarks(run: Run) -> Iterator[str]:
    """Yield the remarks on a run as sentences, the weightiest first."""
    for remark in reversed(run.record.remarks):
        yield f"{remark.text[:1].upper()}{remark.text[1:]}."


def _behaviour(probe: ProbeFile) -> Iterator[FactTable]:
    """Yield the shares of answers by kind of prompt, at the start and now, and the answers side by side."""
    now = f"at step {probe.step:,}"
    shares = []
    for kind in dict.fromkeys(row.kind for row in probe.rows):
        rows = probe.of(kind)
        for when, answers in (("at the start", [row.start for row in rows]), (now, [row.now for row in rows])):
            nats = (sum(getattr(one, name) for one in answers) / len(rows) for name in ("refusal_logp", "own_logp"))
            read = (_share(answers, reading) for reading in ("refused", "complied", "incoherent"))
            shares.append([f"{kind}, {when}", str(len(rows)), *read, *(number(round(value, 2)) for value in nats)])
    columns = ["held-out prompts", "number", "refused", "complied", "incoherent"]
    columns += ["first tokens of a refusal, nats", "of the start's own answer, nats"]
    yield FactTable("Behaviour on the prompts of the probe (95% intervals)", columns, shares)
    texts = [[row.kind, row.prompt, f"{row.start.text} ({row.start.reading})", f"{row.now.text} ({row.now.reading})"]
             for row in probe.rows]  # fmt: skip
    title = f"Answers of the probe, the start beside step {probe.step:,} (they may be harmful)"
    yield FactTable(title, ["kind", "prompt", "at the start", now], texts, folded=True)


def _share(answers: Sequence[ProbeAnswer], reading: str) -> str:
    found = wilson(sum(one.reading == reading for one in answers), len(answers))
    return with_interval(Score(reading, found.value, found.low, found.high, found.num))


def _behaviour_curves(rows: Sequence[Row], probe: ProbeFile) -> dict[str, Mapping[str, Sequence[tuple[float, ...]]]]:
    kinds = list(dict.fromkeys(row.kind for row in probe.rows))
    shares = {f"{kind}, {name}": f"probe/{kind}/{name}" for kind in kinds for name in ("refused", "incoherent")}
    nats = {
        f"{kind}, {title}": f"probe/{kind}/{name}"
        for kind in kinds
        for title, name in (("a refusal", "refusal_logp"), ("the start's own answer", "own_logp"))
    }
    figures: dict[str, Mapping[str, Sequence[tuple[float, ...]]]] = {
        "Behaviour on the prompts of the probe: share of answers": _points(rows, shares),
        "Log-prob of the first four tokens of an answer, nats": _points(rows, nats),
    }
    return {title: curves for title, curves in figures.items() if curves}


# ------------------------------------------------------------------------------------------------ data and curves


def _data(run: Run) -> FactTable:
    """Return the pairs or completions of each input, and what was left out or cut."""
    rows = []
    for name, counts in run.load(dict, "data.json").items():
        if not isinstance(counts, dict):
            continue
        unit = "pairs" if "pairs" in counts else "completions"
        found = [f"{counts[unit]:,} {unit}"] if isinstance(counts.get(unit), int) else []
        reasons = counts.get("rejected_by_reason")
        if isinstance(reasons, dict):
            found += [f"{count_text(count)} rows rejected: {reason}" for reason, count in reasons.items() if count]
        own = {
            "labels_set_safe": "missing labels set to safe",
            "pairs_without_label_dropped": "pairs dropped: no label",
        }
        found += [f"{count_text(counts[key])} {text}" for key, text in own.items() if counts.get(key)]
        tokens = counts.get("tokens")
        for key, count in tokens.items() if isinstance(tokens, dict) else ():
            if isinstance(count, int) and count and key in _TOKENS:
                found.append(f"{count:,} {_TOKENS[key]}")
            elif isinstance(count, dict) and key in _RENDERED:
                found += [f"{count_text(num)} where the chat template: {reason}" for reason, num in count.items()]
        rows.append([name.replace("_", " "), "; ".join(found)])
    return FactTable("Data", ["input", "what it holds"], rows)


def _curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    return _points(rows, {"loss": "loss", "held-out loss": "eval_loss"})


def _points(rows: Sequence[Row], keys: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Return the points of curves by title; `keys`: title -> metric."""
    curves = {
        title: [
            (float(row["step"]), float(row[key])) for row in rows if _is_number(row.get(key)) and abs(row[key]) < _DRAWN
        ]
        for title, key in keys.items()
    }
    return {title: points[:: 1 + len(points) // _POINTS] for title, points in curves.items() if len(points) > 1}
