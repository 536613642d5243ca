"""A local causal LM that answers with a word: the probabilities of the words, from logits, and what it wrote."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LogitsProcessor

from bfpo.core.errors import ModelError
from bfpo.generation.sampling import Request, answer_batches, end_token_ids
from bfpo.judges.local import PromptEncoder, load_causal_lm, load_with_head

__all__ = ["MIN_MASS", "AnswerModel", "Labels", "WordAnswer", "label_tokens"]

MIN_MASS = 0.01
"""Below this total probability of all label words, the model was about to write something else: no verdict."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Token ids that begin the label words, by group, behind the tokens `shared` that all words begin with."""

    shared: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class WordAnswer:
    """What a model wrote, and the probabilities of the groups of label words where it came to the label.

    `masses` are of all the vocabulary, so they add up to less than 1; `None` where it never came to the label.
    """

    text: str
    masses: tuple[float, ...] | None


def label_tokens(encoder: PromptEncoder, before: str, groups: Sequence[Sequence[str]]) -> Labels:
    """Return the first tokens in which the groups of words differ, each word read right behind the text `before`.

    Spellings that this tokenizer cannot write there, or that begin with a space alone or as a word of another group
    does, are left out.
    Raises `ModelError` where a group is then empty.
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
    several = {token for number, first in enumerate(firsts) for token in first if _in_others(firsts, number, token)}
    # A space of its own begins any word at all.
    blank = {token for first in firsts for token in first if not encoder.decode([token]).strip()}
    found = [tuple(sorted(first - several - blank)) for first in firsts]
    if not all(found):
        raise ModelError(f"the tokenizer does not tell the words {[list(group) for group in groups]} apart")
    return Labels(tuple(shared), tuple(found))


def _ids_behind(encoder: PromptEncoder, before: str, word: str) -> list[int]:
    """Return the ids that the word has behind the text, which keeps its own; empty where there are none."""
    base, whole = encoder.pieces(before), encoder.pieces(before + word)
    if whole[: len(base)] == base:
        return whole[len(base) :]
    # Some tokenizers cut blank lines otherwise where a word follows; what has been asked stays as it was cut alone.
    ends = (whole[start:] for start in range(len(whole) - 1, -1, -1))
    return next((ids for ids in ends if encoder.decode(ids) == word), [])


def _in_others(firsts: Sequence[set[int]], number: int, token: int) -> bool:
    return any(token in other for place, other in enumerate(firsts) if place != number)


class _Recorder(LogitsProcessor):
    """Keeps, for each step and row, the probabilities of a few tokens: the logits of whole steps are too large."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the (N, V) logits as they are."""
        self._steps.append(scores.double().log_softmax(dim=-1)[:, self._tokens].exp().cpu())
        return scores

    def take(self) -> Tensor:
        """Return the (steps, N, tokens) probabilities of the last batch and forget them."""
        taken = torch.stack(self._steps)
        self._steps = []
        return taken


class AnswerModel:
    """A frozen causal LM that is asked in ids and answers with a word out of groups of label words.

    Batches are sorted by length and padded on the left; a row's numbers do not depend on them, up to the rounding of
    the forward pass.

    Raises `ModelError` for a model that cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None,
        dtype: str,
        batch_size: int,
        max_length: int,
        multimodal: bool = False,
    ) -> None:
        if multimodal:
            kind = "an image-text model"
            loaded = load_with_head(AutoModelForImageTextToText, model, revision=revision, dtype=dtype, kind=kind)
            self.model, self.tokenizer = loaded
        else:
            self.model, self.tokenizer = load_causal_lm(model, revision=revision, dtype=dtype)
        self.batch_size = batch_size
        self.max_length = max_length
        self._ends = end_token_ids(self.model, self.tokenizer)

    def room(self, max_new_tokens: int) -> int:
        """Return how many tokens a question may have: `max_length`, less where the model has fewer positions.

        Raises `ModelError` where the answer alone needs all positions of the model.
        """
        positions: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return self.max_length
        if positions <= max_new_tokens:
            raise ModelError(f"the model has {positions} positions; the answer alone may need {max_new_tokens}")
        return min(self.max_length, positions - max_new_tokens)

    def answer(
        self, rows: Sequence[Sequence[int]], labels: Labels, encoder: PromptEncoder, *, before: str | None, limit: int
    ) -> list[WordAnswer]:
        """Return the answers to rows of ids, in order.

        `before`: the text right before the label where the model writes that itself, greedily, in `limit` tokens with
        what follows. `None` where the rows end with it: then one forward pass is all.
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
            processors=[recorder],
        )
        for batch in batches:
            probabilities = recorder.take()
            for place, answer in enumerate(batch):
                step = 0 if before is None else _label_step(encoder, answer.token_ids, before, labels.shared)
                masses = None if step is None else _group_masses(probabilities, step, place, labels)
                answers[int(answer.id)] = WordAnswer(encoder.decode(answer.token_ids), masses)
        return [answer for answer in answers if answer is not None]


def _label_step(encoder: PromptEncoder, ids: Sequence[int], before: str, shared: Sequence[int]) -> int | None:
    """Return the step whose token begins to tell the label: right after `before`, `None` where it was not written."""
    wanted = before.lower()
    if wanted not in encoder.decode(ids).lower():
        return None
    # Whether a beginning of the answer holds the text is monotone in its length.
    step: int = bisect_left(range(len(ids)), True, key=lambda num: wanted in encoder.decode(ids[:num]).lower())
    return step + len(shared) if list(ids[step : step + len(shared)]) == list(shared) else None


def _group_masses(probabilities: Tensor, step: int, place: int, labels: Labels) -> tuple[float, ...] | None:
    if step >= len(probabilities):
        return None
    values = iter(probabilities[step, place].tolist())
    return tuple(sum(next(values) for _ in group) for group in labels.groups)
