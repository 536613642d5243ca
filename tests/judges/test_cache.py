from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bfpo.core.errors import DiskFullError, RunError
from bfpo.core.schema import Comparison, Completion, Message, Verdict
from bfpo.judges.cache import OpinionCache, comparison_key, verdict_key
from messages import raises, says

ONE = Completion("1", (Message("user", "q"),), "a")
TWO = Completion("2", (Message("user", "q"),), "b")
VERDICT = Verdict(
    "1", "guard", "unsafe", helpful=0.25, refused=False, reason="S1 é", p_safe=0.125, raw="unsafe\nS1\ud800"
)


def test_what_is_kept_comes_back_for_another_id_and_another_name(tmp_path: Path) -> None:
    with OpinionCache(tmp_path / "new" / "folder") as cache:
        cache.keep({"v": VERDICT, "c": Comparison("1", "2", "ranker", 0.75, "why", "A")})
    with OpinionCache(tmp_path / "new" / "folder") as cache:
        assert cache.find_verdicts(["v", "none"], "other") == {"v": replace(VERDICT, completion_id="", judge="other")}
        assert cache.find_comparisons(["c"], "mine") == {"c": Comparison("", "", "mine", 0.75, "why", "A")}
        many = {f"k{n}": VERDICT for n in range(1203)}
        cache.keep(many)
        assert cache.find_verdicts(many, "guard").keys() == many.keys()
        assert cache.find_verdicts([], "guard") == {}


def test_keys_tell_apart_what_an_opinion_depends_on_and_nothing_else() -> None:
    system = (Message("system", "q"),)
    joined = (Message("user", "q\na"),)
    keys = [
        verdict_key(ONE, "judge-1"),
        verdict_key(TWO, "judge-1"),
        verdict_key(ONE, "judge-2"),
        verdict_key(ONE, "judge-1", vote=1),
        verdict_key(replace(ONE, prompt=system), "judge-1"),
        verdict_key(replace(ONE, prompt=joined, text=""), "judge-1"),
        verdict_key(replace(ONE, prompt=(*ONE.prompt, *ONE.prompt)), "judge-1"),
        comparison_key(ONE, TWO, "judge-1"),
        comparison_key(TWO, ONE, "judge-1"),
    ]
    assert len(set(keys)) == len(keys)
    assert verdict_key(replace(ONE, id="x", model="m", kind="k", finished=False), "judge-1") == keys[0]


def test_several_processes_share_a_cache(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from bfpo.judges.cache import OpinionCache\n"
        "from bfpo.core.schema import Verdict\n"
        "with OpinionCache(sys.argv[1]) as cache:\n"
        "    for n in range(40):\n"
        "        cache.keep({f'{sys.argv[2]}-{n}': Verdict('', 'j', 'safe'), 'same': Verdict('', 'j', 'safe')})\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    with OpinionCache(tmp_path) as cache:
        keys = [*(f"{worker}-{n}" for worker in range(3) for n in range(40)), "same"]
        assert cache.find_verdicts(keys, "j").keys() == set(keys)


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "opinions.sqlite").write_bytes(b"not a database, by far; " * 100)
    with caplog.at_level(logging.WARNING, "bfpo"), OpinionCache(tmp_path) as cache:
        cache.keep({"v": VERDICT})
        assert cache.find_verdicts(["v"], "j")
    says(caplog, "opinions.sqlite", mask=r"(?<=\().*(?=\))|\d+(?=\.bad)")
    assert len(list(tmp_path.glob("*.bad"))) == 1


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    with OpinionCache(tmp_path) as cache:
        with raises(RunError):
            cache.keep({"one": VERDICT, object(): VERDICT})  # type: ignore[dict-item]
        assert cache.find_verdicts(["one"], "j") == {}
        cache.keep({"one": VERDICT})
        cache.keep({"one": replace(VERDICT, label="safe")})
        assert cache.find_verdicts(["one"], "j")["one"].label == "unsafe"


def test_a_folder_that_cannot_be_used_and_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises(RunError, "label_cache"):
        OpinionCache(tmp_path / "file")
    with OpinionCache(tmp_path) as cache:
        pages = cache._connection.execute("PRAGMA page_count").fetchone()[0]
        cache._connection.execute(f"PRAGMA max_page_count = {pages}")
        with raises(DiskFullError, "--resume") as error:
            cache.keep({f"k{n}": VERDICT for n in range(1000)})
        assert error.value.exit_code == 1
        assert isinstance(error.value.__cause__, sqlite3.OperationalError)
