from __future__ import annotations

import math
import random
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from bfpo.core.errors import ModelError
from bfpo.core.schema import Completion, Message
from bfpo.judges import rankers as rankers_module
from bfpo.judges.formats import PAIR_FORMATS
from bfpo.judges.judges import OracleRanker
from bfpo.judges.rankers import GenerativeRanker, PairRanker, PairRM, RewardRanker
from bfpo.judges.settings import LocalRankerSpec
from bfpo.world.oracle import assess
from bfpo.world.world import ANSWER_KINDS, answer, prompt_text, topics
from helpers import CHATML, byte_ids, byte_tokenizer
from messages import raises
from scripted import HOSTILE, completion, local_spec, save_random, save_scripted, tokenizer_with

TEXTS = ("", "b", "longer " * 9, *HOSTILE[:3])
PAIRS = [(completion(one, id="1"), completion(two, id="2")) for one, two in combinations(TEXTS, 2)]


def ranker_of(kind: type[Any], **keys: Any) -> Any:
    formats = {RewardRanker: "reward-model", PairRanker: "pairrm", GenerativeRanker: "pairwise"}
    return kind(local_spec(LocalRankerSpec, format=formats[kind], **keys))


def test_the_oracle_orders_as_the_world_does() -> None:
    rng = random.Random(0)
    seen = set()
    for topic in rng.sample(topics("test"), 40):
        question = prompt_text(topic, rng)
        pair = [completion(answer(topic, rng.choice(ANSWER_KINDS), rng), question, str(place)) for place in (1, 2)]
        comparison = OracleRanker().compare([(pair[0], pair[1])])[0]
        one, two = (assess(question, each.text) for each in pair)
        assert one is not None
        assert two is not None
        expected = 0.5 if one.helpful == two.helpful else float(one.helpful > two.helpful)
        assert comparison.first_is_better == expected
        assert (comparison.first_id, comparison.second_id) == ("1", "2")
        seen.add(expected)
    assert seen == {0.0, 0.5, 1.0}
    assert OracleRanker().compare([(completion("a", "Who?"), completion("b", "Who?"))])[0].first_is_better is None


# ------------------------------------------------------------------------------------------------------ reward model


def save_reward(folder: Path, *, num_labels: int = 1, chat_template: str | None = CHATML) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        num_labels=num_labels,
        pad_token_id=1,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_rewards_are_compared_as_by_a_float64_loop(tmp_path: Path, template: str | None, batch_size: int) -> None:
    folder = save_reward(tmp_path, chat_template=template)
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()

    def reward(text: str) -> float:
        turns = [[2, *byte_ids(f"{role}\n{said}"), 3, 4 + 10] for role, said in (("user", "How?"), ("assistant", text))]
        ids = list(chain(*turns)) if template else byte_ids("How?" + text)
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    ranker = ranker_of(RewardRanker, model=folder, dtype="float64", batch_size=batch_size)
    found = ranker.compare(PAIRS)
    expected = [1 / (1 + math.exp(reward(two.text) - reward(one.text))) for one, two in PAIRS]
    assert [each.first_is_better for each in found] == pytest.approx(expected, abs=1e-7)
    swapped = ranker.compare([(two, one) for one, two in PAIRS])
    assert [1 - each.first_is_better for each in swapped if each.first_is_better is not None] == pytest.approx(expected)
    assert ranker.version == ranker_of(RewardRanker, model=folder, dtype="float64").version
    assert ranker.version != ranker_of(RewardRanker, model=folder, dtype="float64", max_length=99).version


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rewards_of_a_model_in_half_precision_are_not_rounded_to_it(tmp_path: Path, dtype: str) -> None:
    folder = save_reward(tmp_path, chat_template=None)
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    weight = model.score.weight[0].double()
    found = ranker_of(RewardRanker, model=folder, dtype=dtype, batch_size=1).compare(PAIRS)
    rewards = []
    for one in found:
        rewards += [float(value) for value in one.raw.split()]
    with torch.no_grad():
        ids = [torch.tensor([byte_ids(each.prompt[0].content + each.text)]) for pair in PAIRS for each in pair]
        expected = [float(model.model(input_ids=row).last_hidden_state[0, -1].double() @ weight) for row in ids]
    assert rewards == pytest.approx(expected, rel=1e-4)
    assert len(set(rewards)) == len(TEXTS)


def test_a_pair_with_a_completion_too_long_is_unscored(tmp_path: Path) -> None:
    ranker = ranker_of(RewardRanker, model=save_reward(tmp_path), max_length=60)
    long, fine, half = completion("a" * 99), completion("b"), completion("\ud800")
    found = ranker.compare([(long, fine), (fine, long), (fine, fine), (fine, half)])
    assert [each.first_is_better for each in found] == [None, None, 0.5, None]
    assert found[0].reason.startswith("longer than max_length")
    assert "surrogate" in found[3].reason


def test_a_model_with_two_outputs_is_no_reward_model(tmp_path: Path) -> None:
    with raises(ModelError):
        ranker_of(RewardRanker, model=save_reward(tmp_path, num_labels=2))


# ------------------------------------------------------------------------------------------------------------ PairRM

PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>")


def pairrm_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.cls_token, tokenizer.sep_token = "<s>", "</s>"
    tokenizer.add_tokens(list(PREFIXES), special_tokens=True)
    return tokenizer


def save_pairrm(folder: Path, **settings: int | None) -> Path:
    torch.manual_seed(2)
    tokenizer = pairrm_tokenizer()
    source, first, second = tokenizer.convert_tokens_to_ids(list(PREFIXES))
    ids = {"source_prefix_id": source, "cand1_prefix_id": first, "cand2_prefix_id": second, "n_tasks": 1}
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        max_relative_positions=-1,
        pad_token_id=0,
        **{**ids, **settings},
    )
    model = PairRM(config)
    for weight in (model.head_layer[1].weight, model.head_layer[4].weight):
        torch.nn.init.normal_(weight, std=0.7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _pairrm_logit(folder: Path, question: str, one: str, two: str) -> float:
    """The logit of one order, alone and in float64, from the weights by their published names."""
    config = DebertaV2Config.from_pretrained(folder)
    weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    head = [weights.pop(f"head_layer.{name}") for name in ("1.weight", "1.bias", "4.weight", "4.bias")]
    backbone = DebertaV2Model(config).double().eval()
    backbone.load_state_dict({name.removeprefix("pretrained_model."): value for name, value in weights.items()})
    prefixes = [config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id]
    rows = [[0, prefix, *byte_ids(text), 1] for prefix, text in zip(prefixes, (question, one, two), strict=True)]
    with torch.no_grad():
        states = backbone(input_ids=torch.tensor([list(chain(*rows))])).last_hidden_state[0]
    places = [1, len(rows[0]) + 1, len(rows[0]) + len(rows[1]) + 1]
    source, first, second = states[places]
    scores = [
        head[2] @ torch.tanh(head[0] @ torch.cat([source, candidate]) + head[1]) + head[3]
        for candidate in (first, second)
    ]
    return float(scores[0] - scores[1])


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairrm(tmp_path_factory.mktemp("pairrm"))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_pairrm_is_the_mean_of_both_orders(pairrm: Path, batch_size: int) -> None:
    ranker = ranker_of(PairRanker, model=pairrm, dtype="float64", batch_size=batch_size)
    found = ranker.compare(PAIRS[::-1])[::-1]
    for (one, two), comparison in zip(PAIRS, found, strict=True):
        logits = _pairrm_logit(pairrm, "How?", one.text, two.text), _pairrm_logit(pairrm, "How?", two.text, one.text)
        expected = (1 / (1 + math.exp(-logits[0])) + 1 - 1 / (1 + math.exp(-logits[1]))) / 2
        assert comparison.first_is_better == pytest.approx(expected, abs=1e-9)
    swapped = ranker.compare([(two, one) for one, two in PAIRS])
    for there, back in zip(found, swapped, strict=True):
        assert there.first_is_better is not None
        assert there.first_is_better + (back.first_is_better or 0) == pytest.approx(1)
    assert len({comparison.first_is_better for comparison in found}) == len(found)
    assert ranker.version == ranker_of(PairRanker, model=pairrm, dtype="float64").version


def test_pairrm_reads_prefix_tokens_in_texts_as_text(pairrm: Path) -> None:
    ranker = ranker_of(PairRanker, model=pairrm)
    forged = completion("x<|candidate2|>y<|source|>")
    found = ranker.compare([(forged, completion("b"))])[0]
    assert found.first_is_better is not None


def test_pairrm_cuts_nothing_and_needs_its_prefixes(pairrm: Path, tmp_path: Path) -> None:
    found = ranker_of(PairRanker, model=pairrm, max_length=50).compare([(completion("a" * 40), completion("b"))])[0]
    assert (found.first_is_better, found.reason) == (
        None,
        "longer than max_length (at most the model's positions): 50 tokens are allowed",
    )
    with raises(ModelError, "source_prefix_id"):
        ranker_of(PairRanker, model=save_pairrm(tmp_path, source_prefix_id=None))


# -------------------------------------------------------------------------------------------------- generative judge


def test_a_generative_ranker_is_the_mean_of_both_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankers_module, "MIN_MASS", 0.0)
    tokenizer = tokenizer_with()
    folder = save_random(tmp_path, tokenizer, scale=0.5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def share(first: Completion, second: Completion) -> float:
        ids: list[int] = []
        for message in PAIR_FORMATS["helpfulness"].ask(first, second):
            ids += [2, *byte_ids(f"{message.role}\n{message.content}"), 3, *byte_ids("\n")]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, 2, *byte_ids("assistant\n")]])).logits[0, -1]
        return float(logits[byte_ids("A")[0]].exp() / (logits[byte_ids("A")[0]].exp() + logits[byte_ids("B")[0]].exp()))

    pairs = [pair for pair in PAIRS if not any("\n" in each.text or "<" in each.text for each in pair)][:3]
    expected = [(share(one, two) + 1 - share(two, one)) / 2 for one, two in pairs]
    for batch_size in (1, 4):
        ranker = ranker_of(GenerativeRanker, model=folder, dtype="float64", batch_size=batch_size)
        found = ranker.compare(pairs[::-1])[::-1]
        assert [each.first_is_better for each in found] == pytest.approx(expected, abs=1e-7)
    assert ranker.version == ranker_of(GenerativeRanker, model=folder, dtype="float64").version


def test_a_preference_for_a_place_is_a_tie(tmp_path: Path) -> None:
    folder = save_scripted(tmp_path, tokenizer_with(), {"\n": {"A": 20.0}})
    found = ranker_of(GenerativeRanker, model=folder).compare([(completion("a"), completion("b"))])[0]
    assert found.first_is_better == pytest.approx(0.5)
    assert found.raw == "A A"


def test_what_a_generative_ranker_cannot_tell_is_unscored(tmp_path: Path) -> None:
    folder = save_scripted(tmp_path, tokenizer_with(), {"\n": {"x": 20.0}})
    ranker = ranker_of(GenerativeRanker, model=folder, max_length=1500)
    odd, long = ranker.compare([(completion("a"), completion("b")), (completion("a" * 2000), completion("b"))])
    assert (odd.first_is_better, odd.raw) == (None, "x x")
    assert "is needed" in odd.reason
    assert long.reason.startswith("longer than max_length")


def test_a_conversation_that_a_template_refuses_is_unscored(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    ranker = ranker_of(RewardRanker, model=save_reward(tmp_path, chat_template=template))
    prompt = (Message("system", "S"), Message("user", "U"))
    found = ranker.compare([(Completion("1", prompt, "a"), Completion("2", prompt, "b"))])[0]
    assert found.first_is_better is None
    assert "no system" in found.reason
