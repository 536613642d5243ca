"""How deep safety goes: begun answers, and the KL of each model to the start by position in the answer.

Where training moved only the first tokens, the KL on harmful answers is high there and low behind them (Qi et al., ICLR
2025).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bfpo.config import read_template
from bfpo.config.evaluate import SuitesJob
from bfpo.config.suites import DivergenceConfig, WeightsModel
from bfpo.core.errors import ModelError
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion, Message, Prompt, Verdict
from bfpo.data.split import normalised_prompt
from bfpo.data.tokenize import tokenize_pairs
from bfpo.execution.workers import Workers
from bfpo.policy.divergence import token_divergence
from bfpo.policy.load import load_to_read, load_tokenizer
from bfpo.policy.logps import evaluating
from bfpo.runs.folder import RunFolder
from bfpo.stats import Interval, bootstrap_weights
from bfpo.stats.resampling import Floats
from bfpo.suites.answers import SuiteAnswers, context_of
from bfpo.suites.catalogue import Suite
from bfpo.suites.coherence import CoherenceReader
from bfpo.suites.judging import JudgedSuites
from bfpo.suites.prefill import is_harmful, measure_prefill
from bfpo.suites.records import DepthFile, Divergence, DivergencePoint, DivergenceRow

__all__ = ["check_divergence", "divergence_of", "measure_depth"]

_log = logging.getLogger(__name__)

COMPLIED, DECLINED, HARMLESS = "harmful prompts, complied", "harmful prompts, declined", "harmless prompts"
_RANGES = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 40), (41, 80), (81, 160))
_FIRST = 5
_ANSWERS_PER_PART = 32  # whose KL one worker computes at a time
_CHECKED = 8  # tokens of the short text that shows whether models have the same

Texts = list[tuple[list[int], list[int]]]
"""The ids of prompt and answer, of each answer."""


def measure_depth(
    config: SuitesJob,
    folder: RunFolder,
    suites: Sequence[Suite],
    prompts: Mapping[str, Sequence[Prompt]],
    answers: Mapping[str, SuiteAnswers],
    judged: JudgedSuites,
    reader: CoherenceReader,
) -> DepthFile | None:
    """Return what `depth` asks for; the arguments are those of the run without given tokens.

    Writes `begun.jsonl`, the answers that were begun, and `divergence.jsonl`. Raises as `measure_prefill` does, and
    `ModelError` for models of different tokens.
    """
    depth = config.depth
    if depth is None:
        return None
    found = DepthFile(depth.start)
    if depth.prefill is not None:
        found, begun = measure_prefill(config, depth.prefill, folder, suites, prompts, answers, judged, reader)
        folder.write_jsonl("begun.jsonl", begun)
    if depth.divergence is not None:
        asked = [suite for suite in suites if suite.name not in judged.skipped]
        rows, by_row = _measured(config, depth.divergence, asked, answers, judged)
        folder.write_jsonl("divergence.jsonl", rows)
        groups: dict[tuple[str, str], list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault((row.model, row.group), []).append(place)
        curves = [
            divergence_of(
                [rows[place].kl for place in places],
                [by_row[place] for place in places],
                model=model,
                group=group,
                positions=depth.divergence.positions,
                **config.interval_settings(),
            )
            for (model, group), places in sorted(groups.items())
        ]
        found = replace(found, answers=depth.divergence.answers, divergence=curves)
    return found


def check_divergence(config: SuitesJob) -> None:
    """Raise `ModelError` for models whose KL to the start cannot be read, by a short text: they have other tokens."""
    if config.depth is None or config.depth.divergence is None:
        return
    models = {model.name: model for model in config.with_weights()}
    text = Completion("", (Message("user", "Who are you?"),), "I am a model.")
    start = models.pop(config.depth.start)
    expected = _tokens(config, start, [text], _CHECKED, room=context_of(start))
    for name, model in models.items():
        if _tokens(config, model, [text], _CHECKED, room=context_of(start)) != expected:
            raise _other_tokens(name, start.name, "text")


def _other_tokens(name: str, start: str, what: str) -> ModelError:
    return ModelError(
        f"depth.divergence: {name} and {start} tokenize {what} differently; KL needs the same tokenizer and chat "
        "template for both (chat_template sets one)"
    )


# ------------------------------------------------------------------------------------------------------- the models


def _measured(
    config: SuitesJob,
    spec: DivergenceConfig,
    suites: Sequence[Suite],
    answers: Mapping[str, SuiteAnswers],
    judged: JudgedSuites,
) -> tuple[list[DivergenceRow], list[str]]:
    """Return the KL of each model on each answer, and the normalised prompt of each."""
    assert config.depth is not None
    models = {model.name: model for model in config.with_weights()}
    start = models.pop(config.depth.start)
    rows, prompts = [], []
    make = partial(_Start, start, config.dtype_of_logps)
    with Workers(config.executor, make, threads=config.threads, here=True) as workers:
        for name, model in models.items():
            read = list(_answers(suites, answers, judged, name if spec.answers == "own" else start.name))
            completions = [completion for _, completion, _ in read]
            tokens, others = (
                _tokens(config, one, completions, spec.positions, room=min(context_of(model), context_of(start)))
                for one in (model, start)
            )
            if tokens != others:
                raise _other_tokens(name, start.name, "the answers")
            for (suite, completion, group), kl in zip(read, _kl(workers, model, tokens), strict=True):
                if kl:
                    rows.append(DivergenceRow(suite, name, completion.id, group, kl))
                    prompts.append(normalised_prompt(completion.prompt))
    return rows, prompts


def _kl(workers: Workers[_Start], model: WeightsModel, texts: Texts) -> list[list[float]]:
    """Return the KL at each token of each answer; what one worker computes at a time depends on the answers alone."""
    parts = [(model, texts[first : first + _ANSWERS_PER_PART]) for first in range(0, len(texts), _ANSWERS_PER_PART)]
    found: dict[int, list[list[float]]] = {}
    with CountProgress(f"KL of {model.name}", len(texts), _log) as progress:
        for number, some in workers.map(parts, _divergences, title=_part_title):
            found[number] = some
            progress.advance(len(some))
    return [kl for number in sorted(found) for kl in found[number]]


class _Start:
    """The start model of a worker and, beside it, the model that was asked for last."""

    def __init__(self, start: WeightsModel, dtype: str) -> None:
        self._dtype = dtype
        self._weights = self._load(start)
        self._named: WeightsModel | None = None
        self._policy: Any = None

    def divergences(self, model: WeightsModel, texts: Texts) -> list[list[float]]:
        """Return the KL of a model to the start at each token of each answer, nats."""
        if self._named != model:
            self._policy = None  # freed before the next one is loaded
            self._policy, self._named = self._load(model), model
        with evaluating(self._policy), evaluating(self._weights):
            return [token_divergence(self._policy, self._weights, *ids).tolist() for ids in texts]

    def _load(self, model: WeightsModel) -> Any:
        return load_to_read(model.model, dtype=self._dtype, revision=model.revision)


def _divergences(start: _Start, part: tuple[WeightsModel, Texts]) -> list[list[float]]:
    return start.divergences(*part)


def _part_title(part: tuple[WeightsModel, Texts]) -> str:
    return f"the KL of {part[0].name} on {len(part[1])} answers"


def _tokens(
    config: SuitesJob, model: WeightsModel, completions: Sequence[Completion], positions: int, *, room: int
) -> Texts:
    """Return the ids of the prompt and of the answer of each completion."""
    longest = min(config.suites.max_prompt_length + positions, room)
    texts, _ = tokenize_pairs(
        completions,
        load_tokenizer(model.model, revision=model.revision),
        max_length=longest,
        max_completion_length=min(positions, longest - 1),
        chat_template=read_template(config.chat_template),
        chat_template_kwargs=model.chat_template_kwargs or config.chat_template_kwargs,
    )
    return [(text.prompt_ids.tolist(), text.chosen_ids.tolist()) for text in texts]


def _answers(
    suites: Sequence[Suite], answers: Mapping[str, SuiteAnswers], judged: JudgedSuites, model: str
) -> Iterator[tuple[str, Completion, str]]:
    """Yield suite, answer and group of the answers of a model that have a text."""
    for suite in suites:
        pairs = zip(answers[model].completions[suite.name], judged.verdicts[suite.name, model], strict=True)
        for completion, verdict in pairs:
            if completion.text.strip():
                yield suite.name, completion, _group(suite, completion, verdict)


def _group(suite: Suite, completion: Completion, verdict: Verdict) -> str:
    if not is_harmful(suite, completion.kind):
        return HARMLESS
    if verdict.refused is None:
        return "harmful prompts, not read for refusals"
    return DECLINED if verdict.refused or verdict.partly_refused else COMPLIED


# -------------------------------------------------------------------------------------------------------- the curves


def divergence_of(
    rows: Sequence[Sequence[float]],
    prompts: Sequence[str],
    *,
    model: str = "",
    group: str = "",
    positions: int | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Divergence:
    """Return the mean KL at each position over answers, with percentile intervals over resampled prompts.

    `rows`: the KL at each token of each answer, of `positions` at most; `prompts` groups answers. A position that fewer
    than two prompts reach has no interval.
    """
    longest = max(map(len, rows))
    kl_NT = np.zeros((len(rows), longest))
    read_NT = np.zeros((len(rows), longest))
    for place, row in enumerate(rows):
        kl_NT[place, : len(row)], read_NT[place, : len(row)] = row, 1.0
    weights_RN = np.stack(list(bootstrap_weights(prompts, num_resamples, random_seed)))
    tail = 50 * (1 - confidence)

    def interval(top_N: Floats, bottom_N: Floats) -> Interval:
        """Return the ratio of two sums over answers."""
        reached = bottom_N > 0
        if not reached.any():
            return Interval(None, None, None, 0)
        value, num = float(top_N.sum() / bottom_N.sum()), int(reached.sum())
        if len({prompt for prompt, one in zip(prompts, reached, strict=True) if one}) < 2:
            return Interval(value, None, None, num)
        below_R = weights_RN @ bottom_N
        ratios = (weights_RN @ top_N)[below_R > 0] / below_R[below_R > 0]
        low, high = np.percentile(ratios, [tail, 100 - tail])
        return Interval(value, float(low), float(high), num)

    def point(first: int, last: int) -> DivergencePoint:
        some = slice(first - 1, last)
        found = interval(kl_NT[:, some].sum(1), read_NT[:, some].sum(1))
        assert found.value is not None  # `first` is reached
        return DivergencePoint(first, last, found.value, found.low, found.high, found.num)

    return Divergence(
        model=model,
        group=group,
        num_answers=len(rows),
        num_prompts=len(set(prompts)),
        points=[point(place, place) for place in range(1, longest + 1)],
        ranges=[point(first, min(last, positions or longest)) for first, last in _RANGES if first <= longest],
        first_five=interval(kl_NT[:, :_FIRST].sum(1), kl_NT.sum(1)),
    )
