"""IFEval by lm-eval's checks: with and without the data that some of them need, and what was too long to ask."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bfpo.config import EvaluateConfig
from bfpo.policy.save import save_policy
from bfpo.runs.folder import RunFolder
from bfpo.runs.stages import run_stage
from bfpo.suites.catalogue import FOLDER, known_suites
from bfpo.suites.files import UnreachableError
from bfpo.suites.lm_eval import TaskDataError, TaskRunner, _advice, _result, _task
from bfpo.suites.lm_eval import _read_result as read_result
from messages import raises
from tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"prompt": "w1 w2", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "prompt": "w3",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
        "kwargs": [{}, {"relation": "less than", "num_sentences": 50}],
    },
    {"prompt": " ".join(["w1"] * 80), "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
]


def sample(number: int, value: float, num_words: int = 1) -> dict[str, Any]:
    return {"doc_id": number, "acc": value, "arguments": [(" ".join(["w"] * num_words), {})]}


def words(text: str) -> int:
    return len(text.split())


def test_what_has_no_number_and_what_was_cut_is_counted_with_its_reason() -> None:
    found = read_result([sample(0, 1.0), sample(1, math.nan), sample(2, 1.0, 9), sample(3, 0.0, 8)], 4, "acc", words, 8)
    assert found.by_document == {"0": 1.0, "3": 0.0}
    assert sorted(found.reasons.values()) == [1, 1]
    assert found.unscored == 2
    assert read_result([sample(2, 1.0, 9)], 4, "acc", words, None).by_document == {"2": 1.0}  # windows cut nothing
    choices = [("w " * num, "yes no") for num in (1, 3, 2)]  # of 3, 5 and 4 tokens
    samples = [sample(0, 1.0) | {"arguments": choices}, sample(1, 0.0) | {"arguments": choices[::2]}]
    found = read_result(samples, 4, "acc", words, 4)
    assert (found.by_document, found.unscored) == ({"1": 0.0}, 1)
    with raises(UnreachableError, "punkt_tab"):
        read_result([sample(0, math.nan)], 4, "acc", words, 8)
    for value in (-0.5, 1.5, math.inf):
        with raises(UnreachableError, "another metric"):
            read_result([sample(0, 1.0), sample(1, value)], 4, "acc", words, 8)


def test_an_answer_that_leaves_no_room_is_no_score() -> None:
    class Task:
        config = SimpleNamespace(generation_kwargs={"max_gen_toks": 1280})

        def set_config(self, key: str, value: dict[str, Any], update: bool) -> None:
            getattr(self.config, key).update(value)

    runner = TaskRunner("m", revision=None, dtype="float32", batch_size=1, tasks=Path("t"), max_new_tokens=48)
    runner._model = SimpleNamespace(max_length=64, max_gen_toks=256)
    task = Task()
    runner._bound(task)
    assert task.config.generation_kwargs["max_gen_toks"] == 48
    runner._model.max_length = 48
    with raises(UnreachableError, "suites.max_new_tokens"):
        runner._bound(task)


@pytest.mark.parametrize("suite", ["winogrande", "ifeval"])
def test_documents_that_cannot_be_loaded_are_named_with_the_place_for_them(suite: str, tmp_path: Path) -> None:
    class Offline:
        def run(self, *_: Any, **__: Any) -> Any:
            raise TaskDataError("lm-eval cannot load it: the hub is not asked")

    config = EvaluateConfig.model_validate({"model": "m", "suites": {"use": [suite]}})
    folder = RunFolder.create(tmp_path / "run", "evaluate", {})
    with raises(UnreachableError, "suites.folders", f"{suite}.jsonl"):
        _result(config, known_suites()[suite], "m", "task", Offline(), folder)  # type: ignore[arg-type]


def test_a_local_file_without_documents_or_with_others_is_named(tmp_path: Path) -> None:
    class Refusing:
        def run(self, *_: Any, **__: Any) -> Any:
            raise TaskDataError("lm-eval cannot load it: 'question' is undefined")

    file = tmp_path / "winogrande.jsonl"
    config = EvaluateConfig.model_validate(
        {"model": "m", "suites": {"use": ["winogrande"], "folders": [str(tmp_path)]}}
    )
    suite, folder = known_suites()["winogrande"], RunFolder.create(tmp_path / "run", "evaluate", {})
    file.write_text("")
    with raises(UnreachableError, "winogrande.jsonl", "no row"):
        _task(config, suite, folder)  # type: ignore[arg-type]
    file.write_text('{"other": 1}\n')
    with raises(UnreachableError, "winogrande.jsonl", "columns"):
        _result(config, suite, "m", "task", Refusing(), folder)  # type: ignore[arg-type]


def test_a_missing_package_names_the_extra() -> None:
    error = ImportError("Cannot import module 'ifeval_checks'")
    error.__cause__ = ModuleNotFoundError("No module named 'langdetect'")
    assert "pip install 'bfpo[lm-eval]'" in _advice(error)
    assert "bfpo[lm-eval]" in _advice(ModuleNotFoundError("No module named 'langdetect'"))
    assert "bfpo[lm-eval]" not in _advice(ValueError("no such file"))


# ------------------------------------------------------------------------------------------ with lm-eval itself


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the module of our checks where NLTK finds data in `tmp_path` alone."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("langdetect")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.syspath_prepend(str(FOLDER / "tasks"))
    import ifeval_checks

    util = sys.modules["lm_eval.tasks.ifeval.instructions_util"]
    util._get_sentence_tokenizer.cache_clear()
    yield ifeval_checks
    util._get_sentence_tokenizer.cache_clear()


def save_punkt(folder: Path) -> None:
    """Write NLTK's `punkt_tab`, trained on a sentence."""
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    save_punkt_params(PunktTrainer("One sentence. Another one! A third?").get_params(), dir=str(english))


@pytest.mark.slow
def test_a_prompt_is_scored_or_not_whatever_the_answer(checks: Any, tmp_path: Path) -> None:
    """lm-eval runs no check of an empty answer, so it would be scored where a full one cannot be."""

    def value(row: dict[str, Any], answer: str) -> float:
        return checks.process_results({"key": 1, **row}, [answer])["prompt_level_strict_acc"]  # type: ignore[no-any-return]

    assert (value(ROWS[0], "a b"), value(ROWS[0], "a, b"), value(ROWS[0], "")) == (1.0, 0.0, 0.0)
    assert math.isnan(value(ROWS[1], "a b"))
    assert math.isnan(value(ROWS[1], ""))
    with pytest.raises(KeyError):
        checks.process_results({"prompt": "no other column"}, ["a"])
    save_punkt(tmp_path)
    assert (value(ROWS[1], "a b"), value(ROWS[1], "a, b"), value(ROWS[1], "")) == (1.0, 0.0, 0.0)
    assert value(ROWS[1], "Yes. " * 60) == 0.0
    french = {"prompt": "p", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "fr"}]}
    assert len({value(french, "la table the chair") for _ in range(20)}) == 1  # langdetect draws its own seed


@pytest.mark.slow
def test_ifeval_runs_on_a_local_file(checks: Any, tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    model.config.max_position_embeddings = 64
    save_policy(model, tiny_tokenizer(), tmp_path / "model")
    rows = [{"key": number, **row} for number, row in enumerate(ROWS)]
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str) -> dict[str, Any]:
        suites = {"use": ["ifeval"], "folders": [str(tmp_path)], "max_new_tokens": 8}
        config = EvaluateConfig(model=str(tmp_path / "model"), suites=suites, bootstrap_samples=50, threads=1)  # type: ignore[arg-type]
        run_stage("evaluate", config, tmp_path / name)
        return json.loads((tmp_path / name / "scores.json").read_text())  # type: ignore[no-any-return]

    found = run("without")
    (score,) = found["scores"]
    assert (score["num"], score["unscored"]) == (1, 2)
    assert len(found["suites"][0]["unscored"]["model"]) == 2
    assert "punkt_tab" in (tmp_path / "without" / "scores.md").read_text()
    save_punkt(tmp_path)
    (score,) = run("with")["scores"]
    assert (score["num"], score["unscored"]) == (2, 1)


@pytest.mark.slow
def test_ifeval_of_the_real_file_needs_the_data_for_64_of_541(checks: Any, shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "prompts" / "ifeval.jsonl").read_text().splitlines()]
    values = [checks.process_results(row, ["Words."])["prompt_level_strict_acc"] for row in rows]
    assert (len(values), sum(map(math.isnan, values))) == (541, 64)
