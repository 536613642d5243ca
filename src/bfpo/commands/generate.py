"""STAGE: a file of prompts -> completions of a model, in the order of the prompts; resumes where it was stopped."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.config import GenerateConfig, read_template
from bfpo.config.evaluate import ServerGenerate, TransformersGenerate, VllmGenerate
from bfpo.core.errors import DataError, ServerError, SettingError
from bfpo.core.processes import release_memory
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion, Prompt
from bfpo.data.chat import ChatEncoder
from bfpo.data.messages import ends_with_assistant
from bfpo.data.prompts import PromptResult, read_prompt_files
from bfpo.data.rejects import describe_rejects
from bfpo.data.rendered import RenderedText, is_mostly_rendered, rendered_note
from bfpo.data.split import draw, part_of
from bfpo.data.thinking import Thinking, opens_thought, without_thought
from bfpo.data.tokenize import check_ids, ids_to_check, row_check
from bfpo.data.write import completion_row
from bfpo.execution.settings import ExecutorConfig, RayExecutor
from bfpo.execution.workers import Workers, in_process, num_gpus, num_local
from bfpo.generation.earlier import CHAT_TEMPLATE, COMPLETIONS, RAW, read_earlier
from bfpo.generation.engines import (
    Engine,
    Made,
    Report,
    ServerEngine,
    Task,
    TransformersEngine,
    VllmEngine,
    append_made,
    decode,
    read_made,
)
from bfpo.generation.sampling import check_room, end_token_ids, saved_end_token_ids
from bfpo.generation.server import RequestBudget, Server
from bfpo.generation.settings import WeightsSpec
from bfpo.policy.devices import to_gpu, use_threads
from bfpo.policy.load import load_policy, load_tokenizer
from bfpo.policy.precision import decoding_dtype, emulates
from bfpo.policy.source import num_embeddings, read_config
from bfpo.runs.folder import RunFolder

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)

REJECTS = "rejects.jsonl"
_PARTIAL = "completions.partial.jsonl"
_END_TOKENS = 32  # of a prompt, enough for an opening mark
_ROWS_OF_BATCH = 64  # where the number of slots is found by the device
_BATCHES_PER_SHARD = 8  # of completions that one worker makes at a time
_FEWEST_PER_GPU, _MOST_GPUS = 128, 8  # so many slots of a GPU are full; a shard for each GPU of a machine
_VLLM_PER_SHARD = 256  # vLLM batches within a call
_WHOLE = {"gpus_per_worker": 1.0}


def run(config: GenerateConfig, folder: RunFolder) -> None:
    """Write `completions.jsonl`: `num_completions` rows per prompt, in the order of the prompts.

    Thoughts before an answer are apart from it, under the key `reasoning`; `completions.raw.jsonl` then holds the texts
    as the model wrote them.

    Completions are appended to `completions.partial.jsonl` as they arrive, so that a resumed run makes only the missing
    ones. Draws depend on the seed and the completion's id alone: a resumed run makes the same completions (to a server:
    the same requests) as an uninterrupted one.

    Several workers share the completions in shards, which do not depend on the number of workers.

    Raises `DataError` for an unreadable prompt file or a prompt longer than `max_prompt_length`, `ServerError` if
    completions of a server are missing, `MissingExtraError` for an engine that is not installed.
    """
    if isinstance(config, TransformersGenerate):
        use_threads(config.threads)
    if isinstance(config, WeightsSpec):
        folder.add_weights(config.model)
        if config.chat_template is not None:
            folder.add_data(CHAT_TEMPLATE, config.chat_template)
    folder.add_data("prompts", config.prompts)
    chat = _chat(config)
    found = _read_prompts(config, chat)
    if found.rejects:
        folder.write_jsonl(REJECTS, [{"input": "prompts", **reject.as_row()} for reject in found.rejects])
    prompts, left_out, notes = _fitting(draw(found.prompts, config.limit, config.seed), config, chat)
    for note in notes:
        _log.info("%s", note)
    left_out = {**found.left_out, **left_out}
    facts = {"num_prompts": len(found.prompts), "left_out": left_out, "layouts": found.layouts, **found.notes}
    folder.add_facts(prompts=facts)
    tasks = {task.id: task for prompt, ids in prompts.items() for task in _tasks(prompt, ids, config)}
    partial = folder.file(_PARTIAL)
    if not folder.resumed:
        partial.unlink(missing_ok=True)
    made = read_made(partial)
    if config.reuse is not None:
        _take_earlier(config, config.reuse, folder, tasks, made)
    folder.kept = "the completions made so far are kept"
    budget = RequestBudget(config.max_requests if isinstance(config, ServerGenerate) else None)
    try:
        _complete(config, tasks, made, folder, budget)
    except ServerError as error:
        missing = len(tasks.keys() - made.keys())
        raise ServerError(
            f"{error}; {missing} of {len(tasks)} completions are missing, the others are kept; continue with --resume"
        ) from error
    finally:
        if isinstance(config, ServerGenerate):
            folder.add_facts(requests=budget.num_requests)
    _finish(config, folder, prompts, chat, made)


def _take_earlier(
    config: GenerateConfig, reuse: str, folder: RunFolder, tasks: Mapping[str, Task], made: dict[str, Made]
) -> None:
    """Add to `made` an earlier run's completions of the same prompts, at each start anew; log how many."""
    earlier = read_earlier(Path(reuse), config.resolved())
    if earlier.differs:
        _log.warning("reuse: %s was made with other %s; nothing is taken from it", reuse, ", ".join(earlier.differs))
    taken = [
        Made(row.id, row.text, row.finished, None, row.reasoning, row.blocked, row.extra)
        for row in earlier.completions.values()
        if (task := tasks.get(row.id)) is not None and (task.messages, task.tools) == (row.prompt, row.tools)
        if row.id not in made
    ]
    made.update({row.id: row for row in taken})
    folder.add_facts(reused={"run": reuse, "completions": len(taken)})
    _log.info("reuse: %d of %d completions are taken from %s", len(taken), len(tasks), reuse)


def preview(config: GenerateConfig) -> list[str]:
    """Return what would be generated: prompts by kind, their lengths, completions; no request is sent."""
    chat = _chat(config)
    found = _read_prompts(config, chat)
    prompts, too_long, notes = _fitting(draw(found.prompts, config.limit, config.seed), config, chat)
    tasks = [task for prompt, ids in prompts.items() for task in _tasks(prompt, ids, config)]
    lengths = sorted(len(task.prompt_ids) for task in tasks)
    kinds = Counter(prompt.kind or "(no kind)" for prompt in prompts)
    left_out = [f"left out: {num} ({reason})" for reason, num in (*found.left_out.items(), *too_long.items())]
    if isinstance(config, ServerGenerate):
        known, asked = "not known here, the server counts them", [f"requests go to {config.model} at {config.url}"]
    else:
        limit = "" if not isinstance(config, WeightsSpec) else f" (limit {config.max_prompt_length})"
        known, asked = f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}{limit}", []
    return [
        f"{len(prompts)} prompts: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}",
        *left_out,
        *notes,
        f"prompt tokens: {known}",
        f"{len(tasks)} completions of at most {config.max_new_tokens} tokens",
        *asked,
    ]


# ------------------------------------------------------------------------------------------------------ the engines


def _complete(
    config: GenerateConfig,
    tasks: Mapping[str, Task],
    made: dict[str, Made],
    folder: RunFolder,
    budget: RequestBudget,
) -> None:
    """Make the completions that are not in `made`, and add each to it and to the partial file as it arrives."""
    todo = [task for task in tasks.values() if task.id not in made]
    if not todo:
        return
    with CountProgress("completions", len(tasks), _log) as progress:
        progress.advance(len(tasks) - len(todo))

        def keep(rows: Sequence[Made]) -> None:
            append_made(folder.file(_PARTIAL), rows)
            made.update({row.id: row for row in rows})
            progress.advance(len(rows))

        if isinstance(config, ServerGenerate):
            answered = next((task for name, task in tasks.items() if name in made and not made[name].blocked), None)
            engine = _server_engine(config, budget, answered)
            try:
                engine.complete(todo, keep)
            finally:
                if engine.not_sent:
                    folder.add_facts(not_sent=engine.not_sent)
            return
        assert isinstance(config, TransformersGenerate | VllmGenerate)  # the only other engines
        if isinstance(config, TransformersGenerate):
            config = config.model_copy(update={"dtype": _dtype(config, folder)})
        else:
            config = config.model_copy(update={"executor": _whole_gpus(config.executor)})
        shards = [[task for task in shard if task.id not in made] for shard in _shards(config, tasks.values())]
        shards = [shard for shard in shards if shard]
        make = partial(_make_engine, config, max(len(task.prompt_ids) for task in tasks.values()))
        if in_process(config.executor):
            try:
                _complete_here(make(), shards, keep, folder)
            finally:
                release_memory()  # for the models that follow in this process, such as a judge
            return
        with Workers(config.executor, make, most=len(shards)) as workers:
            for _, rows in workers.map(shards, _complete_shard, title=_shard_title):
                keep(rows)


def _complete_here(engine: Engine, shards: Sequence[Sequence[Task]], keep: Report, folder: RunFolder) -> None:
    # What is computed together rounds together: the shards of several workers give their bits. Slots that never run
    # empty are faster on a GPU, which promises no bits; on a CPU a step takes as long as it has rows.
    if isinstance(engine, TransformersEngine) and not engine.on_cpu:
        shards = [[task for shard in shards for task in shard]]
    try:
        for shard in shards:
            engine.complete(shard, keep)
    finally:
        if isinstance(engine, TransformersEngine):
            folder.add_facts(decoding={**folder.record["decoding"], **asdict(engine.work)})


def _whole_gpus(executor: ExecutorConfig) -> ExecutorConfig:
    """Return the executor with at least one GPU for each worker, if there are GPUs.

    At its start an engine of vLLM takes nine tenths of a GPU, so that two do not fit one. Raises `SettingError` for
    more workers than this machine has GPUs.
    """
    found, gpus = num_gpus(), executor.gpus_per_worker
    if gpus == 0 or (gpus or 0) >= 1 or (gpus is None and not found):
        return executor
    if not isinstance(executor, RayExecutor) and num_local(executor.model_copy(update=_WHOLE)) > max(1, found):
        raise SettingError(
            f"executor.workers: got {executor.workers}; each worker with engine vllm takes a whole GPU, and this "
            f"machine has {found}; allowed: at most {max(1, found)}, or auto"
        )
    return executor.model_copy(update=_WHOLE)


def _shards(config: TransformersGenerate | VllmGenerate, tasks: Collection[Task]) -> list[list[Task]]:
    """Return the tasks in the parts that are made together, so that what is in a batch depends on the tasks alone.

    Those with the longest prompts come first where memory could run out.
    """
    if isinstance(config, VllmGenerate):
        order, size = list(tasks), _VLLM_PER_SHARD
    else:
        order = sorted(tasks, key=lambda task: -len(task.prompt_ids))
        size = _BATCHES_PER_SHARD * (config.batch_size or _ROWS_OF_BATCH)
        if config.batch_size is None and num_gpus():
            size = min(size, max(_FEWEST_PER_GPU, math.ceil(len(order) / _MOST_GPUS)))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _complete_shard(engine: Engine, tasks: Sequence[Task]) -> list[Made]:
    made: list[Made] = []
    engine.complete(tasks, made.extend)
    return made


def _shard_title(tasks: Sequence[Task]) -> str:
    return f"the {len(tasks)} completions from {tasks[0].id!r} on"


def _server_engine(config: ServerGenerate, budget: RequestBudget, answered: Task | None) -> ServerEngine:
    sampling: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
    server = Server(config, config.model, writer=True, budget=budget, **sampling)
    return ServerEngine(server, max_new_tokens=config.max_new_tokens, seed=config.seed, answered=answered)


def _make_engine(config: TransformersGenerate | VllmGenerate, longest_prompt: int) -> Engine:
    """Return the engine of a model that is loaded here, in this process or in a worker."""
    sampling: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
    sampling |= {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    chat = _chat(config)
    assert chat is not None  # only a server renders the prompts itself
    if isinstance(config, VllmGenerate):
        ends = {*saved_end_token_ids(config.model, chat.tokenizer, revision=config.revision), chat.end_id}
        sampling |= {"longest_prompt": longest_prompt, "num_gpus": int(config.executor.gpus_per_worker or 1) or 1}
        return VllmEngine(config.model, chat.tokenizer, ends, revision=config.revision, dtype=config.dtype, **sampling)
    use_threads(config.threads)
    policy = load_policy(config.model, dtype=config.dtype, revision=config.revision)
    to_gpu(policy.model)
    ends = {*end_token_ids(policy.model, policy.tokenizer), chat.end_id}
    return TransformersEngine(policy.model, policy.tokenizer, ends, batch_size=config.batch_size, **sampling)


def _dtype(config: TransformersGenerate, folder: RunFolder) -> str:
    """Return the number type that holds the weights, record it and say it; a resumed run keeps its own."""
    chosen = folder.record.get("decoding", {}).get("dtype")
    asked = chosen or folder.config.get("dtype", config.dtype)
    dtype, why = decoding_dtype(asked, read_config(config.model, revision=config.revision).dtype)
    why = "as before" if chosen else why
    folder.add_facts(decoding={"dtype": dtype, "dtype_chosen": why})
    is_slow = not chosen and emulates(dtype)
    _log.log(logging.WARNING if is_slow else logging.INFO, "weights in %s (%s)", dtype, why)
    return dtype


def _chat(config: GenerateConfig) -> ChatEncoder | None:
    """Return the encoder of prompts, `None` if a server renders them."""
    if not isinstance(config, TransformersGenerate | VllmGenerate):
        return None
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    return ChatEncoder(tokenizer, read_template(config.chat_template), config.chat_template_kwargs)


# ------------------------------------------------------------------------------------------------------ the prompts


def _read_prompts(config: GenerateConfig, chat: ChatEncoder | None) -> PromptResult:
    check = None if chat is None else row_check(chat)
    found = read_prompt_files([config.prompts], columns=config.columns, check=check, bad_rows=config.bad_rows)
    if not found.prompts:
        bad = f" that can be used; {describe_rejects(found.rejects, rows=len(found.rejects))}" if found.rejects else ""
        raise DataError.at(config.prompts, None, f"holds no prompt{bad or '; at least one is needed'}")
    prompts = part_of(found.prompts, config.split)
    num = len(found.prompts) - len(prompts)
    left_out = {**found.left_out, **({"in another part of the split": num} if num else {})}
    return replace(found, prompts=prompts, left_out=left_out)


def _fitting(
    prompts: Sequence[Prompt], config: GenerateConfig, chat: ChatEncoder | None
) -> tuple[dict[Prompt, tuple[int, ...]], dict[str, int], list[str]]:
    """Return the prompts with their tokens (none if a server renders them), and the numbers left out by reason.

    Also notes on the chat template and on prompts that are continued. Raises `DataError` for a prompt longer than
    `max_prompt_length` under `long_prompts: stop`, or if all are longer, `ModelError` for a token that the model lacks,
    `SettingError` for a prompt that leaves no room for an answer in the model's positions.
    """
    num_begun = sum(ends_with_assistant(one.messages) for one in prompts)
    notes = []
    if num_begun:
        notes.append(f"{num_begun} of {len(prompts)} prompts end with a message of the assistant, which is continued")
    if chat is None or not isinstance(config, WeightsSpec):
        notes += _rendered_notes(Counter(RenderedText().mark(one.messages, ()) for one in prompts))
        return dict.fromkeys(prompts, ()), {}, notes
    shape = read_config(config.model, revision=config.revision)
    limit = ids_to_check(chat.tokenizer, num_embeddings(shape))
    encoded: dict[Prompt, tuple[int, ...]] = {}
    changes: Counter[str] = Counter()
    before: Counter[str] = Counter()
    for one in prompts:
        made = chat.encode(one.messages, (), name=f"prompt {one.id}", tools=one.tools)
        check_ids(made.prompt, chat.tokenizer, limit, f"prompt {one.id}")
        changes.update(made.changes)
        before[made.rendered] += 1
        encoded[one] = tuple(made.prompt)
    notes += [f"the chat template: {chat.opening}"] if chat.opening else []
    notes += [chat.date_note] if chat.date_note else []
    notes += [f"the chat template: {reason} ({num} of {len(encoded)})" for reason, num in changes.most_common()]
    notes += _rendered_notes(before)
    fitting = {one: ids for one, ids in encoded.items() if len(ids) <= config.max_prompt_length}
    num_long = len(encoded) - len(fitting)
    if num_long and (config.long_prompts == "stop" or not fitting):
        first, ids = next((one, ids) for one, ids in encoded.items() if one not in fitting)
        raise DataError.at(
            config.prompts,
            None,
            f"{num_long} of {len(encoded)} prompts are longer than max_prompt_length = {config.max_prompt_length}, "
            f"such as {first.id!r} with {len(ids)} tokens; raise the limit, or leave them out with long_prompts: skip",
        )
    check_room(shape, [(one.id, ids) for one, ids in fitting.items()], config.max_new_tokens)
    return fitting, {"longer than max_prompt_length": num_long} if num_long else {}, notes


def _rendered_notes(marks: Counter[str]) -> list[str]:
    """Return a note if most prompts were rendered with a chat template before; `marks`: "" for those that were not."""
    num_prompts = marks.total()
    del marks[""]
    if not is_mostly_rendered(marks.total(), num_prompts):
        return []
    note = rendered_note(dict(marks.most_common()), num_prompts, "prompts")
    return [f"{note}: they are taken as text and rendered again; give plain text, or messages"]


def _tasks(prompt: Prompt, prompt_ids: tuple[int, ...], config: GenerateConfig) -> list[Task]:
    return [Task(name, prompt.messages, prompt_ids, prompt.tools) for name in _names(prompt, config)]


def _names(prompt: Prompt, config: GenerateConfig) -> list[str]:
    """Return the ids of a prompt's completions."""
    number = config.num_completions
    return [prompt.id] if number == 1 else [f"{prompt.id}/{place}" for place in range(number)]


# ------------------------------------------------------------------------------------------------------- the output


def _opens_thought(config: GenerateConfig, chat: ChatEncoder | None, prompt_ids: Sequence[int]) -> bool:
    """Return whether the rendered prompt ends inside a thought; unknown, then false, for a server."""
    if chat is None:
        return False
    return opens_thought(decode(chat.tokenizer, prompt_ids[-_END_TOKENS:]), (config.thinking or Thinking()).pairs)


def _finish(
    config: GenerateConfig,
    folder: RunFolder,
    prompts: Mapping[Prompt, tuple[int, ...]],
    chat: ChatEncoder | None,
    made: Mapping[str, Made],
) -> None:
    completions = []
    for prompt, prompt_ids in prompts.items():
        opened = _opens_thought(config, chat, prompt_ids) or None
        for name in _names(prompt, config):
            row = made[name]
            whole = Completion(
                name,
                prompt.messages,
                row.text,
                config.model,
                prompt.kind,
                row.finished,
                reasoning=row.reasoning,
                blocked=row.blocked,
                tools=prompt.tools,
                extra=row.extra,
                category=prompt.category,
            )
            answer = without_thought(whole, config.thinking, opened=opened)
            completions.append(answer if chat is None else chat.without_written(answer))
    cut = [row for completion in completions if (row := made[completion.id]).text != completion.text]
    if cut:
        folder.write_jsonl(RAW, ({"id": row.id, "text": row.text} for row in cut))
    folder.write_jsonl(COMPLETIONS, map(completion_row, completions))
    folder.file(_PARTIAL).unlink(missing_ok=True)
    counts = [made[completion.id].num_tokens for completion in completions]
    known = [count for count in counts if count is not None]
    num_reused = folder.record.get("reused", {}).get("completions", 0)
    facts: dict[str, Any] = {
        "num_completions": len(completions),
        "num_finished": sum(completion.finished for completion in completions),
        "completion_tokens": sum(known) if len(known) + num_reused == len(counts) else None,
    }
    if thoughts := sum(bool(completion.reasoning) for completion in completions):
        facts["num_with_thoughts"] = thoughts
        shown_where = f"; the whole texts: {folder.file(RAW)}" if cut else ""
        _log.info("%d answers begin with thoughts, which are kept beside them%s", thoughts, shown_where)
    blocked = Counter(completion.blocked for completion in completions if completion.blocked)
    if blocked:
        facts |= {"num_blocked": blocked.total(), "blocked": dict(blocked.most_common())}
    folder.add_facts(completions=facts)
    shown = {name: value for name, value in facts.items() if value is not None and name != "blocked"}
    refused = {"not sent, since the server refuses it": ", ".join(folder.record.get("not_sent", ()))}
    sections = {"Completions": {"model": config.model, **shown, **(refused if "not_sent" in folder.record else {})}}
    folder.write_card("Completions", {**sections, "Blocked by the server": dict(blocked.most_common())})
    cut = len(completions) - facts["num_finished"] - blocked.total()
    limit = f" within max_new_tokens = {config.max_new_tokens}" if cut else ""
    _log.info("%d completions in %s; %d did not end%s", len(completions), folder.file(COMPLETIONS), cut, limit)
    if blocked:
        reason, count = blocked.most_common(1)[0]
        _log.warning(
            "%d of %d completions are blocked: the server refuses these prompts, their texts are empty (%d: %s)",
            blocked.total(),
            len(completions),
            count,
            reason,
        )
