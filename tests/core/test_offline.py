"""Offline work: nothing asks another machine for a file, and what is missing is named."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.core.offline import no_network_if_offline, offline_variable
from bfpo.policy.save import save_policy
from tiny import tiny_model, tiny_tokenizer

ELSEWHERE = "192.0.2.1"  # an address of documentation, which no machine has


def ask(address: tuple[str, int]) -> None:
    with socket.socket() as one:
        one.settimeout(0.01)
        one.connect(address)


def refusal() -> str:
    """Return the error of asking another machine."""
    try:
        ask((ELSEWHERE, 9))
    except OSError as error:
        return str(error)
    raise AssertionError(f"{ELSEWHERE} answered")


@pytest.mark.parametrize(
    ("name", "value", "offline"),
    [
        ("HF_HUB_OFFLINE", "1", True),
        ("HF_HUB_OFFLINE", "true", True),
        ("TRANSFORMERS_OFFLINE", "yes", True),
        ("HF_HUB_OFFLINE", "0", False),
        ("HF_HUB_OFFLINE", "", False),
    ],
)
def test_who_asks_for_offline_work(name: str, value: str, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(name, value)
    assert offline_variable() == (name if offline else None)
    if not offline:
        with no_network_if_offline():
            assert "is set" not in refusal()


def test_other_machines_are_refused_in_all_threads_and_this_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, no_network_if_offline():
        errors: list[str] = []

        def fetch(url: str) -> None:
            try:
                urllib.request.urlopen(url, timeout=1)
            except OSError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=fetch, args=(f"http://{host}/x",)) for host in ("files.example", ELSEWHERE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([text for text in errors if "HF_HUB_OFFLINE is set" in text]) == 2
        ask(server.getsockname())
        socket.getaddrinfo("localhost", 80)
        assert ELSEWHERE in refusal()
    assert "HF_HUB_OFFLINE" not in refusal()  # no guard is left


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that were asked for, all refused."""
    found: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        found.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return found


def test_no_command_asks_for_a_file(asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    pair = {"prompt": "w1", "chosen": "w2", "rejected": "w3", "chosen_is_safe": True, "rejected_is_safe": False}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    Path("prompts.jsonl").write_text('{"prompt": "w1"}\n')
    Path("answers.jsonl").write_text('{"prompt": "w1", "completion": "w2", "kind": "benign"}\n')
    missing = "some-owner/no-such-model"
    commands: list[tuple[int, list[str]]] = [
        (0, ["doctor"]),
        (0, ["generate", "model=model", "prompts=prompts.jsonl", "max_new_tokens=2"]),
        (0, ["train", "model=model", "data.files=pairs.jsonl", "max_steps=1", "pairs_per_step=1"]),
        (2, ["generate", f"model={missing}", "prompts=prompts.jsonl"]),
        (2, ["train", f"model={missing}", "data.files=pairs.jsonl"]),
        (2, ["label", "completions=answers.jsonl", f"judges=llama-guard-3:{missing}"]),
        (2, ["label", "completions=answers.jsonl", "judges=oracle", f"ranker=reward-model:{missing}"]),
        (2, ["interpolate", f"first={missing}", "second=model"]),
        (2, ["evaluate", "model=model", "suites.use=harmbench", "suites.judges.harm=oracle"]),
        (2, ["prepare", 'sources=[{"name": "pku-saferlhf"}]']),
    ]
    for number, (code, (command, *settings)) in enumerate(commands):
        options = [part for setting in settings for part in ("--set", setting)]
        out = [] if command == "doctor" else ["--out", f"out{number}"]
        result = CliRunner().invoke(app, [command, *options, *out])
        assert result.exit_code == code, (command, settings, result.stderr)
        assert "Traceback" not in result.stderr
        assert asked == [], (command, settings)
        if missing in " ".join(settings):
            assert missing in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ifeval_does_not_ask_for_the_data_of_nltk(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("langdetect")
    code = (
        "import socket, sys\nasked = []\n"
        "def refuse(*address, **_):\n    asked.append(address)\n    raise OSError('no network here')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "import nltk\nnltk.data.path[:] = [sys.argv[1]]\nbefore = nltk.download\n"
        "from bfpo.suites.catalogue import FOLDER\nsys.path.insert(0, str(FOLDER / 'tasks'))\n"
        "import ifeval_checks\nassert nltk.download is before\nprint(asked)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
