"""What makes completions: the protocol that engines share, and the engine of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bfpo.core.schema import Message
from bfpo.generation.sampling import Request, answer_batches

__all__ = ["Engine", "Made", "Report", "Task", "TransformersEngine", "completion_seed", "decode"]


@dataclass(frozen=True, slots=True)
class Task:
    """One completion to make; `prompt_ids` are the rendered prompt, empty for an engine that renders it itself."""

    id: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Made:
    """A completion that was made; `num_tokens` is `None` where the engine does not tell."""

    id: str
    text: str
    finished: bool
    num_tokens: int | None


Report = Callable[[Sequence[Made]], None]
"""Takes completions as they are made, in any order."""


class Engine(Protocol):
    """Makes completions of a model."""

    def complete(self, tasks: Sequence[Task], report: Report) -> None:
        """Make the completions and report each one once; what is reported counts, whatever becomes of the others."""


class TransformersEngine:
    """A model loaded here that answers in padded batches, as `answer_batches` does with `settings`.

    Its `generate_batch` (continuous batching) is not used: it takes no logits processors of ours, so that the draws of
    a completion would depend on what is generated beside it.
    """

    def __init__(self, model: Any, tokenizer: Any, eos_token_ids: Collection[int], **settings: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._eos_token_ids, self._settings = eos_token_ids, settings

    def complete(self, tasks: Sequence[Task], report: Report) -> None:
        """Make the completions, longest prompts first, and report each batch; raises as `answer_batches` does."""
        requests = [Request(task.id, task.prompt_ids) for task in tasks]
        for batch in answer_batches(self._model, requests, eos_token_ids=self._eos_token_ids, **self._settings):
            report(
                [
                    Made(answer.id, decode(self._tokenizer, answer.token_ids), answer.finished, len(answer.token_ids))
                    for answer in batch
                ]
            )


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return the text of an answer, special tokens in its middle included: nothing that was written is hidden."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def completion_seed(seed: int, completion_id: str) -> int:
    """Return a completion's own seed, from the run's seed and its id alone; 31 bits, which every engine takes."""
    digest = hashlib.sha256(f"{seed}\0{completion_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
