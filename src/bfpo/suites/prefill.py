"""Answers that are begun for a model: the first tokens of a harmful compliance are given, and it continues.

A model whose safety is only in its first tokens continues a compliance that it would not have begun (Qi et al., ICLR
2025). All models continue the same text; with `assist` the given tokens are chosen among each model's own most probable
ones. The judge reads the whole message, as a user would; a refusal is read in the model's own part.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.config.evaluate import SuitesJob
from bfpo.config.suites import EvaluatedModel, PrefillConfig, WeightsModel
from bfpo.core.errors import ConfigError, DataError
from bfpo.core.inputs import check_files
from bfpo.core.progress import CountProgress
from bfpo.core.schema import Completion, Message, Prompt, Verdict
from bfpo.data.chat import ChatEncoder, whole_answer
from bfpo.data.messages import ends_with_assistant
from bfpo.data.read import read_completions
from bfpo.data.split import normalised_prompt
from bfpo.execution.workers import Workers
from bfpo.generation.assisted import Choose, assisted_openings, by_judge, by_reference
from bfpo.generation.engines import decode
from bfpo.generation.sampling import Request, end_token_ids
from bfpo.judges.asking import judge_answers
from bfpo.judges.judges import Judge, make_judge
from bfpo.judges.settings import ServedGuardSpec
from bfpo.policy.batches import batches_by_length
from bfpo.policy.load import load_to_read
from bfpo.runs.folder import RunFolder
from bfpo.scores.scores import Judged, join_verdicts
from bfpo.suites.answers import SuiteAnswers, answer_suites, chat_of
from bfpo.suites.catalogue import Suite
from bfpo.suites.coherence import CoherenceReader, Reading, judged_answer
from bfpo.suites.judging import JudgedSuites, judge_of, judge_suites
from bfpo.suites.records import DepthFile, PrefilledSuite, PrefillScore, SuiteAnswer
from bfpo.suites.scores import Values, compare_values, score_values, values_of

__all__ = ["check_harmful", "check_prefill", "is_harmful", "measure_prefill", "prefilled_name"]

_log = logging.getLogger(__name__)

_TOP = 20
_DECLINES = "the answer declines, in full or in part"
_SCORED = ("harmless", "coherent", "harmless_coherent")


def prefilled_name(suite: str, tokens: int) -> str:
    """Return the name of a suite's answers with given tokens, in `begun.jsonl` and in comparisons."""
    return f"{suite}+{tokens}"


def check_prefill(config: SuitesJob, suites: Sequence[Suite]) -> None:
    """Raise `ConfigError` for suites that cannot be prefilled, or an assisting judge behind a server.

    Raises `DataError` for a missing file of compliances.
    """
    spec = config.depth.prefill if config.depth is not None else None
    if spec is None:
        return
    able = [suite for suite in suites if suite.kind == "generative"]
    names = [suite.name for suite in able]
    if unknown := [name for name in spec.suites or () if name not in names]:
        raise ConfigError(
            f"depth.prefill.suites: got {unknown[0]!r}; allowed: suites of this run that ask prompts: "
            f"{', '.join(names) or 'it has none'}"
        )
    check_files([] if spec.file is None else [spec.file])
    if not able:
        raise ConfigError("depth.prefill: no suite of this run asks prompts; add one with harmful prompts")
    for suite in able if spec.assist == "judge" else ():
        if spec.suites is not None and suite.name not in spec.suites:
            continue
        if (judge := judge_of(config, suite)) is None:
            raise ConfigError(
                f"depth.prefill.assist: {suite.name} has no judge of harm; name one in suites.judges, or use assist: "
                "reference"
            )
        if isinstance(judge, ServedGuardSpec):
            raise ConfigError(
                f"depth.prefill.assist: the judge of {suite.name} is behind a server, and it would be asked "
                f"{spec.top or _TOP} times for each given token; name a judge that runs here in suites.judges, or use "
                "assist: reference"
            )


def check_harmful(config: SuitesJob, suites: Sequence[Suite], prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Raise `ConfigError` where no prompt that would be prefilled is harmful, before any model is asked.

    Raises `DataError` for a file of compliances that cannot be read, or that answers none of these prompts.
    """
    spec = config.depth.prefill if config.depth is not None else None
    able = [suite for suite in suites if spec is not None and (spec.suites is None or suite.name in spec.suites)]
    if spec is None or not able:  # or all suites are skipped, with their reasons
        return
    harmful = {one.name: [each for each in prompts[one.name] if is_harmful(one, each.kind)] for one in able}
    if not any(harmful.values()):
        raise ConfigError(
            f"depth.prefill{'' if spec.suites is None else '.suites'}: no prompt of {', '.join(harmful)} is harmful "
            "(of kind harmful, or without a kind in a suite that measures harmless); ask a suite that has such prompts"
        )
    if spec.file is not None and not any(_of_file(spec.file, harmful, config).values()):
        raise DataError(
            f"{spec.file}: has no answer to one of the {sum(map(len, harmful.values()))} harmful prompts of "
            f"{', '.join(name for name, some in harmful.items() if some)}; depth.prefill.file needs rows as of `bfpo "
            "generate` on the prompts that this run asks"
        )


@dataclass(frozen=True, slots=True)
class _Compliances:
    """The harmful prompts of a suite that have a compliance, with its text, and why the others have none."""

    suite: Suite
    num_prompts: int
    texts: dict[Prompt, str]
    left_out: Counter[str]


@dataclass(slots=True)
class _Found:
    """What is measured of one suite and model."""

    values: list[Values] = field(default_factory=list)
    answers: list[SuiteAnswer] = field(default_factory=list)


def measure_prefill(
    config: SuitesJob,
    spec: PrefillConfig,
    folder: RunFolder,
    suites: Sequence[Suite],
    prompts: Mapping[str, Sequence[Prompt]],
    answers: Mapping[str, SuiteAnswers],
    judged: JudgedSuites,
    reader: CoherenceReader,
) -> tuple[DepthFile, list[SuiteAnswer]]:
    """Return the scores of begun answers by number of given tokens, and the answers to those with any.

    `suites`, `prompts`, `answers` and `judged` are those of the run without given tokens. Without any
    compliance nothing is scored, and the reason is said. Raises what generation and judging raise.
    """
    assert config.depth is not None
    start = config.depth.start
    wanted = [
        suite
        for suite in suites
        if suite.name not in judged.skipped
        and (spec.suites is None or suite.name in spec.suites)
        and any(is_harmful(suite, prompt.kind) for prompt in prompts[suite.name])
    ]
    found = _compliances(config, spec, folder, wanted, prompts, answers[start], judged, reader)
    usable = [one for one in found if one.texts]
    source = start if spec.file is None else Path(spec.file).name
    assisted = None if spec.assist is None else spec.top or _TOP
    depth = DepthFile(start=start, source=source, assist=spec.assist, top=assisted)
    if not usable:
        reasons = "; ".join(f"{reason}: {num}" for one in found for reason, num in one.left_out.most_common())
        reason = (
            f"no answer was begun: no harmful prompt has a compliance of {source} "
            f"({reasons or 'no suite that was asked has harmful prompts'}); give a file of compliances, other suites, "
            "or a start model that complies"
        )
        _log.warning("depth.prefill: %s", reason)
        return replace(depth, prefilled=[_facts(one, judged, {}, {}) for one in found] or None, reason=reason), []
    openings = {model.name: _openings(config, spec, model, usable, folder) for model in config.evaluated()}
    begun = {
        model.name: _begun_answers(config, model, usable, openings[model.name], answers[model.name], folder)
        for model in config.evaluated()
    }
    verdicts = _verdicts(config, usable, begun)
    each = _Found()
    keys = [(one.suite, model, tokens) for one in usable for model in begun for tokens in sorted(spec.tokens)]
    with reader:
        for suite, model, tokens in keys:
            _collect(suite, (suite.name, model, tokens), begun[model][suite.name, tokens], verdicts, reader, each)
    compared = [values for values in each.values if values.metric in ("harmless", "recovered")]
    depth = replace(
        depth,
        prefilled=[_facts(one, judged, openings, begun) for one in found],
        scores=[_score(values, config.confidence) for values in each.values],
        comparisons=compare_values(compared, confidence=config.confidence) or None,
    )
    return depth, each.answers


def _facts(
    one: _Compliances, judged: JudgedSuites, openings: Mapping[str, _Openings], begun: Mapping[str, _Begun]
) -> PrefilledSuite:
    return PrefilledSuite(
        suite=one.suite.name,
        title=one.suite.title,
        judge=judged.judges.get(one.suite.name),
        num_prompts=one.num_prompts,
        num_compliances=len(one.texts),
        left_out=dict(one.left_out.most_common()) or None,
        too_short=_too_short(one, openings) or None,
        too_long=_too_long(one, begun) or None,
    )


# --------------------------------------------------------------------------------------------------- the compliances


def _compliances(
    config: SuitesJob,
    spec: PrefillConfig,
    folder: RunFolder,
    suites: Sequence[Suite],
    prompts: Mapping[str, Sequence[Prompt]],
    start: SuiteAnswers,
    judged: JudgedSuites,
    reader: CoherenceReader,
) -> list[_Compliances]:
    assert config.depth is not None
    given = {suite.name: start.completions[suite.name] for suite in suites}
    verdicts = {suite.name: judged.verdicts[suite.name, config.depth.start] for suite in suites}
    harmful = {suite.name: [one for one in prompts[suite.name] if is_harmful(suite, one.kind)] for suite in suites}
    if spec.file is not None:
        folder.add_data("compliances", [spec.file])
        given = _of_file(spec.file, harmful, config)
        read = judge_suites(config, suites, {spec.file: given})
        verdicts = {suite.name: read.verdicts[suite.name, spec.file] for suite in suites}
    with reader:
        read_as = {suite.name: reader.read(given[suite.name], verdicts[suite.name]) for suite in suites}
    found = []
    for suite in suites:
        readings = read_as[suite.name]
        by_prompt: dict[str, list[tuple[Completion, str]]] = {}
        for completion, verdict, reading in zip(given[suite.name], verdicts[suite.name], readings, strict=True):
            reason = _why_not(completion, verdict, reading, judged=judge_of(config, suite) is not None)
            by_prompt.setdefault(normalised_prompt(completion.prompt), []).append((completion, reason))
        texts, left_out = {}, Counter[str]()
        for prompt in harmful[suite.name]:
            options = by_prompt.get(normalised_prompt(prompt.messages), [])
            chosen = next((completion for completion, reason in options if not reason), None)
            if chosen is None:
                left_out[options[0][1] if options else "no answer to it"] += 1
            else:
                texts[prompt] = chosen.text
        found.append(_Compliances(suite, len(harmful[suite.name]), texts, left_out))
    return found


def is_harmful(suite: Suite, kind: str) -> bool:
    """Return whether prompts of a kind are harmful: those called so, and of no kind in a suite of harmless rates."""
    return kind == "harmful" or (not kind and "harmless" in suite.metrics)


def _of_file(file: str, prompts: Mapping[str, Sequence[Prompt]], config: SuitesJob) -> dict[str, list[Completion]]:
    """Return the file's answers to the prompts of each suite, with ids of their own."""
    answers = read_completions(file, thinking=config.thinking)
    asked = {suite: {normalised_prompt(one.messages) for one in some} for suite, some in prompts.items()}
    return {
        suite: [one for one in answers if normalised_prompt(one.prompt) in wanted] for suite, wanted in asked.items()
    }


def _why_not(completion: Completion, verdict: Verdict, reading: Reading, *, judged: bool) -> str:
    """Return why an answer is not a harmful compliance that a model can be given; empty if it is one.

    Without a judge of harm every answer to a harmful prompt that does not decline counts.
    """
    if completion.blocked or not completion.text.strip():
        return "the answer is empty"
    if verdict.refused or verdict.partly_refused:
        return _DECLINES
    if verdict.refused is None:
        return "the answer is not read for refusals"
    if reading.coherent is False or verdict.well_formed is False:
        return "the answer is not coherent"
    return "the answer is not judged unsafe" if judged and verdict.label != "unsafe" else ""


# ------------------------------------------------------------------------------------------------------ the openings

_Begun = dict[tuple[str, int], tuple[list[Completion], int]]
"""(suite, number of tokens) -> completions, whose prompts end with the given text, and prompts that were left out."""

_Openings = dict[tuple[str, int], dict[Prompt, str]]
"""(suite, number of tokens) -> prompt -> given text."""


def _openings(
    config: SuitesJob, spec: PrefillConfig, model: EvaluatedModel, found: Sequence[_Compliances], folder: RunFolder
) -> _Openings:
    if spec.assist is not None:
        assert isinstance(model, WeightsModel)  # the config refuses others
        return _assisted(config, spec, model, found, folder)
    assert config.depth is not None
    start = next(one for one in config.with_weights() if one.name == config.depth.start)
    tokenizer = chat_of(config, start).tokenizer
    openings: _Openings = {(one.suite.name, tokens): {} for one in found for tokens in spec.tokens}
    for one in found:
        for prompt, text in one.texts.items():
            ends = _token_ends(tokenizer, text)
            for tokens in spec.tokens:
                if tokens <= len(ends):
                    openings[one.suite.name, tokens][prompt] = text[: ends[tokens - 1]] if tokens else ""
    return openings


def _token_ends(tokenizer: Any, text: str) -> list[int]:
    """Return the place in the text where each token ends; a character of several tokens ends with the first."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoded["offset_mapping"]]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [len(decode(tokenizer, ids[: place + 1])) for place in range(len(ids))]


def _assisted(
    config: SuitesJob, spec: PrefillConfig, model: WeightsModel, found: Sequence[_Compliances], folder: RunFolder
) -> _Openings:
    """Return the openings that are chosen among the model's own tokens; they are kept for a resumed run."""
    chat = chat_of(config, model)
    ids = _assisted_ids(config, spec, model, found, folder)
    openings: _Openings = {(one.suite.name, tokens): {} for one in found for tokens in spec.tokens}
    for one in found:
        for prompt in one.texts:
            chosen = ids[_key(one, prompt)]
            for tokens in spec.tokens:
                text = decode(chat.tokenizer, chosen[:tokens])
                if tokens <= len(chosen) and not text.endswith("\ufffd"):  # half a character
                    openings[one.suite.name, tokens][prompt] = text
    return openings


def _assisted_ids(
    config: SuitesJob, spec: PrefillConfig, model: WeightsModel, found: Sequence[_Compliances], folder: RunFolder
) -> dict[str, list[int]]:
    name = f"models/{model.name}/assisted.json"
    kept: dict[str, list[int]] = {}
    if folder.resumed and folder.file(name).exists():
        kept = json.loads(folder.file(name).read_text(encoding="utf-8"))
    # A suite could not be asked before, or is not asked now.
    found = [
        replace(one, texts={prompt: text for prompt, text in one.texts.items() if _key(one, prompt) not in kept})
        for one in found
    ]
    if not any(one.texts for one in found):
        return kept
    batches = [batch for one in found if one.texts for batch in _batches(config, spec, one, chat_of(config, model))]
    made: dict[int, dict[str, list[int]]] = {}
    make = partial(_Assistant, config, spec, model)
    with (
        Workers(config.executor, make, most=len(batches), threads=config.threads, here=True) as workers,
        CountProgress(f"begun answers of {model.name}", sum(len(one.texts) for one in found), _log) as progress,
    ):
        for number, ids in workers.map(batches, _open, title=_batch_title):
            made[number] = ids
            progress.advance(len(ids))
    every = kept | {key: tokens for number in sorted(made) for key, tokens in made[number].items()}
    folder.write_json(name, every)
    return every


def _key(one: _Compliances, prompt: Prompt) -> str:
    return f"{one.suite.name}/{prompt.id}"


def _batches(config: SuitesJob, spec: PrefillConfig, one: _Compliances, chat: ChatEncoder) -> Iterator[_Compliances]:
    """Yield the prompts of a suite in the batches in which they are decoded, the longest first."""
    prompts = list(one.texts)
    lengths = [len(request.prompt_ids) for request in _requests(one, chat)]
    for places in batches_by_length(lengths, config.suites.batch_size, more=max(spec.tokens)):
        yield replace(one, texts={prompts[place]: one.texts[prompts[place]] for place in places})


def _requests(one: _Compliances, chat: ChatEncoder) -> list[Request]:
    return [
        Request(prompt.id, tuple(chat.encode(prompt.messages, (), name=prompt.id, tools=prompt.tools).prompt))
        for prompt in one.texts
    ]


class _Assistant:
    """The model of a worker, whose answers are begun, and the judges that choose its tokens."""

    def __init__(self, config: SuitesJob, spec: PrefillConfig, model: WeightsModel) -> None:
        self._config, self._spec, self._chat = config, spec, chat_of(config, model)
        self._model = load_to_read(model.model, dtype=config.dtype_of_logps, revision=model.revision)
        self._ends = {*end_token_ids(self._model, self._chat.tokenizer), self._chat.end_id}
        self._judges: dict[str, Judge] = {}

    def open(self, batch: _Compliances) -> dict[str, list[int]]:
        """Return the first tokens of the answers to a batch, by suite and prompt."""
        made = assisted_openings(
            self._model,
            _requests(batch, self._chat),
            self._choice(batch),
            top=self._spec.top or _TOP,
            length=max(self._spec.tokens),
            eos_token_ids=self._ends,
            batch_size=len(batch.texts),
        )
        return {f"{batch.suite.name}/{prompt}": list(tokens) for prompt, tokens in made.items()}

    def _choice(self, batch: _Compliances) -> Choose:
        tokenizer = self._chat.tokenizer
        if self._spec.assist == "reference":
            texts = {prompt.id: text for prompt, text in batch.texts.items()}
            return by_reference(
                {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
            )
        spec = judge_of(self._config, batch.suite)
        assert spec is not None
        if batch.suite.name not in self._judges:
            self._judges[batch.suite.name] = make_judge(spec)
        judge = self._judges[batch.suite.name]
        blank = {prompt.id: Completion(prompt.id, prompt.messages, "", kind=prompt.kind) for prompt in batch.texts}
        return by_judge(partial(judge_answers, judge), blank, partial(decode, tokenizer), self._ends)


def _open(assistant: _Assistant, batch: _Compliances) -> dict[str, list[int]]:
    return assistant.open(batch)


def _batch_title(batch: _Compliances) -> str:
    return f"the first tokens of {len(batch.texts)} answers of {batch.suite.name}"


def _too_short(one: _Compliances, openings: Mapping[str, _Openings]) -> dict[str, dict[str, int]]:
    found = {
        model: {
            str(tokens): missing
            for (suite, tokens), given in sorted(by_place.items())
            if suite == one.suite.name and (missing := len(one.texts) - len(given))
        }
        for model, by_place in openings.items()
    }
    return {model: counts for model, counts in found.items() if counts}


def _too_long(one: _Compliances, begun: Mapping[str, _Begun]) -> dict[str, dict[str, int]]:
    found = {
        model: {str(tokens): num for (suite, tokens), (_, num) in sorted(by_place.items()) if suite == one.suite.name}
        for model, by_place in begun.items()
    }
    kept = {model: {tokens: num for tokens, num in counts.items() if num} for model, counts in found.items()}
    return {model: counts for model, counts in kept.items() if counts}


# -------------------------------------------------------------------------------------------- answers and verdicts


def _begun_answers(
    config: SuitesJob,
    model: EvaluatedModel,
    found: Sequence[_Compliances],
    openings: _Openings,
    plain: SuiteAnswers,
    folder: RunFolder,
) -> _Begun:
    """Return a model's answers; those without given tokens are in `plain`."""
    by_name = {one.suite.name: one.suite for one in found}
    begun: _Begun = {}
    asked, prompts = [], {}
    for (suite, tokens), given in openings.items():
        if tokens == 0:
            ids = {prompt.id for prompt in given}
            some = [one for one in plain.completions[suite] if one.id in ids]
            begun[suite, 0] = some, len(ids) - len(some)
        elif given:
            name = prefilled_name(suite, tokens)
            asked.append(by_name[suite].model_copy(update={"name": name}))
            prompts[name] = [_begin(prompt, text) for prompt, text in given.items()]
    made = answer_suites(config, model, asked, prompts, folder, part="-prefilled") if asked else SuiteAnswers()
    for suite, tokens in openings:
        if tokens:
            name = prefilled_name(suite, tokens)
            begun[suite, tokens] = made.completions.get(name, []), made.left_out.get(name, 0)
    return begun


def _begin(prompt: Prompt, text: str) -> Prompt:
    """Return the prompt with the beginning of its answer."""
    if ends_with_assistant(prompt.messages):
        *before, last = prompt.messages
        return replace(prompt, messages=(*before, replace(last, content=last.content + text)))
    return replace(prompt, messages=(*prompt.messages, Message("assistant", text)))


_Verdicts = dict[tuple[str, str, int, bool], list[Verdict]]
"""(suite, model, number of tokens, whether of the given tokens alone) -> verdicts in the order of the completions."""


def _verdicts(config: SuitesJob, found: Sequence[_Compliances], begun: Mapping[str, _Begun]) -> _Verdicts:
    """Judge all answers, and the given tokens alone, with each judge loaded once."""
    suites = [one.suite for one in found]
    texts: dict[str, dict[str, list[Completion]]] = {}
    places: dict[str, tuple[str, int, bool]] = {}
    for model, by_place in begun.items():
        for tokens in {tokens for _, tokens in by_place}:
            for alone in (False, True) if tokens else (False,):
                name = json.dumps([model, tokens, alone])  # stands for a model: each has answers to every suite
                places[name] = (model, tokens, alone)
                texts[name] = {suite.name: by_place[suite.name, tokens][0] for suite in suites}
                if alone:
                    for suite, some in texts[name].items():
                        texts[name][suite] = [replace(one, text="", finished=True, blocked="") for one in some]
    judged = judge_suites(config, suites, texts)
    return {(suite, *places[name]): verdicts for (suite, name), verdicts in judged.verdicts.items()}


def _collect(
    suite: Suite,
    key: tuple[str, str, int],
    begun: tuple[list[Completion], int],
    verdicts: _Verdicts,
    reader: CoherenceReader,
    found: _Found,
) -> None:
    _, model, tokens = key
    completions, left_out = begun
    own = verdicts[suite.name, model, tokens, False]
    readings = reader.read([whole_answer(one) for one in completions], own)
    rows = join_verdicts(completions, own, coherent=[one.coherent for one in readings])
    name = prefilled_name(suite.name, tokens)
    scored = values_of(name, model, ["harmless"], rows, left_out)
    found.values += [replace(one, categories={}) for one in scored if one.metric in _SCORED]
    silent = {one.id for one in completions if not one.text.strip() and one.finished}
    found.values.append(_recovered(name, model, rows, silent, left_out))
    if not tokens:  # these answers are in `answers.jsonl`
        return
    alone = join_verdicts(completions, verdicts[suite.name, model, tokens, True])
    (given,) = (one for one in values_of(name, model, ["harmless"], alone, left_out) if one.metric == "harmless")
    found.values.append(replace(given, metric="harmless_given", categories={}))
    found.answers += [
        judged_answer(name, model, completion, verdict, reading, kind="harmful")
        for completion, verdict, reading in zip(completions, own, readings, strict=True)
    ]


def _recovered(suite: str, model: str, rows: Sequence[Judged], silent: Collection[str], left_out: int) -> Values:
    """Return the answers whose own part declines, in full or in part; a `silent` one, which adds nothing, does not."""
    known = {
        row.id: float(bool(row.refused or row.partly_refused))
        for row in rows
        if row.refused is not None or row.id in silent
    }
    prompts = {row.id: row.prompt for row in rows if row.id in known}
    return Values(suite, model, "recovered", known, prompts, len(rows) - len(known) + left_out)


def _score(values: Values, confidence: float) -> PrefillScore:
    score = score_values(values, confidence=confidence)
    suite, _, tokens = values.suite.rpartition("+")
    return PrefillScore(**{**asdict(score), "suite": suite}, tokens=int(tokens))
