"""lm-eval's checks of IFEval, made deterministic, with NaN if NLTK's data are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import nltk
from langdetect import DetectorFactory

from bfpo.core.offline import offline_variable
from bfpo.data.thinking import split_thought

__all__ = ["process_results"]

_download = nltk.download
if offline_variable() is not None:  # lm-eval downloads data of NLTK when it is imported
    nltk.download = lambda *_, **__: False
try:
    from lm_eval.tasks.ifeval.utils import process_results as lm_eval_checks
finally:
    nltk.download = _download

DetectorFactory.seed = 0  # else the result of langdetect for one answer varies
_PROBE = "Some words. And MORE of them."


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether all instructions of a prompt were followed, strictly: 1, 0, or NaN if a check cannot be run.

    Counting sentences and capital words needs NLTK's `punkt_tab`, which lm-eval downloads unless offline work is asked
    for. Whether a prompt is scored
    must not depend on the answer (lm-eval does not check empty ones), so a fixed text is checked first. Of a text that
    begins with thoughts, the answer behind them is checked.
    """
    answers = [text if (found := split_thought(text)) is None else found.answer for text in results]
    try:
        lm_eval_checks(doc, [_PROBE])
        return {"prompt_level_strict_acc": float(lm_eval_checks(doc, answers)["prompt_level_strict_acc"])}
    except LookupError as error:  # NLTK without its data
        if isinstance(error, (KeyError, IndexError)):  # a document in another format
            raise
        return {"prompt_level_strict_acc": math.nan}
