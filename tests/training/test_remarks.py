"""The remarks on a run, on the figures of runs of SmolLM2-135M-Instruct that did and did not do what they name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bfpo.training.records import ProbeAnswer, ProbeFile, ProbeRow
from bfpo.training.remarks import remarks_on


def pair_rows(of_start: float = 0.6, num: int = 8, **figures: float) -> list[dict[str, Any]]:
    """Rows of `train` whose last quarter has these figures, such as `main_accuracy`; 16 pairs of each stream a row."""
    named = {name.replace("_", "/", 1): value for name, value in figures.items()}
    streams = {name.partition("/")[0] for name in named}
    first = {"loss": 1.0, "loss_over_start": 1.0, **dict.fromkeys(named, 0.5)}
    last = {"loss": of_start, "loss_over_start": of_start, **named}
    return [
        {"step": row, **(last if row >= num * 3 // 4 else first), **{f"{name}/num_pairs": 16 for name in streams}}
        for row in range(num)
    ]


def probed(num: int, before: int, now: int, *, harmless: tuple[int, int, int] | None = None) -> ProbeFile:
    """A probe of `num` harmful prompts of which so many are refused at the start and now, and of harmless ones."""

    def answer(refuses: bool, text: str) -> ProbeAnswer:
        return ProbeAnswer(text, "refused" if refuses else "complied", -1.0 if refuses else -9.5, -3.9)

    rows = []
    for kind, (count, old, new) in {"harmful": (num, before, now), "harmless": harmless or (0, 0, 0)}.items():
        rows += [
            ProbeRow(f"{kind}/{place}", kind, "?", answer(place < old, "a"), answer(place < new, "b"))
            for place in range(count)
        ]
    return ProbeFile(30, rows)


def codes(*arguments: Any) -> list[str]:
    return [remark.code for remark in remarks_on(*arguments)]


@pytest.mark.parametrize(
    ("of_start", "said"),
    [
        (0.59, []),
        (0.95, []),
        (0.97, []),
        (0.99, ["learned_nothing"]),
        (1.003, ["learned_nothing"]),
        (1.04, ["learned_nothing"]),
        (1.06, ["loss_rose"]),
        (4.0, ["loss_rose"]),
    ],
)
def test_a_loss_that_ends_where_it_began_or_above(of_start: float, said: list[str]) -> None:
    assert codes(pair_rows(of_start), {}) == said
    assert codes(pair_rows(of_start, num=2), {}) == said
    scored = [{"step": 0, "sample_loss": 2.5}, {"step": 1, "loss": 9.0}, {"step": 1, "sample_loss": 2.5 * of_start}]
    assert codes(scored, {}) == said
    advice = "".join(remark.text for remark in remarks_on(scored, {}))
    assert ("lower learning_rate" in advice) == (said == ["loss_rose"])
    assert ("raise learning_rate" in advice) == (said == ["learned_nothing"])


def test_rows_of_an_imitation_are_means_over_other_completions_and_say_nothing() -> None:
    """Of a real run of 60 steps, after which 71 of 80 probe answers were others."""
    noise = [0.2528, 0.2962, 0.2727, 0.2646, 0.2556, 0.2926]
    rows: list[dict[str, Any]] = [{"step": 10 * n, "loss": loss} for n, loss in enumerate(noise, start=1)]
    assert not codes(rows, {})
    assert not codes([{"step": 0, "sample_loss": 0.26}, *rows], {})  # a run that was stopped
    assert not codes([{"step": 0, "sample_loss": 0.26}, *rows, {"step": 60, "sample_loss": 0.23}], {})
    assert not codes([{"step": 1, "loss": 2.5, "eval_loss": 2.0}], {})
    assert not codes([{"step": 1, "loss": float("nan"), "loss_over_start": float("nan")}], {})
    assert not codes([{"step": step, "sample_loss": float("nan")} for step in (0, 1)], {})


def test_pairs_that_ask_for_nothing_are_said_to_teach_nothing() -> None:
    rows = [{"step": n, "loss": 0.0, "main/loss_at_start": 0.0, "main/num_pairs": 2} for n in range(3)]
    (remark,) = remarks_on(rows, {})
    assert remark.code == "learned_nothing"
    assert "all pairs are dropped by the method" in remark.text
    assert not codes([*rows, {"step": 3, "loss": 0.1, "main/loss_at_start": 0.5, "main/num_pairs": 2}], {})
    assert not codes([{**row, "buffer/loss_at_start": 0.7} for row in rows], {})
    moved = [{**row, "main/loss": -0.1 * row["step"]} for row in rows]  # as of kldo, whose loss begins at 0
    assert not codes(moved, {})
    assert codes([{**row, "main/loss": 0.0} for row in rows], {}) == ["learned_nothing"]


def test_a_stream_that_loses_is_named_with_the_setting_to_change() -> None:
    (remark,) = remarks_on(pair_rows(main_accuracy=0.97, buffer_accuracy=0.68), {"buffer_weight": 1.0})
    assert remark.code == "stream_loses"
    assert "the buffer stream loses: accuracy 0.68 beside 0.97" in remark.text
    assert "raise buffer_weight (it is 1, try 2)" in remark.text
    (other,) = remarks_on(pair_rows(main_accuracy=0.7, buffer_accuracy=0.99), {"buffer_weight": 2.0})
    assert "the main stream loses" in other.text
    assert "lower buffer_weight (it is 2, try 1)" in other.text
    assert not codes(pair_rows(main_accuracy=0.98, buffer_accuracy=0.94), {"buffer_weight": 2.0})
    assert not codes(pair_rows(main_accuracy=0.97), {})
    assert not codes(pair_rows(main_accuracy=0.75, buffer_accuracy=0.55, num=2), {})  # 16 pairs each: chance
    dropped = {"main/num_pairs": 160, "main/dropped_pairs": 144, "buffer/num_pairs": 160, "buffer/dropped_pairs": 144}
    rows = [{**row, **dropped} for row in pair_rows(main_accuracy=0.75, buffer_accuracy=0.55, num=2)]
    assert not codes(rows, {})  # and so are 16 that the method does not drop


def test_no_two_remarks_on_a_run_name_opposite_changes() -> None:
    """DPO safe-first on SmolLM2, one round: less weight to the buffer would have added needless refusals."""
    rows = pair_rows(num=24, main_accuracy=0.7125, buffer_accuracy=0.95, main_favoured_drift_per_token=-0.35)
    settings = {"buffer_weight": 1.5, "anchor_weight": 0.075, "beta": 0.05, "learning_rate": 1e-4}
    found = {remark.code: remark.text for remark in remarks_on(rows, settings)}
    assert found["stream_loses"].endswith(
        "raise anchor_weight (it is 0.075) or beta (0.05), or lower learning_rate (0.0001)"
    )
    assert "buffer_weight" not in found["stream_loses"]
    assert "Raise anchor_weight" in found["favoured_falls"]
    probe = probed(40, 20, 36, harmless=(40, 6, 30))
    refusing = pair_rows(main_accuracy=0.7, buffer_accuracy=0.99)
    assert "lower buffer_weight" in next(iter(remarks_on(refusing, settings))).text
    found = {remark.code: remark.text for remark in remarks_on(refusing, settings, probe)}
    assert "more weight" in found["over_refusal"]
    assert "buffer_weight" not in found["stream_loses"]
    found = {remark.code: remark.text for remark in remarks_on([{**row, "loss_over_start": 1.0} for row in rows], {})}
    assert "raise learning_rate" not in found["learned_nothing"]
    assert "lower learning_rate" in found["favoured_falls"]
    collapsed = {remark.code: remark.text for remark in remarks_on(pair_rows(0.99), {}, answered("Once", "complied"))}
    assert "raise learning_rate" not in collapsed["learned_nothing"]
    assert "lower learning_rate" in collapsed["one_answer"]


@pytest.mark.parametrize(
    ("accuracy", "drift", "said"),
    [(0.95, -0.151, True), (1.0, -0.151, True), (0.98, 0.008, False), (0.8, 0.07, False), (0.55, -0.3, False)],
)
def test_accuracy_that_rises_while_the_favoured_answers_fall(accuracy: float, drift: float, said: bool) -> None:
    rows = pair_rows(main_accuracy=accuracy, main_favoured_drift_per_token=drift)
    assert (codes(rows, {}) == ["favoured_falls"]) == said
    if said:
        (remark,) = remarks_on(rows, {"anchor_weight": 0.075})
        assert "0.151 nats a token" in remark.text
        assert "anchor_weight (it is 0.075)" in remark.text


@pytest.mark.parametrize(
    ("num", "before", "now", "changed"),
    [
        (200, 5, 6, False),
        (20, 1, 4, False),
        (40, 35, 40, False),
        (40, 36, 37, False),  # -8 to +13 points: on 384 other prompts this model refused 11 points more
        (20, 1, 15, True),
        (100, 7, 76, True),
        (60, 0, 4, False),
        (4, 0, 4, False),
    ],
)
def test_behaviour_is_judged_by_a_paired_test(num: int, before: int, now: int, changed: bool) -> None:
    found = remarks_on([], {}, probed(num, before, now))
    assert [remark.code for remark in found] == ["behaviour_changed" if changed else "behaviour_unchanged"]
    assert f"of {num} harmful prompts {now} are refused, {before} at the start" in found[0].text
    assert ("so few prompts cannot show a change" in found[0].text) == (num == 4)
    unchanged = "behaviour unchanged" if num == 200 else "no change of behaviour shown"
    assert found[0].text.startswith("behaviour changed" if changed else unchanged)
    assert found[0].level == ("note" if changed else "warning")


def test_unchanged_is_said_where_a_change_is_ruled_out_or_every_answer_is_the_same() -> None:
    start = "behaviour unchanged: of"
    assert remarks_on([], {}, probed(40, 3, 3))[0].text.startswith(start)  # -9 to +9 points
    assert remarks_on([], {}, probed(200, 5, 6))[0].text.startswith(start)
    assert remarks_on([], {}, probed(20, 3, 3))[0].text.startswith("no change of behaviour shown")
    same = probed(20, 3, 3)
    rows = [replace(row, now=row.start) for row in same.rows]
    assert remarks_on([], {}, replace(same, rows=rows))[0].text.startswith(start)


def test_needless_refusals_are_named_and_behaviour_comes_last() -> None:
    found = remarks_on(pair_rows(0.99), {}, probed(20, 0, 12, harmless=(20, 0, 15)))
    assert [remark.code for remark in found] == ["learned_nothing", "over_refusal", "behaviour_changed"]
    assert "75%, before 0%" in found[1].text
    assert codes([], {}, probed(20, 0, 12, harmless=(20, 0, 2))) == ["behaviour_changed"]


def answered(text: str, reading: str, *, num: int = 16, alike: int = 16, at_start: int = 0) -> ProbeFile:
    """A probe of `num` prompts of which `alike` are answered with one text, `at_start` of them at the start too."""
    rows = []
    for place in range(num):
        start, now = (
            ProbeAnswer(text if place < count else f"answer {place}", reading if place < count else "complied")
            for count in (at_start, alike)
        )
        rows.append(ProbeRow(f"{place}", "harmful" if place % 2 else "harmless", f"prompt {place}", start, now))
    return ProbeFile(30, rows)


def test_one_answer_to_most_prompts_is_a_change_and_named_last() -> None:
    story = "Once upon a time, there was a little girl named Lily."
    found = remarks_on([], {}, answered(story, "complied"))
    assert [remark.code for remark in found] == ["behaviour_changed", "one_answer"]
    assert found[1].text.startswith(f"16 of 16 prompts get one and the same answer, {story!r}, 0 at the start")
    assert codes([], {}, answered(story, "not read", alike=9))[-1] == "one_answer"
    assert "one_answer" not in codes([], {}, answered(story, "complied", alike=8))  # half of them
    assert "one_answer" not in codes([], {}, answered(story, "refused"))
    assert "one_answer" not in codes([], {}, answered(story, "complied", at_start=9))
    assert "one_answer" not in codes([], {}, answered(story, "complied", num=3, alike=3))
    same = answered(story, "complied")  # one prompt, asked often
    assert "one_answer" not in codes([], {}, replace(same, rows=[replace(row, prompt="?") for row in same.rows]))


def test_a_run_without_a_probe_says_nothing_of_behaviour() -> None:
    assert not codes(pair_rows(0.6), {})
    assert not codes(pair_rows(0.6), {}, ProbeFile())
