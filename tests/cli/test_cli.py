"""The command line: fast and light to ask, one clear message for what cannot be done, and the exit status."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

import bfpo.cli
import bfpo.runs.stages
from bfpo import __version__
from bfpo.cli import app
from bfpo.core.console import Plan, show
from bfpo.core.errors import DataError, TrainingError
from bfpo.runs.stages import STAGES
from messages import fails

HEAVY = {"torch", "transformers", "numpy", "accelerate", "peft", "scipy", "pyarrow", "matplotlib"}


def bfpo_in_process(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def python(code: str, **keywords) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **keywords)


@pytest.fixture
def toy_stage(monkeypatch):
    """Put a stage of the test's own in place of `bfpo.commands.toy`."""
    module = SimpleNamespace(run=lambda config, folder: None, preview=lambda config: [f"{config.steps} steps"])
    real = bfpo.runs.stages.import_module
    monkeypatch.setattr(
        bfpo.runs.stages, "import_module", lambda name: module if name == STAGES["toy"].module else real(name)
    )
    return module


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["nonsense"]])
def test_asking_for_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, json\nfrom bfpo.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    loaded = set(json.loads(python(code).stdout.splitlines()[-1]))
    assert not HEAVY & loaded


def test_listing_keys_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom bfpo.cli import app\ntry: app(['train', '--keys'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    lines = python(code).stdout.splitlines()
    assert lines[-1] == "[]"
    assert any(line.startswith("model ") and "(needed)" in line for line in lines)
    assert any(line.startswith("data.files") for line in lines)


def test_help_answers_in_under_half_a_second():
    seconds = []
    for _ in range(3):  # processor time, and the best of some: other work on the machine only adds to the clock
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "bfpo", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_help_names_every_stage_and_every_option():
    text = bfpo_in_process("--help").output
    for name, stage in STAGES.items():
        assert name in text
        assert stage.help in text
        options = bfpo_in_process(name, "--help").output
        for option in ("--config", "--set", "--out", "--resume", "--dry-run", "--keys", "--debug"):
            assert option in options
    assert "--seeds" in bfpo_in_process("demo", "--help").output
    assert "--full" in bfpo_in_process("demo", "--help").output


def test_help_shows_whole_summaries():
    summaries = bfpo_in_process("--help").output.partition("Commands:")[2]
    assert "doctor" in summaries
    assert "..." not in summaries


def test_version_and_no_arguments():
    assert bfpo_in_process("--version").output == f"bfpo {__version__}\n"
    assert "Commands:" in bfpo_in_process().output


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["demo", "--seeds", "0", "--out", "x"], "seeds"),
        (["toy"], "--out"),
        (["toy", "--config", "none.yaml", "--out", "x"], "none.yaml"),
        (["toy", "--set", "stps=3", "--out", "x"], "stps"),
        (["toy", "--set", "beta=-1", "--set", "steps=a", "--out", "x"], "steps"),
        (["train", "--out", "x"], "model"),
    ],
)
def test_bad_input_gets_one_message_and_exit_status_2(arguments, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(bfpo_in_process(*arguments), key)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["tran"], "tran"),
        (["train", "--ou", "x"], "--ou"),
        (["train", "--out"], "--out"),
        (["demo", "--seeds", "many", "--out", "x"], "--seeds"),
    ],
)
def test_what_typer_refuses_has_exit_status_2(arguments, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = bfpo_in_process(*arguments)
    assert result.exit_code == 2
    assert key in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (DataError.at("pairs.jsonl", 3, "no prompt"), 2, "error: pairs.jsonl:3: no prompt\n"),
        (
            DataError("2 of 3 rows cannot be used\n  a.jsonl:1: prompt: missing\nfix these rows"),
            2,
            "error: 2 of 3 rows cannot be used\n  a.jsonl:1: prompt: missing\nfix these rows\n",
        ),
        (TrainingError("first loss is 3"), 1, "error: first loss is 3\n"),
        (
            ZeroDivisionError("by zero"),
            1,
            "error: bfpo toy failed: ZeroDivisionError: by zero; use --debug for the traceback\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nIf reserved"),
            1,
            "error: bfpo toy: out of memory on the GPU (CUDA out of memory. Tried to allocate 2.00 GiB.); make the "
            "batch smaller (batch_size or ..._per_microbatch, see bfpo toy --keys) or end what else uses the GPU, then "
            "continue with the same command and --resume\n",
        ),
        (KeyboardInterrupt(), 130, "error: stopped; continue with the same command and --resume\n"),
    ],
)
def test_exit_status_of_what_stops_a_run(toy_stage, tmp_path, error, exit_code, words):
    def stop(config, folder):
        raise error

    toy_stage.run = stop
    result = bfpo_in_process("toy", "--out", str(tmp_path / "run"))
    assert result.exit_code == exit_code
    assert result.stderr == words
    again = bfpo_in_process("toy", "--out", str(tmp_path / "run"), "--resume", "--debug")
    assert again.exit_code == exit_code
    assert "Traceback" in again.stderr
    assert "in stop" in again.stderr


def test_a_run_its_second_start_and_its_dry_run(toy_stage, tmp_path, capfd):
    out = str(tmp_path / "run")
    dry = bfpo_in_process("toy", "--set", "steps=7", "--dry-run")
    assert dry.exit_code == 0
    assert dry.stdout.startswith("steps: 7\n")
    assert dry.stdout.endswith("7 steps\n")
    assert list(tmp_path.iterdir()) == []
    assert bfpo_in_process("toy", "--out", out).exit_code == 0
    fails(bfpo_in_process("toy", "--out", out), "toy", "--resume")
    again = bfpo_in_process("toy", "--out", out, "--resume")
    assert again.exit_code == 0
    assert "already finished, nothing to do" in again.stderr


def test_demo_has_its_short_options(monkeypatch):
    seen = []
    monkeypatch.setattr("bfpo.cli._execute", lambda stage, settings, **options: seen.append(settings))
    assert bfpo_in_process("demo", "--out", "d", "--seeds", "3", "--full", "--set", "seed=5").exit_code == 0
    assert seen == [["seed=5", "seeds=3", "full=true"]]


def test_a_terminal_that_lacks_a_character_gets_an_escape(monkeypatch, capfd):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(bfpo.cli, "app", lambda: show("“β” −2.6"))
    bfpo.cli.main()
    assert stream.buffer.getvalue() == rb"\u201c\u03b2\u201d \u22122.6" + b"\n"


def as_json(*arguments: str):
    """Return the only JSON object on stdout, and the run of the command line."""
    result = bfpo_in_process(*arguments, "--json")
    value = json.loads(result.stdout)
    assert value["exit_code"] == result.exit_code
    return value, result


def test_json_of_a_run_is_one_object_and_the_text_goes_to_stderr(toy_stage, tmp_path):
    def run(config, folder):
        show("a table for people")
        folder.write_text("scores.md", "x")
        folder.add_facts(text="\x7f \u202e", rate=float("nan"))

    toy_stage.run = run
    out = tmp_path / "run"
    value, result = as_json("toy", "--out", str(out), "--set", "steps=3")
    assert "a table for people" in result.stderr
    assert (value["command"], value["status"], value["exit_code"]) == ("toy", "finished", 0)
    assert (value["out"], value["files"]) == (str(out), ["config.yaml", "run.json", "scores.md"])
    written = json.loads((out / "run.json").read_text())
    assert value["record"] == written
    assert value["record"]["text"] == "\x7f \u202e"
    assert "\x7f" not in result.stdout
    assert result.stdout.isascii()


def test_json_of_a_failure_says_what_to_do(toy_stage, tmp_path):
    def fail(config, folder):
        raise DataError("pairs.jsonl:3: bad")

    toy_stage.run = fail
    out = tmp_path / "run"
    value, result = as_json("toy", "--out", str(out))
    assert value == {
        "command": "toy",
        "status": "failed",
        "exit_code": 2,
        "error": {"kind": "DataError", "message": "pairs.jsonl:3: bad"},
        "out": str(out),
        "resumable": True,
    }
    assert result.stderr.endswith("error: pairs.jsonl:3: bad\n")
    value, _ = as_json("toy", "--out", str(tmp_path / "other"), "--set", "stepps=3")
    assert (value["error"]["kind"], value["resumable"]) == ("ConfigError", False)


def test_json_of_keys_and_of_a_dry_run(toy_stage):
    value, result = as_json("toy", "--keys")
    assert result.exit_code == 0
    keys = {key["key"]: key for key in value["keys"]}
    assert keys["steps"].keys() == {"key", "default", "accepts", "meaning"}
    value, _ = as_json("toy", "--set", "steps=7", "--dry-run")
    assert value["config"]["steps"] == 7
    assert value["text"].endswith("7 steps")
    assert value["planned"] == {}
    toy_stage.preview = lambda config: Plan([f"{config.steps} steps"], {"steps": config.steps, "loss": math.nan})
    value, _ = as_json("toy", "--set", "steps=7", "--dry-run")
    assert (value["planned"], value["text"][-8:]) == ({"steps": 7, "loss": None}, "\n7 steps")


@pytest.mark.parametrize("command", ["gate", "chat"])
def test_json_of_keys_without_the_arguments_of_a_command(command: str) -> None:
    value, result = as_json(command, "--keys")
    assert (result.exit_code, value["command"], value["status"]) == (0, command, "finished")
    assert {key["key"] for key in value["keys"]} > {"gate": {"harmless"}, "chat": {"system"}}[command]
    before = bfpo_in_process(command, "--json", "--keys")  # in any order
    assert json.loads(before.stdout) == value
    assert as_json(command, "--schema")[0]["schema"] == json.loads(bfpo_in_process(command, "--schema").stdout)
    assert bfpo_in_process(command, "--json").exit_code == 2  # an argument is missing


def test_every_command_has_json():
    for name, command in typer.main.get_command(app).commands.items():
        assert "--json" in {option for one in command.params for option in one.opts}, name


SLEEPER = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background has it ignored
import bfpo.runs.stages
def run(config, folder):
    print("running", flush=True)
    time.sleep(60)
sys.modules["sleeper"] = types.SimpleNamespace(run=run)
bfpo.runs.stages.STAGES["toy"] = bfpo.runs.stages.Stage("toy", "ToyConfig", "sleeper", "")
from bfpo.cli import app
app(["toy", "--out", sys.argv[1]])
"""


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_a_folder_to_go_on_with(tmp_path, number, exit_code):
    command = [sys.executable, "-c", SLEEPER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert errors == "error: stopped; continue with the same command and --resume\n"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


def test_another_process_of_a_launcher_may_end_before_the_first_has_made_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = bfpo_in_process("toy", "--out", str(tmp_path / "run"))
    assert (result.exit_code, result.output) == (0, "")
    assert not (tmp_path / "run").exists()


def test_python_m_bfpo_is_the_same_program():
    result = subprocess.run([sys.executable, "-m", "bfpo", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"bfpo {__version__}\n"
