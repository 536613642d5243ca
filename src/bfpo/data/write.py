"""Pairs and completions to JSON lines in our columns, whole or not at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from bfpo.core.errors import SettingError
from bfpo.core.files import write_bytes_whole
from bfpo.core.schema import Completion, Message, Pair, Prompt, from_canonical
from bfpo.data.fields import FINISHED

__all__ = ["completion_row", "pair_row", "prompt_row", "write_completions", "write_pairs"]


def write_pairs(path: Path, pairs: Iterable[Pair]) -> int:
    """Write pairs as JSON lines in our columns and return their number; `.gz` compresses.

    The file appears under its name only when it is complete. Raises `SettingError` for another suffix.
    """
    return _write_rows(Path(path), map(pair_row, pairs))


def write_completions(path: Path, completions: Iterable[Completion]) -> int:
    """Write completions as JSON lines and return their number, as `write_pairs` does."""
    return _write_rows(Path(path), map(completion_row, completions))


def pair_row(pair: Pair) -> dict[str, object]:
    """Return the row that `write_pairs` writes; a label of exactly 0 or 1 is written as false or true."""
    return {
        "id": pair.id,
        "prompt": _turns(pair.prompt),
        "chosen": _answer(pair.chosen, pair.chosen_extra),
        "rejected": _answer(pair.rejected, pair.rejected_extra),
        "chosen_is_safe": _label(pair.chosen_is_safe),
        "rejected_is_safe": _label(pair.rejected_is_safe),
        "source": pair.source,
        **_tools(pair),
        **({"category": pair.category} if pair.category else {}),
        **{name: False for name in FINISHED if not getattr(pair, name)},
    }


def completion_row(completion: Completion) -> dict[str, object]:
    """Return the row that `write_completions` writes; label and thoughts are written if there are any."""
    row: dict[str, object] = {
        "id": completion.id,
        "prompt": _turns(completion.prompt),
        "text": _answer(completion.text, completion.extra),
        "model": completion.model,
        "kind": completion.kind,
        "finished": completion.finished,
        **_tools(completion),
    }
    row |= {name: value for name in ("reasoning", "blocked", "category") if (value := getattr(completion, name))}
    return row if completion.is_safe is None else {**row, "is_safe": _label(completion.is_safe)}


def prompt_row(prompt: Prompt) -> dict[str, object]:
    """Return the row of a prompt in our columns."""
    category = {"category": prompt.category} if prompt.category else {}
    return {"id": prompt.id, "prompt": _turns(prompt.messages), "kind": prompt.kind, **_tools(prompt), **category}


def _turns(messages: Iterable[Message]) -> list[dict[str, object]]:
    return [message.as_dict() for message in messages]


def _answer(text: str, extra: str) -> object:
    """Return a completion as text, or as a message where it holds more."""
    return Message("assistant", text, extra).as_dict() if extra else text


def _tools(item: Pair | Completion | Prompt) -> dict[str, object]:
    return {"tools": from_canonical(item.tools)} if item.tools else {}


def _label(value: float | None) -> float | bool | None:
    return bool(value) if value in (0.0, 1.0) else value


def _write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    name = path.name.lower()
    if not name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        raise SettingError(f"got {path.name}; files are written as .jsonl, .json, .jsonl.gz or .json.gz")
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    content = b"".join(lines)
    # Without a time stamp, the same rows give the same file and the same hash.
    write_bytes_whole(path, gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return len(lines)
