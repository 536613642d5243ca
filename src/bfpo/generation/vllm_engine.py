"""The engine of vLLM (extra `vllm`): the same prompts in tokens as with transformers, batched by vLLM itself."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from bfpo.core.errors import MissingExtraError, ModelError
from bfpo.generation.engines import Made, Report, Task, completion_seed, decode

__all__ = ["VllmEngine"]

_TASKS_PER_CALL = 256  # vLLM batches within a call; what a call has made is kept


class VllmEngine:
    """A model that vLLM loads (`vllm.LLM`) at the first use, with room for the longest of its tasks.

    The text is decoded from the tokens up to the first of `eos_token_ids`, as with transformers. Each completion is
    drawn with its own seed; other draws than those of transformers, and the same again only on the same machine.

    Raises `MissingExtraError` without vLLM.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        eos_token_ids: Collection[int],
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._vllm = _import_vllm()
        self._model, self._revision, self._dtype = model, revision, dtype
        self._tokenizer, self._ends = tokenizer, frozenset(eos_token_ids)
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self._temperature, self._top_p = temperature, top_p

    def complete(self, tasks: Sequence[Task], report: Report) -> None:
        """Make the completions, some hundred a call; raises `ModelError` for a model that vLLM refuses to load."""
        llm = self._load(max(len(task.prompt_ids) for task in tasks) + self._max_new_tokens)
        for start in range(0, len(tasks), _TASKS_PER_CALL):
            batch = tasks[start : start + _TASKS_PER_CALL]
            prompts = [self._vllm.TokensPrompt(prompt_token_ids=list(task.prompt_ids)) for task in batch]
            outputs = llm.generate(prompts, [self._sampling_of(task) for task in batch], use_tqdm=False)
            report([self._made(task, output.outputs[0]) for task, output in zip(batch, outputs, strict=True)])

    def _load(self, length: int) -> Any:
        try:
            return self._vllm.LLM(model=self._model, revision=self._revision, dtype=self._dtype, max_model_len=length)
        except (ValueError, OSError, RuntimeError) as error:
            said = " ".join(str(error).split())[:400]
            raise ModelError(f"model: vLLM cannot load {self._model} for {length} tokens: {said}") from error

    def _sampling_of(self, task: Task) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            seed=completion_seed(self._seed, task.id),
            temperature=self._temperature,
            top_p=self._top_p,
            max_tokens=self._max_new_tokens,
            stop_token_ids=sorted(self._ends),
            skip_special_tokens=False,
        )

    def _made(self, task: Task, output: Any) -> Made:
        ids = list(output.token_ids)
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        return Made(task.id, decode(self._tokenizer, ids[:end]), end is not None, len(ids[:end]))


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # read at import; nothing is reported
    try:
        import vllm
    except ImportError as error:
        raise MissingExtraError(
            "engine 'vllm' needs the package vllm; install it with: pip install 'bfpo[vllm]' (it needs a GPU)"
        ) from error
    return vllm
