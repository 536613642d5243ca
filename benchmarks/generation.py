"""BENCHMARK: generation by the defaults of `bfpo generate`, by those of before, and by `generate` of transformers.

    python -m benchmarks.generation [--model FOLDER --prompts FILE] [--quick]

Without a model: one with random weights, random prompts, and so many end tokens that answers have the lengths of
Anthropic HH (median 43 tokens, mean 59). With one: its answers to the prompts, of one paragraph each. One process;
within a repeat, which has prompts of its own, the order of the arms is shuffled. CPU seconds of the process, over all
threads.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from benchmarks.options import add_common_options, integers, thread_count
from benchmarks.process import program, write_results
from benchmarks.tables import show_tables
from benchmarks.workload import FIRST_WORD, MODELS, make_model
from bfpo.core.console import show
from bfpo.data.chat import ChatEncoder
from bfpo.data.prompts import read_prompt_files
from bfpo.generation.refill import Work
from bfpo.generation.sampling import Request, answer_batches, end_token_ids
from bfpo.policy.batches import batches_by_length
from bfpo.policy.devices import to_gpu
from bfpo.policy.load import DTYPES, load_policy
from bfpo.policy.precision import decoding_dtype
from bfpo.policy.source import read_config

BEFORE, DEFAULT = "before: float32, padded batches of 16", "default"
MEAN_LENGTH = 59
NEWLINES = {" ", "\n"}


class _Same(LogitsProcessor):
    """Changes nothing; with a processor, whole padded batches are decoded, as before."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@dataclass(frozen=True)
class Workload:
    """Prompts of a repeat by number, and the tokens that end an answer."""

    prompts: Callable[[int], list[tuple[int, ...]]]
    ends: list[int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the results and show the table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    models, workload, name = _real(options) if options.model else _random(options)
    settings = {
        key: value for key, value in vars(options).items() if key not in ("out", "quick", "model", "prompts", "size")
    }
    settings |= {"model": name, "dtype": str(models[1].dtype).removeprefix("torch.")}
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        runs += one_repeat(models, workload, options, repeat)
        write_results(options.out, "generation", settings={**settings, "repeats": repeat + 1}, runs=runs)
    show_tables(options.out, ["generation"])


def one_repeat(
    models: Sequence[Any], workload: Workload, options: argparse.Namespace, repeat: int, *, few: int | None = None
) -> list[dict[str, Any]]:
    """Return the measurements of one repeat, taken in shuffled order, by the two models of `real_models`.

    `few`: of so many prompts, in one batch by plain transformers, and greedily, so that both make the same tokens.
    """
    arms = [DEFAULT, _plain(few)] if few else [BEFORE, DEFAULT, *(_plain(size) for size in options.batches)]
    prompts, runs = workload.prompts(repeat)[:few], []
    for arm in random.Random(repeat).sample(arms, len(arms)):
        load, start = os.getloadavg()[0], time.process_time()
        model = copy.copy(models[arm != BEFORE])  # another object, so that the tests of a model count in each arm
        measured = _measure(arm, model, prompts, workload.ends, options, repeat, greedy=few is not None)
        seconds = time.process_time() - start
        values = {"repeat": repeat, "arm": arm, "prompts": len(prompts)}
        runs.append(values | {"cpu_seconds": round(seconds, 3), "load": round(load, 1)} | measured)
        sys.stderr.write(f"repeat {repeat + 1}/{options.repeats}, {arm}: {seconds:.1f} CPU s\n")
    return runs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, those of the smoke form put in where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--model", default="", help="folder or hub id of a chat model; else M with random weights")
    parser.add_argument("--size", choices=MODELS, default="M", help="size of the model with random weights")
    parser.add_argument("--prompts", type=Path, default=None, help="file of prompts for --model")
    parser.add_argument("--num", type=int, default=48, help="prompts of a repeat")
    parser.add_argument("--repeats", type=int, default=3, help="each with prompts of its own")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batches", type=integers, default=[16, 32, 64], help="batch sizes of plain transformers")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.prompts):
        parser.error("--model, --prompts: give both or none")
    if options.quick:
        options.size, options.num, options.repeats, options.max_new_tokens, options.batches = "XS", 6, 1, 8, [4]
    options.threads = thread_count(options.threads)
    return options


def _plain(size: int) -> str:
    return f"transformers, batches of {size}"


def _random(options: argparse.Namespace) -> tuple[list[Any], Workload, str]:
    shape = MODELS[options.size]
    held, _ = decoding_dtype("auto")
    models = [make_model(shape).to(dtype).eval() for dtype in (torch.float32, DTYPES[held])]
    words = random.Random(0).sample(range(FIRST_WORD, shape.vocabulary), max(1, shape.vocabulary // MEAN_LENGTH))

    def prompts(repeat: int) -> list[tuple[int, ...]]:
        draw = random.Random(repeat)
        lengths = [min(500, max(10, round(draw.lognormvariate(4.0, 0.6)))) for _ in range(options.num)]
        return [tuple(draw.randrange(FIRST_WORD, shape.vocabulary) for _ in range(length)) for length in lengths]

    return models, Workload(prompts, words), f"Model {options.size}, random weights"


def _real(options: argparse.Namespace) -> tuple[list[Any], Workload, str]:
    models, tokenizer, ends = real_models(options.model)
    chat = ChatEncoder(tokenizer, None, {})
    found = read_prompt_files([str(options.prompts)], columns={}, check=None, bad_rows="skip").prompts
    ids = [tuple(chat.encode(one.messages, (), name=one.id).prompt) for one in found]

    def prompts(repeat: int) -> list[tuple[int, ...]]:
        return random.Random(repeat).sample(ids, min(options.num, len(ids)))

    return models, Workload(prompts, ends), Path(options.model).name


def real_models(folder: str) -> tuple[list[Any], Any, list[int]]:
    """Return a model in float32 and as `dtype: auto` holds it, its tokenizer, and the tokens that end a paragraph."""
    held, why = decoding_dtype("auto", read_config(folder).dtype)
    show(f"weights in {held} ({why})")
    first = load_policy(folder, dtype="float32")
    models = [first.model, first.model if held == "float32" else load_policy(folder, dtype=held).model]
    for model in models:
        to_gpu(model)
        model.eval()
    ends = {*end_token_ids(first.model, first.tokenizer), ChatEncoder(first.tokenizer, None, {}).end_id}
    pieces = {token: first.tokenizer.decode([token]) for token in range(len(first.tokenizer))}
    ends |= {token for token, text in pieces.items() if "\n" in text and set(text) <= NEWLINES}
    return models, first.tokenizer, sorted(ends)


def _measure(
    arm: str,
    model: Any,
    prompts: list[tuple[int, ...]],
    ends: list[int],
    options: argparse.Namespace,
    seed: int,
    *,
    greedy: bool,
) -> dict[str, Any]:
    """Generate and return the numbers of tokens and of row-steps."""
    if arm not in (BEFORE, DEFAULT):
        return _transformers(model, prompts, ends, options, seed, int(arm.rpartition(" ")[2]), greedy=greedy)
    work = Work()
    requests = [Request(str(place), ids) for place, ids in enumerate(prompts)]
    how: dict[str, Any] = {} if arm == DEFAULT else {"batch_size": 16, "processors": [_Same()]}
    how["temperature"] = 0.0 if greedy else 1.0
    given = {"eos_token_ids": ends, "max_new_tokens": options.max_new_tokens, "seed": seed, "work": work}
    made = [one for some in answer_batches(model, requests, **given, **how) for one in some]
    return {"tokens": sum(len(one.token_ids) + one.finished for one in made), "row_steps": work.row_steps + len(made)}


@torch.no_grad()
def _transformers(
    model: Any,
    prompts: list[tuple[int, ...]],
    ends: list[int],
    options: argparse.Namespace,
    seed: int,
    size: int,
    *,
    greedy: bool,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    settings = {"max_new_tokens": options.max_new_tokens, **({} if greedy else {"do_sample": True, "top_k": 0})}
    config = GenerationConfig(**settings, eos_token_id=ends, pad_token_id=ends[0])
    tokens = steps = 0
    for places in batches_by_length([len(ids) for ids in prompts], size):
        width = len(prompts[places[0]])
        rows = [[ends[0]] * (width - len(prompts[place])) + list(prompts[place]) for place in places]
        mask = [[0] * (width - len(prompts[place])) + [1] * len(prompts[place]) for place in places]
        given = {
            "input_ids": torch.tensor(rows).to(model.device),
            "attention_mask": torch.tensor(mask).to(model.device),
        }
        made = model.generate(**given, generation_config=config)[:, width:].tolist()
        steps += len(made) * len(made[0])
        for row in made:
            tokens += next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
    return {"tokens": tokens, "row_steps": steps}


if __name__ == "__main__":
    program(main)
