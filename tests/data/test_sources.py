"""Data sets by name: the table, and the way to their files from a path, a folder here or the hub."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from bfpo.core.errors import DataError, ServerError, SettingError
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.prompt_layouts import PROMPT_LAYOUTS
from bfpo.data.sources import SOURCES, find_source, resolve_files
from messages import raises, says

DOCS = Path(__file__).resolve().parents[2] / "docs" / "sources.md"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = "ff7ba91063016c78a225b0f74e1c0860bb18230f"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))


def put(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("")
    return path


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, object]]:
    """Let the hub answer with a folder; returns what it is asked."""
    asked: list[dict[str, object]] = []

    def download(repo_id: str, **kwargs: object) -> str:
        asked.append({"repo_id": repo_id, **kwargs})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_every_source_has_a_layout_of_its_kind() -> None:
    for source in SOURCES.values():
        layouts = PAIR_LAYOUTS if source.kind == "pairs" else COMPLETION_LAYOUTS
        assert source.layout in layouts or (source.name, source.layout) == ("pairs", "auto")
        assert (source.hub_id is None) == (not source.patterns) == (source.licence is None), source.name
        assert source.revision is None or re.fullmatch("[0-9a-f]{40}", source.revision)
    assert find_source("PKU-Alignment/PKU-SafeRLHF") is find_source("pku-saferlhf")


def test_a_name_that_is_none_is_answered_with_the_nearest() -> None:
    with raises(SettingError, "source"):
        find_source("pku-saferhlf")


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    file = put(tmp_path, "mine/pairs.jsonl") / "mine/pairs.jsonl"
    for path in (file, file.parent):
        found = resolve_files("hh-rlhf", path)
        assert (found.files, found.origin, found.revision, found.licence) == ((file,), "local", None, "mit")
    with raises(DataError):
        resolve_files("trl", tmp_path / "none")
    with raises(SettingError, "revision"):
        resolve_files("trl", file, revision="main")
    with raises(SettingError, "path"):
        resolve_files("trl")


@pytest.mark.parametrize("name", ["PKU-Alignment/PKU-SafeRLHF", "pku-saferlhf"])
def test_a_folder_here_with_its_name_comes_before_the_hub(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, "data/B/train.jsonl", "data/A/train.jsonl", "data/A/test.jsonl", "README.md")
    found = resolve_files("pku-saferlhf")
    assert [str(file) for file in found.files] == [f"{name}/data/A/train.jsonl", f"{name}/data/B/train.jsonl"]
    assert (found.origin, found.revision) == ("local", None)
    assert [file.name for file in resolve_files("pku-saferlhf", patterns=["*test*"]).files] == ["test.jsonl"]
    with raises(DataError):
        resolve_files("pku-saferlhf", patterns=["*.parquet"])


def test_a_revision_beside_a_folder_here_is_remarked_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "pku-saferlhf", "train.jsonl")
    assert resolve_files("pku-saferlhf").origin == "local"
    assert caplog.text == ""
    assert resolve_files("pku-saferlhf", revision="abc").origin == "local"
    says(caplog, "pku-saferlhf", "abc")


def test_a_folder_in_another_order_is_read_whole(tmp_path: Path) -> None:
    put(tmp_path / "hh-rlhf", "two.jsonl", "one.jsonl.gz")
    assert [file.name for file in resolve_files("hh-rlhf").files] == ["one.jsonl.gz", "two.jsonl"]


def test_harmlessness_is_not_taken_for_helpfulness(tmp_path: Path) -> None:
    put(tmp_path / "Anthropic/hh-rlhf", "harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz")
    assert [file.name for file in resolve_files("hh-rlhf-harmless").files] == ["train.jsonl.gz"]
    with raises(DataError, "train.jsonl"):
        resolve_files("hh-rlhf")


def test_the_hub_is_asked_for_files_alone_and_the_commit_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "cache" / COMMIT, "data/A/train.jsonl", "data/A/test.jsonl")
    asked = hub(monkeypatch, folder)
    found = resolve_files("pku-saferlhf")
    assert (found.files, found.origin, found.revision) == ((folder / "data/A/train.jsonl",), "hub", COMMIT)
    arguments = {"repo_type": "dataset", "allow_patterns": ["*train*"]}
    assert asked == [{"repo_id": "PKU-Alignment/PKU-SafeRLHF", "revision": PINNED, **arguments}]
    resolve_files("pku-saferlhf", revision="main")
    assert asked[1]["revision"] == "main"
    with raises(DataError, "train.jsonl"):
        resolve_files("beavertails")


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # their own constructors want a whole answer of the server
    Exception.__init__(error, "a long\nmessage")
    return error


@pytest.mark.parametrize(
    "error",
    [
        http_error(GatedRepoError),
        http_error(RepositoryNotFoundError),
        http_error(RevisionNotFoundError),
        FileNotFoundError("outgoing traffic is disabled."),
        RuntimeError("the client's own"),
    ],
)
def test_without_the_hub_one_message_says_what_to_bring(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        if type(error).__module__.startswith("huggingface_hub"):
            raise FileNotFoundError("vague") from error
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with raises(DataError, "allenai/wildguardmix", "abc", "train/wildguard_train.parquet", "path"):
        resolve_files("wildguardmix", revision="abc")


def test_a_hub_that_is_lost_is_not_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("vague") from ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with raises(ServerError, "allenai/wildguardmix", "train/wildguard_train.parquet", "path"):
        resolve_files("wildguardmix")


def test_offline_means_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with raises(DataError, PINNED):
        resolve_files("pku-saferlhf")


def test_offline_what_was_downloaded_before_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "datasets--Anthropic--hh-rlhf"
    put(cached / "snapshots" / COMMIT, "helpful-base/train.jsonl.gz", "helpful-base/test.jsonl.gz")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    found = resolve_files("hh-rlhf")
    assert ([file.name for file in found.files], found.origin, found.revision) == (["train.jsonl.gz"], "hub", COMMIT)


def table() -> list[str]:
    """Return the rows that the documentation has of the table of sources."""
    lines = []
    for source in SOURCES.values():
        where = "your own file or folder"
        if source.hub_id is not None:
            where = f"`{source.hub_id}`: {', '.join(f'`{each}`' for each in source.patterns)}"
            where += f" at `{source.revision[:12]}`" if source.revision else ""
        lines.append(
            f"| `{source.name}` | {source.summary} | {source.kind}, `{source.layout}` | {where} "
            f"| {source.licence or 'not known'} |"
        )
    return lines


def test_the_documentation_has_the_table() -> None:
    text = DOCS.read_text()
    assert [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 6] == table()
    for layout in PROMPT_LAYOUTS.values():
        assert f"| `{layout.name}` | {layout.summary} |" in text
