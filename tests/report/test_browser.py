"""The page in a real browser: Playwright drives the chromium of the system (`apt-get install chromium`)."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bfpo.commands.watch import make_server
from bfpo.core.schema import Verdict
from bfpo.report.data import MethodResult, ReportData, Sample, SampleAnswer
from bfpo.report.gather import gather
from bfpo.report.page import write_report
from fake_report import fake_report
from run_folders import HOSTILE, write_compare, write_suites, write_sweep

playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install "bfpo[browser]"')
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason='needs axe: pip install "bfpo[browser]"')
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH: apt-get install chromium"),
]
WIDTHS, SCHEMES = (360, 820, 1280), ("light", "dark")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo-like page whose answers come from a run with a hostile text."""
    folder = tmp_path_factory.mktemp("page")
    run = write_suites(folder / "scores", lambda n, model: HOSTILE if n in (2, 3) else f"{model} says {n}", 60)
    suites, demo = gather([run]), fake_report()
    named = {"ours": "bfpo", "theirs": "dpo_h"}
    samples = [
        replace(sample, answers=[replace(answer, method=named[answer.method]) for answer in sample.answers])
        for sample in suites.samples
    ]
    methods = [
        replace(
            method, suite_scores=next((suites.method(n).suite_scores for n, d in named.items() if d == method.name), {})
        )
        for method in demo.methods
    ]
    data = replace(demo, samples=samples, methods=methods, suites=suites.suites, runs=suites.runs, absent=suites.absent)
    return write_report(data, folder)


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a sweep and of a comparison, with names and paths that are long."""
    folder = tmp_path_factory.mktemp("experiments") / "a-folder-with-quite-a-long-name-that-has-no-place-to-break"
    named = tuple(f"beta=0.{n},alpha=0.25,anchor_weight=0.3,learning_rate=0.0001" for n in (1, 2, 3))
    return write_report(gather([write_sweep(folder / "sweep", named), write_compare(folder / "compare")]), folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser: Any, page_file: Path, width: int = 1280, scheme: str = "light") -> Any:
    """Open the page from disk; `page.asked` collects what it asks for, `page.faults` what it complains of."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.asked, page.faults = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.faults.append(message.text))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(page_file.as_uri())
    page.wait_for_selector("#answers[data-ready]")
    return page


def test_asks_for_nothing_and_runs_nothing_of_a_model(browser: Any, page_file: Path) -> None:
    page = opened(browser, page_file)
    page.locator("details.folded").evaluate_all("found => found.forEach(fold => { fold.open = true })")
    page.locator(".answer .text", has_text="Safety: Safe").first.wait_for()
    assert page.locator(".answer .text", has_text="Safety: Safe").count() > 0
    assert page.locator(".answer script, .answer img, .answer b").count() == 0
    assert page.title() == fake_report().title
    assert [url for url in page.asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.faults == []
    # The policy holds too where a text should get past the escaping: a script or an image added by hand does nothing.
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend',"
        ' \'<img src="http://127.0.0.1:9/x" onerror="document.title=1">\');'
        "const s = document.createElement('script'); s.textContent = 'document.title = 2'; document.body.append(s);"
    )
    page.wait_for_timeout(200)
    assert page.title() == fake_report().title
    assert any("Content Security Policy" in fault for fault in page.faults)


def test_harmful_answers_are_folded_until_they_are_asked_for(browser: Any, page_file: Path) -> None:
    page = opened(browser, page_file)
    article = page.locator("article", has_text="question 2?").first
    assert "Safety: Safe" not in article.text_content()
    fold = article.locator("details.folded").first
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    fold.locator(".text").wait_for()
    assert "Safety: Safe" in fold.text_content()
    assert article.locator(".badge.bad").first.text_content() == "unsafe"


def test_thoughts_are_folded_beside_the_answer(browser: Any, tmp_path: Path) -> None:
    data = fake_report()
    answer = replace(data.samples[0].answers[0], text="the answer", reasoning=f"a thought {HOSTILE}", verdict=None)
    sample = replace(data.samples[0], kind="benign", answers=[answer])
    page = opened(browser, write_report(replace(data, samples=[sample]), tmp_path))
    card = page.locator(".answer").first
    assert card.locator(".text").first.text_content() == "the answer"
    assert "a thought" not in card.text_content()
    fold = card.locator("details.folded")
    fold.locator("summary").click()
    fold.locator(".text").wait_for()
    assert "a thought" in fold.text_content()
    assert page.locator(".answer script, .answer img").count() == 0
    assert page.faults == []


def test_filters_searches_and_pages(browser: Any, page_file: Path) -> None:
    page = opened(browser, page_file)
    status = page.locator("#answer-status")
    assert status.text_content() == "Prompts 1 to 12 of 60"
    page.get_by_role("button", name="Next").click()
    assert status.text_content() == "Prompts 13 to 24 of 60"
    assert page.locator("article").first.locator(".prompt").text_content() == "question 12?"
    page.get_by_label("Kind of prompt").select_option("harmful")
    assert status.text_content() == "Prompts 1 to 12 of 20 found, 60 in all"
    page.get_by_label("Verdict").select_option("unsafe")
    page.get_by_label("of the model").select_option(label="DPO-H")
    assert "of 20 found" in status.text_content()
    page.get_by_label("Verdict").select_option("helpful and safe")
    assert status.text_content() == "No prompt matches; 60 in all"
    page.get_by_label("Verdict").select_option("")
    page.get_by_role("searchbox", name="Search").fill("says 59")
    playwright.expect(status).to_contain_text("of 1 found")
    page.get_by_role("searchbox", name="Search").fill("")
    playwright.expect(status).to_contain_text("of 20 found")
    button = page.get_by_role("button", name="Next")
    colour = "element => getComputedStyle(element).backgroundColor"
    before = button.evaluate(colour)
    button.hover()
    assert button.evaluate(colour) != before


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on 30 prompts: every third pair of verdicts differs, and one answer holds a word at its far end."""
    names = ("first", "second")

    def answer(number: int, name: str) -> SampleAnswer:
        label: Any = "unsafe" if name == "second" and number % 3 == 0 else "safe"
        text = "words and words " * (number * 40) + ("the harbour" if (number, name) == (29, "first") else "end")
        return SampleAnswer(name, text, Verdict(f"{number}", "judge", label))

    samples = [Sample(f"question {number}?", "benign", [answer(number, n) for n in names]) for number in range(30)]
    methods = [MethodResult(name, name.title(), "baseline") for name in names]
    return write_report(ReportData("long", "", methods, samples=samples), tmp_path_factory.mktemp("long"))


def test_long_answers_are_whole_on_demand_and_searched_to_their_end(browser: Any, long_file: Path) -> None:
    page = opened(browser, long_file)
    article = page.locator("article", has_text="question 5?").first
    text = article.locator(".answer .text").first
    assert len(text.text_content()) < 700
    article.get_by_role("button", name="Show all 3,203 characters").first.click()
    assert text.text_content().endswith("words end")
    article.get_by_role("button", name="Show less").first.click()
    assert len(text.text_content()) < 700
    page.get_by_role("searchbox", name="Search").fill("THE HARBOUR")
    playwright.expect(page.locator("#answer-status")).to_contain_text("of 1 found")
    assert page.locator("article mark").text_content() == "the harbour"


def test_models_that_differ_sorting_and_links(browser: Any, long_file: Path) -> None:
    page = opened(browser, long_file)
    status = page.locator("#answer-status")
    page.get_by_label("Verdicts of the models").select_option("differ")
    assert "of 10 found" in status.text_content()
    page.get_by_label("Verdicts of the models").select_option("agree")
    assert "of 20 found" in status.text_content()
    page.get_by_label("Sort").select_option("long")
    assert page.locator("article .prompt").first.text_content() == "question 29?"
    page.get_by_role("button", name="Next").click()
    again = browser.new_context().new_page()
    again.goto(page.url)
    again.wait_for_selector("#answers[data-ready]")
    assert again.locator("#answer-status").text_content() == status.text_content()
    assert again.locator("article .prompt").first.text_content() == page.locator("article .prompt").first.text_content()
    link = page.locator("article", has_text="question 4?").locator("a.link").get_attribute("href")
    again.goto(long_file.as_uri() + link)
    again.wait_for_selector("#answers[data-ready]")
    assert again.locator("article.linked .prompt").text_content() == "question 4?"


def test_a_page_in_progress_keeps_filters_and_place_when_it_loads_again(browser: Any, tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores", lambda n, model: f"{model} says {n}", 60)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with make_server([run], every=1) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        page = browser.new_context(viewport={"width": 1280, "height": 600}).new_page()
        loads: list[str] = []
        page.on("load", lambda _: loads.append(page.url))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("#answers[data-ready]")
        page.get_by_role("searchbox", name="Search").fill("says 1")
        page.locator("article").nth(3).scroll_into_view_if_needed()
        playwright.expect(page.locator("#answer-status")).to_contain_text("11 found")
        before, at = len(loads), page.evaluate("window.scrollY")
        page.wait_for_timeout(1500)
        assert len(loads) == before  # somebody has just typed
        page.wait_for_function("before => performance.now() < 1500 || false", arg=before, timeout=20_000)
        page.wait_for_selector("#answers[data-ready]")
        playwright.expect(page.locator("#answer-status")).to_contain_text("11 found")
        assert page.get_by_role("searchbox", name="Search").input_value() == "says 1"
        assert abs(page.evaluate("window.scrollY") - at) < 50
        (run / "run.json").write_text(json.dumps({**record, "status": "finished"}))
        thread.join(timeout=30)
        assert not thread.is_alive()
        page.wait_for_selector("text=A run that has ended")
        assert page.get_by_role("searchbox", name="Search").input_value() == "says 1"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_fits_every_width_and_has_no_serious_fault_of_access(
    browser: Any, page_file: Path, width: int, scheme: str
) -> None:
    page = opened(browser, page_file, width, scheme)
    for details in page.locator("#how details, #published details").all():
        details.evaluate("element => { element.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (item["id"], item["nodes"][0]["html"][:200]) for item in found if item["impact"] in ("serious", "critical")
    ]
    assert serious == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [*WIDTHS, 1440])
def test_a_page_of_experiments_fits_and_has_no_serious_fault(
    browser: Any, experiment_file: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(experiment_file.as_uri())
    page.locator("details").evaluate_all("found => found.forEach(fold => { fold.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#experiment-0 svg:visible").count() == 1  # one of its two widths
    found = axe.Axe().run(page).response["violations"]
    assert [item["id"] for item in found if item["impact"] in ("serious", "critical")] == []
    assert faults == []


def test_prints_to_pdf_without_controls_or_folded_texts(browser: Any, page_file: Path, tmp_path: Path) -> None:
    page = opened(browser, page_file)
    page.emulate_media(media="print")
    assert not page.locator("#answer-controls").is_visible()
    content = page.pdf(path=str(tmp_path / "page.pdf"), format="A4")
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") + content.count(b"/Type /Page/") > 2
    assert page.locator("#how details:not([open])").count() == 0
    assert page.locator("details.folded[open]").count() == 0


def test_ten_thousand_answers_filter_without_freezing(browser: Any, tmp_path: Path) -> None:
    run = write_suites(tmp_path / "scores", lambda n, model: f"{model} says {n} " + f"word{n % 97} " * 60, 5_000)
    page = opened(browser, write_report(gather([run]), tmp_path))
    took = page.evaluate(
        "() => { const field = document.getElementById('filter-kind'); field.value = 'harmful';"
        "const start = performance.now(); field.dispatchEvent(new Event('change')); return performance.now() - start; }"
    )
    assert "of 1666 found" in page.locator("#answer-status").text_content()
    assert took < 500
    assert page.locator("article").count() == 12
