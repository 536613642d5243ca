"""Trackers: what they get under which names, that nothing is sent unless asked, and that no key is written."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from bfpo.config import AlignConfig, SftConfig
from bfpo.config.train import TRACKERS
from bfpo.core.errors import ConfigError, MissingExtraError
from bfpo.core.secrets import hide_secrets
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from messages import raises, says
from tiny import tiny_model, tiny_tokenizer

CELLS = [(True, True), (True, False), (False, True), (False, False)]
NAMES = ("train/main/accuracy", "train/buffer/unsafe-safe/accuracy", "eval/safe-unsafe/normalised_loss")
KEY = "0123456789abcdef0123456789abcdef01234567"  # the form of a key of W&B


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_policy(tiny_model(max_position_embeddings=128), tiny_tokenizer(), tmp_path / "start")
    rows = [
        {"prompt": f"w{i} w3", "chosen": f"w{i % 7} w9", "rejected": f"w{i % 3} w11"}
        | dict(zip(("chosen_is_safe", "rejected_is_safe"), CELLS[i % 4], strict=True))
        for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def align(data: Path, **settings: Any) -> AlignConfig:
    files = {"files": str(data / "pairs.jsonl")}
    given = {"model": str(data / "start"), "data": files, "buffer": files, "eval_data": files, "threads": 1}
    steps = {"max_steps": 4, "pairs_per_step": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}
    return AlignConfig(**{**given, **steps, "learning_rate": 1e-3, **settings})


def sft(data: Path, **settings: Any) -> SftConfig:
    steps = {"max_steps": 2, "completions_per_step": 4, "completions_per_microbatch": 4, "logging_steps": 1}
    return SftConfig(
        model=str(data / "start"), data={"files": str(data / "pairs.jsonl")}, threads=1, **{**steps, **settings}
    )


def as_tracked(row: dict[str, Any]) -> dict[str, float]:
    """Return a row of metrics.jsonl under the names of docs/tracking.md."""
    rest = {name: value for name, value in row.items() if name != "step"}
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in rest.items()
    }


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return what TensorBoard shows of a folder: name -> step -> value."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    steps = [event.step for event in found["train/main/loss"]]
    assert len(set(steps)) == len(steps)
    return {name: {event.step: event.value for event in points} for name, points in found.items()}


def test_tensorboard_shows_every_row_by_stream_and_cell(data: Path) -> None:
    pytest.importorskip("tensorboard")
    found = run_stage("train", align(data, report_to="tensorboard", run_tags=["one", "two"]), data / "run")
    shown = scalars(data / "run" / "tensorboard")
    rows = found.read_metrics()
    assert set(NAMES) <= set(shown)
    wanted = {(name, row["step"]): value for row in rows for name, value in as_tracked(row).items()}
    assert {(name, step) for name, by_step in shown.items() for step in by_step} == set(wanted)
    for (name, step), value in wanted.items():
        assert math.isclose(shown[name][step], value, rel_tol=1e-6, abs_tol=1e-9), name
    card = (data / "run" / "README.md").read_text()
    assert "\n- one\n- two\n" in card


@pytest.mark.parametrize("stop", [1, 3])  # before the first checkpoint, and behind it
def test_a_resumed_run_shows_every_step_once(data: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    pytest.importorskip("tensorboard")
    config = align(data, report_to=["tensorboard"])

    class Stop(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(INTEGRATION_TO_CALLBACK, "clearml", Stop)
        first = align(data, report_to=["tensorboard", "clearml"])
        with pytest.raises(KeyboardInterrupt):
            run_stage("train", first, data / "run")
    record = json.loads((data / "run" / "run.json").read_text())
    record["config"]["report_to"] = ["tensorboard"]
    (data / "run" / "run.json").write_text(json.dumps(record))
    rows = run_stage("train", config, data / "run", resume=True).read_metrics()
    events = scalars(data / "run" / "tensorboard")
    assert sorted(events["train/main/loss"]) == [1, 2, 3, 4]
    last = {row["step"]: row for row in rows if "main/loss" in row}
    for step, value in events["train/main/loss"].items():
        assert math.isclose(value, last[step]["main/loss"], rel_tol=1e-6)


def test_a_tracker_is_made_as_a_trainer_does_and_gets_the_default_project(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    class Watching(TrainerCallback):
        def on_init_end(self, args: Any, *_: Any, **__: Any) -> None:  # codecarbon and azure_ml start here
            seen.append(("init", args.project))

        def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
            seen.append(("train", args.project))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "codecarbon", Watching)
    run_stage("sft", sft(data, report_to="codecarbon"), data / "run")
    assert seen == [("init", "bfpo"), ("train", "bfpo")]


def test_runs_of_the_same_name_are_two_in_trackio_and_a_resumed_one_is_the_same(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    class Named(TrainerCallback):
        stops = True

        def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
            names.append(args.run_name)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.stops:
                raise KeyboardInterrupt

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", Named)
    config = sft(data, report_to="trackio")
    with pytest.raises(KeyboardInterrupt):
        run_stage("sft", config, data / "one" / "train")
    monkeypatch.setattr(Named, "stops", False)
    run_stage("sft", config, data / "one" / "train", resume=True)
    folder = run_stage("sft", config, data / "two" / "train")
    assert names[0] == names[1] != names[2] == folder.record["tracker_runs"]["trackio"]
    assert all(name.startswith("train-") for name in names)


def test_what_a_tracker_cannot_be_given_is_said(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("clearml", "comet_ml"):
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, TrainerCallback)
    both = ["clearml", "comet_ml"]
    with caplog.at_level(logging.WARNING, logger="bfpo"):
        run_stage("sft", sft(data, report_to=both), data / "plain")
        assert "clearml" not in caplog.text
        run_stage("sft", sft(data, report_to=both, run_name="n", run_tags="t"), data / "run")
    says(caplog, "run_name", "clearml")
    says(caplog, "run_tags", "clearml, comet_ml")


def test_nothing_is_tracked_unless_asked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TRACKERS:
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, _refuse)
    run_stage("sft", sft(data), data / "run")
    assert not (data / "run" / "tensorboard").exists()


def _refuse() -> TrainerCallback:
    raise AssertionError("a tracker was made")


def test_our_list_of_trackers_is_that_of_transformers() -> None:
    assert set(INTEGRATION_TO_CALLBACK) <= set(TRACKERS)


def test_bad_settings(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(ValueError, "report_to"):
        align(data, report_to=["tensorbord"])
    with raises(ValueError, "run_name"):
        align(data, run_name="a")

    def missing() -> TrainerCallback:
        raise RuntimeError("WandbCallback requires wandb to be installed.")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", missing)
    with raises(MissingExtraError, "wandb"):
        run_stage("sft", sft(data, report_to="wandb"), data / "run")
    monkeypatch.delitem(INTEGRATION_TO_CALLBACK, "neptune", raising=False)
    with raises(ConfigError, "neptune", mask="has .*"):
        run_stage("sft", sft(data, report_to="neptune"), data / "other")


class Failing(TrainerCallback):
    """A tracker that fails at one event."""

    at = "on_train_begin"

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._fail("on_train_begin")

    def on_log(self, *_: Any, **__: Any) -> None:
        self._fail("on_log")

    def _fail(self, event: str) -> None:
        if event == self.at:
            raise OSError(f"no connection for the key {KEY}")


def test_a_tracker_that_cannot_start_stops_the_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "clearml", Failing)
    with raises(ConfigError, "clearml") as caught:
        run_stage("sft", sft(data, report_to="clearml"), data / "run")
    assert KEY not in str(caught.value)


def test_a_tracker_that_fails_later_is_dropped(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "clearml", Failing)
    monkeypatch.setattr(Failing, "at", "on_log")
    with caplog.at_level(logging.WARNING, logger="bfpo"):
        assert run_stage("sft", sft(data, report_to="clearml"), data / "run").finished
    says(caplog, "report_to", "clearml")
    assert KEY not in caplog.text


def test_wandb_offline_holds_the_rows_and_no_key(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("API_KEY", KEY), ("SILENT", "true"), ("CONFIG_DIR", str(data / "c"))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    out = data / "run"
    folder = run_stage("train", align(data, report_to="wandb", project="p", run_name="n", run_tags="t"), out)
    (store,) = out.glob("wandb/offline-run-*/*.wandb")
    held = store.read_bytes()
    for name in NAMES:
        assert name.encode() in held, name
    assert folder.record["tracker_runs"]["wandb"] in store.name
    assert wandb.run is None  # closed, so that another run of this process gets its own
    written = [path for path in data.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    output = capfd.readouterr()
    assert KEY not in output.out + output.err


def test_mlflow_goes_on_with_its_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (data / "mlruns").as_uri())
    monkeypatch.chdir(data)
    mlflow.set_tracking_uri((data / "mlruns").as_uri())
    folder = run_stage("train", align(data, report_to="mlflow", project="p", run_name="n", run_tags="t"), data / "run")
    run = mlflow.get_run(folder.record["tracker_runs"]["mlflow"])
    assert run.info.run_name == "n"
    assert run.info.status == "FINISHED"
    assert run.data.tags["t"] == "true"
    assert run.data.metrics["eval_accuracy"] == folder.record["metrics"]["eval_accuracy"]
    assert len(mlflow.search_runs(experiment_names=["p"])) == 1


def test_trackio_keeps_two_runs_with_their_tags_and_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(data / "trackio"))  # read when trackio is imported
    trackio = pytest.importorskip("trackio")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    config = align(data, report_to="trackio", project="p", run_name="n", run_tags=["t", "u"])
    folders = [run_stage("train", config, data / name / "train") for name in ("one", "two")]
    runs = {run.name: run for run in trackio.Api().runs("p")}
    assert runs.keys() == {folder.record["tracker_runs"]["trackio"] for folder in folders}
    assert len(runs) == 2
    assert all(name.startswith("n-") and run.config["tags"] == ["t", "u"] for name, run in runs.items())
    for folder in folders:
        shown = storage.get_logs("p", run_id=runs[folder.record["tracker_runs"]["trackio"]].id)
        held = {(name, row["train/global_step"]): row[name] for row in shown for name in row if name in NAMES}
        wanted = {
            (name, row["step"]): value for row in folder.read_metrics() for name, value in as_tracked(row).items()
        }
        assert held == pytest.approx({key: value for key, value in wanted.items() if key[0] in NAMES})


def test_keys_of_trackers_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert hide_secrets(f"key={KEY}!") == "key=***!"
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert hide_secrets("text") == "text"


def test_wandb_and_mlflow_are_not_needed() -> None:
    pytest.importorskip("ruff", reason="the extra dev, which has tensorboard, is not installed")
    assert importlib.util.find_spec("tensorboard") is not None
