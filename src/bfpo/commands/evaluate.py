"""STAGE: suites of several models; or accuracy of one on held-out pairs, a judge's scores of completions, or both."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.config import EvaluateConfig, read_template
from bfpo.config.evaluate import CompletionsJob, PairsJob, SuitesJob
from bfpo.core.console import level_text
from bfpo.core.errors import DataError, ModelError
from bfpo.core.files import user_cache_folder
from bfpo.core.markdown import score_cells, table
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion, JudgeFit, Pair, Score, Verdict, VerdictRow
from bfpo.data.annotations import LabelRow, read_labels
from bfpo.data.chat import ChatEncoder
from bfpo.data.labels import as_judged, cell_counts
from bfpo.data.load import load_pairs
from bfpo.data.notes import NOTES
from bfpo.data.read import read_completions
from bfpo.data.rejects import Reject
from bfpo.data.split import normalised_prompt
from bfpo.data.thinking import describe_thoughts
from bfpo.data.tokenize import TokenizeReport, TokenPair, check_tokens, row_check, token_notes, tokenize_pairs
from bfpo.generation.server import RequestBudget
from bfpo.judges.asking import ask_judge, judge_answers
from bfpo.judges.cache import OpinionCache
from bfpo.judges.fit import fit_table, judge_fit, log_fit
from bfpo.judges.judges import OracleJudge, check_judge
from bfpo.judges.shared import open_judge
from bfpo.policy.devices import use_threads
from bfpo.policy.load import load_to_read, load_tokenizer
from bfpo.policy.source import num_embeddings, read_config
from bfpo.runs.folder import RunFolder
from bfpo.scores.accuracy import PairLogps, accuracy_rows, accuracy_scores, shared_pair_logps
from bfpo.scores.categories import category_table
from bfpo.scores.people import GroupAnswers, people_results, people_sections, people_sentence
from bfpo.scores.records import AccuracyRow, CoherenceBound, PeopleFile, ScoresFile
from bfpo.scores.scores import (
    COHERENCE,
    METRICS,
    Judged,
    describe_coherence,
    join_verdicts,
    metric_title,
    score_rows,
)
from bfpo.suites.coherence import make_reader
from bfpo.suites.run import preview_suites, run_suites
from bfpo.suites.scores import SUITE_METRICS

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)

PAIR_ROWS, VERDICT_ROWS = "accuracy.jsonl", "verdicts.jsonl"


def run(config: EvaluateConfig, folder: RunFolder) -> None:
    """Write `scores.json` and `scores.md`, and a file with one row per pair or completion behind them.

    `accuracy.jsonl`: cell, favoured side, margin, right or not. `verdicts.jsonl`: the verdict, the prompt's kind, the
    completion's id. With suites, `answers.jsonl`: every completion with its verdict. Unscored items are counted and are
    in no mean.

    Raises `DataError` for data that cannot be used or, after all files are written, if nothing could be scored,
    `ModelError` if policy and reference tokenize text differently.
    """
    if folder.resumed and isinstance(config, PairsJob | SuitesJob):  # a run of before names the number type
        config = config.model_copy(update={"dtype": folder.config.get("dtype", config.dtype)})
    use_threads(config.threads)
    if "bootstrap_samples" in config.model_fields_set and not isinstance(config, SuitesJob):
        _log.warning("bootstrap_samples: no effect here; only a win rate at equal length is resampled")
    if isinstance(config, SuitesJob):
        with RequestBudget(config.suites.max_requests).shared():
            run_suites(config, folder)
        return
    scores: list[Score] = []
    people: PeopleFile | None = None
    reasons: list[str] = []
    bound: CoherenceBound | None = None
    fits: list[JudgeFit] = []
    labels: list[LabelRow] | None = None
    if isinstance(config, CompletionsJob):
        check_judge(config.judge.format)
        labels = None if config.labels is None else read_labels(config.labels)
    if isinstance(config, PairsJob):
        folder.add_data("data", config.data.files)
        rows = _accuracy(config, folder)
        folder.write_jsonl(PAIR_ROWS, rows)
        scores += accuracy_scores(rows, confidence=config.confidence)
        reasons.append(f"{config.method} favours no side in {len(rows)} pairs; use another method, or labelled pairs")
    if isinstance(config, CompletionsJob):
        folder.add_data("completions", config.completions)
        completions = _completions(config)
        judged = _judge(config, completions, folder)
        bound, fits = judged.bound, judged.fits
        if labels is not None:
            folder.add_data("labels", config.labels or "")
        scores += score_rows(judged.rows, confidence=config.confidence)
        reasons += [
            f"{count} of {len(completions)} completions are unscored by {config.judge.title}: {reason}; use another "
            "judge"
            for reason, count in judged.unscored().most_common(1)
        ]
    if isinstance(config, CompletionsJob) and labels is not None:
        try:
            people = _people(config, labels, completions, judged.verdicts)
        except DataError:
            _write_scores(folder, config, scores, bound, fits, None)
            raise
    _write_scores(folder, config, scores, bound, fits, people)
    _log_scores(scores)
    if all(score.value is None for score in scores if score.metric not in ("finished", "coherent")):
        raise DataError(f"nothing was scored: {'; '.join(reasons)}. The files are kept")


def preview(config: EvaluateConfig) -> list[str]:
    """Return what would be scored: pairs by cell, completions by prompt kind."""
    if isinstance(config, SuitesJob):
        return preview_suites(config)
    if isinstance(config, CompletionsJob):
        check_judge(config.judge.format)
    lines = []
    if isinstance(config, PairsJob):
        pairs, counts, _, _, report = _tokens(config)
        cells = ", ".join(f"{cell} {count}" for cell, count in cell_counts(pairs).items())
        lines.append(f"{len(pairs)} pairs (chosen-rejected): {cells}")
        lines += [f"{name}: {count}" for name, count in counts.items() if count and name not in NOTES]
        lines += token_notes("data", report.as_row())
    if isinstance(config, CompletionsJob):
        kinds: dict[str, int] = {}
        completions = _completions(config)
        for completion in completions:
            kinds[completion.kind or "(no kind)"] = kinds.get(completion.kind or "(no kind)", 0) + 1
        by_kind = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        lines.append(f"{len(completions)} completions, judged by {config.judge.title}: {by_kind}")
        if config.labels is not None:
            lines.append(f"labels by people: {len(read_labels(config.labels))}")
        lines += describe_thoughts(completions)
        if config.coherence is not None:
            lines.append(f"coherence: unlikely answers are found by {config.coherence.model}")
    return lines


# ----------------------------------------------------------------------------------------------- accuracy on pairs


def _accuracy(config: PairsJob, folder: RunFolder) -> list[AccuracyRow]:
    pairs, counts, rejects, tokens, report = _tokens(config)
    if rejects:
        folder.write_jsonl("rejects.jsonl", [{"input": "data", **reject.as_row()} for reject in rejects])
    for note in token_notes("data", report.as_row()):
        _log.warning("%s", note)
    folder.add_facts(pairs={"cells": cell_counts(pairs), **counts, "tokens": report.as_row()})
    policy = _logps(config, config.model, config.revision, tokens)
    reference = _logps(config, config.reference, config.reference_revision, tokens)
    prompts = [normalised_prompt(pair.prompt) for pair in pairs]
    return accuracy_rows(tokens, prompts, policy, reference, method=config.method_object())


def _tokens(config: PairsJob) -> tuple[list[Pair], dict[str, Any], list[Reject], list[TokenPair], TokenizeReport]:
    """Return the pairs to test on, counts of rows with notes on files, the bad rows, the tokens, and their report.

    Raises `ModelError` unless both models get the same tokens, all of which they have, and `DataError` for pairs that
    the chat template refuses or changes. No weights are loaded.
    """
    models = ((config.model, config.revision), (config.reference, config.reference_revision))
    tokenizer, other = (load_tokenizer(model, revision=revision) for model, revision in models)
    sizes = [num_embeddings(read_config(model, revision=revision)) for model, revision in models]
    template = read_template(config.chat_template)
    check = row_check(ChatEncoder(tokenizer, template, config.chat_template_kwargs))
    loaded = load_pairs(config.data, seed=config.seed, check=check)
    names = {"rows_rejected": "rows_rejected", "labels_set_safe": "labels_set_safe"}
    names["pairs_without_label_dropped"] = "pairs_dropped"
    counts = {name: loaded.counts[key] for key, name in names.items()}
    counts |= {name: loaded.counts[name] for name in NOTES if name in loaded.counts}
    settings = {
        "max_length": config.max_length,
        "max_completion_length": config.max_completion_length,
        "chat_template": template,
        "chat_template_kwargs": config.chat_template_kwargs,
        "num_embeddings": min(filter(None, sizes), default=None),
    }
    tokens, report = tokenize_pairs(loaded.pairs, tokenizer, **settings)
    allowed = {"allow_changes": config.allow_template_changes, "allow_rendered": config.allow_rendered_text}
    check_tokens("data", report.as_row(), **allowed)
    _check_same_tokens(config, tokens, tokenize_pairs(loaded.pairs, other, **settings)[0])
    return loaded.pairs, counts, loaded.rejects, tokens, report


def _logps(config: PairsJob, model: str, revision: str | None, tokens: Sequence[TokenPair]) -> PairLogps:
    """Return a model's log-probs; the model is freed before the next one is loaded."""
    with CountProgress(f"pairs under {model}", len(tokens), _log) as progress:
        return shared_pair_logps(
            partial(load_to_read, model, dtype=config.dtype_of_logps, revision=revision),
            tokens,
            config.executor,
            name=model,
            pairs_per_batch=config.pairs_per_batch,
            reduction=config.reduction,
            threads=config.threads,
            advance=progress.advance,
        )


def _check_same_tokens(config: PairsJob, ours: Sequence[TokenPair], theirs: Sequence[TokenPair]) -> None:
    """Raise `ModelError` unless both models get the same token ids, as a log-ratio needs."""
    for one, other in zip(ours, theirs, strict=True):
        sides = ("prompt_ids", "chosen_ids", "rejected_ids")
        if any(getattr(one, side).tolist() != getattr(other, side).tolist() for side in sides):
            raise ModelError(
                f"reference: {config.reference} and model {config.model} tokenize pair {one.pair_id} differently; "
                "a margin needs the same tokenizer and chat template for both (chat_template sets one)"
            )


# ------------------------------------------------------------------------------------------- verdicts on completions


def _completions(config: CompletionsJob) -> list[Completion]:
    completions = read_completions(Path(config.completions), thinking=config.thinking)
    if not completions:
        raise DataError.at(config.completions, None, "holds no completion; run `bfpo generate` first")
    models = Counter(completion.model for completion in completions)
    if len(models) > 1:
        each = ", ".join(f"{model or 'no model'} {num:,}" for model, num in models.most_common(5))
        raise DataError.at(
            config.completions,
            None,
            f"holds answers of {len(models)} models ({each}), and one rate of all would say nothing of each; give a "
            "file of one model, or models: and suites: to compare several",
        )
    seen: dict[str, Completion] = {}
    for one in completions:
        first = seen.setdefault(one.id, one)
        if (first.prompt, first.text) != (one.prompt, one.text):  # a page would show a verdict beside the other text
            raise DataError.at(
                config.completions, None, f"two different completions have the id {one.id!r}; ids must differ"
            )
    return completions


@dataclass(frozen=True, slots=True)
class _Judgement:
    """What a judge said of completions, in their order, how it fits them, and the bound of their likelihood."""

    rows: list[Judged]
    verdicts: Sequence[Verdict]
    fits: list[JudgeFit]
    bound: CoherenceBound | None

    def unscored(self) -> Counter[str]:
        """Return the number of unscored completions by reason."""
        return Counter(verdict.reason for verdict in self.verdicts if verdict.label == "unscored")


def _judge(config: CompletionsJob, completions: Sequence[Completion], folder: RunFolder) -> _Judgement:
    """Judge the completions, and write a row of each."""
    for line in describe_thoughts(completions):
        _log.info("%s", line)
    read = [as_judged(completion) for completion in completions]
    with open_judge(config.judge, config.executor, threads=config.threads) as judge:
        folder.add_facts(judges={"completions": judge.version})
        if isinstance(judge, OracleJudge):  # rules, which take less time than a cache
            verdicts = judge_answers(judge, read)
        else:
            with (
                OpinionCache(config.label_cache or user_cache_folder("label")) as cache,
                CountProgress(f"judged by {judge.name}", len(completions), _log) as progress,
            ):
                verdicts = [votes[0] for votes in ask_judge(judge, read, cache, advance=progress.advance)]
        fits = judge_fit(judge, read, verdicts)
    log_fit(fits)
    start = None if config.coherence is None else (config.coherence.model, config.coherence.revision)
    prompts = [completion.prompt for completion in completions]
    with make_reader(start, prompts, config.executor, threads=config.threads) as reader:
        readings = reader.read(completions, verdicts)
    rows = join_verdicts(completions, verdicts, coherent=[one.coherent for one in readings])
    folder.write_jsonl(
        VERDICT_ROWS,
        (
            VerdictRow(
                **asdict(verdict),
                kind=row.kind,
                prompt=row.prompt,
                finished=c.finished,
                blocked=c.blocked,
                incoherent=read.incoherent,
                nats_per_token=read.nats_per_token,
                category=row.category,
            )
            for verdict, row, c, read in zip(verdicts, rows, completions, readings, strict=True)
        ),
    )
    return _Judgement(rows, verdicts, fits, reader.bound)


def _people(
    config: CompletionsJob, labels: Sequence[LabelRow], completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> PeopleFile:
    model = completions[0].model
    groups = [GroupAnswers("", model, frozenset({model}), completions, verdicts)]
    metrics = {"": [*METRICS.values(), SUITE_METRICS["refused"]]}
    return people_results(config.labels or "", labels, groups, metrics, confidence=config.confidence)


# ------------------------------------------------------------------------------------------------------- the scores


def _log_scores(scores: Sequence[Score]) -> None:
    """Log all scores in one line: name, value, interval."""
    measured = [score for score in scores if score.value is not None]
    missing = len(scores) - len(measured)
    lines = [*map(_words, measured), *([f"{missing} others not measured"] if missing else [])]
    _log.info("scores: %s", "; ".join(lines))


def _words(score: Score) -> str:
    interval = "" if score.low is None or score.high is None else f" ({score.low:.3f} to {score.high:.3f})"
    ties = f", {score.extra['num_ties']} ties" if score.extra.get("num_ties") else ""
    return f"{metric_title(score.metric)} {score.value:.3f}{interval}{ties}"


def _write_scores(
    folder: RunFolder,
    config: EvaluateConfig,
    scores: Sequence[Score],
    bound: CoherenceBound | None,
    fits: list[JudgeFit],
    people: PeopleFile | None,
) -> None:
    folder.write_json("scores.json", ScoresFile(config.confidence, list(scores), bound, fits or None, people))
    read = any(score.metric in COHERENCE for score in scores)
    lines = [
        f"Intervals: {level_text(config.confidence)}, clustered by prompt.",
        *(["", describe_coherence(bound)] if read else []),
        "",
        *table(
            ["metric", "value", "interval", "scored", "unscored"],
            ([metric_title(score.metric), *score_cells(score)] for score in scores),
        ),
        *category_table((([metric_title(score.metric)], score) for score in scores), ["metric"]),
        *(["", fit_table(fits)] if fits else []),
        *([] if people is None else people_sections(people, config.confidence)),
    ]
    for rate in () if people is None else people.rates:
        _log.info("%s, %s: %s", rate.model, rate.title, people_sentence(rate))
    folder.write_text("scores.md", "\n".join(lines) + "\n")
    folder.write_card("Scores", {"Scores": "\n".join(lines)})
