"""What is wrong with a run of suites before anything is asked: told by the run and by its preview alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bfpo.config import EvaluateConfig
from bfpo.core.errors import ConfigError
from bfpo.core.inputs import check_files
from bfpo.judges.judges import check_judge, check_ranker
from bfpo.suites.catalogue import Suite, own_suites
from bfpo.suites.files import check_own_files

__all__ = ["check_given"]


def check_given(config: EvaluateConfig, suites: Sequence[Suite]) -> None:
    """Raise `ConfigError` for a judge of no role or suite or a run to reuse that is none, before anything is asked.

    Raises `SettingError` for a judge or a ranker of no known format, `DataError` for files that are not there.
    """
    assert config.suites is not None
    roles = {suite.judge.role for suite in suites if suite.judge is not None}
    allowed = sorted({"refusal", *roles - {"ranker"}}) + [suite.name for suite in suites]
    for name, judge in config.suites.judges.items():
        if name not in allowed:
            raise ConfigError(f"suites.judges.{name}: no role or suite of this run; allowed: {', '.join(allowed)}")
        check_judge(judge.format)
    if config.suites.ranker is not None:
        check_ranker(config.suites.ranker.format)
    check_own_files(own_suites(config.suites.use), config.suites.folders)
    if config.data is not None:
        check_files(config.data.files)
    if config.suites.reuse is not None and not Path(config.suites.reuse).is_dir():
        raise ConfigError(f"suites.reuse: got {config.suites.reuse!r}; needed: the folder of an earlier run")
