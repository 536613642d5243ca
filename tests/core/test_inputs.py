from __future__ import annotations

from pathlib import Path

import pytest

from bfpo.core.errors import DataError
from bfpo.core.inputs import check_files, missing_folder
from messages import raises


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runs" / "first" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/frist/model", "did you mean runs/first?"),
        ("runs/other", "has no other; for the hub's model of this name, set its revision"),
        ("./model", "has no model"),
        ("../model", "no such folder"),
        ("/absent/model", "/ has no absent"),
        ("a/b/c", "has no a"),
        ("~/model", "write the full path"),
        ("${MODELS}/model", "$ is not expanded"),
    ],
)
def test_what_can_only_be_a_local_folder_must_be_there(name: str, words: str) -> None:
    problem = missing_folder(name)
    assert problem is not None
    assert problem.startswith("no such folder")
    assert words in problem


@pytest.mark.parametrize("name", ["runs/first/model", "nope", "Qwen/Qwen3-0.6B", "gpt2"])
def test_a_folder_that_is_there_and_a_name_of_the_hub_pass(name: str) -> None:
    assert missing_folder(name) is None


def test_a_revision_says_that_the_hub_is_meant() -> None:
    assert missing_folder("runs/other", "main") is None
    assert missing_folder("./other", "main") is not None


def test_files_must_be_there(here: Path) -> None:
    (here / "data.jsonl").write_text("{}")
    check_files(["data.jsonl"])
    for path in ("~/data.jsonl", "$DATA/data.jsonl"):
        with raises(DataError, "not expanded in settings"):
            check_files([path])
    with raises(DataError, "absent.jsonl"):
        check_files(["data.jsonl", "absent.jsonl"])
