"""STAGE: a judge's verdicts against people's labels: accuracy, kappa, ROC AUC, calibration, the worst mistakes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bfpo.config import JudgeCheckConfig
from bfpo.core.console import level_text, printable, show
from bfpo.core.files import user_cache_folder
from bfpo.core.markdown import score_cells, table
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion, Score, Verdict
from bfpo.data.labelled import LabelledResult, load_labelled
from bfpo.data.split import draw, normalised_prompt
from bfpo.data.thinking import describe_thoughts
from bfpo.data.write import completion_row
from bfpo.generation.server import RequestBudget
from bfpo.judges.asking import ask_judge
from bfpo.judges.cache import OpinionCache
from bfpo.judges.fit import fit_table, judge_fit, log_fit
from bfpo.judges.judges import Judge, check_judge
from bfpo.judges.ngrams import seen_rows, trained_on_few
from bfpo.judges.quality import QUALITY_TITLES, calibration_bins, calibration_figure, judge_quality, trust_in
from bfpo.judges.records import CalibrationBin, CheckedJudge, JudgeCheckFile
from bfpo.judges.shared import open_judge
from bfpo.plots.style import png_bytes, svg_bytes
from bfpo.policy.devices import use_threads
from bfpo.runs.folder import RunFolder

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)

_ALL = "all"


@dataclass(frozen=True, slots=True)
class _Checked:
    """One text with the judge's verdict and people's label."""

    completion: Completion
    verdict: Verdict

    @property
    def is_safe(self) -> bool:
        """People's label."""
        return self.completion.is_safe == 1

    @property
    def cluster(self) -> str:
        """The prompt, over which intervals are computed."""
        return normalised_prompt(self.completion.prompt) or self.completion.id

    @property
    def mistake(self) -> float | None:
        """How confident the judge was in a wrong label, in [0, 1]; `None` if it was right or gave none."""
        verdict = self.verdict
        if verdict.label == "unscored" or (verdict.label == "safe") == self.is_safe:
            return None
        return 1.0 if verdict.p_safe is None else abs(float(self.is_safe) - verdict.p_safe)


def run(config: JudgeCheckConfig, folder: RunFolder) -> None:
    """Write `quality.json` and `quality.md`, `verdicts.jsonl`, `mistakes.jsonl` and the calibration figure.

    Intervals are over prompts; each kind of row (the column `kind`) is also shown separately. Texts that the judge
    could not score are counted and left out of the figures. Warns about a judge of `bfpo judge-train` that was trained
    on few rows or on some of these. Raises `DataError` for unusable data, `SettingError` for an unknown judge.
    """
    use_threads(config.threads)
    folder.add_data("data", config.data.files)
    loaded = load_labelled(config.data)
    if loaded.notes:
        folder.add_facts(**loaded.notes)
    rows = draw(loaded.completions, config.limit, config.seed)
    warnings = _warnings(config, rows)
    budget = RequestBudget(config.max_requests)
    with open_judge(config.judge, config.executor, budget, threads=config.threads) as judge:
        verdicts = _ask(config, judge, rows, folder)
        fits = judge_fit(judge, rows, verdicts)
    checked = [_Checked(row, verdict) for row, verdict in zip(rows, verdicts, strict=True)]
    folder.add_facts(requests=budget.num_requests)
    folder.write_jsonl("verdicts.jsonl", map(_row, checked))
    mistakes = sorted((row for row in checked if row.mistake is not None), key=lambda row: -(row.mistake or 0))
    folder.write_jsonl("mistakes.jsonl", map(_row, mistakes))
    quality = {name: _quality(config, part) for name, part in _parts(checked).items()}
    bins = _bins(config, checked)
    trust = trust_in(verdicts, [row.is_safe for row in checked], quality[_ALL])
    folder.write_json(
        "quality.json",
        JudgeCheckFile(
            judge=CheckedJudge(judge.name, judge.version),
            confidence=config.confidence,
            num_texts=len(checked),
            left_out=loaded.left_out,
            warnings=warnings,
            unscored_by_reason=_unscored(verdicts),
            quality=quality,
            calibration=bins,
            judge_fit=fits or None,
            trust=trust,
        ),
    )
    figures = _draw(config, judge.name, bins, folder)
    text = "".join(f"Warning: {warning}.\n\n" for warning in warnings)
    text += _markdown(config, judge.name, loaded, checked, quality)
    text += f"\n\n{fit_table(fits)}" if fits else ""
    verdict = f"\n{trust.verdict} Rule: {trust.rule}."
    folder.write_text("quality.md", f"{text}\n{verdict}\n{_worst(mistakes[: config.mistakes])}\n")
    card = f"{text}\n{verdict}{figures}"
    folder.write_card(f"Check of the judge {judge.name}", {"Agreement with people's labels": card})
    show(text)
    for warning in warnings:
        _log.warning("%s", warning)
    log_fit(fits)
    show(f"\n{len(mistakes)} mistakes, the most confident first: {folder.file('mistakes.jsonl')}")
    show(verdict)


def preview(config: JudgeCheckConfig) -> list[str]:
    """Return what would be checked."""
    check_judge(config.judge.format)
    loaded = load_labelled(config.data)
    rows = draw(loaded.completions, config.limit, config.seed)
    safe = sum(row.is_safe == 1 for row in rows)
    return [
        f"{len(rows)} labelled completions: {safe} safe, {len(rows) - safe} unsafe",
        *(f"left out: {count} rows, {reason}" for reason, count in loaded.left_out.items()),
        *describe_thoughts(rows),
        f"judge: {config.judge.title}",
        *(f"warning: {warning}" for warning in _warnings(config, rows)),
    ]


def _warnings(config: JudgeCheckConfig, rows: Sequence[Completion]) -> list[str]:
    """Return why the judge's own training makes the check less reliable."""
    folder = config.judge.source if config.judge.format == "trained" else None
    return [] if folder is None else [*trained_on_few(folder), *seen_rows(folder, rows)]


def _ask(config: JudgeCheckConfig, judge: Judge, rows: Sequence[Completion], folder: RunFolder) -> list[Verdict]:
    folder.kept = "what was judged is in the cache"
    with (
        OpinionCache(config.label_cache or user_cache_folder("label")) as cache,
        CountProgress(f"judged by {judge.name}", len(rows), _log) as progress,
    ):
        votes = ask_judge(judge, rows, cache, advance=progress.advance)
    return [vote for vote, *_ in votes]


def _row(checked: _Checked) -> dict[str, Any]:
    verdict = {key: value for key, value in asdict(checked.verdict).items() if key != "completion_id"}
    return {**completion_row(checked.completion), **verdict}


def _parts(checked: Sequence[_Checked]) -> dict[str, list[_Checked]]:
    """Return all rows and, if there are several kinds, those of each kind."""
    parts: dict[str, list[_Checked]] = {}
    for row in checked:
        parts.setdefault(row.completion.kind or "(no kind)", []).append(row)
    return {_ALL: list(checked), **(parts if len(parts) > 1 else {})}


def _quality(config: JudgeCheckConfig, rows: Sequence[_Checked]) -> list[Score]:
    return judge_quality(
        [row.verdict for row in rows],
        [row.is_safe for row in rows],
        [row.cluster for row in rows],
        confidence=config.confidence,
        num_resamples=config.bootstrap_samples,
        random_seed=config.seed,
    )


def _bins(config: JudgeCheckConfig, checked: Sequence[_Checked]) -> list[CalibrationBin]:
    valued = [row for row in checked if row.verdict.label != "unscored" and row.verdict.p_safe is not None]
    p_safe = [row.verdict.p_safe or 0.0 for row in valued]
    labels = [row.is_safe for row in valued]
    return calibration_bins(p_safe, labels, [row.cluster for row in valued], confidence=config.confidence)


def _unscored(verdicts: Sequence[Verdict]) -> dict[str, int]:
    return dict(Counter(verdict.reason for verdict in verdicts if verdict.label == "unscored"))


def _draw(config: JudgeCheckConfig, judge: str, bins: Sequence[CalibrationBin], folder: RunFolder) -> str:
    """Draw the calibration if the judge gives probabilities; return the figure's line of Markdown."""
    if not bins:
        return ""
    figure = calibration_figure(bins, judge=judge, confidence=config.confidence)
    folder.write_bytes("calibration.png", png_bytes(figure))
    folder.write_bytes("calibration.svg", svg_bytes(figure, salt="calibration"))
    return "\n\n![p(safe) against the share that people call safe](calibration.png)"


def _markdown(
    config: JudgeCheckConfig,
    judge: str,
    loaded: LabelledResult,
    checked: Sequence[_Checked],
    quality: Mapping[str, Sequence[Score]],
) -> str:
    safe = sum(row.is_safe for row in checked)
    prompts = len({row.cluster for row in checked})
    unscored = _unscored([row.verdict for row in checked])
    lines = [
        f"Judge {judge} on {len(checked)} completions of {prompts} prompts; people call {safe} safe, "
        f"{len(checked) - safe} unsafe. Intervals: {level_text(config.confidence)}, over prompts.",
        *(f"Unscored: {count}, {reason}." for reason, count in unscored.items()),
        *(f"Left out: {count} rows, {reason}." for reason, count in loaded.left_out.items()),
        *(f"{line}." for line in describe_thoughts([row.completion for row in checked])),
        "",
    ]
    rows = ([QUALITY_TITLES[score.metric], *score_cells(score)] for score in quality[_ALL])
    lines += table(["agreement", "value", "interval", "texts", "unscored"], rows)
    if len(quality) > 1:
        shown = ("accuracy", "kappa", "roc_auc")
        by_kind = []
        for kind, scores in quality.items():
            by_name = {score.metric: score for score in scores}
            left_out = by_name["accuracy"].unscored
            num = by_name["accuracy"].num + left_out
            by_kind.append([kind, num, *(_cell(by_name[name]) for name in shown), left_out])
        heads = ["kind", "texts", *(QUALITY_TITLES[name] for name in shown), "unscored"]
        lines += ["", *table(heads, by_kind)]
    return "\n".join(lines)


def _cell(score: Score) -> str:
    if score.value is None:
        return "not measured"
    interval = "" if score.low is None or score.high is None else f" ({score.low:.2f} to {score.high:.2f})"
    return f"{score.value:.2f}{interval}"


def _worst(mistakes: Sequence[_Checked]) -> str:
    """Return the most confident mistakes as Markdown; texts are code blocks, so that nothing in them is rendered."""
    lines = ["", "## Worst mistakes", ""] if mistakes else []
    for row in mistakes:
        sure = "" if row.verdict.p_safe is None else f", p(safe) {row.verdict.p_safe:.3f}"
        people = "safe" if row.is_safe else "unsafe"
        lines.append(f"{row.completion.id}: people say {people}, the judge {row.verdict.label}{sure}")
        text = printable(row.completion.text[:600])
        lines += ["", *(f"    {line}" for line in text.splitlines()), ""]
    return "\n".join(lines).rstrip()
