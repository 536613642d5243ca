"""The documents name the packages in their true order, and only files and modules that exist."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bfpo.objective.methods import METHODS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "bfpo"
ARCHITECTURE = ROOT / "docs" / "design" / "architecture.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
FIGURE = ROOT / "docs" / "images" / "architecture.svg"
SVG = "{http://www.w3.org/2000/svg}"
PAGES = [ROOT / "README.md", CONTRIBUTING, *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = [
    re.split(r"\s*[|:]\s*", layer) for layer in next(each["layers"] for each in CONTRACTS if each["type"] == "layers")
]


def layers_of(text: str) -> list[list[str]]:
    """Return the layers of the list in CONTRIBUTING.md, one a line of the code block after its first sentence."""
    block = text.split("`[tool.importlinter]`")[1].split("\n\n")[1]
    return [line.split(" | ") for line in map(str.strip, block.splitlines())]


def test_the_list_of_layers_is_that_of_the_contract():
    assert layers_of(CONTRIBUTING.read_text(encoding="utf-8")) == LAYERS


def test_the_table_of_packages_is_in_the_order_of_the_contract():
    section = ARCHITECTURE.read_text(encoding="utf-8").split("## Packages")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [name for layer in LAYERS for name in layer]


def test_the_figure_shows_the_layers_of_the_contract():
    root = ElementTree.parse(FIGURE).getroot()
    groups = [[text.text for text in group.findall(f"{SVG}text[@class='package']")] for group in root.iter(f"{SVG}g")]
    assert groups == LAYERS
    files = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "file"]
    assert files
    assert [file for file in files if not (SOURCE / str(file)).is_file()] == []


def test_the_table_of_methods_names_every_method():
    section = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8").split("## The methods")[1]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(METHODS)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\s]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def exists(name: str) -> bool:
    return any((base / name).exists() for base in (ROOT, SOURCE))


def module_exists(name: str) -> bool:
    """Whether `bfpo.a.b` is a module or package, or `bfpo.a.b.Name` is named in one."""
    place, parts = SOURCE, name.split(".")[1:]
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    file = place / f"{parts[0]}.py" if parts and (place / f"{parts[0]}.py").is_file() else place / "__init__.py"
    rest = parts[1:] if file.name != "__init__.py" else parts
    return not rest or re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("page", [ARCHITECTURE, CONTRIBUTING], ids=lambda page: page.name)
def test_every_path_of_a_page_on_the_code_exists(page):
    paths = [name for name in quoted(page.read_text(encoding="utf-8")) if "/" in name and "<" not in name]
    assert len(paths) > 10
    assert [path for path in paths if not exists(path) and not path.startswith(".venv/")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_modules_that_exist(page):
    names = quoted(page.read_text(encoding="utf-8"))
    files = [name for name in names if re.fullmatch(r"(src|tests|[a-z_]+)/[\w/]+\.py", name)]
    modules = [name for name in names if re.fullmatch(r"bfpo(\.\w+)+", name)]
    assert [file for file in files if not exists(file)] == []
    assert [module for module in modules if not module_exists(module)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_to_a_file_or_an_anchor_has_a_target(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("name", "found"),
    [("bfpo.data.load", True), ("bfpo.data", True), ("bfpo.BFPOTrainer", True), ("bfpo.evaluation.x", False)],
)
def test_a_module_is_found_by_its_dotted_name(name, found):
    assert module_exists(name) is found
