"""Win rates of the models against a baseline, plain and at equal length, by a ranker or AlpacaEval's annotators."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bfpo.config.evaluate import SuitesJob
from bfpo.core.schema import Completion
from bfpo.data.split import normalised_prompt
from bfpo.runs.folder import RunFolder
from bfpo.stats import MIN_PROMPTS
from bfpo.suites.catalogue import Suite
from bfpo.suites.files import UnreachableError
from bfpo.suites.judging import Preference, rank_suites
from bfpo.suites.records import SuiteFacts, SuiteScore
from bfpo.suites.scores import Values, length_controlled_score

__all__ = ["alpaca_eval", "check_ranked", "win_rates"]

_ANNOTATIONS, _LEADERBOARD = "annotations.json", "leaderboard.csv"


@dataclass(frozen=True, slots=True)
class WinRates:
    """Win rates prompt by prompt, those at equal length as rows of `scores.json`, warnings, the ranker's version."""

    values: list[Values] = field(default_factory=list)
    at_equal_length: list[SuiteScore] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    ranker: str = ""


def check_ranked(config: SuitesJob, suite: Suite) -> None:
    """Raise `UnreachableError` for a suite of win rates without a ranker or annotators."""
    by_package = suite.outputs == "alpaca_eval" and config.suites.alpaca_eval is not None
    if suite.judge is not None and suite.judge.role == "ranker" and config.suites.ranker is None and not by_package:
        other = ", or suites.alpaca_eval (annotators of its own package)" if suite.outputs == "alpaca_eval" else ""
        raise UnreachableError(
            f"needs suites.ranker (which compares two answers) and suites.baseline (the model to compare with){other}"
        )


def win_rates(
    config: SuitesJob,
    suites: Sequence[Suite],
    answers: Mapping[str, Mapping[str, Sequence[Completion]]],
    facts: dict[str, SuiteFacts],
) -> WinRates:
    """Return the win rates of `answers` (model -> suite -> completions) by the ranker; its name is added to `facts`."""
    if not suites or config.suites.ranker is None:
        return WinRates()
    name, version, ranked = rank_suites(config, suites, answers)
    found = WinRates(ranker=version)
    by_name = {suite.name: suite for suite in suites}
    for (suite, model), preferences in ranked.items():
        facts[suite].judge = name
        _add(config, by_name[suite], model, name, preferences, answers, facts, found)
    for suite in by_name:
        _add_baseline(config, by_name[suite], name, found)
    return found


def alpaca_eval(
    config: SuitesJob,
    suites: Sequence[Suite],
    answers: Mapping[str, Mapping[str, Sequence[Completion]]],
    facts: dict[str, SuiteFacts],
    folder: RunFolder,
) -> WinRates:
    """Write the answers in the format of the package alpaca_eval, and let its annotators compare them if configured.

    The reference is the baseline's answers or, without a baseline, the package's own reference; the length-controlled
    rate is then the package's. If the package cannot run, a warning is added, or without a ranker the suite is skipped.
    """
    found = WinRates()
    settings, baseline = config.suites.alpaca_eval, config.suites.baseline
    for suite in suites:
        if suite.outputs != "alpaca_eval" or facts[suite.name].status != "scored":
            continue
        files = {model: _write_outputs(model, each[suite.name], folder) for model, each in answers.items()}
        if settings is None:
            continue
        name = Path(settings.annotators).name
        try:
            for model in answers:
                if model == baseline:
                    continue
                reference = None if baseline is None else files[baseline]
                out = folder.path / "models" / model / "alpaca_eval"
                annotated = _annotate(
                    files[model], reference, settings.annotators, python=settings.python, out=out, keep=folder.resumed
                )
                ids = {completion.prompt[-1].content: completion.id for completion in answers[model][suite.name]}
                preferences = {ids[text]: value for text, value in annotated.preferences.items() if text in ids}
                _add(config, suite, model, name, preferences, answers, facts, found, annotated.at_equal_length)
            _add_baseline(config, suite, name, found)
        except UnreachableError as error:
            if config.suites.ranker is not None:
                found.warnings.append(f"{suite.title}, annotators {name}: {error}")
            else:
                facts[suite.name] = replace(facts[suite.name], status="skipped", reason=str(error), judge=None)
                return WinRates()
        else:
            ranker = facts[suite.name].judge if config.suites.ranker is not None else None
            facts[suite.name].judge = ", ".join([*([ranker] if ranker else []), name])
    return found


def _write_outputs(model: str, completions: Sequence[Completion], folder: RunFolder) -> Path:
    rows = [
        {"instruction": completion.prompt[-1].content, "output": completion.text, "generator": model}
        for completion in completions
        if not completion.blocked
    ]
    return folder.write_json(f"alpaca_eval/{model}.json", rows)


def _add(
    config: SuitesJob,
    suite: Suite,
    model: str,
    name: str,
    preferences: Mapping[str, Preference],
    answers: Mapping[str, Mapping[str, Sequence[Completion]]],
    facts: dict[str, SuiteFacts],
    found: WinRates,
    at_equal_length: float | None = None,
) -> None:
    """Add a model's win rate, and the win rate at equal length: the given one, else the fitted one."""
    texts = {completion.id: normalised_prompt(completion.prompt) for completion in answers[model][suite.name]}
    scored = {item: (each.better, each.longer_by) for item, each in preferences.items() if each.better is not None}
    by_item = {item: better for item, (better, _) in scored.items()}
    prompts = {item: texts[item] for item in scored}
    unscored = (facts[suite.name].num_prompts or 0) - len(by_item)
    categories = {c.id: (c.category, texts[c.id]) for c in answers[model][suite.name] if c.category}
    wins = Values(suite.name, model, f"winrate[{name}]", by_item, prompts, unscored, categories=categories)
    found.values.append(wins)
    if "lc_winrate" not in suite.metrics:
        return
    longer_by = [longer for _, longer in scored.values()]
    row = length_controlled_score(wins, longer_by, name=f"lc_winrate[{name}]", **config.interval_settings())
    if at_equal_length is not None:
        row = replace(row, value=at_equal_length, low=None, high=None, num=len(by_item), unscored=unscored)
    found.at_equal_length.append(row)
    if row.value is None:
        reason = f"the win rate at equal length needs {MIN_PROMPTS} compared prompts"
        facts[suite.name].unscored = {**(facts[suite.name].unscored or {}), model: {reason: row.unscored}}


def _add_baseline(config: SuitesJob, suite: Suite, name: str, found: WinRates) -> None:
    """Add the baseline, which has 1/2 on every item by definition, so that each model is compared with it too."""
    others = [values for values in found.values if (values.suite, values.metric) == (suite.name, f"winrate[{name}]")]
    prompts = {item: prompt for values in others for item, prompt in values.prompts.items()}
    if config.suites.baseline is None or not prompts:
        return
    halves = Values(
        suite.name, config.suites.baseline, f"winrate[{name}]", dict.fromkeys(prompts, 0.5), prompts, defined=True
    )
    found.values.append(halves)
    if "lc_winrate" in suite.metrics:
        found.at_equal_length.append(length_controlled_score(halves, [], name=f"lc_winrate[{name}]"))


@dataclass(frozen=True, slots=True)
class _Annotated:
    """Preferences over the reference, by instruction, and the package's length-controlled win rate, if it gave one."""

    preferences: dict[str, Preference]
    at_equal_length: float | None


def _annotate(
    outputs: Path, reference: Path | None, annotators: str, *, python: str | None, out: Path, keep: bool
) -> _Annotated:
    """Return the annotators' preferences for `outputs`; with `keep`, existing annotations are read instead.

    `python` is the interpreter that has the package (`None`: this one). Raises `UnreachableError` with the reason if
    the package is not installed or fails; its output is in `out`.
    """
    interpreter = python or sys.executable
    if not (keep and list(out.rglob(_ANNOTATIONS))):
        out.mkdir(parents=True, exist_ok=True)
        _check_installed(interpreter)
        done = _run(_command(outputs, reference, annotators, interpreter, out))
        (out / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise UnreachableError(f"alpaca_eval failed: {last:.300} (its output is in {out / 'log.txt'})")
    return _read(out)


def _check_installed(interpreter: str) -> None:
    done = _run([interpreter, "-c", "import alpaca_eval"])
    if done.returncode:
        raise UnreachableError(
            f"{interpreter} has no alpaca_eval; pip install 'bfpo[alpaca-eval]', or set suites.alpaca_eval.python to "
            "the interpreter of an environment that has it"
        )


def _command(outputs: Path, reference: Path | None, annotators: str, python: str, out: Path) -> list[str]:
    """Return the command that annotates outputs.

    With a `reference` the metric is the plain win rate: the package's length-controlled one is fitted to its own
    reference and needs results of other models from the hub.
    """
    against = []
    if reference is not None:
        against = ["--reference_outputs", str(reference.absolute())]
        against += ["--fn_metric", "get_winrate", "--sort_by", "win_rate"]
    return [
        *(python, "-m", "alpaca_eval.main", "evaluate"),
        *("--model_outputs", str(outputs.absolute())),
        *against,
        *("--annotators_config", annotators, "--output_path", str(out.absolute())),
        *("--precomputed_leaderboard", "None", "--is_cache_leaderboard", "False"),
        *("--caching_path", str(out.absolute() / "cache.json")),
    ]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise UnreachableError(f"suites.alpaca_eval.python: {command[0]} cannot be run ({error.strerror})") from error


def _read(out: Path) -> _Annotated:
    found = sorted(out.rglob(_ANNOTATIONS))
    try:
        rows: list[dict[str, Any]] = json.loads(found[0].read_text(encoding="utf-8"))
        preferences = {
            row["instruction"]: Preference(_share(row["preference"]), len(row["output_2"]) - len(row["output_1"]))
            for row in rows
        }
        with found[0].with_name(_LEADERBOARD).open(encoding="utf-8", newline="") as file:
            (model,) = csv.DictReader(file)
        rate = model.get("length_controlled_winrate")
        return _Annotated(preferences, float(rate) / 100 if rate else None)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UnreachableError(f"the output of alpaca_eval in {out} cannot be read ({type(error).__name__})") from error


def _share(preference: float | None) -> float | None:
    """Return p(better) of a preference: 1 is a win of the reference, 2 a win of the model, 0 a draw."""
    if preference is None:
        return None
    if not (preference == 0 or 1 <= preference <= 2):
        raise ValueError(preference)
    return 0.5 if preference == 0 else float(preference) - 1
