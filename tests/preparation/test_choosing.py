from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo.config.prepare import MixtureSourceConfig
from bfpo.core.errors import ConfigError, DataError, LabelError
from bfpo.preparation.mixture import apply_shares, split_hash
from helpers import write_rows
from messages import raises
from mixtures import prepare, row, rows_of, source


def split_by_prompt(out: Path, stream: str = "main") -> dict[str, str]:
    return {
        each["prompt"][0]["content"]: split for split, rows in rows_of(out, stream).items() for each in rows
    }  # fmt: skip


def test_splits_follow_from_the_prompt_and_stay_when_rows_are_added(tmp_path: Path) -> None:
    rows = [row(i) for i in range(200)]
    prepare(tmp_path / "few", [source(tmp_path / "a.jsonl", rows[:100])])
    prepare(tmp_path / "all", [source(tmp_path / "b.jsonl", rows[::-1])])
    few, all_of_them = split_by_prompt(tmp_path / "few"), split_by_prompt(tmp_path / "all")
    assert len(all_of_them) == 200
    assert few.items() <= all_of_them.items()
    assert {10 < list(all_of_them.values()).count(split) < 150 for split in ("train", "validation", "test")} == {True}
    prepare(tmp_path / "seed", [source(tmp_path / "c.jsonl", rows)], seed=1)
    assert split_by_prompt(tmp_path / "seed") != all_of_them


def test_one_prompt_is_on_one_side_in_every_stream(tmp_path: Path) -> None:
    rows = [row(i, prompt=f"{row(i // 2)['prompt']}{' ' * (i % 2)}".swapcase()) for i in range(60)]
    sources = [
        source(tmp_path / "a.jsonl", rows),
        source(tmp_path / "b.jsonl", [row(i) for i in range(30)], stream="buffer"),
        source(tmp_path / "c.jsonl", [row(i) for i in range(30)], stream="sft"),
    ]
    out = prepare(tmp_path / "out", sources).path
    sides = {prompt.casefold().strip(): split for prompt, split in split_by_prompt(out).items()}
    assert len(sides) == 30
    for stream in ("buffer", "sft"):
        for prompt, split in split_by_prompt(out, stream).items():
            assert sides[prompt] == split


def test_prompts_that_are_all_one_group_name_the_setting(tmp_path: Path) -> None:
    rows = [row(i, prompt=f"Tell me everything about the river number {i}") for i in range(30)]
    files = [source(tmp_path / "a.jsonl", rows)]
    failed = []
    for seed in range(12):
        try:
            prepare(tmp_path / str(seed), files, seed=seed)
        except DataError as error:
            failed.append(str(error))
    assert failed
    for message in failed:
        assert message == failed[0]
        assert "{" not in message
        assert message.endswith("set near_duplicates to null")


def test_near_duplicates_go_where_the_smallest_hash_of_their_group_goes(tmp_path: Path) -> None:
    families = [[row(i)["prompt"] + ending for ending in ("", "!", "?", " a")] for i in range(25)]
    rows = [row(i, prompt=prompt) for i, prompt in enumerate(prompt for family in families for prompt in family)]
    files = [source(tmp_path / "a.jsonl", rows)]
    together = split_by_prompt(prepare(tmp_path / "near", files).path)
    apart = split_by_prompt(prepare(tmp_path / "none", files, near_duplicates=None).path)
    assert all(len({together[prompt] for prompt in family}) == 1 for family in families)
    assert any(len({apart[prompt] for prompt in family}) > 1 for family in families)
    counts = prepare(tmp_path / "again", files).read_json("data.json")["near_duplicates"]
    moved = sum(together[prompt] != apart[prompt] for prompt in together)
    assert counts == {"prompts": 100, "prompts_in_groups": 100, "groups": 25, "prompts_moved": moved}
    # The order of severity is that of the hash: a family with any prompt in test is in test.
    for family in families:
        order = ("test", "validation", "train")
        assert together[family[0]] == min((apart[prompt] for prompt in family), key=order.index)


def test_a_system_message_that_all_rows_share_makes_no_near_duplicates(tmp_path: Path) -> None:
    system = " ".join(row(-1 - i)["prompt"] for i in range(10))
    rows = [{**row(i), "system": system} for i in range(100)]
    made = prepare(tmp_path / "out", [source(tmp_path / "a.jsonl", rows)])
    assert made.read_json("data.json")["near_duplicates"]["groups"] == 0
    assert {split: len(some) > 5 for split, some in rows_of(made.path).items()} == {
        "train": True,
        "validation": True,
        "test": True,
    }


def test_counts_are_exact_and_not_the_first_rows(tmp_path: Path) -> None:
    rows = [row(i) for i in range(300)]
    out = prepare(tmp_path / "out", [source(tmp_path / "a.jsonl", rows, count=50)]).path
    found = rows_of(out)
    assert len(found["train"]) == 50
    numbers = sorted(int(each["id"].removeprefix("a:r")) for each in found["train"])
    assert numbers[-1] > 200
    assert numbers != list(range(50))
    everything = rows_of(prepare(tmp_path / "all", [source(tmp_path / "a.jsonl", rows)]).path)
    share = 50 / len(everything["train"])
    for split in ("validation", "test"):
        assert len(found[split]) == round(share * len(everything[split]))
        assert {each["id"] for each in found[split]} < {each["id"] for each in everything[split]}


def test_more_than_there_is_is_an_error_unless_rows_may_repeat(tmp_path: Path) -> None:
    few = source(tmp_path / "a.jsonl", [row(i) for i in range(40)])
    there = len(rows_of(prepare(tmp_path / "all", [few]))["train"])
    with raises(DataError, "a", str(there)):
        prepare(tmp_path / "out", [{**few, "count": 100}])
    assert not list((tmp_path / "out").glob("*/*.parquet"))
    out = prepare(tmp_path / "over", [{**few, "count": 100, "oversample": True}])
    train = rows_of(out)["train"]
    assert len(train) == len({each["id"] for each in train}) == 100
    times = np.unique([each["chosen"] for each in train], return_counts=True)[1]
    assert (len(times), set(times.tolist())) == (there, {100 // there, 100 // there + 1})
    assert sum("#" in each["id"] for each in train) == 100 - there


def test_weights_share_the_total(tmp_path: Path) -> None:
    sources = [
        source(tmp_path / "a.jsonl", [row(i) for i in range(100)], weight=2.0),
        source(tmp_path / "b.jsonl", [row(1000 + i) for i in range(100)], weight=1.0),
        source(tmp_path / "c.jsonl", [row(2000 + i) for i in range(100)], count=7),
    ]
    train = rows_of(prepare(tmp_path / "out", sources, total=50))["train"]
    counts = {name: sum(each["id"].startswith(name) for each in train) for name in "abc"}
    assert counts == {"a": 33, "b": 17, "c": 7}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 10_000))
def test_shares_sum_to_the_total_and_are_within_one_of_exact(weights: list[float], total: int) -> None:
    shares = apply_shares([MixtureSourceConfig(name="a", weight=weight) for weight in weights], total)
    assert sum(share or 0 for share in shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs((share or 0) - weight / sum(weights) * total) < 1 + 1e-6


def test_hashes_of_splits_are_even() -> None:
    places = split_hash(np.arange(100_000, dtype=np.uint64), 3)
    assert len(np.unique(places)) == 100_000
    shares = np.bincount((places >> np.uint64(60)).astype(int), minlength=16) / 100_000
    assert np.abs(shares - 1 / 16).max() < 0.005


def test_duplicates_and_contradictions_are_counted_and_treated_as_told(tmp_path: Path) -> None:
    rows = [row(i) for i in range(40)]
    repeated = {**row(3), "id": "again"}
    flipped = {**row(5), "id": "flipped", "chosen_is_safe": True}
    files = [source(tmp_path / "a.jsonl", [*rows, repeated, flipped])]
    kept = prepare(tmp_path / "kept", files, duplicates="keep")
    dropped = prepare(tmp_path / "dropped", files, contradictory_labels="drop")
    ids = [
        {each["id"] for rows in rows_of(out).values() for each in rows} for out in (kept, dropped)
    ]  # fmt: skip
    assert ids[0] == {f"a:r{i}" for i in range(40)} | {"a:again", "a:flipped"}
    assert ids[1] == {f"a:r{i}" for i in range(40) if i != 5}
    for out in (kept, dropped):
        data = out.read_json("data.json")
        assert (data["contradictory_rows"], data["duplicates"]) == (2, {"main": 1})
        listed = (out.path / "contradictory.jsonl").read_text().splitlines()
        assert [line.split('"id": "')[1].split('"')[0] for line in listed] == ["r5", "flipped"]
    assert dropped.read_json("data.json")["sources"][0]["units"] == {
        "used": 39,
        "contradictory labels": 2,
        "duplicate": 1,
    }


def test_repeated_ids_are_refused_and_ids_from_content_are_numbered(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", [row(0), {"prompt": "half a row"}])
    rows = [{**row(1), "id": "r0"}, *(row(i) for i in range(2, 30)), {**row(30), "id": "r3"}]
    given = source(tmp_path / "a.jsonl", rows) | {"files": [str(first), str(tmp_path / "a.jsonl")], "bad_rows": "skip"}
    for changes in ({}, {"stream": "sft", "use": "chosen"}):
        made = prepare(tmp_path / str(len(changes)), [given | changes])
        assert made.read_json("data.json")["sources"][0]["units"] == {"used": 29, "repeated id": 2}
        listed = [json.loads(line) for line in (made.path / "rejects.jsonl").read_text().splitlines()]
        assert [(Path(each["file"]).name, each["line"], each["reason"], each["value"]) for each in listed] == [
            ("first.jsonl", 2, "missing column", "None"),
            ("a.jsonl", 1, "duplicate id", "'r0'"),
            ("a.jsonl", 30, "duplicate id", "'r3'"),
        ]
    with raises(DataError, "c.jsonl:3", "'r0'"):
        prepare(tmp_path / "stop", [source(tmp_path / "c.jsonl", [row(0), row(1), {**row(5), "id": "r0"}])])
    nameless = [{key: value for key, value in row(i % 20).items() if key != "id"} for i in range(40)]
    out = prepare(tmp_path / "made", [source(tmp_path / "b.jsonl", nameless)], duplicates="keep")
    ids = [each["id"] for rows in rows_of(out).values() for each in rows]
    assert len(set(ids)) == len(ids) == 40
    assert sum(name.endswith("-2") for name in ids) == 20


def test_unknown_labels_mean_what_is_said(tmp_path: Path) -> None:
    rows = [row(i, **({"chosen_is_safe": None} if i % 4 == 0 else {})) for i in range(40)]
    part = source(tmp_path / "a.jsonl", rows)
    with raises(LabelError):
        prepare(tmp_path / "error", [part])
    labels = {
        unknown: [
            each["chosen_is_safe"]
            for rows in rows_of(prepare(tmp_path / unknown, [{**part, "unknown_label": unknown}])).values()
            for each in rows
        ]
        for unknown in ("safe", "drop", "keep")
    }
    assert {unknown: (len(some), some.count(None)) for unknown, some in labels.items()} == {
        "safe": (40, 0), "drop": (30, 0), "keep": (40, 10),
    }  # fmt: skip
    assert labels["safe"].count(1.0) == 20


def test_a_first_file_without_rows_does_not_decide_what_the_others_hold(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(30)])
    some = {"name": "a", "files": [str(write_rows(tmp_path / "a.jsonl", [])), str(rows)], "stream": "sft"}
    made = prepare(tmp_path / "out", [some], near_duplicates=None)
    assert sum(map(len, rows_of(made, "sft").values())) == 30


def test_completions_of_pairs_are_picked_and_read_as_such(tmp_path: Path) -> None:
    rows = [row(i) for i in range(30)]
    for use, wanted in (
        ("all", {f"{word} {i}" for i in range(30) for word in ("yes", "no")}),
        ("chosen", {f"yes {i}" for i in range(30)}),
        ("safe", {f"yes {i}" for i in range(0, 30, 2)} | {f"no {i}" for i in range(0, 30, 3)}),
    ):
        out = prepare(tmp_path / use, [source(tmp_path / "a.jsonl", rows, stream="sft", use=use)])
        found = [each for rows in rows_of(out, "sft").values() for each in rows]
        assert sorted(each["completion"] for each in found) == sorted(wanted)
        assert len({each["id"] for each in found}) == len(found)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layout": "completions"}, "stream"),
        ({"revision": "abc"}, "revision"),
        ({"layout": "nope"}, "layout"),
        ({"columns": {"prmpt": "x"}}, "columns"),
        ({"files": "none.jsonl"}, "none.jsonl"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], key: str) -> None:
    with raises((ConfigError, DataError, ValueError), key):
        prepare(tmp_path / "out", [{**source(tmp_path / "a.jsonl", [row(0)]), **changes}])
