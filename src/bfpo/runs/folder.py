"""A run folder: what was asked, with what it ran, what came out. Every file is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from bfpo.core.energy import gpu_joules, joules_since
from bfpo.core.errors import DiskFullError, RunError
from bfpo.core.files import file_digest, is_disk_full, write_bytes_whole
from bfpo.core.inputs import expand_files
from bfpo.core.provenance import (
    describe_checkout,
    describe_platform,
    describe_sources,
    describe_versions,
    prepared_from,
)
from bfpo.core.secrets import hide_secrets, is_secret_name
from bfpo.core.yaml_text import dump_yaml

__all__ = [
    "CardSection",
    "RunFolder",
    "Status",
    "render_card",
]

Status = Literal["running", "interrupted", "failed", "finished"]
_CONFIG, _RECORD, _METRICS, _CARD = "config.yaml", "run.json", "metrics.jsonl", "README.md"


class _Config(Protocol):
    def resolved(self) -> dict[str, Any]: ...


class RunFolder:
    """The folder of one run of one stage; `create` is the only way in.

    Files: `config.yaml` (the resolved config), `run.json` (status, config, seeds, versions, platform, hashes of the
    data), `metrics.jsonl`, `README.md` (the card), and whatever the stage writes. Under a launcher with several
    processes only the first (`RANK` unset or 0) writes; in the others every write is silently nothing, so that stages
    need not ask.

    A stage raises what it likes: `bfpo.runs.stages.run_stage` sets the status. `kept` is a clause about what a resumed
    run would go on from; the message about a full disk has it.
    """

    def __init__(self, path: Path, record: dict[str, Any], *, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self.is_writer = _is_first_process()
        self.kept: str | None = None
        self._record = record
        self._started = time.monotonic()
        self._seconds_before = float(record.get("seconds", 0.0))
        # Unknown for a part of the run is unknown for the whole.
        self._joules_before: float | None = record.get("gpu_joules", None if "seconds" in record else 0.0)
        self._joules_at_start: dict[str, float] = {}

    @classmethod
    def create(
        cls, path: str | Path, stage: str, config: _Config | Mapping[str, Any], resume: bool = False
    ) -> RunFolder:
        """Make the folder of a new run, or open that of an earlier run with the same config.

        `config` is a config object or its resolved mapping; what looks like a secret in it is not written. With
        `resume`, a folder that is missing or empty starts a new run, and `finished` tells that nothing is left to do. A
        folder in which a run failed before it made anything counts as empty.

        Raises `RunError` where the folder holds something and `resume` is not given, where it holds a run of another
        stage or with another config (the keys that differ are named), or where it cannot be written.
        """
        path = Path(path)
        mapping = config if isinstance(config, Mapping) else config.resolved()
        values: dict[str, Any] = _hide_secrets(json.loads(json.dumps(mapping)))
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file; give a folder that is new or empty as --out")
        held = path.is_dir() and any(not item.name.startswith(".") for item in path.iterdir())
        held = held and not _failed_before_anything(path)
        if held and _is_first_process():
            folder = cls(path, _open_earlier(path, stage, values, resume), resumed=True)
        else:  # another process does not judge the folder: the first one does, or is just filling it
            folder = cls(path, {"stage": stage, "created": _now(), "config": values}, resumed=held and resume)
        if not folder.finished:
            folder._start()
        return folder

    def _start(self) -> None:
        if self.is_writer:
            for part in self.path.glob(".*.part"):  # what a killed run was writing
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        self._joules_at_start = gpu_joules() if self.is_writer else {}
        self.add_facts(
            status="running",
            seeds={key: value for key, value in _flat(self.config) if key.rpartition(".")[2] == "seed"},
            versions=describe_versions(),
            platform=describe_platform(),
            checkout=describe_checkout(),
            starts=int(self._record.get("starts", 0)) + 1,
        )
        self.write_text(_CONFIG, dump_yaml(self.config))

    # Status and facts

    @property
    def stage(self) -> str:
        """The name of the stage."""
        return str(self._record["stage"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, as plain values."""
        config: dict[str, Any] = self._record["config"]
        return config

    @property
    def status(self) -> Status:
        """What became of the run; `running` in a folder that nobody writes means that it was killed."""
        status: Status = self._record["status"]
        return status

    @property
    def finished(self) -> bool:
        """Whether the run has ended well."""
        return self._record.get("status") == "finished"

    @property
    def record(self) -> dict[str, Any]:
        """A copy of what `run.json` holds."""
        copy: dict[str, Any] = json.loads(json.dumps(self._record))
        return copy

    def set_status(self, status: Status, error: str | None = None) -> None:
        """Write the status and, for a failure, its one message."""
        if status not in get_args(Status):
            raise RunError(f"status: got {status!r}; allowed: {', '.join(get_args(Status))}")
        self._record.pop("error", None)
        self.add_facts(status=status, **({"error": error} if error else {}))

    def add_facts(self, **facts: Any) -> None:
        """Add facts (JSON values) to `run.json`; a fact that is there is replaced."""
        self._record.update(_hide_secrets(facts))
        self._record["updated"] = _now()
        self._record["seconds"] = round(self._seconds_before + time.monotonic() - self._started, 3)
        drawn = joules_since(self._joules_at_start)
        if drawn is not None and self._joules_before is not None:
            self._record["gpu_joules"] = round(self._joules_before + drawn, 1)
        else:
            self._record.pop("gpu_joules", None)
        self.write_json(_RECORD, self._record)

    def add_data(self, name: str, files: str | Path | Sequence[str | Path]) -> None:
        """Write the SHA-256 and the size of the files behind one input, such as `data`; of a folder, of what it holds.

        Where `bfpo prepare` made a file, the sources behind it are written too, with their licences.

        Raises `RunError` where a file cannot be read, or where a resumed run finds other content than it started with.
        """
        earlier = self._record.get("data", {})
        facts: dict[str, dict[str, Any]] = {}
        for path in expand_files([files] if isinstance(files, (str, Path)) else files):
            try:
                facts[str(path)] = {"sha256": file_digest(path), "bytes": Path(path).stat().st_size}
            except OSError as error:
                raise RunError(f"{path}: cannot be read ({error.strerror}); check {name}") from error
            now = facts[str(path)]
            before = earlier.get(name, {}).get(str(path), now)
            if before != now:
                raise RunError(
                    f"{path}: changed since this run started (SHA-256 {before['sha256'][:12]}, now "
                    f"{now['sha256'][:12]}); put the earlier file back, or start a new run in another --out"
                )
        moved = sorted(facts.keys() ^ earlier.get(name, facts).keys())
        if moved:
            raise RunError(
                f"{name}: {', '.join(moved)} came or went since this run started; put the folder back as it was, or "
                "start a new run in another --out"
            )
        behind = [source for path, fact in facts.items() for source in prepared_from(path, fact["sha256"])]
        if behind:
            once = list({source["name"]: source for source in behind}.values())
            self.add_facts(sources={**self._record.get("sources", {}), name: once})
        self.add_facts(data={**earlier, name: facts})

    # Files

    def file(self, name: str) -> Path:
        """Return the path of a file of this run."""
        return self.path / name

    def folder(self, name: str) -> Path:
        """Make a folder of this run, such as `checkpoints` or `model`, and return it."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file whole: to a temporary name, then renamed. Returns its path."""
        path = self.path / name
        if self.is_writer:
            try:
                write_bytes_whole(path, content)
            except OSError as error:
                if is_disk_full(error):
                    raise self.disk_full(path) from error
                raise RunError(
                    f"{path}: cannot be written ({error.strerror}); check --out, rights and space"
                ) from error
        return path

    def disk_full(self, path: Path) -> DiskFullError:
        """Return the error for a file that finds no room: how much is free, what is safe, what to do."""
        try:
            free = f"{shutil.disk_usage(self.path).free / 1e6:,.1f} MB free"
        except OSError:
            free = "free space unknown"
        safe = f"; {self.kept}" if self.kept else ""
        return DiskFullError(
            f"{path}: cannot be written, the disk or the quota is full ({free}){safe}. Free some space and go on with "
            "--resume"
        )

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file (UTF-8) whole. Returns its path."""
        return self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole; a number that is not finite is written as null. Returns its path."""
        return self.write_text(name, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write a file of JSON lines whole; a number that is not finite is written as null. Returns its path."""
        return self.write_text(name, "".join(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows))

    def read_json(self, name: str) -> Any:
        """Return the value of a JSON file of this run; raises `RunError` where it is missing or not JSON."""
        return _read_json(self.path / name)

    # Metrics

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; a number that is not finite is written as null."""
        if not self.is_writer:
            return
        line = (json.dumps(_finite(row), ensure_ascii=False) + "\n").encode("utf-8")
        path = self.path / _METRICS
        try:
            with path.open("ab+", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a killed run left half a row
                        line = b"\n" + line
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            if is_disk_full(error):
                raise self.disk_full(path) from error
            raise RunError(f"{path}: cannot be written ({error.strerror}); check --out, rights and space") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`; half a row, left by a killed run, is passed over."""
        path = self.path / _METRICS
        if not path.exists():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [row for row in rows if isinstance(row, dict)]

    def restore_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make `metrics.jsonl` hold these rows and no other, as after the checkpoint that a resumed run goes on from.

        A row that is there stays as it is written; one that was lost is written again.
        """
        wanted: list[dict[str, Any]] = [_finite(row) for row in rows]
        if self.is_writer and (wanted or (self.path / _METRICS).exists()):
            held = self.read_metrics()[: len(wanted)]
            pairs = zip_longest(wanted, held)
            self.write_jsonl(_METRICS, [found if found == row else row for row, found in pairs])

    # The card

    def write_card(
        self,
        title: str,
        sections: Mapping[str, CardSection],
        *,
        base_model: str | None = None,
        tags: Sequence[str] = (),
        head: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write `README.md`: the stage's own sections, then settings, data and versions. Returns its path.

        A section is Markdown text, or facts by name, shown as a table. `head` replaces the metadata of a model.
        """
        data = {
            f"{name}: {path}": f"SHA-256 {fact['sha256']}, {fact['bytes']} bytes"
            for name, files in self._record.get("data", {}).items()
            for path, fact in files.items()
        }
        sources = describe_sources(self._record.get("sources", {}))
        versions = {**self._record.get("versions", {}), **self._record.get("checkout", {})}
        common: dict[str, CardSection] = {
            "Settings": dict(_flat(self.config)),
            "Data": data,
            "Sources of the data": sources,
            "Versions": versions,
        }
        card = render_card(title, {**sections, **common}, base_model=base_model, tags=tags, head=head)
        return self.write_text(_CARD, card)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") in ("", "0")


def _failed_before_anything(path: Path) -> bool:
    """Whether a run failed here before it made anything, such as one with a mistake in its settings."""
    if any(item.is_file() and item.name not in (_CONFIG, _RECORD) for item in path.rglob("*")):
        return False
    try:
        return bool(json.loads((path / _RECORD).read_text(encoding="utf-8"))["status"] == "failed")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open_earlier(path: Path, stage: str, config: dict[str, Any], resume: bool) -> dict[str, Any]:
    if not (path / _RECORD).exists():
        raise RunError(f"{path}: is not empty and holds no run of bfpo; give a folder that is new or empty as --out")
    record: dict[str, Any] = _read_json(path / _RECORD)
    known = f"{path}: holds a run of `{record.get('stage')}` ({record.get('status')})"
    if record.get("stage") != stage:
        raise RunError(f"{known}, not of `{stage}`; give a folder that is new or empty as --out")
    if not resume:
        raise RunError(f"{known}; go on with it by --resume, or give a folder that is new or empty as --out")
    earlier, now = dict(_flat(record.get("config", {}))), dict(_flat(config))
    absent = "(not set)"
    changes = [
        f"{key} was {earlier.get(key, absent)!r}, now {now.get(key, absent)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key, absent) != now.get(key, absent)
    ]
    if changes:
        raise RunError(
            f"{path}: cannot resume with another config: {'; '.join(changes)}; "
            f"resume with --config {path / _CONFIG}, or start a new run in another --out"
        )
    return record


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RunError(f"{path}: is not valid JSON ({error}); start a new run in another --out") from error


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, list) and item and all(isinstance(one, Mapping) for one in item):
            item = dict(enumerate(item))
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hide_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _hide_under(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide_secrets(item) for item in value]
    return hide_secrets(value) if isinstance(value, str) else value


def _hide_under(key: str, value: Any) -> Any:
    is_secret = is_secret_name(key) and not isinstance(value, (int, float))  # a count per token is none
    return "***" if is_secret and value else _hide_secrets(value)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


CardSection = str | Mapping[str, object]
"""Markdown text, or facts by name (a table)."""


def render_card(
    title: str,
    sections: Mapping[str, CardSection],
    *,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    head: Mapping[str, Any] | None = None,
) -> str:
    """Return the card as Markdown; an empty section is left out. `head` replaces the metadata of a model."""
    if head is None:
        head = {"library_name": "transformers", "tags": ["bfpo", *tags]}
        head |= {} if base_model is None else {"base_model": base_model}
    parts = [f"---\n{dump_yaml(dict(head))}---", f"# {title}"]
    for name, content in sections.items():
        if content:
            parts += [f"## {name}", content if isinstance(content, str) else _table(content)]
    return "\n\n".join(parts) + "\n"


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _table(facts: Mapping[str, object]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
