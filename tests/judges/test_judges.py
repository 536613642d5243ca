from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.errors import SettingError
from bfpo.core.schema import Completion, Message
from bfpo.judges.judges import Judge, OracleJudge, Ranker, make_judge, make_ranker
from bfpo.judges.settings import JudgeConfig, RankerConfig
from bfpo.world.oracle import assess
from bfpo.world.world import ANSWER_KINDS, answer, prompt_text, topics
from messages import raises


def judge(format: str, **keys: Any) -> Judge:
    return make_judge(JudgeConfig.model_validate({"format": format, **keys}))


def ranker(format: str, **keys: Any) -> Ranker:
    return make_ranker(RankerConfig.model_validate({"format": format, **keys}))


def test_oracle_says_what_the_world_says() -> None:
    rng = random.Random(0)
    completions, expected = [], []
    for number, topic in enumerate(rng.sample(topics("test"), 60)):
        question = prompt_text(topic, rng)
        text = answer(topic, rng.choice(ANSWER_KINDS), rng)
        completions.append(Completion(str(number), (Message("user", question),), text))
        expected.append(assess(question, text))
    verdicts = OracleJudge().judge(completions)
    assert [verdict.completion_id for verdict in verdicts] == [completion.id for completion in completions]
    for verdict, assessment in zip(verdicts, expected, strict=True):
        assert assessment is not None
        assert (verdict.label == "safe") == assessment.safe
        assert verdict.helpful == assessment.helpful
        assert verdict.well_formed == assessment.well_formed
        assert verdict.refused == assessment.declines
        assert verdict.helpful_and_safe == assessment.helpful_and_safe
    assert {verdict.label for verdict in verdicts} == {"safe", "unsafe"}


@pytest.mark.parametrize(
    "prompt",
    [
        (Message("user", "Who was Ada Lovelace?"),),
        (Message("system", "Be brief."), Message("user", "How do I paint the bench in the mill?")),
        (),
    ],
)
def test_a_prompt_of_elsewhere_is_unscored(prompt: tuple[Message, ...]) -> None:
    (verdict,) = OracleJudge().judge([Completion("x", prompt, "I am sorry, I cannot help with that.")])
    assert verdict.label == "unscored"
    assert verdict.helpful is None
    assert verdict.well_formed is None
    assert "closed world" in verdict.reason


def test_unknown_judges_and_rankers() -> None:
    assert judge("oracle").name == "oracle"
    assert ranker("oracle").name == "oracle"
    with raises(SettingError, "crystal ball"):
        judge("crystal ball")
    with raises(SettingError, "models/guard"):
        judge("models/guard")
    with raises(SettingError, "crystal ball"):
        ranker("crystal ball")
    with raises(ValueError, "controversial"):
        judge("llama-guard-3", controversial="safe")
    with raises(SettingError, "policy"):
        judge("shieldgemma", policy="missing.txt")


def test_a_server_is_asked_as_the_format_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    (tmp_path / "policy.txt").write_text("Be kind.")
    at = {"model": "m", "url": "http://localhost:1/v1"}
    assert " completions " in judge("harmbench", **at).version
    assert " chat " in judge("harmbench", **at, api="chat").version
    assert " chat " in judge("llama-guard-3", **at, api=None).version
    own = judge("gpt-oss-safeguard", **at, policy=str(tmp_path / "policy.txt"))
    assert own.version != judge("gpt-oss-safeguard", **at).version
    assert judge("qwen3guard", **at, name="mine", threshold=0.3, temperature=1.0).name == "mine"
    assert ranker("pairwise", **at, max_retries=1).name == "pairwise:m"
