"""AlpacaEval's own annotators: with a stand-in for the package's command, and (slow) with the package itself."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from bfpo.config import EvaluateConfig
from bfpo.config.load import load_config
from bfpo.core.errors import ConfigError, DataError
from bfpo.policy.save import save_policy
from bfpo.runs.stages import run_stage
from messages import raises
from support.fault_server import FaultServer
from tiny import tiny_model, tiny_tokenizer

NUM = 31
STAND_IN = """#!{python}
import json, pathlib, sys
if sys.argv[1] == "-c":
    sys.exit({installed})
options = dict(zip(sys.argv[4::2], sys.argv[5::2]))
here = pathlib.Path(__file__).parent
with (here / "asked.jsonl").open("a") as file:
    file.write(json.dumps(options) + "\\n")
if {fails}:
    sys.exit("openai.AuthenticationError: no such key")
outputs = json.loads(pathlib.Path(options["--model_outputs"]).read_text())
reference = options.get("--reference_outputs")
others = json.loads(pathlib.Path(reference).read_text()) if reference else []
others = {{row["instruction"]: row["output"] for row in others}}
out = pathlib.Path(options["--output_path"]) / "annotators"
out.mkdir(parents=True)
rows = [
    dict(instruction=row["instruction"], output_1=others.get(row["instruction"], "x"), output_2=row["output"],
         preference=(None, 0, 1.0, 1.25, 2.0)[number] if number < 5 else 1.75)
    for number, row in enumerate(outputs)
]
(out / "annotations.json").write_text(json.dumps(rows))
rate = "" if reference else ",length_controlled_winrate"
(out / "leaderboard.csv").write_text(f",win_rate{{rate}}\\nm,60.0{{'' if reference else ',42.0'}}\\n")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alpaca")
    for seed, name in enumerate(("one", "two"), start=1):
        save_policy(tiny_model(seed=seed), tiny_tokenizer(), root / name)
    rows = [{"instruction": f"w{n} w5", "output": "x", "generator": "x", "dataset": "d"} for n in range(NUM)]
    (root / "alpaca_eval.json").write_text(json.dumps(rows))
    return root


def stand_in(folder: Path, *, installed: bool = True, fails: bool = False) -> str:
    script = folder / "python"
    script.write_text(STAND_IN.format(python=sys.executable, installed=int(not installed), fails=fails))
    script.chmod(0o755)
    return str(script)


def config(root: Path, python: str | None, **suites: Any) -> EvaluateConfig:
    section = {"use": ["alpaca-eval"], "folders": [str(root)], "max_new_tokens": 4, "label_cache": str(root / "cache")}
    section |= {"alpaca_eval": {"python": python}, **suites}
    models = [{"name": name, "model": str(root / name)} for name in ("one", "two")]
    return EvaluateConfig(models=models, suites=section, bootstrap_samples=20, threads=1)  # type: ignore[arg-type]


def result(path: Path) -> dict[str, Any]:
    return json.loads((path / "scores.json").read_text())  # type: ignore[no-any-return]


def asked(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def test_preferences_over_the_baseline_are_read_back(root: Path, tmp_path: Path) -> None:
    run_stage("evaluate", config(root, stand_in(tmp_path), baseline="one"), tmp_path / "run")
    found = result(tmp_path / "run")
    (suite,) = found["suites"]
    assert (suite["status"], suite["judge"]) == ("scored", "weighted_alpaca_eval_gpt4_turbo")
    plain, own, controlled, _ = found["scores"]
    assert (own["model"], own["value"], own["low"], own["high"]) == ("one", 0.5, 0.5, 0.5)
    assert plain["metric"] == "winrate[weighted_alpaca_eval_gpt4_turbo]"
    expected = (0.5 + 0 + 0.25 + 1 + 0.75 * (NUM - 5)) / (NUM - 1)
    assert (plain["model"], plain["value"], plain["num"], plain["unscored"]) == (
        "two", pytest.approx(expected), NUM - 1, 1
    )  # fmt: skip
    assert controlled["metric"] == "lc_winrate[weighted_alpaca_eval_gpt4_turbo]"
    assert controlled["low"] <= controlled["value"] <= controlled["high"]
    (options,) = asked(tmp_path)
    assert options["--reference_outputs"] == str(tmp_path / "run" / "alpaca_eval" / "one.json")
    assert options["--model_outputs"] == str(tmp_path / "run" / "alpaca_eval" / "two.json")
    assert (options["--fn_metric"], options["--precomputed_leaderboard"]) == ("get_winrate", "None")


def test_without_a_baseline_it_is_the_packages_reference_and_its_own_rate(root: Path, tmp_path: Path) -> None:
    run_stage("evaluate", config(root, stand_in(tmp_path)), tmp_path / "run")
    found = result(tmp_path / "run")
    assert [score["model"] for score in found["scores"]] == ["one", "two", "one", "two"]
    controlled = found["scores"][-1]
    assert (controlled["value"], controlled["low"], controlled["num"]) == (0.42, None, NUM - 1)
    assert [(row["first"], row["second"], row["num"]) for row in found["comparisons"]] == [("one", "two", NUM - 1)]
    assert all("--reference_outputs" not in options and "--fn_metric" not in options for options in asked(tmp_path))


def test_a_stopped_run_annotates_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    settings = config(root, stand_in(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("bfpo.suites.run.compare_values", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stage("evaluate", settings, tmp_path / "run")
    run_stage("evaluate", settings, tmp_path / "run", resume=True)
    assert len(asked(tmp_path)) == 2
    assert len(result(tmp_path / "run")["scores"]) == 4


def test_what_cannot_run_is_skipped_with_the_reason(root: Path, tmp_path: Path) -> None:
    for number, (python, reason) in enumerate(
        (
            (stand_in(tmp_path, installed=False), "pip install 'bfpo[alpaca-eval]'"),
            (str(tmp_path / "none"), "cannot be run"),
        )
    ):
        with raises(DataError):
            run_stage("evaluate", config(root, python), tmp_path / f"run-{number}")
        assert reason in result(tmp_path / f"run-{number}")["suites"][0]["reason"]
    with raises(DataError):
        run_stage("evaluate", config(root, stand_in(tmp_path, fails=True)), tmp_path / "fails")
    found = result(tmp_path / "fails")
    assert found["scores"] == []
    assert "alpaca_eval failed: openai.AuthenticationError: no such key" in found["suites"][0]["reason"]
    beside = {"ranker": "oracle", "baseline": "one"}
    with raises(DataError):
        run_stage("evaluate", config(root, stand_in(tmp_path, fails=True), **beside), tmp_path / "beside")
    found = result(tmp_path / "beside")
    assert [score["metric"] for score in found["scores"]] == ["winrate[oracle]", "lc_winrate[oracle]"]
    assert "no such key" in found["warnings"][0]
    asked_for_none = config(root, None).resolved()
    asked_for_none["suites"]["alpaca_eval"] = None
    with raises(DataError):
        run_stage("evaluate", EvaluateConfig.model_validate(asked_for_none), tmp_path / "nobody")
    assert "or suites.alpaca_eval" in result(tmp_path / "nobody")["suites"][0]["reason"]


def test_a_baseline_that_nothing_reads_is_refused() -> None:
    for keys in (["suites.baseline=m"], ["suites.ranker=oracle"], ["suites.ranker=oracle", "suites.alpaca_eval={}"]):
        with raises(ConfigError):
            load_config(EvaluateConfig, overrides=["suites.use=demo", "model=m", *keys])
    load_config(EvaluateConfig, overrides=["suites.use=demo", "model=m", "suites.baseline=m", "suites.alpaca_eval={}"])


@pytest.mark.slow
def test_the_package_itself_annotates(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("alpaca_eval")
    tops = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in (("m", 0.8), ("M", 0.2))]
    with FaultServer().running() as server:
        server.answer, server.usage = lambda text: "m", {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
        server.logprobs = lambda text: {"content": [{**tops[0], "top_logprobs": tops}]}
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        monkeypatch.setenv("OPENAI_API_BASE", server.url)
        run_stage("evaluate", config(root, None, baseline="one"), tmp_path / "run")
        assert 0 < server.num_requests <= NUM  # answers that are equal are not asked about
    found = result(tmp_path / "run")
    assert (found["suites"][0]["status"], found["suites"][0]["reason"]) == ("scored", None)
    plain = found["scores"][0]
    assert plain["num"] + plain["unscored"] == NUM
    assert plain["unscored"] == 0
    (file,) = (tmp_path / "run" / "models" / "two" / "alpaca_eval").rglob("annotations.json")
    shares = [row["preference"] - 1 for row in json.loads(file.read_text())]
    assert plain["value"] == pytest.approx(sum(shares) / NUM)
    assert {round(share, 6) for share in shares} <= {0.2, 0.5, 0.8}  # the package puts the two in a random order
