"""STAGE: completions labelled by people -> a small judge of safety that runs offline; or pairs -> a ranker."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.config import JudgeTrainConfig
from bfpo.config.judges import ClassifierTrainConfig, NgramTrainConfig, ProbeTrainConfig, RankerTrainConfig
from bfpo.core.console import show
from bfpo.core.errors import DataError
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion, Pair, Verdict
from bfpo.data.labelled import LabelledResult, load_labelled
from bfpo.data.labels import LabelWords
from bfpo.data.read import read_pairs
from bfpo.data.rejects import check_rejects, describe_rejects
from bfpo.data.split import normalised_prompt
from bfpo.data.thinking import describe_thoughts, without_thought
from bfpo.judges.fit import fit_facts
from bfpo.judges.ngrams import NgramSettings, few_rows, fit_ngrams, fit_ranker, save_described, write_rows
from bfpo.judges.out_of_fold import (
    Floats,
    Predict,
    labels_of,
    ngram_prediction,
    out_of_fold,
    probe_features,
    probe_prediction,
    prompts_of,
    too_few,
)
from bfpo.judges.quality import best_threshold, judge_quality
from bfpo.policy.devices import use_threads
from bfpo.runs.folder import RunFolder
from bfpo.stats import rate_interval

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)

JUDGE = "model"


def run(config: JudgeTrainConfig, folder: RunFolder) -> None:
    """Write the judge into `model/`: `judge.json` and its weights as safetensors, for use as `judge: DIR/model`.

    A cross-validation by prompt (of a classifier, rows of held-out prompts) is written into `judge.json` and shown: the
    quality on unseen prompts. A threshold of null, and the layer of a probe, are chosen on these rows; for the figures
    they are chosen on the other folds. Answers are cut to `max_answer_words` first.
    Raises `DataError` for unusable data or labels that are all the same.
    """
    use_threads(config.threads)
    folder.add_data("data", config.data.files)
    if isinstance(config, RankerTrainConfig):
        _train_ranker(config, folder)
        return
    loaded = load_labelled(config.data)
    if loaded.notes:
        folder.add_facts(**loaded.notes)
    show("\n".join(_described(loaded)))
    facts: dict[str, Any] = {"trained_on": _counts(loaded), "data": folder.record["data"]["data"]}
    assert isinstance(config, NgramTrainConfig | ProbeTrainConfig | ClassifierTrainConfig)  # the only other kinds
    rows = [_cut(one, config.max_answer_words) for one in loaded.completions]
    title, measured = "Cross-validation by prompt", "on unseen prompts: "
    if isinstance(config, NgramTrainConfig):
        found = _train_ngrams(config, rows, folder, facts)
    elif isinstance(config, ProbeTrainConfig):
        found = _train_probe(config, rows, folder, facts)
    else:
        title, (found, rows) = "Training", _train_classifier(config, rows, folder, facts)
    used = {one.id for one in rows}
    write_rows(folder.path / JUDGE, [*rows, *(one for one in loaded.completions if one.id in used)])
    folder.add_facts(judge={**facts["trained_on"], **found})
    warned = _warn(config, facts["trained_on"])
    folder.write_card(f"Judge {config.name}", {**warned, "Trained on": facts["trained_on"], title: found})
    if shown := _shown(found):
        show(measured + shown)
    show(f"the judge: {folder.path / JUDGE}; use it as --set judge={folder.path / JUDGE}")


def _cut(completion: Completion, max_words: int | None) -> Completion:
    """Return a completion with the first `max_words` words of its answer, all of them for `None`."""
    begun = None if max_words is None else re.match(rf"\s*\S+(?:\s+\S+){{{max_words - 1}}}", completion.text)
    return completion if begun is None else replace(completion, text=begun.group())


def _train_ngrams(
    config: NgramTrainConfig, rows: Sequence[Completion], folder: RunFolder, facts: dict[str, Any]
) -> dict[str, Any]:
    labels = labels_of(rows)
    unseen: list[float] = []
    settings = _settings(config)
    predict = ngram_prediction(rows, settings, balanced=config.balanced, unseen=unseen)
    scores, _, threshold = _cross_validation(config, rows, predict)
    if unseen:
        scores["unseen"] = float(np.mean(unseen))
    settings = replace(settings, threshold=threshold)
    judge = fit_ngrams(rows, labels.tolist(), settings, name=config.name, balanced=config.balanced)
    judge.save(folder.folder(JUDGE), {**facts, "cross_validation": scores})
    return scores


def _train_probe(
    config: ProbeTrainConfig, rows: Sequence[Completion], folder: RunFolder, facts: dict[str, Any]
) -> dict[str, Any]:
    from bfpo.judges.hidden import fit_probe, save_probe

    place = Path(config.model)
    model: dict[str, Any] = {
        "model": str(place.resolve()) if place.is_dir() else config.model,
        "revision": config.revision,
        "dtype": config.dtype,
    }
    folder.kept = "hidden states so far are in the cache"
    read = probe_features(
        rows,
        **model,
        max_length=config.max_length,
        batch_size=config.batch_size,
        layer=config.layer,
        feature_cache=config.feature_cache,
    )
    for reason, count in read.left_out.items():
        show(f"left out: {count} completions, {reason}")
    rows = [rows[number] for number in read.places]
    labels = labels_of(rows)
    keys: dict[str, Any] = {"inverse_penalty": config.inverse_penalty, "balanced": config.balanced}
    with CountProgress("layers fitted, of all folds", config.folds * len(read.layers), _log) as progress:
        predict = probe_prediction(read, labels, **keys, advance=progress.advance)
        scores, place_of_best, threshold = _cross_validation(config, rows, predict)
    layer = read.layers[place_of_best]
    weights, intercept = fit_probe(read.features[:, layer], labels, **keys)
    described = {"name": config.name, **model, "model_key": read.key, "layer": layer, **facts}
    settings = {"threshold": threshold, "max_length": config.max_length}
    scores = {"layer": layer, **scores}
    save_probe(
        folder.folder(JUDGE), weights, intercept, {**described, "settings": settings, "cross_validation": scores}
    )
    left_out = sum(read.left_out.values())
    return {**scores, "left_out": left_out} if left_out else scores


def _train_classifier(
    config: ClassifierTrainConfig, rows: list[Completion], folder: RunFolder, facts: dict[str, Any]
) -> tuple[dict[str, Any], list[Completion]]:
    """Return what was found, and the rows that it was trained on: those that are not held out."""
    from bfpo.judges.classifier import classifier_trainer, load_finetuned
    from bfpo.training.session import CHECKPOINTS, train_in_folder

    rows, held_out = _held_out(config, rows)
    names = ["revision", "max_length", "learning_rate", "num_train_epochs", "batch_size", "logging_steps", "save_steps"]
    names += ["dtype", "trainable", "windows", "max_steps", "balanced", "seed"]
    trainer, left_out = classifier_trainer(
        rows,
        folder.folder(CHECKPOINTS),
        model=config.model,
        lora=None if config.lora is None else config.lora.model_dump(),
        **{name: getattr(config, name) for name in names},
    )
    if left_out:
        show(f"left out: {left_out} completions, longer than {config.max_length} tokens with their prompt")
    metrics = train_in_folder(
        trainer, folder, title="judge-train", shown={"loss": "loss"}, evaluates=False, save_total_limit=1
    )
    found = {"left_out_as_too_long": left_out, "train_loss": metrics.get("train_loss")}
    settings: dict[str, Any] = {"threshold": config.threshold or 0.5, "max_length": config.max_length}
    settings |= {"windows": True} if config.windows else {}
    described = {"kind": "classifier", "name": config.name, "settings": settings, **facts}
    if held_out:
        judge = load_finetuned(folder.path / JUDGE, described)
        p = np.array([np.nan if v.p_safe is None else v.p_safe for v in judge.judge(held_out)])
        if config.threshold is None:
            settings["threshold"] = best_threshold(p[~np.isnan(p)], labels_of(held_out)[~np.isnan(p)])
        scores = _measured(held_out, p, np.full(len(p), settings["threshold"]))
        described["held_out"] = {"rows": len(held_out), **scores}
        found |= {"rows_held_out": len(held_out), **scores}
    save_described(folder.path / JUDGE, described)
    shutil.rmtree(folder.path / CHECKPOINTS, ignore_errors=True)
    return found, rows


def _held_out(config: ClassifierTrainConfig, rows: list[Completion]) -> tuple[list[Completion], list[Completion]]:
    """Return the rows to train on and those of the held-out prompts; none if a part would lack a label."""
    from sklearn.model_selection import GroupShuffleSplit

    groups = prompts_of(rows)
    if not config.held_out or len(set(groups)) < 2:
        return rows, []
    split = GroupShuffleSplit(1, test_size=config.held_out, random_state=config.seed)
    ((train, test),) = split.split(rows, groups=groups)
    if min(len(set(labels_of(rows)[part].tolist())) for part in (train, test)) < 2:
        _log.warning("held_out: too few prompts to hold some out with both labels; the judge is not measured")
        return rows, []
    return [rows[n] for n in train], [rows[n] for n in test]


def _train_ranker(config: RankerTrainConfig, folder: RunFolder) -> None:
    pairs, lines = _pairs(config)
    show("\n".join(lines))
    facts = {"pairs": len(pairs), "prompts": len({normalised_prompt(pair.prompt) for pair in pairs})}
    found = _order_on_unseen_prompts(config, pairs)
    ranker = fit_ranker(pairs, _settings(config), name=config.name)
    ranker.save(
        folder.folder(JUDGE), {"trained_on": facts, "data": folder.record["data"]["data"], "cross_validation": found}
    )
    folder.add_facts(ranker={**facts, **found})
    warned = _warn(config, facts)
    folder.write_card(f"Ranker {config.name}", {**warned, "Trained on": facts, "Cross-validation by prompt": found})
    if shown := _shown(found):
        show(f"people's order, on unseen prompts ({config.folds} folds): {shown}")
    show(f"the ranker: {folder.path / JUDGE}; use it as --set ranker={folder.path / JUDGE}")


def _shown(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items() if isinstance(value, float))


def _warn(config: JudgeTrainConfig, trained_on: dict[str, int]) -> dict[str, str]:
    """Log a warning if training has few rows, and return it as a section of the card."""
    warnings = few_rows(config.name, trained_on)
    for warning in warnings:
        _log.warning("%s", warning)
    return {"Warnings": "\n".join(f"- {warning}." for warning in warnings)} if warnings else {}


def _pairs(config: RankerTrainConfig) -> tuple[list[Pair], list[str]]:
    data = config.data
    labels = LabelWords.of(data.safe_values, data.unsafe_values)
    result = read_pairs([Path(file) for file in data.files], columns=data.columns, labels=labels)
    check_rejects(result, bad_rows=data.bad_rows, files=data.files)
    sides = [_answer(pair, text, config) for pair in result.pairs for text in (pair.chosen, pair.rejected)]
    pairs = [
        replace(pair, chosen=chosen.text, rejected=rejected.text)
        for pair, chosen, rejected in zip(result.pairs, sides[::2], sides[1::2], strict=True)
        if chosen.text and rejected.text
    ]
    prompts = len({normalised_prompt(pair.prompt) for pair in pairs})
    lines = [f"{len(pairs)} pairs of {prompts} prompts, the chosen one more helpful"]
    lines += describe_thoughts(sides)
    if result.rejects:
        lines.append(describe_rejects(result.rejects, rows=result.rows))
    if len(pairs) < len(result.pairs):
        lines.append(f"left out: {len(result.pairs) - len(pairs)} pairs with no answer behind the thoughts of a side")
    return pairs, lines


def _answer(pair: Pair, text: str, config: RankerTrainConfig) -> Completion:
    return without_thought(Completion(pair.id, pair.prompt, text), config.data.thinking)


def _order_on_unseen_prompts(config: RankerTrainConfig, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return how often the ranker puts the chosen completion first on unseen prompts, with an interval."""
    from sklearn.model_selection import StratifiedGroupKFold

    groups = [normalised_prompt(pair.prompt) for pair in pairs]
    if len(set(groups)) < config.folds:
        return {"not_done": f"{len(set(groups))} prompts, fewer than {config.folds} folds"}
    hits: dict[int, float] = {}
    # One stratum: older versions shuffle groups in this class only.
    folds = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed)
    for train, test in folds.split(pairs, [1] * len(pairs), groups):
        ranker = fit_ranker([pairs[n] for n in train], _settings(config))
        held_out = [pairs[n] for n in test]
        sides = [(Completion(p.id, p.prompt, p.chosen), Completion(p.id, p.prompt, p.rejected)) for p in held_out]
        for n, comparison in zip(test.tolist(), ranker.compare(sides), strict=True):
            if (better := comparison.first_is_better) is not None:
                hits[n] = 1.0 if better > 0.5 else 0.5 if better == 0.5 else 0.0
    interval = rate_interval(list(hits.values()), [groups[n] for n in hits])
    bounds = {"agreement": interval.value, "low": interval.low, "high": interval.high}
    return {"folds": config.folds, **bounds, "unscored": len(pairs) - len(hits)}


def preview(config: JudgeTrainConfig) -> list[str]:
    """Return what the judge would be trained on."""
    if isinstance(config, RankerTrainConfig):
        return [*_pairs(config)[1], f"kind: {config.kind}"]
    return [*_described(load_labelled(config.data)), f"kind: {config.kind}"]


def _settings(config: NgramTrainConfig | RankerTrainConfig) -> NgramSettings:
    settings = NgramSettings((config.ngrams[0], config.ngrams[1]), config.num_features, config.inverse_penalty)
    return settings if isinstance(config, RankerTrainConfig) else replace(settings, with_prompt=config.with_prompt)


def _counts(loaded: LabelledResult) -> dict[str, int]:
    safe = sum(row.is_safe == 1 for row in loaded.completions)
    return {
        "completions": len(loaded.completions),
        "safe": safe,
        "unsafe": len(loaded.completions) - safe,
        "prompts": len({normalised_prompt(row.prompt) for row in loaded.completions}),
        "rows_rejected": len(loaded.rejects),
        **loaded.left_out,
    }


def _described(loaded: LabelledResult) -> list[str]:
    counts = _counts(loaded)
    lines = [
        f"{counts['completions']} labelled completions of {counts['prompts']} prompts: {counts['safe']} safe, "
        f"{counts['unsafe']} unsafe",
        *(f"left out: {count} rows, {reason}" for reason, count in loaded.left_out.items()),
    ]
    lines += describe_thoughts(loaded.completions)
    if loaded.rejects:
        lines.append(describe_rejects(loaded.rejects, rows=counts["completions"] + len(loaded.rejects)))
    return lines


def _cross_validation(
    config: NgramTrainConfig | ProbeTrainConfig,
    rows: Sequence[Completion],
    predict: Predict,
) -> tuple[dict[str, Any], int, float]:
    """Return the quality on unseen prompts (or why they are too few), the best candidate, and the threshold."""
    if reason := too_few(rows, config.folds):
        if config.threshold is None or (isinstance(config, ProbeTrainConfig) and config.layer is None):
            raise DataError(f"folds: {reason}; give threshold and layer, fewer folds, or more prompts")
        return {"not_done": reason}, 0, config.threshold
    found = out_of_fold(rows, predict, folds=config.folds, seed=config.seed, threshold=config.threshold)
    scores = {"folds": config.folds, **_measured(rows, found.p, found.thresholds)}
    return scores, found.candidate, found.threshold


def _measured(rows: Sequence[Completion], p: Floats, thresholds: Floats) -> dict[str, Any]:
    """Return the quality of p(safe), which is NaN for an unscored row, against the labels of rows, and their fit."""
    verdicts = [
        Verdict(row.id, "", "unscored" if np.isnan(one) else "safe" if one > least else "unsafe", p_safe=value)
        for row, one, least in zip(rows, p.tolist(), thresholds.tolist(), strict=True)
        for value in [None if np.isnan(one) else one]
    ]
    scores = judge_quality(verdicts, labels_of(rows).tolist(), prompts_of(rows), num_resamples=100)
    return {**{score.metric: score.value for score in scores}, **fit_facts(None, rows, verdicts)}
