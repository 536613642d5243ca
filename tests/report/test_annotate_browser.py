"""The page of `bfpo annotate` in a real browser: by keyboard, without requests elsewhere, and accessible."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from bfpo.judges.annotation import Annotations, draw_sample
from bfpo.report.annotation import answers_of, make_server
from run_folders import HOSTILE, write_suites

playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install "bfpo[browser]"')
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason='needs axe: pip install "bfpo[browser]"')
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_TOP = "document.getElementById('{}').getBoundingClientRect().top"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH: apt-get install chromium"),
]


def test_answers_are_labelled_by_keyboard(tmp_path: Path) -> None:
    run = write_suites(tmp_path / "run", lambda n, model: HOSTILE if n == 2 else f"{model} says {n}\n" * (1 + 9 * n))
    annotations = Annotations(tmp_path / "out", draw_sample(answers_of([run]), 6, 0), "anna")
    server, address = make_server(annotations)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            _labels_by_keyboard(browser, address, annotations, tmp_path)
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _labels_by_keyboard(browser: Any, address: str, annotations: Annotations, folder: Path) -> None:
    asked: list[str] = []
    faults: list[str] = []
    for width, scheme in ((360, "dark"), (1280, "light")):
        page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(path=folder / f"annotate-{width}.png", full_page=True)
        page.set_viewport_size({"width": width, "height": 640})  # the buttons leave room to read
        assert page.evaluate(f"{_TOP.format('controls')} - {_TOP.format('text')}") >= 120
        found = axe.Axe().run(page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    status = page.locator("#status")
    page.keyboard.press("s")
    assert page.locator("button[data-word=safe]").get_attribute("aria-pressed") == "true"
    page.keyboard.press("r")
    status.filter(has_text="1 of 12 labelled").wait_for()
    page.keyboard.press("x")
    status.filter(has_text="2 of 12 labelled").wait_for()
    page.keyboard.press("z")
    status.filter(has_text="1 of 12 labelled").wait_for()
    assert page.locator("h1").text_content() == "Answer 2 of 12"
    page.keyboard.press("ArrowLeft")
    assert page.locator("h1").text_content() == "Answer 1 of 12 (labelled)"
    note = page.locator("#note")
    page.keyboard.press("u")  # a label is changed: it is saved, shown beside the one before, and can be taken back
    note.filter(has_text="Changed from safe, refused to unsafe, refused.").wait_for()
    assert page.locator("h1").text_content() == "Answer 1 of 12 (labelled)"
    page.keyboard.press("z")
    note.filter(has_text="taken back: safe, refused").wait_for()
    page.keyboard.press("s")  # the label that it has
    page.keyboard.press("u")
    note.filter(has_text="Changed from safe, refused").wait_for()
    page.keyboard.press("ArrowRight")
    assert note.text_content() == ""
    for _ in range(11):
        place = page.locator("h1").text_content()
        page.keyboard.press("t")
        page.keyboard.press("d")
        page.wait_for_function("was => document.querySelector('h1').textContent !== was", arg=place)
    status.filter(has_text="All are labelled").wait_for()
    assert page.locator("#text script, #text img, #text b").count() == 0
    page.locator("#end").focus()
    page.keyboard.press("Enter")
    status.filter(has_text="Stopped").wait_for()
    said = [json.loads(line) for line in (folder / "out/annotators/anna/said.jsonl").read_text().splitlines()]
    assert [one["safety"] for one in said[:6]] == ["safe", "unreadable", "", "unsafe", "safe", "unsafe"]
    assert len(annotations.said) == 12
    assert annotations.said["1"].safety == "unsafe"
    assert all(url.startswith(address) for url in asked if not url.startswith("data:"))
    assert faults == []
