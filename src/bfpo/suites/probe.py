"""The prompts of a behaviour probe, from files and suites: sorted by kind, without those that are trained on."""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

from bfpo.config.probe import KINDS, ProbeConfig
from bfpo.config.train import AlignConfig, SftConfig
from bfpo.core.errors import DataError, ServerError, SettingError
from bfpo.core.schema import Prompt
from bfpo.data.chat import ChatEncoder
from bfpo.data.fidelity import common_length
from bfpo.data.fields import content_id
from bfpo.data.load import Hashes, merged_hashes
from bfpo.data.prompts import read_prompt_files
from bfpo.data.split import draw, part_of
from bfpo.data.tokenize import check_ids, ids_to_check
from bfpo.runs.folder import RunFolder
from bfpo.suites.catalogue import known_sets, known_suites, load_suites
from bfpo.suites.files import ELSEWHERE, find_prompts
from bfpo.training.inputs import Start
from bfpo.training.probe import OPENING_TOKENS, Probe, ProbePrompt
from bfpo.training.trained_on import NO_RECORD, asked_in_training, has_no_record, trained_prompts

__all__ = ["load_probe", "probe_lines"]

logger = logging.getLogger(__name__)

_OPENING = (
    "probe: the chat template: %s; an answer whose thoughts do not end within probe.max_new_tokens = %d is not read: "
    "it counts as none of refused, complied and incoherent; turn thoughts off with chat_template_kwargs, such as "
    "{enable_thinking: false}, or raise probe.max_new_tokens"
)
_OTHER = {"harmful": {"benign", "borderline", "harmless"}, "harmless": {"harmful"}}  # kinds that a section leaves out


def load_probe(config: SftConfig | AlignConfig, folder: RunFolder, start: Start) -> Probe | None:
    """Return the probe of a training, `None` without one; only the first process has its prompts.

    A prompt that this run or one before it was trained on, by the hashes in their folders, is left out and named. The
    files are recorded in the run folder, and what was left out. Raises `DataError` for files that cannot be read and if
    no prompt of a kind is left, `ConfigError` for an unknown suite.
    """
    if config.probe is None:
        return None
    chat = ChatEncoder(start.tokenizer, start.settings["chat_template"], start.settings.get("chat_template_kwargs"))
    if not folder.is_writer:
        return Probe(config.probe, [], start.tokenizer, chat.end_id)
    if chat.opening:
        logger.warning(_OPENING, chat.opening, config.probe.max_new_tokens)
    recorded = trained_prompts(str(folder.path))
    assert recorded is not None  # by `record_prompts`
    prompts, files, facts = _prompts(config, chat, start, recorded)
    folder.add_data("probe", files)
    folder.add_facts(probe=facts)
    return Probe(config.probe, prompts, start.tokenizer, chat.end_id)


def probe_lines(config: SftConfig | AlignConfig, start: Start, hashes: Iterable[Hashes]) -> list[str]:
    """Return what a dry run says of the probe, from the hashes of the prompts to train on; raises as `load_probe`."""
    if config.probe is None:
        return []
    chat = ChatEncoder(start.tokenizer, start.settings["chat_template"], start.settings.get("chat_template_kwargs"))
    _, _, facts = _prompts(config, chat, start, merged_hashes(hashes))
    counts = ", ".join(f"{one['num_prompts']} {kind}" for kind, one in facts.items())
    unknown = config.model is not None and has_no_record(config.model)
    return [
        f"probe: {counts} prompts, every {config.probe.steps} steps and at the end",
        *([f"probe: {NO_RECORD % config.model}"] if unknown else []),
        *([_OPENING % (chat.opening, config.probe.max_new_tokens)] if chat.opening else []),
    ]


def _prompts(
    config: SftConfig | AlignConfig, chat: ChatEncoder, start: Start, trained: Hashes
) -> tuple[list[ProbePrompt], list[Path], dict[str, Any]]:
    """Return the prompts, the files that they are from, and the facts by kind.

    `trained`: the hashes of this training; those of the start, if they are not among them, count too.
    """
    probe = config.probe
    assert probe is not None
    of_start = trained_prompts(config.model) if config.model else None
    before = merged_hashes([]) if of_start is None else of_start
    files: list[Path] = []
    chosen: list[ProbePrompt] = []
    facts: dict[str, Any] = {}
    longest = config.max_length - probe.max_new_tokens
    limit = ids_to_check(start.tokenizer, start.num_embeddings)
    for kind in (kind for kind in KINDS if getattr(probe, kind) is not None):
        found, own, elsewhere = _read(getattr(probe, kind), probe)
        files += own
        ours = [one for one in found if one.kind not in _OTHER[kind]]
        old = [asked_in_training(one, before) for one in ours]
        known = [is_old or asked_in_training(one, trained) for one, is_old in zip(ours, old, strict=True)]
        rows = [_encoded(one, kind, probe, chat) for one in compress(ours, map(operator.not_, known))]
        for row in rows:
            check_ids(
                [*row.prompt_ids, *row.before_refusal, *(ids for one in row.refusals for ids in one)],
                start.tokenizer,
                limit,
                row.id,
            )
        fitting = [row for row in rows if len(row.prompt_ids) <= longest]
        facts[kind] = {"of_another_kind": len(found) - len(ours), "too_long": len(rows) - len(fitting)}
        if elsewhere:
            facts[kind]["in_another_part"] = elsewhere
        by = {f"in the training of the start, {config.model}": sum(old)}
        by["in this training" + " alone" * any(old)] = sum(known) - sum(old)
        trained_on = ", ".join(f"{count} {where}" for where, count in by.items() if count)
        if trained_on:
            logger.warning(
                "probe.%s: %d of %d prompts are trained on (%s) and are left out, such as %.120r",
                kind, sum(known), len(ours), trained_on, next(compress(ours, known)).messages[-1].content,
            )  # fmt: skip
        if not fitting:
            counts = [f"{count} {reason.replace('_', ' ')}" for reason, count in facts[kind].items()]
            raise DataError(
                f"probe.{kind}: no prompt is left ({', '.join([*counts, trained_on or '0 trained on'])}); give prompts "
                "that are not trained on"
            )
        drawn = draw(fitting, probe.limit, f"probe {kind} {config.seed}")
        chosen += drawn
        facts[kind] = {"num_prompts": len(drawn), **facts[kind], "trained_on": sum(known)}
        if any(old):
            facts[kind]["trained_on_by_start"] = sum(old)
    return chosen, list(dict.fromkeys(files)), facts


def _read(sources: Sequence[str], probe: ProbeConfig) -> tuple[list[Prompt], list[Path], int]:
    """Return the prompts of files and suites, each text once, their files, and how many the split leaves out.

    Ids that several files use are replaced by ones made from the messages: answers are kept by them.
    """
    prompts: list[Prompt] = []
    files: list[Path] = []
    elsewhere = 0
    for source in sources:
        is_suite = source in known_sets() or source in known_suites() or source.lower().endswith((".yaml", ".yml"))
        for suite in load_suites([source]) if is_suite else ():
            if suite.kind != "generative":
                raise DataError(f"probe: {suite.name} is a {suite.kind} suite, which has no prompts to be answered")
            try:
                found = find_prompts(suite, probe.folders, limit=None, seed=0, split=probe.split)
            except DataError as error:
                kind = ServerError if isinstance(error.__cause__, ServerError) else DataError  # a lost hub
                raise kind(f"probe: {suite.name}: {error}".replace("suites.folders", "probe.folders")) from error
            prompts += found.prompts
            files += found.files
            elsewhere += found.left_out.get(ELSEWHERE, 0)
        if not is_suite:
            read = read_prompt_files([source]).prompts
            try:
                kept = part_of(read, probe.split)
            except SettingError as error:
                raise SettingError(f"probe: {source}: {error}") from error
            prompts += kept
            files.append(Path(source))
            elsewhere += len(read) - len(kept)
    unique = {one.messages: one for one in prompts}.values()
    uses = Counter(one.id for one in unique)
    named = [replace(one, id=content_id(one.messages, one.tools)) if uses[one.id] > 1 else one for one in unique]
    return named, files, elsewhere


def _encoded(prompt: Prompt, kind: str, probe: ProbeConfig, chat: ChatEncoder) -> ProbePrompt:
    # What a template writes before an answer, such as empty thoughts, is common to answers that begin differently.
    other = next(sign for sign in "+=#%&@|~" if not any(text.startswith(sign) for text in probe.refusals))
    answers = [*probe.refusals, other]
    made = chat.encode(prompt.messages, answers, name=f"prompt {prompt.id}", tools=prompt.tools)
    *wholes, last = made.conversations
    begin = min(common_length(whole, last) for whole in wholes)
    refusals = tuple(tuple(whole[begin : begin + OPENING_TOKENS]) for whole in wholes)
    return ProbePrompt(f"{kind}/{prompt.id}", kind, prompt.messages, tuple(made.prompt), refusals, tuple(last[:begin]))
