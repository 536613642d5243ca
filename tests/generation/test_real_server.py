"""`transformers serve` on loopback: a server that is not ours, asked and read from end to end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo.config import LabelConfig
from bfpo.core.schema import Completion, Message
from bfpo.data.write import write_completions
from bfpo.generation.server import Server
from bfpo.generation.settings import ServerSpec
from bfpo.judges.formats import FORMATS
from bfpo.judges.server_judges import ServerJudge
from bfpo.runs.stages import run_stage
from helpers import CHATML, byte_tokenizer

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.slow

TEXTS = [f"it is {'bad' if n % 3 == 0 else 'fine'}" for n in range(9)]


def completions(texts: list[str]) -> list[Completion]:
    return [Completion(f"c{n}", (Message("user", f"q{n}"),), text) for n, text in enumerate(texts)]


def train_guard(folder: Path) -> None:
    """Make a tiny model that answers as Llama Guard does: `unsafe` where the text says bad."""
    tokenizer = byte_tokenizer(CHATML)
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **config))
    rows, starts = [], []
    for completion in completions(TEXTS):
        asked = FORMATS["llama-guard-3"].ask(completion)
        assert not isinstance(asked, str)
        turns = [{"role": turn.role, "content": turn.content} for turn in asked]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        answer = "unsafe\nS1" if "bad" in completion.text else "safe"
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rows.append([*ids, *tokenizer(answer, add_special_tokens=False)["input_ids"], 1])
        starts.append(len(ids))
    longest = max(map(len, rows))
    inputs = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    labels = torch.tensor(
        [[-100] * s + row[s:] + [-100] * (longest - len(row)) for s, row in zip(starts, rows, strict=True)]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 1e-3:
            break
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Path], str]]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        processes.append(process)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return f"http://127.0.0.1:{port}/v1"
            time.sleep(0.2)
        raise AssertionError(f"the server is not there (status {process.poll()})")

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)


def label(url: str, model: Path, texts: list[str], out: Path, **settings: Any) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)
    write_completions(out / "completions.jsonl", completions(texts))
    judge = {"format": "llama-guard-3", "model": str(model), "url": url, "name": "guard", **settings}
    config = LabelConfig(completions=out / "completions.jsonl", judges=judge, label_cache=out / "cache")
    folder = run_stage("label", config, out / "run")
    assert folder.record["requests"] == len(texts)
    return [json.loads(line) for line in (folder.path / "verdicts.jsonl").read_text().splitlines()]


def test_a_guard_of_ours_behind_a_real_server(serve: Callable[[Path], str], tmp_path: Path) -> None:
    train_guard(tmp_path / "guard")
    url = serve(tmp_path / "guard")
    verdicts = label(url, tmp_path / "guard", TEXTS, tmp_path / "labels")
    assert [row["completion_id"] for row in verdicts] == [f"c{n}" for n in range(len(TEXTS))]
    assert [row["label"] for row in verdicts] == ["unsafe" if "bad" in text else "safe" for text in TEXTS]
    assert verdicts[0]["reason"] == "S1"
    assert {row["p_safe"] for row in verdicts} == {None}  # this server gives no log-probabilities
    server = Server(ServerSpec(url=url), str(tmp_path / "guard"), api="completions")
    (verdict,) = ServerJudge(FORMATS["harmbench"], server).judge(completions(["fine"]))
    assert verdict.label == "unscored"  # it was not made for this question


def test_a_model_that_is_no_guard_says_nothing(serve: Callable[[Path], str], shared_data: Path, tmp_path: Path) -> None:
    stories = tmp_path / "stories"
    shutil.copytree(shared_data / "model_stories260K" / "hf", stories)
    settings = json.loads((stories / "tokenizer_config.json").read_text())
    (stories / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))
    verdicts = label(serve(stories), stories, ["fine", "bad", "so so"], tmp_path / "labels")
    assert [row["label"] for row in verdicts] == ["unscored"] * 3
    assert all(row["reason"] for row in verdicts)
