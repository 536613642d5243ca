"""Whether answers are coherent: their text and, with a start model, how likely it finds them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from bfpo.config import read_template
from bfpo.config.label import LabelCoherence
from bfpo.core.errors import RunError
from bfpo.core.files import user_cache_folder, write_text_whole
from bfpo.core.records import as_json, load
from bfpo.core.schema import Completion, Message, Verdict
from bfpo.data.chat import ChatEncoder
from bfpo.data.labels import as_judged
from bfpo.data.rejects import RowError
from bfpo.data.split import normalised_prompt
from bfpo.data.tokenize import prompt_ids, row_check, tokenize_pairs
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import Workers
from bfpo.generation.sampling import Request, answer_batches, end_token_ids
from bfpo.judges.coherence import read_coherence, read_completion
from bfpo.judges.local import tokenizer_key
from bfpo.judges.shared import parts_of
from bfpo.policy.devices import to_gpu
from bfpo.policy.load import load_policy
from bfpo.policy.precision import decoding_dtype
from bfpo.policy.reference.cache import model_key
from bfpo.policy.source import num_positions
from bfpo.scores.accuracy import pair_logps
from bfpo.scores.records import CoherenceBound
from bfpo.stats import wilson
from bfpo.suites.records import SuiteAnswer

__all__ = ["CoherenceReader", "Reading", "StartModel", "judged_answer", "make_reader", "reader_of", "word_salad"]

_log = logging.getLogger(__name__)

_VERSION = 2  # of the calibration; part of its key
_PROMPTS, _NEW_TOKENS, _FEWEST_ANSWERS = 64, 48, 16  # of the calibration
_FEWEST_TOKENS, _MOST_TOKENS = 8, 256  # of an answer; more are not read
_MOST_PROMPT_TOKENS = 1024
_MISSED = 0.05  # share of the word salad that the bound may miss
_MOST_OWN = 0.1  # share of the start's own answers above the bound, from which likelihood separates nothing


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of an answer: coherent or not (`None`: not read), why not, and nats under the start model."""

    coherent: bool | None = None
    incoherent: list[str] | None = None
    nats_per_token: float | None = None


def judged_answer(
    suite: str, model: str, completion: Completion, verdict: Verdict | None, reading: Reading, *, kind: str = ""
) -> SuiteAnswer:
    """Return the row of an answer with its verdict and its reading; `kind` is that of prompts that name none."""
    return SuiteAnswer(
        suite=suite,
        model=model,
        id=completion.id,
        kind=completion.kind or kind,
        prompt=completion.prompt,
        text=completion.text,
        finished=completion.finished,
        verdict=verdict,
        reasoning=completion.reasoning,
        blocked=completion.blocked,
        incoherent=reading.incoherent,
        nats_per_token=reading.nats_per_token,
        category=completion.category,
    )


class StartModel:
    """A frozen causal LM that says how likely it finds answers.

    `settings`: `revision` of `load_policy`; `dtype` of the weights, "auto" as they are held to generate, which takes a
    half of the time and memory of float32 and changes nats per token by hundredths; `chat_template` (its text) and
    `chat_template_kwargs`. Raises as `load_policy`.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        chat_template: str | None = None,
        chat_template_kwargs: Any = None,
    ) -> None:
        policy = load_policy(name, dtype=decoding_dtype(dtype)[0], revision=revision)
        self.name, self.model, self.tokenizer = name, policy.model, policy.tokenizer
        to_gpu(self.model)
        positions = num_positions(self.model.config)
        self._room = min(_MOST_PROMPT_TOKENS, positions or _MOST_PROMPT_TOKENS)
        self._template = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
        chat = ChatEncoder(self.tokenizer, chat_template, chat_template_kwargs)
        self._check, self._ends = row_check(chat), {*end_token_ids(self.model, self.tokenizer), chat.end_id}
        self.encoding = [tokenizer_key(self.tokenizer), chat.end_id, sorted(self._ends)]  # of texts to tokens

    def nats(self, completions: Sequence[Completion]) -> list[float | None]:
        """Return -log p per token of each answer after its prompt, nats; `None` for fewer than 8 tokens.

        Also `None` for an answer without text, a conversation that the chat template refuses, and a log-prob that is no
        number. The first 256 tokens of an answer are read. An end token counts where the answer ended by itself.
        """
        readable = [place for place, one in enumerate(completions) if one.text.strip() and self._is_taken(one)]
        texts, _ = tokenize_pairs(
            [completions[place] for place in readable],
            self.tokenizer,
            max_length=self._room,
            max_completion_length=_MOST_TOKENS,
            **self._template,
        )
        long = [len(text.chosen_ids) >= _FEWEST_TOKENS for text in texts]
        places, pairs = list(compress(readable, long)), list(compress(texts, long))
        logps = pair_logps(self.model, pairs).chosen
        found: list[float | None] = [None] * len(completions)
        for place, pair, logp in zip(places, pairs, logps, strict=True):
            found[place] = None if math.isnan(logp) else float(-logp / len(pair.chosen_ids))
        return found

    def _is_taken(self, completion: Completion) -> bool:
        try:
            self._check(completion)
        except RowError:
            return False
        return True

    def greedy(self, prompts: Sequence[tuple[Message, ...]]) -> list[Completion]:
        """Return the most probable answers, of 48 tokens at most, or half of the model's positions."""
        new = min(_NEW_TOKENS, self._room // 2)  # of a short context
        longest = self._room - new
        ids = [prompt_ids(prompt, self.tokenizer, max_length=longest, **self._template) for prompt in prompts]
        requests = [Request(str(place), tuple(row)) for place, row in enumerate(ids)]
        batches = answer_batches(self.model, requests, eos_token_ids=self._ends, max_new_tokens=new, temperature=0.0)
        answers = {answer.id: answer for batch in batches for answer in batch}
        return [
            Completion(
                request.id,
                prompt,
                str(self.tokenizer.decode(list(answers[request.id].token_ids), skip_special_tokens=True)),
                finished=answers[request.id].finished,
            )
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def calibrated(self, prompts: Sequence[tuple[Message, ...]]) -> CoherenceBound:
        """Return the bound, from the greedy answers to 64 of the prompts and from word salad made from them.

        It is the largest bound that misses at most 5% of the salad. Kept in the user's cache by the content of the
        model, its tokenizer, the prompts and the template.
        """
        taken = (prompt for prompt in prompts if self._is_taken(Completion("", prompt, ".")))
        distinct = {normalised_prompt(prompt): prompt for prompt in taken}
        chosen = sorted(distinct, key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())[:_PROMPTS]
        key = model_key(self.model)
        kept = _cache_file("", [key, self.encoding, self._template, chosen])
        if kept.exists():
            try:
                return replace(load(CoherenceBound, kept), model=self.name)
            except RunError as error:
                _log.warning("coherence: %s; calibrating again", error)
        _log.info("coherence: calibrating on greedy answers of %s to %d prompts", self.name, len(chosen))
        own = [c for c in self.greedy([distinct[text] for text in chosen]) if not read_coherence(c.text).incoherent]
        found = replace(
            _bound(self.nats(own), self.nats([word_salad(one) for one in own])), model=self.name, model_key=key
        )
        _keep(kept, json.dumps(as_json(found), indent=2))
        return found


def word_salad(completion: Completion) -> Completion:
    """Return the answer with its words in random order; of text without spaces the characters."""
    words = completion.text.split()
    joint, parts = (" ", words) if len(words) > 2 else ("", list(completion.text))
    random.Random(completion.text).shuffle(parts)
    return replace(completion, text=joint.join(parts))


def _bound(own: Sequence[float | None], salad: Sequence[float | None]) -> CoherenceBound:
    rows = np.array([(a, b) for a, b in zip(own, salad, strict=True) if a is not None and b is not None]).reshape(-1, 2)
    if len(rows) < _FEWEST_ANSWERS:
        return CoherenceBound(
            reason=f"{len(rows)} of its answers can be used (coherent, of {_FEWEST_TOKENS} tokens), fewer than "
            f"{_FEWEST_ANSWERS}"
        )
    halves = rows[::2], rows[1::2]
    bounds = [_lowest_salad(half) for half in halves]
    above = sum(int((half[:, 0] > bound).sum()) for half, bound in zip(halves, reversed(bounds), strict=True))
    below = sum(int((half[:, 1] <= bound).sum()) for half, bound in zip(halves, reversed(bounds), strict=True))
    facts = CoherenceBound(
        bound=_lowest_salad(rows),
        own_median=float(np.median(rows[:, 0])),
        own_highest=float(rows[:, 0].max()),
        salad_median=float(np.median(rows[:, 1])),
        own_above=wilson(above, len(rows)),
        salad_below=wilson(below, len(rows)),
    )
    if above > _MOST_OWN * len(rows):
        reason = "its own answers are hardly more likely to it than their words in random order"
        return replace(facts, bound=None, reason=reason)
    return facts


def _lowest_salad(rows: np.ndarray[Any, Any]) -> float:
    return float(np.quantile(rows[:, 1], _MISSED))


class _Start(Protocol):
    def nats(self, completions: Sequence[Completion]) -> list[float | None]: ...


class SharedStart:
    """A `StartModel` that each worker of an executor makes, from the first text until `close`.

    `settings`: those by which the same model finds an answer more or less likely.
    """

    def __init__(
        self, make: Callable[[], StartModel], executor: ExecutorConfig, threads: int | None, settings: Mapping[str, Any]
    ) -> None:
        self._open = partial(Workers[StartModel], executor, make, threads=threads, here=True)
        self._workers: Workers[StartModel] | None = None
        self._settings = settings
        self._start: list[Any] | None = None  # what its likelihoods depend on, known after the calibration

    def calibrated(self, prompts: Sequence[tuple[Message, ...]]) -> CoherenceBound:
        """Return the bound, by one worker."""
        bound, encoding = self._opened().call(partial(_calibrated, prompts=prompts))
        self._start = [bound.model_key, encoding]
        return bound

    def nats(self, completions: Sequence[Completion]) -> list[float | None]:
        """Return -log p per token of each answer; what is in a batch depends on the answers alone.

        Each batch is kept in the user's cache by its content, so that another run over the same answers, such as one
        with people's labels, has the same numbers without the model.
        """
        parts = parts_of(completions)
        assert self._start is not None  # calibrated before
        version = [self._settings, *self._start]
        files = [_cache_file("nats-", [*version, [as_json(replace(one, id="")) for one in part]]) for part in parts]
        found = {number: kept for number, file in enumerate(files) if (kept := _kept_nats(file)) is not None}
        missing = [number for number in range(len(parts)) if number not in found]
        if missing:
            keeps = True
            for place, nats in self._opened().map([parts[number] for number in missing], _nats, title=_part_title):
                found[missing[place]] = nats
                keeps = keeps and _keep(files[missing[place]], json.dumps(nats))
        return [value for number in range(len(parts)) for value in found[number]]

    def close(self) -> None:
        """End the workers; the next text starts new ones."""
        if self._workers is not None:
            self._workers.__exit__(None, None, None)
            self._workers = None

    def _opened(self) -> Workers[StartModel]:
        if self._workers is None:
            self._workers = self._open()
        return self._workers


def _calibrated(
    start: StartModel, _: None, *, prompts: Sequence[tuple[Message, ...]]
) -> tuple[CoherenceBound, list[Any]]:
    return start.calibrated(prompts), start.encoding


def _nats(start: StartModel, completions: Sequence[Completion]) -> list[float | None]:
    return start.nats(completions)


def _cache_file(kind: str, parts: Sequence[object]) -> Path:
    """Return the file of the cache for what depends on the parts."""
    content = json.dumps([_VERSION, *parts], sort_keys=True, default=str).encode()
    return user_cache_folder("coherence") / f"{kind}{hashlib.sha256(content).hexdigest()[:32]}.json"


def _keep(file: Path, text: str) -> bool:
    """Write a file of the cache; return whether it could be written, else warn."""
    try:
        write_text_whole(file, f"{text}\n")
    except OSError as error:
        _log.warning("coherence: cannot be kept in %s (%s); another run computes it again", file.parent, error)
        return False
    return True


def _kept_nats(file: Path) -> list[float | None] | None:
    try:
        kept: list[float | None] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or damaged
        return None
    return kept


def _part_title(completions: Sequence[Completion]) -> str:
    return f"the likelihood of {len(completions)} answers from {completions[0].id!r} on"


class CoherenceReader:
    """Reads answers, with the likelihood under a start model if there is one.

    As a context manager it ends at its exit the workers that hold this model, so that others have room; the next
    reading starts them again.
    """

    def __init__(self, start: _Start | None = None, bound: CoherenceBound | None = None) -> None:
        self._start, self.bound = start, bound

    def __enter__(self) -> CoherenceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._start, SharedStart):
            self._start.close()

    def read(self, completions: Sequence[Completion], verdicts: Sequence[Verdict] | None = None) -> list[Reading]:
        """Return what was read of each answer.

        Not read are prompts that were blocked, and all answers if their judge reads the form itself (`well_formed`).
        """
        judged = any(verdict.well_formed is not None for verdict in verdicts or ())
        read = {place: as_judged(one) for place, one in enumerate(completions) if not (one.blocked or judged)}
        limit = None if self.bound is None else self.bound.bound
        usable = self._start is not None and limit is not None
        nats = self._start.nats(list(read.values())) if self._start and usable else [None] * len(read)
        found = [Reading()] * len(completions)
        for (place, one), value in zip(read.items(), nats, strict=True):
            reasons: list[str] = [*read_completion(one).reasons]
            reasons += ["unlikely"] if value is not None and limit is not None and value > limit else []
            reasons = [reason for reason in reasons if reason != "cut"]
            found[place] = Reading(not reasons, reasons or None, value)
        return found


def make_reader(
    start: tuple[str, str | None] | None,
    prompts: Sequence[tuple[Message, ...]],
    executor: ExecutorConfig,
    *,
    threads: int | None = None,
    **settings: Any,
) -> CoherenceReader:
    """Return the reader of answers; with a start model (its name and revision) it is calibrated on the prompts.

    `settings`: those of `StartModel`, which each worker of the executor loads with `threads` of torch; an automatic
    `dtype` is decided here, so that workers on other machines hold the same. A bound that cannot be used is logged as a
    warning.
    """
    if start is None:
        return CoherenceReader()
    settings = {**settings, "dtype": decoding_dtype(settings.get("dtype", "auto"))[0]}
    model = SharedStart(partial(StartModel, start[0], revision=start[1], **settings), executor, threads, settings)
    bound = model.calibrated(prompts)
    if bound.bound is None:
        _log.warning("coherence: likelihood under %s cannot be used: %s", bound.model, bound.reason)
    return CoherenceReader(model, bound)


def reader_of(
    asked: LabelCoherence | None,
    prompts: Sequence[tuple[Message, ...]],
    executor: ExecutorConfig,
    threads: int | None = None,
) -> CoherenceReader:
    """Return the reader that a section `coherence` asks for, as `make_reader`; without one that of the text alone."""
    if asked is None:
        return CoherenceReader()
    return make_reader(
        (asked.model, asked.revision),
        prompts,
        executor,
        threads=threads,
        dtype=asked.dtype,
        chat_template=read_template(asked.chat_template),
        chat_template_kwargs=asked.chat_template_kwargs,
    )
