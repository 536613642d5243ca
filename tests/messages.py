"""The texts of errors and warnings, held in one golden file: tests name the class and the key, never the wording.

`raises(DataError, "max_length")` passes if the block raises a `DataError` whose text names `max_length` and is the one
that `tests/golden/messages.json` holds for the running test. `fails(result, ...)` does the same for what the command
line writes and `says(caplog, ...)` for the log.

After a text has changed, record it and look at the diff of the golden file, the only one that changes:

    pytest --update-messages tests/data/test_read.py      # or one test, or all: pytest --update-messages -m "not gpu"

The entries of the tests that ran and passed are written and the others stay; `-n` works. An entry whose test is gone is
dropped when its file runs as a whole, or by `pytest --co --update-messages`, which runs nothing. In a conflict take
either side of the golden file and record again.

What varies is not recorded: folders, ports, free space (`normalised`), and what another library or the system says. The
text of an exception that no `raise` of bfpo or of a test raised appears as `<quoted error>`, a check of pydantic as its
kind. `mask` is a pattern for the rest, such as figures that depend on the version of torch.
"""

from __future__ import annotations

import dis
import fcntl
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import bfpo
from bfpo.core.errors import BfpoError

ROOT = Path(__file__).resolve().parents[1]
OURS = {Path(bfpo.__file__).resolve().parent, *(ROOT / name for name in ("tests", "benchmarks", "examples"))}
GOLDEN = ROOT / "tests" / "golden" / "messages.json"
HOW = "pytest --update-messages"

VARIES = (
    (r"(?<=127\.0\.0\.1:)\d+", "<port>"),
    (r"[\d,.]+(?= [KMG]i?B free\b)", "<n>"),
    (r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", "<hash>"),
    (r"(?<=no whole answer: )[^)]+|Error code: \d+ -(?= )", "<quoted error>"),  # the client of model servers
    (r"(?<=not JSON compliant): (?:nan|-?inf)", ""),  # newer versions of Python name the number
)


@contextmanager
def raises(
    expected: type[BaseException] | tuple[type[BaseException], ...], *keys: str | None, mask: str | None = None
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expect an error of this class whose text names the keys and is the recorded one."""
    __tracebackhide__ = True
    with pytest.raises(expected) as caught:
        yield caught
    _compare(_own_text(caught.value), keys, mask)


def fails(result: Any, *keys: str | None, code: int = 2, mask: str | None = None) -> None:
    """Expect that a run of the command line ended with this status and the recorded message, without a traceback."""
    __tracebackhide__ = True
    status = result.returncode if hasattr(result, "returncode") else result.exit_code
    assert status == code, result.stderr
    assert "Traceback" not in result.stderr
    _compare(without_quoted(result.stderr.strip(), getattr(result, "exception", None)), keys, mask)


def says(caplog: pytest.LogCaptureFixture, *keys: str, mask: str | None = None) -> None:
    """Expect that bfpo logged something that names all keys, and that these lines are the recorded ones."""
    __tracebackhide__ = True
    records = [record for record in caplog.records if record.name.partition(".")[0] == "bfpo"]
    lines = [line for line in (record.getMessage() for record in records) if all(_names(line, key) for key in keys)]
    assert lines, f"nothing that bfpo logged names {', '.join(keys)}: {[record.getMessage() for record in records]}"
    for line in lines:
        _compare(line, (), mask)


def _names(text: str, key: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text) is not None


def _own_text(error: BaseException) -> str:
    """Return the text of an error, without what it quotes of others."""
    if isinstance(error, ValidationError):
        return "\n".join(
            "".join(f"{part}: " for part in one["loc"])
            + (str(one["ctx"]["error"]) if one["type"] == "value_error" else f"<pydantic: {one['type']}>")
            for one in error.errors(include_url=False)
        )
    return without_quoted(str(error), error)


def without_quoted(text: str, error: BaseException | None) -> str:
    for quoted in _chain(error):
        if isinstance(quoted, ValidationError):
            for one in quoted.errors(include_url=False):
                if one["type"] != "value_error":
                    text = text.replace(one["msg"], f"<pydantic: {one['type']}>")
        elif not _is_ours(quoted):
            names = ("strerror", "msg", "problem", "reason")
            texts = [str(quoted), *(str(getattr(quoted, name, "")) for name in names)]
            texts += [line.rstrip(".") for line in str(quoted).strip().splitlines()[:1]]
            for part in sorted((part for part in texts if " " in part.strip()), key=len, reverse=True):
                text = text.replace(part, "<quoted error>")
    return text


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return the causes and contexts of an error, nearest first, each once."""
    found: list[BaseException] = []
    waiting = [] if error is None else [error.__cause__, error.__context__]
    while waiting:
        one = waiting.pop(0)
        if one is not None and one not in found:
            found.append(one)
            waiting += [one.__cause__, one.__context__]
    return found


def _is_ours(error: BaseException) -> bool:
    """Return whether its words are in this repository: a `raise` of bfpo or of a test raised it."""
    trace = error.__traceback__
    if trace is None or isinstance(error, BfpoError):
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return (
        not OURS.isdisjoint(Path(code.co_filename).parents)
        and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    )


class Messages:
    """The plugin of pytest that knows the running test and holds the golden file."""

    def __init__(self, update: bool) -> None:
        self.update = update
        self.entries: dict[str, list[str]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
        self.base: Path | None = None
        self.item: pytest.Item | None = None
        self.seen: list[str] = []
        self.new: dict[str, list[str]] = {}
        self.collected: set[str] = set()

    def normalised(self, text: str) -> str:
        folders = [(sys.prefix, "<python>"), (str(ROOT), "<repo>")]
        if self.base is not None:
            own = getattr(self.item, "funcargs", {}).get("tmp_path")
            folders = [(str(own), "<tmp>")] * (own is not None) + [(str(self.base), "<base>"), *folders]
        for folder, name in folders:
            text = text.replace(folder, name)
        text = re.sub(r"<base>/([\w-]*?)\d+(?=/|\W|$)", r"<tmp>/\1", text)
        for pattern, name in VARIES:
            text = re.sub(pattern, name, text)
        return text.encode("utf-8", "backslashreplace").decode()

    def compare(self, text: str) -> None:
        __tracebackhide__ = True
        assert self.item is not None, "texts are compared within a test only"
        test, number = self.item.nodeid, len(self.seen)
        self.seen.append(text)
        if self.update:
            return
        known = self.entries.get(test, [])
        record = f"If it is right, record it: {HOW} '{test}'"
        if number >= len(known):
            pytest.fail(f"text {number + 1} of this test is not in {GOLDEN.name}:\n  now: {text}\n{record}")
        if known[number] != text:
            pytest.fail(f"text {number + 1} of this test has changed:\n  was: {known[number]}\n  now: {text}\n{record}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.item, self.seen = item, []
        self.base = item.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        result = yield
        if self.update:
            self.new[item.nodeid] = self.seen
        elif len(self.seen) < len(self.entries.get(item.nodeid, [])):
            gone = self.entries[item.nodeid][len(self.seen) :]
            pytest.fail(f"{GOLDEN.name} holds texts that did not come: {gone}\nRecord: {HOW} '{item.nodeid}'")
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not any("::" in str(arg) for arg in config.args) and not config.option.keyword:
            self.collected = {item.nodeid for item in items}

    def pytest_sessionfinish(self) -> None:
        if not self.update:
            return
        whole = {test.partition("::")[0] for test in self.collected}
        with GOLDEN.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # with -n each process adds what its own tests gave
            entries = json.load(file) | self.new
            for test in entries.keys() - self.collected:
                if (name := test.partition("::")[0]) in whole or not (ROOT / name).exists():
                    del entries[test]
            entries = {test: texts for test, texts in entries.items() if texts}
            file.seek(0)
            file.truncate()
            file.write(json.dumps(entries, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


_plugin: list[Messages] = []


def start(config: pytest.Config) -> None:
    """Register the plugin, called by `conftest.py`."""
    _plugin[:] = [Messages(config.getoption("--update-messages"))]
    config.pluginmanager.register(_plugin[0], "messages")


def _compare(text: str, keys: tuple[str | None, ...], mask: str | None) -> None:
    __tracebackhide__ = True
    for key in keys:
        assert key is None or _names(text, key), f"{key} is not named in: {text}"
    text = _plugin[0].normalised(text)
    _plugin[0].compare(re.sub(mask, "<...>", text) if mask else text)
