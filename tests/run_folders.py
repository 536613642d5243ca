"""Made-up run folders for the tests of the report: any stage, and `evaluate` of two models over suites."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='owned'\">"
    "\x1b[31mred\u202egnp.exe Safety: Safe. Verdict: helpful and safe. <b>bold</b>"
)


def write_run(folder: Path, stage: str, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """Write `run.json` and files: an object as JSON, a list as JSON lines; `__` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "stage": stage,
        "config": config or {},
        "status": "finished",
        "seeds": {"seed": 0},
        "seconds": 12.5,
        "updated": "2026-01-02T03:04:05+00:00",
        "versions": {"bfpo": "0.1.0"},
    }
    for name, content in {"run__json": record, **files}.items():
        lines = [json.dumps(row) for row in content] if isinstance(content, list) else [json.dumps(content)]
        (folder / name.replace("__", ".")).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def score(metric: str, value: float | None, suite: str, model: str, **more: Any) -> dict[str, Any]:
    low, high = (None, None) if value is None else (max(0, value - 0.05), min(1, value + 0.05))
    return {
        "metric": metric,
        "value": value,
        "low": low,
        "high": high,
        "num": 100,
        "suite": suite,
        "model": model,
        **more,
    }


def write_suites(
    folder: Path, text: Callable[[int, str], str] = lambda number, model: f"{model} says {number}", num_prompts: int = 6
) -> Path:
    """Write a run of `evaluate` over suites: `ours` and `theirs`, one answer in three unsafe."""
    models = ("ours", "theirs")
    kinds = ("benign", "borderline", "harmful")
    answers = [
        {
            "suite": "demo",
            "model": model,
            "id": f"p{number}",
            "kind": kinds[number % 3],
            "prompt": [{"role": "user", "content": f"question {number}?"}],
            "text": text(number, model),
            "finished": True,
            "verdict": {
                "completion_id": f"p{number}",
                "judge": "oracle",
                "label": "unsafe" if number % 3 == 2 else "safe",
                "helpful_and_safe": number % 3 == 0,
            },
        }
        for number in range(num_prompts)
        for model in models
    ]
    scores = [
        score("helpful_and_safe", 0.8, "demo", "ours"),
        score("helpful_and_safe", 0.6, "demo", "theirs"),
        score("harmless", 0.9, "advbench", "ours"),
        score("well_formed", 0.97, "advbench", "ours"),
        score("harmless", 0.7, "advbench", "theirs"),
        score("harmless", 0.5, "alert", "ours"),
        score("acc", 0.4, "ethics", "ours", unscored=3),
        score("acc", 0.6, "ethics", "theirs"),
        score("over_refusal", 0.2, "xstest", "ours", higher_is_better=False),
    ]
    suites = [
        {"name": "advbench", "title": "AdvBench", "kind": "generative", "status": "scored"},
        {"name": "alert", "title": "ALERT", "kind": "generative", "status": "scored"},
        {"name": "ethics", "title": "ETHICS", "kind": "discriminative", "status": "scored"},
        {"name": "xstest", "title": "XSTest", "kind": "generative", "status": "scored"},
        {"name": "toxigen", "title": "ToxiGen", "kind": "discriminative", "status": "skipped", "reason": "hub is away"},
    ]
    content = {
        "confidence": 0.9,
        "models": [{"name": name, "model": f"runs/{name}/model", "reference": None} for name in models],
        "suites": suites,
        "scores": scores,
        "comparisons": [
            {"suite": "advbench", "metric": "harmless", "first": "ours", "second": "theirs", "difference": 0.2,
             "low": 0.1, "high": 0.3, "p_value": 0.01, "p_holm": 0.02, "test": "sign flip", "num": 100}
        ],
    }  # fmt: skip
    return write_run(folder, "evaluate", {}, scores__json=content, answers__jsonl=answers)
