"""What stands behind a verdict on the page: probabilities and thresholds, raw outputs, the other judges, categories."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

from bfpo.core.schema import Verdict
from bfpo.report.answers import answer_block, behind
from bfpo.report.data import MethodResult, ReportData, Sample, SampleAnswer
from bfpo.report.gather import gather
from run_folders import score, write_run


def content_of(data: ReportData, **limit: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(answer_block(data, **limit).text)))
    return found


def panel_run(folder: Path) -> Path:
    """A red-team run of two judges that disagree on its last answer, and agree on the others."""
    rows = [{"id": str(n), "prompt": f"Question {n}", "text": f"answer {n}"} for n in range(3)]
    verdicts = []
    for n in range(3):
        second = "unsafe" if n == 2 else "safe"
        votes = [
            {"judge": "guard", "label": "safe", "p_safe": 0.9, "raw": "Safety: Safe"},
            {"judge": "probe", "label": second, "p_safe": 0.4 if n == 2 else 0.8},
        ]
        verdicts.append(
            {"completion_id": str(n), "judge": "any_unsafe of guard, probe", "label": second,
             "p_safe": votes[1]["p_safe"], "prompt": f"Question {n}", "votes": votes,
             "category": "weapons" if n else "fraud"}
        )  # fmt: skip
    config = {"model": "m", "judges": [{"format": "trained", "name": "probe", "model": "gone", "threshold": 0.55}]}
    run = write_run(folder, "redteam", config)
    for name, lines in (("generate/completions.jsonl", rows), ("label/verdicts.jsonl", verdicts)):
        (run / name).parent.mkdir()
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_panel_shows_every_judge_and_its_disagreements_come_first(tmp_path: Path) -> None:
    data = gather([panel_run(tmp_path / "red")])
    assert ReportData.from_json(data.to_json()) == data
    content = content_of(data)
    assert [row[0] for row in content["rows"]] == ["Question 2", "Question 0", "Question 1"]
    assert [row[7] for row in content["rows"]] == ["weapons", "fraud", "weapons"]
    first, second = (row[3][0] for row in content["rows"][:2])
    assert ["judges differ", "note"] in content["badges"][first[2]]
    assert ["judges differ", "note"] not in content["badges"][second[2]]
    assert first[5:7] == ["", 0]
    assert first[7] == [
        ["All, any_unsafe of guard, probe", "unsafe\np(safe) 0.400"],
        ["guard", "safe\np(safe) 0.900\noutput: Safety: Safe"],
        ["probe", "unsafe\np(safe) 0.400, safe from 0.55 on"],
    ]


def label_run(folder: Path) -> tuple[Path, Path]:
    """A run of `label` by two judges, and the completions that it read."""
    red = panel_run(folder / "red")
    config = {"completions": str(red / "generate" / "completions.jsonl"), "judges": ["guard", "probe"]}
    rows = [json.loads(line) for line in (red / "label/verdicts.jsonl").read_text().splitlines()]
    return write_run(folder / "label", "label", config, verdicts__jsonl=rows), Path(config["completions"])


def test_a_run_of_label_shows_its_answers_and_measures_nothing(tmp_path: Path) -> None:
    data = gather([label_run(tmp_path)[0]])
    answers = {one.prompt: one.answers[0] for one in data.samples}
    assert {name: one.judges_differ for name, one in answers.items()} == {
        "Question 0": False, "Question 1": False, "Question 2": True,
    }  # fmt: skip
    assert [name for name, _ in behind(answers["Question 2"], 99)] == [
        "All, any_unsafe of guard, probe", "guard", "probe",
    ]  # fmt: skip
    assert not [method for method in data.methods if method.scores]


def test_what_other_judges_said_of_the_evaluated_answers_stands_beside_the_verdict(tmp_path: Path) -> None:
    label, completions = label_run(tmp_path)
    verdicts = [
        {"completion_id": str(n), "judge": "guard", "label": "safe", "p_safe": 0.9, "prompt": f"Question {n}"}
        for n in range(3)
    ]
    scores = {"confidence": 0.9, "scores": [score("harmless", 1.0, "", "")]}
    config = {"completions": str(completions), "judge": "guard"}
    run = write_run(tmp_path / "run", "evaluate", config, scores__json=scores, verdicts__jsonl=verdicts)
    data = gather([run, label])
    answers = {one.prompt: one.answers for one in data.samples}
    assert sorted(map(len, answers.values())) == [1, 1, 1]
    assert [text for _, text in behind(answers["Question 2"][0], 99)] == [
        "safe\np(safe) 0.900\noutput: Safety: Safe", "unsafe\np(safe) 0.400",
    ]  # fmt: skip
    assert not [note for note in data.notes if "training data" in note]  # the labels are of the evaluated answers


def test_one_judge_shows_its_output_and_the_threshold_of_its_folder(tmp_path: Path) -> None:
    judge = tmp_path / "judge" / "model"
    judge.mkdir(parents=True)
    (judge / "judge.json").write_text(json.dumps({"kind": "ngrams", "name": "mine", "settings": {"threshold": 0.7}}))
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"id": "0", "prompt": "Q", "text": "A"}) + "\n")
    verdict = {
        "completion_id": "0",
        "judge": "mine",
        "label": "safe",
        "p_safe": 0.75,
        "raw": "yes\n" * 50,
        "prompt": "Q",
    }
    config = {"completions": str(file), "judge": {"format": "trained", "model": str(judge)}}
    scores = {"confidence": 0.9, "scores": [score("harmless", 1.0, "", "")]}
    write_run(tmp_path / "run", "evaluate", config, scores__json=scores, verdicts__jsonl=[verdict])
    (answer,) = (answer for sample in gather([tmp_path / "run"]).samples for answer in sample.answers)
    assert answer.thresholds == {"mine": 0.7}
    assert behind(answer, 8) == [("mine", "p(safe) 0.750, safe from 0.7 on\noutput: yes\nyes\n [192 more characters]")]


def test_a_bare_label_has_nothing_behind_it_and_writes_nothing_new() -> None:
    answer = SampleAnswer("a", "text", Verdict("0", "oracle", "safe"))
    data = ReportData("t", "", [MethodResult("a", "A", "main")], samples=[Sample("?", "", [answer])])
    assert behind(answer, 100) == behind(SampleAnswer("a", "text"), 100) == []
    (row,) = content_of(data)["rows"]
    assert len(row) == 7
    assert len(row[3][0]) == 5
    assert not {"votes", "thresholds", "category"} & json.loads(data.to_json())["samples"][0]["answers"][0].keys()


def test_a_megabyte_of_raw_output_is_cut_until_the_page_has_room_for_it() -> None:
    import random

    noise = "".join(random.Random(0).choices("abcdefghij", k=1_000_000))
    answer = SampleAnswer("a", "text", Verdict("0", "guard", "safe", raw=noise))
    data = ReportData("t", "", [MethodResult("a", "A", "main")], samples=[Sample("?", "", [answer])])
    assert len(answer_block(data, max_bytes=20_000).text) <= 20_000
    shown = content_of(data, max_bytes=20_000)["rows"][0][3][0]
    assert shown[1] == "text"
    assert "more characters]" in shown[7][0][1]
