from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from bfpo.core.errors import ModelError, SettingError
from bfpo.judges.classifier import ClassifierJudge
from bfpo.judges.settings import ClassifierSpec
from helpers import byte_ids, byte_tokenizer
from messages import raises
from scripted import HOSTILE, completion, local_spec

TEXTS = ("", "b", "longer " * 9, *HOSTILE[:4])


def judge_of(model: Path, *, multi_label: bool | None = None, **keys: Any) -> ClassifierJudge:
    return ClassifierJudge(local_spec(ClassifierSpec, model=model, **keys), multi_label=multi_label)


def paired_tokenizer() -> PreTrainedTokenizerFast:
    backend = byte_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_input_names=inputs
    )


def save_bert(folder: Path, labels: tuple[str, ...] = ("harmful", "fine", "odd"), **settings: Any) -> Path:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        max_position_embeddings=256,
        pad_token_id=1,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        **settings,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    paired_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def _logits(folder: Path, question: str, text: str) -> torch.Tensor:
    model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    first, second = [0, *byte_ids(question), 1], [*byte_ids(text), 1]
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([first + second]),
            token_type_ids=torch.tensor([[0] * len(first) + [1] * len(second)]),
        )
    return output.logits[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_p_safe_is_that_of_a_float64_loop_text_by_text(bert: Path, batch_size: int) -> None:
    judge = judge_of(model=bert, safe_label="fine", dtype="float64", batch_size=batch_size)
    absent = judge_of(model=bert, unsafe_label=0, dtype="float64", batch_size=batch_size)
    several = judge_of(model=bert, safe_label=1, multi_label=True, dtype="float64", batch_size=batch_size)
    completions = [completion(text, "question", str(number)) for number, text in enumerate(TEXTS)]
    logits = [_logits(bert, "question", text) for text in TEXTS]
    expected = [
        [float(row.softmax(dim=-1)[1]) for row in logits],
        [1 - float(row.softmax(dim=-1)[0]) for row in logits],
        [float(row[1].sigmoid()) for row in logits],
    ]
    for each, values in zip((judge, absent, several), expected, strict=True):
        verdicts = each.judge(completions[::-1])[::-1]
        assert [verdict.completion_id for verdict in verdicts] == [c.id for c in completions]
        assert [verdict.p_safe for verdict in verdicts] == pytest.approx(values, abs=1e-10)
        assert [verdict.label == "safe" for verdict in verdicts] == [value >= 0.5 for value in values]
    assert len({judge.version, absent.version, several.version}) == 3
    assert judge.version == judge_of(model=bert, safe_label="fine", dtype="float64").version


def test_the_config_says_that_labels_do_not_exclude_each_other(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "multi", problem_type="multi_label_classification")
    verdict = judge_of(model=folder, safe_label="fine", dtype="float64").judge([completion("b", "q")])[0]
    assert verdict.p_safe == pytest.approx(float(_logits(folder, "q", "b")[1].sigmoid()), abs=1e-10)
    single = save_bert(tmp_path / "single", ("toxic",))
    verdict = judge_of(model=single, unsafe_label="toxic", dtype="float64").judge([completion("b", "q")])[0]
    assert verdict.p_safe == pytest.approx(1 - float(_logits(single, "q", "b")[0].sigmoid()), abs=1e-10)


def test_the_completion_alone(bert: Path) -> None:
    judge = judge_of(model=bert, safe_label="fine", text="completion", dtype="float64")
    one, two = judge.judge([completion("b", "q"), completion("b", "another")])
    assert one.p_safe == pytest.approx(two.p_safe)
    assert judge.version != judge_of(model=bert, safe_label="fine", dtype="float64").version


def test_a_decoder_without_a_padding_token_gets_single_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        num_labels=2,
        pad_token_id=None,
    )
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    verdicts = judge_of(model=tmp_path, safe_label=1, text="completion").judge([completion("abc"), completion("d")])
    for text, verdict in zip(("abc", "d"), verdicts, strict=True):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([byte_ids(text)])).logits[0]
        assert verdict.p_safe == pytest.approx(float(logits.softmax(dim=-1)[1]), abs=1e-5)


def test_nothing_is_cut_and_no_text_is_guessed(bert: Path) -> None:
    judge = judge_of(model=bert, safe_label="fine", max_length=4096)  # the model has 256 positions
    fits, long, half = judge.judge([completion("a" * 249), completion("a" * 250), completion("\udc80")])
    assert fits.p_safe is not None
    assert (long.label, long.reason) == (
        "unscored",
        "longer than max_length (at most the model's positions): 256 tokens are allowed",
    )
    assert "surrogate" in half.reason
    assert judge.judge([]) == []


def test_broken_weights_give_no_verdict(tmp_path: Path) -> None:
    folder = save_bert(tmp_path)
    model = BertForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(folder)
    verdict = judge_of(model=folder, safe_label="fine").judge([completion("x")])[0]
    assert (verdict.label, verdict.reason) == ("unscored", "the model's logits are not finite")


def test_what_cannot_be_a_judge_is_refused(bert: Path, tmp_path: Path) -> None:
    with raises(SettingError):
        judge_of(model=bert, safe_label="safe")
    with raises(ValidationError):
        judge_of(model=bert)
    with raises(ValidationError):
        judge_of(model=bert, safe_label=1, text="both")
    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(tmp_path)
    paired_tokenizer().save_pretrained(tmp_path)
    with raises(ModelError):
        judge_of(model=tmp_path, safe_label=1)
