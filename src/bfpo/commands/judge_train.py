"""STAGE: completions labelled by people -> a small judge of safety that runs offline; or pairs -> a ranker."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.config import JudgeTrainConfig
from bfpo.config.judges import ClassifierTrainConfig, NgramTrainConfig, RankerTrainConfig
from bfpo.core.console import show
from bfpo.core.schema import Completion, Pair, Verdict
from bfpo.data.labelled import LabelledResult, load_labelled
from bfpo.data.labels import LabelWords
from bfpo.data.read import read_pairs
from bfpo.data.rejects import check_rejects, describe_rejects
from bfpo.data.split import normalised_prompt
from bfpo.data.thinking import describe_thoughts, without_thought
from bfpo.judges.fit import fit_facts
from bfpo.judges.ngrams import NgramSettings, few_rows, fit_ngrams, fit_ranker, save_described, write_rows
from bfpo.judges.quality import judge_quality
from bfpo.policy.devices import use_threads
from bfpo.runs.folder import RunFolder
from bfpo.stats import rate_interval

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)

JUDGE = "model"


def run(config: JudgeTrainConfig, folder: RunFolder) -> None:
    """Write the judge into `model/`: `judge.json` and its weights as safetensors, for use as `judge: DIR/model`.

    For n-grams, a cross-validation by prompt is written into `judge.json` and shown: the quality on unseen prompts.
    Raises `DataError` for unusable data or labels that are all the same.
    """
    if not folder.is_writer:
        return
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
    title, measured = "Training", ""
    if isinstance(config, NgramTrainConfig):
        found = _train_ngrams(config, loaded.completions, folder, facts)
        title, measured = "Cross-validation by prompt", f"on unseen prompts ({config.folds} folds): "
    else:
        assert isinstance(config, ClassifierTrainConfig)  # the only other kind
        found = _train_classifier(config, loaded.completions, folder, facts)
    write_rows(folder.path / JUDGE, loaded.completions)
    folder.add_facts(judge={**facts["trained_on"], **found})
    warned = _warn(config, facts["trained_on"])
    folder.write_card(f"Judge {config.name}", {**warned, "Trained on": facts["trained_on"], title: found})
    if shown := _shown(found):
        show(measured + shown)
    show(f"the judge: {folder.path / JUDGE}; use it as --set judge={folder.path / JUDGE}")


def _train_ngrams(
    config: NgramTrainConfig, completions: Sequence[Completion], folder: RunFolder, facts: dict[str, Any]
) -> dict[str, Any]:
    scores = _cross_validation(config, completions)
    judge = fit_ngrams(completions, [row.is_safe == 1 for row in completions], _settings(config), name=config.name)
    judge.save(folder.folder(JUDGE), {**facts, "cross_validation": scores})
    return scores


def _train_classifier(
    config: ClassifierTrainConfig, completions: Sequence[Completion], folder: RunFolder, facts: dict[str, Any]
) -> dict[str, Any]:
    from bfpo.judges.classifier import classifier_trainer
    from bfpo.training.session import train_in_folder

    names = ("revision", "max_length", "learning_rate", "num_train_epochs", "batch_size", "logging_steps", "save_steps")
    trainer, left_out = classifier_trainer(
        completions,
        folder.folder("checkpoints"),
        model=config.model,
        seed=config.seed,
        **{name: getattr(config, name) for name in names},
    )
    if left_out:
        show(f"left out: {left_out} completions, longer than {config.max_length} tokens with their prompt")
    metrics = train_in_folder(
        trainer, folder, title="judge-train", shown={"loss": "loss"}, evaluates=False, save_total_limit=1
    )
    settings = {"threshold": config.threshold, "max_length": config.max_length}
    save_described(folder.path / JUDGE, {"kind": "classifier", "name": config.name, "settings": settings, **facts})
    return {"left_out_as_too_long": left_out, "train_loss": metrics.get("train_loss")}


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
    check_rejects(result, bad_rows=config.data.bad_rows)
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
    if isinstance(config, RankerTrainConfig):
        return settings
    return replace(settings, with_prompt=config.with_prompt, threshold=config.threshold)


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


def _cross_validation(config: NgramTrainConfig, rows: Sequence[Completion]) -> dict[str, float | int | str | None]:
    """Return the judge's quality on unseen prompts, or why it is not measured if there are too few."""
    from sklearn.model_selection import StratifiedGroupKFold

    labels = [row.is_safe == 1 for row in rows]
    groups = [normalised_prompt(row.prompt) or row.id for row in rows]
    per_label = [len({group for group, label in zip(groups, labels, strict=True) if label == kind}) for kind in (0, 1)]
    if min(per_label) < config.folds:
        return {"not_done": f"{min(per_label)} prompts of the rarer label, fewer than {config.folds} folds"}
    verdicts: dict[int, Verdict] = {}
    fits: list[dict[str, float]] = []
    folds = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed)
    for train, test in folds.split(rows, labels, groups):
        judge = fit_ngrams([rows[n] for n in train], [labels[n] for n in train], _settings(config))
        held_out = [rows[n] for n in test]
        verdicts.update(zip(test.tolist(), judge.judge(held_out), strict=True))
        fits.append(fit_facts(judge, held_out, [verdicts[n] for n in test.tolist()]))
    scores = judge_quality([verdicts[n] for n in range(len(rows))], labels, groups, num_resamples=100)
    fit = {name: float(np.mean([one[name] for one in fits])) for name in fits[0]}
    return {"folds": config.folds, **{score.metric: score.value for score in scores}, **fit}
