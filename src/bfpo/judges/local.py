"""Shared by judges on local models: frozen loading, encoding that cannot forge special tokens, padding, versions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bfpo.core.errors import DataError, ModelError, SettingError
from bfpo.core.schema import Completion, Message
from bfpo.data.chat import TextEncoder, unused_character, whole_answer
from bfpo.data.template import ChatTemplate, RefusedChatError
from bfpo.data.tokenize import check_ids, ids_to_check
from bfpo.judges.settings import LocalSpec
from bfpo.policy.load import DTYPES, load_tokenizer, pad_token_id
from bfpo.policy.reference.cache import model_key
from bfpo.policy.source import cannot_load, check_code

__all__ = [
    "PromptEncoder",
    "check_characters",
    "fitting",
    "freeze",
    "load_with_head",
    "num_embeddings_of",
    "pad_right",
    "tokenizer_key",
    "version_of",
]

_TAG = re.compile(r"<\S[^<>\n]*>|\[/?[A-Z_]+\]")
Key = TypeVar("Key")
Item = TypeVar("Item")
Row = TypeVar("Row")


# ------------------------------------------------------------------------------------------------------- loading


def load_with_head(
    loader: Any, model: str | Path, spec: LocalSpec, *, kind: str, dtype: str = "auto"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer by `loader.from_pretrained` and freeze it; `kind` names the model in errors.

    `dtype` is used if the spec gives none. Raises `ModelError` if the model cannot be loaded from safetensors or lacks
    weights, which would then be random.
    """
    revision = spec.revision
    tokenizer = load_tokenizer(model, revision=revision)
    check_code(model, revision=revision)
    try:
        loaded, report = loader.from_pretrained(
            str(model),
            dtype=DTYPES[spec.dtype or dtype],
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # files, the hub, the config and the weights raise different classes
        raise cannot_load("model", model, error, kind=kind) from error
    lacking = sorted({*report["missing_keys"], *(str(entry[0]) for entry in report.get("mismatched_keys", ()))})
    if lacking:
        raise ModelError(
            f"model: {str(model)!r} lacks {len(lacking)} weights of {kind}, such as {lacking[0]}; give one with "
            "its head"
        )
    return freeze(loaded), tokenizer


def num_embeddings_of(model: Any) -> int | None:
    """Return the rows of a loaded model's embedding, one per token id; `None` for one without a plain embedding."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def freeze(model: Any) -> Any:
    """Put a model into evaluation mode without gradients, on the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != "mps":  # MPS lacks float64, the dtype of our probabilities
        model.to(accelerator)
    model.requires_grad_(False)
    return model.eval()


# ------------------------------------------------------------------------------------------------------ versions


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of vocabulary, tokenization rules and chat template; 32 hex digits."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab()))
    state = json.dumps([rules, tokenizer.chat_template], sort_keys=True, default=str)
    return hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def version_of(name: str, model: nn.Module, tokenizer_digest: str, **settings: Any) -> str:
    """Return a judge's version: its format or kind, and a digest of weights, tokenizer and relevant settings.

    The digest reads the weights, not the path: changed content gives another version, and the same weights from a
    folder and from the hub give the same one.
    """
    facts = {"model": model_key(model), "tokenizer": tokenizer_digest, **settings}
    return f"{name}:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]}"


# ------------------------------------------------------------------------------------------------- texts to ids


class PromptEncoder:
    """Encodes a judge's prompt so that no judged text yields the id of a special token or of a marker.

    Such strings in judged texts are encoded as plain text (see `TextEncoder`); everything else is tokenized as usual.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        markers: Sequence[str] = (),
        template_arguments: Mapping[str, Any] | None = None,
        content_as_parts: bool = False,
        variables: Mapping[str, Any] | None = None,
        num_embeddings: int | None = None,
    ) -> None:
        """`template_arguments` are the format's own variables of the chat template, `variables` those of a setting."""
        self.tokenizer = tokenizer
        decoder = tokenizer.added_tokens_decoder
        self._special = {number: token.content for number, token in decoder.items() if token.special}
        self._special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        added = [token.content for token in decoder.values() if not token.special]
        self._texts = TextEncoder(tokenizer, [content for content in added if _TAG.fullmatch(content)], markers)
        self._arguments = dict(template_arguments or {})
        if taken := sorted(self._arguments.keys() & dict(variables or {}).keys()):
            raise SettingError(
                f"chat_template_kwargs: got {', '.join(taken)}, which the format sets itself; leave it out"
            )
        self._parts = content_as_parts
        self._template = ChatTemplate(tokenizer, variables=variables)
        self._num_embeddings = ids_to_check(tokenizer, num_embeddings)
        self._start = list(tokenizer("", verbose=False)["input_ids"])

    def ids(
        self,
        completions: Sequence[Completion],
        ask: Callable[..., tuple[Message, ...] | str],
        *,
        answer_prefix: str = "",
        generation: bool = True,
    ) -> list[int]:
        """Return the ids of `ask(*completions)`, up to the start of the answer.

        Raises `DataError` for a conversation that the chat template refuses and for a text that cannot be marked,
        `ModelError` for a token that the model's embedding lacks.
        """
        safe, mark = self._marked([whole_answer(completion) for completion in completions])
        asked = ask(*safe)
        text = self.render(asked, generation=generation)
        text += "" if text.endswith(answer_prefix) else answer_prefix
        check_characters(text)
        ids = self._texts.encode([text])[0] if mark is None else self._texts.encode_marked(text, mark)
        # A text without a template starts as the tokenizer starts every text: with BOS or nothing.
        bare = isinstance(asked, str) and ids[: len(self._start)] != self._start
        ids = self._start + ids if bare else ids
        names = ", ".join(completion.id for completion in completions)
        check_ids(ids, self.tokenizer, self._num_embeddings, f"completion {names}")
        return ids

    def render(self, asked: tuple[Message, ...] | str, *, generation: bool = True) -> str:
        """Return a chat rendered by the model's template, or a finished text unchanged."""
        if isinstance(asked, str):
            return asked
        turns: list[dict[str, Any]] = [
            {
                "role": message.role,
                "content": [{"type": "text", "text": message.content}] if self._parts else message.content,
            }
            for message in asked
        ]
        try:
            return self._template.render_turns(turns, generation=generation, variables=self._arguments)
        except RefusedChatError as error:
            raise RefusedChatError(f"the chat template refuses this conversation: {error}") from error

    def plain(self, text: str) -> list[int]:
        """Return the ids of a single judged text, none of them special; raises `DataError` as `ids` does."""
        check_characters(text)
        mark = unused_character([text])
        return self._texts.encode_marked(self._texts.escape(text, mark), mark)

    def pieces(self, text: str) -> list[int]:
        """Return the ids of the format's own text, where special tokens keep their meaning."""
        return self._texts.encode([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the decoded text with special tokens by name; plain text that looks like one is broken up.

        A format that looks for a special token then finds real ones only, not quotations.
        """
        parts: list[str] = []
        run: list[int] = []
        for token in [*ids, None]:
            if token is not None and token not in self._special:
                run.append(token)
                continue
            if run:
                plain = cast(str, self.tokenizer.decode(run, clean_up_tokenization_spaces=False))
                parts.append(self._escape_special(plain))
                run = []
            if token is not None:
                parts.append(self._special[token])
        return "".join(parts)

    def _escape_special(self, text: str) -> str:
        for token in self._special.values():
            text = text.replace(token, f"{token[:1]}\u2060{token[1:]}")
        return text

    def _marked(self, completions: Sequence[Completion]) -> tuple[list[Completion], str | None]:
        texts = [text for c in completions for text in (c.text, *(message.content for message in c.prompt))]
        if not any(map(self._texts.holds_control_token, texts)):
            return list(completions), None
        mark = unused_character(texts)

        def escape(text: str) -> str:
            return self._texts.escape(text, mark)

        return [
            replace(c, prompt=tuple(Message(m.role, escape(m.content)) for m in c.prompt), text=escape(c.text))
            for c in completions
        ], mark


def check_characters(text: str) -> None:
    """Raise `DataError` for half a surrogate pair, which is not a character and which tokenizers refuse."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text holds half a surrogate pair, U+{ord(text[error.start]):04X}") from error


# ------------------------------------------------------------------------------------------------------ batches


def fitting(
    items: Mapping[Key, Item], encode: Callable[[Item], Row], limit: int, *, length: Callable[[Row], int]
) -> tuple[dict[Key, Row], dict[Key, str]]:
    """Return the rows of items of at most `limit` tokens, and the reasons why the others are not scored, by key.

    A longer row is never cut. An item for which `encode` raises `DataError` gets its text as the reason.
    """
    rows: dict[Key, Row] = {}
    reasons: dict[Key, str] = {}
    for key, item in items.items():
        try:
            row = encode(item)
        except DataError as error:
            reasons[key] = str(error)
            continue
        if length(row) <= limit:
            rows[key] = row
        else:
            reasons[key] = f"longer than max_length (at most the model's positions): {limit} tokens are allowed"
    return rows, reasons


def pad_right(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return rows padded on the right on the model's device: `input_ids` and `attention_mask` of shape (N, T)."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    pad = pad_token_id(tokenizer, num_embeddings_of(model)) if pad is None else pad
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
