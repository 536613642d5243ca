"""Pairs, rows and a byte-level tokenizer whose ids can be written down by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bfpo.core.schema import Completion, Message, Pair
from bfpo.data.read import iter_completions
from bfpo.data.rejects import Reject
from bfpo.data.settings import SplitConfig
from bfpo.data.split import RowPicker

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(4)


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer(
    chat_template: str | None = None,
    *,
    merges: Sequence[tuple[str, str]] = (),
    bos: bool = True,
    eos: bool = True,
    special: Iterable[str | AddedToken] = SPECIAL,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer where byte b is id 4 + b, the special tokens are 0 to 3 and merges follow from 260."""
    letters = _byte_letters()
    merged = [tuple("".join(letters[byte] for byte in part.encode()) for part in merge) for merge in merges]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters, *("".join(pair) for pair in merged)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merged))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in special:
        if isinstance(token, AddedToken) and not token.special:
            tokenizer.add_tokens([token])
        else:
            tokenizer.add_special_tokens([token])
    names = {name: token for name, token, on in (("bos_token", "<s>", bos), ("eos_token", "</s>", eos)) if on}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


def byte_ids(text: str) -> list[int]:
    """Return the ids that `byte_tokenizer()` gives to plain text."""
    return [4 + byte for byte in text.encode()]


def make_pair(
    prompt: str = "q", chosen: str = "yes", rejected: str = "no", labels: tuple[Any, Any] = (1, 0), id: str = "p"
) -> Pair:
    messages = (Message("user", prompt),) if prompt else ()
    return Pair(id, messages, chosen, rejected, *labels)


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class ReadCompletions(NamedTuple):
    completions: list[Completion]
    rejects: list[Reject]
    rows: int

    def counts(self) -> dict[str, int]:
        return dict(Counter(reject.reason for reject in self.rejects))


def read_sft(files: Sequence[Path], *, layout: str = "completions", **settings: Any) -> ReadCompletions:
    """Return what `iter_completions` yields of the files, completions and rejects apart."""
    rows = list(iter_completions(files, layout=layout, **settings))
    rejects = [row for row in rows if isinstance(row, Reject)]
    return ReadCompletions([row for row in rows if isinstance(row, Completion)], rejects, len(rows))


def split_pairs(pairs: Sequence[Pair], *, held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return `(train, test)` of a split by prompt, each in the given order."""
    picker = RowPicker(split=SplitConfig.model_construct(held_out=held_out, seed=seed, part="test"))
    for pair in pairs:
        picker.add(pair)
    test = picker.picked()
    return list(compress(pairs, ~test)), list(compress(pairs, test))


def limit_pairs(pairs: Sequence[Pair], limit: int, *, seed: int) -> list[Pair]:
    """Return the pairs that a limit draws, in the given order."""
    picker = RowPicker(limit=limit, seed=seed)
    for pair in pairs:
        picker.add(pair)
    return list(compress(pairs, picker.picked()))
