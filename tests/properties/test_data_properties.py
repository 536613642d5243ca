"""What holds for all data: round trips, one end token, the shared prompt, each buffer pair once per cycle."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from bfpo.core.errors import BfpoError
from bfpo.core.schema import Completion, Message, Pair
from bfpo.data.chat import TextEncoder, end_token_id
from bfpo.data.labels import cell_counts, cell_of
from bfpo.data.messages import ends_with_assistant
from bfpo.data.pack import PairCollator
from bfpo.data.read import read_completions, read_pairs
from bfpo.data.split import normalised_prompt
from bfpo.data.streams import PairItem, TwoStreamDataset, buffer_order
from bfpo.data.tokenize import PairTokenizer, TokenizeReport, TokenPair, tokenize_pairs
from bfpo.data.write import write_completions, write_pairs
from bfpo.training.checks import check_rows
from helpers import CHATML, SPECIAL, byte_tokenizer, make_pair, split_pairs

PROPERTY = settings(max_examples=30, deadline=None)

text = st.text(st.characters(codec="utf-8"), max_size=30)
hostile_text = st.lists(st.one_of(text, st.sampled_from([*SPECIAL, "\ufdd0", " ", "\n"])), max_size=6).map("".join)
completion = hostile_text.filter(lambda value: bool(value.strip()))
label = st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.floats(0, 1))
known = st.floats(0, 1)
messages = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), hostile_text), max_size=4)


@st.composite
def pairs(draw: st.DrawFn, labels: st.SearchStrategy[float | None] = label) -> Pair:
    chosen, rejected = draw(completion), draw(completion)
    assume(chosen.strip() != rejected.strip())
    prompt = tuple(draw(messages))
    assume(not ends_with_assistant(prompt) or prompt[-1].content.strip() not in (chosen.strip(), rejected.strip()))
    return Pair(draw(text) or "p", prompt, chosen, rejected, draw(labels), draw(labels), draw(text))


@PROPERTY
@given(st.lists(pairs(), max_size=5, unique_by=lambda pair: pair.id), st.sampled_from(["p.jsonl", "p.json.gz"]))
def test_pairs_written_are_read_again(items: list[Pair], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        write_pairs(file, items)
        result = read_pairs([file])
    assert result.rejects == []
    assert result.pairs == items


@PROPERTY
@given(st.lists(st.builds(Completion, text.filter(bool), st.tuples(), text, text, text, st.booleans()), max_size=4))
def test_completions_written_are_read_again(items: list[Completion]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_completions(Path(folder) / "c.jsonl", items)
        assert read_completions(Path(folder) / "c.jsonl") == items


@PROPERTY
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json"]))
def test_no_bytes_bring_a_reader_down(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"any{suffix}"
        file.write_bytes(content.replace(b"[", b"("))
        result = read_pairs([file], layout="trl")
    assert result.rows == len(result.rejects) + len(result.pairs)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
fields = st.sampled_from(
    ["id", "prompt", "chosen", "rejected", "chosen_is_safe", "response_0", "response_1", "better_response_id"]
)


@PROPERTY
@given(st.dictionaries(fields, json_values), st.sampled_from(["bfpo", "trl", "pku", "hh"]))
def test_no_values_bring_a_layout_down(row: dict[str, object], layout: str) -> None:
    import json

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "any.jsonl"
        file.write_text(json.dumps(row))
        result = read_pairs([file], layout=layout)
    assert len(result.pairs) + len(result.rejects) == 1


TOKENIZERS = {
    "default": byte_tokenizer(),
    "chatml": byte_tokenizer(CHATML),
    "merges": byte_tokenizer(CHATML, merges=[("\n", "\n"), ("\n", "a"), (":", "\n"), ("s", ">"), (" ", " ")]),
    "no bos": byte_tokenizer(bos=False, merges=[("\n", "\n"), ("\n\n", "\n")]),
}


@PROPERTY
@pytest.mark.parametrize("name", list(TOKENIZERS))
@given(pair=pairs(known))
def test_a_pair_decodes_back_and_ends_once(name: str, pair: Pair) -> None:
    tokenizer = TOKENIZERS[name]
    (made,), report = tokenize_pairs([pair], tokenizer, max_length=10_000)
    end = end_token_id(tokenizer)
    prompt = made.prompt_ids.tolist()
    for answer, ids in ((pair.chosen, made.chosen_ids.tolist()), (pair.rejected, made.rejected_ids.tolist())):
        assert ids[-1] == end
        assert ids.count(end) == 1
        whole = tokenizer.decode([*prompt, *ids[:-1]])
        assert whole.endswith(answer)
        if report.num_boundary_moved == 0:
            assert tokenizer.decode(ids[:-1]) == answer
    assert report.cut_tokens == 0
    assert (report.template_changes, report.openings) == ({}, {})
    assert (made.chosen_is_safe, made.rejected_is_safe) == (pair.chosen_is_safe, pair.rejected_is_safe)


SPECIAL_CASES = {
    **TOKENIZERS,
    "a token that is not special": byte_tokenizer(
        CHATML, special=[*SPECIAL[:3], AddedToken("<|im_end|>", special=False, rstrip=True), AddedToken("<pad>")]
    ),
    "refuses system turns": byte_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] | trim }}</s>{% endfor %}"
    ),
}


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", list(SPECIAL_CASES))
@given(items=st.lists(pairs(st.one_of(known, known, label)), min_size=4, max_size=9), data=st.data())
def test_a_batch_gives_what_its_pairs_give_one_by_one(name: str, items: list[Pair], data: st.DataObject) -> None:
    tokenizer = SPECIAL_CASES[name]
    if data.draw(st.integers(0, 3)) == 0:
        items.insert(data.draw(st.integers(0, len(items))), make_pair(chosen=" ", id="empty"))
    limits = {"max_length": data.draw(st.integers(2, 200)), "max_completion_length": 20}
    expected: list[object] = []
    report: Counter[str] = Counter()
    longest = 0
    for pair in items:
        try:
            (made,), counts = tokenize_pairs([pair], tokenizer, **limits)
        except BfpoError as error:
            expected.append(repr(error))
            break
        expected.append(ids_and_labels(made))
        longest = max(longest, counts.longest_tokens)
        report.update(flat(counts))
    found: list[object] = []
    tokenize = PairTokenizer(tokenizer, **limits)
    try:
        found.extend(map(ids_and_labels, tokenize(items)))
    except BfpoError as error:
        found.append(repr(error))
    assert found == expected
    assert flat(tokenize.report) == {**dict.fromkeys(flat(tokenize.report), 0), **report, "longest_tokens": longest}


def flat(report: TokenizeReport) -> dict[str, int]:
    counts = {name: value for name, value in report.as_row().items() if isinstance(value, int)}
    return {**counts, **report.template_changes, **report.openings}


def ids_and_labels(pair: TokenPair) -> tuple[object, ...]:
    ids = (pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist())
    return (pair.pair_id, *ids, pair.chosen_is_safe, pair.rejected_is_safe)


@PROPERTY
@given(st.lists(hostile_text, min_size=9, max_size=20))
def test_many_texts_give_what_each_gives(values: list[str]) -> None:
    for tokenizer in TOKENIZERS.values():
        expected = [tokenizer(value, add_special_tokens=False)["input_ids"] for value in values]
        assert TextEncoder(tokenizer).encode(values) == expected


@PROPERTY
@given(pairs(known), st.integers(2, 60), st.one_of(st.none(), st.integers(1, 30)))
def test_cuts_keep_the_limits_and_the_count(pair: Pair, max_length: int, max_completion_length: int | None) -> None:
    tokenizer = TOKENIZERS["default"]
    (full,), _ = tokenize_pairs([pair], tokenizer, max_length=10_000)
    limits = {"max_length": max_length, "max_completion_length": max_completion_length}
    (cut,), report = tokenize_pairs([pair], tokenizer, **limits)
    lost = 0
    for whole, part in ((full.chosen_ids, cut.chosen_ids), (full.rejected_ids, cut.rejected_ids)):
        assert 1 <= len(part) <= (max_completion_length or max_length)
        assert len(cut.prompt_ids) + len(part) <= max_length
        assert whole[: len(part)].tolist() == part.tolist()
        lost += len(whole) - len(part)
    assert cut.prompt_ids[0] == full.prompt_ids[0]
    assert report.cut_completion_tokens == lost
    assert report.cut_prompt_tokens == len(full.prompt_ids) - len(cut.prompt_ids)
    if (
        len(cut.prompt_ids) > 1
    ):  # a completion is cut for the whole length only when the prompt has nothing left to give
        assert all(
            len(part) == min(len(whole), max_completion_length or len(whole))
            for whole, part in ((full.chosen_ids, cut.chosen_ids), (full.rejected_ids, cut.rejected_ids))
        )


@PROPERTY
@given(hostile_text)
def test_marked_encoding_equals_plain_encoding_of_unmarked_text(value: str) -> None:
    value = value.replace("\ufdd0", "")
    for tokenizer in TOKENIZERS.values():
        encoder = TextEncoder(tokenizer)
        assert encoder.encode_marked(value, "\ufdd0") == encoder.encode([value])[0]


@PROPERTY
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5), st.integers(1, 4))
def test_every_buffer_pair_once_per_cycle(num_main: int, num_buffer: int, seed: int, epochs: int) -> None:
    used = np.concatenate(
        [
            buffer_order(num_main=num_main, num_buffer=num_buffer, seed=seed, epoch=epoch)[:num_main]
            for epoch in range(epochs)
        ]
    )
    assert len(used) == num_main * epochs
    for start in range(0, len(used), num_buffer):
        cycle = used[start : start + num_buffer]
        assert len(set(cycle.tolist())) == len(cycle)
    counts = Counter(used.tolist())
    assert max(counts.values()) - min(counts.get(k, 0) for k in range(num_buffer)) <= 1


@PROPERTY
@given(st.lists(st.tuples(known, known), min_size=1, max_size=6), st.booleans(), st.data())
def test_labels_and_ids_keep_their_order_through_the_batch(
    labels: list[tuple[float, float]], with_buffer: bool, data: st.DataObject
) -> None:
    def token_pair(number: int, chosen: float, rejected: float) -> TokenPair:
        lengths = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
        arrays = (np.full(length, 10 * number + k, np.int32) for k, length in enumerate(lengths, start=1))
        return TokenPair(str(number), *arrays, chosen, rejected)

    stream = [token_pair(number, *both) for number, both in enumerate(labels)]
    dataset = TwoStreamDataset(stream, stream[::-1] if with_buffer else None, seed=0)
    order = data.draw(st.permutations(range(len(stream))))
    items: list[PairItem] = [dataset[index] for index in order]
    form = data.draw(st.sampled_from(["packed", "padded"]))
    max_tokens = data.draw(st.none() | st.integers(1, 60))
    batch = PairCollator(0, form, max_tokens)(items)
    expected = [item.main for item in items] + [item.buffer for item in items if item.buffer is not None]
    places = [place for microbatch in batch["microbatches"] for place in microbatch["place"].tolist()]
    assert sorted(places) == list(range(len(expected)))
    for microbatch in batch["microbatches"]:
        pairs = [expected[place] for place in microbatch["place"].tolist()]
        assert max_tokens is None or len(pairs) == 1 or microbatch["input_ids"].numel() <= max_tokens
        assert microbatch["chosen_is_safe"].tolist() == [pair.chosen_is_safe for pair in pairs]
        assert microbatch["rejected_is_safe"].tolist() == [pair.rejected_is_safe for pair in pairs]
        assert microbatch["pair_index"].tolist() == batch["pair_index"][microbatch["place"]].tolist()
        check_rows(microbatch, pairs)


@PROPERTY
@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30), st.integers(0, 9), st.randoms())
def test_a_split_shares_no_prompt_in_any_order(prompts: list[str], seed: int, random: object) -> None:
    assume(len(set(prompts)) > 1)
    items = [make_pair(prompt=prompt, id=str(k)) for k, prompt in enumerate(prompts)]
    held_out = len(set(prompts)) // 2
    train, test = split_pairs(items, held_out=held_out, seed=seed)
    names = [{normalised_prompt(pair.prompt) for pair in side} for side in (train, test)]
    assert len(names[1]) == held_out
    assert not names[0] & names[1]
    assert len(train) + len(test) == len(items)
    random.shuffle(items)  # type: ignore[attr-defined]
    assert {pair.id for pair in split_pairs(items, held_out=held_out, seed=seed)[1]} == {pair.id for pair in test}


@PROPERTY
@given(st.lists(st.tuples(label, label), max_size=20))
def test_cells_count_every_pair(labels: list[tuple[float | None, float | None]]) -> None:
    items = [make_pair(labels=both) for both in labels]
    counts = cell_counts(items)
    assert sum(counts.values()) == len(items)
    for chosen, rejected in labels:
        if chosen is not None and rejected is not None:
            assert cell_of(chosen, rejected).split("-") == [
                "safe" if value > 0.5 else "unsafe" for value in (chosen, rejected)
            ]
