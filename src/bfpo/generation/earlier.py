"""What an earlier run of `bfpo generate` made that one of the same model and settings need not make again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bfpo.core.errors import ConfigError, DataError, RunError
from bfpo.core.files import file_digest
from bfpo.core.provenance import RunFile, content_digest, weights_digest
from bfpo.core.records import load
from bfpo.core.schema import Completion
from bfpo.data.completion_layouts import plain_completion
from bfpo.data.files import iter_rows, made_or_error
from bfpo.data.read import COMPLETIONS, RAW
from bfpo.generation.settings import HOW_ASKED
from bfpo.policy.precision import decoding_dtype

__all__ = ["CHAT_TEMPLATE", "COMPLETIONS", "RAW", "Earlier", "differences", "read_earlier"]

CHAT_TEMPLATE = "chat_template"  # the file's name among the data of a run

_IGNORED = frozenset(
    {
        *("prompts", "columns", "bad_rows", "limit", "split", "long_prompts", "max_prompt_length", "num_completions"),
        *("batch_size", "threads", "executor", "reuse"),
        *HOW_ASKED,
    }
)
"""Keys that select the prompts, whose answers are compared one by one, or that change no answer."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """The completions of an earlier run by id, as the model wrote them; none, if `differs` names keys."""

    completions: Mapping[str, Completion]
    differs: tuple[str, ...] = ()


def differences(run: RunFile, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys in which a run differs from a resolved config, except those of the prompts, and `weights`.

    Of a chat template, the content of its file is compared too.
    """
    before, now = _comparable(run.config), _comparable(config)
    # A run from before a setting existed has not got it.
    found = {key for key in before.keys() | now.keys() if (before.get(key) or None) != (now.get(key) or None)}
    template, rendered = config.get(CHAT_TEMPLATE), run.data.get(CHAT_TEMPLATE, {})
    if template is not None and rendered and file_digest(template) not in map(content_digest, rendered.values()):
        found.add(CHAT_TEMPLATE)
    wrote = run.weights.get(str(before.get("model")))  # not known of a run of before, or of a model of the hub
    return (*sorted(found), *(() if wrote in (None, weights_digest(config["model"])) else ("weights",)))


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in _IGNORED}
    return {**kept, **({"dtype": decoding_dtype(kept["dtype"])[0]} if kept.get("dtype") else {})}


def read_earlier(folder: Path, config: Mapping[str, Any]) -> Earlier:
    """Return what an earlier run has for a resolved config; raises `ConfigError` if no such run has finished."""
    try:
        run = load(RunFile, folder / "run.json")
    except (OSError, RunError) as error:
        needed = f"needed: the folder of a run of bfpo generate ({error})"
        raise ConfigError(f"reuse: got {str(folder)!r}; {needed}") from None
    if (run.stage, run.status) != ("generate", "finished"):
        raise ConfigError(
            f"reuse: got {str(folder)!r}, a run of bfpo {run.stage} that is {run.status}; needed: a finished run of "
            "bfpo generate (go on with an unfinished one by --resume)"
        )
    if differs := differences(run, config):
        return Earlier({}, differs)
    made = folder / COMPLETIONS
    rows = made_or_error(made, iter_rows(made), lambda row: plain_completion(row.columns, allow_empty=True))
    raw: dict[str, str] = {}
    judged = (config.get("thinking") or {}).get("judged")  # a text then has its thoughts already
    if not judged and (folder / RAW).exists():
        raw = {str(row.columns["id"]): str(row.columns["text"]) for row in iter_rows(folder / RAW)}
    # Thoughts that were cut out of a text are in it again; those that a server gave apart stay apart.
    whole = {row.id: replace(row, text=raw[row.id], reasoning="") if row.id in raw else row for row in rows}
    if unknown := raw.keys() - whole.keys():
        raise DataError.at(folder / RAW, None, f"has ids that {COMPLETIONS} has not, such as {min(unknown)!r}")
    return Earlier(whole)
