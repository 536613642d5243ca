"""`bfpo clean`: the pairs of a noisy world, its own judge, other judges, people's labels, and bad input."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import CleanConfig, load_config
from bfpo.core.errors import ConfigError, DataError
from bfpo.core.schema import Message, Pair
from bfpo.data.read import read_pairs
from bfpo.data.write import write_pairs
from bfpo.runs.stages import preview_stage, run_stage
from bfpo.world.datasets import main_pairs
from messages import fails, raises

NUM = 60


def true_pairs(num: int = NUM) -> list[Pair]:
    """Pairs of which one word says whether an answer is safe."""
    rng = random.Random(0)
    made = []
    for n in range(num):
        labels = [float(rng.random() < 0.6) for _ in range(2)]
        texts = [
            " ".join([word, "fine" if x else "poison"])
            for word, x in zip(rng.sample(["one", "two", "six"], 2), labels, strict=True)
        ]
        made.append(Pair(f"p{n}", (Message("user", f"Question {n // 2}"),), *texts, *labels, "made"))
    return made


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those pairs, of which a tenth of the labels are flipped."""
    rng, file = random.Random(1), tmp_path_factory.mktemp("noisy") / "pairs.jsonl"
    sides = ("chosen_is_safe", "rejected_is_safe")
    pairs = [
        replace(one, **{side: float(getattr(one, side) != (rng.random() < 0.1)) for side in sides})
        for one in true_pairs()
    ]
    write_pairs(file, pairs)
    return file


def config(file: Path, **settings: Any) -> CleanConfig:
    own = {} if "judges" in settings else {"own": {"num_features": 512}}
    return CleanConfig.model_validate({"data": {"files": str(file)}, "bootstrap_samples": 5, **own, **settings})


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def wrong_labels(pairs: list[Pair]) -> int:
    true = {one.id: one for one in true_pairs()}
    return sum(
        (getattr(one, name) > 0.5) != (getattr(true[one.id], name) > 0.5)
        for one in pairs
        for name in ("chosen_is_safe", "rejected_is_safe")
    )


def test_its_own_judge_finds_most_of_the_flipped_labels(noisy: Path, tmp_path: Path) -> None:
    run = run_stage("clean", config(noisy, policy="flip", certainty=0.5), tmp_path / "run").path
    before, after = read_pairs([noisy]).pairs, read_pairs([run / "pairs.jsonl"]).pairs
    assert [one.id for one in after] == [one.id for one in before]
    assert wrong_labels(before) > 5
    assert wrong_labels(after) == 0
    found = json.loads((run / "clean.json").read_text())
    changed = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    contradicted = rows(run, "contradictions.jsonl")
    assert found["labels"]["contradicted"] == len(contradicted)
    assert {row["id"].rpartition(":")[0] for row in contradicted} == {before[n].id for n in changed}
    assert sum(cell["before"] for cell in found["cells"].values()) == found["pairs"] == NUM
    assert sum(cell["after"] for cell in found["cells"].values()) == found["pairs_left"] == NUM
    assert len(rows(run, "verdicts.jsonl")) == 2 * NUM
    again = run_stage("clean", config(noisy, policy="flip", certainty=0.5), tmp_path / "again").path
    for name in ("pairs.jsonl", "contradictions.jsonl", "clean.json", "clean.md", "verdicts.jsonl"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_each_policy_does_what_it_says_to_the_same_labels(noisy: Path, tmp_path: Path) -> None:
    runs = {
        name: run_stage("clean", config(noisy, policy=policy, **more), tmp_path / name).path
        for name, policy, more in (
            ("keep", "keep", {}),
            ("drop", "drop", {}),
            ("soften", "soften", {"weight": 1.0}),
            ("by label", {"safe": "keep", "unsafe": "drop"}, {}),
        )
    }
    before = read_pairs([noisy]).pairs
    pairs = {name: read_pairs([run / "pairs.jsonl"]).pairs for name, run in runs.items()}
    found = {row["id"]: row for row in rows(runs["keep"], "contradictions.jsonl")}
    named = {name.rpartition(":")[0] for name in found}
    assert pairs["keep"] == before
    assert pairs["drop"] == [one for one in before if one.id not in named]
    unsafe = {name.rpartition(":")[0] for name, row in found.items() if row["label"] == 0}
    assert [one.id for one in pairs["by label"]] == [one.id for one in before if one.id not in unsafe]
    for one, given in zip(pairs["soften"], before, strict=True):
        for side in ("chosen", "rejected"):
            row = found.get(f"{one.id}:{side}")
            wanted = getattr(given, f"{side}_is_safe") if row is None else row["p_safe"]
            assert getattr(one, f"{side}_is_safe") == pytest.approx(wanted)
    certain = {name: max(row["p_safe"], 1 - row["p_safe"]) for name, row in found.items()}
    bound = sorted(certain.values())[len(certain) // 2]
    sure = run_stage("clean", config(noisy, policy="drop", certainty=bound), tmp_path / "sure").path
    named = {row["id"] for row in rows(sure, "contradictions.jsonl")}
    assert named == {name for name, p in certain.items() if p >= bound} < found.keys()


def test_a_panel_of_judges_is_asked_through_the_cache(tmp_path: Path) -> None:
    values = {"judges": ["oracle", "refusal-phrases"], "label_cache": str(tmp_path / "cache")}
    given = main_pairs(40, 0)
    flipped = [replace(one, chosen_is_safe=1 - (one.chosen_is_safe or 0.0)) for one in given[:10]]
    write_pairs(tmp_path / "pairs.jsonl", [*flipped, *given[10:]])
    first = run_stage("clean", config(tmp_path / "pairs.jsonl", **values), tmp_path / "one").path
    second = run_stage("clean", config(tmp_path / "pairs.jsonl", **values), tmp_path / "two").path
    record = json.loads((second / "run.json").read_text())
    assert record["opinions"]["oracle"]["asked"] == 0 < record["opinions"]["oracle"]["kept"]
    assert (first / "pairs.jsonl").read_bytes() == (second / "pairs.jsonl").read_bytes()
    assert read_pairs([first / "pairs.jsonl"]).pairs == given[10:]
    assert json.loads((first / "clean.json").read_text())["judge"] == "majority of oracle, refusal-phrases"


def test_unknown_labels_stay_and_are_counted(tmp_path: Path) -> None:
    given = main_pairs(40, 1)
    pairs = [Pair(one.id, one.prompt, one.chosen, one.rejected, None, 1.0) for one in given]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    values = {"judges": "oracle", "policy": "flip", "label_cache": str(tmp_path)}
    run = run_stage("clean", config(tmp_path / "pairs.jsonl", **values), tmp_path / "run").path
    found = json.loads((run / "clean.json").read_text())
    wrong = sum(one.rejected_is_safe == 0 for one in given)
    assert found["labels"] == {
        "known": 40, "unknown": 40, "unscored": 0, "contradicted": wrong, "contradicted_safe": wrong,
        "contradicted_unsafe": 0,
    }  # fmt: skip
    assert found["cells"]["unknown"]["before"] == found["cells"]["unknown"]["after"] == 40
    assert {one.chosen_is_safe for one in read_pairs([run / "pairs.jsonl"]).pairs} == {None}


def test_peoples_labels_measure_both(noisy: Path, tmp_path: Path) -> None:
    true = true_pairs()[:40]
    labels = [
        {"id": one.id, "prompt": [{"role": "user", "content": one.prompt[0].content}], "text": one.chosen,
         "is_safe": bool(one.chosen_is_safe)}
        for one in true
    ]  # fmt: skip
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    run = run_stage("clean", config(noisy, people=str(tmp_path / "labels.jsonl")), tmp_path / "run").path
    scores = {score["metric"]: score for score in json.loads((run / "clean.json").read_text())["people"]}
    assert scores["agreement: given label, people"]["value"] < scores["agreement: label afterwards, people"]["value"]
    assert scores["agreement: given label, people"]["num"] >= 40
    assert "On the texts that people labelled" in (run / "clean.md").read_text()


def test_the_preview_counts_and_writes_nothing(noisy: Path, tmp_path: Path) -> None:
    text = preview_stage("clean", config(noisy))
    assert f"{NUM} pairs (chosen-rejected)" in text
    assert f"{2 * NUM} labels to check, 0 unknown" in text
    assert "judge: ngrams, trained on these labels in 5 folds" in text
    asked = preview_stage("clean", config(noisy, judges=["oracle"], label_cache=str(tmp_path / "none")))
    assert "judge: oracle" in asked
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"policy": "remove"}, "policy"),
        ({"policy": {"safe": "drop", "maybe": "drop"}}, "policy"),
        ({"certainty": 0.4}, "certainty"),
        ({"weight": 0.2}, "weight"),
        ({"judges": "oracle", "own": {"folds": 3}}, "own"),
        ({"votes": 2, "judges": "oracle"}, "votes"),
        ({"min_votes": 2}, "min_votes"),
        ({"own": {"kind": "probe"}}, "model"),
        ({"own": {"kind": "ngrams", "layer": 3}}, "layer"),
        ({"judges": "refusal-phrases"}, "judges"),  # it says nothing of safety, so that it contradicts nothing
    ],
)
def test_what_would_not_be_read_is_refused(values: dict[str, Any], key: str, noisy: Path, tmp_path: Path) -> None:
    file = tmp_path / "clean.yaml"
    file.write_text(json.dumps({"data": {"files": str(noisy)}, **values}))
    with raises(ConfigError, key):
        load_config(CleanConfig, file, [])


def test_a_judge_of_its_own_needs_labels_of_both_kinds_and_prompts(tmp_path: Path) -> None:
    def written(*labels: float | None) -> Path:
        file = tmp_path / f"{len(labels)}{labels[0]}.jsonl"
        prompts = [(Message("user", f"Question {n}"),) for n in range(len(labels))]
        pairs = [Pair(f"p{n}", p, "One answer.", "Another.", labels[n], labels[n]) for n, p in enumerate(prompts)]
        write_pairs(file, pairs)
        return file

    for labels, key in (((1.0, 1.0), "labels"), ((None, None), "safety label"), ((1.0, 0.0, 1.0), "own.folds")):
        with raises(DataError, key):
            run_stage("clean", config(written(*labels)), tmp_path / key.replace(" ", ""))
        with pytest.raises(DataError):
            preview_stage("clean", config(written(*labels)))


def test_the_command_line(noisy: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(
        app,
        [
            "clean",
            "--data",
            str(noisy),
            "--policy",
            "keep",
            "--set",
            "own.num_features=512",
            "--out",
            str(tmp_path / "run"),
        ],
    )
    assert done.exit_code == 0
    assert "labels" in done.output
    assert (tmp_path / "run" / "clean.md").is_file()
    missing = runner.invoke(app, ["clean", "--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x")])
    fails(missing, "none.jsonl")
