"""Rankers: which of two completions is more helpful, by the oracle, a reward model or a generative judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.schema import Comparison, Completion, Message
from bfpo.judges.answers import MIN_MASS, AnswerModel, Labels, WordAnswer, label_tokens
from bfpo.judges.classifier import classifier_logits, classifier_row, room
from bfpo.judges.formats import PAIR_FORMATS, PairFormat
from bfpo.judges.formats.types import question
from bfpo.judges.local import (
    PromptEncoder,
    batches_by_length,
    check_settings,
    load_with_head,
    pad_right,
    tokenizer_key,
    too_long,
    version_of,
)
from bfpo.world.oracle import assess

__all__ = [
    "GenerativeRanker",
    "OracleRanker",
    "PairRM",
    "PairRanker",
    "RewardRanker",
]


class OracleRanker:
    """The exact order of the closed world; equal helpfulness is a tie, 0.5."""

    name = "oracle"
    version = "oracle-ranker-1"

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, in order; prompts that are not of the world, or differ, are unscored."""
        return [self._compare(first, second) for first, second in pairs]

    def _compare(self, first: Completion, second: Completion) -> Comparison:
        prompt = first.prompt
        if prompt == second.prompt and len(prompt) == 1 and prompt[0].role == "user":
            one, two = assess(prompt[0].content, first.text), assess(prompt[0].content, second.text)
            if one is not None and two is not None:
                better = (1 + (one.helpful > two.helpful) - (one.helpful < two.helpful)) / 2
                return Comparison(first.id, second.id, self.name, better)
        return Comparison(first.id, second.id, self.name, None, reason="the prompt is not one of the closed world")


class RewardRanker:
    """Ranks by any sequence-classification reward model with one output: p = sigmoid(r1 - r2) (Bradley and Terry).

    The model's chat template renders the conversation with the completion as its last turn, once; a model without a
    template gets prompt and completion as a pair. Each completion is scored once, in whatever pairs it stands. What is
    longer than `max_length` tokens is not cut: its pair is unscored.

    Raises `SettingError` for a setting outside its range and `ModelError` for a model that cannot be loaded or has more
    than one output.
    """

    def __init__(
        self,
        *,
        model: str | Path = "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        max_length: int = 4096,
        name: str = "reward",
    ) -> None:
        check_settings(batch_size=batch_size, max_length=max_length)
        self.name = name
        self._batch_size = batch_size
        self._model, self._tokenizer = load_with_head(
            AutoModelForSequenceClassification, model, revision=revision, dtype=dtype, kind="a reward model"
        )
        if self._model.config.num_labels != 1:
            raise ModelError(
                f"model: {str(model)!r} has {self._model.config.num_labels} outputs; a reward model has one"
            )
        self._tokenizer_key = tokenizer_key(self._tokenizer)
        self._room = room(self._model, max_length)
        self._encoder = PromptEncoder(self._tokenizer) if self._tokenizer.chat_template else None

    @cached_property
    def version(self) -> str:
        """Return a digest of weights, tokenizer and the settings that change comparisons."""
        return version_of("reward-1", self._model, self._tokenizer_key, max_length=self._room)

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        rows: dict[tuple[object, str], dict[str, list[int]]] = {}
        reasons: dict[tuple[object, str], str] = {}
        for completion in {(c.prompt, c.text): c for pair in pairs for c in pair}.values():
            row = self._row(completion)
            if isinstance(row, str):
                reasons[completion.prompt, completion.text] = row
            else:
                rows[completion.prompt, completion.text] = row
        logits = classifier_logits(self._model, self._tokenizer, list(rows.values()), self._batch_size)
        rewards = {key: float(row[0]) for key, row in zip(rows, logits, strict=True)}
        return [self._comparison(pair, rewards, reasons) for pair in pairs]

    def _row(self, completion: Completion) -> dict[str, list[int]] | str:
        """Return the row of one completion, or why it has none."""
        try:
            if self._encoder is None:
                row = classifier_row(self._tokenizer, question(completion.prompt), completion.text)
            else:
                row = {"input_ids": self._encoder.ids([completion], _conversation, generation=False)}
        except DataError as error:
            return str(error)
        length = len(row["input_ids"])
        return too_long(self._room) if length > self._room else row

    def _comparison(
        self,
        pair: tuple[Completion, Completion],
        rewards: dict[tuple[object, str], float],
        reasons: dict[tuple[object, str], str],
    ) -> Comparison:
        first, second = pair
        keys = [(completion.prompt, completion.text) for completion in pair]
        reason = next((reasons[key] for key in keys if key in reasons), None)
        if reason is not None:
            return Comparison(first.id, second.id, self.name, None, reason=reason)
        one, two = (rewards[key] for key in keys)
        if not math.isfinite(one - two):
            return Comparison(first.id, second.id, self.name, None, reason="the rewards are not finite")
        return Comparison(first.id, second.id, self.name, sigmoid(one - two), raw=f"{one:.6g} {two:.6g}")


def _conversation(completion: Completion) -> tuple[Message, ...]:
    return (*completion.prompt, Message("assistant", completion.text))


def sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)) for any finite value."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


class GenerativeRanker:
    """Ranks by a local causal LM that is asked for a letter, in both orders; no training for it is needed.

    The probability of an order is that of its letter among both, at the first token of the answer; the result is the
    mean of both orders, so that a preference for a place cancels. `format`: a name of `PAIR_FORMATS` or a format.

    Raises `SettingError` for an unknown format or a setting outside its range, and `ModelError` for a model that cannot
    be loaded or whose tokenizer does not tell the letters apart.
    """

    def __init__(
        self,
        format: str | PairFormat = "helpfulness",
        *,
        model: str | Path,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        max_length: int = 8192,
        name: str | None = None,
    ) -> None:
        check_settings(batch_size=batch_size, max_length=max_length)
        if isinstance(format, str) and format not in PAIR_FORMATS:
            raise SettingError(f"format: got {format!r}; allowed: {', '.join(PAIR_FORMATS)}")
        self.format = PAIR_FORMATS[format] if isinstance(format, str) else format
        self.name = name or self.format.name
        self._answers = AnswerModel(model, revision=revision, dtype=dtype, batch_size=batch_size, max_length=max_length)
        self._room = self._answers.room(1)
        self._tokenizer_key = tokenizer_key(self._answers.tokenizer)
        self._encoder = PromptEncoder(self._answers.tokenizer, template_arguments=self.format.template_arguments)
        self._labels = self._find_labels()

    def _find_labels(self) -> Labels:
        probe = Completion("probe", (Message("user", "bfpoprobe"),), "bfpoprobe")
        asked = self.format.ask(probe, probe)
        text = self._encoder.render(asked)
        end = text.rpartition(asked[-1].content[-16:])[2]
        return label_tokens(self._encoder, end, [self.format.first_words, self.format.second_words])

    @cached_property
    def version(self) -> str:
        """Return the format's version with a digest of weights, tokenizer and the settings that change comparisons."""
        return version_of(
            self.format.version, self._answers.model, self._tokenizer_key, max_length=self._room, min_mass=MIN_MASS
        )

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        reasons: dict[int, str] = {}
        rows: list[list[int]] = []
        asked: list[int] = []
        for number, (first, second) in enumerate(pairs):
            try:
                both = [self._encoder.ids(order, self.format.ask) for order in ((first, second), (second, first))]
            except DataError as error:
                reasons[number] = str(error)
                continue
            length = max(map(len, both)) + len(self._labels.shared)
            if length > self._room:
                reasons[number] = too_long(self._room)
                continue
            rows += both
            asked.append(number)
        answers = self._answers.answer(rows, self._labels, self._encoder, before=None, limit=1)
        scored = dict(zip(asked, zip(answers[::2], answers[1::2], strict=True), strict=True))
        return [
            self._comparison(pair, scored[number]) if number in scored else self._unscored(pair, reasons[number])
            for number, pair in enumerate(pairs)
        ]

    def _unscored(self, pair: tuple[Completion, Completion], reason: str, raw: str = "") -> Comparison:
        return Comparison(pair[0].id, pair[1].id, self.name, None, reason=reason, raw=raw)

    def _comparison(self, pair: tuple[Completion, Completion], answers: tuple[WordAnswer, WordAnswer]) -> Comparison:
        raw = f"{answers[0].text} {answers[1].text}"
        shares = []
        for answer in answers:
            masses = answer.masses or (0.0, 0.0)
            if not sum(masses) >= MIN_MASS:
                reason = f"the letters have {sum(masses):.2g} of the probability; {MIN_MASS} is needed"
                return self._unscored(pair, reason, raw)
            shares.append(masses[0] / sum(masses))
        return Comparison(pair[0].id, pair[1].id, self.name, (shares[0] + 1 - shares[1]) / 2, raw=raw)


_PREFIXES = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")


class PairRM(DebertaV2PreTrainedModel):  # type: ignore[no-untyped-call]
    """DeBERTa-v2 with PairRM's head, under the names that its published weights have.

    The hidden states of the three prefix tokens stand for prompt and candidates; the head scores each candidate beside
    the prompt, and the difference of the scores, averaged over tasks, is the logit that the first is better.
    """

    config_class = DebertaV2Config
    base_model_prefix = "pretrained_model"

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        size, num_tasks = config.hidden_size, getattr(config, "n_tasks", 1)
        self.pretrained_model = DebertaV2Model(config)
        # Two places are dropout in training; they keep the numbers in the names of the weights.
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


class PairRanker:
    """Ranks by PairRM; the probability is the mean over both orders of the candidates.

    A row is `[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> first [SEP] [CLS] <|candidate2|> second [SEP]`. Where
    it is longer than `max_length` tokens the pair is unscored (the published code cuts).

    Raises `SettingError` for a setting outside its range and `ModelError` for a model that cannot be loaded or names no
    prefix tokens.
    """

    def __init__(
        self,
        *,
        model: str | Path = "llm-blender/PairRM-hf",
        revision: str | None = None,
        dtype: str = "float32",
        batch_size: int = 8,
        max_length: int = 2048,
        name: str = "pairrm",
    ) -> None:
        check_settings(batch_size=batch_size, max_length=max_length)
        self.name = name
        self._batch_size = batch_size
        self._max_length = max_length
        self._model, self._tokenizer = load_with_head(
            PairRM, model, revision=revision, dtype=dtype, kind="a PairRM ranker on DeBERTa-v2"
        )
        prefixes = [getattr(self._model.config, name, None) for name in _PREFIXES]
        ends = [self._tokenizer.cls_token_id, self._tokenizer.sep_token_id]
        if len(set(prefixes)) != 3 or not all(isinstance(token, int) for token in (*prefixes, *ends)):
            raise ModelError(f"model: {str(model)!r} lacks the ids {', '.join(_PREFIXES)}, cls or sep; they are needed")
        self._prefixes: list[int] = [int(token) for token in prefixes if token is not None]
        self._cls, self._sep = (int(token) for token in ends)
        self._tokenizer_key = tokenizer_key(self._tokenizer)
        names = [str(self._tokenizer.convert_ids_to_tokens(token)) for token in self._prefixes]
        self._encoder = PromptEncoder(self._tokenizer, markers=names)

    @cached_property
    def version(self) -> str:
        """Return a digest of weights, tokenizer and the settings that change comparisons."""
        return version_of("pairrm-1", self._model, self._tokenizer_key, max_length=self._max_length)

    def compare(self, pairs: Sequence[tuple[Completion, Completion]]) -> list[Comparison]:
        """Return the comparisons, one per pair of completions, in order."""
        rows: list[list[int]] = []
        asked: list[int] = []
        reasons: dict[int, str] = {}
        for number, (first, second) in enumerate(pairs):
            try:
                parts = [self._encoder.plain(text) for text in (question(first.prompt), first.text, second.text)]
            except DataError as error:
                reasons[number] = str(error)
                continue
            length = sum(map(len, parts)) + 9  # prefix, [CLS] and [SEP] of each
            if length > self._max_length:
                reasons[number] = too_long(self._max_length)
                continue
            rows += [self._row(*parts), self._row(parts[0], parts[2], parts[1])]
            asked.append(number)
        logits = self._logits(rows)
        means = {
            number: (sigmoid(logits[2 * place]) + sigmoid(-logits[2 * place + 1])) / 2
            for place, number in enumerate(asked)
        }
        return [self._comparison(pair, means.get(number), reasons.get(number, "")) for number, pair in enumerate(pairs)]

    def _row(self, *parts: list[int]) -> list[int]:
        pieces = zip(self._prefixes, parts, strict=True)
        return [token for prefix, part in pieces for token in (self._cls, prefix, *part, self._sep)]

    def _logits(self, rows: Sequence[Sequence[int]]) -> list[float]:
        logits = [0.0] * len(rows)
        for batch in batches_by_length(rows, self._batch_size):
            inputs: dict[str, Any] = pad_right(self._model, self._tokenizer, [rows[place] for place in batch])
            with torch.no_grad():
                found = self._model(**inputs).cpu().double().tolist()
            for place, logit in zip(batch, found, strict=True):
                logits[place] = logit
        return logits

    def _comparison(self, pair: tuple[Completion, Completion], mean: float | None, reason: str) -> Comparison:
        if mean is not None and mean != mean:
            mean, reason = None, "the model's logits are not finite"
        return Comparison(pair[0].id, pair[1].id, self.name, mean, reason=reason)
