"""A local causal LM that answers with a label word: the words' probabilities, from logits, and its text."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from bfpo.core.errors import ModelError
from bfpo.generation.sampling import Request, answer_batches, end_token_ids
from bfpo.judges.formats.types import thought_of_judge
from bfpo.judges.local import PromptEncoder, freeze, load_with_head
from bfpo.judges.settings import LocalSpec
from bfpo.policy.load import load_policy
from bfpo.policy.source import num_positions

__all__ = ["MIN_MASS", "AnswerModel", "Labels", "WordAnswer", "label_tokens"]

MIN_MASS = 0.01
"""Least total probability of all label words for a verdict; below it, the model would write something else."""


@dataclass(frozen=True, slots=True)
class Labels:
    """First token ids of the label words by group, after the tokens `shared`, with which all words begin."""

    shared: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class WordAnswer:
    """A model's text and the probabilities of the groups of label words at the label's position.

    `masses` are over the whole vocabulary, so their sum is below 1; `None` if the text never reached the label.
    """

    text: str
    masses: tuple[float, ...] | None


def label_tokens(encoder: PromptEncoder, before: str, groups: Sequence[Sequence[str]]) -> Labels:
    """Return the first tokens in which the groups of words differ, each word directly after the text `before`.

    Left out are spellings that this tokenizer cannot produce there, that begin with a separate space, or that share
    their first token with another group. Raises `ModelError` if this leaves a group empty.
    """
    words = [[_ids_behind(encoder, before, word) for word in group] for group in groups]
    shared: list[int] = []
    while True:
        firsts = [{word[0] for word in group if word} for group in words]
        common = set.intersection(*firsts) if all(firsts) else set()
        if len(common) != 1 or any(first != common for first in firsts):
            break
        shared += common
        words = [[word[1:] for word in group] for group in words]
    several = {token for first in firsts for token in first if sum(token in other for other in firsts) > 1}
    # A separate space can begin any word.
    blank = {token for first in firsts for token in first if not encoder.decode([token]).strip()}
    found = [tuple(sorted(first - several - blank)) for first in firsts]
    if not all(found):
        raise ModelError(f"the tokenizer does not distinguish the words {[list(group) for group in groups]}")
    return Labels(tuple(shared), tuple(found))


def _ids_behind(encoder: PromptEncoder, before: str, word: str) -> list[int]:
    """Return the ids of a word after a text whose own ids stay the same; empty if there are none."""
    base, whole = encoder.pieces(before), encoder.pieces(before + word)
    if whole[: len(base)] == base:
        return whole[len(base) :]
    # Some tokenizers split blank lines differently before a word; the question keeps the ids that it has alone.
    ends = (whole[start:] for start in range(len(whole) - 1, -1, -1))
    return next((ids for ids in ends if encoder.decode(ids) == word), [])


class _Recorder:
    """Records the probabilities of a few tokens at each step of each answer; all logits would take too much memory."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._steps: dict[str, list[Tensor]] = defaultdict(list)

    def __call__(self, scores: Tensor, places: Sequence[tuple[str, int]]) -> None:
        """Read (N, V) logits of the requests that `places` names."""
        probabilities = scores.double().log_softmax(dim=-1)[:, self._tokens].exp().cpu()
        for (name, _), row in zip(places, probabilities, strict=True):
            self._steps[name].append(row)

    def take(self, name: str) -> Tensor:
        """Return the (steps, tokens) probabilities of an answer and forget them."""
        return torch.stack(self._steps.pop(name))


class AnswerModel:
    """A frozen causal LM that answers prompts in token ids with a word out of groups of label words.

    A row's probabilities do not depend on the others, up to the rounding of the forward pass. What all rows begin with,
    such as a guard's list of categories, is computed once where the model allows it.

    Raises `ModelError` for a model that cannot be loaded.
    """

    def __init__(self, model: str | Path, spec: LocalSpec, *, max_length: int, multimodal: bool = False) -> None:
        if multimodal:
            loaded = load_with_head(AutoModelForImageTextToText, model, spec, kind="an image-text model")
            self.model, self.tokenizer = loaded
        else:
            policy = load_policy(model, revision=spec.revision, dtype=spec.dtype or "auto")
            self.model, self.tokenizer = freeze(policy.model), policy.tokenizer
        self.batch_size = spec.batch_size
        self.max_length = max_length
        self._ends = end_token_ids(self.model, self.tokenizer)

    def room(self, max_new_tokens: int) -> int:
        """Return the longest prompt in tokens: `max_length`, or less if the model has fewer positions.

        Raises `ModelError` if the answer alone needs all positions of the model.
        """
        positions = num_positions(self.model.config)
        if positions is None:
            return self.max_length
        if positions <= max_new_tokens:
            raise ModelError(f"the model has {positions} positions; the answer alone may need {max_new_tokens}")
        return min(self.max_length, positions - max_new_tokens)

    def answer(
        self, rows: Sequence[Sequence[int]], labels: Labels, encoder: PromptEncoder, *, before: str | None, limit: int
    ) -> list[WordAnswer]:
        """Return the answers to rows of ids, in order.

        `before`: the text directly before the label if the model generates it, greedily, within `limit` tokens in all;
        `None` if the rows end with it, so that one forward pass is enough.
        """
        tokens = [token for group in labels.groups for token in group]
        recorder = _Recorder(tokens)
        forced = () if before is not None else labels.shared
        requests = [Request(str(number), (*row, *forced)) for number, row in enumerate(rows)]
        answers: list[WordAnswer | None] = [None] * len(rows)
        batches = answer_batches(
            self.model,
            requests,
            eos_token_ids=self._ends,
            max_new_tokens=1 if before is None else limit,
            batch_size=self.batch_size,
            temperature=0.0,
            watch=recorder,
        )
        for batch in batches:
            for answer in batch:
                probabilities = recorder.take(answer.id)
                step = 0 if before is None else _label_step(encoder, answer.token_ids, before, labels.shared)
                masses = None if step is None else _group_masses(probabilities, step, labels)
                answers[int(answer.id)] = WordAnswer(encoder.decode(answer.token_ids), masses)
        return [answer for answer in answers if answer is not None]


def _label_step(encoder: PromptEncoder, ids: Sequence[int], before: str, shared: Sequence[int]) -> int | None:
    """Return the step of the first token that decides the label, after `before`; `None` if that was not written.

    What a guard writes in its thoughts decides nothing.
    """
    text, wanted = encoder.decode(ids), before.lower()
    thought = thought_of_judge(text)
    start = 0 if thought is None else max(0, thought.start - len(wanted))  # the text may be the mark that ends them
    if wanted not in text.lower()[start:]:
        return None
    # Whether a prefix of the answer contains the text is monotone in its length.
    step: int = bisect_left(range(len(ids)), True, key=lambda num: wanted in encoder.decode(ids[:num]).lower()[start:])
    return step + len(shared) if list(ids[step : step + len(shared)]) == list(shared) else None


def _group_masses(probabilities: Tensor, step: int, labels: Labels) -> tuple[float, ...] | None:
    if step >= len(probabilities):
        return None
    values = iter(probabilities[step].tolist())
    return tuple(sum(next(values) for _ in group) for group in labels.groups)
