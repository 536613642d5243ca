"""WORKER: the tests marked `gpu`, run by pytest in this process."""

from __future__ import annotations

from typing import Any

from benchmarks.process import ROOT, worker
from bfpo.core.errors import RunError

TESTS = ("tests/policy/test_kernels.py", "tests/policy/test_attention.py")


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Return the tests by outcome, with the first line of each failure; `small`: those that a CPU can run.

    Raises `RunError` where pytest cannot run them, as without a package that they import.
    """
    import pytest

    class Outcomes:
        def __init__(self) -> None:
            self.found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

        def pytest_runtest_logreport(self, report: Any) -> None:
            name = report.nodeid.rpartition("::")[2]
            if report.when == "call" or report.outcome != "passed":
                said = "" if report.outcome != "failed" else f": {_cause(report)}"
                self.found[report.outcome].append(name + said)

    outcomes = Outcomes()
    files = [str(ROOT / name) for name in (TESTS[:1] if values["small"] else TESTS)]
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RunError(f"pytest ended with exit code {int(code)} before it had run the tests; its output is above")
    return {**outcomes.found, "exit_code": int(code)}


def _cause(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr).strip().splitlines()[0][:200]


if __name__ == "__main__":
    worker(measure)
