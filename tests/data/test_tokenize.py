"""Pairs and completions to ids: boundaries, cuts in their order, counts, errors with the row's id."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from bfpo.core.errors import DataError, LabelError, ModelError, SettingError
from bfpo.core.schema import Completion, Message, Pair
from bfpo.data.labels import resolve_labels
from bfpo.data.read import read_pairs
from bfpo.data.tokenize import TokenPair, prompt_ids, token_notes, tokenize_pairs
from helpers import BOS, CHATML, EOS, IM_END, byte_ids, byte_tokenizer, make_pair
from messages import raises

PROMPT = [BOS, *byte_ids("User:\nq\n\nAssistant:\n")]  # 21 tokens


def ids(pair: TokenPair) -> tuple[list[int], list[int], list[int]]:
    return pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()


def test_a_pair_by_hand() -> None:
    (pair,), report = tokenize_pairs([make_pair(labels=(True, 0.25))], byte_tokenizer())
    assert ids(pair) == (PROMPT, [*byte_ids("yes"), EOS], [*byte_ids("no"), EOS])
    assert pair.prompt_ids.dtype == pair.chosen_ids.dtype == np.int32
    assert (pair.pair_id, pair.chosen_is_safe, pair.rejected_is_safe) == ("p", 1.0, 0.25)
    assert pair.ref_chosen_logps is None
    assert pair.ref_rejected_logps is None
    assert report.as_row() == {
        "num_pairs": 1,
        "prompt_truncated": 0,
        "completion_truncated": 0,
        "cut_prompt_tokens": 0,
        "cut_completion_tokens": 0,
        "num_tokens": 21 + 4 + 21 + 3,
        "longest_tokens": 25,
        "num_identical": 0,
        "num_boundary_moved": 0,
    }


def test_rows_without_a_prompt_are_counted() -> None:
    rows = [make_pair(), replace(make_pair(), prompt=())]
    _, report = tokenize_pairs(rows, byte_tokenizer())
    assert report.as_row()["num_without_prompt"] == 1
    assert token_notes("data", report.as_row()) == [
        "data: 1 of 2 rows have no prompt; their completions are learned as text without one"
    ]


def test_a_merge_across_the_boundary_takes_the_token_from_the_prompt_of_both() -> None:
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = byte_tokenizer(template, merges=[(":", " ")])
    (pair,), report = tokenize_pairs([make_pair(chosen=" yes", rejected="no")], tokenizer)
    merged = 260
    assert ids(pair) == (
        byte_ids("user:qassistant"),
        [merged, *byte_ids("yes"), EOS],
        [*byte_ids(":no"), EOS],
    )
    assert report.num_boundary_moved == 1


def test_a_generation_prompt_that_the_whole_conversation_lacks_is_not_in_the_prompt() -> None:
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    (pair,), report = tokenize_pairs([make_pair()], byte_tokenizer(thinking))
    assert ids(pair)[1] == [*byte_ids("yes"), IM_END]
    assert report.num_boundary_moved == 1


@pytest.mark.parametrize(
    ("limits", "prompt", "chosen", "rejected", "counts"),
    [
        # Completions are cut first, to their own limit, and lose the end token.
        ({"max_completion_length": 3}, PROMPT, "yes", ["no", EOS], (0, 1, 0, 1)),
        ({"max_completion_length": 2}, PROMPT, "ye", "no", (0, 2, 0, 3)),
        # Then the prompt on the left, BOS kept; a completion that fits is left alone.
        ({"max_length": 25}, PROMPT, ["yes", EOS], ["no", EOS], (0, 0, 0, 0)),
        ({"max_length": 10}, [BOS, *PROMPT[-5:]], ["yes", EOS], ["no", EOS], (1, 0, 15, 0)),
        ({"max_length": 10, "max_completion_length": 2}, [BOS, *PROMPT[-7:]], "ye", "no", (1, 2, 13, 3)),
        ({"max_length": 5}, [BOS], ["yes", EOS], ["no", EOS], (1, 0, 20, 0)),
        # Then, with one token of prompt left, completions again.
        ({"max_length": 4}, [BOS], "yes", ["no", EOS], (1, 1, 20, 1)),
        ({"max_length": 2}, [BOS], "y", "n", (1, 2, 20, 5)),
    ],
)
def test_cuts_keep_completions_and_are_counted(
    limits: dict[str, int],
    prompt: list[int],
    chosen: str | list[str | int],
    rejected: str | list[str | int],
    counts: tuple[int, int, int, int],
) -> None:
    (pair,), report = tokenize_pairs([make_pair()], byte_tokenizer(), **limits)
    expected = []
    for parts in (chosen, rejected):
        flat: list[int] = []
        for part in [parts] if isinstance(parts, str) else parts:
            flat += byte_ids(part) if isinstance(part, str) else [part]
        expected.append(flat)
    assert ids(pair) == (prompt, *expected)
    seen = (
        report.prompt_truncated,
        report.completion_truncated,
        report.cut_prompt_tokens,
        report.cut_completion_tokens,
    )
    assert seen == counts
    assert report.cut_tokens == counts[2] + counts[3]
    assert report.longest_tokens <= limits.get("max_length", 1024)


def test_a_prompt_without_bos_keeps_its_end() -> None:
    (pair,), _ = tokenize_pairs([make_pair()], byte_tokenizer(bos=False), max_length=6)
    assert ids(pair)[0] == PROMPT[-2:]


def test_completions_that_a_cut_makes_the_same_are_counted() -> None:
    pairs = [make_pair(chosen="same a", rejected="same b"), make_pair(chosen="this", rejected="that", id="q")]
    _, report = tokenize_pairs(pairs, byte_tokenizer(), max_completion_length=4)
    assert (report.num_pairs, report.num_identical) == (2, 1)


@pytest.mark.parametrize("field", ["chosen", "rejected"])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_completion_is_an_error_with_the_id(field: str, text: str) -> None:
    with raises(DataError, "pair odd-7", field):
        tokenize_pairs([make_pair(id="odd-7", **{field: text})], byte_tokenizer())


def test_an_unknown_label_is_an_error_with_the_id() -> None:
    with raises(LabelError, "pair odd-7"):
        tokenize_pairs([make_pair(id="odd-7", labels=(1, None))], byte_tokenizer())


@pytest.mark.parametrize(
    "limits", [{"max_length": 1}, {"max_length": 0}, {"max_completion_length": 0}, {"max_completion_length": -1}]
)
def test_a_limit_too_small_is_an_error(limits: dict[str, int]) -> None:
    with raises(SettingError, *limits):
        tokenize_pairs([make_pair()], byte_tokenizer(), **limits)


def test_a_template_without_common_beginning_is_an_error() -> None:
    backwards = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
    with raises(ModelError):
        tokenize_pairs([make_pair()], byte_tokenizer(backwards))


def test_an_empty_prompt_gives_unconditional_text() -> None:
    (pair,), _ = tokenize_pairs([make_pair(prompt="")], byte_tokenizer(CHATML))
    assert ids(pair) == ([BOS], [*byte_ids("yes"), IM_END], [*byte_ids("no"), IM_END])


def test_single_completions_by_hand() -> None:
    question = (Message("user", "q"),)
    done, cut = Completion("a", question, "yes"), Completion("b", question, "ye", finished=False)
    texts, report = tokenize_pairs([done, cut], byte_tokenizer())
    assert [ids(text) for text in texts] == [
        (PROMPT, [*byte_ids("yes"), EOS], []),
        (PROMPT, byte_ids("ye"), []),
    ]
    assert [text.pair_id for text in texts] == ["a", "b"]
    assert report.num_pairs == 2
    with raises(DataError, "completion c"):
        tokenize_pairs([Completion("c", question, " ")], byte_tokenizer())


def test_prompt_ids_are_what_a_pair_follows() -> None:
    question = (Message("user", "q"),)
    assert prompt_ids(question, byte_tokenizer()) == PROMPT
    assert prompt_ids(question, byte_tokenizer(), max_length=5) == [BOS, *PROMPT[-4:]]
    assert prompt_ids((), byte_tokenizer()) == [BOS]
    with raises(SettingError, "max_length"):
        prompt_ids(question, byte_tokenizer(), max_length=0)


# --------------------------------------------------------------------------------------------- real tokenizers


@functools.cache
def _stories(shared_data: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(shared_data / "model_stories260K" / "hf")


@functools.cache
def _from_file(shared_data: Path, name: str) -> PreTrainedTokenizerFast:
    file = shared_data / "tokenizers" / f"{name}_tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def real_pairs(shared_data: Path) -> list[Pair]:
    pairs = read_pairs([shared_data / "preferences" / "xstest_bfpo_pairs.jsonl"]).pairs[::100]
    buffer = read_pairs([shared_data / "preferences" / "hh_helpful_base_test.jsonl.gz"]).pairs[::300]
    return pairs + resolve_labels(buffer, unknown="safe")[0]


@pytest.mark.parametrize("family", ["stories", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_real_tokenizers_on_real_pairs(
    shared_data: Path, real_pairs: list[Pair], family: str, template: str | None
) -> None:
    tokenizer = _stories(shared_data) if family == "stories" else _from_file(shared_data, family)
    token_pairs, report = tokenize_pairs(real_pairs, tokenizer, max_length=100_000, chat_template=template)
    assert report.cut_tokens == 0
    end = tokenizer.eos_token_id
    for pair, token_pair in zip(real_pairs, token_pairs, strict=True):
        prompt, chosen, rejected = ids(token_pair)
        for text, completion in ((pair.chosen, chosen), (pair.rejected, rejected)):
            assert completion.count(end) == 1
            assert completion[-1] == end
            whole = tokenizer.decode([*prompt, *completion[:-1]])
            assert text.strip() in whole
            assert tokenizer.decode(completion[:-1]).strip() == text.strip()
        assert pair.prompt[-1].content in tokenizer.decode(prompt)


@pytest.mark.parametrize("family", ["stories", "gpt2", "gpt_neox"])
def test_real_tokenizers_on_text_that_holds_their_end_token(shared_data: Path, family: str) -> None:
    tokenizer = _stories(shared_data) if family == "stories" else _from_file(shared_data, family)
    eos = tokenizer.eos_token
    hostile = make_pair(prompt=f"say {eos}", chosen=f"I say {eos} now.", rejected=f"{eos}")
    (pair, plain), _ = tokenize_pairs([hostile, make_pair(prompt="say it")], tokenizer)
    prompt, chosen, rejected = ids(pair)
    end = tokenizer.eos_token_id
    assert prompt.count(end) == ids(plain)[0].count(end)
    assert chosen.count(end) == rejected.count(end) == 1
    assert tokenizer.decode(chosen[:-1]).strip() == f"I say {eos} now."
