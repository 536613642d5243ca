"""Methods that read more than the margin: what training gives them, pair by pair, and their state over the steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bfpo.core.errors import DataError, SettingError
from bfpo.data.tokenize import TokenPair
from bfpo.objective.methods import METHODS
from bfpo.training.beside import _Companions
from bfpo.training.trainer import BFPOTrainer
from losses import PLAIN
from messages import raises
from tiny import logp, tiny_model, tiny_pairs, tiny_trainer

NAMES = [name for name in METHODS if name not in PLAIN]
CASES = [(name, single) for name in NAMES for single in (False, True) if METHODS[name].pointwise or not single]
BETA, BOS = 0.1, 1
CATEGORIES = ["theft", "", "fraud", "theft", "fraud"]


def unpaired(pairs: list[TokenPair]) -> list[TokenPair]:
    """Single answers, each labelled against its absent side."""
    none = np.zeros(0, np.int32)
    return [replace(pair, rejected_ids=none, rejected_is_safe=1 - pair.chosen_is_safe) for pair in pairs]


def moved(model: Any) -> Any:
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def sides(pair: TokenPair) -> list[Any]:
    return [ids for ids in (pair.chosen_ids, pair.rejected_ids) if len(ids)]


def drifts(model: Any, start: Any, prompt: Any, pair: TokenPair) -> list[Any]:
    with torch.no_grad():
        before = [logp(start, prompt, ids) for ids in sides(pair)]
    return [logp(model, prompt, ids) - at for ids, at in zip(sides(pair), before, strict=True)]


def longest_of(pairs: Any) -> int:
    return max(len(pair.prompt_ids) + max(map(len, sides(pair))) for pair in pairs)


def z0(model: Any, start: Any, stream: list[TokenPair], places: list[int], longest: int) -> float:
    """`longest`: the tokens of the longest text of the data; prompts before the answers of others are cut to it."""
    away = (len(stream) + 1) // 2
    with torch.no_grad():
        others = [(stream[i].prompt_ids, stream[(i + away) % len(stream)]) for i in places]
        cut = [(prompt[max(0, len(prompt) + max(map(len, sides(p))) - longest) :], p) for prompt, p in others]
        found = [drift for prompt, other in cut for drift in drifts(model, start, prompt, other)]
    return max(0.0, float(torch.stack(found).mean()))


def expected_loss(method: str, model: Any, start: Any, stream: list[TokenPair], i: int, state: float) -> Any:
    """The loss of a pair, written out from log-probs of single texts."""
    pair = stream[i]
    found = drifts(model, start, pair.prompt_ids, pair)
    c, r = pair.chosen_is_safe > 0.5, pair.rejected_is_safe > 0.5
    softplus = torch.nn.functional.softplus
    if method in ("kto", "kldo"):
        good = [c, r and not c]
        labelled = [[p.chosen_is_safe > 0.5, p.rejected_is_safe > 0.5 and not p.chosen_is_safe > 0.5] for p in stream]
        flat = [one for p, both in zip(stream, labelled, strict=True) for one in both[: len(sides(p))]]
        losses = []
        for drift, is_good in zip(found, good, strict=False):
            if method == "kto":
                sign = 1 if is_good else -1
                losses.append(1 - torch.sigmoid(sign * BETA * (drift - state)))
            else:
                loss = -BETA * drift if is_good else torch.exp(BETA * drift - state) + state - 1
                losses.append(loss * len(stream) / flat.count(is_good))
        return torch.stack(losses).sum()
    sign = -1 if r and not c else 1
    with torch.no_grad():
        reference = [logp(start, pair.prompt_ids, ids) for ids in sides(pair)]
        alone = [logp(start, [BOS], ids) for ids in sides(pair)]
    if method == "hypo":
        before = sign * (reference[0] - reference[1])
        return softplus(-BETA * (sign * (found[0] - found[1]) + before.clamp(max=0)))
    if method == "b_dpo":
        known = [float(at - by) / len(ids) for at, by, ids in zip(reference, alone, sides(pair), strict=True)]
        share = 1 / (1 + math.exp(known[0] - known[1]))
        return softplus(-BETA * sign * (2 * share * found[0] - 2 * (1 - share) * found[1]))
    assert method == "cat_dpo"
    return softplus(-(BETA * sign * (found[0] - found[1]) - (state if c != r else 0.0)))


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize(("method", "single"), CASES)
def test_loss_and_gradient_of_a_step_are_those_of_a_loop_over_its_texts(
    tmp_path: Path, method: str, single: bool, attention: str
) -> None:
    main, buffer = tiny_pairs(5, 1), tiny_pairs(5, 2)
    main, buffer = (unpaired(main), unpaired(buffer)) if single else (main, buffer)
    categories = [CATEGORIES, [""] * 5] if method == "cat_dpo" else None
    trainer = tiny_trainer(
        tmp_path, main=main, buffer=buffer, model=tiny_model(dtype=torch.float64), method=method, beta=BETA,
        buffer_weight=0.25, categories=categories, attention=attention, max_tokens_per_microbatch=40,
    )  # fmt: skip
    start = tiny_model(dtype=torch.float64).eval()
    model = moved(trainer.model).train()
    items = [trainer.train_dataset[i] for i in range(5)]
    batches = trainer.data_collator(items)["microbatches"]
    assert len(batches) > 1
    streams, places = [main, buffer], [list(range(5)), [item.buffer_index for item in items]]
    names = {"cat_dpo": ["", "fraud", "theft"]}.get(method, ["main", "buffer"])
    state = {name: 0.3 * (1 + number) for number, name in enumerate(names)}
    assert trainer._inputs.names == names
    if method == "kto":
        trainer.model_wrapped = model
        trainer._start_step(model, batches)
        state = {
            name: z0(model, start, *both, longest_of(main + buffer))
            for name, both in zip(names, zip(streams, places, strict=True), strict=True)
        }
        assert list(trainer._inputs.figures.values()) == pytest.approx(list(state.values()), rel=1e-8)
        assert max(state.values()) > 0
    elif METHODS[method].state_by:
        trainer._inputs.load(list(state.values()))
    loss = torch.stack([trainer.compute_loss(model, batch, num_items_in_batch=5) for batch in batches]).sum()
    loss.backward()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    means = []
    for number, (stream, which) in enumerate(zip(streams, places, strict=True)):
        held = {
            i: state[[CATEGORIES, [""] * 5][number][i]] if method == "cat_dpo" else list(state.values())[number]
            for i in which
        }
        means.append(torch.stack([expected_loss(method, model, start, stream, i, held[i]) for i in which]).mean())
    expected = means[0] + 0.25 * means[1]
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-6, atol=1e-6 * float(parameter.grad.norm()))


def answered(prompts: list[int], *, cut: int = 0) -> list[TokenPair]:
    """One answer a prompt, whose tokens are all the prompt's number; odd places lack `cut` tokens of the prompt."""
    none = np.zeros(0, np.int32)
    ids = [(np.full(3 - cut * (i % 2), n, np.int32), np.full(1 + n % 3, n, np.int32)) for i, n in enumerate(prompts)]
    return [TokenPair(f"{i}", prompt, answer, none, 1.0, 0.0) for i, (prompt, answer) in enumerate(ids)]


@pytest.mark.parametrize(
    "prompts",
    [
        [*range(7), *range(7)],  # all desirable answers, then all undesirable ones
        [*range(7), *range(6)],
        [n // 9 for n in range(90)] * 2,  # nine answers to each prompt
        [*range(200), *[200] * 200],
        [1, 2],
    ],
)
@pytest.mark.parametrize("cut", [0, 1])
def test_no_prompt_gets_an_answer_to_itself_and_no_text_is_longer_than_the_data_have(
    prompts: list[int], cut: int
) -> None:
    pairs = answered(prompts, cut=cut)
    longest = longest_of(pairs)
    for pair, other in zip(pairs, _Companions(pairs, None, longest), strict=True):
        assert other.chosen_ids[0] != pair.prompt_ids[0] == other.prompt_ids[0]
        assert len(other.prompt_ids) == min(len(pair.prompt_ids), longest - len(other.chosen_ids)) > 0


def test_where_all_prompts_are_the_same_the_answers_are_those_half_the_data_away() -> None:
    pairs = [replace(pair, chosen_ids=np.array([n], np.int32)) for n, pair in enumerate(answered([5] * 5))]
    assert [pair.chosen_ids[0] for pair in _Companions(pairs, None, 9)] == [3, 4, 0, 1, 2]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_baseline_of_an_evaluation_is_over_all_held_out_pairs(tmp_path: Path, batch: int) -> None:
    """So that the loss is the same however many processes and pairs a batch has."""
    held_out = tiny_pairs(5, 2)
    trainer = tiny_trainer(
        tmp_path, model=tiny_model(dtype=torch.float64), method="kto", beta=BETA, eval_dataset=held_out,
        per_device_eval_batch_size=batch,
    )  # fmt: skip
    start, model = tiny_model(dtype=torch.float64).eval(), moved(trainer.model).eval()
    baseline = z0(model, start, held_out, list(range(5)), longest_of([*trainer.streams[0], *held_out]))
    assert baseline > 0
    with torch.no_grad():
        losses = [expected_loss("kto", model, start, held_out, i, baseline) for i in range(5)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-8)


def test_an_evaluation_leaves_the_baseline_of_training_as_it_is(tmp_path: Path) -> None:
    """The row of the end has that of the last step."""
    settings: dict[str, Any] = {"method": "kto", "beta": BETA, "learning_rate": 1e-2, "logging_steps": 2}
    held_out: dict[str, Any] = {"eval_dataset": tiny_pairs(12)[:5], "eval_strategy": "steps", "eval_steps": 3}
    baselines = []
    for name, more in (("alone", {}), ("evaluated", held_out)):
        trainer = tiny_trainer(tmp_path / name, **settings, **more)
        trainer.train()
        baselines.append(trainer.state.log_history[-1]["state/main"])
    assert baselines[0] == baselines[1] > 0


def test_held_out_pairs_of_two_lists_cannot_be_looked_up(tmp_path: Path) -> None:
    with raises(SettingError, "eval_dataset"):
        tiny_trainer(tmp_path, method="kto", eval_dataset={"one": tiny_pairs(2, 3), "two": tiny_pairs(2, 4)})


@pytest.mark.parametrize("reference", ["precompute", "swap"])
@pytest.mark.parametrize(("method", "single"), CASES)
def test_training_does_not_depend_on_how_a_step_is_cut(
    tmp_path: Path, method: str, single: bool, reference: str
) -> None:
    """The check of the first step passes, and the weights after three steps are the same."""
    ends = []
    for tokens in (None, 25):
        main, buffer = tiny_pairs(12, 4), tiny_pairs(5, 5)
        main, buffer = (unpaired(main), unpaired(buffer)) if single else (main, buffer)
        categories = [["a", "b", "c"] * 4, [""] * 5, ["a", "d"]] if method == "cat_dpo" else None
        trainer = tiny_trainer(
            tmp_path, main=main, buffer=buffer, model=tiny_model(dtype=torch.float64), method=method,
            categories=categories, eval_dataset=main[:2], max_tokens_per_microbatch=tokens, anchor_weight=0.1,
            anchor_scale="gradient", learning_rate=0.01, reference=reference,
        )  # fmt: skip
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        ends.append((trainer._inputs.state(), [row["loss"] for row in rows], trainer.model.lm_head.weight.clone()))
        metrics = trainer.evaluate()
        assert metrics["eval_num_pairs"] == 2
        assert all(math.isfinite(value) for value in metrics.values())
        if METHODS[method].state_by and method != "kto":  # a mean below 0 counts as 0
            assert any(rows[-1][f"state/{name or 'no category'}"] for name in trainer._inputs.names)
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-9, abs=1e-12)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-9)
    torch.testing.assert_close(ends[0][2], ends[1][2], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["cat_dpo", "kldo", "kto"])
def test_the_state_goes_through_a_checkpoint(tmp_path: Path, method: str) -> None:
    def trained(folder: str, resume: str | None = None, **settings: Any) -> BFPOTrainer:
        settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01, "max_steps": 4, **settings}
        categories = [["a", "b"] * 6] if method == "cat_dpo" else None
        trainer = tiny_trainer(tmp_path / folder, method=method, categories=categories, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole")
    trained("parts", max_steps=4)
    again = trained("parts", str(tmp_path / "parts/checkpoint-2"))
    assert again._inputs.state() == whole._inputs.state()
    assert method == "kto" or any(whole._inputs.state())
    assert torch.equal(again.model.lm_head.weight, whole.model.lm_head.weight)


def test_cat_dpo_raises_the_margin_of_the_categories_that_are_unsafe(tmp_path: Path) -> None:
    """Two prompts; the start prefers the unsafe answer in one category and the safe one in the other."""
    model = tiny_model()
    first, second = tiny_pairs(2, 6)
    pairs = []
    for pair, prefers_safe in ((first, False), (second, True)):
        known = [
            float(logp(model, pair.prompt_ids, ids).detach()) / len(ids) for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        chosen_is_safe = float((known[0] > known[1]) == prefers_safe)
        pairs.append(replace(pair, chosen_is_safe=chosen_is_safe, rejected_is_safe=1 - chosen_is_safe))
    trainer = tiny_trainer(
        tmp_path, main=pairs * 4, model=model, method="cat_dpo", categories=[["bad", "good"] * 4], learning_rate=1e-7
    )
    trainer.train()
    margins = dict(zip(trainer._inputs.names, trainer._inputs.state(), strict=True))
    assert margins == {"bad": pytest.approx(3 * 0.1 * 0.95, rel=1e-6), "good": 0.0}


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].pointwise and name != "modpo"])
def test_a_pairwise_method_refuses_single_answers(tmp_path: Path, method: str) -> None:
    with raises(DataError, "single answers", method):
        tiny_trainer(tmp_path, main=unpaired(tiny_pairs(4)), method=method)


def test_categories_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with raises(SettingError, "categories"):
        tiny_trainer(tmp_path, method="cat_dpo", categories=[["a"] * 3])


def test_a_method_of_the_margin_holds_nothing_of_this(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    assert trainer._inputs is None
    trainer.train()
    assert not any(name.startswith("state/") for row in trainer.state.log_history for name in row)


@pytest.mark.parametrize("scale", ["loss", "gradient"])
def test_the_scale_of_the_anchor_is_in_the_loss_and_in_the_log(tmp_path: Path, scale: str) -> None:
    """DPO's loss pulls half a nat of beta x margin at the start."""
    settings = {"method": "dpo_safe_first", "anchor_weight": 0.4, "max_steps": 1}
    trainer = tiny_trainer(tmp_path, anchor_scale=scale, **settings)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "anchor_loss" in row)
    factor = 0.4 * (0.5 if scale == "gradient" else 1.0)
    assert row["anchor_loss"] == pytest.approx(factor * row["main/anchor"], rel=1e-9)
    assert row["loss"] == pytest.approx(row["preference_loss"] + row["anchor_loss"], rel=1e-9)
    with raises(SettingError, "anchor_scale"):
        tiny_trainer(tmp_path, anchor_scale="target", **settings)
