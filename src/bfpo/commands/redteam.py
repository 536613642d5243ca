"""STAGE: red-teaming: a model's answers to hard prompts are judged, ranked and made into training pairs.

It runs the stages `generate`, `label` and `prepare`, each in a subfolder with the files that it writes when run alone.
A stopped run continues in the stage that was stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bfpo.config import (
    AlignConfig,
    GenerateConfig,
    LabelConfig,
    PrepareConfig,
    RedteamConfig,
    StageConfig,
    load_config,
)
from bfpo.config.label import LabelCoherence
from bfpo.core.console import show
from bfpo.core.errors import BfpoError, DataError, ModelError, SettingError
from bfpo.core.records import load
from bfpo.core.schema import Completion, Message, Prompt
from bfpo.data.prompts import read_prompt_files
from bfpo.data.read import read_completions
from bfpo.data.split import part_of
from bfpo.data.write import pair_row, prompt_row
from bfpo.generation.server import RequestBudget
from bfpo.generation.settings import WeightsSpec
from bfpo.judges.fit import fit_table
from bfpo.judges.judges import check_opinions
from bfpo.judges.label_report import (
    FUNNEL_STEPS,
    Answers,
    answer_rates,
    measures_form,
    redteam_text,
    soft_label_warning,
    tried_text,
)
from bfpo.judges.needless import ReadAnswer, buffer_pairs, needless_text, over_refusal, read_answers, refused_prompts
from bfpo.judges.records import NeedlessRefusals, RedteamFile, TriedTemperature
from bfpo.plots.style import CELL_COLOURS, INK, METHOD_COLOURS, MUTED, figure_style, png_bytes, svg_bytes
from bfpo.policy.skeleton import make_skeleton
from bfpo.policy.source import read_config
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.scores.records import ScoresFile
from bfpo.suites.coherence import CoherenceReader, reader_of
from bfpo.training.diagnosis import fits_here
from bfpo.training.rehearsal import sampled_forecast

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)

GENERATE, LABEL, DATA = "generate", "label", "data"
TEMPERATURE, HARMLESS, START = "temperature", "harmless", "start"
PAIRS, BUFFER = f"{DATA}/main/train.parquet", f"{DATA}/buffer/train.parquet"
HELD_OUT = f"{DATA}/main/validation.parquet"
COMPLETIONS, NEEDLESS, BUFFER_PAIRS = "completions.jsonl", "needless.jsonl", "buffer.jsonl"

_TEMPERATURES = (1.0, 0.7, 0.5, 0.3)  # tried in this order
_SAMPLE, _SAMPLE_TOKENS = 16, 64  # answers of a try, and most tokens of each
_MOST_INCOHERENT = 0.125  # share of the sample up to which a temperature is taken
_BUFFER_WEIGHT = 2  # a pair of two safe sides pulls half as hard as one of harm: with it both streams are learned
_BETAS = (0.1, 0.05, 0.03, 0.01)  # both answers are the model's own, so that few nats can do
_ANCHOR_WEIGHT, _PAIRS_PER_STEP, _FEWEST_STEPS = 0.3, 8, 60
# Learning rates that worked by parameters of the model: the closed world, SmolLM2, and the paper's 30K pairs by 32.
_RATES = {1e5: 3e-4, 1.35e8: 1e-4, 7e9: 5e-7}
_PAPER_STEPS = 937


def run(config: RedteamConfig, folder: RunFolder) -> None:
    """Write `generate/`, `label/` and `data/`, the report `redteam.md` and `redteam.json`, and the funnel's figure.

    `data/main/train.parquet` holds the pairs, in the format of `bfpo prepare`, ready for `bfpo train`; with `harmless`,
    `data/buffer/train.parquet` those of needless refusals. Without `prompts` there are only the latter. Raises the
    errors of the three stages, and `DataError` with the counts of the steps if no pair can be made.
    """
    with RequestBudget(config.max_requests).shared():
        _attack(config, folder)


def _attack(config: RedteamConfig, folder: RunFolder) -> None:
    if folder.resumed and isinstance(config, WeightsSpec) and folder.config.get("dtype", "auto") != config.dtype:
        config = config.model_copy(update={"dtype": folder.config["dtype"]})  # a run of before names the number type
    check_opinions(config.judges, config.ranker)
    _check_start(config)
    if config.prompts is not None:
        folder.add_data("prompts", config.prompts)
    for name in ("harmless", "start"):
        place = getattr(config, name)
        if place is not None and (name == "harmless" or _answers_in(place)):
            folder.add_data(name, _answers_in(place) or place)
    temperature, tried = _temperature(config, folder)
    config = config.model_copy(update={"temperature": temperature})
    labelled = None
    if config.prompts is not None:
        _run("generate", _generate(config), folder.path / GENERATE)
        labelled = _run("label", _label(config, folder.path), folder.path / LABEL)
    needless = _needless(config, folder)
    text, record = f"Model: {config.model}", RedteamFile()
    if labelled is not None:
        text, record = _labelled(config, folder, labelled)
    if tried:
        text += f"\n\n{tried_text(temperature, tried)}"
        record = replace(record, temperature=temperature, tried=tried)
    folder.write_json("redteam.json", replace(record, harmless=needless))
    drawn = "" if labelled is None else "\n\n![What became of the completions](funnel.png)"
    sections = {"Red-teaming": f"{text}{drawn}"}
    if needless is not None:
        sections["Harmless prompts"] = needless_text(needless, config.confidence)
    first, *others = sections.items()
    parts = [f"# {first[0]}\n\n{first[1]}", *(f"## {title}\n\n{part}" for title, part in others)]
    folder.write_text("redteam.md", "\n\n".join(parts) + "\n")
    folder.add_facts(funnel=record.funnel, cells=record.cells)
    folder.write_card("Red-team pairs", sections)
    show("\n\n".join([text, *(part for _, part in others)]))
    _prepare_pairs(config, folder, record, {} if needless is None else needless.funnel)


def _labelled(config: RedteamConfig, folder: RunFolder, labelled: RunFolder) -> tuple[str, RedteamFile]:
    """Return the report on the judged answers as Markdown, and its record; write the figure of the funnel."""
    funnel: dict[str, int] = labelled.record["funnel"]
    completions = read_completions(folder.path / GENERATE / COMPLETIONS, thinking=config.thinking)
    answers = Answers(completions, labelled.path / "verdicts.jsonl")
    rates = answer_rates(answers, confidence=config.confidence)
    cells: dict[str, int] = labelled.record["labels"]["cells"]
    fits = load(ScoresFile, labelled.path / "scores.json").judge_fit
    text = redteam_text(config.model, funnel, cells, rates, answers.unscored, config.confidence)
    text += f"\n\n{fit_table(fits)}" if fits else ""
    if config.soft_labels and (turned := soft_label_warning(answers.verdicts)):
        text += f"\n\nWarning: {turned}."
    steps = [name for name in FUNNEL_STEPS if name in funnel and (name != "well_formed" or measures_form(rates))]
    figure = _funnel_figure([(name, funnel[name]) for name in steps], cells)
    folder.write_bytes("funnel.png", png_bytes(figure))
    folder.write_bytes("funnel.svg", svg_bytes(figure, salt="funnel"))
    return text, RedteamFile(funnel, cells, rates, answers.unscored, judge_fit=fits)


def _prepare_pairs(config: RedteamConfig, folder: RunFolder, record: RedteamFile, needless: Mapping[str, int]) -> None:
    """Run `prepare` on the pairs of both streams that there are, and show what to do with them."""
    funnel = record.funnel
    streams = [name for name, counts in (("main", funnel), ("buffer", needless)) if counts.get("pairs")]
    problems = [_no_pair(funnel)] if funnel and "main" not in streams else []
    problems += [_no_buffer_pair(needless)] if needless and "buffer" not in streams else []
    if not streams:
        raise DataError("; ".join(problems))
    if "main" not in streams and problems:
        _log.warning("%s; only the buffer has pairs", problems[0])
    if "main" in streams and not any(record.cells.get(cell) for cell in ("safe-unsafe", "unsafe-safe")):
        _log.warning(
            "no pair has a safe and an unsafe answer, so that they teach no safety; try other prompts or judges"
        )
    _run("prepare", _prepare(config, folder.path, streams), folder.path / DATA)
    for line in _advice(config, folder.path):
        show(line)


def _run(stage: str, config: StageConfig, out: Path) -> RunFolder:
    """Run a stage, or resume it if its folder exists."""
    return run_stage(stage, config, out, resume=out.exists())


def _answers_in(place: str) -> Path | None:
    """Return the completions of a run of `bfpo generate`, given as its folder or their file; `None` for all else."""
    path = Path(place)
    file = path / COMPLETIONS if path.is_dir() else path
    return file if file.name == COMPLETIONS and file.is_file() else None


def _check_start(config: RedteamConfig) -> None:
    """Raise `SettingError` for a key that says how answers are made which are there already."""
    for name, key in (("harmless", "harmless_columns"), ("start", "start_revision")):
        place = getattr(config, name)
        if place is not None and _answers_in(place) and getattr(config, key):
            raise SettingError(f"{key}: not read where {name} ({place}) holds answers; leave it out")


def _no_pair(funnel: Mapping[str, int]) -> str:
    """Return the message that no pair could be made, with the counts of the funnel."""
    bad = funnel.get("incoherent", 0)
    return (
        f"no pair could be made of {funnel['completions']} completions: {f'{bad} incoherent, ' if bad else ''}"
        f"{funnel['usable']} usable (scored and well-formed), {funnel['candidates']} candidate pairs of different "
        f"completions of a prompt, {funnel['ties']} of them ties, {funnel['unranked']} unranked; try more completions "
        f"per prompt, a {'lower' if 2 * bad > funnel['completions'] else 'higher'} temperature or another judge"
    )


def _no_buffer_pair(needless: Mapping[str, int]) -> str:
    """Return the message that no pair could be made of harmless prompts, with the counts of the steps."""
    found = (
        f"no pair for the buffer could be made of {needless['completions']} answers to {needless['prompts']} harmless "
        f"prompts: {needless['refused']} refused, {needless['incoherent']} incoherent"
    )
    if not needless["prompts_refused"]:
        return f"{found}; no coherent answer refuses: the model needs no such pairs, or try other prompts"
    return f"{found}, none that complies to a prompt that is refused; set start to a model that answers them"


def _incoherent(
    config: RedteamConfig, completions: Sequence[Completion], prompts: Sequence[tuple[Message, ...]] | None
) -> list[bool]:
    """Return whether each completion is no coherent text; the likelihood under a model that is here counts too."""
    prompts = [one.prompt for one in completions] if prompts is None else prompts
    with reader_of(_coherence(config), prompts, config.executor, config.threads) as reader:
        return [read.coherent is False for read in reader.read(completions)]


def _sample_reader(config: RedteamConfig, prompts: Sequence[Prompt]) -> CoherenceReader:
    """Return the reader of a sample; one nearer to word salad than to the model's greedy answers is incoherent too.

    The text of a sample at a high temperature neither loops nor changes its language. A model behind a server gives no
    likelihood, and that of another one may not separate the two.
    """
    if config.engine == "server":
        return CoherenceReader()
    keys = [name for name in LabelCoherence.model_fields if hasattr(config, name)]
    asked = LabelCoherence.model_validate({name: getattr(config, name) for name in keys})
    reader = reader_of(asked, [one.messages for one in prompts], config.executor, config.threads)
    assert reader.bound is not None  # with a model
    if (halfway := reader.bound.halfway) is not None and reader.bound.bound is not None:
        limit = min(halfway, reader.bound.bound) if config.engine == "transformers" else halfway
        reader.bound = replace(reader.bound, bound=limit)
    return reader


def _coherence(config: RedteamConfig) -> LabelCoherence | None:
    """Return the model under which answers must be likely: the start, else the attacked one; `None` behind a server.

    A model that degenerated in an earlier round may find its own junk likely.
    """
    if config.engine == "server":
        return None
    given = _given(config, LabelCoherence.model_fields)
    if config.start is not None and _answers_in(config.start) is None:
        given |= {"model": config.start, "revision": config.start_revision}
    return LabelCoherence.model_validate(given)


# ------------------------------------------------------------------------------------------------- the temperature


def _temperature(config: RedteamConfig, folder: RunFolder) -> tuple[float, list[TriedTemperature]]:
    """Return the temperature of the config or, under "auto", the highest at which a sample stays coherent.

    The sample is made by `bfpo generate` in `temperature/<value>`, so that a stopped run continues there.
    """
    if config.temperature != "auto":
        return config.temperature, []
    if config.prompts is None and _answers_in(config.harmless or ""):
        return 0.0, []  # nothing is sampled
    tried: list[TriedTemperature] = []
    keys = {
        "num_completions": 1,
        "max_new_tokens": min(config.max_new_tokens, _SAMPLE_TOKENS),
        "limit": min(config.limit or _SAMPLE, _SAMPLE),
    }
    asked = {} if config.prompts is not None else _harmless_asked(config)
    sampled = _generate(config, temperature=1.0, **keys, **asked)
    found = read_prompt_files([sampled.prompts], columns=sampled.columns, bad_rows=config.bad_rows).prompts
    prompts = part_of(found, config.split)
    for value in _TEMPERATURES:
        sample = sampled.model_copy(update={"temperature": value})
        made = _run("generate", sample, folder.path / TEMPERATURE / f"{value:g}")
        answers = read_completions(made.path / COMPLETIONS, thinking=config.thinking)
        written = [one for one in answers if not one.blocked and (one.text.strip() or not one.reasoning)]
        # The model is loaded for each try, so that it takes no memory beside the one that generates.
        with _sample_reader(config, prompts) as reader:
            broken = [read.coherent is False for read in reader.read(written)]
        tried.append(TriedTemperature(value, sum(broken), len(written)))
        if tried[-1].incoherent <= _MOST_INCOHERENT * len(written):
            break
    else:
        _log.warning("temperature: more than 1 in 8 sample answers are incoherent even at the lowest one")
    best = min(tried, key=lambda one: max(one.incoherent / max(one.answers, 1), _MOST_INCOHERENT))
    _log.info("%s", tried_text(best.temperature, tried))
    return best.temperature, tried


# ------------------------------------------------------------------------------------------------- harmless prompts


def _needless(config: RedteamConfig, folder: RunFolder) -> NeedlessRefusals | None:
    """Ask the harmless prompts and write `buffer.jsonl`, pairs of an answer that complies and a needless refusal."""
    if config.harmless is None:
        return None
    made = _answers_in(config.harmless)
    if made is None:
        made = _run("generate", _generate(config, **_harmless_asked(config)), folder.path / HARMLESS).path / COMPLETIONS
    answers = _read_answers(config, made)
    pairs, funnel = buffer_pairs(answers, _start_answers(config, folder, answers))
    folder.write_jsonl(BUFFER_PAIRS, map(pair_row, pairs))
    return NeedlessRefusals(funnel, over_refusal(answers, confidence=config.confidence))


def _harmless_asked(config: RedteamConfig) -> dict[str, Any]:
    """Return the keys of `generate` that ask the harmless prompts."""
    return {"prompts": config.harmless, "columns": config.harmless_columns}


def _start_answers(config: RedteamConfig, folder: RunFolder, answers: Sequence[ReadAnswer]) -> list[ReadAnswer]:
    """Return the start model's answers: those that there are, or greedy ones to the prompts that were refused."""
    refused = refused_prompts(answers)
    if config.start is None or not refused:
        return []
    made = _answers_in(config.start)
    if made is None:
        prompts = [Prompt(str(n), one.prompt, one.kind, one.tools) for n, one in enumerate(refused.values())]
        file = folder.write_jsonl(NEEDLESS, map(prompt_row, prompts))
        keys: dict[str, Any] = {"model": config.start, "prompts": str(file), "columns": {}, "limit": None}
        if "revision" in type(config).model_fields:
            keys["revision"] = config.start_revision
        asked = _generate(config, **keys, num_completions=1, temperature=0.0)
        made = _run("generate", asked, folder.path / START).path / COMPLETIONS
    return _read_answers(config, made, [one.completion.prompt for one in answers])


def _read_answers(
    config: RedteamConfig, file: Path, prompts: Sequence[tuple[Message, ...]] | None = None
) -> list[ReadAnswer]:
    """Return the answers with their refusals and coherence, which is calibrated on their own prompts or the given."""
    completions = read_completions(file, thinking=config.thinking)
    return read_answers(completions, _incoherent(config, completions, prompts))


# ------------------------------------------------------------------------------------------------------ the stages


def preview(config: RedteamConfig) -> list[str]:
    """Return what would be generated, and which judges and ranker would be asked."""
    check_opinions(config.judges, config.ranker)
    _check_start(config)
    lines = []
    asks = config.prompts is not None or _answers_in(config.harmless or "") is None
    if config.temperature == "auto" and asks:
        tried = ", ".join(f"{value:g}" for value in _TEMPERATURES)
        lines.append(
            f"temperature: the first of {tried} at which at most 1 in 8 of {min(config.limit or _SAMPLE, _SAMPLE)} "
            "sample answers are incoherent"
        )
        config = config.model_copy(update={"temperature": _TEMPERATURES[0]})
    if config.prompts is not None:
        assert config.ranker is not None  # checked by the config
        judges = ", ".join(judge.title for judge in config.judges)
        lines = [preview_stage("generate", _generate(config)), *lines]
        lines.append(f"judged by {judges}, ranked by {config.ranker.title}")
    elif asks:
        lines = [preview_stage("generate", _generate(config, **_harmless_asked(config))), *lines]
    if config.harmless is not None:
        lines += _preview_harmless(config)
    return lines


def _preview_harmless(config: RedteamConfig) -> list[str]:
    assert config.harmless is not None
    made = _answers_in(config.harmless)
    if made is not None:
        asked = f"{len(read_completions(made))} answers of {made}"
    else:
        found = read_prompt_files([config.harmless], columns=config.harmless_columns, bad_rows=config.bad_rows)
        num = len(part_of(found.prompts, config.split))
        asked = f"{min(num, config.limit or num)} prompts"
    chosen = (
        "other answers of the model" if config.start is None else f"greedy answers of {config.start}, or other ones"
    )
    return [f"harmless prompts: {asked}; pairs of the buffer from {chosen} that comply, and needless refusals"]


def _given(config: RedteamConfig, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that were given here and that the other stage has; for all others, its defaults hold."""
    return {name: getattr(config, name) for name in names if name in config.model_fields_set}


def _generate(config: RedteamConfig, **changes: Any) -> GenerateConfig:
    given = _given(config, GenerateConfig.modes[config.mode].model_fields)
    return GenerateConfig.model_validate({**given, "num_completions": config.num_completions, **changes})


def _label(config: RedteamConfig, out: Path) -> LabelConfig:
    unread = {"completions", "data"} if config.has_server() else {"completions", "data", "max_requests"}
    unread |= set() if config.loads_model() or _coherence(config) else {"executor"}
    names = {name: field for name, field in LabelConfig.model_fields.items() if name not in unread}
    given = {**_given(config, names), "coherence": _coherence(config)}
    return LabelConfig.model_validate({**given, "completions": str(out / GENERATE / COMPLETIONS)})


def _prepare(config: RedteamConfig, out: Path, streams: Sequence[str]) -> PrepareConfig:
    """Return the mixture; near-duplicate prompts are variants of one attack and stay in one split."""
    made = {"main": ("redteam", f"{LABEL}/pairs.jsonl"), "buffer": ("needless", BUFFER_PAIRS)}
    sources = [
        {"name": made[stream][0], "files": [str(out / made[stream][1])], "layout": "bfpo", "stream": stream}
        for stream in streams
    ]
    splits = {"validation": config.validation, "test": 0.0}
    return PrepareConfig.model_validate({"sources": sources, "splits": splits, "seed": config.seed})


# ------------------------------------------------------------------------------------------------------ the advice


def _advice(config: RedteamConfig, out: Path) -> list[str]:
    """Return the closing lines: where the pairs are, and commands that take them as they are printed."""
    manifest = json.loads((out / DATA / "manifest.json").read_text(encoding="utf-8"))
    rows = {f"{DATA}/{name}": facts["rows"] for name, facts in manifest["files"].items()}
    main = PAIRS if PAIRS in rows else BUFFER
    is_here = config.engine != "server" or Path(config.model).is_dir()
    settings: dict[str, Any] = {"model": config.model if is_here else "FOLDER"}
    settings |= {
        key: getattr(config, key)
        for key in ("revision", "dtype", "chat_template", "chat_template_kwargs")
        if key in config.model_fields_set and getattr(config, key) not in ("auto", "float16", None, {})
    }
    settings["data.files"] = out / main
    buffer = {"buffer.files": out / BUFFER, "buffer_weight": _BUFFER_WEIGHT}
    if main not in rows:
        return [f"\nAll pairs are held out ({out / DATA}): lower validation."]
    places = (str(out / name) for name in (PAIRS, BUFFER) if name in rows)
    lines = [f"\nThe pairs{'' if main == PAIRS else ' for the buffer'}: {'; for the buffer: '.join(places)}."]
    lines += [] if is_here else ["FOLDER below: a folder or hub id with the weights that the server has."]
    if main == PAIRS:
        settings |= buffer if BUFFER in rows else {}
        settings |= {"eval_data.files": out / HELD_OUT} if HELD_OUT in rows else {}
        chosen, said = _chosen(settings, rows[main], is_here=is_here)
        settings |= chosen
        lines += said
    else:
        settings["beta"] = _BETAS[0]
    lines += ["What beta asks of them, before any training:", f"  bfpo doctor --data {_as_options(settings)}"]
    if main == PAIRS:
        lines.append(f"To train on them{'' if BUFFER in rows else ', without a buffer'}:")
        return [*lines, f"  bfpo train {_as_options(settings)} --out {shlex.quote(_free(f'{out}-train'))}"]
    return [
        *lines,
        "Training on them alone would undo refusals of harm. Add them to a bfpo train on pairs of harmful prompts:",
        f"  {_as_options(buffer)}",
    ]


def _as_options(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--set {shlex.quote(one)}" for one in _as_texts(settings))


def _as_texts(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in settings.items()]


def _chosen(settings: Mapping[str, Any], num_pairs: int, *, is_here: bool) -> tuple[dict[str, Any], list[str]]:
    """Return beta, anchor, steps and learning rate for the pairs, as `docs/choosing.md` has them, and lines on them."""
    per_step = min(_PAIRS_PER_STEP, num_pairs)
    steps = max(_FEWEST_STEPS, math.ceil(num_pairs / per_step))
    chosen = {"beta": _BETAS[0], "anchor_weight": _ANCHOR_WEIGHT, "pairs_per_step": per_step, "max_steps": steps}
    if not is_here:
        return chosen, [
            f"beta {_BETAS[0]:g} was not compared with the pairs; set learning_rate by the size of the model "
            "(docs/choosing.md)."
        ]
    training = load_config(AlignConfig, None, _as_texts(settings))
    beta, lines = _chosen_beta(training)
    try:
        size = make_skeleton(read_config(training.model, revision=training.revision)).trainable_report.num_total
    except ModelError:  # a model that cannot be counted
        size = int(max(_RATES))
    return {**chosen, "beta": beta, "learning_rate": _learning_rate(size, steps)}, lines


def _chosen_beta(training: AlignConfig) -> tuple[float, list[str]]:
    """Return beta by the log-probs of a sample of the pairs, if the training fits the memory, and lines on it."""
    try:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1 or not fits_here(training):
            raise SettingError("a training in one process is estimated not to fit the free memory")
        found, _ = sampled_forecast(training, betas=_BETAS)
    except BfpoError as error:
        return _BETAS[0], [f"beta {_BETAS[0]:g} was not compared with the pairs: {error}."]
    pairs = sum(group.pairs - group.at_target for group in found.groups)
    short = sum(group.short or 0 for group in found.groups)
    lines = [
        f"beta {found.beta:g}: at its target {short:,} of {pairs:,} favoured answers of a sample are still less likely "
        "per token than the other ones."
    ]
    return found.beta, [*lines, *([f"Warning: {found.warning}."] if found.warning else [])]


def _learning_rate(num_parameters: int, steps: int) -> float:
    """Return the rate between those of `_RATES`, and no lower than moves a weight as far as the paper's run can.

    AdamW moves a weight by at most the sum of the rates.
    """
    sizes, rates = (np.log(list(values)) for values in (_RATES, _RATES.values()))
    rate = math.exp(np.interp(math.log(num_parameters), sizes, rates))
    return float(f"{max(rate, _PAPER_STEPS * min(_RATES.values()) / steps):.1g}")


def _free(name: str) -> str:
    """Return the name, or with a number behind it the first that is not taken."""
    return next(one for n in count(1) if not Path(one := name if n == 1 else f"{name}-{n}").exists())


def _funnel_figure(
    steps: Sequence[tuple[str, int]], cells: Mapping[str, int], *, width: float = 6.8, height: float = 3.9
) -> Figure:
    """Return bars for the steps, first on top, and for the label cells (chosen-rejected); sizes in inches."""
    with figure_style("funnel"):
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(len(steps), len(cells)))
        colours = [METHOD_COLOURS[1] if name == "unsafe" else METHOD_COLOURS[0] for name, _ in steps]
        names = [name.replace("_", " ") for name, _ in steps]
        for axes, labels, counts, shades in (
            (upper, names, [count for _, count in steps], colours),
            (lower, list(cells), list(cells.values()), [CELL_COLOURS[cell] for cell in cells]),
        ):
            bars = axes.barh(range(len(labels)), counts, color=shades, height=0.72)
            axes.bar_label(bars, [f"{count:,}" for count in counts], padding=4, color=INK, fontsize=9)
            axes.set_yticks(range(len(labels)), labels)
            axes.invert_yaxis()
            axes.set_xlim(0, max([*counts, 1]) * 1.12)
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False)
            axes.spines["left"].set_visible(False)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        lower.set_title("pairs by label cell (chosen-rejected)", color=MUTED, fontsize=9, loc="left")
    return figure
