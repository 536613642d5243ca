"""The token ids of a run, on disk: written once, and used again while their inputs are the same."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bfpo import __version__
from bfpo.core.errors import DataError
from bfpo.core.provenance import content_digest
from bfpo.data.load import RowStream, Scan
from bfpo.data.rejects import Reject
from bfpo.data.store import TokenStore, write_tokens
from bfpo.data.tokenize import PairTokenizer, ids_to_check
from bfpo.runs.folder import RunFolder
from bfpo.training.inputs import (
    REJECTS,
    TrainingConfig,
    data_sections,
    read_start,
    report_data,
    row_streams,
    trained_hashes,
    write_rejects,
)
from bfpo.training.trained_on import record_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from bfpo.data.chat import ChatEncoder

__all__ = ["stage_tokens", "token_stores"]

logger = logging.getLogger(__name__)


def stage_tokens(config: TrainingConfig, folder: RunFolder, args: TrainingArguments) -> dict[str, TokenStore]:
    """Return the tokens of each data section, `token_stores`, and describe the data in `data.json` and on the console.

    The first process makes them and the others read what it has written. What else the run depends on, the model and
    the file of the chat template, is recorded. Raises as `read_start`, `row_streams` and `report_data` do, and
    `RunError` if any of these changed since a resumed run started.
    """
    for name, section in data_sections(config).items():
        folder.add_data(name, section.files)
    start = read_start(config)
    if config.chat_template is not None:
        folder.add_data("chat_template", config.chat_template)
    if folder.stage != "reference":  # which keeps what it computes by the weights that it is of
        for model in filter(None, (config.model, getattr(config, "margin_model", None))):
            logger.info("%s: hashing its files", model)
            folder.add_weights(model)
    streams = row_streams(config, start)
    with _first_process_first(args):
        tokens = token_stores(
            folder,
            streams,
            start.tokenizer,
            cache=config.token_cache,
            num_embeddings=start.num_embeddings,
            chat=start.chat,
            **start.settings,
        )
    if folder.stage in ("train", "sft"):
        if config.model is not None:
            folder.add_start(config.model)
        record_prompts(folder, (config.model,), trained_hashes(streams))
    facts = {name: (store.facts["counts"], store.facts["tokens"]) for name, store in tokens.items()}
    report_data(folder, start, facts, config)
    return tokens


@contextmanager
def _first_process_first(args: TrainingArguments) -> Iterator[None]:
    """Let the first process of all go first, then that of each machine, whose folder may be its own, then the rest."""
    with args.main_process_first(local=False, desc="tokenizing"), args.main_process_first(desc="tokenizing"):
        yield


def token_stores(
    folder: RunFolder,
    streams: Mapping[str, RowStream[Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache: str | None = None,
    num_embeddings: int | None = None,
    chat: ChatEncoder | None = None,
    **settings: Any,
) -> dict[str, TokenStore]:
    """Return the tokens of each stream from `tokens/<name>.arrow`, and write those that are missing or outdated.

    `settings`: keyword arguments of `PairTokenizer`. A store is used again, and the scan of its stream recalled, if the
    contents of its data files (registered by `RunFolder.add_data`), their section of the config, the seed, the
    tokenizer, these settings and the version of bfpo are the same. `cache`: a folder in place of `tokens/`, in which a
    store is named by the digest of all these, so that other runs find it; an existing store is never changed. Its
    `facts` hold `counts` and `rejects` of the stream and `tokens`, the report's row. `rejects.jsonl` is written to the
    run folder. How many rows were tokenized here goes to `run.json`. `num_embeddings` as for `PairTokenizer`; it counts
    only if the tokenizer has ids beyond it. `chat` as for `PairTokenizer`. With several processes, let the first
    call this before the others. Raises as the streams and the tokenizer do, for a bad row of any stream before the
    tokens of the first are made.
    """
    if (limit := ids_to_check(tokenizer, num_embeddings)) is not None:
        settings["num_embeddings"] = limit
    keys = {name: _key(folder, name, tokenizer, settings) for name in streams}
    paths = {
        name: folder.file(f"tokens/{name}.arrow") if cache is None else Path(cache) / f"{key[:32]}.arrow"
        for name, key in keys.items()
    }
    stores = {name: _known(paths[name], keys[name]) for name in streams}
    for name, store in stores.items():
        if store is None:
            streams[name].scan()
        else:
            assert store.prompts is not None  # `_known` takes no other store
            rejects = [Reject(**row) for row in store.facts["rejects"]]
            streams[name].recall(Scan(rejects, store.facts["counts"], store.prompts))
    if None in stores.values() or not folder.file(REJECTS).exists():
        write_rejects(folder, {name: stream.scan().rejects for name, stream in streams.items()})
    made = {
        name: _written(paths[name], streams[name], PairTokenizer(tokenizer, **settings, chat=chat), keys[name])
        for name, store in stores.items()
        if store is None
    }
    folder.add_facts(tokenized={name: len(made[name]) if name in made else 0 for name in streams})
    found = {**{name: store for name, store in stores.items() if store is not None}, **made}
    return {name: found[name] for name in streams}


def _written(path: Path, pairs: RowStream[Any], tokenize: PairTokenizer, key: str) -> TokenStore:
    scan = pairs.scan()
    rejects = [reject.as_row() for reject in scan.rejects]
    facts: dict[str, Any] = {"key": key, "counts": scan.counts, "rejects": rejects}

    def tokens() -> Any:
        yield from tokenize(pairs)
        facts["tokens"] = tokenize.report.as_row()

    return write_tokens(path, tokens(), facts, scan.hashes)


def _known(path: Path, key: str) -> TokenStore | None:
    if not path.exists():
        return None
    try:
        store = TokenStore(path)
    except DataError as error:
        logger.warning("%s; it is written again", error)
        return None
    is_whole = store.prompts is not None and "rejects" in store.facts  # not of a version that kept less
    return store if store.facts.get("key") == key and is_whole else None


def _key(folder: RunFolder, name: str, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> str:
    record = folder.record
    parts = {
        "version": __version__,
        "files": [content_digest(fact) for fact in record["data"][name].values()],
        "section": folder.config[name],
        "seed": folder.config["seed"],
        "settings": dict(settings),
        "chat_template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "tokenizer": tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else sorted(tokenizer.get_vocab().items()),
    }
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
