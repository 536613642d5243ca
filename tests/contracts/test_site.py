"""The site: every page is in its navigation, the reference is what the program shows, and README stays short."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import yaml

from bfpo.config import AlignConfig, describe_keys
from docs import pages_of_code as site

ROOT = Path(__file__).resolve().parents[2]
PAGES = dict(site.generated())
NAV = re.findall(r"^ {2,}- .*: (\S+)$", (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1], re.MULTILINE)


def test_every_page_is_once_in_the_navigation_and_every_entry_is_a_page():
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    folders = {place for place in NAV if not place.endswith(".md")}
    made = {place for place in PAGES if place.rpartition("/")[0] not in folders}
    assert sorted(NAV) == sorted(written | made | folders)
    assert folders <= {place.rpartition("/")[0] for place in PAGES}


def test_no_page_loads_a_script_from_another_host():
    config = (ROOT / "mkdocs.yml").read_text()
    scripts = re.search(r"\n  polyfills:\n((?:    - \S+.*\n)+)", config)
    assert scripts is not None  # else the plugin `offline` adds one
    assert re.findall(r"- (\S+)", scripts[1]) == ["images/iframe-worker.js"]
    assert (ROOT / "docs" / "images" / "iframe-worker.js").is_file()
    assert "  font: false" in config


def test_names_that_the_documents_import_are_on_the_page_of_the_python_api():
    told = [path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]]
    found = {
        f"{module}.{name.strip()}"
        for text in told
        for module, names in re.findall(r"^ *from (bfpo\.[\w.]+) import ([\w, ]+)$", text, re.MULTILINE)
        for name in names.split(",")
    }
    assert "bfpo.integrations.trl.TRLBFPOTrainer" in found
    assert {f"::: {name}" for name in found} <= set(PAGES["reference/api.md"].split("\n\n"))


@pytest.mark.parametrize("name", site.commands())
def test_the_page_of_a_command_has_all_its_options_and_keys(name):
    page = PAGES[f"reference/commands/{name}.md"]
    options = [option for one in site.commands()[name].params for option in one.opts if option.startswith("--")]
    assert [option for option in options if f"`{option}" not in page] == []
    if name in site.CONFIGS:
        keys = [key.name for key in describe_keys(site.CONFIGS[name])]
        assert re.findall(r"^\| `([^`]+)` \|", page.split("## Keys")[1], re.MULTILINE) == keys


def test_a_text_of_the_program_is_shown_as_it_is_in_a_table():
    row = site.table(("a",), [(site.plain("x_y < z* and `a_b | c`"),)]).splitlines()[-1]
    assert row == r"| x\_y &lt; z\* and `a_b \| c` |"


@pytest.mark.parametrize(
    ("place", "link", "moved", "beside"),
    [
        ("index.md", "docs/data.md#files", "data.md#files", set()),
        ("gate.md", "../examples/gate.yaml", "files/examples/gate.yaml", {"examples/gate.yaml"}),
        ("design/architecture.md", "../../CONTRIBUTING.md", "../CONTRIBUTING.md", set()),
        ("CONTRIBUTING.md", "docs/notation.md", "notation.md", set()),
        ("examples/real_pairs.md", "../docs/data.md", "../data.md", set()),
        ("theory.md", "https://arxiv.org/abs/2408.15313", "https://arxiv.org/abs/2408.15313", set()),
        ("notebooks/align.md", "../../docs/real-model.md", "../real-model.md", set()),
        ("start.md", "../examples/notebooks/loss.ipynb", "notebooks/loss.md", set()),
        ("theory.md", "no/such/file.md", "no/such/file.md", set()),
    ],
)
def test_a_link_of_the_repository_has_its_form_of_the_site(place, link, moved, beside):
    assert site.with_links_of_site(f"see [it]({link}).", place) == (f"see [it]({moved}).", beside)


def test_configs_of_the_migration_page_are_configs_of_train():
    page = (ROOT / "docs" / "migration.md").read_text()
    blocks = re.findall(r"^    ```yaml\n    # bfpo train[^\n]*\n(.*?)^    ```", page, re.MULTILINE | re.DOTALL)
    configs = [AlignConfig.model_validate(yaml.safe_load(textwrap.dedent(block))) for block in blocks]
    assert [config.beta for config in configs] == [0.1, 0.1, 0.1]


def test_the_readme_fits_two_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 320
