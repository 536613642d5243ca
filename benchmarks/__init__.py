"""Benchmarks: whole training loops against TRL, how a step scales, and what comes before the first step."""

import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("bfpo") is None:  # not installed: the sources of this checkout, for workers too
    _SOURCES = str(Path(__file__).resolve().parents[1] / "src")
    sys.path.append(_SOURCES)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), _SOURCES]))
