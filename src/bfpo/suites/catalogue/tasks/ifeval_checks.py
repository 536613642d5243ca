"""lm-eval's own checks of IFEval, the same for the same answer, and without a number where NLTK's data are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from langdetect import DetectorFactory
from lm_eval.tasks.ifeval.utils import process_results as lm_eval_checks

__all__ = ["process_results"]

DetectorFactory.seed = 0  # else langdetect draws anew at every call, and an answer may pass only sometimes
_PROBE = "Some words. And MORE of them."


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether all instructions of a prompt were kept, strictly: 1, 0, or NaN where a check cannot be run.

    Counting sentences and capital words needs NLTK's `punkt_tab`, which lm-eval downloads. Whether a prompt is scored
    must not depend on the answer (lm-eval checks no empty one), so a text that is never empty is checked first.
    """
    try:
        lm_eval_checks(doc, [_PROBE])
        return {"prompt_level_strict_acc": float(lm_eval_checks(doc, results)["prompt_level_strict_acc"])}
    except LookupError as error:  # of NLTK, for want of data
        if isinstance(error, (KeyError, IndexError)):  # of a document in another form
            raise
        return {"prompt_level_strict_acc": math.nan}
