"""Runs are joined on a page by what they are: the digest of a run, its folder, or the end of a path that is gone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.provenance import RunFile, run_digest
from bfpo.core.records import load
from bfpo.report.data import MethodResult, ReportData
from bfpo.report.gather import gather
from run_folders import score, write_run


def training(folder: Path, *, beta: float = 0.1, created: str = "", start: str = "hub/start") -> Path:
    """Write a run of `train` with its model; `created` as versions with digests write it."""
    config = {"method": "bfpo", "beta": beta, "model": start}
    write_run(folder, "train", config, metrics__jsonl=[{"step": 1, "main/safe-safe/beta_margin": beta}])
    (folder / "model").mkdir()
    if created:
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "created": created}))
    return folder


def evaluation(folder: Path, models: dict[str, str], /, *, suite: str = "demo", **config: Any) -> Path:
    """Write a run over one suite: name -> path of a model; digests of those in runs, as `run_stage` records them."""
    runs = {path: Path(path).parent for path in models.values() if (Path(path).parent / "run.json").is_file()}
    digests = {path: run_digest(load(RunFile, run / "run.json")) for path, run in runs.items()}
    scores = [score("helpful_and_safe", 0.1 * n, suite, name) for n, name in enumerate(models, start=1)]
    difference = {"suite": suite, "metric": "m", "first": next(iter(models)), "second": list(models)[-1], "num": 3}
    write_run(
        folder,
        "evaluate",
        config,
        scores__json={
            "confidence": 0.95,
            "models": [{"name": name, "model": path} for name, path in models.items()],
            "suites": [{"name": suite, "title": suite, "status": "scored"}],
            "scores": scores,
            "comparisons": [difference],
            "warnings": [f"{next(iter(models))}: said once"],
        },
    )
    record = json.loads((folder / "run.json").read_text())
    record["model_runs"] = {path: digest for path, digest in digests.items() if digest}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def betas(data: ReportData) -> dict[str, float | None]:
    return {method.name: method.settings.get("beta") for method in data.methods}


def named(data: ReportData, name: str) -> MethodResult:
    return next(method for method in data.methods if method.name == name)


def test_two_runs_of_one_name_are_two_models(tmp_path: Path) -> None:
    runs = [training(tmp_path / place / "runs" / "train", beta=beta) for place, beta in (("one", 0.1), ("two", 0.2))]
    scores = evaluation(tmp_path / "scores", {"first": str(runs[0] / "model"), "second": str(runs[1] / "model")})
    assert betas(gather([*runs, scores])) == {"first": 0.1, "second": 0.2}
    # As above, the models by the same name, each in a run of its own.
    each = [
        evaluation(tmp_path / f"scores-{n}", {"train": str(run / "model")}, suite=f"s{n}") for n, run in enumerate(runs)
    ]
    data = gather([*runs, *each])
    assert betas(data) == {"train": 0.1, "train (scores-1)": 0.2}
    assert [list(method.suite_scores) for method in data.methods] == [["s0"], ["s1"]]
    assert [row.first for row in data.suite_comparisons] == ["train", "train (scores-1)"]
    assert [note for note in data.notes if "said once" in note] == ["train: said once."]


def test_one_model_in_two_runs_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(tmp_path / "runs" / "bfpo", created="2026-01-01T00:00:00+00:00")
    monkeypatch.chdir(tmp_path)
    paths = (str(run / "model"), "runs/bfpo/model")
    each = [evaluation(tmp_path / f"scores-{n}", {"ours": path}, suite=f"s{n}") for n, path in enumerate(paths)]
    data = gather([run, *each])
    assert betas(data) == {"ours": 0.1}
    assert list(named(data, "ours").suite_scores) == ["s0", "s1"]


def test_one_model_by_two_names_is_one_row_if_it_was_asked_in_the_same_way(tmp_path: Path) -> None:
    run = training(tmp_path / "runs" / "bfpo", created="2026-01-01T00:00:00+00:00")
    model = str(run / "model")
    first = evaluation(tmp_path / "one", {"ours": model}, suite="s1")
    second = evaluation(tmp_path / "two", {"start": "hub/start", "bfpo": model}, suite="s2")
    data = gather([run, first, second])
    assert betas(data) == {"ours": 0.1, "start": None}
    assert list(named(data, "ours").suite_scores) == ["s1", "s2"]
    assert data.suite_comparisons[1].second == "ours"
    assert [note for note in data.notes if "calls" in note] == [f"ours: {tmp_path.name}/two calls this model bfpo."]
    # Asked on the same suite, or otherwise, the name is the difference; and another checkpoint is another model.
    again = evaluation(tmp_path / "three", {"bfpo": model}, suite="s1")
    data = gather([run, first, again])
    assert betas(data) == {"ours": 0.1, "bfpo": 0.1}
    assert "ours and bfpo are the same model, by its run or folder." in data.notes
    settings = [{"name": "thinking", "model": model, "chat_template_kwargs": {"enable_thinking": True}}]
    other = evaluation(tmp_path / "four", {"thinking": model}, suite="s2", models=settings)
    assert betas(gather([run, first, other])) == {"ours": 0.1, "thinking": 0.1}
    (run / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    for name in ("early", "ours"):
        early = evaluation(tmp_path / name, {name: str(run / "checkpoints" / "checkpoint-5")}, suite="s2")
        assert len(gather([run, first, early]).methods) == 2


@pytest.mark.parametrize("created", ["2026-01-01T00:00:00+00:00", ""])
def test_a_moved_run_joins_and_another_in_its_place_does_not(tmp_path: Path, created: str) -> None:
    run = training(tmp_path / "runs" / "bfpo", created=created)
    scores = evaluation(tmp_path / "scores", {"ours": str(run / "model")})
    moved = tmp_path / "elsewhere" / ("renamed" if created else "bfpo")
    moved.parent.mkdir()
    shutil.move(run, moved)
    assert betas(gather([moved, scores])) == {"ours": 0.1}
    if created:  # retrained under the old path: another run
        again = training(tmp_path / "runs" / "bfpo", beta=0.3, created="2026-02-02T00:00:00+00:00")
        assert betas(gather([again, moved, scores])) == {"ours": 0.1, "bfpo": 0.3}
        assert betas(gather([again, scores])) == {"ours": None, "bfpo": 0.3}


def test_the_end_of_a_path_decides_only_where_it_is_clear(tmp_path: Path) -> None:
    scores = evaluation(tmp_path / "scores", {"ours": "/gone/x/bfpo/train/model"})
    one = training(tmp_path / "a" / "bfpo" / "train")
    assert betas(gather([one, scores])) == {"ours": 0.1}
    two = training(tmp_path / "b" / "bfpo" / "train", beta=0.2)
    assert betas(gather([one, two, scores])) == {"ours": None, "bfpo": 0.1, "bfpo (train)": 0.2}
    three = training(tmp_path / "x" / "bfpo", beta=0.3)
    assert betas(gather([one, two, three, scores]))["ours"] == 0.3
    other = training(tmp_path / "a" / "sft" / "train", beta=0.4)
    assert betas(gather([other, scores])) == {"ours": None, "sft": 0.4}


def test_the_start_is_known_by_its_run(tmp_path: Path) -> None:
    start = training(tmp_path / "one" / "train", created="2026-01-01T00:00:00+00:00")
    (start / "run.json").write_text((start / "run.json").read_text().replace('"train"', '"sft"'))
    other = training(tmp_path / "two" / "train", beta=0.2)
    ours = training(tmp_path / "three" / "train", beta=0.3, start=os.path.relpath(start / "model"))
    models = {"a": other, "b": start, "c": ours}
    scores = evaluation(tmp_path / "scores", {name: str(run / "model") for name, run in models.items()})
    data = gather([start, other, ours, scores])
    assert {method.name: method.role for method in data.methods} == {"a": "baseline", "b": "start", "c": "baseline"}


def test_a_path_that_no_file_can_have_is_one_that_is_not_there(tmp_path: Path) -> None:
    run = evaluation(tmp_path / "scores", {"a": f"runs/{'long' * 100}/model", "b": "runs/a\0b/model"})
    assert [method.title for method in gather([run]).methods] == ["a", "b"]
