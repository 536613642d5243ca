"""The golden file of messages: it has no entry without a test, and what it must find it finds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml

from bfpo.core.errors import ConfigError, DataError
from messages import GOLDEN, ROOT, Messages, says, without_quoted

ENTRIES = json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_file_is_as_it_would_be_written_and_every_entry_has_its_test() -> None:
    assert (
        GOLDEN.read_text(encoding="utf-8") == json.dumps(ENTRIES, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )
    for test, texts in ENTRIES.items():
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), test
        assert texts, test


def running(test: str, *texts: str) -> Messages:
    made = Messages(update=False)
    made.item, made.entries = SimpleNamespace(nodeid=test), {test: list(texts)}  # type: ignore[assignment]
    return made


def test_a_text_that_changed_or_is_not_recorded_fails_and_shows_how_to_record_it() -> None:
    made = running("tests/a.py::test_b", "beta: got 0", "seed: got -1")
    made.compare("beta: got 0")
    with pytest.raises(pytest.fail.Exception) as changed:
        made.compare("seed: got -2")
    assert changed.value.msg is not None
    assert "was: seed: got -1\n  now: seed: got -2" in changed.value.msg
    assert "pytest --update-messages 'tests/a.py::test_b'" in changed.value.msg
    with pytest.raises(pytest.fail.Exception, match="text 3 of this test is not in"):
        made.compare("alpha: got inf")


def test_a_text_that_no_longer_comes_fails() -> None:
    made = running("tests/a.py::test_b", "beta: got 0")
    item = SimpleNamespace(nodeid="tests/a.py::test_b", config=SimpleNamespace(_tmp_path_factory=None))
    call = made.pytest_runtest_call(item)  # type: ignore[arg-type]
    item.config._tmp_path_factory = SimpleNamespace(getbasetemp=lambda: ROOT)
    next(call)
    with pytest.raises(pytest.fail.Exception, match="did not come"):
        next(call)


def quoting(cause: Exception) -> BaseException:
    try:
        try:
            raise cause
        except Exception as error:
            raise DataError(f"a.jsonl:1: cannot be read ({error})") from error
    except DataError as error:
        return error


def test_what_others_say_is_left_out_and_what_bfpo_or_a_test_says_is_not() -> None:
    ours = quoting(ValueError("no such kernel"))
    assert without_quoted(str(ours), ours) == "a.jsonl:1: cannot be read (no such kernel)"
    for broken in (lambda: json.loads("{"), lambda: yaml.safe_load("{"), lambda: open("/none/a")):  # noqa: PTH123, SIM115
        try:
            broken()
        except Exception as cause:
            error = ConfigError(f"a.jsonl:1: cannot be read ({cause})")
            error.__cause__ = cause
            assert without_quoted(str(error), error) == "a.jsonl:1: cannot be read (<quoted error>)"


def test_the_log_must_name_the_key(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AssertionError, match="nothing that bfpo logged names buffer"):
        says(caplog, "buffer")
