"""Likelihood under a start model: nats against a float64 loop, calibration of the bound, use in evaluate."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bfpo.commands.redteam import _sample_reader
from bfpo.config import EvaluateConfig, RedteamConfig
from bfpo.config.load import load_config
from bfpo.core.errors import ConfigError
from bfpo.core.schema import Completion, Message, Prompt, Verdict
from bfpo.execution.settings import LocalExecutor
from bfpo.generation.sampling import Answer
from bfpo.policy.save import save_policy
from bfpo.report.gather import gather
from bfpo.report.headline import headline
from bfpo.report.tables import suite_columns
from bfpo.runs.stages import run_stage
from bfpo.scores.records import CoherenceBound
from bfpo.scores.scores import Judged, describe_coherence, score_rows
from bfpo.suites.coherence import CoherenceReader, Reading, StartModel, _bound, make_reader
from bfpo.suites.scores import values_of
from execution.copies import Copies, take_copies
from helpers import CHATML, EOS, IM_END, byte_tokenizer
from messages import raises
from tiny import VOCABULARY, tiny_model, tiny_tokenizer

NUM_WORDS = VOCABULARY - 3


def counting_model() -> Any:
    """A model that has learnt to count: after w5 comes w6."""
    model = tiny_model(hidden_size=32, seed=1, initializer_range=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        starts = torch.randint(NUM_WORDS, (16, 1), generator=generator)
        ids = (starts + torch.arange(60)) % NUM_WORDS + 3
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coherence")
    save_policy(counting_model(), tiny_tokenizer(), root / "start")
    save_policy(tiny_model(seed=3), tiny_tokenizer(), root / "random")
    for folder in ("start", "random"):
        file = root / folder / "tokenizer_config.json"
        template = "{% for m in messages %}{{ m['content'] }}{{ ' ' }}{% endfor %}"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def counted(first: int, num: int) -> str:
    return " ".join(f"w{(first + n) % NUM_WORDS}" for n in range(num))


PROMPTS = [asked(counted(3 * n, 4)) for n in range(30)]


# ------------------------------------------------------------------------------------------------------------ nats


def test_nats_per_token_against_a_float64_loop(root: Path) -> None:
    start = StartModel(str(root / "start"), dtype="float64")
    words = np.random.default_rng(0).integers(NUM_WORDS, size=400)
    texts = [counted(7, 8), *(" ".join(f"w{n}" for n in words[:num]) for num in (9, 31, 255, 400)), "w1 zzz " * 5]
    completions = [
        Completion(str(n), asked(counted(n, 1 + 5 * n)), text, finished=bool(n % 2)) for n, text in enumerate(texts)
    ]
    got = start.nats(completions)
    model, tokenizer = start.model.double(), start.tokenizer
    for completion, value in zip(completions, got, strict=True):
        prompt = tokenizer(f"{completion.prompt[0].content} ", add_special_tokens=False)["input_ids"]
        answer = tokenizer(completion.text, add_special_tokens=False)["input_ids"]
        answer = (answer + [tokenizer.eos_token_id] * completion.finished)[:256]
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total = sum(float(logps[len(prompt) + n - 1, token]) for n, token in enumerate(answer))
        assert value == pytest.approx(-total / len(answer), rel=1e-9)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_start_model_is_held_as_for_generating(
    root: Path, monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("bfpo.policy.precision.computes_bfloat16", lambda: native)
    start = StartModel(str(root / "start"))
    assert start.model.dtype == dtype
    asked_for = [Completion(str(n), asked(counted(n, 3)), counted(n, 12)) for n in range(5)]
    exact = StartModel(str(root / "start"), dtype="float64").nats(asked_for)
    assert start.nats(asked_for) == pytest.approx(exact, abs=0.05)


def test_short_and_blank_answers_have_no_nats(root: Path) -> None:
    start = StartModel(str(root / "start"))
    texts = ["", " \n", counted(3, 6), counted(3, 7)]
    got = start.nats([Completion(str(n), asked("w1"), text) for n, text in enumerate(texts)])
    assert [value is None for value in got] == [True, True, True, False]  # the last one has 8 tokens with its end
    assert start.nats([]) == []
    torch.nn.init.constant_(start.model.get_output_embeddings().weight, math.nan)
    assert start.nats([Completion("0", asked("w1"), texts[-1])]) == [None]


# ----------------------------------------------------------------------------------------------------- calibration


def test_the_bound_misses_a_twentieth_of_the_salad_and_its_errors_are_of_the_other_half() -> None:
    rng = np.random.default_rng(0)
    own, salad = rng.normal(1.0, 0.3, 60).tolist(), rng.normal(6.0, 1.0, 60).tolist()
    found = _bound([*own, None, 1.0], [*salad, 3.0, None])  # pairs without both values are left out
    assert found.bound == pytest.approx(np.quantile(salad, 0.05))
    halves = [(own[k::2], salad[k::2], np.quantile(salad[1 - k :: 2], 0.05)) for k in (0, 1)]
    missed = sum(value <= bound for _, half, bound in halves for value in half)
    above = sum(value > bound for half, _, bound in halves for value in half)
    assert (found.salad_below.value, found.salad_below.num) == (missed / 60, 60)
    assert found.own_above.value == above / 60 == 0
    assert found.own_above.high is not None
    assert found.own_above.high > 0.05  # 0 of 60 is not certainty
    assert found.salad_median == pytest.approx(np.median(salad))


def test_a_model_that_separates_nothing_gives_no_bound_and_says_why() -> None:
    same = np.random.default_rng(0).normal(4.5, 0.1, 60).tolist()
    found = _bound(same, same[::-1])
    assert found.bound is None
    assert "random order" in describe_coherence(found)
    few = _bound([1.0] * 15, [6.0] * 15)
    assert few.bound is None
    assert "15 of its answers" in describe_coherence(few)


def test_a_calibration_is_kept_by_the_content_of_model_and_prompts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = StartModel(str(root / "start"))
    found = start.calibrated(PROMPTS)
    assert found.bound is not None
    assert found.own_highest is not None
    assert found.own_highest < found.bound
    calls = []
    monkeypatch.setattr(StartModel, "greedy", lambda self, prompts: calls.append(len(prompts)) or [])
    assert StartModel(str(root / "start")).calibrated(PROMPTS[::-1]) == found  # whatever their order
    assert calls == []
    start.calibrated(PROMPTS[:-1])
    StartModel(str(root / "random")).calibrated(PROMPTS)
    assert calls == [29, 30]


def test_greedy_answers_end_where_the_chat_template_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_policy(tiny_model(vocab_size=260, eos_token_id=EOS), byte_tokenizer(), tmp_path / "start")
    start = StartModel(str(tmp_path / "start"), chat_template=CHATML)
    asked_with: list[Any] = []

    def answers(model: Any, requests: Any, *, eos_token_ids: Any, **settings: Any) -> list[Any]:
        asked_with.append(sorted(eos_token_ids))
        return [[Answer(request.id, (5,), True) for request in requests]]

    monkeypatch.setattr("bfpo.suites.coherence.answer_batches", answers)
    start.greedy([asked("hello")])
    assert asked_with == [[EOS, IM_END]]


def test_a_broken_file_of_the_cache_is_made_again(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = StartModel(str(root / "start"))
    found = start.calibrated(PROMPTS)
    (kept,) = (tmp_path / "cache" / "bfpo" / "coherence").iterdir()
    kept.write_text("{")
    assert start.calibrated(PROMPTS) == found
    assert "calibrating again" in caplog.text


# --------------------------------------------------------------------------------------------------------- reading


def test_the_reader_calls_shuffled_words_unlikely_and_leaves_out_what_it_must_not_read(root: Path) -> None:
    start = StartModel(str(root / "start"))
    reader = CoherenceReader(start, start.calibrated(PROMPTS))
    shuffled = " ".join(np.random.default_rng(1).permutation(counted(5, 30).split()))
    texts = [counted(5, 30), shuffled, counted(5, 3), "w1 w2 " * 20, "", ""]
    completions = [Completion(str(n), asked(counted(1, 4)), text) for n, text in enumerate(texts)]
    completions.append(Completion("blocked", asked("w1"), "", blocked="a filter", finished=False))
    verdicts = [Verdict(one.id, "judge", "safe") for one in completions]
    read = reader.read(completions, verdicts)
    assert [one.coherent for one in read] == [True, False, True, False, False, False, None]
    assert [one.incoherent for one in read[1:5]] == [["unlikely"], None, ["looping"], ["empty"]]
    assert read[2].nats_per_token is None
    alone = CoherenceReader().read(completions, verdicts)
    assert [one.coherent for one in alone] == [True, True, True, False, False, False, None]
    verdicts[5] = Verdict("5", "oracle", "safe", well_formed=True)  # that judge reads the form itself
    assert all(one.coherent is None for one in CoherenceReader().read(completions, verdicts))
    assert all(one.nats_per_token is None for one in alone)


def refusing(rows: list[Judged]) -> list[Judged]:
    """The same answers, refused where they are safe, of which every tenth was cut."""
    return [replace(row, refused=row.safe, finished=n % 10 != 0) for n, row in enumerate(rows[:40])]


def test_broken_text_counts_as_harmless_but_not_among_coherent_answers() -> None:
    rows = [Judged(str(n), f"p{n}", "harmful", safe=n % 4 != 0, coherent=n % 2 == 0) for n in range(40)]
    rows.append(Judged("blocked", "p99", "harmful", safe=None, coherent=None))
    scores = {score.metric: score for score in score_rows(rows)}
    assert (scores["harmless"].value, scores["harmless"].num) == (0.75, 40)
    assert (scores["coherent"].value, scores["coherent"].unscored) == (0.5, 1)
    assert (scores["harmless_coherent"].value, scores["harmless_coherent"].num) == (0.5, 20)
    assert scores["harmless_coherent"].unscored == 0  # the other half was not asked about
    beside = {one.metric: one.compared for one in values_of("s", "m", ["harmless"], rows)}
    assert beside["coherent"] is False
    assert beside["harmless_coherent"] is False
    assert [one.metric for one in values_of("s", "m", ["refused"], rows)] == ["refused", "finished", "coherent"]
    aside = {one.metric: one for one in values_of("s", "m", ["refused_harmful"], refusing(rows))}
    assert list(aside) == ["refused_harmful", "finished", "coherent", "refused_coherent"]
    assert [sum(one.by_item.values()) / len(one.by_item) for one in aside.values()] == [0.75, 0.9, 0.5, 0.5]
    unread = [Judged(str(n), "p", "harmful", safe=True) for n in range(3)]
    assert not {"coherent", "harmless_coherent"} & {score.metric for score in score_rows(unread)}
    assert [one.metric for one in values_of("s", "m", ["refused"], unread)] == ["refused"]


def test_the_temperature_of_redteam_leaves_samples_that_are_nearer_to_salad(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt[0].content}\n" for prompt in PROMPTS))
    given = {"model": str(root / "start"), "prompts": str(tmp_path / "prompts.txt"), "judges": "oracle"}
    config = RedteamConfig.model_validate({**given, "ranker": "oracle", "temperature": "auto"})
    shuffled = " ".join(np.random.default_rng(1).permutation(counted(5, 30).split()))
    samples = [Completion(str(n), PROMPTS[n], text) for n, text in enumerate((counted(4, 30), shuffled, "w1"))]

    def unlikely() -> list[bool]:
        prompts = [Prompt(str(n), prompt) for n, prompt in enumerate(PROMPTS)]
        return [read.coherent is False for read in _sample_reader(config, prompts).read(samples)]

    assert unlikely() == [False, True, False]
    bound = CoherenceBound(bound=5.0, own_median=1.0, salad_median=6.0)
    monkeypatch.setattr(StartModel, "calibrated", lambda *_: bound)
    monkeypatch.setattr(StartModel, "nats", lambda *_: [3.4, 3.6, None])
    assert unlikely() == [False, True, False]  # above 3.5, below the bound of texts by others
    bound = CoherenceBound(bound=None, own_median=4.0, salad_median=4.1)
    assert unlikely() == [False] * 3


# -------------------------------------------------------------------------------------------------------- evaluate

SUITE = {
    "name": "mine",
    "title": "Mine",
    "summary": "prompts of my own",
    "kind": "generative",
    "licence": "CC0",
    "source": {"files": ["mine.jsonl"]},
    "judge": None,
    "metrics": {"refused_harmful": "higher", "harmless": "higher"},
    "sampling": {"max_new_tokens": 24, "temperature": 0.0},
}


def config(root: Path, **more: Any) -> EvaluateConfig:
    rows = [{"id": str(n), "prompt": prompt[0].content, "kind": "harmful"} for n, prompt in enumerate(PROMPTS)]
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "mine.yaml").write_text(yaml.safe_dump(SUITE))
    (root / "phrases.txt").write_text("/w/\n")
    models = [{"name": name, "model": str(root / name)} for name in ("start", "random")]
    suites = {"use": str(root / "mine.yaml"), "folders": [str(root)], "label_cache": str(root / "cache")}
    suites |= {"judges": {"refusal": {"format": "refusal-phrases", "phrases": str(root / "phrases.txt")}}}
    return EvaluateConfig.model_validate({"models": models, "suites": suites, "threads": 1, **more})


def values(path: Path) -> dict[tuple[str, str], Any]:
    scores = json.loads((path / "scores.json").read_text())["scores"]
    return {(score["model"], score["metric"]): score["value"] for score in scores}


def test_evaluate_with_a_start_model_finds_the_text_that_the_text_alone_does_not(root: Path, tmp_path: Path) -> None:
    read = run_stage("evaluate", config(root, coherence={"model": "start"}), tmp_path / "with").path
    alone = run_stage("evaluate", config(root), tmp_path / "alone").path
    assert values(read)["start", "coherent"] == 1.0
    assert values(read)["random", "coherent"] < 0.3  # an answer of fewer than 8 tokens is not read for likelihood
    assert values(alone)["random", "coherent"] > values(read)["random", "coherent"] + 0.3
    rows = [json.loads(line) for line in (read / "answers.jsonl").read_text().splitlines()]
    bound = json.loads((read / "scores.json").read_text())["coherence"]
    found = [row for row in rows if row["model"] == "random" and "nats_per_token" in row]
    unlikely = [row["nats_per_token"] > bound["bound"] for row in found]
    assert sum(unlikely) > 15
    counts = json.loads((read / "scores.json").read_text())["suites"][0]["incoherent"]
    cut = {name: sum(row["model"] == name and not row["finished"] for row in rows) for name in ("start", "random")}
    assert counts["start"] == {"cut": cut["start"]}
    assert (counts["random"]["unlikely"], counts["random"].get("cut", 0)) == (sum(unlikely), cut["random"])
    assert f"Of the answers of start: {cut['start']} cut at the token limit." in (read / "scores.md").read_text()
    assert {(name, "finished") for name in cut} <= values(read).keys()
    assert ["unlikely" in row.get("incoherent", []) for row in found] == unlikely
    assert all("incoherent" not in row and row["nats_per_token"] < 1 for row in rows if row["model"] == "start")
    assert bound["own_above"]["value"] == 0.0
    assert f"above {bound['bound']:.2f} nats per token" in (read / "scores.md").read_text()
    assert "coherence" not in json.loads((alone / "scores.json").read_text())
    assert "from the text alone" in (alone / "scores.md").read_text()
    data = gather([read])
    columns = {column.group: column.metric for column in suite_columns(data)}
    beside = ("coherent", "refused_coherent", "finished")
    assert [columns.get(name) for name in beside] == list(beside)
    told = headline(data)
    assert any("which favours random" in line for line in told.details)
    assert any("nats per token" in line for line in told.details)


def test_a_start_model_that_separates_nothing_is_not_used(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StartModel, "nats", lambda self, rows: [4.5 + n % 7 for n in range(len(rows))])
    reader = make_reader((str(root / "random"), None), PROMPTS, LocalExecutor())
    assert "cannot be used" in caplog.text
    assert reader.bound is not None
    assert reader.bound.bound is None
    assert [one.coherent for one in reader.read([Completion("1", PROMPTS[0], counted(1, 20))])] == [True]


def test_several_workers_read_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bfpo.judges.shared.PER_CALL", 7)
    texts = [Completion(str(n), prompt, counted(5 * n, 5 + n)) for n, prompt in enumerate(PROMPTS)]
    start = (str(root / "start"), None)
    with make_reader(start, PROMPTS, LocalExecutor(workers=1)) as one:
        alone = one.read(texts)
    assert sum(read.nats_per_token is not None for read in alone) > 20
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "another cache"))
    made = take_copies(monkeypatch)
    with make_reader(start, PROMPTS, LocalExecutor(workers=2)) as two:
        assert two.read(texts) == alone
    assert two.bound == one.bound
    assert [len(each.used) for each in made] == [2]
    shutil.rmtree(root / "another cache" / "bfpo" / "coherence")
    assert two.read(texts) == alone  # by new workers
    assert len(made) == 2


def test_workers_hold_the_number_type_of_the_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's device may compute in bfloat16 where that of the command does not, as on another node."""
    texts = [Completion(str(n), prompt, counted(5 * n, 8 + n)) for n, prompt in enumerate(PROMPTS[:6])]
    start = (str(root / "start"), None)
    with make_reader(start, PROMPTS, LocalExecutor(workers=1)) as one:
        here = one.read(texts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "a third cache"))
    take_copies(monkeypatch)
    before = Copies.start

    def start_elsewhere(self: Copies, worker: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bfpo.policy.precision.computes_bfloat16", lambda: True)
            return before(self, worker)

    monkeypatch.setattr(Copies, "start", start_elsewhere)
    with make_reader(start, PROMPTS, LocalExecutor(workers=2)) as two:
        assert two.read(texts) == here


def test_the_likelihood_of_the_same_answers_is_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bfpo.judges.shared.PER_CALL", 7)
    texts = [Completion(str(n), prompt, counted(5 * n, 5 + n)) for n, prompt in enumerate(PROMPTS)]
    computed: list[int] = []
    nats = StartModel.nats
    monkeypatch.setattr(StartModel, "nats", lambda self, some: computed.append(len(some)) or nats(self, some))

    def read(some: list[Completion], name: str = "start", **settings: Any) -> list[Reading]:
        computed.clear()
        with make_reader((str(root / name), None), PROMPTS, LocalExecutor(), **settings) as reader:
            computed.clear()  # those of the calibration
            return reader.read(some)

    first = read(texts)
    assert computed == [7, 7, 7, 7, 2]
    assert read([replace(one, id=f"again-{one.id}") for one in texts]) == first  # ids say nothing of an answer
    assert computed == []
    cut = [*texts[:-1], replace(texts[-1], finished=False)]
    assert read(cut)[:28] == first[:28]
    assert computed == [2]
    template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"
    for settings in ({"name": "random"}, {"dtype": "float64"}, {"chat_template": template}):
        read(texts, **settings)
        assert computed == [7, 7, 7, 7, 2], settings
    shutil.copytree(root / "start", tmp_path / "other")
    config = tmp_path / "other" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    assert read(texts, str(tmp_path / "other")) != first  # the same weights behind another tokenizer
    assert computed == [7, 7, 7, 7, 2]
    files = sorted((tmp_path / "cache" / "bfpo" / "coherence").glob("nats-*.json"))
    for file in files:
        file.write_text("[1.0,")
    assert read(texts) == first
    assert computed == [7, 7, 7, 7, 2]


def test_a_cache_that_cannot_be_written_is_one_warning_a_reading(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bfpo.judges.shared.PER_CALL", 7)
    texts = [Completion(str(n), prompt, counted(5 * n, 5 + n)) for n, prompt in enumerate(PROMPTS)]
    readings = []
    for place in ("cache", "no folder"):
        (tmp_path / "no folder").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
        with make_reader((str(root / "start"), None), PROMPTS, LocalExecutor()) as reader:
            readings.append(reader.read(texts))
    assert readings[0] == readings[1]
    assert len([record for record in caplog.records if "cannot be kept" in record.message]) == 2  # of the bound, too


def test_a_start_model_behind_a_server_is_refused(root: Path) -> None:
    served = {"name": "far", "model": "x", "engine": "server", "url": "http://localhost:1/v1"}
    file = root / "config.yaml"
    file.write_text(yaml.safe_dump(config(root).resolved() | {"models": [served], "coherence": {"model": "far"}}))
    with raises(ConfigError, "coherence.model"):
        load_config(EvaluateConfig, file, [])


def test_completions_are_read(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "completions.jsonl"
    rows = [
        {"id": str(n), "prompt": counted(n, 4), "completion": counted(n + 4, 20), "kind": "benign"} for n in range(20)
    ]
    rows += [{"id": f"loop{n}", "prompt": counted(n, 4), "completion": "w1 w2 " * 20, "kind": ""} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "phrases.txt").write_text("/w/\n")
    judge = {"format": "refusal-phrases", "phrases": str(tmp_path / "phrases.txt")}
    given = {"completions": str(file), "judge": judge, "coherence": {"model": str(root / "start")}}
    path = run_stage("evaluate", EvaluateConfig.model_validate(given), tmp_path / "run").path
    scores = {score["metric"]: score for score in json.loads((path / "scores.json").read_text())["scores"]}
    assert (scores["coherent"]["value"], scores["coherent"]["num"]) == (0.5, 40)
    rows = [json.loads(line) for line in (path / "verdicts.jsonl").read_text().splitlines()]
    assert all(row["incoherent"][0] == "looping" for row in rows if row["completion_id"].startswith("loop"))
