"""The prompts of a behaviour probe, from files and suites: sorted by kind, without those that are trained on."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bfpo.config.probe import KINDS, ProbeConfig
from bfpo.config.train import TrainingKeys
from bfpo.core.errors import DataError
from bfpo.core.schema import Prompt
from bfpo.data.chat import ChatEncoder
from bfpo.data.prompts import read_prompt_files
from bfpo.data.split import draw
from bfpo.data.tokenize import IGNORED, check_ids, ids_to_check
from bfpo.runs.folder import RunFolder
from bfpo.suites.catalogue import known_sets, known_suites, load_suites
from bfpo.suites.files import find_prompts
from bfpo.training.inputs import Start
from bfpo.training.probe import OPENING_TOKENS, Probe, ProbePrompt

__all__ = ["load_probe", "probe_lines"]

logger = logging.getLogger(__name__)

_OTHER = {"harmful": {"benign", "borderline", "harmless"}, "harmless": {"harmful"}}  # kinds that a section leaves out
_BATCH = 512


def load_probe(
    config: TrainingKeys, folder: RunFolder, start: Start, trained_on: Mapping[str, Iterable[Any]]
) -> Probe | None:
    """Return the probe of a training, `None` without one; only the first process has its prompts.

    `trained_on`: the rows of each stream as token ids (`TokenPair` or `SftExample`); a prompt that one of them has, up
    to case and white space, is left out and named. The files are recorded in the run folder, and what was left out.
    Raises `DataError` for files that cannot be read and if no prompt of a kind is left, `ConfigError` for an unknown
    suite.
    """
    if config.probe is None:
        return None
    chat = ChatEncoder(start.tokenizer, start.settings["chat_template"], start.settings.get("chat_template_kwargs"))
    if not folder.is_writer:
        return Probe(config.probe, [], start.tokenizer, chat.end_id)
    prompts, files, facts = _prompts(config, chat, start, trained_on)
    folder.add_data("probe", files)
    folder.add_facts(probe=facts)
    return Probe(config.probe, prompts, start.tokenizer, chat.end_id)


def probe_lines(config: TrainingKeys, start: Start, trained_on: Mapping[str, Iterable[Any]]) -> list[str]:
    """Return what a dry run says of the probe; raises as `load_probe`."""
    if config.probe is None:
        return []
    chat = ChatEncoder(start.tokenizer, start.settings["chat_template"], start.settings.get("chat_template_kwargs"))
    _, _, facts = _prompts(config, chat, start, trained_on)
    counts = ", ".join(f"{one['num_prompts']} {kind}" for kind, one in facts.items())
    return [f"probe: {counts} prompts, every {config.probe.steps} steps and at the end"]


def _prompts(
    config: TrainingKeys, chat: ChatEncoder, start: Start, trained_on: Mapping[str, Iterable[Any]]
) -> tuple[list[ProbePrompt], list[Path], dict[str, Any]]:
    """Return the prompts, the files that they are from, and the facts by kind."""
    probe = config.probe
    assert probe is not None
    given = {kind: sources for kind in KINDS if (sources := getattr(probe, kind)) is not None}
    files: list[Path] = []
    encoded: dict[str, list[ProbePrompt]] = {}
    facts: dict[str, Any] = {}
    longest = config.max_length - probe.max_new_tokens
    limit = ids_to_check(start.tokenizer, start.num_embeddings)
    for kind, sources in given.items():
        found, own = _read(sources, probe)
        files += own
        ours = [one for one in found if one.kind not in _OTHER[kind]]
        rows = [_encoded(one, kind, probe, chat) for one in ours]
        for row in rows:
            check_ids([*row.prompt_ids, *(ids for one in row.refusals for ids in one)], start.tokenizer, limit, row.id)
        encoded[kind] = [row for row in rows if len(row.prompt_ids) <= longest]
        facts[kind] = {"of_another_kind": len(found) - len(ours), "too_long": len(rows) - len(encoded[kind])}
    texts = {kind: [_normalised(text) for text in _decoded(start.tokenizer, (row.prompt_ids for row in rows))]
             for kind, rows in encoded.items()}  # fmt: skip
    seen = _seen({text for some in texts.values() for text in some}, trained_on, start.tokenizer)
    chosen: list[ProbePrompt] = []
    for kind, rows in encoded.items():
        fresh = [row for row, text in zip(rows, texts[kind], strict=True) if text not in seen]
        known = [row for row, text in zip(rows, texts[kind], strict=True) if text in seen]
        if known:
            logger.warning(
                "probe.%s: %d of %d prompts are also in the training data (%s) and are left out, such as %.120r",
                kind, len(known), len(rows), ", ".join(sorted(set(seen.values()))), known[0].text,
            )  # fmt: skip
        if not fresh:
            counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in facts[kind].items())
            raise DataError(
                f"probe.{kind}: no prompt is left ({counts}, {len(known)} in the training data); give prompts that are "
                "not trained on"
            )
        drawn = draw(fresh, probe.limit, f"probe {kind} {config.seed}")
        chosen += drawn
        facts[kind] = {"num_prompts": len(drawn), **facts[kind], "trained_on": len(known)}
    return chosen, list(dict.fromkeys(files)), facts


def _read(sources: Sequence[str], probe: ProbeConfig) -> tuple[list[Prompt], list[Path]]:
    """Return the prompts of files and suites, each text once, and the files that they are from."""
    prompts: list[Prompt] = []
    files: list[Path] = []
    for source in sources:
        is_suite = source in known_sets() or source in known_suites() or source.lower().endswith((".yaml", ".yml"))
        for suite in load_suites([source]) if is_suite else ():
            if suite.kind != "generative":
                raise DataError(f"probe: {suite.name} is a {suite.kind} suite, which has no prompts to be answered")
            try:
                found = find_prompts(suite, probe.folders, limit=None, seed=0)
            except DataError as error:
                raise DataError(f"probe: {suite.name}: {error}".replace("suites.folders", "probe.folders")) from error
            prompts += found.prompts
            files += found.files
        if not is_suite:
            prompts += read_prompt_files([source]).prompts
            files.append(Path(source))
    return list({one.messages: one for one in prompts}.values()), files


def _encoded(prompt: Prompt, kind: str, probe: ProbeConfig, chat: ChatEncoder) -> ProbePrompt:
    made = chat.encode(prompt.messages, probe.refusals, name=f"prompt {prompt.id}", tools=prompt.tools)
    begin = len(made.prompt)
    refusals = tuple(tuple(whole[begin : begin + OPENING_TOKENS]) for whole in made.conversations)
    return ProbePrompt(f"{kind}/{prompt.id}", kind, prompt.messages, tuple(made.prompt), refusals)


def _seen(wanted: set[str], trained_on: Mapping[str, Iterable[Any]], tokenizer: Any) -> dict[str, str]:
    """Return the wanted texts that are prompts of the training, each with the stream it is in."""
    found: dict[str, str] = {}
    for stream, rows in trained_on.items():
        for text in _decoded(tokenizer, map(_prompt_ids, rows)):
            if (normalised := _normalised(text)) in wanted:
                found.setdefault(normalised, stream)
    return found


def _prompt_ids(row: Any) -> Sequence[int]:
    if not isinstance(row, Mapping):
        ids: Sequence[int] = row.prompt_ids
        return ids
    end = next((place for place, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
    taught: Sequence[int] = row["input_ids"][:end]
    return taught


def _decoded(tokenizer: Any, rows: Iterable[Sequence[int]]) -> Iterator[str]:
    waiting = iter(rows)
    while batch := [list(map(int, ids)) for ids in islice(waiting, _BATCH)]:
        yield from tokenizer.batch_decode(batch)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
