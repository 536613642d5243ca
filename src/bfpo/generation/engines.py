"""Engines that make completions (transformers, a server, vLLM), their protocol, and the file of partial results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from bfpo.core.errors import MissingExtraError, ModelError, ServerError
from bfpo.core.processes import release_memory
from bfpo.core.records import OPTIONAL, as_json
from bfpo.core.schema import Message, canonical_json, from_canonical
from bfpo.data.messages import ends_with_assistant, without_empty_end
from bfpo.generation.refill import Work
from bfpo.generation.replies import Answer
from bfpo.generation.sampling import Request, answer_batches
from bfpo.generation.server import Question, Server
from bfpo.policy.trained import require_whole

__all__ = [
    "Engine",
    "Made",
    "Report",
    "ServerEngine",
    "Task",
    "TransformersEngine",
    "VllmEngine",
    "append_made",
    "completion_seed",
    "decode",
    "read_made",
]


_HALF = "\ufffd"  # what the bytes of a part of a character decode to
_CONTEXT = 32  # tokens of a text that is continued


@dataclass(frozen=True, slots=True)
class Task:
    """One completion to make; `prompt_ids` are the rendered prompt, empty for an engine that renders prompts itself.

    `tools` as in `Prompt`.
    """

    id: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...] = ()
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """A finished task; `num_tokens` is `None` if the engine does not report it, the rest as in `Completion`."""

    id: str
    text: str
    finished: bool
    num_tokens: int | None
    reasoning: str = field(default="", metadata=OPTIONAL)
    blocked: str = field(default="", metadata=OPTIONAL)
    extra: str = field(default="", metadata=OPTIONAL)


Report = Callable[[Sequence[Made]], None]
"""Callback for new completions, in any order."""


class Engine(Protocol):
    """Makes completions of a model."""

    def complete(self, tasks: Sequence[Task], report: Report) -> None:
        """Make the completions and report each one once; reported ones stay valid if a later one fails."""


class TransformersEngine:
    """A model loaded here that answers by `answer_batches` with `settings`; `work` counts what it computed.

    `generate_batch` (continuous batching) of transformers is not used: it accepts no custom logits processors, so that
    the draws of a completion would depend on the others in its batch.
    """

    def __init__(self, model: Any, tokenizer: Any, eos_token_ids: Collection[int], **settings: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._eos_token_ids, self._settings = eos_token_ids, settings
        self.work = Work()

    @property
    def on_cpu(self) -> bool:
        """Whether the model computes on the CPU."""
        return bool(self._model.device.type == "cpu")

    def complete(self, tasks: Sequence[Task], report: Report) -> None:
        """Make the completions, longest prompts first, and report them as they end; raises as `answer_batches` does."""
        requests = [Request(task.id, task.prompt_ids) for task in tasks]
        by_id = {task.id: task for task in tasks}
        settings = {**self._settings, "eos_token_ids": self._eos_token_ids, "work": self.work}
        for batch in answer_batches(self._model, requests, **settings):
            report([_decoded(self._tokenizer, by_id[one.id], one.token_ids, finished=one.finished) for one in batch])


class ServerEngine:
    """A model behind a server (a `writer`), which renders the prompt itself; each request has its completion's seed.

    `answered` is a task that the server has answered before, if there is one.
    """

    def __init__(self, server: Server, *, max_new_tokens: int, seed: int, answered: Task | None = None) -> None:
        self._server, self._max_new_tokens, self._seed = server, max_new_tokens, seed
        self._answered = answered

    @property
    def not_sent(self) -> list[str]:
        """The settings that the server refuses."""
        return self._server.not_sent

    def complete(self, tasks: Sequence[Task], report: Report) -> None:
        """Report each completion as it arrives, also one that the server blocks.

        A prompt whose request is refused without a reason that names its content is blocked too if the server, asked
        again, still answers another prompt: then the refusal does not concern all requests. Raises `ServerError` as
        `Server.ask` does, and at the end if completions are missing.
        """
        lost: list[tuple[Task, Answer]] = []

        def read(place: int, answer: Answer) -> None:
            if answer.text is None and not answer.blocked:
                lost.append((tasks[place], answer))
                return
            if answer.text is not None:
                self._answered = tasks[place]
            report([_made(tasks[place], answer)])

        self._server.ask([self._question(task) for task in tasks], read)
        refused = [(task, answer) for task, answer in lost if answer.refused]
        if refused and self._still_answers():
            report([_made(task, answer) for task, answer in refused])
            lost = [(task, answer) for task, answer in lost if not answer.refused]
        if lost:
            task, answer = lost[0]
            raise ServerError(
                f"{self._server.url}: {len(lost)} of {len(tasks)} completions got no answer ({task.id!r}: "
                f"{answer.fault})"
            )

    def _question(self, task: Task) -> Question:
        seed = completion_seed(self._seed, task.id)
        return Question(without_empty_end(task.messages), self._max_new_tokens, seed=seed, tools=task.tools)

    def _still_answers(self) -> bool:
        answers: list[Answer] = []
        if self._answered is not None:
            self._server.ask([self._question(self._answered)], lambda place, answer: answers.append(answer))
        return any(answer.text is not None for answer in answers)


def _made(task: Task, answer: Answer) -> Made:
    """Return the completion of a server's answer, or of its refusal."""
    blocked = "" if answer.text is not None else _writable(answer.fault)
    extra = {"tool_calls": from_canonical(answer.tool_calls)} if answer.tool_calls else {}
    return Made(
        task.id,
        _writable(answer.text or ""),
        answer.finished and not blocked,
        answer.num_tokens,
        reasoning=_writable(answer.reasoning),
        blocked=blocked,
        extra=_writable(canonical_json(extra)),
    )


def _writable(text: str) -> str:
    """Return the text without half surrogate pairs, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


class VllmEngine:
    """A model that vLLM loads (`vllm.LLM`) at the first use on `num_gpus` GPUs, with room for the longest prompt.

    The text is decoded from the tokens up to the first of `eos_token_ids`, as with transformers. Each completion has
    its own seed; the draws differ from those of transformers and repeat only on the same machine.

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
        longest_prompt: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        num_gpus: int = 1,
    ) -> None:
        self._vllm = _import_vllm()
        require_whole(model, "vLLM")
        self._length, self._num_gpus = longest_prompt + max_new_tokens, num_gpus
        self._llm: Any = None
        self._model, self._revision, self._dtype = model, revision, dtype
        self._tokenizer, self._ends = tokenizer, frozenset(eos_token_ids)
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self._temperature, self._top_p = temperature, top_p

    def complete(self, tasks: Sequence[Task], report: Report) -> None:
        """Make the completions in one call; raises `ModelError` for a model that vLLM cannot load."""
        if self._llm is None:
            self._llm = self._load()
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=list(task.prompt_ids)) for task in tasks]
        outputs = self._llm.generate(prompts, [self._sampling_of(task) for task in tasks], use_tqdm=False)
        report([self._made(task, output.outputs[0]) for task, output in zip(tasks, outputs, strict=True)])

    def _load(self) -> Any:
        release_memory()  # of models that this process has used before
        try:
            return self._vllm.LLM(
                model=self._model,
                revision=self._revision,
                dtype=self._dtype,
                max_model_len=self._length,
                **({"tensor_parallel_size": self._num_gpus} if self._num_gpus > 1 else {}),
                language_model_only=True,  # an image may need more tokens than `max_model_len`, and a processor
                load_format="safetensors",
                trust_remote_code=False,
            )
        except (ValueError, OSError, RuntimeError) as error:
            said = " ".join(str(error).split())[:400]
            raise ModelError(f"model: vLLM cannot load {self._model} for {self._length} tokens: {said}") from error

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
        return _decoded(self._tokenizer, task, ids[:end], finished=end is not None)


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # read at import; nothing is reported
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    try:
        import vllm
    except ImportError as error:
        raise MissingExtraError(
            "engine 'vllm' needs the package vllm; install it with: pip install 'bfpo[vllm]' (it needs a GPU)"
        ) from error
    return vllm


def _decoded(tokenizer: Any, task: Task, token_ids: Sequence[int], *, finished: bool) -> Made:
    before = task.prompt_ids[-_CONTEXT:] if ends_with_assistant(task.messages) else ()
    text = decode(tokenizer, token_ids, before=before, finished=finished)
    return Made(task.id, text, finished, len(token_ids))


def decode(tokenizer: Any, token_ids: Sequence[int], *, before: Sequence[int] = (), finished: bool = True) -> str:
    """Return the text of an answer, including special tokens within it.

    `before`: tokens of the text that it continues; SentencePiece drops the space before the first word of what it
    decodes. An answer that is not `finished` may end inside a character, whose bytes are then left out.
    """
    text: str
    head, text = (
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
        for ids in (before, [*before, *token_ids])
    )
    if not text.startswith(head):  # the text before ends inside a character
        return decode(tokenizer, token_ids, finished=finished)
    text = text[len(head) :]
    return text if finished else text.rstrip(_HALF)


def completion_seed(seed: int, completion_id: str) -> int:
    """Return a completion's seed, from the run's seed and its id alone; 31 bits, the range of every engine."""
    digest = hashlib.sha256(f"{seed}\0{completion_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# ------------------------------------------------------------------- completions kept while they are made


_KEYS = {one.name for one in fields(Made)}
_NEEDED = {one.name for one in fields(Made) if one.default is MISSING}


def append_made(path: Path, made: Sequence[Made]) -> None:
    """Append the rows and flush them to the disk; half a row of a killed run is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # half a row
                file.write(b"\n")
        lines = "".join(json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in made)
        file.write(lines.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())


def read_made(path: Path) -> dict[str, Made]:
    """Return the whole rows by id; half a row of a killed run is left out."""
    if not path.exists():
        return {}
    made: dict[str, Made] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and _NEEDED <= row.keys() <= _KEYS:
            made[row["id"]] = Made(**row)
    return made
