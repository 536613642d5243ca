from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.errors import DataError, SettingError
from bfpo.report.data import MethodResult, ReportData, Sample, SampleAnswer
from bfpo.report.page import render_html, render_markdown, write_report
from fake_report import fake_report, hostile_report
from html_page import Page
from messages import raises


def answers_of(page: str) -> dict[str, Any]:
    block = re.search(r'<script id="answer-data" type="application/octet-stream">(.*?)</script>', page)
    assert block is not None
    content: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(block.group(1))))
    return content


@pytest.fixture(scope="module")
def data() -> ReportData:
    return fake_report()


@pytest.fixture(scope="module")
def page_text(data: ReportData) -> str:
    return render_html(data)


def test_writes_the_page_and_its_figures(tmp_path: Path) -> None:
    data = fake_report(only=("start", "bfpo", "ceiling"))
    assert write_report(data, tmp_path / "a") == tmp_path / "a" / "report.html"
    written = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path / "a").as_posix() for path in written) == [
        "figures/refusal.png",
        "figures/refusal.svg",
        "figures/scatter.png",
        "figures/scatter.svg",
        "figures/training.png",
        "figures/training.svg",
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert ReportData.from_json((tmp_path / "a" / "report.json").read_text()) == data
    write_report(data, tmp_path / "b")
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_every_part_is_there_with_its_numbers(data: ReportData, page_text: str) -> None:
    page = Page(page_text)
    markdown = render_markdown(data)
    for method in data.methods:
        assert method.title in page.text
        for metric in ("helpful_and_safe", "harmless_harmful", "over_refusal_benign", "over_refusal_borderline"):
            score = method.score(metric)
            assert score is not None
            interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
            assert interval in page.text
            assert interval in markdown
    assert page.text.count("passed") == 1
    assert page.text.count("failed") >= 1  # the made-up ceiling does not reach its gate
    assert "bfpo demo --out runs/demo" in page.text
    assert "torch" in page.text
    assert "6 min 28 s" in page.text
    assert [row[0] for row in answers_of(page_text)["rows"]] == [sample.prompt for sample in data.samples]
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert len(labels) == 2 + 2 + 4 + 2
    assert all(labels)


def test_needs_nothing_from_outside(page_text: str) -> None:
    page = Page(page_text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page_text
    assert not re.search(r"url\((?!#)", page_text)
    scripts = re.findall(r"<script>(.*?)</script>", page_text, flags=re.DOTALL)
    assert page_text.count("<script") == 2  # the other one is the block of answers, which no browser runs
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page_text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_colours_follow_the_page(page_text: str) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", page_text, flags=re.DOTALL))
    used = set(re.findall(r"var\(--([\w-]+)\)", page_text))
    known = set(re.findall(r"--([\w-]+):", page_text))
    assert used <= known
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#000000"}  # matplotlib's unseen defaults


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    data = hostile_report()
    write_report(data, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "<script>alert(1)</script>" in answers_of(text)["rows"][0][0]
    assert "{{ 7*7 }}" in page.text
    for name in ("report.html", "report.md", "report.json"):
        content = (tmp_path / name).read_text(encoding="utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", content), name
    assert "\u241b[31mred" in page.text
    for name in ("scatter", "training"):
        svg = (tmp_path / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "<script" not in svg
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", markdown.split("## Reproduction")[0])
    assert not re.search(r"(?<!\\)<", outside)
    assert "](javascript" not in re.sub(r"\\.", "", outside)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    bare = ReportData("report", "", [MethodResult("bfpo", "BFPO", "main"), MethodResult("ipo", "IPO", "baseline")])
    write_report(bare, tmp_path)
    assert not (tmp_path / "figures").exists()
    page = Page((tmp_path / "report.html").read_text())
    assert "BFPO was not measured" in page.text
    assert "Not measured: IPO" in page.text
    assert [attributes.get("id") for tag, attributes in page.tags if tag == "section"] == ["how"]
    assert "![" not in (tmp_path / "report.md").read_text()
    empty = ReportData("report", "", [])
    assert "No answers were scored" in Page(render_html(empty)).text


def test_the_contents_name_every_section_and_headings_are_in_order(data: ReportData, page_text: str) -> None:
    """A reader by ear goes from heading to heading: a level is never left out."""
    for text in (page_text, render_html(replace(data, samples=[], gates=[])), render_html(ReportData("r", "", []))):
        page = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        sections = re.findall(r'<section id="([^"]+)"', page)
        contents = page[page.index('<nav id="contents"') : page.index("</nav>")]
        assert re.findall(r'href="#([^"]+)"', contents) == sections
        levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_unscored_is_shown(page_text: str) -> None:
    assert "150 unscored" in Page(page_text).text


def test_bad_data_is_refused(data: ReportData, tmp_path: Path) -> None:
    one = MethodResult("a", "A", "main")
    with raises(SettingError):
        ReportData("", "", [one, one])
    with raises(SettingError):
        ReportData("", "", [one, replace(one, name="b")])
    with raises(SettingError):
        ReportData("", "", [one], samples=[Sample("?", "", [SampleAnswer("b", "!")])])
    with raises(SettingError):
        write_report(replace(data, seconds={"all": float("nan")}), tmp_path)
    with raises(DataError, "title"):
        ReportData.from_json('{"setting": "", "methods": []}')


def test_several_samples_of_a_prompt_share_its_number_and_have_links_of_their_own(data: ReportData) -> None:
    first, other = data.samples[:2]
    changed = replace(first, answers=[replace(answer, text="again") for answer in first.answers])
    rows = answers_of(render_html(replace(data, samples=[first, other, changed])))["rows"]
    assert [row[5:] for row in rows] == [[1, 1], [2, 0], [1, 2]]  # number of the prompt, of the sample
    assert len({row[4] for row in rows}) == 3
    once = answers_of(render_html(replace(data, samples=[first, other])))["rows"]
    assert [row[4] for row in once] == [rows[0][4], rows[1][4]]
