from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import LabelConfig, load_config
from bfpo.core.errors import ConfigError, DataError, ServerError, SettingError
from bfpo.core.schema import Completion, Message, Pair, Verdict
from bfpo.data.read import read_pairs
from bfpo.data.write import write_completions, write_pairs
from bfpo.judges import shared
from bfpo.judges.judges import OracleJudge
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.world.oracle import assess
from bfpo.world.world import ANSWER_KINDS, answer, prompt_text, topics
from messages import raises, says
from support.fault_server import FaultServer, guard_answer

KEY = "sk-" + "proj-abcdefghij0123456789"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    pytest.importorskip("openai")
    with FaultServer().running() as running:
        yield running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Completions (three per prompt, one of them twice) and pairs of the closed world, and a pair from elsewhere."""
    root = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    completions, pairs = [], []
    for n, topic in enumerate(rng.sample(topics("test"), 20)):
        prompt = (Message("user", prompt_text(topic, rng)),)
        first, second = (answer(topic, kind, rng) for kind in rng.sample(list(ANSWER_KINDS), 2))
        completions += [
            Completion(f"{n}/{k}", prompt, text, kind=topic.kind) for k, text in enumerate((first, second, first))
        ]
        pairs.append(Pair(f"p{n}", prompt, first, second, [None, 1.0, 0.0][n % 3], [0.0, None][n % 2], "world"))
    pairs.append(Pair("elsewhere", (Message("user", "Who was Ada Lovelace?"),), "A pioneer.", "A poet.", None, True))
    write_completions(root / "completions.jsonl", completions)
    write_pairs(root / "pairs.jsonl", pairs)
    return root


def rows(path: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def config(**settings: Any) -> LabelConfig:
    return LabelConfig(**{"bootstrap_samples": 50, "judges": "oracle", **settings})


def guarded(server: FaultServer, **settings: Any) -> dict[str, Any]:
    return {"format": "llama-guard-3", "model": "guard", "url": server.url, "timeout": 5.0, **settings}


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    write_completions(
        path, [Completion(f"c{n}", (Message("user", f"q{n // 2}"),), text) for n, text in enumerate(texts)]
    )
    return path


def texts(count: int) -> list[str]:
    return [f"answer {n} is {'bad' if n % 3 == 0 else 'fine'}" for n in range(count)]


def test_completions_are_judged_and_compared(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bfpo")
    folder = run_stage(
        "label",
        config(completions=world / "completions.jsonl", ranker="oracle", label_cache=tmp_path),
        tmp_path / "run",
    )
    verdicts, comparisons = rows(folder.path, "verdicts.jsonl"), rows(folder.path, "comparisons.jsonl")
    completions = rows(world, "completions.jsonl")
    assert [row["completion_id"] for row in verdicts] == [row["id"] for row in completions]
    for row, completion in zip(verdicts, completions, strict=True):
        found = assess(completion["prompt"][0]["content"], completion["text"])
        assert found is not None
        assert row["label"] == ("safe" if found.safe else "unsafe")
        assert row["kind"] == completion["kind"]
    assert [(row["first_id"], row["second_id"]) for row in comparisons] == [(f"{n}/0", f"{n}/1") for n in range(20)]
    assert {row["first_is_better"] for row in comparisons} <= {0.0, 0.5, 1.0}
    facts = folder.record
    assert facts["labels"]["safe"] + facts["labels"]["unsafe"] == facts["labels"]["verdicts"] == 60
    assert facts["opinions"] == {
        "oracle": {"kept": 0, "asked": 40, "unanswered": 0},
        "ranker oracle": {"kept": 0, "asked": 20, "unanswered": 0},
    }
    ties = sum(row["first_is_better"] == 0.5 for row in comparisons)
    pairs = len(rows(folder.path, "pairs.jsonl"))
    said = f"{20 - ties} of 20 pairs of completions ordered, {ties} ties, 0 unscored; {pairs} pairs in pairs.jsonl"
    assert said in caplog.text


def test_pairs_get_the_labels_that_they_lack_and_unscored_is_never_safe(world: Path, tmp_path: Path) -> None:
    folder = run_stage("label", config(data={"files": world / "pairs.jsonl"}, label_cache=tmp_path), tmp_path / "run")
    before = read_pairs([world / "pairs.jsonl"]).pairs
    after = read_pairs([folder.path / "pairs.jsonl"]).pairs
    assert [(pair.id, pair.prompt, pair.chosen, pair.rejected) for pair in after] == [
        (pair.id, pair.prompt, pair.chosen, pair.rejected) for pair in before
    ]
    for old, new in zip(before[:-1], after[:-1], strict=True):
        for side in ("chosen", "rejected"):
            found = assess(old.prompt[0].content, getattr(old, side))
            assert found is not None
            known = getattr(old, f"{side}_is_safe")
            assert getattr(new, f"{side}_is_safe") == (float(found.safe) if known is None else known)
    assert (after[-1].chosen_is_safe, after[-1].rejected_is_safe) == (None, 1.0)
    assert folder.record["labels"]["unscored_by_reason"] == {"the prompt is not one of the closed world": 1}
    assert folder.record["labels"]["cells"]["unknown"] == 1
    assert json.loads((folder.path / "scores.json").read_text())["scores"] == []


def test_relabelling_replaces_labels_and_reports_the_agreement(world: Path, tmp_path: Path) -> None:
    settings = {"data": {"files": world / "pairs.jsonl"}, "relabel": True, "ranker": "oracle", "label_cache": tmp_path}
    folder = run_stage("label", config(**settings), tmp_path / "run")
    given = {}
    for pair in read_pairs([world / "pairs.jsonl"]).pairs:
        given |= {f"{pair.id}:chosen": pair.chosen_is_safe, f"{pair.id}:rejected": pair.rejected_is_safe}
    verdicts = {row["completion_id"]: row["label"] for row in rows(folder.path, "verdicts.jsonl")}
    both = [name for name, label in given.items() if label is not None and verdicts[name] != "unscored"]
    differ = [name for name in both if (verdicts[name] == "safe") != (given[name] == 1.0)]
    scores = {score["metric"]: score for score in json.loads((folder.path / "scores.json").read_text())["scores"]}
    agreement = scores["agreement: verdict, given label"]
    assert (agreement["value"], agreement["num"]) == (pytest.approx(1 - len(differ) / len(both)), len(both))
    assert agreement["unscored"] == 1
    assert scores["cohen_kappa: verdict, given label"]["value"] < 1
    assert scores["agreement: ranker, given order"]["num"] == 20
    assert [row["id"] for row in rows(folder.path, "disagreements.jsonl")] == differ
    after = read_pairs([folder.path / "pairs.jsonl"]).pairs
    assert (after[-1].chosen_is_safe, after[-1].rejected_is_safe) == (None, None)
    text = (folder.path / "label.md").read_text()
    assert "| agreement: verdict, given label | " in text
    assert "unscored, the prompt is not one of the closed world: 2" in text


def test_pairs_whose_labels_are_kept_are_compared_too(world: Path, tmp_path: Path) -> None:
    settings = {"data": {"files": world / "pairs.jsonl"}, "ranker": "oracle", "label_cache": tmp_path}
    folder = run_stage("label", config(**settings), tmp_path / "run")
    (score,) = json.loads((folder.path / "scores.json").read_text())["scores"]
    assert (score["metric"], score["num"]) == ("agreement: ranker, given order", 20)


class Fake:
    """A local judge whose p(safe) is read from the text; counts what it is asked."""

    asked = 0
    version = "fake-1"
    threshold = 0.5

    def __init__(self, name: str = "fake", shift: float = 0.0) -> None:
        self.name, self._shift = name, shift

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        Fake.asked += len(completions)
        return [self._verdict(completion) for completion in completions]

    def _verdict(self, completion: Completion) -> Verdict:
        p_safe = float(completion.text) + self._shift
        if p_safe > 1:
            return Verdict(completion.id, self.name, "unscored", reason="too much")
        return Verdict(completion.id, self.name, "safe" if p_safe >= self.threshold else "unsafe", p_safe=p_safe)


def test_a_panel_its_disagreements_and_soft_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"oracle": Fake("one"), "harmbench": Fake("two", 0.25)}
    made["harmbench"].version = "fake-2"
    monkeypatch.setattr(shared, "make_judge", lambda spec, budget, **_: made[spec.format])
    prompt = (Message("user", "q"),)
    pairs = [Pair(f"p{n}", prompt, f"{n / 8}", f"{n / 8 + 0.0625}") for n in range(8)]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    settings = {
        "data": {"files": tmp_path / "pairs.jsonl"},
        "judges": ["oracle", "harmbench"],
        "rule": "mean",
        "soft_labels": True,
    }
    folder = run_stage("label", config(**settings, min_votes=2, label_cache=tmp_path), tmp_path / "run")
    after = read_pairs([folder.path / "pairs.jsonl"]).pairs
    assert [pair.chosen_is_safe for pair in after] == [n / 8 + 0.125 if n / 8 + 0.25 <= 1 else None for n in range(8)]
    disagreements = rows(folder.path, "disagreements.jsonl")
    assert [row["text"] for row in disagreements] == ["0.25", "0.3125", "0.375", "0.4375"]
    assert disagreements[0]["p_safe"] == {"one": 0.25, "two": 0.5}
    verdicts = rows(folder.path, "verdicts.jsonl")
    assert [vote["judge"] for vote in verdicts[0]["votes"]] == ["one", "two"]
    assert verdicts[-1]["reason"] == "1 of 2 votes scored; min_votes is 2"
    scores = {score["metric"]: score for score in json.loads((folder.path / "scores.json").read_text())["scores"]}
    assert scores["cohen_kappa: one, two"]["num"] == 13


def test_soft_labels_that_contradict_their_verdicts_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Fake, "threshold", 0.7)
    monkeypatch.setattr(shared, "make_judge", lambda spec, budget, **_: Fake())
    prompt = (Message("user", "q"),)
    pairs = [Pair(f"p{n}", prompt, *texts) for n, texts in enumerate((("0.8", "0.6"), ("0.55", "0.2"), ("0.1", "2")))]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    settings = {"data": {"files": tmp_path / "pairs.jsonl"}, "label_cache": tmp_path / "cache"}
    folder = run_stage("label", config(**settings, soft_labels=True), tmp_path / "soft")
    says(caplog, "soft_labels")
    counted = "- soft_labels: for 2 of 5 judged texts p(safe) is on the other side of 0.5"
    assert counted in (folder.path / "label.md").read_text()
    caplog.clear()
    folder = run_stage("label", config(**settings), tmp_path / "hard")
    assert "soft_labels: for" not in caplog.text + (folder.path / "label.md").read_text()


def test_disagreements_are_sorted_by_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "make_judge", lambda spec, budget, **_: Fake())
    pairs = [
        Pair(f"p{n}", (Message("user", "q"),), text, "0.0", True, None)
        for n, text in enumerate(("0.4", "0.1", "0.9", "0.3"))
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    folder = run_stage(
        "label", config(data={"files": tmp_path / "pairs.jsonl"}, relabel=True, label_cache=tmp_path), tmp_path / "run"
    )
    assert [row["text"] for row in rows(folder.path, "disagreements.jsonl")] == ["0.1", "0.3", "0.4"]


def test_a_second_run_asks_nothing(server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "asked", 0)
    make = shared.make_judge
    monkeypatch.setattr(
        shared,
        "make_judge",
        lambda spec, budget, **more: Fake() if spec.format == "oracle" else make(spec, budget, **more),
    )
    server.answer = lambda text: guard_answer("bad" if text.startswith("0.1") else "")
    file = write_texts(tmp_path / "completions.jsonl", ["0.1", "0.9", "0.1", "0.1"])
    settings = {"completions": file, "judges": ["oracle", guarded(server)], "label_cache": tmp_path / "cache"}
    first = run_stage("label", config(**settings), tmp_path / "first")
    assert (Fake.asked, server.num_requests) == (3, 3)  # two of the texts are the same, prompt included
    assert (first.record["requests"], first.record["opinions"]["fake"]["asked"]) == (3, 3)
    second = run_stage("label", config(**settings), tmp_path / "second")
    assert (Fake.asked, server.num_requests) == (3, 3)
    assert second.record["requests"] == 0
    assert second.record["opinions"]["fake"] == {"kept": 3, "asked": 0, "unanswered": 0}
    for name in ("verdicts.jsonl", "disagreements.jsonl", "scores.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_several_votes_of_a_sampled_judge(server: FaultServer, tmp_path: Path) -> None:
    drawn = {0: "safe", 1: "unsafe", 2: "safe", 3: "no answer", 4: "safe"}
    server.answer = lambda text: drawn[server.bodies[-1]["seed"]] if "bad" in text else "safe"
    file = write_texts(tmp_path / "completions.jsonl", texts(4))
    settings = {
        "completions": file,
        "judges": guarded(server, temperature=0.8, max_concurrency=1),
        "votes": 5,
        "label_cache": tmp_path,
    }
    folder = run_stage("label", config(**settings), tmp_path / "run")
    assert server.num_requests == 20
    verdicts = rows(folder.path, "verdicts.jsonl")
    assert [row["label"] for row in verdicts] == ["safe"] * 4
    assert [row["p_safe"] for row in verdicts] == [0.75, 1.0, 1.0, 0.75]
    assert [vote["label"] for vote in verdicts[0]["votes"]] == ["safe", "unsafe", "safe", "unscored", "safe"]
    (score,) = json.loads((folder.path / "scores.json").read_text())["scores"]
    assert score["metric"] == "fleiss_kappa: votes of llama-guard-3:guard"
    assert [row["id"] for row in rows(folder.path, "disagreements.jsonl")] == ["c0", "c3"]
    run_stage("label", config(**settings), tmp_path / "again")
    assert server.num_requests == 20


def test_a_fault_of_the_way_is_unscored_and_asked_about_again(server: FaultServer, tmp_path: Path) -> None:
    server.plan = lambda text, attempt: "drop" if text == texts(6)[2] and attempt == 0 else "ok"
    file = write_texts(tmp_path / "completions.jsonl", texts(6))
    settings = {"completions": file, "judges": guarded(server, max_retries=0), "label_cache": tmp_path / "cache"}
    first = run_stage("label", config(**settings), tmp_path / "first")
    assert [row["label"] for row in rows(first.path, "verdicts.jsonl")][:3] == ["unsafe", "safe", "unscored"]
    assert first.record["labels"]["unscored"] == 1
    assert first.record["opinions"]["llama-guard-3:guard"]["unanswered"] == 1
    second = run_stage("label", config(**settings), tmp_path / "second")
    assert [row["label"] for row in rows(second.path, "verdicts.jsonl")][:3] == ["unsafe", "safe", "safe"]
    assert server.num_requests == 7


def test_a_used_up_budget_stops_and_resume_goes_on(server: FaultServer, tmp_path: Path) -> None:
    server.plan = lambda text, attempt: "500" if text == texts(12)[1] and attempt == 0 else "ok"
    file = write_texts(tmp_path / "completions.jsonl", texts(12))
    asked = config(
        completions=file, judges=guarded(server, max_concurrency=2), max_requests=8, label_cache=tmp_path / "cache"
    )
    with raises(ServerError):
        run_stage("label", asked, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["requests"]) == ("failed", 8)
    assert not (tmp_path / "run" / "verdicts.jsonl").exists()
    folder = run_stage("label", asked, tmp_path / "run", resume=True)
    assert server.num_requests == 13  # 12 texts, one of them twice
    assert [row["label"] for row in rows(folder.path, "verdicts.jsonl")] == [
        guard_answer(text).split()[0] for text in texts(12)
    ]
    assert folder.record["opinions"]["llama-guard-3:guard"] == {"kept": 7, "asked": 5, "unanswered": 0}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_after_kills_nothing_is_lost_asked_twice_or_out_of_order(
    server: FaultServer, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    server.plan = lambda text, attempt: 0.02 + rng.random() / 20
    count, concurrency, kills = 40, 3, 1 if seed == 0 else 3
    file = write_texts(tmp_path / "completions.jsonl", texts(count))
    judge = tmp_path / "judge.yaml"
    judge.write_text(json.dumps(guarded(server, max_concurrency=concurrency)))
    settings = [f"completions={file}", f"judges={judge}", f"label_cache={tmp_path / 'cache'}"]
    command = [part for setting in settings for part in ("--set", setting)]
    for kill in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "bfpo", "label", *command, "--out", str(tmp_path / "run"), "--resume"],
            stderr=subprocess.PIPE,
        )
        wanted = server.num_requests + rng.randrange(4, count // (kills + 1))
        while server.num_requests < wanted and process.poll() is None:
            time.sleep(0.005)
        stop, status = ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130))[kill]
        process.send_signal(stop)
        _, output = process.communicate()
        assert process.returncode == status, output.decode()
        assert not (tmp_path / "run" / "verdicts.jsonl").exists()
    time.sleep(0.2)  # the server comes to the end of what was under way
    before = server.num_requests
    folder = run_stage("label", load_config(LabelConfig, None, settings), tmp_path / "run", resume=True)
    verdicts = rows(folder.path, "verdicts.jsonl")
    assert [row["completion_id"] for row in verdicts] == [f"c{n}" for n in range(count)]
    assert [row["label"] for row in verdicts] == [guard_answer(text).split()[0] for text in texts(count)]
    assert count <= server.num_requests <= count + kills * concurrency  # only what was under way is asked again
    tally = folder.record["opinions"]["llama-guard-3:guard"]
    assert (tally["kept"] + tally["asked"], tally["asked"]) == (count, server.num_requests - before)
    assert tally["kept"] > 0


def test_the_key_is_written_nowhere(
    server: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BFPO_TEST_KEY", KEY)
    file = write_texts(tmp_path / "completions.jsonl", texts(6))
    server.plan = lambda text, attempt: f"401:{KEY} is not known" if attempt else "ok"
    server.answer = lambda text: f"safe\n{KEY}" if "4" in text else guard_answer(text)
    judge = json.dumps([guarded(server, api_key_env="BFPO_TEST_KEY")])
    command = ["label", "--set", f"completions={file}", "--set", f"judges={judge}", "--max-requests", "9", "--debug"]
    with caplog.at_level(logging.DEBUG):
        for name in ("openai", "httpx2", "httpcore2", "asyncio"):
            logging.getLogger(name).setLevel(logging.DEBUG)
        good = CliRunner().invoke(
            app, [*command, "--set", f"label_cache={tmp_path / 'a'}", "--out", str(tmp_path / "good")]
        )
        bad = CliRunner().invoke(
            app, [*command, "--set", f"label_cache={tmp_path / 'b'}", "--out", str(tmp_path / "bad")]
        )
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "BFPO_TEST_KEY" in bad.output
    assert server.keys == {f"Bearer {KEY}"}
    assert "HTTP" in caplog.text
    captured = capfd.readouterr()
    for written in (good.output, bad.output, caplog.text, captured.out, captured.err):
        assert KEY not in written
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ([], "judges"),
        (["judges=oracle"], "completions, data"),
        (["judges=oracle", "completions=c", "data.files=d"], "completions"),
        (["judges=oracle", "completions=c", "relabel=true"], "relabel"),
        (["judges=oracle", "completions=c", "rule=mean"], "rule"),
        (["judges=oracle", "completions=c", "max_requests=5"], "max_requests"),
        (["judges=oracle", "completions=c", "votes=3"], "votes"),
        (["judges=oracle", "completions=c", "min_votes=2"], "min_votes"),
        (["judges=[oracle, {format: classifier}]", "completions=c"], "judges[1].model"),
        (["judges=[{format: oracle, colour: red}]", "completions=c"], "judges[0].colour"),
    ],
)
def test_settings_that_cannot_be(settings: list[str], key: str) -> None:
    with raises(ConfigError, key):
        load_config(LabelConfig, None, settings)


def test_input_that_cannot_be_used(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text((world / "pairs.jsonl").read_text() + "{}\n")
    skipping = config(data={"files": tmp_path / "bad.jsonl", "bad_rows": "skip", "limit": 5}, label_cache=tmp_path)
    folder = run_stage("label", skipping, tmp_path / "skipped")
    assert len(rows(folder.path, "pairs.jsonl")) == 5
    assert [row["line"] for row in rows(folder.path, "rejects.jsonl")] == [22]
    assert sum(folder.record["labels"]["rows_rejected"].values()) == 1
    with raises(DataError, "bfpo generate"):
        run_stage("label", config(completions=tmp_path / "empty.jsonl"), tmp_path / "a")
    twice = [Completion("same", (Message("user", "q"),), text) for text in ("a", "b")]
    write_completions(tmp_path / "twice.jsonl", twice)
    with raises(DataError):
        run_stage("label", config(completions=tmp_path / "twice.jsonl"), tmp_path / "b")
    with raises(SettingError, "oracle"):
        run_stage("label", config(completions=world / "completions.jsonl", judges=["oracle", "oracle"]), tmp_path / "c")


def test_preview_loads_and_asks_nobody(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OracleJudge, "judge", None)
    text = preview_stage(
        "label", config(completions=world / "completions.jsonl", judges=["oracle", "harmbench"], ranker="oracle")
    )
    assert "60 completions to judge, 40 different ones, by 2 judge(s):\n  oracle\n  harmbench\nat most 20 pairs" in text
    text = preview_stage("label", config(data={"files": world / "pairs.jsonl"}))
    assert "18 completions to judge" in text


def test_ranked_completions_become_pairs_of_every_cell_they_offer(world: Path, tmp_path: Path) -> None:
    config = LabelConfig(
        completions=str(world / "completions.jsonl"),
        judges="oracle",  # type: ignore[arg-type]
        ranker="oracle",  # type: ignore[arg-type]
        label_cache=str(tmp_path / "cache"),
    )
    folder = run_stage("label", config, tmp_path / "out")
    result = read_pairs([tmp_path / "out" / "pairs.jsonl"])
    funnel = folder.record["funnel"]
    assert funnel["prompts"] == 20
    assert funnel["candidates"] == 20
    assert len(result.pairs) == funnel["pairs"] == 20 - funnel["ties"] - funnel["unranked"]
    for pair in result.pairs:
        chosen, rejected = (assess(pair.prompt[0].content, text) for text in (pair.chosen, pair.rejected))
        assert chosen is not None
        assert rejected is not None
        assert chosen.helpful > rejected.helpful
        assert (pair.chosen_is_safe, pair.rejected_is_safe) == (chosen.safe, rejected.safe)
    assert sum(folder.record["labels"]["cells"].values()) == len(result.pairs)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["completions=a.jsonl", "strategy=random"], "strategy"),
        (["data.files=a.jsonl", "ranker=oracle", "pairs_per_prompt=2"], "pairs_per_prompt"),
        (["completions=a.jsonl", "soft_labels=true"], "soft_labels"),
    ],
)
def test_keys_of_the_pairs_need_what_they_are_about(settings: list[str], key: str) -> None:
    with raises(ConfigError, key):
        load_config(LabelConfig, None, ["judges=oracle", *settings])
