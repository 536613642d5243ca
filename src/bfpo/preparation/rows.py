"""From the rows of a file to pairs as Arrow columns, with the numbers that selection needs.

`raw_rows` runs in the first process, a `BlockReader` in several: its results do not depend on earlier rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow

from bfpo.config.prepare import NearDuplicatesConfig
from bfpo.core.errors import DataError, first_line
from bfpo.core.schema import Completion, Message, Pair, Prompt
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.fields import FINISHED, ColumnNames
from bfpo.data.files import attempt, first_that_fits, mapped_rows
from bfpo.data.labels import NO_WORDS, LabelWords
from bfpo.data.layouts import AUTO, Layout, check_columns, check_layout, columns_of
from bfpo.data.messages import is_absent
from bfpo.data.notes import FileNotes
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.rejects import EMPTY, LEFT_OUT, Reject, Row, RowError
from bfpo.data.sources import SourceKind
from bfpo.data.split import normalised_prompt
from bfpo.judges.needless import check_kept
from bfpo.preparation.contamination import EvaluationPrompts, Hit, Sketch, without_system
from bfpo.preparation.deep import DeepRefusals
from bfpo.preparation.sketches import bands_and_rows, bands_of, ngrams, sketches_of

__all__ = ["KEYS", "SCHEMA", "Block", "BlockReader", "RawBlock", "RowReader", "kind_of_layout", "raw_rows", "reader_of"]

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
        ("category", pyarrow.string()),  # empty for none
        *((name, pyarrow.bool_()) for name in FINISHED),
    ]
)
KEYS = np.dtype(
    [
        ("id", "<u8"),
        ("id_is_given", "?"),
        ("line", "<u8"),
        ("prompt", "<u8"),  # of the normalised prompt
        ("content", "<u8"),  # of the whole row, labels too
        ("completions", "<u8", 2),  # of the prompt with each completion, exact text
        ("labels", "<f4", 2),  # NaN = unknown
        ("contaminated", "?"),
        ("cut", "?", 2),  # which completions are not finished
        ("chars", "<u4", 3),  # of prompt, chosen, rejected
        ("words", "<u4", 3),
        ("tokens", "<u4", 3),
    ]
)
"""What is kept of each row besides its text: its line, 64-bit hashes, labels and lengths."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt


# ----------------------------------------------------------------------------------------------- rows of a file


def _all_layouts() -> dict[str, Layout[Pair | Completion]]:
    """Return all layouts in the order of `load_completions`: those of completions come first."""
    return {**COMPLETION_LAYOUTS, **PAIR_LAYOUTS}


def _layout(name: str) -> Layout[Any]:
    """Return a layout by its name, without a table of all of them for each row."""
    return COMPLETION_LAYOUTS[name] if name in COMPLETION_LAYOUTS else PAIR_LAYOUTS[name]


def kind_of_layout(name: str) -> SourceKind | None:
    """Return what rows of a layout are, `None` for `"auto"`; raises `SettingError` for a name no layout has."""
    check_layout(name, _all_layouts())
    return None if name == AUTO else "completions" if name in COMPLETION_LAYOUTS else "pairs"


@dataclass(frozen=True, slots=True)
class RowReader:
    """Turns rows of one file into pairs or completions; plain values, so that it can be sent to another process."""

    file: str
    layout: str
    labels: LabelWords = NO_WORDS
    leave_out: tuple[str, ...] = ()
    deep: DeepRefusals | None = None

    @property
    def kind(self) -> SourceKind:
        """What the rows are."""
        return "completions" if self.layout in COMPLETION_LAYOUTS else "pairs"

    def read(self, line: int, columns: Mapping[str, object]) -> Pair | Completion | Reject:
        """Return the item or reject of a row; its id may repeat that of another row."""
        made = attempt(self._make, self.file, Row(line, columns))
        if isinstance(made, Reject) and made.reason == EMPTY and "incoherent" in self.leave_out:
            return replace(made, reason=f"{LEFT_OUT}empty")
        return made

    def _make(self, row: Row) -> Pair | Completion:
        layout = _layout(self.layout)
        columns = self.labels.applied(row.columns, layout.labels) if self.labels else row.columns
        item: Pair | Completion = layout.parse(columns)
        if item.tools or any(message.extra for message in item.prompt) or any(_extras(item)):
            raise RowError("tools", "tools, tool calls and reasoning are not kept by bfpo prepare: train on the file")
        if self.leave_out and isinstance(item, Completion):
            check_kept(self.leave_out)(item)
        return self.deep(item) if self.deep is not None and isinstance(item, Pair) else item

    def columns(self) -> tuple[str, ...]:
        """Return the columns that are read."""
        layout = _layout(self.layout)
        return (*layout.needs, *layout.reads)


def _extras(item: Pair | Completion) -> tuple[str, ...]:
    return (item.chosen_extra, item.rejected_extra) if isinstance(item, Pair) else (item.extra, item.reasoning)


def reader_of(
    file: Path,
    *,
    layout: str,
    columns: ColumnNames,
    kind: SourceKind | None = None,
    labels: LabelWords = NO_WORDS,
    leave_out: Sequence[str] = (),
    deep: DeepRefusals | None = None,
) -> RowReader | None:
    """Return the reader of a file; with `"auto"` the first row that fits a layout (of this kind) decides.

    `None` if no row has columns. Raises `DataError` for a file that cannot be read or fits no layout, `SettingError`
    for a layout or a column of ours that is unknown.
    """
    kind = kind_of_layout(layout) or kind
    known = _all_layouts()
    if layout != AUTO:
        check_columns(columns, columns_of([known[layout]]))
        return RowReader(str(file), layout, labels, tuple(leave_out), deep)
    check_columns(columns, columns_of(known.values()))
    of_kind = [one for name, one in known.items() if kind in (None, kind_of_layout(name))]
    found = first_that_fits(file, mapped_rows(file, columns), of_kind)
    return None if found is None else RowReader(str(file), found.name, labels, tuple(leave_out), deep)


def raw_rows(
    file: Path, columns: ColumnNames, reader: RowReader | None, notes: FileNotes
) -> Iterator[tuple[int, Mapping[str, object]] | Reject]:
    """Yield the rows of a file under our names: line and columns, or a reject if it has none.

    Raises `DataError` as `iter_rows` does.
    """
    for row in mapped_rows(file, columns) if reader is None else notes.rows(file, columns, reader.columns()):
        yield Reject.of(file, row.line, row.bad) if row.bad is not None else (row.line, row.columns)


# ----------------------------------------------------------------------------------------------- blocks of rows


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Some rows of one file, as they were read: line and columns."""

    reader: RowReader
    rows: list[tuple[int, Mapping[str, object]]]


@dataclass(frozen=True, slots=True)
class RowHit:
    """A row that matches an evaluation prompt."""

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
        self,
        suites: Mapping[str, Sequence[Prompt]],
        *,
        near: NearDuplicatesConfig | None,
        contained_words: int,
        tokenizer_file: str | None = None,
    ) -> None:
        self._evaluation = EvaluationPrompts(suites, contained_words=contained_words, near=near)
        self._near = near
        _keep_freed_memory()
        self._tokenizer: Any = None
        if tokenizer_file is not None:
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_file(tokenizer_file)
            except Exception as error:  # tokenizers has no narrower class
                what = f"cannot be read as a tokenizer.json: {first_line(error)}"
                raise DataError.at(tokenizer_file, None, what) from error
            self._tokenizer.no_truncation()  # the file may set both
            self._tokenizer.no_padding()

    def __call__(self, raw: RawBlock) -> Block:
        """Return the usable rows, the rejects and the hits."""
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
                given.append(not is_absent(columns.get("id")))
        # Unconditional text has no prompt, so it is split by the text itself.
        # A row with a harmful beginning stays in the split of its prompt.
        asked = [item.prompt[:-1] if raw.reader.deep else item.prompt for item in items]
        texts = [
            normalised_prompt(prompt) or "\n".join(_texts(item)) for prompt, item in zip(asked, items, strict=True)
        ]
        batch = _batch_of(items)
        keys = _keys_of(items, texts, given)
        keys["line"] = lines
        if self._tokenizer is not None and items:
            keys["tokens"] = self._count_tokens(items)
        # A system message that many rows share would make them all near-duplicates.
        said = [without_system(prompt) for prompt in asked]
        parts = [
            text if some is prompt else normalised_prompt(some)
            for some, prompt, text in zip(said, asked, texts, strict=True)
        ]
        grams, bands, low_bytes = self._sketches(parts)
        sketches = list(zip(grams, bands, strict=False))  # no n-grams without `near_duplicates`
        hits = self._hits(items, said, texts, parts, sketches, lines) if len(self._evaluation) else []
        keys["contaminated"][[hit.row for hit in hits]] = True
        return Block(raw.reader.file, batch, keys, bands, low_bytes, lines, rejects, hits)

    def _sketches(
        self, texts: Sequence[str]
    ) -> tuple[list[npt.NDArray[np.uint64]], npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        if self._near is None or not texts:
            widths = (0, 0) if self._near is None else (bands_and_rows(self._near)[0], self._near.permutations)
            return [], np.zeros((len(texts), widths[0]), np.uint32), np.zeros((len(texts), widths[1]), np.uint8)
        grams = ngrams(texts, self._near.characters)
        sketches = sketches_of(grams, self._near)
        return grams, bands_of(sketches, self._near), (sketches & 0xFF).astype(np.uint8)

    def _hits(
        self,
        items: Sequence[Pair | Completion],
        said: Sequence[Sequence[Message]],
        texts: Sequence[str],
        parts: Sequence[str],
        sketches: Sequence[Sketch],
        lines: Sequence[int],
    ) -> list[RowHit]:
        turns = [
            [normalised_prompt([turn]) for turn in messages if turn.role == "user"] if len(messages) > 1 else []
            for messages in said
        ]
        grams, bands, _ = self._sketches([turn for some in turns for turn in some])
        of_turns = zip(grams, bands, strict=False)  # no n-grams without `near_duplicates`
        found = []
        for row, (item, text, part, own) in enumerate(zip(items, texts, parts, turns, strict=True)):
            near = [*sketches[row : row + 1], *islice(of_turns, len(own))]
            if hits := self._evaluation.find(text, (part, *own), near):
                found.append(RowHit(row, lines[row], item.id, hits))
        return found

    def _count_tokens(self, items: Sequence[Pair | Completion]) -> npt.NDArray[np.uint32]:
        texts = [text for item in items for text in ("\n".join(turn.content for turn in item.prompt), *_texts(item))]
        counts = [len(one.ids) for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return np.array(counts, np.uint32).reshape(-1, 3)


def _keep_freed_memory() -> None:
    """Let glibc keep 64 MiB that are freed, so that the arrays of the next block fault in no pages again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 25)
        mallopt(_TRIM_THRESHOLD, 1 << 26)


def _texts(item: Pair | Completion) -> tuple[str, str]:
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item.text, "")


def _labels_of(item: Pair | Completion) -> tuple[float | None, float | None]:
    return (item.chosen_is_safe, item.rejected_is_safe) if isinstance(item, Pair) else (item.is_safe, None)


def _finished(item: Pair | Completion) -> tuple[bool, bool]:
    return (item.chosen_finished, item.rejected_finished) if isinstance(item, Pair) else (item.finished, True)


def _batch_of(items: Sequence[Pair | Completion]) -> Any:
    turns = [turn for item in items for turn in item.prompt]
    messages = pyarrow.StructArray.from_arrays(
        [
            pyarrow.array([turn.role for turn in turns], pyarrow.string()),
            pyarrow.array([turn.content for turn in turns], pyarrow.string()),
        ],
        fields=list(_MESSAGE),
    )
    ends = np.cumsum([0, *(len(item.prompt) for item in items)], dtype=np.int32)
    rest = [_completions_of(item) for item in items]
    columns = zip(*rest, strict=True) if rest else ((),) * (len(SCHEMA) - 2)
    arrays = [pyarrow.array(column, kind.type) for column, kind in zip(columns, list(SCHEMA)[2:], strict=True)]
    ids = pyarrow.array([item.id for item in items], pyarrow.string())
    return pyarrow.record_batch([ids, pyarrow.ListArray.from_arrays(ends, messages), *arrays], schema=SCHEMA)


def _completions_of(item: Pair | Completion) -> tuple[object, ...]:
    rest = (item.category, *_finished(item))
    if isinstance(item, Pair):
        return item.chosen, item.rejected, item.chosen_is_safe, item.rejected_is_safe, item.source, *rest
    return item.text, None, item.is_safe, None, item.kind, *rest


def _keys_of(items: Sequence[Pair | Completion], texts: Sequence[str], given: Sequence[bool]) -> npt.NDArray[Any]:
    keys = np.zeros(len(items), KEYS)
    if not items:
        return keys
    pairs = [_texts(item) for item in items]
    prompts = [_digest(*[part for turn in item.prompt for part in (turn.role, turn.content)]) for item in items]
    completions = [
        (_continued(prompt, first), _continued(prompt, second))
        for prompt, (first, second) in zip(prompts, pairs, strict=True)
    ]
    labels, finished = [_labels_of(item) for item in items], [_finished(item) for item in items]
    contents = []
    for item, both, known, whole in zip(items, completions, labels, finished, strict=True):
        cut = () if all(whole) or isinstance(item, Completion) else whole
        contents.append(_digest(*map(repr, (*both, *known, *cut))).digest())
    keys["id"] = _numbers([_digest(item.id).digest() for item in items])
    keys["id_is_given"] = given
    keys["prompt"] = _numbers([_digest(text).digest() for text in texts])
    keys["content"] = _numbers(contents)
    keys["completions"] = completions
    keys["labels"] = np.array(labels, np.float64)  # None is NaN
    keys["cut"] = ~np.array(finished, bool)
    for name, size in (("chars", len), ("words", _num_words)):
        keys[name] = [
            (sum([size(turn.content) for turn in item.prompt]), size(first), size(second))
            for item, (first, second) in zip(items, pairs, strict=True)
        ]
    return keys


def _num_words(text: str) -> int:
    return len(text.split())


def _digest(*texts: str) -> Any:
    # Lengths are included, so that different lists of texts never give the same bytes.
    return blake2b("".join([f"{len(text)}:{text}" for text in texts]).encode("utf-8", "surrogatepass"), digest_size=8)


def _continued(digest: Any, text: str) -> int:
    digest = digest.copy()
    digest.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")


def _numbers(digests: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(digests), "<u8")
