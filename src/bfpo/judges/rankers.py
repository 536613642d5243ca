"""Rankers on local models: which of two completions is more helpful, by reward, PairRM or a generative judge."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

from bfpo.core.errors import ModelError
from bfpo.core.schema import Comparison, Completion, Message
from bfpo.judges.answers import MIN_MASS, AnswerModel, Labels, WordAnswer, label_tokens
from bfpo.judges.classifier import classifier_logits, classifier_row, load_classifier, room, row_length
from bfpo.judges.formats import PAIR_FORMATS, PairFormat
from bfpo.judges.formats.types import question
from bfpo.judges.local import (
    PromptEncoder,
    fitting,
    load_with_head,
    num_embeddings_of,
    pad_right,
    tokenizer_key,
    version_of,
)
from bfpo.judges.settings import LocalRankerSpec
from bfpo.policy.batches import batches_by_length

__all__ = ["GenerativeRanker", "PairRM", "PairRanker", "RewardRanker"]

Duel = tuple[Completion, Completion]
TextKey = tuple[tuple[Message, ...], str]
AnswerT = TypeVar("AnswerT")
_PREFIXES = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")


class RewardRanker:
    """Ranks by any sequence-classification reward model with one output: p = sigmoid(r1 - r2) (Bradley and Terry).

    The model's chat template renders the conversation with the completion as its last turn; a model without a template
    gets prompt and completion as a pair. Each completion is scored once, however many pairs contain it. A pair with a
    completion longer than `max_length` tokens (by default 4096) is unscored, never cut.

    Raises `ModelError` for a model that cannot be loaded or has more than one output.
    """

    def __init__(self, spec: LocalRankerSpec) -> None:
        model = spec.model or "Skywork/Skywork-Reward-V2-Qwen3-0.6B"
        self.name = spec.name or "reward"
        self._batch_size = spec.batch_size
        self._model, self._tokenizer = load_classifier(model, spec, kind="a reward model")
        if self._model.config.num_labels != 1:
            raise ModelError(f"model: {model!r} has {self._model.config.num_labels} outputs; a reward model has one")
        self._tokenizer_key = tokenizer_key(self._tokenizer)
        self._room = room(self._model, spec.max_length or 4096)
        size = num_embeddings_of(self._model)
        self._variables = {"chat_template_kwargs": spec.chat_template_kwargs} if spec.chat_template_kwargs else {}
        self._encoder = (
            PromptEncoder(self._tokenizer, variables=spec.chat_template_kwargs, num_embeddings=size)
            if self._tokenizer.chat_template
            else None
        )

    @cached_property
    def version(self) -> str:
        """Return a digest of weights, tokenizer and the settings that change comparisons."""
        return version_of("reward-1", self._model, self._tokenizer_key, max_length=self._room, **self._variables)

    def compare(self, pairs: Sequence[Duel]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        texts = {(one.prompt, one.text): one for pair in pairs for one in pair}
        rows, reasons = fitting(texts, self._row, self._room, length=row_length)
        logits = classifier_logits(self._model, self._tokenizer, list(rows.values()), self._batch_size)
        rewards = {key: float(row[0]) for key, row in zip(rows, logits, strict=True)}
        return [self._comparison(pair, rewards, reasons) for pair in pairs]

    def _row(self, completion: Completion) -> dict[str, list[int]]:
        if self._encoder is None:
            return classifier_row(self._tokenizer, question(completion.prompt), completion.text)
        return {"input_ids": self._encoder.ids([completion], _conversation, generation=False)}

    def _comparison(self, pair: Duel, rewards: dict[TextKey, float], reasons: dict[TextKey, str]) -> Comparison:
        ids, keys = (pair[0].id, pair[1].id), [(one.prompt, one.text) for one in pair]
        if reason := next((reasons[key] for key in keys if key in reasons), None):
            return Comparison(*ids, self.name, None, reason=reason)
        one, two = (rewards[key] for key in keys)
        if not math.isfinite(one - two):
            return Comparison(*ids, self.name, None, reason="the rewards are not finite")
        return Comparison(*ids, self.name, sigmoid(one - two), raw=f"{one:.6g} {two:.6g}")


def _conversation(completion: Completion) -> tuple[Message, ...]:
    return (*completion.prompt, Message("assistant", completion.text))


def sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)) for any finite value."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


class _BothOrdersRanker(ABC, Generic[AnswerT]):
    """Asks about each pair in both orders; the mean of both cancels a preference for a position."""

    name: str
    _room: int
    _num_forced = 0  # tokens that are appended to each row

    @abstractmethod
    def _row(self, first: Completion, second: Completion) -> list[int]:
        """Return the ids that ask about two completions in this order; raises `DataError`."""

    @abstractmethod
    def _answer(self, rows: list[list[int]]) -> list[AnswerT]:
        """Return the model's answer to each row, in order."""

    @abstractmethod
    def _comparison(self, pair: Duel, as_given: AnswerT, swapped: AnswerT) -> Comparison:
        """Return the comparison that follows from the answers to both orders."""

    def compare(self, pairs: Sequence[Duel]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        rows, reasons = fitting(
            dict(enumerate(pairs)),
            lambda pair: [self._row(*pair), self._row(*pair[::-1])],
            self._room,
            length=lambda both: max(map(len, both)) + self._num_forced,
        )
        answers = self._answer([row for both in rows.values() for row in both])
        found = dict(zip(rows, zip(answers[::2], answers[1::2], strict=True), strict=True))
        return [
            self._comparison(pair, *found[n]) if n in found else self._unscored(pair, reasons[n])
            for n, pair in enumerate(pairs)
        ]

    def _unscored(self, pair: Duel, reason: str, raw: str = "") -> Comparison:
        return Comparison(pair[0].id, pair[1].id, self.name, None, reason=reason, raw=raw)


class GenerativeRanker(_BothOrdersRanker[WordAnswer]):
    """Ranks by a local causal LM that is asked for a letter, in both orders; it needs no training.

    The probability of an order is that of its letter among both letters at the first token of the answer; the result is
    the mean of both orders. A pair whose prompt is longer than `max_length` tokens (by default 8192) is unscored.

    Raises `ModelError` for a model that cannot be loaded or whose tokenizer does not distinguish the letters.
    """

    def __init__(self, spec: LocalRankerSpec, format: PairFormat = PAIR_FORMATS["helpfulness"]) -> None:
        assert spec.model is not None  # checked by the spec
        self.format, self.name = format, spec.name or format.name
        self._answers = AnswerModel(spec.model, spec, max_length=spec.max_length or 8192)
        self._room = self._answers.room(1)
        self._tokenizer_key = tokenizer_key(self._answers.tokenizer)
        self._encoder = PromptEncoder(
            self._answers.tokenizer,
            template_arguments=self.format.template_arguments,
            variables=spec.chat_template_kwargs,
            num_embeddings=num_embeddings_of(self._answers.model),
        )
        self._variables = {"chat_template_kwargs": spec.chat_template_kwargs} if spec.chat_template_kwargs else {}
        self._labels = self._find_labels()
        self._num_forced = len(self._labels.shared)

    def _find_labels(self) -> Labels:
        probe = Completion("probe", (Message("user", "bfpoprobe"),), "bfpoprobe")
        asked = self.format.ask(probe, probe)
        end = self._encoder.render(asked).rpartition(asked[-1].content[-16:])[2]
        return label_tokens(self._encoder, end, [self.format.first_words, self.format.second_words])

    @cached_property
    def version(self) -> str:
        """Return the format's version with a digest of weights, tokenizer and the settings that change comparisons."""
        return version_of(
            self.format.version,
            self._answers.model,
            self._tokenizer_key,
            max_length=self._room,
            min_mass=MIN_MASS,
            **self._variables,
        )

    def _row(self, first: Completion, second: Completion) -> list[int]:
        return self._encoder.ids((first, second), self.format.ask)

    def _answer(self, rows: list[list[int]]) -> list[WordAnswer]:
        return self._answers.answer(rows, self._labels, self._encoder, before=None, limit=1)

    def _comparison(self, pair: Duel, as_given: WordAnswer, swapped: WordAnswer) -> Comparison:
        raw = f"{as_given.text} {swapped.text}"
        shares = []
        for answer in (as_given, swapped):
            masses = answer.masses or (0.0, 0.0)
            if not sum(masses) >= MIN_MASS:
                reason = f"the letters have {sum(masses):.2g} of the probability; {MIN_MASS} is needed"
                return self._unscored(pair, reason, raw)
            shares.append(masses[0] / sum(masses))
        return Comparison(pair[0].id, pair[1].id, self.name, (shares[0] + 1 - shares[1]) / 2, raw=raw)


class PairRM(DebertaV2PreTrainedModel):
    """DeBERTa-v2 with PairRM's head, with the parameter names of the published weights.

    The hidden states of the three prefix tokens represent prompt and candidates; the head scores each candidate with
    the prompt, and the difference of the scores, averaged over tasks, is the logit that the first is better.
    """

    config_class = DebertaV2Config
    base_model_prefix = "pretrained_model"

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        size, num_tasks = config.hidden_size, getattr(config, "n_tasks", 1)
        self.pretrained_model = DebertaV2Model(config)
        # Two modules are dropout in training; the identities keep the numbers in the parameter names.
        self.head_layer = nn.Sequential(
            nn.Identity(), nn.Linear(2 * size, size), nn.Tanh(), nn.Identity(), nn.Linear(size, num_tasks)
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the (N,) logits that the first candidate is better; each row holds each prefix token once."""
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, first, second = (hidden[input_ids == getattr(self.config, name)] for name in _PREFIXES)
        scores = [self.head_layer(torch.cat([source, candidate], dim=-1)) for candidate in (first, second)]
        logits: Tensor = (scores[0] - scores[1]).mean(dim=-1)
        return logits


class PairRanker(_BothOrdersRanker[float]):
    """Ranks by PairRM; the probability is the mean over both orders of the candidates.

    A row is `[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> first [SEP] [CLS] <|candidate2|> second [SEP]`. A pair
    longer than `max_length` tokens (by default 2048) is unscored; the published code cuts it.

    Raises `ModelError` for a model that cannot be loaded or has no ids of the prefix tokens.
    """

    def __init__(self, spec: LocalRankerSpec) -> None:
        model = spec.model or "llm-blender/PairRM-hf"
        self.name = spec.name or "pairrm"
        self._batch_size = spec.batch_size
        self._room = spec.max_length or 2048
        self._model, self._tokenizer = load_with_head(
            PairRM, model, spec, dtype="float32", kind="a PairRM ranker on DeBERTa-v2"
        )
        prefixes = [getattr(self._model.config, name, None) for name in _PREFIXES]
        ends = [self._tokenizer.cls_token_id, self._tokenizer.sep_token_id]
        if len(set(prefixes)) != 3 or not all(isinstance(token, int) for token in (*prefixes, *ends)):
            raise ModelError(f"model: {model!r} lacks the ids {', '.join(_PREFIXES)}, cls or sep; they are needed")
        self._prefixes: list[int] = [int(token) for token in prefixes if token is not None]
        self._cls, self._sep = (int(token) for token in ends)
        self._tokenizer_key = tokenizer_key(self._tokenizer)
        names = [str(self._tokenizer.convert_ids_to_tokens(token)) for token in self._prefixes]
        self._encoder = PromptEncoder(self._tokenizer, markers=names)

    @cached_property
    def version(self) -> str:
        """Return a digest of weights, tokenizer and the settings that change comparisons."""
        return version_of("pairrm-1", self._model, self._tokenizer_key, max_length=self._room)

    def _row(self, first: Completion, second: Completion) -> list[int]:
        parts = [self._encoder.plain(text) for text in (question(first.prompt), first.text, second.text)]
        pieces = zip(self._prefixes, parts, strict=True)
        return [token for prefix, part in pieces for token in (self._cls, prefix, *part, self._sep)]

    def _answer(self, rows: list[list[int]]) -> list[float]:
        logits = [0.0] * len(rows)
        for batch in batches_by_length([len(row) for row in rows], self._batch_size):
            inputs: dict[str, Any] = pad_right(self._model, self._tokenizer, [rows[place] for place in batch])
            with torch.no_grad():
                found = self._model(**inputs).cpu().double().tolist()
            for place, logit in zip(batch, found, strict=True):
                logits[place] = logit
        return logits

    def _comparison(self, pair: Duel, as_given: float, swapped: float) -> Comparison:
        mean = (sigmoid(as_given) + sigmoid(-swapped)) / 2
        if math.isnan(mean):
            return self._unscored(pair, "the model's logits are not finite")
        return Comparison(pair[0].id, pair[1].id, self.name, mean)
