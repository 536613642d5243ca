from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bfpo.core.errors import ModelError
from bfpo.data.pack import collate_pairs
from bfpo.data.tokenize import TokenPair
from bfpo.policy.probe import choose_form
from bfpo.policy.reference.forward_pass import ReferencePass, ReferenceReport, token_batches
from messages import raises
from tiny import tiny_model, tiny_pairs

MAIN, BUFFER = tiny_pairs(9, 1), tiny_pairs(5, 2)


def collate(pairs: Any) -> Any:
    return collate_pairs(pairs, form="padded")


@contextmanager
def counting(model: Any) -> Iterator[list[int]]:
    """Collect the number of sequences of each forward pass."""
    rows: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        hook.remove()


def run(
    *lists: list[TokenPair], cache: Path | None, model: Any = None, precision: str = "no", **settings: Any
) -> tuple[list[tuple[float, float]], ReferenceReport, int]:
    """The log-probs of all pairs in their order, the report, and how many pairs went through the model."""
    model = tiny_model() if model is None else model
    with counting(model) as rows:
        looked_up = ReferencePass(model, lists, cache=cache, mixed_precision=precision)
        done, report = looked_up.run(**{"collate": collate, "max_tokens": 40, **settings})
    assert [[pair.pair_id for pair in pairs] for pairs in done] == [[pair.pair_id for pair in pairs] for pairs in lists]
    values = [(pair.ref_chosen_logps, pair.ref_rejected_logps) for pairs in done for pair in pairs]
    assert report.num_pairs == len(values)
    return values, report, sum(rows) // 2  # type: ignore[return-value]


def assert_close(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    """Equal but for the rounding that other neighbours in a batch bring."""
    assert sum(found, ()) == pytest.approx(sum(expected, ()), rel=1e-5)


def test_a_second_pass_reads_the_very_same_bits(tmp_path: Path) -> None:
    without, report, _ = run(MAIN, BUFFER, cache=None)
    assert (report.num_computed, report.num_stored, report.cache, report.model_key) == (14, 0, None, None)
    first, report, passed = run(MAIN, BUFFER, cache=tmp_path)
    assert (passed, report.num_computed, report.num_stored, report.num_reused) == (14, 14, 14, 0)
    assert report.cache == str(tmp_path / str(report.model_key))
    again, report, passed = run(MAIN, BUFFER, cache=tmp_path)
    assert (passed, report.num_computed, report.num_reused) == (0, 0, 14)
    assert without == first == again


def test_packed_rows_are_kept_as_they_are_too(tmp_path: Path) -> None:
    model = tiny_model()
    assert choose_form(model, "packed", longest_text=12) == "packed"
    packed = {"collate": collate_pairs, "model": model}
    without, _, _ = run(MAIN, BUFFER, cache=None, **packed)
    first, _, _ = run(MAIN, BUFFER, cache=tmp_path, **packed)
    again, report, passed = run(MAIN, BUFFER, cache=tmp_path, **packed)
    assert without == first == again
    assert (passed, report.num_computed) == (0, 0)
    assert run(MAIN, BUFFER, cache=tmp_path) == (first, report, 0)  # how rows are laid out is not part of the key
    assert_close(without, run(MAIN, BUFFER, cache=None)[0])


def test_values_are_the_models_own(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float64)
    values, _, _ = run(MAIN, cache=tmp_path, model=model)
    for pair, found in zip(MAIN, values, strict=True):
        for completion, value in zip((pair.chosen_ids, pair.rejected_ids), found, strict=True):
            ids = torch.tensor([[*pair.prompt_ids, *completion]], dtype=torch.int64)
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(pair.prompt_ids)
            expected = sum(float(scores[start - 1 + t, int(token)]) for t, token in enumerate(completion))
            assert value == pytest.approx(expected, rel=1e-12)


def test_a_larger_mixture_computes_what_is_new_and_doubles_once(tmp_path: Path) -> None:
    run(MAIN[:6], cache=tmp_path)
    copies = [replace(pair, pair_id=f"{pair.pair_id}-again", chosen_is_safe=0.0) for pair in MAIN[5:7]]
    mixture = [*BUFFER, *copies, *MAIN]
    values, report, passed = run(mixture, BUFFER[:2], cache=tmp_path)
    assert (passed, report.num_computed, report.num_reused, report.num_rows) == (8, 8, 6, 14)
    assert_close(values, run(mixture, BUFFER[:2], cache=None)[0])
    assert values[5:7] == values[12:14]


def test_only_touched_rows_are_computed_again(tmp_path: Path) -> None:
    run(MAIN, cache=tmp_path)
    longer = [pair for pair in MAIN if len(pair.chosen_ids) > 3]
    assert 0 < len(longer) < len(MAIN)
    cut = [replace(pair, chosen_ids=pair.chosen_ids[:3]) for pair in MAIN]
    values, _, passed = run(cut, cache=tmp_path)
    assert passed == len(longer)
    assert_close(values, run(cut, cache=None)[0])


def test_other_weights_dtype_or_precision_compute_everything_again(tmp_path: Path) -> None:
    run(MAIN, cache=tmp_path)
    models = [tiny_model(seed=1), tiny_model(dtype=torch.float64), tiny_model(dtype=torch.bfloat16)]
    assert [run(MAIN, cache=tmp_path, model=model)[2] for model in models] == [9, 9, 9]
    assert run(MAIN, cache=tmp_path, precision="bf16")[2] == 9
    assert run(MAIN, cache=tmp_path)[2] == 0
    assert len(list(tmp_path.iterdir())) == 5


def test_an_adapter_shares_the_rows_of_its_base(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    values, _, passed = run(MAIN, cache=tmp_path, model=model)
    assert passed == 9
    bare, _, passed = run(MAIN, cache=tmp_path)
    assert passed == 0
    assert values == bare
    assert_close(values, run(MAIN, cache=None)[0])


@pytest.mark.parametrize(("error", "rows_per_shard"), [(KeyboardInterrupt, 3), (MemoryError, 1000)])
def test_an_interrupted_pass_goes_on_where_it_was(
    tmp_path: Path, error: type[BaseException], rows_per_shard: int
) -> None:
    straight, _, _ = run(MAIN, BUFFER, cache=None)
    calls = 0

    def stopping(pairs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return collate(pairs)

    model = tiny_model()
    looked_up = ReferencePass(model, [MAIN, BUFFER], cache=tmp_path)
    with counting(model) as rows, pytest.raises(error):
        looked_up.run(collate=stopping, max_tokens=40, rows_per_shard=rows_per_shard)
    assert (len(list(tmp_path.glob("*/*.parquet"))) == 1) == (rows_per_shard == 1000)
    values, report, passed = run(MAIN, BUFFER, cache=tmp_path)
    assert report.num_reused == sum(rows) // 2 > 3
    assert passed == 14 - report.num_reused > 0
    assert values == straight  # the batches that remain are those of the straight pass


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    values, report, _ = run(MAIN, cache=tmp_path / "file")
    assert values == run(MAIN, cache=None)[0]
    assert (report.num_computed, report.num_stored) == (9, 0)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "9 rows cannot be stored" in record.getMessage()


def test_a_torn_shard_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight, _, _ = run(MAIN, cache=tmp_path, rows_per_shard=4)
    torn = sorted(tmp_path.glob("*/*.parquet"))[0]
    torn.write_bytes(torn.read_bytes()[:100])
    values, report, passed = run(MAIN, cache=tmp_path)
    assert 0 < passed == report.num_computed < 9
    assert_close(values, straight)
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1
    assert run(MAIN, cache=tmp_path)[2] == 0


def test_weights_that_are_elsewhere_mean_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = tiny_model()
    model.lm_head.weight.ds_id = 0
    _, report, passed = run(MAIN, cache=tmp_path, model=model)
    assert (passed, report.model_key) == (9, None)
    assert sum("computed without the cache" in record.getMessage() for record in caplog.records) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(MAIN[:4], cache=tmp_path)
    caplog.clear()
    _, report, _ = run(MAIN, cache=tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == f"reference: 9 rows, 4 of them in {report.cache}, 5 to compute"
    assert lines[1].startswith("reference: 5 rows computed in ")


def test_a_log_prob_that_is_not_finite_names_its_pair_and_is_not_stored(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[int(MAIN[2].chosen_ids[0])] = float("inf")
    with raises(ModelError, "pair pair-1"):
        run(MAIN, cache=tmp_path, model=model)


@pytest.mark.parametrize(("max_tokens", "num_processes"), [(1, 1), (30, 1), (30, 3), (10_000, 1), (10_000, 4)])
def test_batches_by_tokens(max_tokens: int, num_processes: int) -> None:
    pairs = tiny_pairs(20, 4)
    size = [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    batches = token_batches(pairs, range(20), max_tokens=max_tokens, num_processes=num_processes)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(20))
    assert [size[i] for i in order] == sorted(size, reverse=True)
    assert all(len(batch) == 1 or sum(size[i] for i in batch) <= max_tokens for batch in batches)
    assert len(batches) >= num_processes
    if num_processes == 1:
        if max_tokens == 10_000:
            assert len(batches) == 1
        rest = token_batches(pairs, order[len(batches[0]) :], max_tokens=max_tokens)
        assert rest == batches[1:]
