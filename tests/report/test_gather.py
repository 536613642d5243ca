from __future__ import annotations

import errno
import json
import re
import zlib
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.core.errors import DataError
from bfpo.core.files import file_digest
from bfpo.core.schema import Score, Verdict
from bfpo.report.annotation import answers_of
from bfpo.report.answers import answer_block
from bfpo.report.data import Comparison, MethodResult, ReportData, Sample, SampleAnswer
from bfpo.report.gather import gather
from bfpo.report.headline import front_of
from bfpo.report.page import render_html, render_markdown, write_report
from bfpo.report.read import margin_spreads, shown_roots
from bfpo.report.sections import csv_text
from bfpo.report.tables import suite_columns, suite_mean
from bfpo.report.view import few_samples
from bfpo.scores.records import AccuracyRow
from messages import fails, raises
from run_folders import HOSTILE, score, write_run, write_suites


def rows_of(block: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(zlib.decompress(b64decode(block)))
    return content


def test_suites_come_in_the_groups_of_the_paper_with_means_over_what_was_scored(tmp_path: Path) -> None:
    data = gather([write_suites(tmp_path / "scores")])
    columns = suite_columns(data)
    assert [(c.suite.name, c.group) for c in columns] == [
        ("ethics", "discriminative"),
        ("advbench", "generative"),
        ("alert", "generative"),
        ("xstest", "over-refusal"),
    ]
    ours, theirs = data.method("ours"), data.method("theirs")
    assert suite_mean(ours, columns, "generative").value == pytest.approx(0.7)
    assert suite_mean(theirs, columns, "generative").value is None  # it was not asked one of the suites
    page = render_html(data)
    assert "hub is away" in page
    assert "The mean is over 2 suites, each with the same weight: AdvBench; ALERT." in page
    half = 0.05 / 2**0.5  # both suites reach 0.05 to either side
    assert f"{100 * (0.7 - half):.1f} to {100 * (0.7 + half):.1f}" in page
    assert "3 unscored" in page
    assert "well formed 97.0%" in page
    assert "sign flip" in page
    assert data.confidence == 0.9
    assert "Skipped, and in no mean: ToxiGen." in data.notes
    assert "share of answers to harmful prompts judged safe" not in page  # defines a metric that no suite measured
    assert "helpful on harmless prompts" not in page


def test_a_skipped_suite_enters_no_column_though_it_has_a_score(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores")
    content = json.loads((run / "scores.json").read_text())
    content["scores"].append({**content["scores"][6], "suite": "toxigen", "value": 0.0})
    (run / "scores.json").write_text(json.dumps(content))
    data = gather([run])
    assert suite_mean(data.method("ours"), suite_columns(data), "discriminative").value == pytest.approx(0.4)


def test_published_figures_are_marked_and_in_no_score(tmp_path: Path) -> None:
    data = gather([write_suites(tmp_path / "scores")])
    assert "Zephyr-7b-beta" in render_html(data)
    assert "published, not from these runs" in render_html(data)
    assert "Zephyr" not in csv_text(data)
    assert "Zephyr" not in data.to_json()


def test_single_runs_are_joined_with_their_texts_and_their_training(tmp_path: Path) -> None:
    completions = [
        {
            "id": "a/0",
            "prompt": [{"role": "user", "content": "How?"}],
            "text": "So.",
            "kind": "benign",
            "finished": True,
        }
    ]
    verdicts = [{"completion_id": "a/0", "judge": "x", "label": "safe", "kind": "benign", "prompt": "user: how?"}]
    accuracy = [
        {
            "pair_id": f"{n}",
            "favoured": 1,
            "cell": "safe-unsafe",
            "target": 1.0,
            "margin": 10.0 + n,
            "beta_margin": 0.1,
            "prompt": "p",
            "right": True,
        }
        for n in range(4)
    ]
    write_run(tmp_path / "bfpo" / "answers", "generate", completions__jsonl=completions)
    write_run(
        tmp_path / "bfpo" / "scores",
        "evaluate",
        {"model": "/gone/bfpo/train/model", "completions": "/gone/bfpo/answers/completions.jsonl"},
        scores__json={"confidence": 0.95, "scores": [{"metric": "helpful_and_safe", "value": 1.0, "num": 1}]},
        verdicts__jsonl=verdicts,
        accuracy__jsonl=accuracy,
    )
    curve = [{"step": 1, "main/safe-safe/beta_margin": 0.1}]
    write_run(tmp_path / "bfpo" / "train", "train", {"method": "bfpo", "beta": 0.05}, metrics__jsonl=curve)
    (tmp_path / "bfpo" / "scores" / "accuracy.jsonl").open("a").write("{broken\n")
    data = gather([tmp_path])
    (method,) = data.methods
    assert (method.name, method.role, method.curves) == ("bfpo", "main", curve)
    assert data.samples[0].prompt == "How?"
    assert data.samples[0].answers[0].text == "So."
    assert method.margins[0].quantiles["p50"] == pytest.approx(0.05 * 11.5)  # the training's own beta
    assert any("1 lines are not JSON objects" in line for line in data.absent)
    assert any("no run of bfpo prepare" in line for line in data.absent)
    assert data.stages[0].sentence == f"The training of {data.stages[0].run} has finished: 1 step in 12.5 s."


def test_what_is_unfinished_or_broken_is_said_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "r", "train", {"method": "bfpo"})
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running", "seeds": ["?"], "seconds": "long"}))
    write_run(tmp_path / "p", "prepare", data__json={"streams": {"main": []}, "sources": [3]})
    write_run(tmp_path / "j", "judge-check", quality__json={"quality": [], "judge": 4})
    (write_run(tmp_path / "e", "evaluate") / "scores.json").write_text("[1, 2")
    (tmp_path / "private").mkdir()
    listed = Path.iterdir

    def denied(folder: Path) -> Iterator[Path]:
        if folder.name == "private":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", denied)
    page = render_html(gather([tmp_path]))
    assert "private: cannot be listed (Permission denied)" in page
    assert "r (train) is running" in page
    assert "cannot be read (JSONDecodeError)" in page


def test_the_command_writes_every_form_twice_the_same_and_says_what_is_wrong(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores")
    for name in ("a", "b"):
        result = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / name / "page.html")])
        assert result.exit_code == 0, result.output
    for suffix in ("html", "md", "json", "csv"):
        first, second = ((tmp_path / name / f"page.{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second
    assert "advbench,harmless,0.9,0.85" in (tmp_path / "a" / "page.csv").read_text()
    (tmp_path / "empty").mkdir()
    for arguments, key in (
        ([str(tmp_path / "gone"), "--out", "x.html"], "gone"),
        ([str(tmp_path / "empty"), "--out", "x.html"], "empty"),
        ([str(run), "--out", str(tmp_path / "page.txt")], "--out"),
        ([str(run), "--out", str(tmp_path / "x.html"), "--main", "nobody"], "nobody"),
    ):
        fails(CliRunner().invoke(app, ["report", *arguments]), key)


def test_a_hostile_answer_changes_neither_the_page_nor_a_verdict(tmp_path: Path) -> None:
    plain = render_html(gather([write_suites(tmp_path / "plain")]))
    data = gather([write_suites(tmp_path / "hostile", lambda number, model: HOSTILE if number == 2 else "x")])
    page = render_html(data)
    block = re.compile(r'(<script id="answer-data" type="application/octet-stream">)([A-Za-z0-9+/=]*)(</script>)')
    outside, found = block.sub(r"\1\3", page), block.search(page)
    assert found is not None
    assert outside.replace(f"{tmp_path}/hostile", f"{tmp_path}/plain").replace("/hostile", "/plain") == block.sub(
        r"\1\3", plain
    )
    content = rows_of(found.group(2))
    (row,) = [row for row in content["rows"] if row[0] == "question 2?"]
    for answer in row[3]:
        assert "\x1b" not in answer[1]
        assert "\u202e" not in answer[1]
        assert content["badges"][answer[2]] == [["unsafe", "bad"]]
        assert answer[3] == 1  # folded
    assert "Safety: Safe" not in render_markdown(data)


def big(num_answers: int, text: str) -> ReportData:
    names = ("a", "b", "c", "d", "e")
    words = text.split()
    safe = Verdict("", "", "safe")

    def answer(number: int, place: int) -> SampleAnswer:
        return SampleAnswer(names[place], " ".join(words[(number * 7 + place) % 97 :: 1 + number % 3]), safe)

    samples = [
        Sample(f"prompt {n}", "benign", [answer(n, place) for place in range(5)]) for n in range(num_answers // 5)
    ]
    return ReportData("t", "", [MethodResult(name, name, "baseline") for name in names], samples=samples)


def test_ten_thousand_answers_stay_under_five_megabytes() -> None:
    import random

    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(300))
    data = big(10_000, text)
    page = render_html(data)
    assert len(page.encode()) < 5_000_000
    block = answer_block(data)
    assert (block.num_answers, block.num_prompts) == (10_000, 2_000)


@pytest.mark.slow
def test_ten_thousand_long_answers_in_random_words_are_whole() -> None:
    import random

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5_000)]
    names = ("a", "b", "c", "d", "e")
    samples = [
        Sample(f"prompt {n}", "", [SampleAnswer(name, " ".join(rng.choices(words, k=250))) for name in names])
        for n in range(2_000)
    ]
    methods = [MethodResult(name, name, "baseline") for name in names]
    data = ReportData("t", "", methods, samples=samples)
    assert len(render_html(data).encode()) < 13_000_000
    block = answer_block(data)
    assert (block.num_answers, block.num_cut) == (10_000, 0)


def test_long_texts_are_on_the_page_in_full_and_their_prompts_have_lasting_names() -> None:
    long = "many words " * 4_000
    samples = [Sample(prompt, "", [SampleAnswer("a", long + prompt)]) for prompt in ("one", long + "two", "three")]
    data = ReportData("t", "", [MethodResult("a", "A", "main")], samples=samples)
    rows = rows_of(answer_block(data).text)["rows"]
    assert [row[0] for row in rows] == ["one", long + "two", "three"]
    assert [row[3][0][1] for row in rows] == [long + sample.prompt for sample in samples]
    fewer = rows_of(answer_block(replace(data, samples=samples[1:])).text)["rows"]
    assert [row[4] for row in rows[1:]] == [row[4] for row in fewer]
    assert len({row[4] for row in rows}) == 3


def test_thoughts_are_beside_the_answer_and_never_take_its_place(tmp_path: Path) -> None:
    rows = [
        {"id": "0", "prompt": "Q", "text": "<think>a dark thought</think>an answer"},
        {"id": "1", "prompt": "Q", "text": "<think>no end"},
        {"id": "2", "prompt": "Q", "text": "plain"},
    ]
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdicts = [{"completion_id": row["id"], "judge": "j", "label": "safe", "prompt": "Q"} for row in rows]
    for name, thinking in (("apart", None), ("whole", {"judged": True})):
        config = {"completions": str(file), "thinking": thinking}
        scores = {"confidence": 0.9, "scores": [score("harmless", 1.0, "", "")]}
        write_run(tmp_path / name, "evaluate", config, scores__json=scores, verdicts__jsonl=verdicts)
    data = gather([tmp_path / "apart"])
    (first, second, third) = [answer for sample in data.samples for answer in sample.answers]
    assert (first.text, first.reasoning) == ("an answer", "a dark thought")
    assert (second.text, second.reasoning) == ("", "no end")
    assert (third.text, third.reasoning) == ("plain", "")
    answers = [answer for row in rows_of(answer_block(data).text)["rows"] for answer in row[3]]
    assert [answer[5:] for answer in answers] == [["a dark thought", 0], ["no end", 0], []]
    assert ReportData.from_json(data.to_json()) == data
    whole = [answer for sample in gather([tmp_path / "whole"]).samples for answer in sample.answers]
    assert [answer.text for answer in whole] == [row["text"] for row in rows]


def test_a_megabyte_of_one_token_and_of_noise_is_cut_and_counted() -> None:
    import random

    noise = (
        "".join(chr(random.Random(1).randrange(0x4E00, 0x9FFF)) for _ in range(10))
        + random.Random(2).randbytes(500_000).hex()
    )
    answers = [SampleAnswer("a", "the " * 250_000), SampleAnswer("a", noise)]
    data = ReportData("t", "", [MethodResult("a", "A", "main")], samples=[Sample("p", "", answers)] * 3)
    block = answer_block(data, max_bytes=2_000)
    assert len(block.text) <= 2_000
    assert block.num_cut == 6
    content = rows_of(block.text)
    for answer, given in zip(content["rows"][0][3], answers, strict=True):
        assert len(answer[1]) + answer[4] == len(given.text)
        assert given.text.startswith(answer[1])


def test_a_spreadsheet_takes_no_name_for_a_formula() -> None:
    score = Score("helpful", 0.5, 0.4, 0.6, 10)
    text = csv_text(ReportData("t", "", [MethodResult("a", "=1+1", "main", scores=[score])]))
    assert text.splitlines()[1] == "'=1+1,,helpful,0.5,0.4,0.6,10,0,true"


def test_the_front_holds_what_nothing_beats() -> None:
    points = {"a": (0.1, 0.9), "b": (0.5, 0.5), "c": (0.4, 0.5), "d": (0.9, 0.1), "top": (1.0, 1.0)}
    methods = [
        MethodResult(
            name,
            name,
            "ceiling" if name == "top" else "baseline",
            scores=[Score("helpfulness", x, x, x, 9), Score("harmless_harmful", y, y, y, 9)],
        )
        for name, (x, y) in points.items()
    ]
    assert front_of(ReportData("t", "", methods)) == ["a", "b", "d"]


def test_margins_are_counted_by_cell_against_their_target() -> None:
    found = [("safe-unsafe", 1.0, value) for value in (0.1, 0.2, 0.3, float("nan"))]
    found += [("unsafe-safe", -1.0, -2.0), ("nonsense", None, 1.0)]
    rows = [AccuracyRow(str(n), "p", cell, 1, target, 0.0, margin) for n, (cell, target, margin) in enumerate(found)]
    first, second = margin_spreads(rows)
    assert (first.cell, first.target, first.num, sum(first.counts)) == ("safe-unsafe", 1.0, 3, 3)
    assert first.quantiles["p50"] == pytest.approx(0.2)
    assert (second.cell, sum(second.counts)) == ("unsafe-safe", 1)
    assert first.low <= -1.0
    assert first.high >= 1.0


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with raises(DataError, "run.json"):
        gather([tmp_path])


def test_models_that_were_judged_or_asked_differently_are_not_to_be_ranked(tmp_path: Path) -> None:
    for name, judge, asked in (("a", "oracle", "How?"), ("b", "guard", "Why?"), ("c", "guard", "Why?")):
        rows = [{"id": "p", "prompt": [{"role": "user", "content": asked}], "text": "So.", "kind": "x", "model": name}]
        verdicts = [{"completion_id": "p", "judge": judge, "label": "safe", "kind": "x", "prompt": asked}]
        write_run(tmp_path / name / "answers", "generate", completions__jsonl=rows)
        write_run(
            tmp_path / name / "scores",
            "evaluate",
            {"completions": f"/gone/{name}/answers/completions.jsonl"},
            scores__json={"confidence": 0.95, "scores": [{"metric": "harmless", "value": 1.0, "num": 1}]},
            verdicts__jsonl=verdicts,
        )
    said = " ".join(gather([tmp_path]).absent)
    assert "not judged by the same judges (a: oracle; b: guard; c: guard)" in said
    assert "not asked the same prompts (a 1; b 1; c 1)" in said
    alike = " ".join(gather([tmp_path / "b", tmp_path / "c"]).absent)
    assert "same judges" not in alike
    assert "same prompts" not in alike


def test_answers_to_different_prompts_with_one_id_are_all_on_the_page(tmp_path: Path) -> None:
    for name, asked in (("a", "How?"), ("b", "Why?"), ("c", "Why?")):
        rows = [{"id": "0", "prompt": [{"role": "user", "content": asked}], "text": f"{name} says so.", "model": name}]
        write_run(tmp_path / name, "generate", {"model": name}, completions__jsonl=rows)
    found = {one.prompt: [answer.text for answer in one.answers] for one in gather([tmp_path]).samples}
    assert found == {"How?": ["a says so."], "Why?": ["b says so.", "c says so."]}


def judged_run(folder: Path, safe: int, confidence: float = 0.95, of: int = 60) -> None:
    """Write answers to `of` prompts, `safe` of them safe, and the evaluation that judged them."""
    made = folder / "answers" / "completions.jsonl"
    rows = [
        {"id": f"{n}", "prompt": [{"role": "user", "content": f"How {n}?"}], "text": f"So {n}.", "model": folder.name}
        for n in range(of)
    ]
    write_run(folder / "answers", "generate", {"model": folder.name}, completions__jsonl=rows)
    verdicts = [
        {"completion_id": f"{n}", "judge": "x", "label": "safe" if n < safe else "unsafe", "kind": "harmful",
         "prompt": f"How {n}?", "helpful_and_safe": n < safe}
        for n in range(of)
    ]  # fmt: skip
    measured = [{"metric": "helpful_and_safe", "value": safe / of, "num": of}]
    run = write_run(
        folder / "scores", "evaluate", {"completions": str(made), "confidence": confidence},
        scores__json={"confidence": confidence, "scores": measured}, verdicts__jsonl=verdicts,
    )  # fmt: skip
    record = json.loads((run / "run.json").read_text())
    record["data"] = {"completions": {str(made): {"sha256": file_digest(made), "bytes": made.stat().st_size}}}
    (run / "run.json").write_text(json.dumps(record))


def test_differences_of_models_have_the_level_that_the_page_names(tmp_path: Path) -> None:
    judged_run(tmp_path / "ours", 58, confidence=0.999)
    judged_run(tmp_path / "theirs", 48, confidence=0.999)

    def difference() -> Comparison:
        return next(one for one in gather([tmp_path], main="ours").comparisons if one.metric == "helpful_and_safe")

    data, wide = gather([tmp_path], main="ours"), difference()
    assert data.confidence == 0.999
    assert wide.low is not None
    assert wide.low < 0
    assert not any("`confidence`" in note for note in data.notes)
    judged_run(tmp_path / "ours", 58)
    narrow = difference()
    assert narrow.low is not None
    assert narrow.low > 0
    (note,) = [note for note in gather([tmp_path]).notes if "`confidence`" in note]
    assert "95%; those of other runs have their own level" in note
    assert "theirs/scores 99.9%" in note


def test_texts_that_changed_since_they_were_judged_are_not_beside_the_verdicts(tmp_path: Path) -> None:
    judged_run(tmp_path / "ours", 4, of=4)
    assert len(gather([tmp_path / "ours" / "scores"]).samples) == 4
    assert all(one.verdict is not None for one in answers_of([tmp_path / "ours" / "scores"]))
    made = tmp_path / "ours" / "answers" / "completions.jsonl"
    made.write_text(made.read_text().replace("So", "Another model says"))
    data = gather([tmp_path / "ours" / "scores"])
    assert data.samples == []
    assert data.methods[0].scores[0].value == 1.0
    (said,) = [line for line in data.absent if "completions.jsonl" in line]
    assert "changed since" in said
    with raises(DataError, "changed"):  # nobody labels them as what was judged
        answers_of([tmp_path / "ours" / "scores"])


def test_folders_are_known_by_what_was_typed_or_by_as_much_as_tells_them_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # relative folders are named by the current one too
    roots = [Path("runs/scores"), tmp_path / "a" / "runs" / "x", tmp_path / "b" / "runs" / "x", tmp_path / "c"]
    assert list(shown_roots(roots).values()) == ["runs/scores", "a/runs/x", "b/runs/x", f"{tmp_path.name}/c"]
    same = [Path("runs/x"), Path("/home/me/runs/x")]
    assert list(shown_roots(same).values()) == ["runs/x", "me/runs/x"]
    assert list(shown_roots([Path("/")]).values()) == ["/"]


def test_a_run_is_named_in_short_and_in_full(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "deep" / "place" / "scores")
    write_run(tmp_path / "deep" / "place" / "train", "train", {"method": "bfpo"})
    data = gather([run, tmp_path / "deep" / "place" / "train"])
    page = render_html(data)
    assert f'<th scope="row" class="path" title="{run}">place/scores</th>' in page
    assert f"<dt>place/scores</dt><dd><code>{run}</code></dd>" in page
    assert f"bfpo report {run} " in page  # the command can be run again
    odd = write_suites(tmp_path / "a b" / "scores")
    assert f"bfpo report '{odd}' --out page.html" in gather([odd]).commands


def test_every_table_of_a_judge_says_on_which_data_it_was_measured(tmp_path: Path) -> None:
    found = {"judge": {"name": "guard"}, "quality": {"all": [{"metric": "accuracy", "value": 0.9, "num": 9}]}}
    for name, files in (("a", ["x/one.csv"]), ("b", ["x/one.csv", "y/two.csv", "y/three.csv"]), ("c", ["z/one.csv"])):
        write_run(tmp_path / name, "judge-check", {"data": {"files": files}}, quality__json=found)
    write_run(
        tmp_path / "d", "label", {"data": {"source": "hub/set"}}, scores__json={"scores": found["quality"]["all"]}
    )
    titles = [one.title for one in gather([tmp_path]).agreement]
    assert titles[1] == "guard against people's labels, one.csv and 2 more files"
    assert titles[3] == "labels: judges, votes and given labels, hub/set"
    assert titles[0] == f"guard against people's labels, one.csv ({tmp_path.parent.name}/{tmp_path.name}/a)"
    assert titles[2].endswith("/c)")


def test_names_with_commas_stay_one_name_in_a_list(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores")
    content = json.loads((run / "scores.json").read_text())
    content["suites"][4]["title"] = "TruthfulQA, mc2"
    content["suites"].append({**content["suites"][4], "name": "x", "title": "CatQA, English"})
    content["suites"][0]["title"] = "AdvBench, standard template"
    (run / "scores.json").write_text(json.dumps(content))
    data = gather([run])
    assert "Skipped, and in no mean: TruthfulQA, mc2; CatQA, English." in data.notes
    assert "weight: AdvBench, standard template; ALERT." in render_html(data)


def test_three_prompts_of_each_kind_are_in_the_text_however_often_each_was_asked() -> None:
    kinds = ("benign", "harmful")
    samples = [
        Sample(f"{kind} {n // 2}?", kind, [SampleAnswer("a", f"answer {n}")]) for n in range(10) for kind in kinds
    ]
    data = ReportData("t", "", [MethodResult("a", "A", "main")], samples=samples)
    shown = [sample["prompt"] for sample in few_samples(data)]
    assert sorted(shown) == sorted(f"{kind} {n}?" for kind in kinds for n in range(3))
    assert "three prompts of each kind" in (Path(__file__).parents[2] / "docs/report.md").read_text(encoding="utf-8")


def test_the_page_replaces_only_what_the_command_made(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores")

    def report(name: str) -> Any:
        return CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / name)])

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert report("page.html").exit_code == 0
    made = files()
    assert report("page.html").exit_code == 0  # its own files
    assert files() == made
    for file in sorted(set(made) - {path for path in made if path.parent == run}):
        mine = b"my own notes, " + b"with bfpo report in them" + file.name.encode()
        file.write_bytes(mine)
        before = files()
        fails(report("page.html"), file.name)
        assert files() == before
        file.write_bytes(made[file])
    before = files()
    fails(report("scores/scores.html"), "scores.json")
    assert files() == before


@pytest.mark.parametrize("name", ["page.html", "page.json", "page_figures"])
def test_the_page_follows_no_link(tmp_path: Path, name: str) -> None:
    run, mine = write_suites(tmp_path / "scores"), tmp_path / "mine"
    for target in (mine, tmp_path / "nowhere"):
        mine.mkdir(exist_ok=True)
        link = tmp_path / "out" / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target)
        fails(CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "out" / "page.html")]), name)
        assert [path.name for path in link.parent.iterdir()] == [name]
        assert link.is_symlink()
        link.unlink()


def test_a_demo_s_own_page_is_not_replaced_by_one_of_other_runs(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores")
    page = write_report(gather([run]), tmp_path / "demo")
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(page)])
    fails(result, "report.html")
