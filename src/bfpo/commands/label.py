"""STAGE: completions -> verdicts (and comparisons), or pairs -> pairs with safety labels, through a cache."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bfpo.config import LabelConfig
from bfpo.core.errors import DataError, ServerError
from bfpo.core.files import user_cache_folder
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Comparison, Completion, JudgeFit, Pair, Verdict, VerdictRow
from bfpo.data.labels import as_judged, cell_counts, completions_of_pair
from bfpo.data.load import load_pair_rows
from bfpo.data.read import read_completions
from bfpo.data.rejects import ReadResult, Reject
from bfpo.data.split import normalised_prompt
from bfpo.data.thinking import describe_thoughts, without_thought
from bfpo.data.write import pair_row
from bfpo.generation.server import RequestBudget
from bfpo.judges.asking import Tally, Votes, ask_judges, ask_ranker
from bfpo.judges.cache import OpinionCache
from bfpo.judges.fit import fit_table, log_fit
from bfpo.judges.judges import check_opinions
from bfpo.judges.label_report import (
    agreement_scores,
    count_verdicts,
    disagreement_rows,
    report_text,
    soft_label_warning,
)
from bfpo.judges.ngrams import trained_on_few
from bfpo.judges.pairing import candidate_duels, choose_pairs, label_of
from bfpo.judges.panel import panel_verdicts
from bfpo.judges.shared import open_ranker
from bfpo.policy.devices import use_threads
from bfpo.runs.folder import RunFolder
from bfpo.scores.records import ScoresFile
from bfpo.suites.coherence import Reading, reader_of

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)

VERDICTS, COMPARISONS = "verdicts.jsonl", "comparisons.jsonl"
PAIRS, DISAGREEMENTS, REJECTS = "pairs.jsonl", "disagreements.jsonl", "rejects.jsonl"


@dataclass(frozen=True, slots=True)
class _Input:
    """The texts to judge: completions, or the two of each pair, one after the other."""

    completions: list[Completion]
    pairs: list[Pair]
    rejects: list[Reject]

    def reasons(self) -> dict[str, int]:
        """Return the number of unusable rows by reason."""
        return ReadResult(self.rejects, len(self.rejects)).counts()

    def judged(self, config: LabelConfig) -> list[Completion]:
        """Return the completions to judge: of pairs only the sides without a label, unless `relabel`."""
        if not self.pairs or config.relabel:
            return self.completions
        return [c for c, label in zip(self.completions, self._labels(), strict=True) if label is None]

    def known_labels(self) -> dict[str, float]:
        """Return the labels that pairs came with, by the id of the completion."""
        return {c.id: label for c, label in zip(self.completions, self._labels(), strict=True) if label is not None}

    def _labels(self) -> list[float | None]:
        return [label for pair in self.pairs for label in (pair.chosen_is_safe, pair.rejected_is_safe)]

    def compared(
        self, verdicts: Sequence[Verdict], incoherent: Collection[str] = ()
    ) -> list[tuple[Completion, Completion]]:
        """Return the pairs of completions to rank: the sides of each pair, or every two usable ones of a prompt."""
        if not self.pairs:
            return candidate_duels(self.completions, verdicts, incoherent)
        sides = self.completions
        return [(sides[n], sides[n + 1]) for n in range(0, len(sides), 2) if sides[n].text != sides[n + 1].text]


def run(config: LabelConfig, folder: RunFolder) -> None:
    """Write `verdicts.jsonl`, `disagreements.jsonl`, the report and, depending on the input, more files.

    For pairs, `rejects.jsonl` and, in their order and with our columns, `pairs.jsonl`: unknown labels are filled, under
    `relabel` all are replaced; a text that could not be scored has an unknown label. With a ranker,
    `comparisons.jsonl`. Every answer goes into the cache as it arrives, so that a stopped run continues from there.

    Raises `DataError` for unusable input, `SettingError` for judges of the same name, `ServerError` for a server that
    stops answering, and the errors of `make_judge`.
    """
    use_threads(config.threads)
    check_opinions(config.judges, config.ranker)
    given = _read(config, folder)
    for line in describe_thoughts(given.completions):
        _log.info("%s", line)
    budget = RequestBudget(config.max_requests)
    tallies: dict[str, Tally] = {}
    folder.kept = "verdicts so far are in the cache"
    with OpinionCache(config.label_cache or user_cache_folder("label")) as cache:
        try:
            judged = given.judged(config)
            votes, fits = ask_judges(
                config.judges,
                judged,
                cache,
                budget,
                votes=config.votes,
                tallies=tallies,
                executor=config.executor,
                threads=config.threads,
            )
            verdicts = panel_verdicts(votes, rule=config.rule, min_votes=config.min_votes)
            readings = _readings(config, given, verdicts)
            dropped = _dropped(config, judged, readings)
            comparisons = _ask_ranker(config, given.compared(verdicts, dropped), cache, budget, tallies)
        except ServerError as error:
            done = ", ".join(f"{name}: {tally.kept + tally.asked} judged" for name, tally in tallies.items())
            raise ServerError(f"{error} ({done}; kept in {cache.path})") from error
        finally:
            asked = {name: asdict(tally) for name, tally in tallies.items()}
            folder.add_facts(requests=budget.num_requests, opinions=asked)
    _write(config, folder, given, judged, votes, verdicts, readings, comparisons, fits)


def _readings(config: LabelConfig, given: _Input, verdicts: Sequence[Verdict]) -> list[Reading]:
    """Return what was read of each judged completion; the sides of pairs are not read."""
    if given.pairs:
        return [Reading()] * len(verdicts)
    prompts = [completion.prompt for completion in given.completions]
    with reader_of(config.coherence, prompts, config.executor, config.threads) as reader:
        readings = reader.read(given.completions, verdicts)
    # An empty answer gives no pair anyway.
    return [read if one.text.strip() else Reading() for one, read in zip(given.completions, readings, strict=True)]


def _dropped(config: LabelConfig, judged: Sequence[Completion], readings: Sequence[Reading]) -> set[str]:
    """Return the ids of the completions that no pair takes because they are no coherent text."""
    if config.incoherent == "keep":
        return set()
    return {one.id for one, read in zip(judged, readings, strict=True) if read.coherent is False}


def preview(config: LabelConfig) -> list[str]:
    """Return what would be judged and ranked, and by which judges; none is loaded or asked."""
    check_opinions(config.judges, config.ranker)
    given = _read(config)
    judged = given.judged(config)
    different = len({(completion.prompt, completion.text) for completion in judged})
    lines = [f"{len(judged)} completions to judge, {different} different ones, by {len(config.judges)} judge(s):"]
    lines += [f"  {judge.title}" for judge in config.judges]
    lines += describe_thoughts(judged)
    if given.pairs:
        cells = ", ".join(f"{cell} {count}" for cell, count in cell_counts(given.pairs).items())
        lines.append(f"{len(given.pairs)} pairs (chosen-rejected): {cells}")
    lines += [f"rows rejected: {reason} {count}" for reason, count in given.reasons().items()]
    if config.ranker is not None:
        unjudged = [Verdict(completion.id, "", "safe") for completion in given.completions]
        most = "" if given.pairs else "at most "
        lines.append(f"{most}{len(given.compared(unjudged))} pairs of completions to rank by {config.ranker.title}")
    return [*lines, *(f"warning: {warning}" for warning in _warnings(config))]


def _warnings(config: LabelConfig) -> list[str]:
    """Return warnings about trained judges and a trained ranker with little training data."""
    asked = [*config.judges, *([] if config.ranker is None else [config.ranker])]
    return [warning for one in asked if one.format == "trained" for warning in trained_on_few(str(one.source))]


# ------------------------------------------------------------------------------------------------------- the input


def _read(config: LabelConfig, folder: RunFolder | None = None) -> _Input:
    if config.data is None:
        assert config.completions is not None  # the config has checked that one of the two is given
        if folder is not None:
            folder.add_data("completions", config.completions)
        read = read_completions(Path(config.completions), thinking=config.thinking)
        completions = [as_judged(one, keep_label=True) for one in read]
        if not completions:
            raise DataError.at(config.completions, None, "holds no completion; run `bfpo generate` first")
        _check_ids(config.completions, completions)
        return _Input(completions, [], [])
    if folder is not None:
        folder.add_data("data", config.data.files)
    result = load_pair_rows(config.data, seed=config.seed)
    if folder is not None and result.notes:
        folder.add_facts(**result.notes)
    pairs = result.pairs
    sides = [without_thought(as_judged(side), config.thinking) for pair in pairs for side in completions_of_pair(pair)]
    return _Input(sides, pairs, result.rejects)


def _check_ids(file: str, completions: Sequence[Completion]) -> None:
    seen: set[str] = set()
    for completion in completions:
        if completion.id in seen:
            raise DataError.at(file, None, f"two completions have the id {completion.id!r}; ids must differ")
        seen.add(completion.id)


# ---------------------------------------------------------------------------------------------------------- asking


def _ask_ranker(
    config: LabelConfig,
    pairs: Sequence[tuple[Completion, Completion]],
    cache: OpinionCache,
    budget: RequestBudget,
    tallies: dict[str, Tally],
) -> list[Comparison]:
    if config.ranker is None:
        return []
    with open_ranker(config.ranker, config.executor, budget, threads=config.threads) as ranker:
        tally = tallies[f"ranker {ranker.name}"] = Tally()
        with CountProgress(f"ranked by {ranker.name}", len(pairs), _log) as progress:
            return ask_ranker(ranker, pairs, cache, tally=tally, advance=progress.advance)


# -------------------------------------------------------------------------------------------------------- the output


def _write(
    config: LabelConfig,
    folder: RunFolder,
    given: _Input,
    judged: Sequence[Completion],
    votes: Votes,
    verdicts: Sequence[Verdict],
    readings: Sequence[Reading],
    comparisons: Sequence[Comparison],
    fits: list[JudgeFit],
) -> None:
    interval = {
        "confidence": config.confidence,
        "num_resamples": config.bootstrap_samples,
        "random_seed": config.seed,
    }
    labels = given.known_labels() if config.relabel else {}
    prompts = {side.id: normalised_prompt(side.prompt) for side in given.completions}
    of_pairs = [(row, prompts[row.first_id]) for row in comparisons] if given.pairs else []
    scores = agreement_scores(judged, votes, verdicts, labels, of_pairs, **interval)
    counts = count_verdicts(verdicts)
    if comparisons:
        counts["comparisons"] = len(comparisons)
        counts["comparisons_unscored"] = sum(row.first_is_better is None for row in comparisons)
    folder.write_jsonl(
        VERDICTS,
        (
            _verdict_row(completion, verdict, votes, n, read)
            for n, (completion, verdict, read) in enumerate(zip(judged, verdicts, readings, strict=True))
        ),
    )
    folder.write_jsonl(DISAGREEMENTS, disagreement_rows(judged, votes, verdicts, labels))
    if config.ranker is not None:
        folder.write_jsonl(COMPARISONS, comparisons)
    cells: dict[str, int] = {}
    if given.pairs:
        pairs = _labelled(given.pairs, verdicts, config)
        folder.write_jsonl(PAIRS, map(pair_row, pairs))
        folder.write_jsonl(REJECTS, ({"input": "data", **reject.as_row()} for reject in given.rejects))
        cells = cell_counts(pairs)
    elif config.ranker is not None:
        pairing = choose_pairs(
            given.completions,
            verdicts,
            comparisons,
            strategy=config.strategy,
            pairs_per_prompt=config.pairs_per_prompt,
            soft_labels=config.soft_labels,
            seed=config.seed,
            incoherent=_dropped(config, judged, readings),
        )
        folder.write_jsonl(PAIRS, map(pair_row, pairing.pairs))
        folder.add_facts(funnel=pairing.funnel, candidate_cells=pairing.candidate_cells)
        cells = pairing.cells
    folder.write_json("scores.json", ScoresFile(config.confidence, scores, judge_fit=fits or None))
    rejected = {"rows_rejected": given.reasons()} if given.pairs else {}
    folder.add_facts(labels={**counts, **({"cells": cells} if cells else {}), **rejected})
    sections = report_text(
        counts, cells, scores, folder.record["opinions"], folder.record["requests"], config.confidence
    )
    if fits:
        sections["Judges on these texts"] = fit_table(fits)
    warnings = _warnings(config)
    if config.soft_labels and (turned := soft_label_warning(verdicts)):
        warnings.append(turned)
    if warnings:
        sections = {"Warnings": "\n".join(f"- {warning}." for warning in warnings), **sections}
    folder.write_text("label.md", "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items()) + "\n")
    folder.write_card("Labels", sections)
    for warning in warnings:
        _log.warning("%s", warning)
    log_fit(fits)
    said = {name: counts[name] for name in ("verdicts", "safe", "unsafe", "unscored")}
    _log.info("%(verdicts)d verdicts: %(safe)d safe, %(unsafe)d unsafe, %(unscored)d unscored", said)
    if config.ranker is not None:
        _log.info("%s", _ordered(comparisons, sum(cells.values())))


def _ordered(comparisons: Sequence[Comparison], num_pairs: int) -> str:
    """Return the log line on the ranker's order."""
    unscored = sum(row.first_is_better is None for row in comparisons)
    ties = sum(row.first_is_better == 0.5 for row in comparisons)
    return (
        f"{len(comparisons) - unscored - ties} of {len(comparisons)} pairs of completions ordered, {ties} ties, "
        f"{unscored} unscored; {num_pairs} pairs in {PAIRS}"
    )


def _verdict_row(completion: Completion, verdict: Verdict, votes: Votes, place: int, read: Reading) -> VerdictRow:
    """Return a verdict together with its votes if there is more than one."""
    single = [asdict(vote) for given in votes.values() for vote in given[place]]
    several = [{key: value for key, value in vote.items() if key != "completion_id"} for vote in single]
    return VerdictRow(
        **asdict(verdict),
        kind=completion.kind,
        prompt=normalised_prompt(completion.prompt),
        finished=completion.finished,
        blocked=completion.blocked,
        votes=several if len(several) > 1 else None,
        incoherent=read.incoherent,
        nats_per_token=read.nats_per_token,
        category=completion.category,
    )


def _labelled(pairs: Sequence[Pair], verdicts: Sequence[Verdict], config: LabelConfig) -> list[Pair]:
    """Return the pairs with the labels that the verdicts give, in order."""
    found = {verdict.completion_id: label_of(verdict, soft=config.soft_labels) for verdict in verdicts}
    return [
        replace(
            pair,
            chosen_is_safe=found.get(f"{pair.id}:chosen", pair.chosen_is_safe),
            rejected_is_safe=found.get(f"{pair.id}:rejected", pair.rejected_is_safe),
        )
        for pair in pairs
    ]
