"""The prompts that a model was trained on, as hashes in its run folder, those of its start among them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from io import BytesIO

import numpy as np

from bfpo.core.errors import RunError
from bfpo.core.provenance import RunFile, run_of_model
from bfpo.core.records import load
from bfpo.core.schema import Prompt
from bfpo.data.load import Hashes, merged_hashes
from bfpo.data.split import prompt_hashes
from bfpo.runs.folder import RunFolder

__all__ = ["NO_RECORD", "asked_in_training", "has_no_record", "record_prompts", "trained_prompts"]

logger = logging.getLogger(__name__)

FILE = "trained_on.npy"
NO_RECORD = "%s: its run does not record the prompts that it was trained on: they are not known"


def record_prompts(folder: RunFolder, starts: Iterable[str | None], hashes: Iterable[Hashes]) -> None:
    """Write `trained_on.npy`: the hashes of the prompts of this training and of those of the models it starts from.

    A warning says if a start has a run folder without such a file.
    """
    if not folder.is_writer or (folder.resumed and folder.file(FILE).exists()):
        return
    known = list(hashes)
    for start in filter(None, starts):
        if has_no_record(start):
            logger.warning(NO_RECORD, start)
        elif (found := trained_prompts(start)) is not None:
            known.append(found)
    content = BytesIO()
    np.save(content, merged_hashes(known), allow_pickle=False)
    folder.write_bytes(FILE, content.getvalue())


def trained_prompts(model: str) -> Hashes | None:
    """Return the hashes that a model's run folder records, ascending; `None` without one.

    Raises `RunError` for a file that cannot be read.
    """
    run = run_of_model(model)
    if run is None or not (run / FILE).is_file():
        return None
    try:
        found: Hashes = np.load(run / FILE, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{run / FILE}: cannot be read ({error}); without it the prompts are not known") from error
    return found


def has_no_record(model: str) -> bool:
    """Return whether a model is in the folder of a training that does not record its prompts, as before bfpo did."""
    run = run_of_model(model)
    if run is None or (run / FILE).is_file():
        return False
    return load(RunFile, run / "run.json", []).stage in ("train", "sft", "interpolate")


def asked_in_training(prompt: Prompt, hashes: Hashes) -> bool:
    """Return whether all that the user says in a prompt is, normalised, a prompt of the training or its first turn."""
    (said,) = np.frombuffer(prompt_hashes(prompt.messages)[8:], "<u8")
    place = int(np.searchsorted(hashes, said))
    return place < len(hashes) and bool(hashes[place] == said)
