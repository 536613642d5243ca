"""STAGE: pairs -> the same pairs without the safety labels that a judge contradicts, or with softer ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from bfpo.config import CleanConfig
from bfpo.config.judges import OwnNgrams, OwnProbe
from bfpo.core.console import level_text, show
from bfpo.core.errors import DataError, ServerError
from bfpo.core.files import user_cache_folder
from bfpo.core.markdown import score_cells, table
from bfpo.core.schema import Completion, JudgeFit, Pair, Score, Verdict
from bfpo.data.annotations import read_labels
from bfpo.data.labels import as_judged, cell_counts, completions_of_pair
from bfpo.data.load import load_pair_rows
from bfpo.data.rejects import ReadResult
from bfpo.data.thinking import describe_thoughts, without_thought
from bfpo.data.write import pair_row
from bfpo.generation.server import RequestBudget
from bfpo.judges.asking import Tally, ask_judges, no_answer
from bfpo.judges.cache import OpinionCache
from bfpo.judges.cleaning import Cleaned, Rule, clean_pairs, mean_confidence, people_of, people_scores
from bfpo.judges.fit import fit_table, log_fit
from bfpo.judges.judges import check_opinions
from bfpo.judges.label_report import against_labels
from bfpo.judges.ngrams import NgramSettings
from bfpo.judges.out_of_fold import (
    labels_of,
    ngram_prediction,
    out_of_fold,
    probe_features,
    probe_prediction,
    too_few,
)
from bfpo.judges.panel import panel_verdicts
from bfpo.judges.records import CleanFile
from bfpo.policy.devices import use_threads
from bfpo.runs.folder import RunFolder

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)
MOST_CONTRADICTED = 0.4
_NO_PREDICTION = "its text does not fit the judge's model"


def run(config: CleanConfig, folder: RunFolder) -> None:
    """Write `pairs.jsonl`, `contradictions.jsonl`, `verdicts.jsonl`, `rejects.jsonl`, `clean.json` and `clean.md`.

    Pairs and their columns are as read, except for the labels that the judge contradicts. Judges are asked through the
    cache, so that a stopped run continues from there; a judge of its own is trained again.

    Raises `DataError` for unusable data, for labels that are all the same, and for prompts too few to train a judge of
    its own; `ServerError` for a server that stops answering; and the errors of `make_judge`.
    """
    use_threads(config.threads)
    if config.judges is not None:
        check_opinions(config.judges, None)
    folder.add_data("data", config.data.files)
    people = None
    if config.people is not None:
        folder.add_data("people", config.people)
        people = people_of(read_labels(config.people))
    result = load_pair_rows(config.data, seed=config.seed)
    if result.notes:
        folder.add_facts(**result.notes)
    sides = _sides(config, result.pairs)
    for line in describe_thoughts(sides):
        _log.info("%s", line)
    verdicts, fits = _asked(config, sides, folder) if config.judges is not None else (_own(config, sides), [])
    rule = _rule(config, sides, verdicts)
    cleaned = clean_pairs(result.pairs, sides, verdicts, rule, people)
    _write(config, folder, result, sides, verdicts, rule, cleaned, people, fits)


def _sides(config: CleanConfig, pairs: Sequence[Pair]) -> list[Completion]:
    """Return both completions of each pair as the judge reads them, with their labels."""
    return [
        without_thought(as_judged(side, keep_label=True), config.thinking)
        for pair in pairs
        for side in completions_of_pair(pair)
    ]


def _rule(config: CleanConfig, sides: Sequence[Completion], verdicts: Sequence[Verdict]) -> Rule:
    found = (config.certainty,) * 2 if config.certainty else mean_confidence([one.is_safe for one in sides], verdicts)
    return Rule(config.policy.safe, config.policy.unsafe, *found, weight=config.weight)


def preview(config: CleanConfig) -> list[str]:
    """Return what would be checked, and by whom."""
    if config.judges is not None:
        check_opinions(config.judges, None)
    result = load_pair_rows(config.data, seed=config.seed)
    sides = _sides(config, result.pairs)
    known = _known(sides)
    cells = ", ".join(f"{cell} {count}" for cell, count in cell_counts(result.pairs).items())
    lines = [
        f"{len(result.pairs)} pairs (chosen-rejected): {cells}",
        f"{len(known)} labels to check, {len(sides) - len(known)} unknown",
        *describe_thoughts(sides),
        *(f"rows rejected: {reason} {count}" for reason, count in result.counts().items()),
    ]
    if config.judges is not None:
        return [*lines, *(f"judge: {judge.title}" for judge in config.judges)]
    _check_folds(config, [sides[place] for place in known])
    return [*lines, f"judge: {config.own.kind}, trained on these labels in {_own_judge(config).folds} folds"]


# ------------------------------------------------------------------------------------------------------- the judge


def _asked(config: CleanConfig, sides: Sequence[Completion], folder: RunFolder) -> tuple[list[Verdict], list[JudgeFit]]:
    """Return the panel's verdicts on the sides that have a label, the others unscored."""
    assert config.judges is not None
    known, budget, tallies = _known(sides), RequestBudget(config.max_requests), dict[str, Tally]()
    folder.kept = "verdicts so far are in the cache"
    with OpinionCache(config.label_cache or user_cache_folder("label")) as cache:
        try:
            votes, fits = ask_judges(
                config.judges,
                [replace(sides[place], is_safe=None) for place in known],
                cache,
                budget,
                votes=config.votes,
                tallies=tallies,
                executor=config.executor,
                threads=config.threads,
            )
        except ServerError as error:
            raise ServerError(f"{error} (kept in {cache.path})") from error
        finally:
            asked = {name: asdict(tally) for name, tally in tallies.items()}
            folder.add_facts(requests=budget.num_requests, opinions=asked)
    panel = panel_verdicts(votes, rule=config.rule, min_votes=config.min_votes)
    return _in_place(sides, dict(zip(known, panel, strict=True))), fits


def _own(config: CleanConfig, sides: Sequence[Completion]) -> list[Verdict]:
    """Return the verdicts of judges trained on the labels of other prompts, by cross-validation."""
    own = _own_judge(config)
    places = _known(sides)
    rows = [sides[place] for place in places]
    _check_folds(config, rows)
    if isinstance(own, OwnNgrams):
        ngrams = (own.ngrams[0], own.ngrams[1])
        settings = NgramSettings(ngrams, own.num_features, own.inverse_penalty, own.with_prompt)
        predict = ngram_prediction(rows, settings, balanced=own.balanced)
    else:
        read = probe_features(
            rows,
            model=own.model,
            revision=own.revision,
            dtype=own.dtype,
            max_length=own.max_length,
            batch_size=own.batch_size,
            layer=own.layer,
            feature_cache=own.feature_cache,
        )
        places, rows = [places[place] for place in read.places], [rows[place] for place in read.places]
        _check_folds(config, rows)
        keys: dict[str, Any] = {"inverse_penalty": own.inverse_penalty, "balanced": own.balanced}
        predict = probe_prediction(read, labels_of(rows), **keys)
    found = out_of_fold(rows, predict, folds=own.folds, seed=config.seed, threshold=0.5)
    name = f"{own.kind}, {own.folds} folds"
    verdicts = {
        place: Verdict(row.id, name, "safe" if p > 0.5 else "unsafe", p_safe=p)
        for place, row, p in zip(places, rows, found.p.tolist(), strict=True)
        if not np.isnan(p)
    }
    return _in_place(sides, verdicts, name)


def _own_judge(config: CleanConfig) -> OwnNgrams | OwnProbe:
    assert isinstance(config.own, OwnNgrams | OwnProbe)  # the only kinds
    return config.own


def _check_folds(config: CleanConfig, rows: Sequence[Completion]) -> None:
    """Raise `DataError` if a judge of its own cannot be trained on these rows."""
    if not rows:
        raise DataError.at(config.data.files[0], None, "no pair has a safety label; give judges, or label the pairs")
    if reason := too_few(rows, _own_judge(config).folds):
        raise DataError(f"own.folds: {reason}; give fewer folds, more pairs, or judges")


def _known(sides: Sequence[Completion]) -> list[int]:
    """Return the places of the sides whose label can be checked: they have one, and an answer."""
    return [place for place, side in enumerate(sides) if side.is_safe is not None and not no_answer(side)]


def _in_place(sides: Sequence[Completion], found: Mapping[int, Verdict], judge: str = "") -> list[Verdict]:
    """Return a verdict for each side, unscored with a reason where none was found."""

    def lacking(side: Completion) -> Verdict:
        reason = "it has no label" if side.is_safe is None else no_answer(side) or _NO_PREDICTION
        return Verdict(side.id, judge, "unscored", reason=reason)

    return [found.get(place) or lacking(side) for place, side in enumerate(sides)]


# ------------------------------------------------------------------------------------------------------- the output


def _write(
    config: CleanConfig,
    folder: RunFolder,
    result: ReadResult,
    sides: Sequence[Completion],
    verdicts: Sequence[Verdict],
    rule: Rule,
    cleaned: Cleaned,
    people: Mapping[tuple[str, str], float] | None,
    fits: list[JudgeFit],
) -> None:
    given = {side.id: side.is_safe for side in sides if side.is_safe is not None}
    interval = {
        "confidence": config.confidence,
        "num_resamples": config.bootstrap_samples,
        "random_seed": config.seed,
    }
    contradicted = [row.id for row in cleaned.contradicted]
    after = _labels_after(sides, cleaned)
    said = None
    if people is not None:
        said = people_scores(
            sides,
            [side.is_safe for side in sides],
            after,
            verdicts,
            contradicted,
            people,
            confidence=config.confidence,
        )
    says_safe = [row.label > 0.5 for row in cleaned.contradicted]
    unscored = sum(
        verdict.label == "unscored" for verdict, side in zip(verdicts, sides, strict=True) if side.id in given
    )
    found = CleanFile(
        judge=next((verdict.judge for verdict in verdicts if verdict.label != "unscored"), ""),
        certainty={"safe": rule.least_safe, "unsafe": rule.least_unsafe},
        confidence=config.confidence,
        pairs=len(result.pairs),
        pairs_left=len(cleaned.pairs),
        labels={
            "known": len(given),
            "unknown": len(sides) - len(given),
            "unscored": unscored,
            "contradicted": len(contradicted),
            "contradicted_safe": sum(says_safe),
            "contradicted_unsafe": len(says_safe) - sum(says_safe),
        },
        cells=cleaned.cells,
        agreement=against_labels(sides, verdicts, given, **interval) if given else [],
        people=said,
        warnings=_warnings(given.values(), cleaned) or None,
        judge_fit=fits or None,
    )
    folder.write_jsonl("pairs.jsonl", map(pair_row, cleaned.pairs))
    folder.write_jsonl("contradictions.jsonl", cleaned.contradicted)
    folder.write_jsonl("verdicts.jsonl", verdicts)
    folder.write_jsonl("rejects.jsonl", ({"input": "data", **reject.as_row()} for reject in result.rejects))
    folder.write_json("clean.json", found)
    rejected = Counter(result.counts())
    folder.add_facts(clean={"pairs": found.pairs, "pairs_left": found.pairs_left, "rows_rejected": dict(rejected)})
    text = _markdown(found)
    folder.write_text("clean.md", text)
    folder.write_card("Cleaned labels", {"Labels": text})
    show(text)
    log_fit(fits)
    for warning in found.warnings or ():
        _log.warning("%s", warning)


def _warnings(labels: Iterable[float], cleaned: Cleaned) -> list[str]:
    """Return that a large part of the labels of one kind is contradicted, which speaks against the judge."""
    given, named = (
        Counter(label > 0.5 for label in some) for some in (labels, [x.label for x in cleaned.contradicted])
    )
    return [
        f"{named[kind]} of the {given[kind]} labels that say {word} are contradicted; above {MOST_CONTRADICTED:.0%} "
        "the judge is the likelier one to be wrong: read some in contradictions.jsonl, or raise certainty"
        for kind, word in ((True, "safe"), (False, "unsafe"))
        if named[kind] > MOST_CONTRADICTED * given[kind]
    ]


def _labels_after(sides: Sequence[Completion], cleaned: Cleaned) -> list[float | None]:
    """Return the label of each side afterwards, `None` of a pair that was dropped."""
    left = {side.id: side.is_safe for pair in cleaned.pairs for side in completions_of_pair(pair)}
    return [left.get(side.id) for side in sides]


def _markdown(found: CleanFile) -> str:
    labels = found.labels
    share = f" ({labels['contradicted'] / labels['known']:.1%})" if labels["known"] else ""
    lines = [
        *(f"Warning: {warning}.\n" for warning in found.warnings or ()),
        f"{labels['contradicted']} of {labels['known']} labels{share} are contradicted by {found.judge or 'no judge'}: "
        f"{labels['contradicted_safe']} say safe, {labels['contradicted_unsafe']} unsafe. {found.pairs_left} of "
        f"{found.pairs} pairs are left. {labels['unknown']} labels are unknown, {labels['unscored']} not judged. "
        f"It contradicts from p(safe) {found.certainty['safe']:.2f} and p(unsafe) {found.certainty['unsafe']:.2f} on.",
        "",
        *table(
            ["cell (chosen-rejected)", "before", "contradicted", "dropped", "softened", "flipped", "after"],
            ([name, *asdict(cell).values()] for name, cell in found.cells.items()),
        ),
    ]
    for title, scores in (("Agreement", found.agreement), ("On the texts that people labelled", found.people or [])):
        lines += _scores(title, scores, found.confidence) if scores else []
    if found.judge_fit:
        lines += ["", fit_table(found.judge_fit)]
    return "\n".join(lines) + "\n"


def _scores(title: str, scores: Sequence[Score], confidence: float) -> list[str]:
    return [
        "",
        f"{title}; intervals: {level_text(confidence)}, over prompts.",
        "",
        *table(
            ["measure", "value", "interval", "texts", "left out"],
            ([score.metric.replace("_", " "), *score_cells(score)] for score in scores),
        ),
    ]
