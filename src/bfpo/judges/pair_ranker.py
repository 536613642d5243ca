"""PairRM: a pairwise ranker on DeBERTa-v2, with a head of our own in place of the package that brought it.

Jiang, Ren and Lin 2023 (arXiv:2306.02561); weights of `llm-blender/PairRM-hf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

from bfpo.core.errors import DataError, ModelError
from bfpo.core.schema import Comparison, Completion
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
from bfpo.judges.rankers import sigmoid

__all__ = ["PairRM", "PairRanker"]

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
