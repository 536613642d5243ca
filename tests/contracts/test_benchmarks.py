"""The benchmarks' pairs, counts of operations, results and pages are right; the slow test runs them against TRL."""

from __future__ import annotations

import dataclasses
import gzip
import json
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import balance, generation, hot_path, prepare, rampup, real, report, scaling, sft, throughput
from benchmarks.flops import flop_counter, needed_flops, useful_tokens
from benchmarks.options import RESULTS
from benchmarks.process import ROOT, read_results, write_results
from benchmarks.sft_training import trl_row
from benchmarks.summary import (
    best_rate,
    counterpart,
    fastest,
    memory_ratio,
    overall_factor,
    rate_share,
    speed_ratio,
    throughput_arms,
)
from benchmarks.tables import TABLES, real_generation_tables, real_tables, sft_tables, show_tables
from benchmarks.workload import (
    EOS,
    MODELS,
    make_model,
    make_pairs,
    make_texts,
    make_tokenizer,
    pairs_of_length,
    text_rows,
)
from bfpo import BfpoError
from bfpo.core.errors import RunError, TrainingError
from bfpo.data.pack import collate_pairs, longest_text, pair_sizes
from bfpo.policy.logps import sequence_logps
from bfpo.policy.probe import choose_form
from helpers import CHATML, byte_tokenizer, write_rows
from messages import raises
from scripted import save_random

SHAPE = dataclasses.replace(MODELS["XS"], vocabulary=50, layers=3)


def test_the_sizes_are_those_that_are_named():
    assert MODELS["M"].parameters() == pytest.approx(56e6, rel=0.02)
    assert MODELS["S"].parameters() == pytest.approx(4e6, rel=0.02)
    model = make_model(SHAPE)
    norms = (2 * SHAPE.layers + 1) * SHAPE.hidden
    assert sum(p.numel() for p in model.parameters()) == SHAPE.parameters() + norms
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(SHAPE.layers)}
    assert torch.equal(make_model(SHAPE).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("lengths", balance.LENGTHS)
def test_eight_processes_share_the_pairs_of_a_step_evenly(lengths):
    """16 pairs each: dealt by length no process waits for more than a twentieth; at random they would."""
    generator = np.random.default_rng(1)
    steps = [pair_sizes(balance.draw_lengths(lengths, 16 * 8, generator), form="packed") for _ in range(20)]
    dealt = [balance.useful(sizes, 8, dealt=True) for sizes in steps]
    assert min(dealt) >= 0.95
    assert np.median([balance.useful(sizes, 8, dealt=False) for sizes in steps]) < 0.9


def test_the_table_of_shares(tmp_path, capsys):
    balance.main(["--quick", "--pairs", "16", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| lengths |")
    assert len(lines) == 2 + 2 * len(balance.LENGTHS)
    results = read_results(tmp_path, "balance")
    assert results is not None
    assert all(run["dealt"][1] >= run["random"][1] for run in results["runs"])


def test_the_page_says_where_dealing_falls_short():
    runs = [
        {"lengths": "chat", "pairs": pairs, "ranks": 64, "random": [0.5, 0.6, 0.7], "dealt": [dealt - 0.01, dealt, 1.0]}
        for pairs, dealt in ((4, 0.948), (16, 0.95))
    ]
    (table,) = report.TABLES["balance"]({"settings": {"steps": 40, "lengths": balance.LENGTHS}, "runs": runs})
    assert table.rows[0] == ["chat", "4", "64", "0.60 [0.50-0.70]", "0.95 [0.94-1.00]"]
    assert table.note.endswith("Below 0.95 when dealt: chat, 4 pairs on 64: 0.948.")


def test_the_defaults_of_generation_waste_no_row_step_and_draw_as_before(tmp_path, capsys):
    sizes = ["--size", "XS", "--num", "9", "--repeats", "1", "--max-new-tokens", "64", "--batches", "4"]
    generation.main([*sizes, "--threads", "1", "--out", str(tmp_path)])
    results = read_results(tmp_path, "generation")
    assert results is not None
    runs = {run["arm"]: run for run in results["runs"]}
    assert len(runs) == 3
    default, before = runs[generation.DEFAULT], runs[generation.BEFORE]
    assert default["tokens"] == before["tokens"] == default["row_steps"] < before["row_steps"]
    assert "useful row-steps" in capsys.readouterr().out


def test_pairs_have_the_lengths_of_chat_data_and_depend_on_the_seed_alone():
    pairs = make_pairs(2000, vocabulary=1000, seed=3)
    prompts = [len(pair.prompt_ids) for pair in pairs]
    completions = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    assert (min(prompts), max(prompts)) == (50, 500)
    assert (min(completions), max(completions)) == (50, 400)
    assert np.median(prompts) == pytest.approx(150, rel=0.06)
    assert np.median(completions) == pytest.approx(160, rel=0.06)
    assert all(pair.chosen_ids[-1] == pair.rejected_ids[-1] == EOS for pair in pairs)
    again, other = (make_pairs(5, vocabulary=1000, seed=seed) for seed in (3, 4))
    assert [p.prompt_ids.tolist() for p in again] != [p.prompt_ids.tolist() for p in other]
    assert [p.chosen_ids.tolist() for p in again] == [
        p.chosen_ids.tolist() for p in make_pairs(5, vocabulary=1000, seed=3)
    ]
    assert {len(ids) for p in pairs_of_length(3, length=32, vocabulary=50, seed=0) for ids in ids_of(p)} == {16}


def test_texts_have_the_lengths_of_dialogues_and_trl_gets_the_same_ids_and_labels():
    texts = make_texts(2000, vocabulary=1000, seed=3)
    prompts, answers = ([len(ids_of(text)[k]) for text in texts] for k in (0, 1))
    assert (min(prompts), max(prompts), min(answers), max(answers)) == (10, 480, 8, 240)
    assert np.median(prompts) == pytest.approx(86, rel=0.1)
    assert np.median(answers) == pytest.approx(40, rel=0.1)
    assert all(len(text.rejected_ids) == 0 and text.chosen_ids[-1] == EOS for text in texts)
    row = trl_row(texts[:3])
    places = [place for place, label in enumerate(row["labels"]) if label != -100]
    assert [row["input_ids"][place] for place in places] == [row["labels"][place] for place in places]
    batch = collate_pairs(texts[:3])
    assert row["input_ids"] == batch["input_ids"][0].tolist()
    assert [row["labels"][place] for place in places] == batch["targets"].tolist()
    assert [place - 1 for place in places] == batch["source"].tolist()
    assert row["seq_lengths"] == [len(text.prompt_ids) + len(text.chosen_ids) for text in texts[:3]]


def sft_runs() -> list[dict[str, Any]]:
    def run(trainer: str, form: str, num: int, repeat: int, seconds: float, mib: int) -> dict[str, Any]:
        where = {"trainer": trainer, "form": form, "texts_per_forward": num, "repeat": repeat, "model": "S"}
        counts = {"loop_tokens": 1000, "completion_tokens": 300, "load_average": 2.0, "losses": [3.0, 2.0]}
        bytes_ = {"peak_above_model": mib * 2**20, "state_bytes": 10 * 2**20}
        return {**where, **counts, **bytes_, "loop_cpu_seconds": seconds}

    ours = [run("bfpo", "packed", 8, repeat, 2.0, 30) for repeat in range(2)]
    theirs = [run("trl", "packed", 8, repeat, 4.0 + 2 * repeat, 50) for repeat in range(2)]
    return [*theirs, *ours, *(run("trl", "padded", 1, repeat, 2.5, 40) for repeat in range(2))]


def test_the_table_of_imitation_takes_ratios_against_trl_packed_and_its_best():
    settings = {"steps": 3, "texts": 8, "length_scale": 1.0, "threads": 1, "dtype": "float32"}
    (table,) = sft_tables({"runs": sft_runs(), "settings": settings})
    assert table.rows[0] == [
        *("S", "bfpo, 8 texts a forward", "500", "2.50 [2.25-2.75]", "1.25", "30", "0.60", "20", "0.50"),
    ]
    assert [row[1] for row in table.rows[1:]] == ["TRL, packed, 8 texts a forward", "TRL, no packing, 1 text a forward"]
    assert "30% of the tokens" in table.note
    assert "(S: 2)" in table.note


def test_the_table_of_a_real_model_takes_ratios_against_the_fastest_other_way():
    def pairs(trainer: str, num: int, seconds: float, repeat: int) -> dict[str, Any]:
        where = {"kind": "training", "trainer": trainer, "microbatch": num, "repeat": repeat}
        return {**where, "loop_tokens": 600, "loop_seconds": seconds, "peak_above_model": 2**20 * num}

    runs = [pairs("bfpo", 4, 2.0 + repeat, repeat) for repeat in (0, 1)]
    runs += [pairs("trl", num, 6.0 - repeat + num, repeat) for repeat in (1, 0) for num in (4, 2)]
    runs += [{"kind": "completions", **run} for run in sft_runs()]
    settings = {"model": "m", "pairs": "p", "max_length": 9, "threads": 1, "dtype": "bfloat16", "steps": 2}
    settings |= {"per_step": 4}
    (table,) = real_tables({"runs": runs, "settings": settings})
    of = {(row[0], row[1]): row[2:] for row in table.rows}
    assert of["pairs", "bfpo, 4 a forward"] == ["250 [225-275]", "3.17 [2.75-3.58]", "4", "2.00"]
    assert of["pairs", "TRL, 2 a forward"][1] == "1.00"
    assert of["completions", "bfpo, 8 a forward"] == ["500", "1.25", "30", "0.75"]
    assert of["completions", "TRL, no packing, 1 a forward"][1] == "1.00"
    assert list(of) == [(row[0], row[1]) for row in table.rows]
    assert [row[0] for row in table.rows] == ["pairs"] * 3 + ["completions"] * 3


def test_the_table_of_answers_takes_ratios_for_each_number_of_prompts():
    arms = [(3, generation.BEFORE, 4.0), (3, generation.DEFAULT, 2.0), (3, "transformers, batches of 2", 6.0)]
    arms += [
        (3, "transformers, batches of 3", 3.0),
        (1, generation.DEFAULT, 6.0),
        (1, "transformers, batches of 1", 5.0),
    ]
    runs = [
        {"prompts": num, "arm": arm, "repeat": k, "tokens": 60, "row_steps": 80, "cpu_seconds": seconds, "load": 1.0}
        for k in (1, 0)
        for num, arm, seconds in arms
    ]
    settings = {"model": "m", "pairs": "p", "max_length": 9, "threads": 1, "dtype": "bfloat16", "few": [1]}
    settings |= {"max_new_tokens": 5}
    (table,) = real_generation_tables({"runs": runs, "settings": settings})
    of = {(row[0], row[1]): row[2:] for row in table.rows}
    assert of["3", "bfpo, default"] == ["30.0", "2.00", "1.50", "0.75"]
    assert of["3", "transformers, batches of 2"] == ["10.0", "0.67", "0.50", "0.75"]
    assert of["1", "bfpo, default"] == ["10.0", "", "0.83", "0.75"]
    assert [row[0] for row in table.rows] == ["3"] * 4 + ["1"] * 2


def test_runs_of_imitation_that_went_another_way_are_named():
    sft.check_same_way(sft_runs())
    for wrong in ({"losses": [3.0, 2.1]}, {"loop_tokens": 999}):
        with raises(TrainingError, "S: trl"):
            sft.check_same_way([*sft_runs(), {**sft_runs()[-1], **wrong}])


def ids_of(pair: Any) -> tuple[Any, Any, Any]:
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def test_text_is_read_back_to_the_same_ids():
    tokenizer = make_tokenizer(50)
    for pair, row in zip(pairs := make_pairs(4, vocabulary=50, seed=0, scale=0.1), text_rows(pairs), strict=True):
        assert tokenizer(row["prompt"])["input_ids"] == pair.prompt_ids.tolist()
        whole = tokenizer(row["prompt"] + row["rejected"])["input_ids"]
        assert whole == [*pair.prompt_ids, *pair.rejected_ids]


def test_needed_operations_are_what_torch_counts_on_one_sequence():
    prompt, completion = 7, 5
    model = make_model(SHAPE)
    ids = torch.randint(3, SHAPE.vocabulary, (1, prompt + completion))
    with flop_counter() as counter:
        rows = torch.arange(prompt - 1, prompt + completion - 1)
        logits = model(input_ids=ids, logits_to_keep=rows, use_cache=False).logits[0]
        torch.log_softmax(logits, -1).gather(1, ids[0, prompt:, None]).sum().backward()
    needed = needed_flops(SHAPE, [(prompt, completion, 0)])
    # torch's attention computes the scores once more in its backward pass, which is no need: a quarter of the forward's
    # two products for each of the layers but the first, whose attention has no gradient.
    seen = (prompt + completion) * (prompt + completion + 1) // 2
    expected = needed + 2 * SHAPE.hidden * seen * (SHAPE.layers - 1)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-4)  # older versions count a few sums too


def test_our_path_does_what_is_needed_and_little_else():
    pairs = make_pairs(3, vocabulary=SHAPE.vocabulary, seed=0, scale=0.1)
    model = make_model(SHAPE)
    form = choose_form(model, "packed", longest_text=longest_text(pairs))
    batch = collate_pairs(pairs, pad_token_id=EOS, form=form)
    with flop_counter() as counter:
        sequence_logps(model, batch).logps.sum().backward()
    needed = needed_flops(SHAPE, [tuple(map(len, ids_of(pair))) for pair in pairs])  # type: ignore[misc]
    # What is more: scores computed again in the backward pass, and those that the mask hides.
    assert needed <= counter.get_total_flops() < 1.1 * needed


def test_a_shared_prompt_is_counted_once():
    assert useful_tokens([(10, 3, 4), (5, 1, 1)]) == 24
    together = needed_flops(SHAPE, [(10, 3, 4)])
    apart = needed_flops(SHAPE, [(10, 3, 0), (10, 4, 0)])
    assert apart - together == needed_flops(SHAPE, [(10, 0, 0)])
    assert needed_flops(SHAPE, [(10, 3, 4)], causal=False) > together


# Results: 2 repeats, our trainer twice and three times as fast as TRL's at a quarter of its memory.


def training(trainer: str, repeat: int, seconds: float, **changed: Any) -> dict[str, Any]:
    run = {
        "kind": "training",
        "repeat": repeat,
        "model": "M",
        "trainer": trainer,
        "reference": "precomputed",
        "microbatch": 4,
        "loop_tokens": 600,
        "loop_seconds": seconds,
        "loop_needed_flops": 6_000_000_000,
        "step_seconds": [9.0, seconds / 2, seconds / 2],
        "first_step_flops": 3_000 if trainer == "bfpo" else 6_000,
        "first_step_needed_flops": 3_000,
        "peak_above_model": 2**20 * (25 if trainer == "bfpo" else 100),
        "losses": [0.25, 0.26, 0.24],
    }
    return {**run, **changed}


def throughput_runs() -> list[dict[str, Any]]:
    matrix = [{"kind": "matrix", "repeat": i, "rates": {"small": 1e9, "large": 1e10 + i}} for i in range(2)]
    ours = [training("bfpo", 0, 1.0), training("bfpo", 1, 1.0)]
    theirs = [training("trl", 0, 2.0), training("trl", 1, 3.0)]
    slower = [training("trl", i, 5.0, microbatch=1) for i in range(2)]
    return [*matrix, *theirs[::-1], *slower, *ours]


def scaling_runs() -> list[dict[str, Any]]:
    return [
        {**training(trainer, 0, seconds * length), "length": length, "pairs": 4, "vocabulary": 512}
        for trainer, seconds in (("bfpo", 1.0), ("trl", 4.0))
        for length in (128, 512)
    ]


def test_the_summary_takes_ratios_repeat_by_repeat():
    arms = throughput_arms(throughput_runs())
    assert [arm.title for arm in arms] == ["bfpo, 4 pairs a forward", "TRL, 4 pairs a forward", "TRL, 1 pair a forward"]
    other = counterpart(arms, arms[0])
    assert other is fastest(arms, arms[0]) is arms[1]
    quicker = throughput_arms([*throughput_runs(), *(training("trl", i, 0.5, microbatch=1) for i in range(2))])
    assert counterpart(quicker, quicker[0]) is quicker[1]
    assert fastest(quicker, quicker[0]) is quicker[2]
    assert speed_ratio(arms[0], other) == throughput_spread(2.25, 2.5, 2.75)
    assert memory_ratio(arms[0], other) == throughput_spread(0.25, 0.25, 0.25)
    assert overall_factor(arms[1]) == 2.0
    assert rate_share(arms[0], best_rate(throughput_runs())).median == pytest.approx(0.6)


def throughput_spread(low: float, median: float, high: float) -> Any:
    from benchmarks.summary import Spread

    return Spread(low, median, high)


def test_the_page_gets_the_tables_and_the_figure_and_keeps_its_prose(tmp_path, capsys):
    settings = {"repeats": 2, "steps": 3, "pairs": 4, "threads": 1, "model": "S", "load": 1.0}
    write_results(tmp_path, "throughput", settings=settings, runs=throughput_runs())
    write_results(tmp_path, "scaling", settings=settings, runs=scaling_runs())
    start = {"kind": "startup", "repeat": 0, "command": "bfpo --help"}
    starts = [{**start, "side": "before", "cpu_seconds": 0.5}, {**start, "side": "after", "cpu_seconds": 0.25}]
    part = {"kind": "part", "part": "read", "rows": 1000, "seconds": 0.5, "peak_bytes": 2**21}
    write_results(tmp_path, "rampup", settings={**settings, "before": "abc", "load": 1.0}, runs=[*starts, part])
    page, figure = tmp_path / "page.md", tmp_path / "images" / "figure.svg"
    page.write_text(f"# Before\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n")
    arguments = ["--results", str(tmp_path), "--page", str(page), "--figure", str(figure)]
    report.main(arguments)
    written = page.read_text()
    assert written.startswith("# Before\n")
    assert written.endswith("\n\nAfter.\n")
    assert "old" not in written
    assert "No figure from a GPU exists" in written
    ratio = "2.50 [2.25-2.75]"
    assert (
        f"| M | precomputed | bfpo, 4 pairs a forward | 600 | {ratio} | {ratio} | 25 | 0.25 | 0.60 | 1.00 |" in written
    )
    assert "| 512 | 4 | 512 | 256.000 | 1,024.000 | 4.00 | 25 | 100 | 0.25 |" in written
    assert "| read | 1,000 | 0.50 | 2,000 | 2 |" in written
    assert "| bfpo --help | 0.50 | 0.25 | 2.00 |" in written
    assert "](images/figure.svg)" in written
    assert "tokens per CPU-second" in figure.read_text()
    report.main(arguments)
    assert page.read_text() == written
    write_results(tmp_path, "gpu", settings={"small": False}, runs=[])
    report.main(arguments)
    assert "No figure from a GPU exists" not in page.read_text()
    (tmp_path / "gpu.json").unlink()
    report.main(arguments)
    assert "written from throughput, scaling, rampup" in capsys.readouterr().out


def test_a_page_without_markers_and_damaged_results_are_named(tmp_path):
    with raises(BfpoError, "page.md"):
        report.with_block("# Before\n", "table", name="page.md")
    (tmp_path / "throughput.json").write_text("{")
    with raises(BfpoError, "throughput.json"):
        read_results(tmp_path, "throughput")


def test_files_that_no_benchmark_made_are_kept(tmp_path):
    (tmp_path / "rampup.json").write_text('{"mine": 1}')
    with raises(BfpoError, "rampup.json"):
        write_results(tmp_path, "rampup", settings={}, runs=[])
    assert (tmp_path / "rampup.json").read_text() == '{"mine": 1}'
    results = tmp_path / "results"
    write_results(results, "throughput", settings={"repeats": 2, "steps": 3, "pairs": 4}, runs=throughput_runs())
    page, figure = tmp_path / "page.md", tmp_path / "mine.svg"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    figure.write_text("mine")
    with raises(BfpoError, "--figure"):
        report.main(["--results", str(results), "--page", str(page), "--figure", str(figure)])
    assert figure.read_text() == "mine"


@pytest.mark.parametrize(
    "changed",
    [
        {"losses": [0.25, 0.26, 0.241]},
        {"losses": [0.25, 0.26]},
        {"loop_tokens": 601},
        {"losses": [0.25, 0.25001, 0.25]},
        {"first_step_flops": 2_999},
    ],
)
def test_other_work_is_found(changed):
    good = [training("bfpo", 0, 1.0), training("trl", 0, 1.0, losses=[0.25, 0.2601, 0.2401])]
    throughput.check_same_work(good)
    with raises(TrainingError):
        throughput.check_same_work([good[0], {**good[1], **changed}])
    with raises(TrainingError):
        throughput.check_same_work(
            [{**run, "losses": losses} for run, losses in zip(good, ([0.25, 0.251], [0.25, 0.2511]), strict=True)]
        )
    with raises(TrainingError):
        throughput.check_same_work([{**run, "losses": [0.25, 0.25, 0.25]} for run in good])


@pytest.mark.parametrize(("loss", "agrees"), [(0.2610, True), (0.2623, False), (0.2577, False)])
def test_losses_of_bfloat16_agree_within_a_fifth_of_how_far_they_move(loss, agrees):
    moved = 0.01
    assert (throughput.losses_agree(loss, 0.26, moved, "bfloat16") == "") is agrees
    assert throughput.losses_agree(loss, 0.26, moved, "float32") != ""


def test_every_program_names_its_options():
    for program in (throughput, hot_path, scaling, rampup, sft):
        options = program.parse(["--quick", "--threads", "1"])
        assert options.threads == 1
        json.dumps({name: value for name, value in vars(options).items() if name != "out"})
    assert scaling.points(scaling.parse(["--quick"])) == [{"length": 32, "pairs": 1, "vocabulary": 512}]
    assert len(scaling.points(scaling.parse([]))) == 7


@pytest.mark.slow
def test_the_smoke_form_runs_against_trl(tmp_path):
    pytest.importorskip("trl")
    for program in (throughput, hot_path, scaling, rampup, sft):
        program.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    runs = [read_results(tmp_path, name) for name in ("throughput", "hot_path", "scaling", "rampup", "sft")]
    assert all(found is not None and found["runs"] for found in runs)
    arms = throughput_arms(runs[0]["runs"])  # type: ignore[index]
    assert {(arm.trainer, arm.reference) for arm in arms} == {
        (trainer, reference) for trainer in ("bfpo", "trl") for reference in ("precomputed", "online")
    }
    assert all(overall_factor(arm) >= 1 for arm in arms)


@pytest.mark.slow
def test_the_smoke_form_of_a_real_model_runs_against_trl(tmp_path):
    pytest.importorskip("trl")
    save_random(tmp_path / "model", byte_tokenizer(CHATML))
    rows = [{"prompt": f"Say {word}", "chosen": f"{word} it is.", "rejected": "No."} for word in "abcdefghijklmnop"]
    write_rows(tmp_path / "pairs.jsonl", rows)
    given = ["--model", str(tmp_path / "model"), "--pairs", str(tmp_path / "pairs.jsonl")]
    real.main([*given, "--quick", "--threads", "1", "--out", str(tmp_path)])
    training, answers = (read_results(tmp_path, name) for name in real.FILES.values())
    assert training is not None
    assert answers is not None
    assert len(training["runs"]) == 4 + 3
    assert [run["prompts"] for run in answers["runs"]] == [4] * 3 + [1] * 2
    assert len({run["tokens"] for run in answers["runs"][3:]}) == 1
    real.main([*given, "--quick", "--work", "generation", "--append", "--threads", "1", "--out", str(tmp_path)])
    again = read_results(tmp_path, "real_generation")
    assert again is not None
    assert [run["repeat"] for run in again["runs"]] == [0] * 5 + [1] * 5
    assert read_results(tmp_path, "real") == training


def test_bfpo_prepare_and_the_script_count_the_same_rows(tmp_path):
    pytest.importorskip("polars")
    pytest.importorskip("py3langid")
    file = tmp_path / "pairs.jsonl"
    prepare.write_transcripts(file, 120)
    arms = (prepare.OURS, prepare.LESS, prepare.SCRIPT, prepare.DRAWN)
    ours, less, script, drawn = (prepare.measure(arm, file, before=None) for arm in arms)
    assert ours["counts"] == less["counts"] == script["counts"] == drawn["counts"]
    assert ours["counts"]["duplicates"] > 0
    assert sum(ours["counts"]["cells"].values()) + ours["counts"]["duplicates"] == 120


def test_other_counts_are_not_the_same_work(tmp_path):
    counts = {"rows": 3, "rejected": 1, "duplicates": 0, "cells": {"safe-safe": 2}}
    prepare.check_counts(counts, [{"arm": prepare.SCRIPT, "counts": dict(counts)}])
    with raises(RunError, "rejected"):
        prepare.check_counts(counts | {"rejected": 2}, [{"arm": prepare.SCRIPT, "counts": counts}])


def test_the_table_of_preparing_compares_within_a_repeat(tmp_path, capsys):
    runs = [
        {"arm": arm, "rows": 10, "repeat": repeat, "cpu_seconds": seconds * (1 + repeat), "peak_bytes": 2**20}
        for arm, seconds in ((prepare.SCRIPT, 2.0), (prepare.DRAWN, 2.5), (prepare.OURS, 3.0))
        for repeat in (0, 1)
    ]
    settings = {"data": "some.jsonl", "repeats": 2, "load": [1.0, 2.0, 3.0], "before": "0123456789abcdef"}
    write_results(tmp_path, "prepare", settings=settings, runs=runs)
    show_tables(tmp_path, ["prepare"])
    (table,) = TABLES["prepare"](read_results(tmp_path, "prepare"))
    assert [row[1:5] for row in table.rows] == [
        [prepare.SCRIPT, "3.00 [2.50-3.50]", "1.00", "0.80"],
        [prepare.DRAWN, "3.75 [3.12-4.38]", "1.25", "1.00"],
        [prepare.OURS, "4.50 [3.75-5.25]", "1.50", "1.20"],
    ]
    assert "Preparing data" in capsys.readouterr().out
    assert table.note.endswith("Before: commit 0123456789.")


def test_an_earlier_commit_that_is_not_there_is_one_message(tmp_path):
    with raises(RunError, "--before"):
        prepare.main(["--quick", "--before", "no-such-commit", "--out", str(tmp_path)])


def test_more_transcripts_than_there_are_have_other_words_and_a_shared_prompt(tmp_path):
    given = [
        {name: f"\n\nHuman: Tell me of {n} things\n\nAssistant: {name} things" for name in ("chosen", "rejected")}
        for n in range(20)
    ]
    source, target = tmp_path / "pairs.jsonl.gz", tmp_path / "rows.jsonl"
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in given).encode()))
    prepare.write_rows([source], target, 50)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    texts = [{name: row[name] for name in ("chosen", "rejected")} for row in rows]
    assert texts[:20] == given
    assert all(one != other for one, other in zip(texts[20:], texts[:30], strict=True))
    assert all(
        one["chosen"].rpartition("Assistant:")[0] == one["rejected"].rpartition("Assistant:")[0] for one in texts
    )
    assert all(type(row["chosen_is_safe"]) is type(row["rejected_is_safe"]) is bool for row in rows)


def test_the_readme_says_whether_there_are_figures_of_a_gpu():
    said = "no GPU figure yet" in (ROOT / "README.md").read_text()
    assert said != (RESULTS / "gpu.json").is_file()


def test_make_bench_measures_every_table_of_the_page():
    recipe = (ROOT / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]
    for name in report.TABLES.keys() - {"gpu"}:
        half = name.endswith("_bfloat16")
        module = "real" if name.startswith("real_") else name.removesuffix("_bfloat16")
        lines = [f"{line} " for line in recipe.splitlines() if ("--dtype bfloat16" in line) == half]
        assert any(f"-m benchmarks.{module} " in line for line in lines), name
    assert "benchmarks.prepare $(BENCH_PREPARE_ARGS)" in recipe
