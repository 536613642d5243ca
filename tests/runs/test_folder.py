"""Run folders: what they keep, when they refuse, and that nothing is lost or half written."""

from __future__ import annotations

import errno
import json
import os
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest

import bfpo.runs.folder
import bfpo.runs.stages
from bfpo.config import AlignConfig, ToyConfig, load_config
from bfpo.core.errors import ConfigError, DataError, DiskFullError, RunError
from bfpo.core.files import file_digest, is_disk_full, open_whole, write_text_whole
from bfpo.core.settings import ConfigPart
from bfpo.core.yaml_text import parse_yaml
from bfpo.runs.folder import FREE, RunFolder
from bfpo.runs.stages import STAGES, Stage, preview_stage, run_stage
from messages import raises


def new(path, resume=False, **settings) -> RunFolder:
    return RunFolder.create(path, "toy", ToyConfig(**settings), resume)


def test_a_new_folder_tells_what_was_asked_and_with_what(tmp_path):
    folder = new(tmp_path / "deep" / "run", seed=7)
    record = folder.read_json("run.json")
    assert (record["stage"], record["status"], record["starts"]) == ("toy", "running", 1)
    assert record["seeds"] == {"seed": 7}
    assert {"python", "bfpo", "torch", "transformers"} <= record["versions"].keys()
    assert record["platform"]["cores"] == os.cpu_count()
    config, _ = parse_yaml(folder.file("config.yaml").read_text())
    assert config == record["config"] == ToyConfig(seed=7).resolved()
    assert not folder.resumed


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with raises(RunError):
            new(tmp_path, resume)
    (tmp_path / "file").write_text("")
    with raises(RunError):
        new(tmp_path / "file")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_earlier_run_is_refused_without_resume_and_opened_with_it(tmp_path):
    new(tmp_path / "run").set_status("interrupted")
    with raises(RunError, "--resume"):
        new(tmp_path / "run")
    folder = new(tmp_path / "run", resume=True)
    assert folder.resumed
    assert not folder.finished
    assert folder.record["starts"] == 2


def test_a_resumed_run_does_not_name_the_error_of_its_earlier_start(tmp_path):
    folder = new(tmp_path)
    folder.write_text("toy.md", "half")
    folder.set_status("failed", "the disk is full")
    record = new(tmp_path, resume=True).record
    assert (record["status"], record.get("error")) == ("running", None)


def test_resume_names_the_keys_that_differ(tmp_path):
    new(tmp_path / "run", steps=5)
    with raises(RunError, "--config"):
        new(tmp_path / "run", resume=True, steps=6, seed=3)
    with raises(RunError):
        RunFolder.create(tmp_path / "run", "demo", {}, True)


def test_other_threads_resume_with_a_warning_and_a_finished_run_without(tmp_path, caplog):
    config = {"threads": 1, "judge": {"threads": None}}
    RunFolder.create(tmp_path / "run", "train", config)
    other = {"threads": 2, "judge": {"threads": 4}}
    folder = RunFolder.create(tmp_path / "run", "train", other, resume=True)
    assert [record.message.partition(": ")[2] for record in caplog.records if "threads" in record.message] == [
        f"continues with {said}; what follows may differ from an uninterrupted run in its last digits"
        for said in ("judge.threads 4, before None", "threads 2, before 1")
    ]
    folder.set_status("finished")
    caplog.clear()
    assert RunFolder.create(tmp_path / "run", "train", other, resume=True).finished
    assert not caplog.records


def test_a_run_of_before_with_a_constant_rate_resumes_without_the_warm_up_that_it_did_not_read(tmp_path):
    values = AlignConfig(model="m", data={"files": "p.jsonl"}, lr_scheduler_type="constant").resolved()
    RunFolder.create(tmp_path / "run", "train", {**values, "warmup_steps": 20.0}).set_status("interrupted")
    assert RunFolder.create(tmp_path / "run", "train", values, True).resumed
    cosine = {**values, "lr_scheduler_type": "cosine"}
    RunFolder.create(tmp_path / "other", "train", {**cosine, "warmup_steps": 20.0}).set_status("interrupted")
    with raises(RunError, "warmup_steps"):
        RunFolder.create(tmp_path / "other", "train", cosine, True)


def test_resume_of_a_torn_record_says_so(tmp_path):
    new(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"stage": "to')
    with raises(RunError):
        new(tmp_path / "run", resume=True)


@pytest.mark.parametrize("text", ["[1]", '{"stage": "toy", "config": null}'])
@pytest.mark.parametrize("resume", [False, True])
def test_the_record_of_another_program_is_refused(tmp_path, text, resume):
    new(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(text)
    with raises(RunError, "run.json"):
        new(tmp_path / "run", resume=resume)


def test_leftovers_of_a_killed_first_write_do_not_block(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.1.part").write_text("half")
    assert new(tmp_path / "run").status == "running"
    assert not list((tmp_path / "run").glob(".*"))


def test_what_a_killed_run_was_writing_is_removed_when_it_is_resumed(tmp_path):
    new(tmp_path / "run")
    (tmp_path / "run" / ".run.json.1.part").write_text("half")
    (tmp_path / "run" / ".model.part").mkdir()
    (tmp_path / "run" / ".model.part" / "model.safetensors").write_text("half")
    new(tmp_path / "run", resume=True)
    assert sorted(item.name for item in (tmp_path / "run").iterdir()) == ["config.yaml", "run.json"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_text_whole(file, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_whole(file, "new")
    assert file.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]
    with raises(RunError):
        new(tmp_path / "run")


def test_two_machines_may_write_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)  # a number that processes of both have
    with open_whole(tmp_path / "file") as first:
        with open_whole(tmp_path / "file") as second:
            first.write(b"the one")
            second.write(b"the other")
        assert (tmp_path / "file").read_bytes() == b"the other"
    assert (tmp_path / "file").read_bytes() == b"the one"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_metrics_survive_a_torn_row_and_a_number_that_is_not_finite(tmp_path):
    folder = new(tmp_path / "run")
    assert folder.read_metrics() == []
    folder.append_metrics({"step": 1, "loss": 0.5})
    with folder.file("metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    folder.append_metrics({"step": 2, "loss": float("nan"), "cells": {"safe-safe": float("inf")}})
    assert folder.read_metrics() == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "cells": {"safe-safe": None}},
    ]
    first = folder.file("metrics.jsonl").read_text().splitlines()[0]
    folder.restore_metrics([{"loss": 0.5, "step": 1}])
    assert folder.file("metrics.jsonl").read_text() == first + "\n"  # as it was written
    lost = {"step": 2, "loss": 0.1 + 0.2}
    folder.restore_metrics([{"loss": 0.5, "step": 1}, lost])
    assert folder.read_metrics() == [{"step": 1, "loss": 0.5}, lost]
    folder.restore_metrics([])
    assert folder.read_metrics() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_row_that_finds_no_room_is_taken_back_and_told(tmp_path, monkeypatch, number):
    folder = new(tmp_path / "run")
    folder.append_metrics({"step": 1})
    folder.kept = "the checkpoint of step 1 is complete"
    opened = Path.open

    def small_disk(path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        if path.name == "metrics.jsonl" and "a" in args[0]:
            return SmallDisk(file, number)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", small_disk)
        with raises(DiskFullError, "metrics.jsonl") as raised:
            folder.append_metrics({"step": 2})
    assert raised.value.exit_code == 1
    assert folder.file("metrics.jsonl").read_text() == '{"step": 1}\n'
    folder.append_metrics({"step": 2})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]


class SmallDisk:
    """A file on a disk with room for four more bytes."""

    def __init__(self, file, number):
        self.file, self.number, self.room = file, number, 4

    def write(self, content):
        if not self.room:
            raise OSError(self.number, os.strerror(self.number))
        written = self.file.write(content[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def test_a_full_disk_is_known_through_what_came_of_it():
    def raised_from(error, cause):
        error.__cause__ = cause
        return error

    full = OSError(errno.ENOSPC, "No space left on device")
    assert is_disk_full(full)
    assert is_disk_full(raised_from(ValueError("while saving"), full))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(None)


def test_data_is_hashed_and_a_changed_file_stops_a_resumed_run(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("abc")
    folder = new(tmp_path / "run")
    folder.add_data("data", [data])
    fact = folder.record["data"]["data"][str(data)]
    assert fact == {"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "bytes": 3}
    assert fact["sha256"] == file_digest(data)
    new(tmp_path / "run", resume=True).add_data("data", data)
    data.write_text("abd")
    with raises(RunError):
        new(tmp_path / "run", resume=True).add_data("data", data)
    with raises(RunError):
        folder.add_data("data", tmp_path / "none")


def test_a_folder_of_data_is_the_files_that_it_holds(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (data / name).write_text(name)
    new(tmp_path / "run").add_data("data", data)
    folder = new(tmp_path / "run", resume=True)
    folder.add_data("data", data)
    assert list(folder.record["data"]["data"]) == [str(data / "a.jsonl"), str(data / "b.jsonl")]
    (data / "c.jsonl").write_text("c")
    with raises(RunError, "c.jsonl"):
        new(tmp_path / "run", resume=True).add_data("data", data)


def test_a_run_from_before_a_setting_existed_resumes_with_the_setting_off(tmp_path):
    RunFolder.create(tmp_path / "run", "train", {"seed": 1, "data": {"files": ["a"]}})
    for off in (None, False, {}, [], ""):
        given = {"seed": 1, "data": {"files": ["a"], "tint": off}}
        assert RunFolder.create(tmp_path / "run", "train", given, True).resumed
    assert RunFolder.create(tmp_path / "run", "train", {**given, "judge": {"api_key_env": None}}, True).resumed
    assert RunFolder.create(tmp_path / "run", "train", {**given, "judge": {"api_key_env": "A_KEY"}}, True).resumed
    assert RunFolder.create(tmp_path / "run", "train", {**given, "run_name": "mine"}, True).resumed
    with raises(RunError, "data.tint"):
        RunFolder.create(tmp_path / "run", "train", {"seed": 1, "data": {"files": ["a"], "tint": 0}}, True)


def test_a_key_added_to_a_mapping_of_the_user_s_own_is_another_config(tmp_path):
    before = {"extra_body": {"min_p": 0.1}, "data": {"columns": {"prompt": "q"}}}
    RunFolder.create(tmp_path / "run", "generate", before).set_status("interrupted")
    for given in (
        {**before, "extra_body": {"min_p": 0.1, "chat_template_kwargs": {"enable_thinking": False}}},
        {**before, "extra_body": {"min_p": 0.1, "timeout": 5}},
        {**before, "data": {"columns": {"prompt": "q", "id": None}}},
        {**before, "chat_template_kwargs": {"enable_thinking": False}},
    ):
        with raises(RunError, "another config"):
            RunFolder.create(tmp_path / "run", "generate", given, True)
    assert RunFolder.create(tmp_path / "run", "generate", {**before, "chat_template_kwargs": {}}, True).resumed


def _parts(annotation):
    # On Python 3.10 `dict[str, Any]` is a `type`.
    if isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, ConfigPart):
        return {annotation}
    return set().union(*map(_parts, typing.get_args(annotation)))


def _is_mapping(annotation):
    of_plain_values = typing.get_origin(annotation) is dict and not _parts(annotation)
    return of_plain_values or any(map(_is_mapping, typing.get_args(annotation)))


def test_every_mapping_of_the_user_s_own_is_known():
    mappings, sections, seen = set(), set(), set()
    waiting = [stage.config_class() for stage in STAGES.values()]
    while waiting:
        part = waiting.pop()
        if part in seen:
            continue
        seen.add(part)
        waiting += getattr(part, "modes", {}).values()
        for key, info in part.every_field().items():
            inner = _parts(info.annotation)
            waiting += inner
            if inner:
                sections.add(key)
            elif _is_mapping(info.annotation):
                mappings.add(key)
    assert mappings == FREE
    assert not FREE & sections


def test_how_a_server_is_asked_may_change_when_a_run_continues(tmp_path):
    given = {"url": "http://localhost:1/v1", "max_requests": 100, "timeout": 60.0, "max_concurrency": 8}
    RunFolder.create(tmp_path / "run", "label", {"judges": [given], "max_requests": 9}).set_status("interrupted")
    more = {**given, "timeout": 300.0, "max_concurrency": 2, "max_retries": 9, "api_key_env": "A_KEY"}
    assert RunFolder.create(tmp_path / "run", "label", {"judges": [more], "max_requests": None}, True).resumed
    with raises(RunError, "judges.0.url"):
        other = {**more, "url": "http://localhost:2/v1"}
        RunFolder.create(tmp_path / "run", "label", {"judges": [other], "max_requests": None}, True)


def test_other_versions_are_named_when_a_run_continues(tmp_path, monkeypatch, caplog):
    versions = {"python": "3.10.1", "bfpo": "0.1.0", "torch": "2.7.0", "peft": None}
    monkeypatch.setattr(bfpo.runs.folder, "describe_versions", lambda: dict(versions))
    monkeypatch.setattr(bfpo.runs.folder, "describe_checkout", lambda: {"commit": "a" * 40, "changed": False})
    new(tmp_path / "run")
    new(tmp_path / "run", resume=True)
    assert not caplog.records
    versions |= {"python": "3.10.2", "torch": "2.8.1", "peft": "0.17.0"}
    monkeypatch.setattr(bfpo.runs.folder, "describe_checkout", lambda: {"commit": "b" * 40, "changed": False})
    new(tmp_path / "run", resume=True)
    text = caplog.records[0].message
    assert "torch 2.7.0, now 2.8.1; peft (none), now 0.17.0; bfpo at commit aaaaaaaaaa, now bbbbbbbbbb" in text
    assert len(caplog.records) == 1
    new(tmp_path / "run", resume=True).set_status("finished")
    new(tmp_path / "run", resume=True)
    assert len(caplog.records) == 1  # known by now, and a finished run does not continue


def test_no_secret_and_no_environment_variable_is_written(tmp_path, monkeypatch):
    secret = "hf_" + "a" * 30
    monkeypatch.setenv("HF_TOKEN", secret)
    config = {"model": secret, "hub_token": "plain", "files": [f"https://me:{secret}@host/x", "sk-" + "b" * 30]}
    folder = RunFolder.create(tmp_path / "run", "toy", {**config, "max_new_tokens": 3})
    folder.add_facts(note=secret)
    folder.write_card("Card", {})
    written = "".join(item.read_text() for item in folder.path.iterdir())
    assert secret not in written
    assert "plain" not in written
    assert "sk-bbb" not in written
    assert folder.config["max_new_tokens"] == 3


def test_only_the_first_process_of_a_launcher_writes(tmp_path, monkeypatch):
    first = new(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    second = new(tmp_path / "run")
    assert not second.is_writer
    second.append_metrics({"step": 1})
    second.set_status("finished")
    second.write_text("a.txt", "a")
    assert first.read_json("run.json")["status"] == "running"
    assert not first.file("a.txt").exists()
    assert first.read_metrics() == []


@pytest.mark.parametrize("name", sorted(STAGES.keys() - {"sft", "reference", "train"}))
def test_commands_that_are_no_training_are_run_by_the_first_process_of_a_launcher(name):
    STAGES[name].run()(object(), SimpleNamespace(is_writer=False))


def test_all_processes_of_a_resumed_run_know_its_record(tmp_path, monkeypatch):
    first = new(tmp_path / "run")
    first.add_facts(reference="swap", hub_data={"data": "abc"})
    first.set_status("interrupted")
    monkeypatch.setenv("RANK", "1")
    other = new(tmp_path / "run", resume=True)
    assert (other.resumed, other.finished, other.is_writer) == (True, False, False)
    assert (other.record["reference"], other.record["hub_data"]) == ("swap", {"data": "abc"})
    first.set_status("finished")
    assert new(tmp_path / "run", resume=True).finished
    first.file("run.json").write_text("{")  # the first process reports it
    assert not new(tmp_path / "run", resume=True).finished


def test_a_process_that_is_ahead_of_the_first_one_leaves_nothing_in_its_way(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert new(tmp_path / "run").folder("checkpoints") == tmp_path / "run" / "checkpoints"
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    assert new(tmp_path / "run").folder("checkpoints").is_dir()


def test_the_card_holds_metadata_results_settings_and_hashes(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("abc")
    folder = new(tmp_path / "run", seed=5)
    folder.add_data("data", data)
    path = folder.write_card(
        "A model", {"Results": {"a|b": 0.123456789}, "Note": "Text."}, base_model="base", tags=["x", "bfpo"]
    )
    text = path.read_text()
    head, _ = parse_yaml(text.split("---")[1])
    assert head == {"library_name": "transformers", "tags": ["bfpo", "x"], "base_model": "base"}
    assert "| a\\|b | 0.123457 |" in text
    assert "## Note\n\nText." in text
    assert "| seed | 5 |" in text
    assert file_digest(data) in text


def test_the_card_names_no_place_of_this_machine(tmp_path):
    start = Path(Path.home().anchor) / "usr"  # one name, as folders of containers are
    values = AlignConfig(model=str(start), data={"files": "p.jsonl"}).resolved()
    folder = RunFolder.create(tmp_path / "run", "train", values)
    folder.add_facts(data={"data": {"/pairs.jsonl": {"sha256": "ab", "bytes": 3}}})
    text = folder.write_card(f"{start}, trained by bfpo", {}).read_text()
    assert "# usr, trained by bfpo" in text
    assert "| model | usr |" in text
    assert "| data: pairs.jsonl | SHA-256 ab, 3 bytes |" in text


def test_the_sources_of_one_stream_of_a_mixture_and_of_no_other_program(tmp_path):
    def source(name):
        return {"name": name, "licence": "mit", "hub_id": f"acme/{name}", "revision": None}

    prepared = RunFolder.create(tmp_path / "prepared", "prepare", {})
    sources = {"main a": [source("a")], "buffer b": [source("b")], "decontaminate c": [source("c")]}
    prepared.add_facts(sources=sources)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("[1]")
    for file in ("prepared/main/train.jsonl", "other/rows.jsonl"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("abc")
    folder = new(tmp_path / "run")
    folder.add_data("data", [tmp_path / "prepared" / "main" / "train.jsonl", tmp_path / "other" / "rows.jsonl"])
    assert folder.record["sources"] == {"data": [source("a")]}


# run_stage


@pytest.fixture
def fake(monkeypatch):
    """Put a stage of the test's own in place of `toy`."""

    def put(run, preview=lambda config: ["nothing"], name="toy", config="ToyConfig"):
        monkeypatch.setattr(bfpo.runs.stages, "import_module", lambda module: modules.get(module) or real(module))
        modules[f"fake_{name}"] = SimpleNamespace(run=run, preview=preview)
        monkeypatch.setitem(STAGES, name, Stage(name, config, f"fake_{name}", "help"))

    modules: dict[str, SimpleNamespace] = {}
    real = bfpo.runs.stages.import_module
    return put


def test_a_stage_that_ends_is_finished_and_left_alone_afterwards(tmp_path, fake):
    runs = []
    fake(lambda config, folder: runs.append((config.seed, folder.write_text("result.txt", "1"))))
    folder = run_stage("toy", ToyConfig(seed=4), tmp_path / "run")
    assert folder.finished
    again = run_stage("toy", ToyConfig(seed=4), tmp_path / "run", resume=True)
    assert again.finished
    assert len(runs) == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (DataError("a.jsonl:3: bad"), "failed", "a.jsonl:3: bad"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(143), "interrupted", None),
    ],
)
def test_whatever_stops_a_stage_is_written_and_goes_on(tmp_path, fake, error, status, text):
    def stop(config, folder):
        raise error

    fake(stop)
    with pytest.raises(type(error)):
        run_stage("toy", ToyConfig(), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record.get("error")) == (status, text)
    fake(lambda config, folder: None)
    assert "error" not in run_stage("toy", ToyConfig(), tmp_path / "run", resume=True).record


def test_a_setting_of_another_method_is_refused_and_left_out(tmp_path, fake):
    fake(lambda config, folder: None, name="train", config="AlignConfig")
    given = ["model=m", "data.files=a", "method=dpo_h", "alpha=0.5", "safety_weight=2.0"]
    with raises(ConfigError, "alpha, safety_weight"):
        load_config(AlignConfig, None, given)
    left_out = AlignConfig(model="m", data={"files": "a"}, method="dpo_h")
    config = run_stage("train", left_out, tmp_path / "run").config
    assert config["beta"] == 0.01
    assert not {"alpha", "safety_weight", "safedpo_delta", "bso_shift"} & config.keys()
    assert AlignConfig(**config).method == "dpo_h"  # the resolved config is a config


def test_the_preview_shows_config_and_counts_and_writes_nothing(tmp_path, fake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake(lambda config, folder: None, preview=lambda config: [f"steps: {config.steps}", "safe-safe: 3"])
    text = preview_stage("toy", ToyConfig(steps=9))
    assert text.endswith("steps: 9\nsafe-safe: 3")
    assert "learning_rate: 0.01" in text
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_stage_and_a_config_of_another(tmp_path):
    with raises(ConfigError, "stage"):
        run_stage("tain", ToyConfig(), tmp_path / "run")
    with raises(ConfigError):
        run_stage("demo", ToyConfig(), tmp_path / "run")


def test_a_figure_per_token_is_no_secret(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "train", {"seed": 0})
    folder.add_facts(metrics={"main/favoured_drift_per_token": -0.25}, api_token="abcdefgh")
    assert folder.record["metrics"] == {"main/favoured_drift_per_token": -0.25}
    assert folder.record["api_token"] == "***"


def test_a_folder_in_which_a_run_failed_before_it_made_anything_counts_as_empty(tmp_path: Path) -> None:
    failed = RunFolder.create(tmp_path / "run", "train", {"beta": -1.0})
    failed.folder("checkpoints")
    failed.set_status("failed", "beta: got -1.0")
    again = RunFolder.create(tmp_path / "run", "generate", {"seed": 1})
    assert (again.stage, again.resumed, again.status) == ("generate", False, "running")
    again.write_text("completions.jsonl", "{}\n")
    again.set_status("failed", "no room")
    with raises(RunError):
        RunFolder.create(tmp_path / "run", "generate", {"seed": 2})


def test_weights_are_recorded_by_the_start_that_gets_to_them(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_text_whole(model / "model.safetensors", "first")
    new(tmp_path / "run").set_status("interrupted")  # before it hashed the model
    folder = new(tmp_path / "run", resume=True)
    folder.add_weights(str(model))
    assert list(folder.record["weights"]) == [str(model)]
    folder.set_status("interrupted")
    write_text_whole(model / "model.safetensors", "another")
    with raises(RunError, "model"):
        new(tmp_path / "run", resume=True).add_weights(str(model))


def test_a_run_of_before_goes_on_without_weights(tmp_path: Path) -> None:
    new(tmp_path / "run").set_status("interrupted")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["weights"]
    write_text_whole(tmp_path / "run" / "run.json", json.dumps(record))
    (tmp_path / "model").mkdir()
    write_text_whole(tmp_path / "model" / "model.safetensors", "first")
    folder = new(tmp_path / "run", resume=True)
    folder.add_weights(str(tmp_path / "model"))
    assert "weights" not in folder.record
