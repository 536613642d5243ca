"""STAGE: red-teaming: a model's answers to hard prompts are judged, ranked and made into training pairs.

It runs the stages `generate`, `label` and `prepare`, each in a subfolder with the files that it writes when run alone.
A stopped run continues in the stage that was stopped.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bfpo.config import GenerateConfig, LabelConfig, PrepareConfig, RedteamConfig, StageConfig
from bfpo.config.label import LabelCoherence
from bfpo.core.console import show
from bfpo.core.errors import DataError, SettingError
from bfpo.core.records import load
from bfpo.core.schema import Completion, Prompt
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
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.scores.records import ScoresFile
from bfpo.suites.coherence import CoherenceReader, reader_of

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)

GENERATE, LABEL, DATA = "generate", "label", "data"
TEMPERATURE, HARMLESS, START = "temperature", "harmless", "start"
PAIRS, BUFFER = f"{DATA}/main/train.parquet", f"{DATA}/buffer/train.parquet"
COMPLETIONS, NEEDLESS, BUFFER_PAIRS = "completions.jsonl", "needless.jsonl", "buffer.jsonl"

_TEMPERATURES = (1.0, 0.7, 0.5, 0.3)  # tried in this order
_SAMPLE, _SAMPLE_TOKENS = 16, 64  # answers of a try, and most tokens of each
_MOST_INCOHERENT = 0.125  # share of the sample up to which a temperature is taken
_BUFFER_WEIGHT = 2  # a pair of two safe sides pulls half as hard as one of harm: with it both streams are learned


def run(config: RedteamConfig, folder: RunFolder) -> None:
    """Write `generate/`, `label/` and `data/`, the report `redteam.md` and `redteam.json`, and the funnel's figure.

    `data/main/train.parquet` holds the pairs, in the format of `bfpo prepare`, ready for `bfpo train`; with `harmless`,
    `data/buffer/train.parquet` those of needless refusals. Raises the errors of the three stages, and `DataError` with
    the counts of the funnel if no pair can be made.
    """
    if not folder.is_writer:
        return
    with RequestBudget(config.max_requests).shared():
        _attack(config, folder)


def _attack(config: RedteamConfig, folder: RunFolder) -> None:
    if folder.resumed and isinstance(config, WeightsSpec) and folder.config.get("dtype", "auto") != config.dtype:
        config = config.model_copy(update={"dtype": folder.config["dtype"]})  # a run of before names the number type
    check_opinions(config.judges, config.ranker)
    _check_start(config)
    folder.add_data("prompts", config.prompts)
    for name in ("harmless", "start"):
        place = getattr(config, name)
        if place is not None and (name == "harmless" or _answers_in(place)):
            folder.add_data(name, _answers_in(place) or place)
    temperature, tried = _temperature(config, folder)
    config = config.model_copy(update={"temperature": temperature})
    _run("generate", _generate(config), folder.path / GENERATE)
    labelled = _run("label", _label(config, folder.path), folder.path / LABEL)
    needless = _needless(config, folder)
    funnel: dict[str, int] = labelled.record["funnel"]
    completions = read_completions(folder.path / GENERATE / COMPLETIONS, thinking=config.thinking)
    answers = Answers(completions, labelled.path / "verdicts.jsonl")
    rates = answer_rates(answers, confidence=config.confidence)
    cells: dict[str, int] = labelled.record["labels"]["cells"]
    fits = load(ScoresFile, labelled.path / "scores.json").judge_fit
    text = redteam_text(config.model, funnel, cells, rates, answers.unscored, config.confidence)
    if tried:
        text += f"\n\n{tried_text(temperature, tried)}"
    text += f"\n\n{fit_table(fits)}" if fits else ""
    if config.soft_labels and (turned := soft_label_warning(answers.verdicts)):
        text += f"\n\nWarning: {turned}."
    steps = [name for name in FUNNEL_STEPS if name in funnel and (name != "well_formed" or measures_form(rates))]
    figure = _funnel_figure([(name, funnel[name]) for name in steps], cells)
    folder.write_bytes("funnel.png", png_bytes(figure))
    folder.write_bytes("funnel.svg", svg_bytes(figure, salt="funnel"))
    record = RedteamFile(funnel, cells, rates, answers.unscored, judge_fit=fits, harmless=needless)
    folder.write_json("redteam.json", replace(record, temperature=temperature, tried=tried) if tried else record)
    sections = {"Red-teaming": f"{text}\n\n![What became of the completions](funnel.png)"}
    if needless is not None:
        sections["Harmless prompts"] = needless_text(needless, config.confidence)
    first, *others = sections.items()
    parts = [f"# {first[0]}\n\n{first[1]}", *(f"## {title}\n\n{part}" for title, part in others)]
    folder.write_text("redteam.md", "\n\n".join(parts) + "\n")
    folder.add_facts(funnel=funnel, cells=cells)
    folder.write_card("Red-team pairs", sections)
    show("\n\n".join([text, *(part for _, part in others)]))
    if funnel["pairs"] == 0:
        raise DataError(_no_pair(funnel))
    has_buffer = needless is not None and needless.funnel["pairs"] > 0
    _run("prepare", _prepare(config, folder.path, has_buffer=has_buffer), folder.path / DATA)
    for line in _advice(config, folder.path, has_buffer=has_buffer):
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


def _incoherent(config: RedteamConfig, completions: Sequence[Completion]) -> list[bool]:
    """Return whether each completion is no coherent text; the likelihood under a model that is here counts too."""
    prompts = [one.prompt for one in completions]
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
    """Return the model that is attacked as the one that says how likely it finds its answers; `None` if not here."""
    if config.engine != "transformers":
        return None
    return LabelCoherence.model_validate(_given(config, LabelCoherence.model_fields))


# ------------------------------------------------------------------------------------------------- the temperature


def _temperature(config: RedteamConfig, folder: RunFolder) -> tuple[float, list[TriedTemperature]]:
    """Return the temperature of the config or, under "auto", the highest at which a sample stays coherent.

    The sample is made by `bfpo generate` in `temperature/<value>`, so that a stopped run continues there.
    """
    if config.temperature != "auto":
        return config.temperature, []
    tried: list[TriedTemperature] = []
    keys = {
        "num_completions": 1,
        "max_new_tokens": min(config.max_new_tokens, _SAMPLE_TOKENS),
        "limit": min(config.limit or _SAMPLE, _SAMPLE),
    }
    prompts = read_prompt_files([config.prompts], columns=config.columns, bad_rows=config.bad_rows).prompts
    for value in _TEMPERATURES:
        made = _run("generate", _generate(config, temperature=value, **keys), folder.path / TEMPERATURE / f"{value:g}")
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
        asked = _generate(config, prompts=config.harmless, columns=config.harmless_columns)
        made = _run("generate", asked, folder.path / HARMLESS).path / COMPLETIONS
    answers = _read_answers(config, made)
    pairs, funnel = buffer_pairs(answers, _start_answers(config, folder, answers))
    folder.write_jsonl(BUFFER_PAIRS, map(pair_row, pairs))
    return NeedlessRefusals(funnel, over_refusal(answers, confidence=config.confidence))


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
    return _read_answers(config, made)


def _read_answers(config: RedteamConfig, file: Path) -> list[ReadAnswer]:
    completions = read_completions(file, thinking=config.thinking)
    return read_answers(completions, _incoherent(config, completions))


# ------------------------------------------------------------------------------------------------------ the stages


def preview(config: RedteamConfig) -> list[str]:
    """Return what would be generated, and which judges and ranker would be asked."""
    check_opinions(config.judges, config.ranker)
    _check_start(config)
    judges = ", ".join(judge.title for judge in config.judges)
    lines = []
    if config.temperature == "auto":
        tried = ", ".join(f"{value:g}" for value in _TEMPERATURES)
        lines.append(
            f"temperature: the first of {tried} at which at most 1 in 8 of {min(config.limit or _SAMPLE, _SAMPLE)} "
            "sample answers are incoherent"
        )
        config = config.model_copy(update={"temperature": _TEMPERATURES[0]})
    lines = [preview_stage("generate", _generate(config)), *lines]
    lines.append(f"judged by {judges}, ranked by {config.ranker.title}")
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


def _prepare(config: RedteamConfig, out: Path, *, has_buffer: bool) -> PrepareConfig:
    """Return the mixture; near-duplicate prompts are variants of one attack and stay in one split."""
    sources = [{"name": "redteam", "files": [str(out / LABEL / "pairs.jsonl")], "layout": "bfpo"}]
    if has_buffer:
        sources.append({"name": "needless", "files": [str(out / BUFFER_PAIRS)], "layout": "bfpo", "stream": "buffer"})
    splits = {"validation": config.validation, "test": 0.0}
    return PrepareConfig.model_validate({"sources": sources, "splits": splits, "seed": config.seed})


def _advice(config: RedteamConfig, out: Path, *, has_buffer: bool) -> list[str]:
    """Return the closing lines: where the pairs are, and commands that take them as they are printed."""
    settings: dict[str, Any] = {
        "model": config.model if config.engine != "server" else "FOLDER"
    }  # a server's name is no folder
    settings |= {
        key: getattr(config, key)
        for key in ("revision", "dtype", "chat_template", "chat_template_kwargs")
        if key in config.model_fields_set and getattr(config, key) not in ("auto", "float16", None, {})
    }
    settings["data.files"] = out / PAIRS
    if has_buffer:
        settings |= {"buffer.files": out / BUFFER, "buffer_weight": _BUFFER_WEIGHT}
    given = " ".join(f"--set {shlex.quote(f'{key}={_as_yaml(value)}')}" for key, value in settings.items())
    where = f"{out / PAIRS}; for the buffer: {out / BUFFER}" if has_buffer else f"{out / PAIRS}"
    return [
        f"\nThe pairs: {where}. What beta asks of them, before any training:",
        f"  bfpo doctor --data {given}",
        f"To train on them{'' if has_buffer else ', without a buffer'}:",
        f"  bfpo train {given} --out {shlex.quote(_free(f'{out}-train'))}",
    ]


def _free(name: str) -> str:
    """Return the name, or with a number behind it the first that is not taken."""
    return next(one for n in count(1) if not Path(one := name if n == 1 else f"{name}-{n}").exists())


def _as_yaml(value: object) -> object:
    return json.dumps(value) if isinstance(value, dict) else value


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
