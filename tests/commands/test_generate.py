from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bfpo.commands.generate as generate
import bfpo.generation.engines as engines
import bfpo.policy.precision as precision
from bfpo.config import GenerateConfig
from bfpo.core.errors import ConfigError, DataError, RunError, SettingError
from bfpo.data.read import read_completions
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from execution.copies import take_copies
from messages import raises
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_policy(tiny_model(initializer_range=0.6), tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"id": f"p{n}", "prompt": " ".join(f"w{(3 * n + k) % 90}" for k in range(1 + (5 * n) % 7)), "kind": "benign"}
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(model: Path, prompts: Path, **settings: Any) -> GenerateConfig:
    defaults = {"max_new_tokens": 8, "batch_size": 4}
    return GenerateConfig(model=str(model), prompts=str(prompts), **{**defaults, **settings})


def texts(folder: Path) -> list[tuple[str, str, bool]]:
    return [(row.id, row.text, row.finished) for row in read_completions(folder / "completions.jsonl")]


def test_rows_are_in_the_order_of_the_prompts(
    model: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bfpo")
    folder = run_stage("generate", config(model, prompts), tmp_path / "run")
    rows = read_completions(tmp_path / "run" / "completions.jsonl")
    assert [row.id for row in rows] == [f"p{n}" for n in range(10)]
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert [row.prompt[0].content for row in rows] == asked
    assert {row.kind for row in rows} == {"benign"}
    assert {row.model for row in rows} == {str(model)}
    assert any(row.text for row in rows)
    assert not any("</s>" in row.text for row in rows)
    assert folder.record["completions"]["num_completions"] == 10
    cut = sum(not row.finished for row in rows)
    assert cut > 0
    assert f"10 completions in {folder.file('completions.jsonl')}; {cut} did not end within max_new" in caplog.text
    assert sorted(item.name for item in (tmp_path / "run").iterdir()) == [
        "README.md",
        "completions.jsonl",
        "config.yaml",
        "run.json",
    ]


def test_batch_size_changes_nothing(model: Path, prompts: Path, tmp_path: Path) -> None:
    for temperature in (0.0, 0.8):
        for size in (1, 10):
            run_stage(
                "generate",
                config(model, prompts, batch_size=size, temperature=temperature),
                tmp_path / f"{temperature}-{size}",
            )
        assert texts(tmp_path / f"{temperature}-1") == texts(tmp_path / f"{temperature}-10")
    assert texts(tmp_path / "0.0-1") != texts(tmp_path / "0.8-1")


@pytest.mark.parametrize(
    ("gpus", "batch_size", "num", "sizes"),
    [
        (0, None, 1000, [512, 488]),
        (8, None, 1000, [128] * 7 + [104]),
        (8, None, 100, [100]),
        (8, None, 2000, [250] * 8),
        (8, None, 9000, [512] * 17 + [296]),
        (8, 4, 100, [32, 32, 32, 4]),
    ],
)
def test_a_thousand_completions_are_work_for_all_gpus_of_a_machine(
    gpus: int, batch_size: int | None, num: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "num_gpus", lambda: gpus)
    settings = config(Path("m"), Path("p"), batch_size=batch_size)
    tasks: Any = [SimpleNamespace(prompt_ids=(1,)) for _ in range(num)]
    assert [len(part) for part in generate._shards(settings, tasks)] == sizes


def test_one_worker_computes_together_what_several_do(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding, and in bfloat16 with it most answers, depends on the other rows of a pass."""
    monkeypatch.setattr(generate, "_BATCHES_PER_SHARD", 1)
    original, together = engines.answer_batches, dict[int, list[list[str]]]()

    def noted(model: Any, requests: Any, **keywords: Any) -> Any:
        together[workers].append([request.id for request in requests])
        return original(model, requests, **keywords)

    monkeypatch.setattr(engines, "answer_batches", noted)
    take_copies(monkeypatch)
    for workers in (1, 2):
        together[workers] = []
        settings = config(model, prompts, executor={"workers": workers}, dtype="bfloat16", threads=1)
        run_stage("generate", settings, tmp_path / str(workers))
    assert sorted(together[1]) == sorted(together[2])
    assert [len(ids) for ids in together[1]] == [4, 4, 2]
    assert texts(tmp_path / "1") == texts(tmp_path / "2")


def test_goes_on_where_it_was_cut_off(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(model, prompts, num_completions=2, batch_size=3)
    whole = tmp_path / "whole"
    run_stage("generate", settings, whole)
    assert [row.id for row in read_completions(whole / "completions.jsonl")][:3] == ["p0/0", "p0/1", "p1/0"]

    asked: list[int] = []
    made: list[int] = []
    original = engines.answer_batches

    def dies_after_two(model: Any, requests: Any, **keywords: Any) -> Any:
        asked.append(len(requests))
        for number, batch in enumerate(original(model, requests, **keywords)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            made.append(len(batch))
            yield batch

    monkeypatch.setattr(engines, "answer_batches", dies_after_two)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run_stage("generate", settings, cut)
    partial = cut / "completions.partial.jsonl"
    with partial.open("ab") as file:
        file.write(b'{"id": "p9/1", "text": "half a r')
    assert not (cut / "completions.jsonl").exists()
    run_stage("generate", settings, cut, resume=True)
    assert asked == [20, 20 - sum(made[:2])]
    assert 0 < sum(made[:2]) < 20
    assert texts(cut) == texts(whole)
    assert not partial.exists()


def test_the_number_type_is_chosen_recorded_and_kept(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bfpo")
    loaded: list[str] = []
    original = generate.load_policy
    monkeypatch.setattr(generate, "load_policy", lambda *a, **k: loaded.append(k["dtype"]) or original(*a, **k))
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: True)

    def stopped(config: GenerateConfig, out: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engines, "answer_batches", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run_stage("generate", config, out)

    stopped(config(model, prompts), tmp_path / "auto")
    stopped(config(model, prompts, dtype="float32", batch_size=16), tmp_path / "old")
    assert loaded == ["bfloat16", "float32"]
    assert "weights in bfloat16 (auto: the device computes in it)" in caplog.text
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: False)
    found = run_stage("generate", config(model, prompts, batch_size=None), tmp_path / "auto", resume=True)
    assert found.record["decoding"]["dtype"] == "bfloat16"
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: True)
    found = run_stage("generate", config(model, prompts, batch_size=None), tmp_path / "old", resume=True)
    assert loaded[2:] == ["bfloat16", "float32"]
    tokens, decoding = found.record["completions"]["completion_tokens"], found.record["decoding"]
    ended = found.record["completions"]["num_finished"]
    assert decoding["row_steps"] == tokens + ended - 10  # the first token of each answer comes of its prompt
    with raises(RunError, "dtype"):
        run_stage("generate", config(model, prompts, dtype="float16"), tmp_path / "old", resume=True)


def test_bfloat16_on_a_cpu_that_emulates_it_is_warned_of(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run_stage("generate", config(model, prompts, dtype="bfloat16", limit=1), tmp_path / "asked")
    assert "no instructions" in caplog.text
    caplog.clear()
    folder = run_stage("generate", config(model, prompts, limit=1), tmp_path / "auto")
    assert folder.record["decoding"]["dtype"] == "float32"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_changed_prompt_file_is_not_resumed(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "prompts.jsonl"
    copy.write_bytes(prompts.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(engines, "answer_batches", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_stage("generate", config(model, copy), tmp_path / "run")
    copy.write_text(copy.read_text().replace("w0", "w1"))
    with raises(RunError):
        run_stage("generate", config(model, copy), tmp_path / "run", resume=True)


def test_a_changed_model_or_chat_template_is_not_resumed(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, template, out = tmp_path / "model", tmp_path / "chat.jinja", tmp_path / "run"
    save_policy(tiny_model(seed=4), tiny_tokenizer(), own)
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    settings = config(own, prompts, chat_template=str(template))
    original = generate.append_made

    def stops(path: Path, rows: Any) -> None:
        original(path, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate, "append_made", stops)
        with pytest.raises(KeyboardInterrupt):
            run_stage("generate", settings, out)
    before = template.read_text()
    template.write_text(f"w1 {before}")
    with raises(RunError, "chat.jinja"):
        run_stage("generate", settings, out, resume=True)
    template.write_text(before)
    save_policy(tiny_model(seed=5), tiny_tokenizer(), own)
    with raises(RunError, "model", mask="hash [0-9a-f]+, now [0-9a-f]+"):
        run_stage("generate", settings, out, resume=True)
    save_policy(tiny_model(seed=4), tiny_tokenizer(), own)
    run_stage("generate", settings, out, resume=True)
    assert len(texts(out)) == 10


def test_nothing_is_taken_from_a_run_with_another_content_of_the_chat_template(
    model: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    settings = config(model, prompts, limit=3, chat_template=str(template))
    run_stage("generate", settings, tmp_path / "before")
    again = settings.model_copy(update={"reuse": str(tmp_path / "before")})
    assert run_stage("generate", again, tmp_path / "same").record["reused"]["completions"] == 3
    template.write_text("w1 " + template.read_text())
    assert run_stage("generate", again, tmp_path / "other").record["reused"]["completions"] == 0
    assert "was made with other chat_template; nothing is taken" in caplog.text


def test_limit_draws_and_keeps_the_order(model: Path, prompts: Path, tmp_path: Path) -> None:
    run_stage("generate", config(model, prompts, limit=4), tmp_path / "run")
    ids = [row[0] for row in texts(tmp_path / "run")]
    assert len(ids) == 4
    assert ids == sorted(ids, key=lambda name: int(name[1:]))
    assert ids != ["p0", "p1", "p2", "p3"]


def test_a_prompt_that_is_too_long_is_named(model: Path, prompts: Path, tmp_path: Path) -> None:
    with raises(DataError, "max_prompt_length"):
        run_stage("generate", config(model, prompts, max_prompt_length=5), tmp_path / "run")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with raises(DataError):
        run_stage("generate", config(model, empty), tmp_path / "none")


def test_prompts_that_are_too_long_are_left_out_and_counted_where_told(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    asked = config(model, prompts, max_prompt_length=5, long_prompts="skip")
    folder = run_stage("generate", asked, tmp_path / "run")
    assert folder.record["prompts"]["left_out"] == {"longer than max_prompt_length": 7}
    assert len(texts(tmp_path / "run")) == 3
    assert "left out: 7 (longer than max_prompt_length)" in preview_stage("generate", asked)
    with raises(DataError, "max_prompt_length"):
        run_stage("generate", asked.model_copy(update={"max_prompt_length": 1}), tmp_path / "none")


def test_an_answer_without_room_is_an_error_before_weights_are_read(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bfpo.commands.generate.load_policy", None)
    asked = config(model, prompts, max_new_tokens=100_000)
    with raises(SettingError, "max_new_tokens"):
        preview_stage("generate", asked)
    with raises(SettingError, "max_new_tokens"):
        run_stage("generate", asked, tmp_path / "run")


def test_preview(model: Path, prompts: Path) -> None:
    text = preview_stage("generate", config(model, prompts, num_completions=3))
    assert "10 prompts: 10 benign" in text
    assert "30 completions of at most 8 tokens" in text


def test_no_extra_is_needed_to_generate_here() -> None:
    blocked = "import sys; sys.modules.update(openai=None, vllm=None); import bfpo.commands.generate"
    subprocess.run([sys.executable, "-c", blocked], check=True)


def test_one_part_of_the_prompts_is_asked(model: Path, prompts: Path, tmp_path: Path) -> None:
    ids = {}
    for part in ("redteam", "test"):
        split = {"parts": {"redteam": 0.6, "test": 0.4}, "part": part}
        folder = run_stage("generate", config(model, prompts, split=split), tmp_path / part)
        ids[part] = [row.id for row in read_completions(folder.path / "completions.jsonl")]
        facts = folder.record["prompts"]
        assert facts["num_prompts"] == len(ids[part])
        assert facts["left_out"] == {"in another part of the split": 10 - len(ids[part])}
    assert sorted(ids["redteam"] + ids["test"]) == [f"p{n}" for n in range(10)]
    few = config(model, prompts, limit=1, split={"parts": {"redteam": 0.6, "test": 0.4}, "part": "test"})
    assert "1 prompts: 1 benign" in preview_stage("generate", few)
    nothing = config(model, prompts, split={"parts": {"a": 1e-9, "b": 1 - 1e-9}, "part": "a"})
    with raises(SettingError, "split.part"):
        run_stage("generate", nothing, tmp_path / "x")


def test_what_an_earlier_run_made_of_the_same_prompts_is_taken(
    model: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bfpo")
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows[3]["prompt"] += " w1"  # another prompt of the same id
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    whole = run_stage("generate", config(model, changed), tmp_path / "whole").path
    run_stage("generate", config(model, prompts, limit=6), tmp_path / "limited")
    taken = run_stage("generate", config(model, changed, reuse=str(tmp_path / "limited")), tmp_path / "taken")
    assert (taken.path / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    limited = {name for name, *_ in texts(tmp_path / "limited")}
    number = len(limited - {"p0", "p3"})
    assert taken.record["reused"] == {"run": str(tmp_path / "limited"), "completions": number}
    assert f"{number} of 9 completions are taken" in caplog.text
    assert 0 < number < 9


@pytest.mark.parametrize(
    ("setting", "key"), [({"seed": 1}, "seed"), ({"max_new_tokens": 7}, "max_new_tokens"), ({"top_p": 0.5}, "top_p")]
)
def test_nothing_is_taken_from_a_run_of_other_settings(
    setting: dict[str, Any],
    key: str,
    model: Path,
    prompts: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_stage("generate", config(model, prompts, limit=3), tmp_path / "before")
    other = config(model, prompts, limit=3, **setting)
    expected = run_stage("generate", other, tmp_path / "plain").path
    reuse = other.model_copy(update={"reuse": str(tmp_path / "before")})
    found = run_stage("generate", reuse, tmp_path / "after")
    assert texts(found.path) == texts(expected)
    assert found.record["reused"]["completions"] == 0
    assert f"was made with other {key}; nothing is taken" in caplog.text


def test_other_weights_in_the_same_folder_are_another_model(
    model: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "model"
    save_policy(tiny_model(seed=4), tiny_tokenizer(), own)
    run_stage("generate", config(own, prompts, limit=3), tmp_path / "before")
    save_policy(tiny_model(seed=5), tiny_tokenizer(), own)
    found = run_stage("generate", config(own, prompts, limit=3, reuse=str(tmp_path / "before")), tmp_path / "after")
    assert found.record["reused"]["completions"] == 0
    assert "other weights" in caplog.text


@pytest.mark.parametrize("place", ["nowhere", "unfinished"])
def test_only_a_finished_run_can_be_taken_from(place: str, model: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    record = {"stage": "generate", "status": "running"}
    (tmp_path / "unfinished" / "run.json").write_text(json.dumps(record))
    with raises(ConfigError, "reuse", place, "finished" if place == "unfinished" else "bfpo generate"):
        run_stage("generate", config(model, prompts, reuse=str(tmp_path / place)), tmp_path / "after")
