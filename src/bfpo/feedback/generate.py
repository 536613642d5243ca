"""STAGE: a file of prompts -> completions of a model, in the order of the prompts; goes on where it was cut off."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo.config import GenerateConfig, read_template
from bfpo.data.chat import ChatEncoder
from bfpo.data.prompts import PromptResult, read_prompt_files
from bfpo.data.write import completion_row
from bfpo.errors import DataError
from bfpo.feedback.sampling import Answer, Request, answer_batches, end_token_ids
from bfpo.policy.load import load_policy, load_tokenizer
from bfpo.runs import RunFolder
from bfpo.schema import Completion, Prompt

__all__ = ["preview", "run"]

COMPLETIONS = "completions.jsonl"
_PARTIAL = "completions.partial.jsonl"


@dataclass(frozen=True, slots=True)
class _Task:
    """One completion to make: the k-th of its prompt."""

    id: str
    prompt: Prompt
    prompt_ids: tuple[int, ...]


def run(config: GenerateConfig, folder: RunFolder) -> None:
    """Write `completions.jsonl`: `num_completions` rows per prompt, in the order of the prompts.

    Every batch is appended to `completions.partial.jsonl` as it is done, so that a resumed run makes only what is
    missing; draws depend on the seed and the completion's id alone, so it ends with what one run would have made.

    Raises `DataError` for an unreadable prompt file or a prompt longer than `max_prompt_length`.
    """
    import torch

    if not folder.is_writer:  # one process does it; the others of a launcher have nothing to add
        return
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder.add_data("prompts", config.prompts)
    found = _read_prompts(config)
    folder.add_facts(prompts={"num_prompts": len(found.prompts), "left_out": found.left_out, "layouts": found.layouts})
    prompts = _choose_prompts(found, config)
    policy = load_policy(config.model, dtype=config.dtype, revision=config.revision)
    model, tokenizer = policy.model, policy.tokenizer
    if torch.cuda.is_available():
        model.to("cuda")
    chat = ChatEncoder(tokenizer, read_template(config.chat_template))
    tasks = _tasks(prompts, config, chat)
    done = _read_partial(folder.file(_PARTIAL)) if folder.resumed else {}
    todo = [task for task in tasks if task.id not in done]
    if not folder.resumed:
        folder.file(_PARTIAL).unlink(missing_ok=True)
    batches = answer_batches(
        model,
        [Request(task.id, task.prompt_ids) for task in todo],
        eos_token_ids={*end_token_ids(model, tokenizer), chat.end_id},
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    with _Progress(len(tasks)) as progress:
        progress.advance(len(tasks) - len(todo))
        for batch in batches:
            rows = [_partial_row(answer, tokenizer) for answer in batch]
            _append(folder.file(_PARTIAL), rows)
            done.update({row["id"]: row for row in rows})
            progress.advance(len(rows))
    _finish(config, folder, tasks, done)


def preview(config: GenerateConfig) -> list[str]:
    """Return what would be generated: prompts by kind, their lengths, completions."""
    found = _read_prompts(config)
    prompts = _choose_prompts(found, config)
    chat = ChatEncoder(load_tokenizer(config.model, revision=config.revision), read_template(config.chat_template))
    lengths = sorted(len(task.prompt_ids) for task in _tasks(prompts, config, chat))
    kinds = _count(prompt.kind or "(no kind)" for prompt in prompts)
    left_out = [f"left out: {num} ({reason})" for reason, num in found.left_out.items()]
    return [
        f"{len(prompts)} prompts: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}",
        *left_out,
        f"prompt tokens: median {lengths[len(lengths) // 2]}, longest {lengths[-1]} (limit {config.max_prompt_length})",
        f"{len(lengths)} completions of at most {config.max_new_tokens} tokens",
        "no parameter trains",
    ]


def _read_prompts(config: GenerateConfig) -> PromptResult:
    found = read_prompt_files([config.prompts], columns=config.columns)
    if not found.prompts:
        raise DataError.at(config.prompts, None, "holds no prompt; at least one is needed")
    return found


def _choose_prompts(found: PromptResult, config: GenerateConfig) -> list[Prompt]:
    """Return the prompts of the file, or a seeded choice of `limit` of them in the file's order."""
    prompts = found.prompts
    if config.limit is None or config.limit >= len(prompts):
        return prompts
    chosen = sorted(random.Random(config.seed).sample(range(len(prompts)), config.limit))
    return [prompts[index] for index in chosen]


def _tasks(prompts: Sequence[Prompt], config: GenerateConfig, chat: ChatEncoder) -> list[_Task]:
    tasks = []
    for prompt in prompts:
        ids = tuple(chat.encode(prompt.messages, (), name=f"prompt {prompt.id}").prompt)
        if len(ids) > config.max_prompt_length:
            raise DataError.at(
                config.prompts,
                None,
                f"prompt {prompt.id!r} has {len(ids)} tokens; allowed: max_prompt_length = {config.max_prompt_length}; "
                "shorten or remove it, or raise the limit",
            )
        names = [prompt.id] if config.num_completions == 1 else _numbered(prompt.id, config.num_completions)
        tasks += [_Task(name, prompt, ids) for name in names]
    return tasks


def _numbered(prompt_id: str, num_completions: int) -> list[str]:
    return [f"{prompt_id}/{number}" for number in range(num_completions)]


def _finish(config: GenerateConfig, folder: RunFolder, tasks: Sequence[_Task], done: dict[str, dict[str, Any]]) -> None:
    completions = [
        Completion(
            task.id,
            task.prompt.messages,
            done[task.id]["text"],
            config.model,
            task.prompt.kind,
            done[task.id]["finished"],
        )
        for task in tasks
    ]
    folder.write_jsonl(COMPLETIONS, map(completion_row, completions))
    folder.file(_PARTIAL).unlink(missing_ok=True)
    num_finished = sum(completion.finished for completion in completions)
    num_tokens = sum(done[task.id]["num_tokens"] for task in tasks)
    facts = {"num_completions": len(completions), "num_finished": num_finished, "completion_tokens": num_tokens}
    folder.add_facts(completions=facts)
    folder.write_card("Completions", {"Completions": {"model": config.model, **facts}})


# ------------------------------------------------------------------------------------------ what was already done


def _partial_row(answer: Answer, tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.decode(list(answer.token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"id": answer.id, "text": text, "finished": answer.finished, "num_tokens": len(answer.token_ids)}


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("ab+") as file:
        if file.tell() and _last_byte(file) != b"\n":  # a killed run left half a row
            file.write(b"\n")
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last


def _read_partial(path: Path) -> dict[str, dict[str, Any]]:
    """Return the finished rows by id; half a row, left by a killed run, is made again."""
    if not path.exists():
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() == {"id", "text", "finished", "num_tokens"}:
            rows[row["id"]] = row
    return rows


def _count(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


class _Progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("completions", total=total)

    def advance(self, number: int) -> None:
        self._bar.advance(self._task, number)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
