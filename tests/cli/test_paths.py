"""Names from files of other people stay inside the folders that the user gives; nothing is written outside --out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import EvaluateConfig, JudgeCheckConfig, load_config
from bfpo.core.errors import ConfigError, RunError
from bfpo.core.inputs import reason_outside
from bfpo.experiments.points import Chain
from bfpo.runs.folder import RunFolder
from bfpo.suites.catalogue import known_suites, load_suites
from messages import fails, raises

OUTSIDE = ["../x", "a/../../x", "/etc/x", "~/x", "..", "C:\\x", "..\\x", "\\\\host\\x", "a\0b", ""]
SUITE: dict[str, Any] = {
    "name": "mine",
    "title": "Mine",
    "summary": "own",
    "kind": "generative",
    "licence": "CC0",
    "source": {"files": ["mine.jsonl"]},
    "sampling": {"max_new_tokens": 4, "temperature": 0.0},
    "judge": {"role": "harm", "default": "oracle"},
    "metrics": {"harmless": "higher"},
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_a_folder_is_seen(name: str, tmp_path: Path) -> None:
    assert reason_outside(name) is not None
    folder = RunFolder.create(tmp_path / "out" / "run", "toy", {})
    for use in (folder.file, folder.folder, folder.read_json, lambda each: folder.write_text(each, "x")):
        with pytest.raises(RunError):
            use(name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["out", "run", "config.yaml", "run.json"])


@pytest.mark.parametrize("name", ["x", "a/b.json", "a..b", "*/x", "**/data-*.csv", "CON", ".hidden", "a b"])
def test_a_name_inside_is_allowed(name: str) -> None:
    assert reason_outside(name) is None


@pytest.mark.parametrize("name", [*filter(None, OUTSIDE), "/etc/passwd", "../../etc/passwd", "**/../../x"])
@pytest.mark.parametrize("key", ["files", "task", "inspect task", "inspect files", "name"])
def test_a_suite_names_nothing_outside(key: str, name: str, tmp_path: Path) -> None:
    bare = {key: value for key, value in SUITE.items() if key not in ("source", "sampling", "judge")}
    suite = {
        "files": {**SUITE, "source": {"files": [name]}},
        "task": {**bare, "kind": "discriminative", "source": {"hub": "a/b"}, "task": f"{name}/x.yaml"},
        "inspect task": {**bare, "kind": "inspect", "inspect": {"task": f"{name}/x.py@task"}},
        "inspect files": {**bare, "kind": "inspect", "inspect": {"task": "package/task", "files": [name]}},
        "name": {**SUITE, "name": name},
    }[key]
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps(suite))
    with pytest.raises(ConfigError, match=r"suite\.yaml"):
        load_suites([str(file)])
    result = CliRunner().invoke(app, ["evaluate", "--set", "model=x", "--set", f"suites.use={file}", "--dry-run"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_the_suites_of_the_package_are_inside() -> None:
    assert len(known_suites()) > 30


@pytest.mark.parametrize("name", ["../secret.txt", "{root}/secret.txt", "link.txt", "sub/../../secret.txt"])
def test_a_judge_file_reads_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    judges = tmp_path / "judges"
    judges.mkdir()
    (judges / "link.txt").symlink_to(tmp_path / "secret.txt")
    policy = name.format(root=tmp_path)
    guard = {"format": "shieldgemma", "model": "m", "url": "http://127.0.0.1:1/v1", "policy": policy}
    (judges / "guard.yaml").write_text(json.dumps(guard))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n')
    settings = ["--set", f"completions={rows}", "--set", f"judges={judges / 'guard.yaml'}"]
    fails(CliRunner().invoke(app, ["label", *settings, "--out", str(tmp_path / "out")]), "policy")
    config = load_config(JudgeCheckConfig, None, [f"judge={json.dumps({**guard, 'policy': policy})}", "data.files=x"])
    assert config.judge.policy == policy  # the user's own config may name any path


def test_a_judge_file_reads_what_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "rules.txt").write_text("No rhymes.")
    (tmp_path / "judges" / "guard.yaml").write_text("format: shieldgemma\nmodel: m\npolicy: rules.txt\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(JudgeCheckConfig, None, ["judge=judges/guard.yaml", "data.files=x"])
    assert Path(config.judge.policy).read_text() == "No rhymes."


@pytest.mark.parametrize(
    "model", ["..", "/", "../..", "a/..", "модель", "_x", "-x", "x" * 300, "a b", "a\x1bb", "CON", ".hidden", "a\nb"]
)
def test_a_model_of_any_name_is_kept_inside(model: str) -> None:
    config = EvaluateConfig.model_validate({"model": model, "suites": {"use": ["demo"]}})
    (evaluated,) = config.evaluated()
    assert evaluated.model == model
    assert reason_outside(evaluated.name) is None
    assert "/" not in evaluated.name
    assert len(evaluated.name) <= 100


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "x" * 300, "a\0b", "a\nb", "", "."])
def test_a_given_name_of_a_model_is_checked(name: str) -> None:
    models = json.dumps([{"name": name, "model": "m"}])
    with pytest.raises(ConfigError, match="name"):
        load_config(EvaluateConfig, None, [f"models={models}", "suites.use=demo"])


@pytest.mark.parametrize("value", ["../../x", "/etc/x", "a\0b", "a\nb", "a\x1bb", "..\\x"])
def test_the_log_of_a_point_stays_in_its_folder(value: str, tmp_path: Path) -> None:
    name = Chain(f"model={value}", 0, ()).log_name
    assert Path(name).name == name
    (tmp_path / name).write_text("x")


@pytest.mark.parametrize("linked", ["metrics.jsonl", "checkpoints", "sub/deep", "dangling", ".x.part"])
def test_a_link_out_of_a_run_folder_is_not_followed_on_resume(linked: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    RunFolder.create(tmp_path / "run", "toy", {}).write_text("toy.md", "x")
    link = tmp_path / "run" / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(
        outside / "kept" if linked.endswith("jsonl") else outside / "none" if linked == "dangling" else outside
    )
    with raises(RunError, str(link)):
        RunFolder.create(tmp_path / "run", "toy", {}, resume=True)
    (tmp_path / "run" / "toy.md").unlink()
    (tmp_path / "run" / "run.json").write_text('{"status": "failed"}')  # such a folder counts as empty
    if linked != "metrics.jsonl":
        with raises(RunError, str(link)):
            RunFolder.create(tmp_path / "run", "toy", {})
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "kept"


def test_a_linked_run_folder_and_links_within_it_are_resumed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "real", "toy", {})
    folder.write_text("toy.md", "x")
    (tmp_path / "real" / "latest").symlink_to("toy.md")
    (tmp_path / "run").symlink_to("real")
    assert RunFolder.create(tmp_path / "run", "toy", {}, resume=True).resumed


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
@pytest.mark.parametrize(
    "settings",
    [
        ["label", "completions={path}", "judges=oracle"],
        ["evaluate", "completions={path}", "judge=oracle"],
        ["generate", "model=x", "prompts={path}"],
        ["train", "model=x", "data.files={path}"],
        ["judge-train", "data.files={path}"],
        ["label", "completions=c.jsonl", "judges={{format: refusal-phrases, phrases: '{path}'}}"],
        ["generate", "model=x", "prompts=c.jsonl", "chat_template={path}"],
    ],
    ids=lambda settings: " ".join(settings).replace("{path}", "PATH"),
)
def test_what_is_no_file_ends_in_one_message(
    settings: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    path = Path("/dev/zero") if kind == "device" else tmp_path / "odd.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    options = [part for setting in settings[1:] for part in ("--set", setting.format(path=path))]
    result = CliRunner().invoke(app, [settings[0], *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert str(path) in result.stderr.splitlines()[-1]


def test_a_damaged_folder_of_a_judge_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    for content in ("[" * 100_000, "[]", '"x"', "\0", '{"kind": "ngrams"}', '{"kind": ["ngrams"]}'):
        (tmp_path / "judge.json").write_text(content)
        for key in ("judges={}", "judges=oracle --set ranker={}"):
            given = key.format(tmp_path).split(" --set ")
            options = [part for setting in given for part in ("--set", setting)]
            command = ["label", "--set", f"completions={tmp_path / 'c.jsonl'}", *options]
            result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
            assert result.exit_code == 2, result.stderr
            assert str(tmp_path) in result.stderr.splitlines()[-1]


SOURCE: dict[str, Any] = {"name": "a", "files": "x.jsonl", "licence": "CC0"}


def listed(key: str, **values: str) -> str:
    return f"{key}={json.dumps([values])}"


NAMES: dict[str, Callable[[str], list[str]]] = {
    "a source": lambda name: ["prepare", listed("sources", **{**SOURCE, "name": name})],
    "a suite to remove": lambda name: [
        "prepare", listed("sources", **SOURCE), listed("decontaminate", name=name, files="y.jsonl"),
    ],
    "a judge": lambda name: ["label", "completions=c.jsonl", listed("judges", format="oracle", name=name)],
    "a trained judge": lambda name: ["judge-train", "data.files=l.jsonl", f"name={json.dumps(name)}"],
    "a method": lambda name: ["train", "model=x", "data.files=x.jsonl", f"method={json.dumps(name)}"],
}  # fmt: skip


@pytest.mark.parametrize("name", ["../../evil", "{outside}/evil", "a\0evil", "evil" * 100])
@pytest.mark.parametrize("what", NAMES)
def test_no_name_makes_a_file_outside_the_run_folder(
    what: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, name = tmp_path / "a" / "b", name.replace("{outside}", str(tmp_path / "outside"))
    (tmp_path / "outside").mkdir()
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_is_safe": True, "rejected_is_safe": False}
    (work / "x.jsonl").write_text(json.dumps({**pair, "id": name}) + "\n")
    (work / "y.jsonl").write_text(json.dumps({"prompt": "q2"}) + "\n")
    (work / "c.jsonl").write_text(json.dumps({"id": name, "prompt": "q", "completion": "a", "kind": "benign"}) + "\n")
    labelled = [{"id": f"{name}{n}", "prompt": f"q{n}", "completion": f"a{n}", "is_safe": n % 2 > 0} for n in range(12)]
    (work / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    command, *settings = NAMES[what](name)
    options = [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(app, [command, *options, "--out", str(work / "out")])
    assert result.exit_code in (0, 2), result.stderr
    assert "Traceback" not in result.stderr
    assert [path for path in tmp_path.rglob("*evil*") if not path.is_relative_to(work / "out")] == []
    assert list((tmp_path / "outside").iterdir()) == []
