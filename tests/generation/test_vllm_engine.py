"""The engine of vLLM against a stand-in module: what it is asked for, and what becomes of its answers."""

from __future__ import annotations

import os
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bfpo.commands.generate import _whole_gpus
from bfpo.config import GenerateConfig
from bfpo.core.errors import MissingExtraError, ModelError, SettingError
from bfpo.data.chat import ChatEncoder
from bfpo.data.prompts import read_prompt_files
from bfpo.data.read import read_completions
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import num_local
from bfpo.generation.engines import completion_seed
from bfpo.policy.load import load_tokenizer
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from messages import raises
from tiny import tiny_model, tiny_tokenizer


class FakeLlm:
    """Refers to itself, as an engine's parts do: it is gone only once cycles are looked for."""

    def __init__(self, generate: Any) -> None:
        self.generate, self.engine = generate, self


@dataclass
class FakeVllm:
    """Records what is asked; answers a prompt with its last tokens, the end token, and something behind it."""

    end: int
    loaded: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    dies_at: int | None = None
    made: list[weakref.ref[Any]] = field(default_factory=list)

    def module(self) -> ModuleType:
        made = ModuleType("vllm")
        made.LLM = self.load  # type: ignore[attr-defined]
        made.SamplingParams = lambda **given: SimpleNamespace(**given)  # type: ignore[attr-defined]
        made.TokensPrompt = lambda prompt_token_ids: {"prompt_token_ids": prompt_token_ids}  # type: ignore[attr-defined]
        return made

    def load(self, **given: Any) -> Any:
        self.loaded.append(given)
        llm = FakeLlm(self.generate)
        self.made.append(weakref.ref(llm))
        return llm

    def generate(self, prompts: list[Any], sampling_params: list[Any], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        if self.dies_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append((prompts, sampling_params))
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        return [self.answer(*each) for each in zip(ids, sampling_params, strict=True)]

    def answer(self, ids: list[int], params: Any) -> Any:
        said = [4 + params.seed % 80, *ids[1:3]]
        said = said[:2] if len(ids) % 2 else [*said[:1], self.end, 7]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=said, text="not read", finish_reason="stop")])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_policy(tiny_model(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(" ".join(f"w{(n + k) % 9}" for k in range(1 + n % 3)) + f" w{n + 20}\n" for n in range(7)))
    return path


@pytest.fixture
def vllm(model: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm(load_tokenizer(model).eos_token_id)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm", fake.module())
    monkeypatch.setattr("bfpo.commands.generate._VLLM_PER_SHARD", 4)
    return fake


def config(model: Path, prompts: Path, **settings: Any) -> GenerateConfig:
    defaults = {"engine": "vllm", "max_new_tokens": 5, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    return GenerateConfig(model=str(model), prompts=str(prompts), **{**defaults, **settings})


def test_vllm_is_given_our_tokens_and_a_seed_per_completion(
    model: Path, prompts: Path, tmp_path: Path, vllm: FakeVllm
) -> None:
    run_stage("generate", config(model, prompts, num_completions=2, dtype="bfloat16"), tmp_path / "run")
    rows = list(read_completions(tmp_path / "run" / "completions.jsonl"))
    assert [len(asked) for asked, _ in vllm.calls] == [4, 4, 4, 2]
    given = [prompt["prompt_token_ids"] for asked, _ in vllm.calls for prompt in asked]
    params = [one for _, asked in vllm.calls for one in asked]
    tokenizer = load_tokenizer(model)
    chat = ChatEncoder(tokenizer)
    asked = read_prompt_files([str(prompts)]).prompts
    expected = [chat.encode(prompt.messages, (), name="").prompt for prompt in asked for _ in range(2)]
    assert given == [list(ids) for ids in expected]
    assert [one.seed for one in params] == [completion_seed(3, row.id) for row in rows]
    assert len({one.seed for one in params}) == 14
    ends = sorted({tokenizer.eos_token_id, chat.end_id})
    for one in params:
        assert (one.n, one.temperature, one.top_p, one.max_tokens) == (1, 0.8, 0.9, 5)
        assert (one.stop_token_ids, one.skip_special_tokens) == (ends, False)
    (loaded,) = vllm.loaded
    longest = max(map(len, expected))
    # Of a model for images too, the engine would need room for the largest image, and the files of a processor.
    safe = {"language_model_only": True, "load_format": "safetensors", "trust_remote_code": False}
    assert loaded == {"model": str(model), "revision": None, "dtype": "bfloat16", "max_model_len": longest + 5, **safe}


def test_models_of_before_give_back_their_memory_before_vllm_takes_it(
    model: Path, prompts: Path, tmp_path: Path, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_then: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: loaded_then.append(len(vllm.loaded)))
    run_stage("generate", config(model, prompts), tmp_path / "run")
    assert loaded_then[0] == 0
    assert len(vllm.loaded) == 1


def test_vllm_gives_back_its_memory_before_other_models_take_it(
    model: Path, prompts: Path, tmp_path: Path, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.extend(one() is not None for one in vllm.made))
    run_stage("generate", config(model, prompts), tmp_path / "run")
    assert alive == [False]  # at the end; before the start there was none


@pytest.mark.parametrize(
    ("gpus", "given", "expected"),
    [
        (2, {}, (1.0, 2)),
        (2, {"gpus_per_worker": 0.5}, (1.0, 2)),
        (4, {"gpus_per_worker": 2}, (2.0, 2)),
        (2, {"workers": 2}, (1.0, 2)),
        (0, {}, (None, 1)),
        (0, {"workers": 2}, (None, 2)),
        (2, {"gpus_per_worker": 0, "workers": 3}, (0.0, 3)),
    ],
)
def test_no_two_engines_share_a_gpu(
    gpus: int, given: dict[str, Any], expected: tuple[float | None, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = _whole_gpus(ExecutorConfig.model_validate(given))
    assert (found.gpus_per_worker, num_local(found)) == expected


@pytest.mark.parametrize("given", [{"workers": 3}, {"workers": 3, "gpus_per_worker": 0.5}])
def test_more_engines_than_gpus_are_refused(
    given: dict[str, Any], model: Path, prompts: Path, tmp_path: Path, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with raises(SettingError, "executor.workers"):
        run_stage("generate", config(model, prompts, executor=given), tmp_path / "run")
    assert vllm.loaded == []


def test_on_ray_a_worker_takes_a_whole_gpu() -> None:
    given = {"backend": "ray", "gpus_per_worker": 0.5, "workers": 64}
    assert _whole_gpus(ExecutorConfig.model_validate(given)).gpus_per_worker == 1.0


def test_what_vllm_logs_does_not_reach_stdout(
    model: Path, prompts: Path, tmp_path: Path, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "")
    monkeypatch.delenv("VLLM_LOGGING_STREAM")
    run_stage("generate", config(model, prompts), tmp_path / "run")
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"  # also of the engine's own process


def test_an_answer_ends_at_our_end_token(model: Path, prompts: Path, tmp_path: Path, vllm: FakeVllm) -> None:
    run_stage("generate", config(model, prompts), tmp_path / "run")
    rows = list(read_completions(tmp_path / "run" / "completions.jsonl"))
    given = [prompt["prompt_token_ids"] for asked, _ in vllm.calls for prompt in asked]
    assert [row.finished for row in rows] == [len(ids) % 2 == 0 for ids in given]
    assert len({row.finished for row in rows}) == 2
    tokenizer = load_tokenizer(model)
    first = 4 + completion_seed(3, rows[0].id) % 80
    finished = next(row for row in rows if row.finished)
    assert finished.text == tokenizer.decode([4 + completion_seed(3, finished.id) % 80])
    assert rows[0].text.startswith(tokenizer.decode([first]))


def test_a_stopped_run_goes_on_behind_the_last_whole_call(
    model: Path, prompts: Path, tmp_path: Path, vllm: FakeVllm
) -> None:
    run_stage("generate", config(model, prompts), tmp_path / "whole")
    vllm.calls.clear()
    vllm.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        run_stage("generate", config(model, prompts), tmp_path / "cut")
    vllm.dies_at = None
    run_stage("generate", config(model, prompts), tmp_path / "cut", resume=True)
    assert [len(asked) for asked, _ in vllm.calls] == [4, 3]
    whole, cut = (list(read_completions(tmp_path / name / "completions.jsonl")) for name in ("whole", "cut"))
    assert whole == cut


def test_what_vllm_cannot_do_is_said(
    model: Path, prompts: Path, tmp_path: Path, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(**given: Any) -> None:
        raise ValueError("1 validation error\n  max_model_len is too large")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuses)
    with raises(ModelError):
        run_stage("generate", config(model, prompts), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with raises(MissingExtraError, "bfpo[vllm]"):
        run_stage("generate", config(model, prompts), tmp_path / "none")


def test_a_preview_needs_no_vllm(model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "7 completions of at most 5 tokens" in preview_stage("generate", config(model, prompts))
