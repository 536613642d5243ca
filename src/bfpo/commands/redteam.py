"""STAGE: red-teaming: a model's answers to hard prompts are judged, ranked and made into training pairs.

It runs the stages `generate`, `label` and `prepare`, each in a subfolder with the files that it writes when run alone.
A stopped run continues in the stage that was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bfpo.config import GenerateConfig, LabelConfig, PrepareConfig, RedteamConfig, StageConfig
from bfpo.core.console import show
from bfpo.core.errors import DataError
from bfpo.data.read import read_completions
from bfpo.judges.judges import check_opinions
from bfpo.judges.label_report import FUNNEL_STEPS, Answers, answer_rates, measures_form, redteam_text
from bfpo.judges.records import RedteamFile
from bfpo.plots.style import CELL_COLOURS, INK, METHOD_COLOURS, MUTED, figure_style, png_bytes, svg_bytes
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import preview_stage, run_stage

__all__ = ["preview", "run"]

GENERATE, LABEL, DATA = "generate", "label", "data"
PAIRS = f"{DATA}/main/train.parquet"


def run(config: RedteamConfig, folder: RunFolder) -> None:
    """Write `generate/`, `label/` and `data/`, the report `redteam.md` and `redteam.json`, and the funnel's figure.

    `data/main/train.parquet` holds the pairs, in the format of `bfpo prepare`, ready for `bfpo train`. Raises the
    errors of the three stages, and `DataError` with the counts of the funnel if no pair can be made.
    """
    if not folder.is_writer:
        return
    check_opinions(config.judges, config.ranker)
    folder.add_data("prompts", config.prompts)
    _run("generate", _generate(config), folder.path / GENERATE)
    labelled = _run("label", _label(config, folder.path), folder.path / LABEL)
    funnel: dict[str, int] = labelled.record["funnel"]
    completions = read_completions(folder.path / GENERATE / "completions.jsonl", thinking=config.thinking)
    answers = Answers(completions, labelled.path / "verdicts.jsonl")
    rates = answer_rates(answers, confidence=config.confidence)
    cells: dict[str, int] = labelled.record["labels"]["cells"]
    text = redteam_text(config.model, funnel, cells, rates, answers.unscored, config.confidence)
    steps = [name for name in FUNNEL_STEPS if name != "well_formed" or measures_form(rates)]
    figure = _funnel_figure([(name, funnel[name]) for name in steps], cells)
    folder.write_bytes("funnel.png", png_bytes(figure))
    folder.write_bytes("funnel.svg", svg_bytes(figure, salt="funnel"))
    folder.write_json("redteam.json", RedteamFile(funnel, cells, rates, answers.unscored))
    shown = f"{text}\n\n![What became of the completions](funnel.png)"
    folder.write_text("redteam.md", f"# Red-teaming\n\n{shown}\n")
    folder.add_facts(funnel=funnel, cells=cells)
    folder.write_card("Red-team pairs", {"Red-teaming": shown})
    show(text)
    if funnel["pairs"] == 0:
        raise DataError(
            f"no pair could be made of {funnel['completions']} completions: {funnel['usable']} usable (scored and "
            f"well-formed), {funnel['candidates']} candidate pairs of different completions of a prompt, "
            f"{funnel['ties']} of them ties, {funnel['unranked']} unranked; try more completions per prompt, "
            "a higher temperature or another judge"
        )
    _run("prepare", _prepare(config, folder.path), folder.path / DATA)
    show(f"\nThe pairs: {folder.path / PAIRS}. To train on them, without a buffer:")
    model = config.model if config.engine != "server" else "FOLDER"  # a server's model name is not a folder
    show(f"  bfpo train --set model={model} --set data.files={folder.path / PAIRS} --out runs/next")


def _run(stage: str, config: StageConfig, out: Path) -> RunFolder:
    """Run a stage, or resume it if its folder exists."""
    return run_stage(stage, config, out, resume=out.exists())


def preview(config: RedteamConfig) -> list[str]:
    """Return what would be generated, and which judges and ranker would be asked."""
    check_opinions(config.judges, config.ranker)
    judges = ", ".join(judge.title for judge in config.judges)
    return [
        preview_stage("generate", _generate(config)),
        f"judged by {judges}, ranked by {config.ranker.title}",
    ]


def _given(config: RedteamConfig, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that were given here and that the other stage has; for all others, its defaults hold."""
    return {name: getattr(config, name) for name in names if name in config.model_fields_set}


def _generate(config: RedteamConfig) -> GenerateConfig:
    given = _given(config, GenerateConfig.modes[config.mode].model_fields)
    return GenerateConfig.model_validate({**given, "num_completions": config.num_completions})


def _label(config: RedteamConfig, out: Path) -> LabelConfig:
    unread = {"completions", "data"} if config.has_server() else {"completions", "data", "max_requests"}
    names = {name: field for name, field in LabelConfig.model_fields.items() if name not in unread}
    given = _given(config, names)
    return LabelConfig.model_validate({**given, "completions": str(out / GENERATE / "completions.jsonl")})


def _prepare(config: RedteamConfig, out: Path) -> PrepareConfig:
    """Return the mixture of one source; near-duplicate prompts are variants of one attack and stay in one split."""
    return PrepareConfig.model_validate(
        {
            "sources": [{"name": "redteam", "files": [str(out / LABEL / "pairs.jsonl")], "layout": "bfpo"}],
            "splits": {"validation": config.validation, "test": 0.0},
            "seed": config.seed,
        }
    )


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
