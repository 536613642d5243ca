"""A page as tests read it: tags, attributes and text; and a search for values as Python writes them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# What Python writes: None, nan, an object, dictionary, list or tuple.
PYTHON = re.compile(r"\bNone\b(?! of)|\b(?:nan|inf)\b|\b[A-Z]\w+\(\w+=|\{'|\['|\('|\{\}|\[\]|<\w[\w.]* object|Path\(")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and text; checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written_as_python(text: str) -> list[str]:
    """Lines of a page or card in which a value is shown as `None`, a dictionary, a list or an object."""
    return [line for line in text.splitlines() if PYTHON.search(line)]
