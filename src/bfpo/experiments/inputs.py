"""What a sweep reads before its first point runs: models, data, prompts and judge are there, or it says so."""

from __future__ import annotations

from pathlib import Path

from bfpo.config import EvaluateConfig, GenerateConfig, SweepConfig, load_config
from bfpo.core.errors import ConfigError, DataError, ModelError
from bfpo.data.load import PairStream
from bfpo.data.prompts import read_prompt_files
from bfpo.experiments.points import Point
from bfpo.judges.judges import check_judge
from bfpo.policy.load import load_tokenizer
from bfpo.policy.skeleton import read_config
from bfpo.scores.scores import METRICS, Judged

__all__ = ["check_inputs"]


def check_inputs(config: SweepConfig, points: list[Point]) -> list[str]:
    """Return what there is, in lines: prompts and pairs. Weights are not loaded.

    Raises `ModelError` for a model or a local judge that is not there, `DataError` and `LabelError` for data that
    cannot be used, `ConfigError` for objectives that the judge does not measure, `SettingError` for the judge.
    """
    evaluate = load_config(EvaluateConfig, config.evaluate, ["completions=x"])
    _check_judge(config, evaluate)
    generate = load_config(GenerateConfig, config.generate, ["model=x"])
    prompts = read_prompt_files([generate.prompts], columns=generate.columns).prompts
    if not prompts:
        raise DataError.at(generate.prompts, None, "holds no prompt; at least one is needed")
    lines = [f"{len(prompts)} prompts, judged by {evaluate.judge.title}"]
    for model, revision in _models(points):
        read_config(model, revision=revision)
        load_tokenizer(model, revision=revision)
    return [*lines, *_read_pairs(points)]


def _models(points: list[Point]) -> list[tuple[str, str | None]]:
    """Return every model that a point starts from or reads, once, with its revision."""
    models: dict[tuple[str, str | None], None] = {}
    for point in points:
        models[point.start, None if point.train is None else point.train.revision] = None
        if point.train is not None and point.train.margin_model is not None:
            models[point.train.margin_model, None] = None
    return list(models)


def _read_pairs(points: list[Point]) -> list[str]:
    """Read the data of every training, the same of several once, and return a line on each."""
    lines: dict[str, str] = {}
    for point in points:
        if point.train is None:
            continue
        for name in ("data", "buffer", "eval_data"):
            section = getattr(point.train, name)
            if section is None:
                continue
            settings = {**section.model_dump(), "seed": point.train.seed}
            if repr(settings) not in lines:
                lines[repr(settings)] = f"{name}: {len(PairStream(**settings))} pairs"
    return list(lines.values())


def _check_judge(config: SweepConfig, evaluate: EvaluateConfig) -> None:
    judge = evaluate.judge
    check_judge(judge.format)
    if judge.model is not None and judge.url is None and _is_local(judge.model) and not Path(judge.model).exists():
        raise ModelError(f"judge: {judge.model}: no such folder; check the judge in {config.evaluate}")
    unmeasured = [name for name in config.objectives if judge.format != "oracle" and not _needs_verdict_alone(name)]
    if unmeasured:
        fit = [name for name, metric in METRICS.items() if metric.higher_is_better and _needs_verdict_alone(name)]
        raise ConfigError(
            f"objectives: {', '.join(unmeasured)}: not measured by the judge {judge.title!r}; allowed with it: "
            f"{', '.join(fit)}, or the judge oracle, on the closed world"
        )


def _needs_verdict_alone(name: str) -> bool:
    """Whether a metric can be told of an answer of which only safe or unsafe is known."""
    kind = next(iter(METRICS[name].kinds), "")
    return METRICS[name].value(Judged(id="", prompt="", kind=kind, safe=True)) is not None


def _is_local(model: str) -> bool:
    """Whether a name can only be that of a folder: ids of the hub have one slash at most."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1
