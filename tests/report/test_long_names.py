"""Names of 200 characters without a space: pages wrap them, figures shorten them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bfpo.plots.style import short_name
from bfpo.report.gather import gather
from bfpo.report.page import render_html
from run_folders import score, write_compare, write_run, write_suites, write_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LONG = "0123456789" * 20
PROBE = """<pre id="probe"></pre><script>addEventListener("load", function () { setTimeout(function () {
document.querySelectorAll("details").forEach(function (one) { one.open = true; });
document.getElementById("probe").textContent =
"WIDTH " + document.documentElement.scrollWidth + " " + document.documentElement.clientWidth + " END"; }, 300); });
</script></body>"""


def renamed(run: Path, *pairs: tuple[str, str]) -> Path:
    for file in run.rglob("*.json*"):
        text = file.read_text()
        for old, new in pairs:
            text = text.replace(old, new)
        file.write_text(text)
    return run


def runs(folder: Path) -> dict[str, Path]:
    names = [(f'"{name}"', f'"{name}{LONG}"') for name in ("ours", "theirs", "AdvBench", "ToxiGen", "ETHICS")]
    paths = [(f"runs/{name}/", f"runs/{name}{LONG}/") for name in ("ours", "theirs")]
    accuracy = {"metric": "accuracy", "value": 0.5, "num": 8}
    quality = {"judge": {"name": LONG}, "warnings": [LONG], "quality": {"all": [accuracy], LONG: [accuracy]}}
    rates = {"all prompts": [score("unsafe", 0.5, "", "")]}
    labels: dict[str, Any] = {"funnel": {"prompts": 3}, "rates": rates, "unscored_by_reason": {LONG: 3}}
    source = {"name": LONG, "hub_id": LONG, "rejected": {LONG: 3}}
    data = {"sources": [source], "warnings": [LONG], "decontamination": {LONG: {"prompts": 3, "rows": 2}}}
    data["streams"] = {"sft": {"rows": {"train": 3}, "num_rows": 3}}
    files = {"files": [f"{LONG}.jsonl"]}
    return {
        "scores": renamed(write_suites(folder / "scores"), *names, *paths),
        "sweep": write_sweep(folder / "sweep", tuple(f"beta={n},{LONG}" for n in (1, 2, 3))),
        "compare": renamed(write_compare(folder / "compare"), ('"soup"', f'"soup{LONG}"')),
        "check": write_run(folder / "check", "judge-check", {"data": files}, quality__json=quality),
        "redteam": write_run(folder / "red", "redteam", {"model": LONG, "judges": [LONG]}, redteam__json=labels),
        "prepare": write_run(folder / "prepare", "prepare", {}, data__json=data),
        "train": write_run(folder / LONG, "train", {"method": "bfpo"}, metrics__jsonl=[{"step": 1, "loss": 1.0}]),
    }


def test_a_long_name_is_shortened_in_the_middle() -> None:
    assert short_name("a" * 36) == "a" * 36
    assert short_name("abcdefghijklmnop", 9) == "abcde…nop"


@pytest.mark.parametrize("kind", ["sweep", "compare"])
def test_figures_shorten_long_names(kind: str, tmp_path: Path) -> None:
    page = render_html(gather([runs(tmp_path)[kind]]))
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert figures
    for figure in figures:
        assert LONG not in re.sub(r'aria-label="[^"]*"', "", figure)
        assert "…" in figure
    assert LONG in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH: apt-get install chromium")
def test_no_page_is_wider_than_its_window(tmp_path: Path) -> None:
    for kind, run in runs(tmp_path).items():
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render_html(gather([run])))
        file = tmp_path / f"{kind}.html"
        file.write_text(page.replace("</body>", PROBE), encoding="utf-8")
        for width in (500, 1100):
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
            command = [str(CHROMIUM), *options, f"--window-size={width},900", file.as_uri()]
            text = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
            found = re.search(r">WIDTH (\d+) (\d+) END<", text)
            assert found is not None, kind
            assert int(found.group(1)) <= int(found.group(2)), (kind, width)
