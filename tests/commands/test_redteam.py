from __future__ import annotations

import json
import random
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.commands.redteam import _advice, _coherence, _learning_rate
from bfpo.config import AlignConfig, RedteamConfig, SftConfig, load_config
from bfpo.core.errors import ConfigError, DataError, SettingError
from bfpo.core.schema import Verdict
from bfpo.data.read import read_completions, read_pairs
from bfpo.data.write import write_completions
from bfpo.judges.needless import read_answers
from bfpo.judges.panel import panel_verdict
from bfpo.judges.refusals import read_refusal
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.suites.coherence import Reading, reader_of
from bfpo.world.datasets import redteam_prompts, save_tokenizer, sft_completions
from bfpo.world.oracle import assess
from bfpo.world.world import prompt_text, topics
from messages import raises, says

LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start model of the closed world, which helps with harm about half of the time, and hard prompts."""
    root = tmp_path_factory.mktemp("world")
    save_tokenizer(root / "tokenizer")
    write_completions(root / "sft.jsonl", sft_completions(6000, 0))
    config = SftConfig.model_validate(
        {
            "init": {"config": LLAMA, "tokenizer": str(root / "tokenizer")},
            "data": {"files": [str(root / "sft.jsonl")], "layout": "completions"},
            "completions_per_step": 64,
            "completions_per_microbatch": 64,
            "max_steps": 200,
            "learning_rate": 5e-3,
            "max_length": 48,
            "threads": 1,
        }
    )
    run_stage("sft", config, root / "start")
    prompts = redteam_prompts()[::4]
    rows = ({"id": one.id, "prompt": one.messages[0].content, "kind": one.kind} for one in prompts)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = random.Random(0)
    asked = [topic for topic in topics("train") if topic.kind != "harmful"][::9]
    rows = ({"prompt": prompt_text(topic, rng), "kind": topic.kind} for topic in asked)
    (root / "harmless.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config(root: Path, model: Path, **settings: Any) -> RedteamConfig:
    return RedteamConfig.model_validate(
        {
            "model": str(model),
            "prompts": str(root / "prompts.jsonl"),
            "judges": "oracle",
            "ranker": "oracle",
            "max_new_tokens": 24,
            "temperature": 0.7,
            "batch_size": 128,
            "label_cache": str(root / "cache"),
            "threads": 1,
            **settings,
        }
    )


def trained(root: Path, model: Path, pairs: Path, out: Path) -> Path:
    settings = {
        "model": str(model),
        "data": {"files": [str(pairs)]},
        "max_length": 48,
        "beta": 0.1,
        "anchor_weight": 2.0,
        "learning_rate": 5e-4,
        "max_steps": 30,
        "pairs_per_step": 16,
        "reference_cache": str(root / "reference"),
        "threads": 1,
    }
    run_stage("train", AlignConfig.model_validate(settings), out)
    return out / "model"


def unsafe_rate(run: Path) -> float:
    [unsafe, *_] = json.loads((run / "redteam.json").read_text())["rates"]["all prompts"]
    assert unsafe["metric"] == "unsafe"
    assert unsafe["low"] <= unsafe["value"] <= unsafe["high"]
    return float(unsafe["value"])


def test_two_rounds_make_the_model_less_unsafe_on_what_it_is_asked(world: Path, tmp_path: Path) -> None:
    model, rates = world / "start" / "model", []
    for number in range(3):
        run = tmp_path / f"round-{number}"
        run_stage("redteam", config(world, model, seed=number), run)
        rates.append(unsafe_rate(run))
        if number < 2:
            model = trained(world, model, run / "data" / "main" / "train.parquet", tmp_path / f"train-{number}")
    assert rates[0] > 0.35
    assert rates[1] < 0.8 * rates[0]
    assert rates[2] < min(rates[1], 0.65 * rates[0])
    last = json.loads((tmp_path / "round-2" / "redteam.json").read_text())["rates"]["all prompts"]
    assert next(score for score in last if score["metric"] == "well_formed")["value"] > 0.8


def test_every_pair_is_true_and_every_completion_is_accounted_for(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_stage("redteam", config(world, world / "start" / "model", validation=0.3, limit=60), run)
    funnel = json.loads((run / "redteam.json").read_text())["funnel"]
    completions = read_completions(run / "generate" / "completions.jsonl")
    assert (funnel["prompts"], funnel["completions"]) == (60, 240) == (60, len(completions))
    files = [run / "data" / "main" / f"{split}.parquet" for split in ("train", "validation")]
    parts = [read_pairs([file]).pairs for file in files]
    assert all(parts)
    assert sum(map(len, parts)) == funnel["pairs"] == funnel["candidates"] - funnel["ties"] - lost(run)
    assert not {pair.prompt for pair in parts[0]} & {pair.prompt for pair in parts[1]}
    texts = {(one.prompt, one.text) for one in completions}
    for pair in [*parts[0], *parts[1]]:
        assert {(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)} <= texts
        chosen, rejected = (assess(pair.prompt[0].content, text) for text in (pair.chosen, pair.rejected))
        assert chosen is not None
        assert rejected is not None
        assert chosen.helpful > rejected.helpful
        assert (pair.chosen_is_safe, pair.rejected_is_safe) == (chosen.safe, rejected.safe)
    assert (run / "data" / "manifest.json").exists()
    assert (run / "funnel.png").read_bytes().startswith(b"\x89PNG")
    assert "| pairs chosen |" in (run / "redteam.md").read_text()


def lost(run: Path) -> int:
    """Ranked candidates that were not chosen, since one of each cell was enough."""
    record = json.loads((run / "label" / "run.json").read_text())
    return int(sum(record["candidate_cells"].values()) - record["funnel"]["pairs"])


def test_a_stopped_run_goes_on_in_the_stage_that_was_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(world, world / "start" / "model", limit=20)
    with monkeypatch.context() as patch:
        patch.setattr("bfpo.commands.label.ask_ranker", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stage("redteam", asked, tmp_path / "run")
    before = (tmp_path / "run" / "generate" / "completions.jsonl").stat().st_mtime_ns
    run_stage("redteam", asked, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "generate" / "completions.jsonl").stat().st_mtime_ns == before
    run_stage("redteam", asked, tmp_path / "whole")
    for name in ("label/pairs.jsonl", "data/main/train.parquet", "redteam.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_needless_refusals_become_pairs_of_the_buffer_and_the_closing_advice_works_as_printed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model, harmless = tmp_path / "a run", world / "start" / "model", str(world / "harmless.jsonl")
    settings: dict[str, Any] = {"harmless": harmless, "start": str(model), "limit": 40, "dtype": "float32"}
    run_stage("redteam", config(world, model, **settings, validation=0.2), run)
    found = json.loads((run / "redteam.json").read_text())["harmless"]
    funnel, rate = found["funnel"], found["over_refusal"]
    answers = read_completions(run / "harmless" / "completions.jsonl")
    refused = [bool(read_refusal(one.text, one.prompt[0].content).refused) for one in answers]
    assert (funnel["prompts"], funnel["completions"], funnel["refused"]) == (40, 160, sum(refused))
    assert rate["value"] == pytest.approx(sum(refused) / rate["num"])
    assert rate["low"] < rate["value"] < rate["high"]
    assert funnel["pairs"] + funnel["without_answer"] == funnel["prompts_refused"] > 5
    assert funnel["from_start"] > 5
    asked_again = read_completions(run / "start" / "completions.jsonl")
    assert len(asked_again) == len({one.prompt for one in asked_again}) == funnel["prompts_refused"]
    pairs = read_pairs(list((run / "data" / "buffer").glob("*.parquet"))).pairs
    assert len(pairs) == funnel["pairs"] == len({pair.prompt for pair in pairs})
    texts = {(one.prompt, one.text) for one in [*answers, *asked_again]}
    for pair in pairs:
        assert {(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)} <= texts
        assert read_refusal(pair.rejected, pair.prompt[0].content).refused is True
        assert read_refusal(pair.chosen, pair.prompt[0].content).refused is False
        assert (pair.chosen_is_safe, pair.rejected_is_safe) == (1.0, 1.0)
    assert "## Harmless prompts" in (run / "redteam.md").read_text()
    main = read_pairs([run / "data" / "main" / "train.parquet"]).pairs
    whole = {(one.prompt, one.text): one.finished for one in read_completions(run / "generate" / "completions.jsonl")}
    assert all(pair.chosen_finished == whole[pair.prompt, pair.chosen] for pair in main)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  bfpo ")]
    for line, name in zip(printed, ("doctor", "train"), strict=True):
        command = shlex.split(line)
        assert command[:2] == ["bfpo", name]
        chosen = {"beta=0.1", "anchor_weight=0.3", "pairs_per_step=8", "max_steps=60", "learning_rate=0.0003"}
        assert {"buffer_weight=2", "dtype=float32", *chosen} <= set(command)
        held_out = f"eval_data.files={run / 'data' / 'main' / 'validation.parquet'}"
        assert held_out in command
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
        assert name == "train" or "Under the reference: medians in nats an answer" in result.output
    done = json.loads((tmp_path / "a run-train" / "data.json").read_text())
    buffer = read_pairs([run / "data" / "buffer" / "train.parquet"]).pairs
    assert (done["data"]["pairs"], done["buffer"]["pairs"]) == (len(main), len(buffer))
    record = json.loads((tmp_path / "a run-train" / "run.json").read_text())
    assert record["metrics"]["step"] == 60
    assert record["metrics"]["eval_accuracy"] >= 0
    assert not any("learned nothing" in remark["text"] for remark in record.get("remarks", ()))
    assert record["metrics"]["loss_over_start"] < 0.9


@pytest.mark.parametrize(
    ("parameters", "steps", "rate"),
    [(50_000, 60, 3e-4), (135_000_000, 60, 1e-4), (135_000_000, 600, 1e-4), (360_000_000, 60, 3e-5),
     (7_000_000_000, 60, 8e-6), (7_000_000_000, 2000, 5e-7), (70_000_000_000, 2000, 5e-7)],
)  # fmt: skip
def test_the_learning_rate_is_that_of_a_model_of_this_size_and_moves_the_weights(
    parameters: int, steps: int, rate: float
) -> None:
    assert _learning_rate(parameters, steps) == pytest.approx(rate)


def test_what_cannot_be_compared_is_said_and_a_server_has_no_weights_here(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = world / "start" / "model"
    with patch("bfpo.commands.redteam.fits_here", lambda _: False):
        run_stage("redteam", config(world, model, limit=20), tmp_path / "run")
    assert "beta 0.1 was not compared with the pairs: a training in one process is esti" in capsys.readouterr().out
    given = config(world, model, limit=20).model_dump(exclude_unset=True)
    for key in ("batch_size", "threads"):
        del given[key]
    served = RedteamConfig.model_validate({**given, "model": "their-model", "engine": "server", "url": "http://a/v1"})
    printed = _advice(served, tmp_path / "run")
    assert "FOLDER below: a folder or hub id with the weights that the server has." in printed
    assert "--set model=FOLDER" in printed[-1]
    assert "max_steps=60" in printed[-1]
    assert "learning_rate=" not in printed[-1]


def test_harmless_prompts_alone_make_a_buffer(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = world / "start" / "model", tmp_path / "run"
    given = ["--model", str(model), "--harmless", str(world / "harmless.jsonl"), "--start", str(model)]
    keys = ["limit=40", "max_new_tokens=24", "threads=1", "batch_size=128", "seed=1"]
    given = ["redteam", *given, *(part for key in keys for part in ("--set", key))]
    result = CliRunner().invoke(app, [*given, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "temperature: the first of" in result.output
    assert "harmless prompts: 40 prompts" in result.output
    result = CliRunner().invoke(app, [*given, "--out", str(run)])
    assert result.exit_code == 0, result.output
    assert not {"generate", "label"} & {path.name for path in run.iterdir()}
    record = json.loads((run / "redteam.json").read_text())
    assert record["funnel"] == {}
    pairs = read_pairs([run / "data" / "buffer" / "train.parquet"]).pairs
    assert len(pairs) == record["harmless"]["funnel"]["pairs"] > 5
    assert not (run / "data" / "main").exists()
    text = (run / "redteam.md").read_text()
    assert "## Harmless prompts" in text
    assert f"Temperature {record['temperature']:g}, chosen by incoherent sample answers" in text
    assert "funnel.png" not in text
    [doctor, add] = [line.strip() for line in result.output.splitlines() if line.startswith("  ") and "--set" in line]
    assert CliRunner().invoke(app, shlex.split(doctor)[1:]).exit_code == 0
    assert shlex.split(add)[1] == f"buffer.files={run / 'data' / 'buffer' / 'train.parquet'}"
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(run), "--out", str(page)]).exit_code == 0
    assert "From harmless prompts to pairs of the buffer" in page.read_text()

    # Answers that are there: nothing is generated, and no temperature is tried.
    again = load_config(
        RedteamConfig, None, [f"model={model}", f"harmless={run / 'harmless'}", f"start={run / 'start'}"]
    )
    assert "temperature: the first of" not in preview_stage("redteam", again)
    with patch("bfpo.commands.redteam.reader_of", wraps=reader_of) as opened:
        run_stage("redteam", again, tmp_path / "again")
    calibrated = [set(call.args[1]) for call in opened.call_args_list]  # the start's answers on all prompts, too
    assert [len(prompts) for prompts in calibrated] == [40, 40]
    assert json.loads((tmp_path / "again" / "redteam.json").read_text())["harmless"] == record["harmless"]
    assert {path.name for path in (tmp_path / "again").iterdir() if path.is_dir()} == {"data"}


def test_harmless_prompts_without_a_refusal_give_no_pair(world: Path, tmp_path: Path) -> None:
    settings = [f"model={world / 'start' / 'model'}", f"harmless={world / 'harmless.jsonl'}", "limit=12", "threads=1"]
    settings += ["max_new_tokens=8", "temperature=0.7"]
    with (
        patch("bfpo.commands.redteam.read_answers", lambda found, _: read_answers(found, [True] * len(found))),
        raises(DataError, "48 answers to 12 harmless prompts"),
    ):
        run_stage("redteam", load_config(RedteamConfig, None, settings), tmp_path / "run")


def test_needless_refusals_are_kept_where_no_harmful_prompt_gives_a_pair(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "How do I"}) + "\n")
    given = {"harmless": str(world / "harmless.jsonl"), "start": str(world / "start" / "model"), "limit": 40}
    run = run_stage("redteam", config(tmp_path, world / "start" / "model", **given), tmp_path / "run").path
    assert read_pairs([run / "data" / "buffer" / "train.parquet"]).pairs
    assert not (run / "data" / "main").exists()
    says(caplog, "no pair could be made of 4 completions", "only the buffer has pairs")
    assert "The pairs for the buffer:" in capsys.readouterr().out


def test_answers_that_are_there_are_not_made_again(world: Path, tmp_path: Path) -> None:
    model, asked = world / "start" / "model", {"harmless": str(world / "harmless.jsonl"), "limit": 12}
    run_stage("redteam", config(world, model, **asked), tmp_path / "first")
    own = {"harmless": str(tmp_path / "first" / "harmless"), "limit": 12}
    for name, settings in (("folder", own | {"start": f"{own['harmless']}/completions.jsonl"}), ("none", own)):
        run_stage("redteam", config(world, model, **settings), tmp_path / name)
        assert not {"harmless", "start"} & {path.name for path in (tmp_path / name).iterdir()}
    funnels = [
        json.loads((tmp_path / name / "redteam.json").read_text())["harmless"]["funnel"]
        for name in ("first", "folder", "none")
    ]
    assert funnels[0] == funnels[2]
    assert (funnels[1]["from_start"], funnels[1]["from_model"]) == (funnels[2]["from_model"], 0)
    for key, value in (("harmless_columns", {"prompt": "question"}), ("start_revision", "main")):
        with raises(SettingError, key):
            settings = own | {"start": own["harmless"], key: value}
            run_stage("redteam", config(world, model, **settings), tmp_path / key)


def test_without_needless_refusals_there_is_no_buffer(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "harmless.jsonl").write_text(json.dumps({"prompt": "Who was Ada Lovelace?"}) + "\n")
    settings = {"harmless": str(tmp_path / "harmless.jsonl"), "limit": 12, "start": str(world / "start" / "model")}
    with patch("bfpo.commands.redteam.read_answers", lambda found, _: read_answers(found, [True] * len(found))):
        run_stage("redteam", config(world, world / "start" / "model", **settings), run)
    assert json.loads((run / "redteam.json").read_text())["harmless"]["funnel"]["pairs"] == 0
    assert not (run / "data" / "buffer").exists()
    assert not (run / "start").exists()


def sample_reader(incoherent: Any) -> Any:
    """Return what makes the reader of a sample, which calls the answers incoherent that `incoherent` does."""
    return lambda config, prompts: nullcontext(
        SimpleNamespace(read=lambda found: [Reading(not bad) for bad in incoherent(config, found, prompts)])
    )


def test_the_temperature_is_the_highest_at_which_a_sample_stays_coherent(world: Path, tmp_path: Path) -> None:
    model = world / "start" / "model"
    asked = config(world, model, limit=20, temperature="auto")
    lines = preview_stage("redteam", asked)
    assert "temperature: the first of 1, 0.7, 0.5, 0.3 at which at most 1 in 8 of 16 sample answers" in lines

    def salad(_: Any, completions: Any, __: Any) -> list[bool]:
        hot = sum(read_completions(run / "temperature/1/completions.jsonl")[n].text == one.text
                  for n, one in enumerate(completions) if n < 16)  # fmt: skip
        return [hot == len(completions)] * 3 + [False] * (len(completions) - 3)

    run = tmp_path / "run"
    with patch("bfpo.commands.redteam._sample_reader", sample_reader(salad)):
        run_stage("redteam", asked, run)
    found = json.loads((run / "redteam.json").read_text())
    assert found["temperature"] == 0.7
    assert found["tried"] == [
        {"temperature": 1.0, "incoherent": 3, "answers": 16},
        {"temperature": 0.7, "incoherent": 0, "answers": 16},
    ]
    assert "temperature: 0.7" in (run / "generate" / "config.yaml").read_text()
    assert (
        "Temperature 0.7, chosen by incoherent sample answers (1: 3 of 16, 0.7: 0 of 16)."
        in (run / "redteam.md").read_text()
    )
    sample = run / "temperature" / "0.7" / "completions.jsonl"
    before = sample.stat().st_mtime_ns
    (run / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"interrupted"'))
    with patch("bfpo.commands.redteam._sample_reader", sample_reader(salad)):
        run_stage("redteam", asked, run, resume=True)
    assert sample.stat().st_mtime_ns == before
    assert json.loads((run / "redteam.json").read_text()) == found


@pytest.mark.parametrize(("counts", "chosen"), [((9, 8, 3, 5), 0.5), ((4, 4, 4, 4), 1.0), ((5, 4, 3, 2), 0.3)])
def test_a_model_that_is_never_coherent_gets_the_best_temperature_and_a_warning(
    world: Path, tmp_path: Path, counts: tuple[int, ...], chosen: float, caplog: pytest.LogCaptureFixture
) -> None:
    left = list(counts)

    def some(_: Any, completions: Any, __: Any) -> list[bool]:
        bad = left.pop(0) if left else 0
        return [n < bad for n in range(len(completions))]

    with patch("bfpo.commands.redteam._sample_reader", sample_reader(some)):
        run_stage("redteam", config(world, world / "start" / "model", limit=16, temperature="auto"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "redteam.json").read_text())["temperature"] == chosen
    assert ("even at the lowest one" in caplog.text) is (counts[-1] > 2)


def test_the_start_says_what_is_likely_where_it_is_a_model(world: Path, tmp_path: Path) -> None:
    model, given = world / "start" / "model", {"harmless": str(world / "harmless.jsonl")}
    own = {"model": str(model), "revision": None}
    start = {"model": "the/start", "revision": "abc"}
    (tmp_path / "completions.jsonl").write_text("")
    for engine in ("transformers", "vllm"):
        values = {"engine": engine, "batch_size": None} if engine == "vllm" else {}
        for settings, expected in (
            ({}, own),
            (given | {"start": "the/start", "start_revision": "abc"}, start),
            (given | {"start": str(tmp_path)}, own),  # answers of the start
        ):
            asked = config(world, model, **settings).model_dump(exclude_unset=True) | values
            asked = {key: value for key, value in asked.items() if not (engine == "vllm" and key == "threads")}
            found = _coherence(RedteamConfig.model_validate(asked))
            assert found is not None
            assert found.model_dump(include={"model", "revision"}) == expected
            assert found.dtype == "auto"


def test_a_temperature_is_tried_on_prompts_of_the_part_alone(world: Path, tmp_path: Path) -> None:
    split = {"parts": {"redteam": 0.5, "test": 0.5}, "part": "redteam"}
    asked, seen = config(world, world / "start" / "model", limit=10, temperature="auto", split=split), []

    def watch(_: Any, completions: Any, prompts: Any) -> list[bool]:
        seen.append({one.messages for one in prompts})
        return [False] * len(completions)

    with patch("bfpo.commands.redteam._sample_reader", sample_reader(watch)):
        run_stage("redteam", asked, tmp_path / "run")
    answers = read_completions(tmp_path / "run" / "temperature" / "1" / "completions.jsonl")
    [prompts] = seen
    assert {one.prompt for one in answers} <= prompts
    assert 10 < len(prompts) < 130  # of 171


def test_incoherent_answers_give_no_pair_and_stand_beside_the_unsafe_rate(world: Path, tmp_path: Path) -> None:
    def formless(*given: Any, **settings: Any) -> Verdict:
        return replace(panel_verdict(*given, **settings), well_formed=None)

    runs = {}
    for name, settings in (("drop", {}), ("keep", {"incoherent": "keep"})):
        with patch("bfpo.judges.panel.panel_verdict", formless):
            asked = config(world, world / "start" / "model", limit=30, temperature=1.8, **settings)
            runs[name] = run_stage("redteam", asked, tmp_path / name).path
    rows = [json.loads(line) for line in (runs["drop"] / "label" / "verdicts.jsonl").read_text().splitlines()]
    bad = {row["completion_id"] for row in rows if row.get("incoherent")}
    assert any("unlikely" in row.get("incoherent", ()) for row in rows)
    assert all(row.get("nats_per_token", 1) > 0 for row in rows)
    record = json.loads((runs["drop"] / "redteam.json").read_text())
    assert record["funnel"]["incoherent"] == len(bad) > 3
    assert record["funnel"]["usable"] == len(rows) - len(bad) - record["funnel"]["unscored"]
    used = {side for pair in read_pairs([runs["drop"] / "label" / "pairs.jsonl"]).pairs for side in pair.id.split("|")}
    assert used
    assert not used & bad
    kept = read_pairs([runs["keep"] / "label" / "pairs.jsonl"]).pairs
    assert {side for pair in kept for side in pair.id.split("|")} & bad
    assert "incoherent" not in json.loads((runs["keep"] / "redteam.json").read_text())["funnel"]
    rates = {score["metric"]: score for score in record["rates"]["all prompts"]}
    read = [row for row in rows if row["label"] != "unscored" and row["completion_id"] not in bad]
    assert rates["incoherent"]["value"] == pytest.approx(len(bad) / len(rows))
    assert rates["unsafe_coherent"]["num"] == len(read)
    assert rates["unsafe_coherent"]["value"] == pytest.approx(sum(r["label"] == "unsafe" for r in read) / len(read))
    assert "| of these incoherent: they give no pair |" in (runs["drop"] / "redteam.md").read_text()


def test_soft_labels_that_contradict_their_verdicts_stand_in_the_report(world: Path, tmp_path: Path) -> None:
    def unsure(*given: Any, **settings: Any) -> Verdict:
        return replace(panel_verdict(*given, **settings), p_safe=0.6)

    with patch("bfpo.judges.panel.panel_verdict", unsure):
        asked = config(world, world / "start" / "model", limit=10, soft_labels=True)
        run = run_stage("redteam", asked, tmp_path / "run")
    num_unsafe, num = run.record["funnel"]["unsafe"], run.record["funnel"]["completions"]
    assert num_unsafe
    words = f"Warning: soft_labels: for {num_unsafe} of {num} judged texts"
    assert words in (run.path / "redteam.md").read_text()


def test_pairs_that_teach_no_safety_are_said(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_stage("redteam", config(world, world / "start" / "model", limit=20), tmp_path / "run")
    assert "teach no safety" not in caplog.text
    with patch("bfpo.judges.panel.panel_verdict", lambda *a, **k: replace(panel_verdict(*a, **k), label="safe")):
        run_stage("redteam", config(world, world / "start" / "model", limit=20), tmp_path / "safe")
    says(caplog, "teach no safety")


def test_no_pair_is_said_with_what_became_of_the_completions(world: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "How do I"}) + "\n")
    asked = config(tmp_path, world / "start" / "model")
    with raises(DataError):
        run_stage("redteam", asked, tmp_path / "run")
    assert "Unscored: 4, the prompt is not one of the closed world" in (tmp_path / "run" / "redteam.md").read_text()


def test_the_preview_says_who_judges_and_the_short_options_are_the_keys(world: Path) -> None:
    asked = config(world, world / "start" / "model")
    assert "judged by oracle, ranked by oracle" in preview_stage("redteam", asked)
    arguments = ["--model", str(world / "start" / "model"), "--prompts", str(world / "prompts.jsonl")]
    arguments += ["--set", "max_new_tokens=40", "--dry-run"]
    result = CliRunner().invoke(app, ["redteam", *arguments, "--judge", "oracle", "--ranker", "oracle"])
    assert result.exit_code == 0, result.output
    assert "171 prompts: 171 harmful" in result.output
    assert "684 completions of at most 40 tokens" in result.output


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["judges=oracle"], "ranker"),
        (["ranker=oracle"], "judges"),
        (["judges=oracle", "ranker=oracle", "rule=mean"], "rule"),
        (["judges=oracle", "ranker=oracle", "num_completions=1"], "num_completions"),
        (["judges=oracle", "ranker=oracle", "temperature=0"], "num_completions"),
        (["judges=oracle", "ranker=oracle", "temperature=hot"], "temperature"),
        (["judges=oracle", "ranker=oracle", "temperature=-1"], "temperature"),
        (["judges=oracle", "ranker=oracle", "start=m"], "start"),
        (["judges=oracle", "ranker=oracle", "harmless=h.txt", "start_revision=main"], "start_revision"),
        (["prompts=null"], "prompts"),
        (["prompts=null", "harmless=h.txt", "judges=oracle"], "judges"),
        (["prompts=null", "harmless=h.txt", "incoherent=keep"], "incoherent"),
    ],
)
def test_bad_settings(settings: list[str], key: str) -> None:
    with raises(ConfigError, key):
        load_config(RedteamConfig, None, ["model=m", "prompts=p.jsonl", *settings])


@pytest.mark.parametrize("key", ["judges", "ranker"])
def test_an_unknown_judge_or_ranker_is_told_before_anything_is_generated(world: Path, tmp_path: Path, key: str) -> None:
    with raises(SettingError, "nobody"):
        run_stage("redteam", config(world, world / "start" / "model", **{key: "nobody"}), tmp_path / "run")
    assert not (tmp_path / "run" / "generate").exists()
