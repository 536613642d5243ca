"""The answers of one model to all suites: one `generate` run for each sampling setting, in its own folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.config import GenerateConfig, read_template
from bfpo.config.evaluate import SuitesJob
from bfpo.config.suites import EvaluatedModel, WeightsModel
from bfpo.core.errors import RunError
from bfpo.core.files import file_digest
from bfpo.core.provenance import RunFile
from bfpo.core.records import as_json, load
from bfpo.core.schema import Completion, Prompt
from bfpo.data.chat import ChatEncoder
from bfpo.data.read import read_completions
from bfpo.data.template import RefusedChatError
from bfpo.data.write import prompt_row
from bfpo.generation.earlier import differences
from bfpo.policy.load import load_tokenizer
from bfpo.policy.source import num_positions, read_config
from bfpo.runs.folder import RunFolder, failed_without_output
from bfpo.runs.stages import run_stage
from bfpo.suites.catalogue import Suite

__all__ = ["SuiteAnswers", "answer_suites", "chat_of", "context_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SuiteAnswers:
    """One model's completions by suite, with the suite's own ids, and the number of prompts that were left out."""

    completions: dict[str, list[Completion]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


def answer_suites(
    config: SuitesJob,
    model: EvaluatedModel,
    suites: Sequence[Suite],
    prompts: Mapping[str, Sequence[Prompt]],
    folder: RunFolder,
    *,
    part: str = "",
) -> SuiteAnswers:
    """Return a model's answers to the prompts of each suite; existing ones, also of `suites.reuse`, are kept.

    `part` is in the name of their folder. A prompt longer than `max_prompt_length`, or than the model's context allows,
    or that the model's chat template refuses, is left out and counted.
    """
    answers = SuiteAnswers()
    for (longest, temperature), group in _sampling_groups(config, suites).items():
        name = f"models/{model.name}/answers{part}-{longest}-{temperature:g}"
        rows, left_out = _rows(config, model, group, prompts, longest)
        answers.left_out.update(left_out)
        answers.completions.update({suite.name: [] for suite in group})
        if not rows:
            continue
        generate = partial(_generate, config, model, longest=longest, temperature=temperature)
        out = _answered(config, generate, rows, folder, name)
        for completion in read_completions(out / "completions.jsonl", thinking=config.thinking):
            suite_name, _, own_id = completion.id.partition("/")
            answers.completions[suite_name].append(replace(completion, id=own_id))
    return answers


def _sampling_groups(config: SuitesJob, suites: Sequence[Suite]) -> dict[tuple[int, float], list[Suite]]:
    """Return the suites by (max_new_tokens, temperature), so that a model is loaded once per group."""
    groups: dict[tuple[int, float], list[Suite]] = {}
    for suite in suites:
        assert suite.sampling is not None
        longest = config.suites.max_new_tokens or suite.sampling.max_new_tokens
        groups.setdefault((longest, suite.sampling.temperature), []).append(suite)
    return groups


def _rows(
    config: SuitesJob,
    model: EvaluatedModel,
    group: Sequence[Suite],
    prompts: Mapping[str, Sequence[Prompt]],
    longest: int,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    fits = _fits(config, model, longest)
    rows, left_out = [], {}
    for suite in group:
        fitting = [prompt for prompt in prompts[suite.name] if fits(prompt)]
        left_out[suite.name] = len(prompts[suite.name]) - len(fitting)
        rows += [{**prompt_row(prompt), "id": f"{suite.name}/{prompt.id}"} for prompt in fitting]
    return rows, left_out


def _fits(config: SuitesJob, model: EvaluatedModel, longest: int) -> Callable[[Prompt], bool]:
    """Return whether the template takes a prompt, and it leaves room for an answer; always true for a server."""
    if not isinstance(model, WeightsModel):
        return lambda prompt: True
    chat = chat_of(config, model)
    limit = min(config.suites.max_prompt_length, context_of(model) - longest)

    def fits(prompt: Prompt) -> bool:
        try:
            encoded = chat.encode(prompt.messages, (), name=f"prompt {prompt.id}", tools=prompt.tools)
        except RefusedChatError as error:
            _log.warning("%s: %s; left out", model.name, error)
            return False
        return len(encoded.prompt) <= limit

    return fits


def chat_of(config: SuitesJob, model: WeightsModel) -> ChatEncoder:
    """Return the tokenizer of a model with its chat template."""
    variables = model.chat_template_kwargs or config.chat_template_kwargs
    tokenizer = load_tokenizer(model.model, revision=model.revision)
    return ChatEncoder(tokenizer, read_template(config.chat_template), variables)


def context_of(model: EvaluatedModel) -> int:
    """Return the model's maximum context, tokens; 2^30 if its config has none."""
    return num_positions(read_config(model.model, revision=getattr(model, "revision", None))) or 1 << 30


def _generate(
    config: SuitesJob, model: EvaluatedModel, asked: Path, *, longest: int, temperature: float
) -> GenerateConfig:
    settings = {
        **model.model_dump(),
        "dtype": config.dtype or "auto",
        "prompts": str(asked),
        "max_prompt_length": config.suites.max_prompt_length,
        "max_new_tokens": longest,
        "temperature": temperature,
        "batch_size": config.suites.batch_size,
        "chat_template": config.chat_template,
        "chat_template_kwargs": getattr(model, "chat_template_kwargs", None) or config.chat_template_kwargs,
        "seed": config.seed,
        "threads": config.threads,
        "max_requests": config.suites.max_requests,
        "thinking": config.thinking,
        "executor": config.executor,
    }
    known = GenerateConfig.modes[model.engine].model_fields
    return GenerateConfig.model_validate({name: value for name, value in settings.items() if name in known})


def _answered(
    config: SuitesJob,
    generate: Callable[[Path], GenerateConfig],
    rows: Sequence[Mapping[str, Any]],
    folder: RunFolder,
    name: str,
) -> Path:
    """Return the folder with the answers to these prompts: that of `suites.reuse` if it asked the same, else a new run.

    A new run takes the answers to prompts that an earlier one asked too. Where a stopped evaluation goes on with other
    suites than before, such as one whose file was missing, its run of before is finished and then such an earlier one.
    """
    earlier = None if config.suites.reuse is None else Path(config.suites.reuse) / name
    place, number = name, 1
    while _asked_others(folder, place, rows):
        earlier = _run(generate(folder.file(f"{place}.prompts.jsonl")), earlier, folder, place)
        number += 1
        place = f"{name}.{number}"
    return _run(generate(folder.write_jsonl(f"{place}.prompts.jsonl", rows)), earlier, folder, place)


def _asked_others(folder: RunFolder, name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a run of this evaluation has begun to answer other prompts than these."""
    asked = folder.file(f"{name}.prompts.jsonl")
    run = folder.file(name)
    if not asked.is_file() or not (run / "run.json").is_file() or failed_without_output(run):
        return False
    before = [json.loads(line) for line in asked.read_text(encoding="utf-8").split("\n") if line]
    return before != [as_json(row) for row in rows]


def _run(generate: GenerateConfig, earlier: Path | None, folder: RunFolder, name: str) -> Path:
    """Return the folder with the answers: `earlier` if it asked the same, else that of a run, which is resumed."""
    if earlier is not None and _is_reusable(earlier, generate):
        asked = earlier.with_name(f"{earlier.name}.prompts.jsonl")
        if asked.is_file() and file_digest(asked) == file_digest(generate.prompts):
            folder.add_facts(reused={**folder.record.get("reused", {}), name: str(earlier)})
            return earlier
        generate = generate.model_copy(update={"reuse": str(earlier)})
    out = folder.path / name
    run_stage("generate", generate, out, resume=out.exists())
    return out


def _is_reusable(earlier: Path, generate: GenerateConfig) -> bool:
    """Return whether there is a finished run of the same model and settings."""
    try:
        run = load(RunFile, earlier / "run.json")
    except (OSError, RunError):
        return False
    return run.status == "finished" and not differences(run, generate.resolved())
