"""WORKER: a block of rows -> their pairs as Arrow columns, and what choosing needs to know of each, as numbers.

Runs in several processes; nothing here depends on which rows came before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow

from bfpo.core.schema import Completion, Pair, Prompt
from bfpo.data.rejects import Reject
from bfpo.data.split import normalised_prompt
from bfpo.preparation.contamination import EvaluationPrompts, Hit
from bfpo.preparation.reading import RowReader
from bfpo.preparation.sketches import SketchSettings, bands_of, ngrams, sketches_of

__all__ = ["KEYS", "SCHEMA", "Block", "BlockReader", "RawBlock", "RowHit", "make_reader"]

_MESSAGE = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("prompt", pyarrow.list_(_MESSAGE)),
        ("chosen", pyarrow.string()),  # of a completion: its text, and its label below
        ("rejected", pyarrow.string()),  # of a completion: null
        ("chosen_is_safe", pyarrow.float64()),
        ("rejected_is_safe", pyarrow.float64()),
        ("source", pyarrow.string()),
        ("finished", pyarrow.bool_()),
    ]
)
KEYS = np.dtype(
    [
        ("id", "<u8"),
        ("id_is_given", "?"),
        ("prompt", "<u8"),  # of the normalised prompt
        ("content", "<u8"),  # of the whole row, labels too
        ("completions", "<u8", 2),  # of the prompt with each completion, to the letter
        ("labels", "<f4", 2),  # NaN = unknown
        ("contaminated", "?"),
        ("chars", "<u4", 3),  # of prompt, chosen, rejected
        ("words", "<u4", 3),
        ("tokens", "<u4", 3),
    ]
)
"""What is kept of each row beside its text: 64-bit hashes, labels and lengths."""


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Some rows of one file, as they were read: line and columns."""

    reader: RowReader
    rows: list[tuple[int, Mapping[str, object]]]


@dataclass(frozen=True, slots=True)
class RowHit:
    """A row that asks an evaluation prompt."""

    row: int
    line: int
    row_id: str
    hits: list[Hit]


@dataclass(frozen=True, slots=True)
class Block:
    """The usable rows of a raw block, in its order; `keys` (N,) of `KEYS`, `bands` (N, B), `sketches` (N, K)."""

    file: str
    batch: Any
    keys: npt.NDArray[Any]
    bands: npt.NDArray[np.uint32]
    sketches: npt.NDArray[np.uint8]
    lines: list[int]
    rejects: list[Reject] = field(default_factory=list)
    hits: list[RowHit] = field(default_factory=list)


class BlockReader:
    """Reads blocks; made once in each process. `tokenizer_file`: a `tokenizer.json` to count tokens with."""

    def __init__(
        self, evaluation: EvaluationPrompts, sketch: SketchSettings | None, tokenizer_file: str | None = None
    ) -> None:
        self._evaluation = evaluation
        self._sketch = sketch
        self._tokenizer: Any = None
        if tokenizer_file is not None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(tokenizer_file)

    def __call__(self, raw: RawBlock) -> Block:
        """Return what the rows are."""
        items: list[Pair | Completion] = []
        lines, given = [], []
        rejects = []
        for line, columns in raw.rows:
            item = raw.reader.read(line, columns)
            if isinstance(item, Reject):
                rejects.append(item)
            else:
                items.append(item)
                lines.append(line)
                given.append(columns.get("id") not in (None, ""))
        # Unconditional text has no prompt to be split by: it stands for itself.
        texts = [normalised_prompt(item.prompt) or "\n".join(_texts(item)) for item in items]
        batch = _batch_of(items)
        keys = _keys_of(items, texts, given)
        if self._tokenizer is not None and items:
            keys["tokens"] = self._count_tokens(items)
        grams, bands, low_bytes = self._sketches(texts)
        hits = self._hits(items, texts, grams, bands, lines) if len(self._evaluation) else []
        keys["contaminated"][[hit.row for hit in hits]] = True
        return Block(raw.reader.file, batch, keys, bands, low_bytes, lines, rejects, hits)

    def _sketches(
        self, texts: Sequence[str]
    ) -> tuple[list[npt.NDArray[np.uint64]], npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        if self._sketch is None or not texts:
            settings = self._sketch
            widths = (0, 0) if settings is None else (settings.num_bands, settings.permutations)
            return [], np.zeros((len(texts), widths[0]), np.uint32), np.zeros((len(texts), widths[1]), np.uint8)
        grams = ngrams(texts, self._sketch.characters)
        sketches = sketches_of(grams, self._sketch)
        return grams, bands_of(sketches, self._sketch), (sketches & 0xFF).astype(np.uint8)

    def _hits(
        self,
        items: Sequence[Pair | Completion],
        texts: Sequence[str],
        grams: Sequence[npt.NDArray[np.uint64]],
        bands: npt.NDArray[np.uint32],
        lines: Sequence[int],
    ) -> list[RowHit]:
        found = []
        for row, (item, text) in enumerate(zip(items, texts, strict=True)):
            hits = self._evaluation.find(item.prompt, text, grams[row] if grams else None, bands[row])
            if hits:
                found.append(RowHit(row, lines[row], item.id, hits))
        return found

    def _count_tokens(self, items: Sequence[Pair | Completion]) -> npt.NDArray[np.uint32]:
        texts = [text for item in items for text in ("\n".join(turn.content for turn in item.prompt), *_texts(item))]
        counts = [len(one.ids) for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return np.array(counts, np.uint32).reshape(-1, 3)


def make_reader(
    suites: dict[str, Sequence[Prompt]],
    *,
    contained_words: int,
    sketch: SketchSettings | None,
    tokenizer_file: str | None,
) -> BlockReader:
    """Return what reads blocks, in whichever process."""
    evaluation = EvaluationPrompts(suites, contained_words=contained_words, sketch=sketch)
    return BlockReader(evaluation, sketch, tokenizer_file)


def _texts(item: Pair | Completion) -> tuple[str, str]:
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item.text, "")


def _labels_of(item: Pair | Completion) -> tuple[float | None, float | None]:
    return (item.chosen_is_safe, item.rejected_is_safe) if isinstance(item, Pair) else (item.is_safe, None)


def _batch_of(items: Sequence[Pair | Completion]) -> Any:
    rows = [
        (
            item.id,
            [{"role": message.role, "content": message.content} for message in item.prompt],
            *_completions_of(item),
        )
        for item in items
    ]
    columns = zip(*rows, strict=True) if rows else ((),) * len(SCHEMA)
    arrays = [pyarrow.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)]
    return pyarrow.record_batch(arrays, schema=SCHEMA)


def _completions_of(item: Pair | Completion) -> tuple[object, ...]:
    if isinstance(item, Pair):
        return item.chosen, item.rejected, item.chosen_is_safe, item.rejected_is_safe, item.source, True
    return item.text, None, item.is_safe, None, item.kind, item.finished


def _keys_of(items: Sequence[Pair | Completion], texts: Sequence[str], given: Sequence[bool]) -> npt.NDArray[Any]:
    keys = np.zeros(len(items), KEYS)
    for row, (item, text) in enumerate(zip(items, texts, strict=True)):
        first, second = _texts(item)
        prompt = _digest(*(part for message in item.prompt for part in (message.role, message.content)))
        completions = (_continued(prompt, first), _continued(prompt, second))
        labels = _labels_of(item)
        keys[row] = (
            _hash(item.id),
            given[row],
            _hash(text),
            _hash(*map(repr, (*completions, *labels))),
            completions,
            [np.nan if label is None else label for label in labels],
            False,
            [sum(len(turn.content) for turn in item.prompt), len(first), len(second)],
            [sum(len(turn.content.split()) for turn in item.prompt), len(first.split()), len(second.split())],
            (0, 0, 0),
        )
    return keys


def _digest(*texts: str) -> Any:
    # With their lengths, so that no two lists of texts are the same bytes.
    return blake2b("".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "surrogatepass"), digest_size=8)


def _continued(digest: Any, text: str) -> int:
    digest = digest.copy()
    digest.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")


def _hash(*texts: str) -> int:
    return int.from_bytes(_digest(*texts).digest(), "little")
