"""Pages of the site that are made at build time, as an mkdocs hook: README as home, commands, keys, the Python API.

They are made of what the program itself shows: the table of commands, its options, and the keys that `--keys` lists.
Pages and files outside `docs` that a page links to become part of the site, so that every link of the repository holds
there too.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import bfpo
from bfpo.cli import app
from bfpo.config import ChatConfig, GateConfig
from bfpo.config.describe import describe_keys
from bfpo.runs.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages outside `docs`, and their place in the site; those of `examples` keep theirs."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=(?:#[^)\s]*)?\))")
CONFIGS = {**{name: stage.config_class() for name, stage in STAGES.items()}, "gate": GateConfig, "chat": ChatConfig}


def commands() -> dict[str, Any]:
    """Return the commands of the command line by name."""
    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def plain(text: str) -> str:
    """Return a text in which Markdown has nothing to interpret but code in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[])", r"\\\1", part).replace("<", "&lt;") for part in parts
    )


def index_page() -> str:
    """Return the page of all commands."""
    rows = [(f"[`bfpo {name}`](commands/{name}.md)", plain(one.help)) for name, one in sorted(commands().items())]
    return "\n\n".join(
        (
            "# Commands",
            "Each command has a page with its options and, where it takes a config, every key of that config. "
            "`bfpo COMMAND --help` and `bfpo COMMAND --keys` show the same in a terminal. "
            "[Drive bfpo by scripts](../scripting.md) has exit codes and JSON output.",
            table(("command", "what it does"), rows),
        )
    )


def command_page(name: str) -> str:
    """Return the page of one command: its usage, its options, and the keys of its config."""
    command = commands()[name]
    rows, given = [], []
    for one in command.params:
        if one.param_type_name == "argument":
            given.append(one.metavar if one.required else f"[{one.metavar}]")
            rows.append((f"`{one.metavar}`", plain(one.help or "")))
        elif not one.hidden:
            rows.append((f"`{' '.join([*one.opts, *filter(None, [one.metavar])])}`", plain(one.help or "")))
    parts = [
        f"# bfpo {name}",
        plain(command.help),
        "```text\n" + " ".join(["bfpo", name, *given, "[OPTIONS]"]) + "\n```",
    ]
    parts += ["## Options", table(("option", "meaning"), rows)]
    if name in CONFIGS:
        parts += [
            "## Keys",
            f"Of `--config FILE.yaml` and `--set KEY=VALUE`, as `bfpo {name} --keys` lists them.",
            keys_table(name),
        ]
    return "\n\n".join(parts)


def keys_table(name: str) -> str:
    """Return the keys of a command's config as a table."""
    rows = [
        (
            f"`{key.name}`",
            "needed" if key.default is None else f"`{key.default}`",
            plain(key.allowed),
            plain(key.description),
        )
        for key in describe_keys(CONFIGS[name])
    ]
    return table(("key", "default", "accepts", "meaning"), rows)


# Public names that the documents use beside those of `bfpo` itself.
OF_MODULES = (
    "bfpo.data.load.CompletionStream",
    "bfpo.data.load.PairStream",
    "bfpo.data.read.iter_pairs",
    "bfpo.data.sources.resolve_files",
    "bfpo.data.store.TokenStore",
    "bfpo.data.store.write_tokens",
    "bfpo.data.tokenize.PairTokenizer",
    "bfpo.data.tokenize.TokenPair",
    "bfpo.integrations.trl.TRLBFPOTrainer",
)


def api_page() -> str:
    """Return the page of the public names of `bfpo`, which mkdocstrings fills from their docstrings."""
    names = [f"::: {home}.{name}" for home, names in bfpo._HOMES.items() for name in names]
    return "\n\n".join(
        [
            "# Python API",
            "These names are imported from `bfpo`, as `from bfpo import preference_loss`. "
            "Those [at the end](#names-of-single-modules) are imported from the module that is named with them.",
            *names,
            "## Names of single modules",
            *(f"::: {name}" for name in OF_MODULES),
        ]
    )


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown: its text, and its code without outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    parts = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    title, rest = parts[0], parts[1:]
    return "\n\n".join([title, f"The notebook is `{path.relative_to(ROOT)}`; it runs on a CPU.", *rest])


def generated() -> Iterator[tuple[str, str]]:
    """Yield place and Markdown of every page that is not a file of `docs`."""
    yield "reference/index.md", index_page()
    yield "reference/api.md", api_page()
    for name in commands():
        yield f"reference/commands/{name}.md", command_page(name)
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        yield f"notebooks/{path.stem}.md", notebook_page(path)
    for path in [ROOT / name for name in BESIDE] + sorted((ROOT / "examples").rglob("*.md")):
        name = path.relative_to(ROOT).as_posix()
        yield BESIDE.get(name, name), path.read_text(encoding="utf-8")


def source_of(place: str) -> str:
    """Return the path in the repository of a page of the site."""
    outside = {page: name for name, page in BESIDE.items()}
    if place in outside or place.startswith("examples/"):
        return outside.get(place, place)
    if place.startswith("notebooks/"):
        return f"examples/notebooks/{Path(place).stem}.ipynb"
    return f"docs/{place}"


def place_of(path: str) -> str:
    """Return the place in the site of a file of the repository: pages by their name, other files below `files`."""
    if path in BESIDE or (path.startswith("examples/") and path.endswith(".md")):
        return BESIDE.get(path, path)
    if path.startswith("examples/notebooks/"):
        return f"notebooks/{Path(path).stem}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def with_links_of_site(text: str, place: str) -> tuple[str, set[str]]:
    """Return a page with its links to files as the site needs them, and the files outside `docs` that it links to."""
    here, beside = posixpath.dirname(source_of(place)), set()

    def moved(found: re.Match[str]) -> str:
        target = found[1]
        if "://" in target or target.startswith("mailto:"):
            return target
        path = posixpath.normpath(posixpath.join(here, target))
        if not (ROOT / path).is_file():
            return target  # mkdocs reports it
        if place_of(path).startswith("files/"):
            beside.add(path)
        return posixpath.relpath(place_of(path), posixpath.dirname(place) or ".")

    return LINK.sub(moved, text), beside


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the files that pages link to."""
    from mkdocs.structure.files import File

    pages = dict(generated())
    beside: set[str] = set()
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    for file in files.documentation_pages():
        text = pages[file.src_uri] if file.src_uri in pages else Path(file.abs_src_path).read_text(encoding="utf-8")
        beside |= with_links_of_site(text, file.src_uri)[1]
    for path in sorted(beside):
        files.append(File.generated(config, place_of(path), content=(ROOT / path).read_bytes()))
    return files


def on_config(config: Any) -> Any:
    """Put one entry of the navigation for each command and each notebook in their places."""
    made: dict[str, list[Any]] = {
        "reference/commands": [f"reference/commands/{name}.md" for name in sorted(commands())]
    }
    for section in config["nav"]:
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else ():
                for title, place in entry.items():
                    entry[title] = made.get(place, place)
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Give the links of a page the form that the site needs."""
    return with_links_of_site(markdown, page.file.src_uri)[0]
