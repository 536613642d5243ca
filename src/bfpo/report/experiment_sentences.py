"""What an experiment's points say, in sentences: the front, the hypervolume, the point that was asked for."""

from __future__ import annotations

from collections.abc import Iterator

from bfpo.report.experiment_data import Experiment, ExperimentPoint
from bfpo.report.wording import listed, percent, points, with_interval
from bfpo.scores.scores import METRICS

__all__ = ["experiment_headline", "experiment_lines", "experiment_state"]


def experiment_headline(experiment: Experiment) -> str:
    """Return the one sentence about an experiment whose models are no rows of the page."""
    titles = {point.name: point for point in experiment.points}
    number = f"{len(experiment.points)} model{'s' if len(experiment.points) != 1 else ''}"
    if experiment.stage == "interpolate" and experiment.points:
        return f"{number} between two; their answers are judged by bfpo sweep with `blends`."
    if not experiment.measured:
        return experiment_state(experiment) or "This run holds no result, so nothing can be said about it."
    if experiment.nearest in titles:
        chosen = titles[experiment.nearest]
        scores = listed([_score(chosen, name) for name in experiment.objectives])
        if experiment.missing:
            return f"None of {number} reaches {_asked(experiment)}; {chosen.title} comes nearest: {scores}."
        return f"For {_asked(experiment)}, {chosen.title} does best of {number}: {scores}."
    front = [titles[name].title for name in experiment.front if name in titles]
    if len(front) == 1:
        return f"{front[0]} is beaten by none of {number} in {_both(experiment)}."
    return f"{len(front)} of {number} are beaten by no other in {_both(experiment)} together."


def experiment_lines(experiment: Experiment, threshold: float) -> Iterator[str]:
    """Yield what follows from the points, a sentence each; `threshold`: the share of well-formed text to be asked."""
    titles = {point.name: point.title for point in experiment.points}
    if experiment.front:
        names = "; ".join(titles.get(name, name) for name in experiment.front)
        yield f"Beaten by no other in {_both(experiment)} together: {names}."
    volume = experiment.hypervolume
    if volume is not None and volume.value is not None:
        corner = ", ".join(f"{_name(key)} {value:g}" for key, value in experiment.reference.items())
        known = volume.low is not None and volume.high is not None
        bounds = f"{volume.low:.3f} to {volume.high:.3f}" if known else "no interval"
        yield (
            f"Hypervolume above the reference point ({corner}): {volume.value:.3f} ({bounds}), over {volume.num:,} "
            "prompts. Areas compare only above one point."
        )
    if experiment.nearest:
        yield _nearest(experiment, titles.get(experiment.nearest, experiment.nearest))
    shown = [point for point in experiment.points if point.on_front or point.name == experiment.nearest]
    broken = [f"{point.title} ({percent(share)})" for point in shown if (share := _formed(point)) < threshold]
    if broken:
        yield (
            f"Less than {percent(threshold)} of the text is well-formed, so that part of the harmlessness is broken "
            f"text: {'; '.join(broken)}."
        )


def experiment_state(experiment: Experiment) -> str:
    """Say how far an experiment is that has not ended; nothing of one that has."""
    if experiment.status == "finished":
        return ""
    inside = f": {experiment.num_ended} of the {experiment.num_runs} runs in it so far have ended"
    return f"This {experiment.stage} is {experiment.status}{inside if experiment.num_runs else ''}."


def _nearest(experiment: Experiment, name: str) -> str:
    if not experiment.missing:
        return f"Asked for {_asked(experiment)}: {name}, the best in the other objective of those that reach it."
    short = listed([f"{points(value).lstrip('+')} points of {_name(key)}" for key, value in experiment.missing.items()])
    return f"Asked for {_asked(experiment)}: none reaches it; {name} is nearest and lacks {short}."


def _asked(experiment: Experiment) -> str:
    return listed([f"{_name(key)} of at least {100 * value:g}%" for key, value in experiment.at_least.items()] or ["?"])


def _both(experiment: Experiment) -> str:
    return listed([_name(name) for name in experiment.objectives] or ["both objectives"])


def _name(metric: str) -> str:
    return METRICS[metric].title if metric in METRICS else metric.replace("_", " ")


def _score(point: ExperimentPoint, metric: str) -> str:
    score = point.score(metric)
    return f"{_name(metric)} {'not measured' if score is None else with_interval(score)}"


def _formed(point: ExperimentPoint) -> float:
    score = point.score("well_formed")
    return 1.0 if score is None or score.value is None else score.value
