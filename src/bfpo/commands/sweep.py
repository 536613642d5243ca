"""STAGE: train and evaluate a grid of settings, or evaluate blends, and show the trade-off between two objectives."""

from __future__ import annotations

import logging
from pathlib import Path

from bfpo.config import EvaluateConfig, GenerateConfig, SweepConfig, load_config
from bfpo.config.evaluate import CompletionsJob
from bfpo.core.console import show
from bfpo.core.errors import ConfigError, DataError, ModelError
from bfpo.data.load import PairStream
from bfpo.data.prompts import read_prompt_files
from bfpo.execution.workers import OnePer, describe_workers
from bfpo.experiments.points import Point, chains_of, plan_points, read_judged, scores_of
from bfpo.experiments.tradeoff import tradeoff, tradeoff_csv, tradeoff_markdown
from bfpo.experiments.workers import run_chains
from bfpo.generation.settings import ServerSpec
from bfpo.judges.judges import check_judge
from bfpo.objective.methods import method_settings
from bfpo.policy.load import load_tokenizer
from bfpo.policy.source import read_config
from bfpo.runs.folder import RunFolder
from bfpo.scores.scores import COHERENCE, METRICS, Judged
from bfpo.training.inputs import read_start

__all__ = ["preview", "run"]

_log = logging.getLogger(__name__)
_GIB = 2**30
_ONE_PER: OnePer = "gpu or core"
_PAIRS = ("data", "buffer", "eval_data")  # sections of `bfpo train` with pairs
# Keys of `bfpo train` that do not change the estimate of memory.
_NOT_IN_MEMORY = frozenset(
    {"method", *method_settings(), "anchor_weight", "buffer_weight", "learning_rate", "lr_scheduler_type"}
    | {"warmup_steps", "weight_decay", "max_grad_norm", "seed"}
)


def run(config: SweepConfig, folder: RunFolder) -> None:
    """Write `tradeoff.json`, `.csv`, `.md` and the figure as `.svg`, `.png`; the runs are below `points/`.

    Tokens and reference log-probs are computed once for all points. Raises `ConfigError` for a config that a stage
    refuses, before anything runs, `RunError` if a point fails, or if configs or data changed since a resumed sweep
    started; it skips finished runs.
    """
    points = plan_points(config)
    files = [file for file in (config.train, config.generate, config.evaluate) if file is not None]
    folder.add_data("configs", files)
    _check_inputs(config, points)
    for name, inputs in _data_of(config, points).items():
        folder.add_data(name, inputs)
    memory = {} if config.memory_gib is None else _memory(config, points)
    chains = chains_of(config, points, folder.path, memory)
    budget = None if config.memory_gib is None else int(config.memory_gib * _GIB)
    run_chains(chains, config.executor, folder.path / "logs", memory=budget, one_per=_ONE_PER)
    _write_result(config, folder, points)


def preview(config: SweepConfig) -> list[str]:
    """Return the points with the estimated memory of each training; models, data and judge are checked."""
    points = plan_points(config)
    found = _check_inputs(config, points)
    memory = _memory(config, points)
    chains = chains_of(config, points, Path("OUT"), memory)
    return [
        *found,
        f"{len(points)} models, {describe_workers(config.executor, _ONE_PER)}",
        *(
            f"{chain.name}: {', '.join(step.stage for step in chain.steps)}, {_memory_words(chain.memory)}"
            if config.blends is None
            else f"{chain.name}: {', '.join(step.stage for step in chain.steps)}"
            for chain in chains
        ),
    ]


def _memory_words(memory: int) -> str:
    return f"{memory / _GIB:.2f} GiB" if memory else "memory not estimated"


def _write_result(config: SweepConfig, folder: RunFolder, points: list[Point]) -> None:
    from bfpo.plots.style import png_bytes, svg_bytes
    from bfpo.report.figures.tradeoff import front_figure

    result = tradeoff(
        {point.name: read_judged(*scores_of(point, folder.path)) for point in points},
        {point.name: point.settings for point in points},
        config.objectives,
        config.reference_point or dict.fromkeys(config.objectives, 0.0),
        at_least=config.at_least,
        validation_share=config.validation_share,
        confidence=config.confidence,
        num_resamples=config.bootstrap_samples,
        random_seed=config.seed,
    )
    folder.write_json("tradeoff.json", result)
    folder.write_text("tradeoff.csv", tradeoff_csv(result))
    text = tradeoff_markdown(result)
    folder.write_text("tradeoff.md", text)
    figure = front_figure(result, {key: METRICS[key].title for key in config.objectives})
    folder.write_bytes("tradeoff.svg", svg_bytes(figure, salt="front"))
    folder.write_bytes("tradeoff.png", png_bytes(figure))
    folder.write_card("Trade-off", {"Trade-off": text})
    show(text)


def _memory(config: SweepConfig, points: list[Point]) -> dict[str, int]:
    """Return the estimates of `bfpo doctor` for the trainings, bytes by point; each shape is estimated once."""
    from bfpo.training.diagnosis import examine

    known: dict[str, int] = {}
    memory: dict[str, int] = {}
    for point in points:
        if point.train is None or config.train is None:
            continue
        if point.train.quantize is not None and config.memory_gib is None:  # not estimated
            continue
        shape = repr({key: value for key, value in point.train if key not in _NOT_IN_MEMORY})
        if shape not in known:
            try:
                known[shape] = examine(Path(config.train), point.overrides).memory.total
            except ModelError as error:
                if config.memory_gib is not None:
                    raise
                _log.warning("memory: not estimated; %s", error)
                known[shape] = 0
        memory[point.name] = known[shape]
    most = max(memory.values(), default=0) / _GIB
    if config.memory_gib is not None and most > config.memory_gib:
        _log.warning("a training needs %.2f GiB by estimate, memory_gib is %g: it runs alone", most, config.memory_gib)
    return memory


def _check_inputs(config: SweepConfig, points: list[Point]) -> list[str]:
    """Return lines on the prompts and pairs; weights are not loaded.

    Raises `ModelError` for a missing model or local judge, `DataError` and `LabelError` for data that cannot be used,
    `ConfigError` for objectives that the judge does not measure, `SettingError` for an unknown judge.
    """
    evaluate = load_config(EvaluateConfig, config.evaluate, ["completions=x"])
    assert isinstance(evaluate, CompletionsJob)  # the override asks for it
    _check_judge(config, evaluate)
    generate = load_config(GenerateConfig, config.generate, ["model=x"])
    prompts = read_prompt_files([generate.prompts], columns=generate.columns, bad_rows=generate.bad_rows).prompts
    if not prompts:
        raise DataError.at(generate.prompts, None, "holds no prompt; at least one is needed")
    lines = [f"{len(prompts)} prompts, judged by {evaluate.judge.title}"]
    for model, revision in _models(points):
        read_config(model, revision=revision)
        load_tokenizer(model, revision=revision)
    return [*lines, *_read_pairs(points)]


def _data_of(config: SweepConfig, points: list[Point]) -> dict[str, list[str]]:
    """Return the files of the pairs of all trainings, if there are any, and of the prompts."""
    trainings = [point.train for point in points if point.train is not None]
    sections = [getattr(train, name) for train in trainings for name in _PAIRS]
    pairs = dict.fromkeys(
        str(file) for section in sections if section is not None and section.hub is None for file in section.files
    )
    prompts = load_config(GenerateConfig, config.generate, ["model=x"]).prompts
    return {**({"pairs": list(pairs)} if pairs else {}), "prompts": [prompts]}


def _models(points: list[Point]) -> list[tuple[str, str | None]]:
    """Return every model that a point reads, once, with its revision."""
    models: dict[tuple[str, str | None], None] = {}
    for point in points:
        models[point.start, None if point.train is None else point.train.revision] = None
        if point.train is not None and point.train.margin_model is not None:
            models[point.train.margin_model, None] = None
    return list(models)


def _read_pairs(points: list[Point]) -> list[str]:
    """Read the data of every training, each data set once, and return a line on each.

    A row that the chat template of a start refuses is a bad row, as in training.
    """
    lines: dict[str, str] = {}
    for point in points:
        if point.train is None:
            continue
        start = read_start(point.train)
        template = [start.settings.get(key) for key in ("chat_template", "chat_template_kwargs")]
        for name in _PAIRS:
            section = getattr(point.train, name)
            if section is None:
                continue
            key = f"{section!r} {point.train.seed} {point.train.model} {template}"
            if key not in lines:
                pairs = PairStream(section, seed=point.train.seed, check=start.row_check())
                lines[key] = f"{name}: {len(pairs)} pairs"
    return list(lines.values())


def _check_judge(config: SweepConfig, evaluate: CompletionsJob) -> None:
    judge = evaluate.judge
    check_judge(judge.format)
    folder = None if isinstance(judge, ServerSpec) else judge.source
    if folder is not None and _is_local(folder) and not Path(folder).exists():
        raise ModelError(f"judge: {folder}: no such folder; check the judge in {config.evaluate}")
    unmeasured = [name for name in config.objectives if judge.format != "oracle" and not _needs_verdict_alone(name)]
    if unmeasured:
        better = [name for name, metric in METRICS.items() if metric.higher_is_better and name not in COHERENCE]
        fit = [name for name in better if _needs_verdict_alone(name)]
        raise ConfigError(
            f"objectives: {', '.join(unmeasured)}: not measured by the judge {judge.title!r}; allowed with it: "
            f"{', '.join(fit)}, or the judge oracle, on the closed world"
        )


def _needs_verdict_alone(name: str) -> bool:
    """Return whether a metric needs only the verdict safe or unsafe."""
    kind = next(iter(METRICS[name].kinds), "")
    return METRICS[name].value(Judged(id="", prompt="", kind=kind, safe=True)) is not None


def _is_local(model: str) -> bool:
    """Return whether a name can only be a folder: ids of the hub have at most one slash."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1
