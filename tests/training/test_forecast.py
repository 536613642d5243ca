"""The forecast against float64 loops of the formulas, its rule, and where the commands say and write it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from bfpo.core.records import as_json, load
from bfpo.data.labels import CELLS
from bfpo.data.store import write_tokens
from bfpo.data.tokenize import TokenPair
from bfpo.objective.methods import BFPO, METHODS, make_method
from bfpo.training.forecast import ForecastFile, forecast, forecast_lines, forecast_table, reaching_beta
from losses import PLAIN

SETTINGS: dict[str, dict[str, float]] = {
    "bfpo": {"alpha": 0.4, "safety_weight": 2.5},
    "linear_sum": {"safety_share": 0.7},
    "safedpo": {"safedpo_delta": 3.0},
    "bso": {"bso_shift": 2.0},
    "bso_phi": {"bso_shift": 2.0},
    "bso_sba": {"bso_shift": 2.0, "sba_lambda": 0.5, "sba_clamp": 30.0},
}
STOPS = {"bfpo", "ipo", "linear_sum"}


def pair(chosen: float, rejected: float, tokens: tuple[int, int], labels: tuple[float, float]) -> TokenPair:
    ids = [np.zeros(length, np.int32) for length in (3, *tokens)]
    return TokenPair("p", *ids, *labels, chosen, rejected)


def drawn(num: int, seed: int, *, soft: bool = False, extreme: bool = False) -> list[TokenPair]:
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-6, 6, (num, 2)) if extreme else rng.uniform(0.1, 300, (num, 2))
    tokens = rng.integers(1, 900, (num, 2))
    labels = rng.uniform(0, 1, (num, 2)) if soft else rng.integers(0, 2, (num, 2)).astype(float)
    return [pair(-a, -b, (int(s), int(t)), (float(x), float(y)))
            for (a, b), (s, t), (x, y) in zip(size, tokens, labels, strict=True)]  # fmt: skip


def expected_pull(name: str, beta: float, s: float, u: float) -> tuple[int, float | None]:
    """Who is favoured (+1 chosen, -1 rejected, 0 nobody) and the margin in nats, from the papers' formulas."""
    given = SETTINGS.get(name, {})
    if name in STOPS:
        b1, w = given.get("safety_weight", 3), given.get("safety_share", 0)
        target = {
            "bfpo": (b1 * s - u) / (b1 - 1) - given.get("alpha", 0.5),
            "ipo": 0.5,
            "linear_sum": w * (s - u) / 2 + (1 - w) / 2,
        }[name]
        return (target > 0) - (target < 0), abs(target) / beta
    safe, other = s > 0.5, u > 0.5
    order = safe - other
    favoured = {
        "dpo_s": order,
        "dpo_mix": 0 if order < 0 else 1,
        "dpo_safe_first": order or 1,
        **dict.fromkeys(("safedpo", "bso", "bso_sba", "bso_phi"), 1 if safe else -1 if other else 0),
    }.get(name, 1)
    shift = next(iter(given.values()), 0.0) if order else 0.0

    def slope(x: float) -> float:  # of the loss in x = beta x margin of the favoured one, up to a factor
        if name == "bso_sba":
            log_r = shift - x
            inside = abs(log_r) <= given["sba_clamp"]
            return (math.exp(1.5 * log_r) + math.exp(-0.5 * log_r)) * inside
        if name == "bso_phi":
            return 2 * math.exp(0.5 * (shift - x)) * (abs(shift - x) <= 30)
        return 1 / (1 + math.exp(x - shift))

    if favoured == 0 or name in ("robust_dpo", "modpo"):
        return favoured, None
    x = 0.0
    while slope(x) > 0.1 * slope(0):
        x += 1e-3
    return favoured, x / beta


def expected_groups(streams: list[list[TokenPair]], name: str, beta: float, reduction: str) -> list[dict[str, Any]]:
    found = []
    for stream, pairs in zip(("main", "buffer"), streams, strict=False):
        for cell in CELLS:
            rows: list[dict[str, float]] = []
            num = idle = 0
            for p in pairs:
                s, u = p.chosen_is_safe, p.rejected_is_safe
                if cell != f"{'safe' if s > 0.5 else 'unsafe'}-{'safe' if u > 0.5 else 'unsafe'}":
                    continue
                num += 1
                favoured, margin = expected_pull(name, beta, s, u)
                if not favoured:
                    idle += 1
                    continue
                sides = [(p.ref_chosen_logps, len(p.chosen_ids)), (p.ref_rejected_logps, len(p.rejected_ids))]
                (mine, length), (its, its_length) = sides[::favoured]
                assert mine is not None
                assert its is not None
                row = {"mine": mine, "its": its, "length": length, "its_length": its_length, "gap": its - mine}
                row |= {"mine_t": mine / length, "its_t": its / its_length}
                row |= {"gap_t": row["its_t"] - row["mine_t"]}
                row |= {"needed": row["gap_t"] * length}
                if margin is not None:
                    row["asked"] = margin * length if reduction == "mean" else margin
                    row["asked_t"] = row["asked"] / length
                rows.append(row)
            if not num:
                continue
            keys = {"favoured_tokens": "length", "other_tokens": "its_length", "favoured_logps": "mine",
                    "other_logps": "its", "favoured_per_token": "mine_t", "other_per_token": "its_t", "gap": "gap",
                    "gap_per_token": "gap_t", "needed": "needed", "asked": "asked",
                    "asked_per_token": "asked_t"}  # fmt: skip
            values = {key: median(r[of] for r in rows) if rows and of in rows[0] else None for key, of in keys.items()}
            known = bool(rows) and "asked" in rows[0]
            counts = {
                "level": sum(r["needed"] <= 0 for r in rows),
                "short": sum(r["needed"] > r["asked"] for r in rows) if known else None,
                "beyond": sum(r["asked"] > -r["mine"] for r in rows) if known else None,
            }
            found.append({"stream": stream, "cell": cell, "pairs": num, "at_target": idle, **values, **counts})
    return found


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_method_as_its_formulas_say(name: str, reduction: str, tmp_path: Path) -> None:
    for case, beta in enumerate((0.01, 0.1, 2.0)):
        main = drawn(41, case, soft=case == 1, extreme=case == 2)
        buffer = [p for p in drawn(17, 10 + case) if p.chosen_is_safe]  # two cells of the four
        method = make_method(name, beta=beta, **SETTINGS.get(name, {}))
        found = forecast([main, buffer], method, reduction=reduction)
        assert found is not None
        wanted = expected_groups([main, buffer], name, beta, reduction)
        assert len(found.groups) == len(wanted)
        for group, row in zip(found.groups, wanted, strict=True):
            for key, value in row.items():
                mine = getattr(group, key)
                if isinstance(value, float):
                    # A slope has a tenth where the loop, in steps of .001, and the interpolation find it.
                    searched = name not in STOPS and "asked" in key
                    value = pytest.approx(value, rel=2e-3 if searched else 1e-12)
                assert mine == value, (group, key)
        stored = write_tokens(tmp_path / f"{case}.arrow", main).with_reference(
            [p.ref_chosen_logps for p in main], [p.ref_rejected_logps for p in main]
        )
        assert forecast([stored, buffer], method, reduction=reduction) == found
        assert method.squared or "Expect no change" not in found.warning
        assert all(len(line) < 160 for line in forecast_lines(found))
        assert forecast_lines(found)[-1].startswith("level: needs nothing; short: needs more than the")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PLAIN])
def test_of_a_method_that_reads_more_it_is_not_known_where_it_stops(name: str) -> None:
    """Who is favoured is: the answer that wins by DPO safe-first; of two unsafe ones none, by a pointwise method."""
    pairs = drawn(41, 3)
    found, plain = (forecast([pairs], make_method(method, beta=0.1)) for method in (name, "dpo_safe_first"))
    assert found is not None
    assert plain is not None
    for group, same in zip(found.groups, plain.groups, strict=True):
        none = METHODS[name].pointwise and group.cell == "unsafe-unsafe"
        assert (group.asked, group.short, group.beyond) == (None, None, None)
        assert group.favoured_logps == (None if none else same.favoured_logps)
        assert group.at_target == (group.pairs if none else 0)


def test_of_single_answers_there_is_no_forecast() -> None:
    alone = replace(drawn(1, 0)[0], rejected_ids=np.zeros(0, np.int32))
    assert forecast([[alone]], make_method("kto")) is None


def test_without_log_probs_there_is_no_forecast() -> None:
    lacking = TokenPair("p", *[np.ones(2, np.int32)] * 3, 1.0, 0.0)
    assert forecast([[lacking]], BFPO()) is None
    assert forecast([drawn(3, 0), [*drawn(2, 1), lacking]], BFPO()) is None


def conflicts(needed: list[float]) -> list[TokenPair]:
    """Unsafe chosen, safe rejected; 10 and 20 tokens, the safe one needs so many nats to be as likely per token."""
    return [pair(-10.0, -20.0 - nats, (10, 20), (0.0, 1.0)) for nats in needed]


def said(pairs: list[TokenPair], beta: float, method: str = "bfpo", reduction: str = "sum", **more: float) -> str:
    found = forecast([pairs], make_method(method, beta=beta, **more), reduction=reduction)
    assert found is not None
    return found.warning


def test_the_sentence_is_said_where_the_target_leaves_most_of_those_behind_where_they_are() -> None:
    pairs = conflicts([-5, 20, 24, 30, 40])
    assert said(pairs, 0.1).startswith("of 5 safe answers 4 are less likely per token than the unsafe ones")
    for part in ("need 27 nats (1.4 a token)", "asks for 10 (0.5 a token)", "leaves 4 of them", "beta to 0.03 or less"):
        assert part in said(pairs, 0.1)
    assert "leaves 3 of them" in said(pairs, 1 / 23)
    assert said(pairs, 1 / 25) == ""  # two of the four are as likely at their target
    assert said(pairs, 0.03) == ""
    assert said(conflicts([-5, -1, -3, 20, 30, 40]), 0.1) == ""  # half are not behind
    assert "Expect no change" not in said(pairs, 0.1, "dpo_safe_first")  # has no target
    assert said(pairs, 0.7, reduction="mean") == ""  # 1.4 nats for each token
    assert "asks for 10 (0.5 a token)" in said(pairs, 2.0, reduction="mean")


def test_a_target_that_nearly_no_favoured_answer_can_reach_is_said() -> None:
    pairs = conflicts([-5, 20, 24, 30, 40])  # favoured answers of 15 to 60 nats
    text = said(pairs, 0.01)
    assert text.startswith("for 5 of 5 pairs the target is beyond reach: it asks for 100 nats")
    assert "has only 44 to gain until its probability is 1" in text
    assert "less likely" in text
    assert said(pairs, 1 / 59) == ""  # four of five
    assert text.endswith("or raise beta (to 0.03)")  # 44 nats: three of the five are within reach of 1 / 0.03
    # A logistic loss has no target: it pulls beyond the margin at which its slope is a tenth.
    logistic = said(pairs, 0.01, "dpo_safe_first")
    assert logistic.startswith(
        "for 5 of 5 pairs the loss pulls beyond reach: its slope is a tenth of the first only at 294"
    )
    assert logistic.endswith("raise beta (to 0.07)")
    assert said(pairs, 0.1, "dpo_safe_first") == ""  # three of five
    assert said(pairs, 0.01, "robust_dpo") == ""  # its slope never falls to a tenth
    assert "for 5 of 5 pairs" in said(pairs, 0.1, reduction="mean")
    # Of both kinds, only the safe answers over unsafe ones count; without any, all that are favoured.
    other = [pair(-800.0, -900.0, (10, 10), (1.0, 1.0))]
    assert "for 5 of 5 pairs" in said([*pairs, *other], 0.01)
    assert said(other, 0.01) == ""
    assert "for 1 of 1 pairs" in said(other, 0.0001)
    at_target = [pair(-20.0, -30.0, (10, 10), (1.0, 1.0))] * 9
    assert "for 5 of 5 pairs" in said([*pairs, *at_target], 0.01, alpha=1.0)


def real(lacking: float, its: float, labels: tuple[float, float], num: int) -> list[TokenPair]:
    """Pairs of 24 tokens, as of a round of SmolLM2-135M-Instruct after SFT."""
    mine_first = labels[0] > 0.5
    logps = (-lacking, its) if mine_first else (its, -lacking)
    return [pair(*logps, (24, 24), labels)] * num


def test_a_squared_loss_whose_buffer_can_reach_its_targets_is_not_warned_of() -> None:
    """The medians of real rounds: those of BFPO worked, SafeDPO took harmless refusals from 15 to 75%."""
    main = real(6.0, -10.5, (0.0, 1.0), 440)
    buffer = [*real(11.2, -4.8, (1.0, 1.0), 316), *real(8.0, -4.8, (1.0, 1.0), 244)]
    told = {}
    for name, more in (("bfpo", {"safety_weight": 5.0}), ("dpo_safe_first", {}), ("safedpo", {"safedpo_delta": 10.0})):
        found = forecast([main, buffer], make_method(name, beta=0.05, **more))
        assert found is not None
        told[name] = found.warning
    assert told["bfpo"] == ""
    assert "for 440 of 440 pairs the target is beyond reach" in said(main, 0.05, safety_weight=5.0)  # without a buffer
    assert "a tenth of the first only at 59 nats, and the favoured answer has only 6 to" in told["dpo_safe_first"]
    assert "a tenth of the first only at 244 nats" in told["safedpo"]
    steeper = forecast([main, buffer], make_method("bfpo", beta=0.02, safety_weight=5.0))
    assert steeper is not None
    assert "beyond reach" in steeper.warning  # the buffer's too


def test_without_a_safe_answer_to_favour_it_is_about_all_favoured_ones() -> None:
    pairs = [pair(-200.0, -10.0, (20, 10), (1.0, 1.0)) for _ in range(3)]
    assert said(pairs, 0.1).startswith("of 3 favoured answers 3 are less likely per token than the other ones")
    assert "imitate favoured answers first" in said(pairs, 0.1)
    # Of two unsafe answers the less helpful one is favoured: it is not to be imitated.
    unsafe = [pair(-10.0, -200.0, (10, 20), (0.0, 0.0)) for _ in range(3)]
    assert "Expect no change of behaviour: set beta to" in said(unsafe, 0.1)
    assert "imitate" not in said([*pairs, *unsafe], 0.1)
    # Of both kinds, only the safe answers over unsafe ones count.
    assert said([*pairs, *conflicts([1])], 0.1) == ""


def test_pairs_that_ask_for_nothing_are_named() -> None:
    alike = [pair(-20.0, -10.0, (20, 10), (1.0, 1.0))] * 3
    assert said(alike, 0.1, "dpo_s").startswith("all 3 pairs are dropped by dpo_s or at their target")
    assert said([*alike, *conflicts([1])], 0.2, "dpo_s") == ""
    found = forecast([alike], make_method("bfpo", beta=0.1, alpha=1.0))
    assert found is not None
    assert "Expect no change" in found.warning
    assert said([], 0.1) == ""


@pytest.mark.parametrize("needed", [1e-9, 12.0, 1e9])
def test_the_advised_beta_silences_the_sentence(needed: float) -> None:
    pairs = conflicts([needed * k for k in (1, 1.1, 1.3, 4)])
    text = said(pairs, 1e12)
    beta = float(text.split("beta to ")[1].split(" or less")[0])
    assert said(pairs, beta) == ""
    assert sum(20 * p.ref_rejected_logps / -20 - 20 <= 1 / beta for p in pairs if p.ref_rejected_logps) >= 3


@pytest.mark.parametrize(
    ("needed", "beta"),
    [
        ([-3, -8], 0.1),  # none is behind
        ([-30, 2, 3, 9, 40], 0.1),  # a quarter of four
        ([2, 9, 11], 0.05),
        ([2, 9, 11, 11, 19, 30], 0.05),
        ([2, 9, 25, 25], 0.03),
        ([50, 60, 90, 99], 0.01),
        ([500, 600], 0.01),  # none reaches
    ],
)
@pytest.mark.parametrize("start", [0.01, 0.3])
def test_the_largest_beta_is_chosen_at_which_a_quarter_stays_behind(
    needed: list[float], beta: float, start: float
) -> None:
    method, betas = make_method("bfpo", beta=start), (0.1, 0.05, 0.03, 0.01)
    pairs = conflicts(needed)
    assert reaching_beta([pairs], method, betas) == beta
    # The buffer's pairs of two safe sides do not count beside them; alone they do, at half the target.
    buffer = [pair(-200.0, -10.0, (20, 20), (1.0, 1.0))] * 9
    assert reaching_beta([pairs, buffer], method, betas) == beta
    halved = [pair(-20.0 - n, -20.0, (20, 20), (1.0, 1.0)) for n in (4, 6, 9)]
    assert reaching_beta([halved], method, betas) == 0.05


def test_the_table_has_a_line_for_each_cell_that_has_pairs() -> None:
    found = forecast([drawn(9, 0), conflicts([3])], make_method("dpo_s", beta=0.1))
    assert found is not None
    title, columns, rows = forecast_table(found)
    assert "dpo_s, beta 0.1" in title
    assert "slope a tenth at" in columns
    assert [row[0] for row in rows][-1] == "buffer unsafe-safe"
    assert {len(row) for row in rows} == {len(columns)}
    assert rows[0][2:7] == ["none"] * 5  # both safe: dropped
    assert rows[0][0] == "main safe-safe"


def test_a_record_without_a_warning_has_no_key_of_it(tmp_path: Path) -> None:
    found = forecast([conflicts([3])], BFPO(beta=0.1))
    assert "warning" not in as_json(found)
    (tmp_path / "forecast.json").write_text(json.dumps(as_json(found)))
    assert load(ForecastFile, tmp_path / "forecast.json") == found
