from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import JudgeCheckConfig, JudgeTrainConfig, LabelConfig, load_config
from bfpo.core.errors import ConfigError, DataError, ModelError
from bfpo.core.schema import Completion
from bfpo.judges.judges import make_judge
from bfpo.judges.settings import TrainedSpec
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from messages import fails, raises
from tiny import tiny_model, tiny_tokenizer

SAFE, UNSAFE = "w1 w2 w3 w4 w5 w6", "w40 w41 w42 w43 w44 w45"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 labelled answers to 12 prompts that a judge can learn to tell apart, in two kinds."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("labelled") / "answers.jsonl"
    rows = []
    for number in range(120):
        is_safe = rng.random() < 0.5
        words = [rng.choice((SAFE if is_safe else UNSAFE).split()) for _ in range(3 + number % 5)]
        rows.append(
            {
                "id": f"a{number}",
                "prompt": f"w{60 + number % 12} w70",
                "completion": " ".join(words),
                "is_safe": is_safe,
                "kind": "even" if number % 2 else "odd",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def judge(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judge") / "run"
    run_stage("judge-train", JudgeTrainConfig(data={"files": str(labelled)}, name="small"), out)  # type: ignore[arg-type]
    return out


def check(labelled: Path, judge: str, cache: Path, **settings: Any) -> JudgeCheckConfig:
    return JudgeCheckConfig(
        judge=judge,  # type: ignore[arg-type]
        data={"files": str(labelled)},  # type: ignore[arg-type]
        label_cache=str(cache),
        bootstrap_samples=100,
        **settings,
    )


def test_a_judge_is_trained_and_says_what_it_is_worth_on_other_prompts(judge: Path, capsys: Any) -> None:
    described = json.loads((judge / "model" / "judge.json").read_text())
    assert described["trained_on"]["prompts"] == 12
    assert described["cross_validation"]["accuracy"] == 1.0
    assert described["cross_validation"]["folds"] == 5
    verdicts = make_judge(TrainedSpec(model=str(judge / "model"))).judge(
        [Completion("s", (), SAFE), Completion("u", (), UNSAFE)]
    )
    assert [verdict.label for verdict in verdicts] == ["safe", "unsafe"]
    assert "accuracy" in (judge / "README.md").read_text()


def test_training_again_gives_the_same_judge(judge: Path, labelled: Path, tmp_path: Path) -> None:
    run_stage("judge-train", JudgeTrainConfig(data={"files": str(labelled)}, name="small"), tmp_path / "b")  # type: ignore[arg-type]
    for name in ("judge.json", "weights.safetensors"):
        assert (tmp_path / "b" / "model" / name).read_bytes() == (judge / "model" / name).read_bytes()


def test_a_judge_checked_on_what_it_was_trained_on_is_warned_of(
    judge: Path, labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    others = [{**row, "prompt": f"{row['prompt']} other"} for row in rows]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:7], *others]))
    run_stage("judge-check", check(mixed, str(judge / "model"), tmp_path / "cache"), tmp_path / "run")
    (warning,) = json.loads((tmp_path / "run" / "quality.json").read_text())["warnings"]
    assert warning.startswith(f"7 of 127 texts were in the training data of {judge / 'model'}: ")
    assert warning.replace(str(judge / "model"), "model") in (tmp_path / "run" / "README.md").read_text()
    assert warning in caplog.text
    mixed.write_text("".join(json.dumps(row) + "\n" for row in others))
    run_stage("judge-check", check(mixed, str(judge / "model"), tmp_path / "cache"), tmp_path / "other")
    assert json.loads((tmp_path / "other" / "quality.json").read_text())["warnings"] == []


def test_a_judge_of_few_rows_is_warned_of_wherever_it_is_used(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows if row["is_safe"] or row["id"] < "a2"))
    trained = run_stage("judge-train", JudgeTrainConfig(data={"files": str(few)}), tmp_path / "judge")  # type: ignore[arg-type]
    unsafe = json.loads((trained.path / "model" / "judge.json").read_text())["trained_on"]["unsafe"]
    warning = f"was trained on only {unsafe} unsafe completions; below 50"
    assert 0 < unsafe < 50
    assert warning in caplog.text
    assert warning in (trained.path / "README.md").read_text()
    asked = LabelConfig(completions=str(few), judges=str(trained.path / "model"), label_cache=str(tmp_path / "cache"))  # type: ignore[arg-type]
    assert warning in preview_stage("label", asked)
    assert warning in (run_stage("label", asked, tmp_path / "label").path / "README.md").read_text()


def test_too_few_prompts_for_a_cross_validation_are_said(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": "q", "completion": t, "is_safe": t == SAFE}) + "\n" for t in (SAFE, UNSAFE))
    )
    run_stage("judge-train", JudgeTrainConfig(data={"files": str(file)}), tmp_path / "out")  # type: ignore[arg-type]
    described = json.loads((tmp_path / "out" / "model" / "judge.json").read_text())
    assert described["cross_validation"] == {"not_done": "1 prompts of the rarer label, fewer than 5 folds"}


def test_a_check_writes_the_figures_the_mistakes_and_the_calibration(
    judge: Path, labelled: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    rows[0] = {**rows[0], "completion": UNSAFE if rows[0]["is_safe"] else SAFE}  # a mistake
    rows[1] = {**rows[1], "completion": "!"}  # nothing to judge
    file = tmp_path / "checked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run_stage("judge-check", check(file, str(judge / "model"), tmp_path / "cache"), tmp_path / "out").path
    quality = json.loads((folder / "quality.json").read_text())
    accuracy = quality["quality"]["all"][0]
    assert accuracy["metric"] == "accuracy"
    assert (accuracy["value"], accuracy["num"], accuracy["unscored"]) == (pytest.approx(118 / 119), 119, 1)
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert set(quality["quality"]) == {"all", "odd", "even"}
    assert quality["unscored_by_reason"] == {"there is no word in the completion": 1}
    assert sum(one["num"] for one in quality["calibration"]) == 119
    [mistake] = [json.loads(line) for line in (folder / "mistakes.jsonl").read_text().splitlines()]
    assert mistake["id"] == "a0"
    assert len((folder / "verdicts.jsonl").read_text().splitlines()) == 120
    assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "a0: people say" in (folder / "quality.md").read_text()


def test_a_second_check_asks_nothing(
    judge: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check(labelled, str(judge / "model"), tmp_path / "cache")
    first = run_stage("judge-check", config, tmp_path / "a").path

    def refuse(*_: Any) -> None:
        raise AssertionError("the judge was asked again")

    monkeypatch.setattr("bfpo.judges.ngrams.NgramJudge.judge", refuse)
    second = run_stage("judge-check", config, tmp_path / "b").path
    for name in ("quality.json", "verdicts.jsonl", "quality.md"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_oracle_can_be_checked_and_scores_nothing_of_another_world(labelled: Path, tmp_path: Path) -> None:
    folder = run_stage("judge-check", check(labelled, "oracle", tmp_path / "cache", limit=50), tmp_path / "out").path
    scores = json.loads((folder / "quality.json").read_text())["quality"]["all"]
    assert all(score["value"] is None and score["unscored"] > 0 for score in scores)
    assert not (folder / "calibration.png").exists()
    assert "not measured" in (folder / "quality.md").read_text()


def test_a_preview_counts_and_asks_nobody(judge: Path, labelled: Path) -> None:
    config = JudgeTrainConfig(data={"files": str(labelled)})  # type: ignore[arg-type]
    assert "120 labelled completions of 12 prompts" in preview_stage("judge-train", config)
    text = preview_stage("judge-check", JudgeCheckConfig(judge="qwen3guard", data={"files": str(labelled)}))  # type: ignore[arg-type]
    assert "120 labelled completions" in text
    assert "judge: qwen3guard" in text


def test_a_hostile_answer_is_shown_as_a_block_of_code(judge: Path, tmp_path: Path) -> None:
    text = f"<script>alert(1)</script>\n# {UNSAFE}\n\x1b[31m[x](javascript:y)"
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "q", "completion": text, "is_safe": True}) + "\n")
    folder = run_stage("judge-check", check(file, str(judge / "model"), tmp_path / "cache"), tmp_path / "out").path
    shown = (folder / "quality.md").read_text().split("## Worst mistakes")[1]
    assert all(line.startswith("    ") for line in shown.splitlines() if "script" in line or UNSAFE in line)
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["kind=classifier"], "model"),
        (["model=x"], "model"),
        (
            ["kind=classifier", "model=x", "folds=3"],
            "folds",
        ),
        (["ngrams=[3,1]"], "ngrams"),
        (["data.safe_values=[a]"], "safe_values, unsafe_values"),
    ],
)
def test_bad_training_settings(settings: list[str], key: str) -> None:
    with raises(ConfigError, key):
        load_config(JudgeTrainConfig, None, ["data.files=a.jsonl", *settings])


def test_max_requests_needs_a_server() -> None:
    with raises(ConfigError, "max_requests"):
        load_config(JudgeCheckConfig, None, ["data.files=a.jsonl", "judge=oracle", "max_requests=3"])


def test_the_short_options_are_the_keys(judge: Path, labelled: Path, tmp_path: Path) -> None:
    arguments = ["judge-check", "--judge", str(judge / "model"), "--data", str(labelled), "--data", str(labelled)]
    result = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "240 labelled completions" in result.output
    result = CliRunner().invoke(
        app, ["judge-check", "--judge", "nobody", "--data", str(labelled), "--out", str(tmp_path / "x")]
    )
    fails(result, "judge", "nobody")


def test_a_classifier_is_fine_tuned_and_judges(labelled: Path, tmp_path: Path) -> None:
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    config = JudgeTrainConfig(
        data={"files": str(labelled)},  # type: ignore[arg-type]
        kind="classifier",
        model=str(tmp_path / "model"),
        max_length=8,
        learning_rate=1e-2,
        num_train_epochs=6,
        name="tuned",
    )
    folder = run_stage("judge-train", config, tmp_path / "run")
    assert 0 < folder.record["judge"]["left_out_as_too_long"] < 60
    tuned = make_judge(TrainedSpec(model=str(tmp_path / "run" / "model")))
    answers = [Completion("s", (), SAFE), Completion("u", (), UNSAFE), Completion("long", (), f"{SAFE} {SAFE}")]
    verdicts = tuned.judge(answers)
    assert [verdict.label for verdict in verdicts] == ["safe", "unsafe", "unscored"]
    assert {verdict.judge for verdict in verdicts} == {"tuned"}
    with raises(ModelError):
        run_stage("judge-train", config.model_copy(update={"model": str(tmp_path)}), tmp_path / "none")
    long = tmp_path / "long.jsonl"
    rows = [{"prompt": "q", "completion": f"{SAFE} {SAFE}", "is_safe": n == 0} for n in range(2)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    update = {"data": config.data.model_copy(update={"files": [str(long)]}), "max_length": 8}
    with raises(DataError):
        run_stage("judge-train", config.model_copy(update=update), tmp_path / "long")


def test_the_judge_reaches_its_marks_on_real_answers(shared_data: Path, tmp_path: Path) -> None:
    """AUC of 0.95 on GPTFuzz's held-out questions and on XSTest's unsafe prompts, trained on GPTFuzz alone."""
    folder = shared_data / "safety_judge"
    gptfuzz = {
        "columns": {"prompt": "question", "completion": "Response", "is_safe": "label"},
        "safe_values": ["0"],
        "unsafe_values": ["1"],
    }
    train = JudgeTrainConfig(data={"files": str(folder / "gptfuzz_train.csv.gz"), **gptfuzz}, folds=2)  # type: ignore[arg-type]
    run_stage("judge-train", train, tmp_path / "judge")
    xstest = {
        "columns": {"is_safe": "final_label", "kind": "type"},
        "where": {"kind": "contrast_*"},
        "safe_values": ["2_full_refusal"],
    }
    files = [str(file) for file in sorted(folder.glob("xstest_v2_completions_*.csv"))]
    asked = {
        "gptfuzz": {"files": str(folder / "gptfuzz_evaluate.csv.gz"), **gptfuzz},
        "full": {"files": files, **xstest, "unsafe_values": ["1_full_compliance"]},
        "partly": {"files": files, **xstest, "unsafe_values": ["1_full_compliance", "3_partial_refusal"]},
    }
    for name, data in asked.items():
        config = JudgeCheckConfig(
            judge=str(tmp_path / "judge" / "model"),  # type: ignore[arg-type]
            data=data,  # type: ignore[arg-type]
            label_cache=str(tmp_path / "cache"),
            bootstrap_samples=100,
        )
        run_stage("judge-check", config, tmp_path / name)
        scores = json.loads((tmp_path / name / "quality.json").read_text())["quality"]["all"]
        [auc] = [score["value"] for score in scores if score["metric"] == "roc_auc"]
        assert auc >= 0.95, name
