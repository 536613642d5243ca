"""The sample of answers that people label, the labels on disk, and the rows that other commands read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bfpo.core.errors import BfpoError, DataError
from bfpo.core.schema import Message, Verdict
from bfpo.data.annotations import read_labels
from bfpo.judges.annotation import Annotations, Candidate, draw_sample, interval_words
from bfpo.stats import half_width
from messages import raises


def candidates(num: int = 60, answers: int = 1, models: tuple[str, ...] = ("start", "tuned")) -> list[Candidate]:
    """A third of the prompts is harmless; one answer in five is judged unsafe, some are unsure."""
    found = []
    for model in models:
        for n in range(num):
            for k in range(answers):
                p_safe = 0.1 if (n + k) % 5 == 0 else 0.5 if n % 7 == 0 else 0.9
                verdict = Verdict(f"p{n}", "j", "unsafe" if p_safe < 0.5 else "safe", p_safe=p_safe)
                kind = "benign" if n % 3 == 0 else "harmful"
                prompt = (Message("user", f"question {n}?"),)
                found.append(Candidate(f"p{n}", model, "s", kind, prompt, f"{model} {n} {k}", verdict=verdict))
    return found


def test_the_sample_is_balanced_by_kind_paired_by_prompt_and_stratified_by_verdict() -> None:
    sample = draw_sample(candidates(), 24, 0)
    assert (len(sample.answers), sample.num_drawn, sample.num_prompts) == (48, 24, 60)
    assert Counter(one.kind for one in sample.answers) == {"harmful": 24, "benign": 24}
    by_model = {model: {one.id for one in sample.answers if one.model == model} for model in ("start", "tuned")}
    assert by_model["start"] == by_model["tuned"]
    # 12 of 40 harmful and of 20 harmless prompts: the probabilities of inclusion.
    assert {one.inclusion for one in sample.answers if one.kind == "harmful"} == {0.3}
    assert {one.inclusion for one in sample.answers if one.kind == "benign"} == {0.6}
    # Unsafe verdicts: 8 of 40 harmful prompts, so 2 or 3 of 12, whatever the seed.
    for seed in range(20):
        drawn = [one for one in draw_sample(candidates(), 24, seed).answers if one.model == "start"]
        assert sum("unsafe" in one.stratum for one in drawn if one.kind == "harmful") in (2, 3)
    assert [one.item for one in sample.answers] == [str(n) for n in range(1, 49)]
    assert len({one.model for one in sample.answers[:8]}) == 2  # shuffled
    assert draw_sample(candidates(), 24, 0) == sample != draw_sample(candidates(), 24, 1)


def test_every_answer_is_drawn_as_often_as_it_says() -> None:
    times: Counter[str] = Counter()
    inclusion = {}
    uneven = [one for one in candidates(12, 3, ("m",)) if not (one.id == "p1" and one.text.endswith(("1", "2")))]
    for seed in range(400):
        for one in draw_sample(uneven, 6, seed).answers:
            times[one.text] += 1
            inclusion[one.text] = one.inclusion
    for text, count in times.items():
        assert count / 400 == pytest.approx(inclusion[text], abs=0.1), text
    assert len(times) == len(uneven)


def test_only_prompts_that_all_models_answered_and_each_text_once() -> None:
    both = [*candidates(10), *candidates(10), *candidates(14, models=("start",))]
    sample = draw_sample(both, 100, 0)
    assert len(sample.answers) == 20
    assert {one.inclusion for one in sample.answers} == {1.0}
    assert sample.left_out == {"prompts that not all models answered": 4}
    apart = [replace(one, prompt=(Message("user", "another"),)) for one in candidates(1, models=("tuned",))]
    with raises(DataError, "in common"):
        draw_sample([*candidates(3, models=("start",)), *apart], 10, 0)


def test_a_change_is_taken_back_to_the_label_before_also_by_the_next_run(tmp_path: Path) -> None:
    sample = draw_sample(candidates(), 5, 0)
    anna = Annotations(tmp_path, sample, "anna")
    anna.label("1", "safe", "refused")
    anna.label("2", "unsafe", "complied")
    anna.label("1", "unsafe", "complied")
    again = Annotations(tmp_path, sample, "anna")
    assert again.undo() == "1"
    assert again.said["1"].safety == "safe"
    last = Annotations(tmp_path, sample, "anna")
    assert {item: one.safety for item, one in last.said.items()} == {"1": "safe", "2": "unsafe"}
    assert (last.undo(), last.undo(), last.undo()) == ("2", "1", None)
    lines = (tmp_path / "annotators" / "anna" / "said.jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {"item": "1", "safety": "safe", "behaviour": "refused", "undone": True}
    assert [list(json.loads(line)) for line in lines[4:]] == [["item", "safety", "behaviour"]] * 2


def test_labels_survive_undo_a_crash_and_a_second_annotator(tmp_path: Path) -> None:
    sample = draw_sample(candidates(20), 10, 0)
    anna = Annotations(tmp_path, sample, "anna")
    for item in range(1, 9):
        anna.label(str(item), "unsafe" if item % 2 else "safe", "complied" if item % 2 else "refused")
    anna.label("9", "unreadable", "")
    anna.label("10", "cannot tell", "deflected")
    assert anna.undo() == "10"
    anna.label("3", "safe", "refused")  # changed later
    file = tmp_path / "annotators" / "anna" / "said.jsonl"
    with file.open("a", encoding="utf-8") as torn:
        torn.write('{"item": "11", "safety": "sa')
    again = Annotations(tmp_path, sample, "anna")
    assert again.said == anna.said
    assert "10" not in again.said
    again.label("10", "cannot tell", "deflected")
    assert '"sa{' not in file.read_text()
    assert Annotations(tmp_path, sample, "anna").said == again.said
    assert again.open_items[0].item == "11"
    ben = Annotations(tmp_path, sample, "ben")
    for item in range(1, 9):
        ben.label(str(item), "safe" if item in (2, 3, 4, 6, 7) else "unsafe", "refused")
    rows = {row.text: row for row in read_labels(ben.write())}
    by_item = {one.item: rows[one.text] for one in sample.answers if one.text in rows}
    assert len(rows) == 10
    assert (by_item["1"].is_safe, by_item["2"].is_safe, by_item["7"].is_safe) == (False, True, 0.5)
    assert (by_item["9"].is_safe, by_item["9"].harmless, by_item["9"].safe_and_readable) == (None, 1.0, 0.0)
    assert (by_item["10"].is_safe, by_item["10"].harmless, by_item["10"].refused) == (None, None, True)
    kappa = {score.metric: score for score in ben.agreement()}["cohen_kappa: safe, anna, ben"]
    # Of 8: anna safe 2 3 4 6 8, ben safe 2 3 4 6 7: agree on 6; by chance (25 + 9) / 64.
    assert kappa.value == pytest.approx((6 / 8 - 34 / 64) / (1 - 34 / 64))
    assert json.loads((tmp_path / "agreement.json").read_text())[0]["value"] == pytest.approx(kappa.value)


@pytest.mark.parametrize(
    ("item", "safety", "behaviour", "named"),
    [("99", "safe", "refused", "item"), ("1", "fine", "refused", "safety"), ("1", "safe", "", "behaviour"),
     ("1", "unreadable", "danced", "behaviour")],
)  # fmt: skip
def test_a_bad_label_is_refused(tmp_path: Path, item: str, safety: str, behaviour: str, named: str) -> None:
    with raises(DataError, named):
        Annotations(tmp_path, draw_sample(candidates(4), 2, 0), "anna").label(item, safety, behaviour)
    assert not (tmp_path / "annotators").exists()


@pytest.mark.parametrize(
    "line",
    ['{"item": "99", "safety": "safe", "behaviour": "refused"}', '{"item": "2", "safety": "fine", "behaviour": ""}',
     '{"item": "1", "safety": 5}', '{"item": "2", "saf', "\udcff"],
)  # fmt: skip
def test_a_line_that_no_crash_left_is_not_skipped(tmp_path: Path, line: str) -> None:
    sample = draw_sample(candidates(4), 2, 0)
    Annotations(tmp_path, sample, "anna").label("1", "safe", "refused")
    file = tmp_path / "annotators" / "anna" / "said.jsonl"
    file.write_bytes(file.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    with raises(BfpoError, "said.jsonl"):
        Annotations(tmp_path, sample, "anna")


def test_several_answers_to_a_prompt_are_one_prompt() -> None:
    sample = draw_sample(candidates(3, 4, ("m",)), 10, 0)
    assert (len(sample.answers), sample.num_asked, sample.num_prompts) == (10, 3, 3)


def test_the_interval_of_so_many_labels_is_said() -> None:
    sample = draw_sample(candidates(), 30, 0)
    words = interval_words(sample, 60)  # each model has 15 of the 20 benign prompts, 15 of the 40 harmful ones
    assert f"+-{100 * half_width(15, 20):.0f} points on benign prompts" in words
    assert f"+-{100 * half_width(15, 40):.0f} points on harmful prompts" in words
    assert "15 answers to harmful prompts" in interval_words(sample)
    harmful = draw_sample([one for one in candidates() if one.kind == "harmful"], 30, 0)
    assert f"about +-{100 * half_width(30, 40):.0f} points for each" in interval_words(harmful, 60)
    assert interval_words(sample, 0) == "no interval yet"
    assert interval_words(sample).startswith("20/30/40/60 labels")


_SAID = (
    '{"id": "1", "prompt": [], "text": "x", "is_safe": %s, "readable": true, "annotations": {"anna": {"safety": %s}}}'
)


@pytest.mark.parametrize(
    ("content", "named"),
    [("", "holds no answer"), ("{", "labels"), ('{"id": "1", "prompt": [], "text": "x", "is_safe": 3}', "is_safe"),
     ('{"id": "1", "prompt": [], "text": "x", "is_safe": true, "inclusion": 0}', "inclusion"),
     ('{"id": "1", "prompt": [], "text": "x", "is_safe": null}', "holds no answer"),
     (_SAID % ("false", '"safe"'), "is_safe"), (_SAID % ("true", '"save"'), "safety"),
     (_SAID % ("true", '"safe"') + "\n" + _SAID % ("false", '"unsafe"'), "line 1")],
)  # fmt: skip
def test_bad_files_of_labels_are_named(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(content, encoding="utf-8")
    with raises(DataError, named):
        read_labels(file)
    with raises(DataError, "missing.jsonl"):
        read_labels(tmp_path / "missing.jsonl")
