from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.config import JudgeTrainConfig, load_config
from bfpo.core.errors import ConfigError, DataError, ModelError
from bfpo.core.schema import Completion, Message, Pair
from bfpo.data.write import write_pairs
from bfpo.judges.judges import make_judge, make_ranker
from bfpo.judges.ngrams import NgramSettings, fit_ranker
from bfpo.judges.settings import TrainedRankerSpec, TrainedSpec
from bfpo.runs.stages import preview_stage, run_stage
from messages import raises

GOOD, BAD = ["clear", "steps", "example", "detail", "answer"], ["whatever", "maybe", "dunno", "nothing", "no"]


def pairs(num: int = 80, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)
    made = []
    for n in range(num):
        texts = [" ".join(rng.choices([*words, "the", "and"], k=3 + n % 4)) for words in (GOOD, BAD)]
        made.append(Pair(f"p{n}", (Message("user", f"question {n % 13}"),), *texts, source="s"))
    return made


def sides(pair: Pair) -> tuple[Completion, Completion]:
    return Completion("a", pair.prompt, pair.chosen), Completion("b", pair.prompt, pair.rejected)


def test_the_more_helpful_one_is_found_and_turning_a_pair_turns_the_opinion() -> None:
    ranker = fit_ranker(pairs(), NgramSettings())
    asked = [sides(pair) for pair in pairs(30, seed=1)]
    found = ranker.compare(asked)
    turned = ranker.compare([(second, first) for first, second in asked])
    assert np.mean([one.first_is_better > 0.5 for one in found]) > 0.95
    for one, other in zip(found, turned, strict=True):
        assert one.first_is_better == pytest.approx(1 - other.first_is_better, abs=1e-12)
        assert (one.first_id, one.second_id, other.first_id) == ("a", "b", "b")


def test_p_is_the_logistic_function_of_the_difference_of_two_scores() -> None:
    settings = NgramSettings(num_features=1 << 10)
    ranker = fit_ranker(pairs(), settings)
    vectorizer = HashingVectorizer(ngram_range=(1, 2), n_features=1 << 10, alternate_sign=False, norm=None)
    tfidf = TfidfTransformer(sublinear_tf=True).fit(
        vectorizer.transform([text for pair in pairs() for text in (pair.chosen, pair.rejected)])
    )
    for pair, comparison in zip(pairs(5, 2), ranker.compare([sides(pair) for pair in pairs(5, 2)]), strict=True):
        rows = tfidf.transform(vectorizer.transform([pair.chosen, pair.rejected])).toarray()
        difference = math.fsum((rows[0] - rows[1]) * ranker._weights)
        assert comparison.first_is_better == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-12)


def test_equal_texts_tie_and_texts_without_words_are_unscored() -> None:
    ranker = fit_ranker(pairs(), NgramSettings())
    same = Completion("a", (), "clear steps"), Completion("b", (), "clear steps")
    none = Completion("a", (), "!"), Completion("b", (), "")
    one = Completion("a", (), "clear steps"), Completion("b", (), "")
    found = ranker.compare([same, none, one])
    assert [row.first_is_better is None for row in found] == [False, True, False]
    assert found[0].first_is_better == 0.5
    assert found[1].reason == "there is no word in either completion"
    assert ranker.compare([]) == []


def test_the_stage_writes_a_ranker_that_a_setting_names(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", pairs())
    config = JudgeTrainConfig(data={"files": str(tmp_path / "pairs.jsonl")}, kind="ranker", name="small")  # type: ignore[arg-type]
    assert "80 pairs of 13 prompts" in preview_stage("judge-train", config)
    run_stage("judge-train", config, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "model" / "judge.json").read_text())
    assert described["cross_validation"]["agreement"] > 0.95
    ranker = make_ranker(TrainedRankerSpec(model=str(tmp_path / "run" / "model")))
    expected = fit_ranker(pairs(), NgramSettings(), name="small")
    assert (ranker.name, ranker.version) == ("small", expected.version)
    assert ranker.compare([sides(pairs()[0])]) == expected.compare([sides(pairs()[0])])
    arguments = ["redteam", "--model", "m", "--prompts", "p", "--ranker", str(tmp_path / "run" / "model"), "--keys"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with raises(ModelError, "ranker"):
        make_judge(TrainedSpec(model=str(tmp_path / "run" / "model")))


def test_bad_input() -> None:
    with raises(DataError):
        fit_ranker([], NgramSettings())
    with raises(ModelError):
        make_ranker(TrainedRankerSpec(model="nowhere"))
    for setting in ("threshold=0.7", "with_prompt=true", "max_length=9"):
        with raises(ConfigError, "ranker"):
            load_config(JudgeTrainConfig, None, ["kind=ranker", "data.files=a.jsonl", setting])
    with raises(ConfigError, "ranker"):
        load_config(JudgeTrainConfig, None, ["kind=ranker", "data={files: a, where: {a: b}}"])
