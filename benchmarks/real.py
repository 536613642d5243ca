"""BENCHMARK: training and generation of a real chat model on real pairs, ours against TRL and transformers.

    python -m benchmarks.real --model FOLDER --pairs FILE [--work generation] [--dtype bfloat16] [--append]

Training on pairs (`down_proj`, reference precomputed) and on their chosen completions (all weights): the same ids,
order and texts per optimizer step on both sides, the losses compared. Generation: answers of one paragraph to the
prompts of the pairs, and greedy ones to few prompts. CPU-seconds of the process; within a repeat, which has pairs of
its own, the order is shuffled.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import generation
from benchmarks.options import add_common_options, integers, thread_count
from benchmarks.process import in_process, of_dtype, program, read_results, write_results
from benchmarks.sft import check_same_way
from benchmarks.sft_training import SftRun, measure
from benchmarks.tables import show_tables
from benchmarks.throughput import AGREEMENT, check_same_work
from benchmarks.training import TrainingRun
from benchmarks.workload import shape_of
from bfpo.core.errors import RunError
from bfpo.data.load import PairStream
from bfpo.data.settings import DataConfig
from bfpo.data.store import TokenStore, write_tokens
from bfpo.data.tokenize import PairTokenizer, TokenPair
from bfpo.policy.load import load_tokenizer
from bfpo.policy.precision import decoding_dtype
from bfpo.policy.source import read_config

FILES = {"training": "real", "generation": "real_generation"}  # results of each kind of work
RATES = {"float32": 1e-4, "bfloat16": 2e-3}  # of pairs; in bfloat16 losses must move by more than they are rounded
OPTIONS = {"training": ("steps", "per_step", "dtype"), "generation": ("num", "few", "max_new_tokens", "batches")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, check that both sides did the same work, write the results after each repeat, and show the tables."""
    options = parse(arguments)
    files = {work: of_dtype(FILES[work], options.dtype if work == "training" else "float32") for work in options.work}
    kept = {work: begun(options, work, files[work]) for work in options.work}
    first = 1 + max((run["repeat"] for _, runs in kept.values() for run in runs), default=-1)
    with tempfile.TemporaryDirectory() as folder:
        store = tokenized(options, first + options.repeats, Path(folder))
        for repeat in range(first, first + options.repeats):
            for work, (settings, runs) in kept.items():
                runs += (training_runs if work == "training" else generation_runs)(options, repeat, store)
                write_results(options.out, files[work], settings=settings, runs=runs)
    show_tables(options.out, list(files.values()))


def begun(options: argparse.Namespace, work: str, file: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings of a kind of work, and the runs that are added to; raises `RunError` for other settings."""
    settings = {name: getattr(options, name) for name in ("threads", "max_length", *OPTIONS[work])}
    settings |= {"model": Path(options.model).name, "pairs": options.pairs.name}
    if work == "generation":
        settings["dtype"], _ = decoding_dtype("auto", read_config(options.model).dtype)
    known = read_results(options.out, file) if options.append else None
    if known is not None and known["settings"] != settings:
        raise RunError(f"--append: {options.out} holds runs with the settings {known['settings']}, not {settings}")
    return settings, [] if known is None else known["runs"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--pairs", type=Path, required=True, help="file of pairs in any layout of bfpo")
    parser.add_argument("--max-length", type=int, default=512, help="longer pairs are left out; tokens")
    parser.add_argument("--repeats", type=int, default=3, help="each with pairs of its own")
    parser.add_argument("--append", action="store_true", help="add repeats to what --out holds")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps; the first is not timed")
    parser.add_argument("--per-step", type=int, default=4, help="pairs or completions per optimizer step")
    parser.add_argument("--work", nargs="+", choices=FILES, default=list(FILES), help="what to measure")
    parser.add_argument(
        "--dtype", choices=tuple(AGREEMENT), default="float32", help="of training; generation: as by default"
    )
    parser.add_argument(
        "--num", type=int, default=128, help="prompts to answer in a repeat; with 32 no slot is refilled"
    )
    parser.add_argument("--few", type=integers, default=[1, 4], help="numbers of prompts that are answered greedily")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batches", type=integers, default=[4, 8, 16, 32], help="batch sizes of plain transformers")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats, options.num, options.few, options.max_new_tokens, options.batches = 1, 4, [1], 8, [4]
    options.threads = thread_count(options.threads)
    return options


def tokenized(options: argparse.Namespace, repeats: int, folder: Path) -> TokenStore:
    """Return tokens of enough pairs that are whole and not too long, in an order of their own."""
    data = DataConfig(files=[str(options.pairs)], unknown_label="safe", bad_rows="skip")
    tokenize = PairTokenizer(load_tokenizer(options.model))
    pairs = [pair for pair in tokenize(PairStream(data)) if _fits(pair, options.max_length)]
    needed = repeats * max(options.num, options.steps * options.per_step)
    if len(pairs) < needed:
        raise RunError(
            f"--pairs: {options.pairs} has {len(pairs)} of at most {options.max_length} tokens, not {needed}"
        )
    return write_tokens(folder / "pairs.arrow", random.Random(0).sample(pairs, needed))


def _fits(pair: TokenPair, length: int) -> bool:
    completions = (pair.chosen_ids, pair.rejected_ids)
    ended = len({int(ids[-1]) for ids in completions}) == 1
    return ended and len(pair.prompt_ids) + max(map(len, completions)) <= length


def generation_runs(options: argparse.Namespace, repeat: int, store: TokenStore) -> list[dict[str, Any]]:
    """Return the measurements of generation of one repeat: of many prompts, then of few."""
    torch.set_num_threads(options.threads)
    models, _, ends = generation.real_models(options.model)

    def prompts(repeat: int) -> list[tuple[int, ...]]:
        return [tuple(pair.prompt_ids.tolist()) for pair in store[repeat * options.num : (repeat + 1) * options.num]]

    workload = generation.Workload(prompts, ends)
    return [
        run for few in (None, *options.few) for run in generation.one_repeat(models, workload, options, repeat, few=few)
    ]


def training_runs(options: argparse.Namespace, repeat: int, store: TokenStore) -> list[dict[str, Any]]:
    """Return the measurements of training of one repeat, taken in shuffled order and compared."""
    name, size = Path(options.model).name, options.per_step
    pairs = [
        TrainingRun(
            trainer=trainer,
            reference="precomputed",
            shape=shape_of(options.model),
            steps=options.steps,
            pairs_per_step=size,
            microbatch=num,
            seed=repeat,
            learning_rate=RATES[options.dtype],
            folder=options.model,
            store=str(store.path),
            cpu_clock=True,
            half=options.dtype == "bfloat16",
        )
        for trainer in ("bfpo", "trl")
        for num in (size, 1)
    ]
    completions = [
        SftRun(
            trainer=trainer,  # type: ignore[arg-type]
            form=form,  # type: ignore[arg-type]
            model=options.model,
            steps=options.steps,
            texts_per_step=size,
            texts_per_forward=num,
            seed=repeat,
            dtype=options.dtype,
            store=str(store.path),
        )
        for trainer, form, num in (("bfpo", "packed", size), ("trl", "packed", size), ("trl", "padded", 1))
    ]
    arms: list[TrainingRun | SftRun] = [*pairs, *completions]
    random.Random(repeat).shuffle(arms)
    found = []
    for place, run in enumerate(arms, 1):
        sys.stderr.write(f"repeat {repeat + 1}, {place}/{len(arms)}: {run.trainer}, {type(run).__name__}\n")
        values: dict[str, Any] = {"repeat": repeat, "model": name, "trainer": run.trainer}
        if isinstance(run, TrainingRun):
            values |= {"kind": "training", "reference": run.reference, "microbatch": run.microbatch}
            measured = in_process("benchmarks.training", dataclasses.asdict(run), threads=options.threads)
        else:
            values |= {"kind": "completions", "form": run.form, "texts_per_forward": run.texts_per_forward}
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                measured = process.submit(measure, run, options.threads).result()
        found.append({**values, **measured})
    check_same_work(found, options.dtype)
    check_same_way([run for run in found if run["kind"] == "completions"], options.dtype)
    return found


if __name__ == "__main__":
    program(main)
