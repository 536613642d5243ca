"""STAGE `interpolate`: weight averages of two models, to trade helpfulness against safety without training."""

from __future__ import annotations

import logging
import shutil

from bfpo.config import InterpolateConfig
from bfpo.core.progress import CountProgress
from bfpo.experiments.points import blend_name
from bfpo.policy.blend import BlendSource, blend_weights, open_source, require_same_kind
from bfpo.runs.folder import RunFolder
from bfpo.scores.records import Blend, InterpolateFile
from bfpo.training.trained_on import record_prompts

__all__ = ["preview", "run"]

logger = logging.getLogger(__name__)


def run(config: InterpolateConfig, folder: RunFolder) -> None:
    """Write a model per weight (`models/weight-0.25`, ...) and `models.json`; existing models are kept.

    Each model is written atomically. Raises `ModelError` for two models that cannot be averaged.
    """
    first, second = _sources(config)
    folder.add_data("models", [*map(str, first.files), *map(str, second.files)])
    record_prompts(folder, (config.first, config.second), ())
    models = folder.folder("models")
    missing = [weight for weight in config.weights if not (models / blend_name(weight)).exists()]
    with CountProgress("tensors", len(missing) * len(first.tensors), logger) as progress:
        for weight in missing:
            part = models / f".{blend_name(weight)}.part"
            shutil.rmtree(part, ignore_errors=True)  # left by a killed run
            try:
                blend_weights(first, second, weight, part, advance=progress.advance)
                part.rename(models / blend_name(weight))
            except OSError as error:
                shutil.rmtree(part, ignore_errors=True)
                raise folder.write_error(part, error) from error
    blends = [Blend(weight, str(models / blend_name(weight))) for weight in config.weights]
    folder.write_json("models.json", InterpolateFile(config.first, config.second, blends))
    folder.write_card(
        "Models between two", {"Models": {f"{blend.weight:g} of the second": blend.model for blend in blends}}
    )


def preview(config: InterpolateConfig) -> list[str]:
    """Return what would be written; checks both models."""
    first, second = _sources(config)
    size = sum(file.stat().st_size for file in first.files)
    return [
        f"{len(first.tensors)} tensors, {size / 1e6:,.1f} MB a model: {first.folder} and {second.folder}",
        *(f"models/{blend_name(weight)}" for weight in config.weights),
    ]


def _sources(config: InterpolateConfig) -> tuple[BlendSource, BlendSource]:
    first, second = open_source(config.first, name="first"), open_source(config.second, name="second")
    require_same_kind(first, second)
    return first, second
