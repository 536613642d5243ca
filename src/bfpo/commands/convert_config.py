"""COMMAND `convert-config`: a config of TRL, axolotl or LLaMA-Factory as one of `bfpo train` or `bfpo sft`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bfpo.config.converted import LIBRARIES, Converted, Line, changes_nothing, convert, default_of
from bfpo.core.console import Outcome, one_line, show
from bfpo.core.errors import ConfigError, RunError
from bfpo.core.files import write_text_whole
from bfpo.core.secrets import hide_in_values
from bfpo.core.yaml_text import dump_yaml, read_yaml

__all__ = ["render", "run"]


def run(path: Path, out: Path | None) -> Outcome:
    """Show the config, or write it to `out`, and list what was not carried over.

    Raises `ConfigError` for a file that cannot be read or converted and for an `out` that exists, `RunError` if it
    cannot be written.
    """
    values, _ = read_yaml(path)
    found = convert(values, path)
    _place_rest(found)
    text = render(found, path)
    if out is None:
        show(text.rstrip("\n"))
    else:
        if out.exists():
            raise ConfigError(f"--out: {out} exists; name a new file")
        try:
            write_text_whole(out, text)
        except OSError as error:
            raise RunError(f"{out}: cannot be written ({error.strerror}); check --out and permissions") from error
        show("\n".join([f"{out}: {len(found.lines)} keys of bfpo {found.stage}", *_remarks(found)]))
    return Outcome(
        0,
        {
            "library": LIBRARIES[found.library],
            "stage": found.stage,
            "config": {line.key: line.value for line in found.lines},
            "not_carried_over": dict(sorted(found.lost.items())),
            "to_do": found.to_do,
            **({} if out is None else {"out": str(out)}),
        },
    )


def _place_rest(found: Converted) -> None:
    """Move fields of `TrainingArguments` to `trainer_args`, and all other keys to `lost`, with the reason."""
    if not found.rest:
        return
    from transformers import TrainingArguments  # takes seconds

    from bfpo.training.trainer_args import OWN, REFUSED, check_trainer_args

    fields = {one.name: one for one in dataclasses.fields(TrainingArguments)}
    taken: dict[str, Any] = {}
    for key, value in found.rest.items():
        default = getattr(fields[key].default, "value", fields[key].default) if key in fields else default_of(key)
        if changes_nothing(value, None if default is dataclasses.MISSING else default):
            continue
        if key not in fields:
            found.lost[key] = "no counterpart"
        elif key in OWN:
            same = f"not a key of {LIBRARIES[found.library]}; {key} is one here"
            found.lost[key] = same if OWN[key] == key else f"{OWN[key]} in its place"
        elif key in REFUSED:
            found.lost[key] = REFUSED[key]
        else:
            try:
                check_trainer_args({key: value}, preference=found.stage == "train")
                taken[key] = value
            except ConfigError as error:
                found.lost[key] = str(error).partition(": ")[2].removeprefix("not allowed, ")
    if taken:
        found.lines.append(Line("trainer_args", taken, "fields of TrainingArguments"))


def render(found: Converted, path: Path) -> str:
    """Return the config as YAML, each key with its source, and below it what is left to do."""
    head = [
        f"# From {one_line(path.name)}, a config of {LIBRARIES[found.library]}, by bfpo convert-config.",
        f"# bfpo {found.stage} --config FILE --dry-run   shows what it would do",
    ]
    if found.stage == "train":
        head.append(
            "# Every pair needs chosen_is_safe and rejected_is_safe: bfpo label makes them; see data.unknown_label."
        )
    lines = []
    for line in found.lines:
        first, *rest = dump_yaml({line.key: hide_in_values(line.value)}).rstrip("\n").split("\n")
        lines += [f"{first}  # {one_line(line.comment)}" if line.comment else first, *rest]
    return "\n".join([*head, *lines, *(f"# {text}" for text in _remarks(found))]) + "\n"


def _remarks(found: Converted) -> list[str]:
    lost = [f"  {key}: {one_line(why)}" for key, why in sorted(found.lost.items())]
    to_do = [f"  {one_line(text)}" for text in found.to_do]
    return [
        *(["to do before it runs:", *to_do] if to_do else []),
        *(["not carried over:", *lost] if lost else ["everything was carried over"]),
    ]
