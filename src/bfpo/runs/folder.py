"""A run folder: config, provenance, status, metrics, outputs and the card. Files are written atomically."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from bfpo.core.console import in_words, printable
from bfpo.core.energy import gpu_joules, joules_since
from bfpo.core.errors import DiskFullError, RunError
from bfpo.core.files import file_digest, is_disk_full, write_bytes_whole
from bfpo.core.inputs import expand_files, reason_outside
from bfpo.core.markdown import table
from bfpo.core.places import without_places
from bfpo.core.processes import is_first_process
from bfpo.core.provenance import (
    RunFile,
    content_digest,
    describe_checkout,
    describe_platform,
    describe_sources,
    describe_versions,
    hub_base,
    prepared_from,
    run_above,
    run_of_model,
    weights_digest,
)
from bfpo.core.records import as_json, load
from bfpo.core.remote import file_name, is_remote
from bfpo.core.secrets import hide_in_values
from bfpo.core.yaml_text import dump_yaml
from bfpo.data.hub_stream import remote_facts
from bfpo.generation.settings import HOW_ASKED
from bfpo.runs.lock import LOCK

__all__ = ["FREE", "RunFolder", "Status", "failed_without_output", "flat_settings", "model_head", "render_card"]

_log = logging.getLogger(__name__)

Status = Literal["running", "interrupted", "failed", "finished"]
CardSection = str | Mapping[str, object]
"""A section of a card: Markdown text, or a table of values by name."""
_CONFIG, _RECORD, _METRICS, _CARD = "config.yaml", "run.json", "metrics.jsonl", "README.md"


class _Config(Protocol):
    def resolved(self) -> dict[str, Any]: ...


class RunFolder:
    """The folder of one run of one stage; made by `create`.

    Files: `config.yaml` (the resolved config), `run.json` (status, config, seeds, versions, platform, hashes of the
    data), `metrics.jsonl`, `README.md` (the card), and the files of the stage. Under a launcher with several processes
    only the first one (`RANK` unset or 0) writes; in the others every write is a no-op.

    `bfpo.runs.stages.run_stage` sets the status. `kept` says from what a resumed run would continue; it is part of the
    message about a full disk.
    """

    def __init__(self, path: Path, record: dict[str, Any], *, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self.is_writer = is_first_process()
        self.kept: str | None = None
        self._record = record
        self._started = time.monotonic()
        self._seconds_before = float(record.get("seconds", 0.0))
        # If the energy of one start is unknown, so is the sum.
        self._joules_before: float | None = record.get("gpu_joules", None if "seconds" in record else 0.0)
        self._joules_at_start: dict[str, float] = {}

    @classmethod
    def create(
        cls, path: str | Path, stage: str, config: _Config | Mapping[str, Any], resume: bool = False
    ) -> RunFolder:
        """Create the folder of a new run, or open the folder of an earlier run with the same config.

        `config` is a config object or its resolved mapping; secrets in it are masked. With `resume`, a missing or empty
        folder starts a new run; if the earlier run is complete, `finished` is true. A folder whose run failed before it
        wrote any output counts as empty.

        Raises `RunError` if the folder is not empty and `resume` is not set, if it holds a run of another stage or with
        another config (the message names the keys that differ), if a link in it leads elsewhere, or if it cannot be
        written.
        """
        path = Path(path)
        mapping = config if isinstance(config, Mapping) else config.resolved()
        values: dict[str, Any] = hide_in_values(json.loads(json.dumps(mapping)))
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file; set --out to a new or empty folder")
        occupied = path.is_dir() and any(not item.name.startswith(".") for item in path.iterdir())
        occupied = occupied and not failed_without_output(path)
        if occupied and is_first_process():
            folder = cls(path, _earlier_record(path, stage, values, resume), resumed=True)
        else:  # other processes skip the checks: the first one makes them, or is writing to the folder now
            first = {"stage": stage, "created": _now(), "config": values, "weights": {}}
            if occupied and resume:  # what all must agree on, such as whether the run is finished and its reference
                with suppress(RunError):
                    first |= _read_json(path / _RECORD)
            folder = cls(path, first, resumed=occupied and resume)
        if not folder.finished:
            if path.is_dir() and folder.is_writer:
                _check_links(path)
            folder._start()
        return folder

    def _start(self) -> None:
        if self.is_writer:
            for part in self.path.glob(".*.part"):  # left by a killed run
                shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
            if self.resumed:
                self._compare_versions()
        self._joules_at_start = gpu_joules() if self.is_writer else {}
        self._record.pop("error", None)  # of the earlier start
        self.add_facts(
            status="running",
            seeds={key: value for key, value in flat_settings(self.config) if key.rpartition(".")[2] == "seed"},
            versions=describe_versions(),
            platform=describe_platform(),
            checkout=describe_checkout(),
            starts=int(self._record.get("starts", 0)) + 1,
        )
        self.write_text(_CONFIG, dump_yaml(self.config))

    def _compare_versions(self) -> None:
        """Warn if a run continues with other versions than those that it was last continued with."""
        before, now = self._record.get("versions", {}), describe_versions()
        names = [name for name in now if name != "python" and name in before and before[name] != now[name]]
        changes = [f"{name} {before[name] or '(none)'}, now {now[name] or '(none)'}" for name in names]
        commits = [str(one.get("commit", ""))[:10] for one in (self._record.get("checkout", {}), describe_checkout())]
        if all(commits) and commits[0] != commits[1]:
            changes.append(f"bfpo at commit {commits[0]}, now {commits[1]}")
        if changes:
            _log.warning(
                "%s: continues with other versions than before: %s; what follows may differ from an uninterrupted run",
                self.path,
                "; ".join(changes),
            )

    # Status and the record

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
        """The status of the run; `running` without a running process means that it was killed."""
        status: Status = self._record["status"]
        return status

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self._record.get("status") == "finished"

    @property
    def record(self) -> dict[str, Any]:
        """A copy of the content of `run.json`."""
        copy: dict[str, Any] = json.loads(json.dumps(self._record))
        return copy

    def set_status(self, status: Status, error: str | None = None) -> None:
        """Write the status and, for a failure, its message."""
        if status not in get_args(Status):
            raise RunError(f"status: got {status!r}; allowed: {', '.join(get_args(Status))}")
        self._record.pop("error", None)
        self.add_facts(status=status, **({"error": error} if error else {}))

    def add_facts(self, **facts: Any) -> None:
        """Set keys of `run.json` to JSON values."""
        self._record.update(hide_in_values(facts))
        self._record["updated"] = _now()
        self._record["seconds"] = round(self._seconds_before + time.monotonic() - self._started, 3)
        used = joules_since(self._joules_at_start)
        if used is not None and self._joules_before is not None:
            self._record["gpu_joules"] = round(self._joules_before + used, 1)
        else:
            self._record.pop("gpu_joules", None)
        self.write_json(_RECORD, self._record)

    def add_data(self, name: str, files: str | Path | Sequence[str | Path]) -> None:
        """Record the SHA-256 and size of the files of one input, such as `data`; a folder stands for its files.

        Of a file that another run wrote, the sources of that run and their licences are recorded too. A file on the hub
        is not read: its digest is what the hub says (`remote_facts`), asked for once.

        Raises `RunError` if a file cannot be read, or if the files of a resumed run have changed since its start.
        """
        earlier = self._record.get("data", {})
        facts: dict[str, dict[str, Any]] = {}
        for path in expand_files([files] if isinstance(files, (str, Path)) else files):
            place = file_name(path)
            before = earlier.get(name, {}).get(place)
            if is_remote(path):
                facts[place] = before or remote_facts(path)  # at a commit, whose files do not change
                continue
            if path.exists() and not path.is_file():
                raise RunError(f"{path}: is a pipe or a device; {name} is read from files")
            try:
                now = facts[place] = {"sha256": file_digest(path), "bytes": Path(path).stat().st_size}
            except OSError as error:
                raise RunError(f"{path}: cannot be read ({error.strerror}); check {name}") from error
            before = before or now
            if before != now:
                raise RunError(
                    f"{path}: changed since this run started (SHA-256 {before['sha256'][:12]}, now "
                    f"{now['sha256'][:12]}); restore the earlier file, or start a new run in another --out"
                )
        moved = sorted(facts.keys() ^ earlier.get(name, facts).keys())
        if moved:
            raise RunError(
                f"{name}: {', '.join(moved)} added or removed since this run started; restore the folder, or start a "
                "new run in another --out"
            )
        sources = [source for path, fact in facts.items() for source in prepared_from(path, content_digest(fact))]
        for file in facts:
            run = None if is_remote(file) else run_above(file)
            if run is not None and run.resolve() != self.path.resolve():
                sources += _sources_of(run, file)
        self._add_sources(name, sources)
        self.add_facts(data={**earlier, name: facts})

    def add_start(self, model: str) -> None:
        """Record the sources of the data on which the model that a training starts from was trained, as `start`."""
        run = run_of_model(model)
        self._add_sources("start", [] if run is None else _sources_of(run))

    def _add_sources(self, name: str, sources: Sequence[Mapping[str, Any]]) -> None:
        if sources:
            unique = list({source["name"]: source for source in sources}.values())
            self.add_facts(sources={**self._record.get("sources", {}), name: unique})

    def add_weights(self, model: str) -> None:
        """Record the hash of a model's files (`weights_digest`), which is not known of a model of the hub.

        Raises `RunError` if those of a resumed run have changed since its start. One that began before they were
        recorded goes on without.
        """
        earlier = self._record.get("weights")
        if not self.is_writer or earlier is None or (now := weights_digest(model)) is None:
            return
        before = earlier.get(model, now)
        if before != now:
            raise RunError(
                f"{model}: the files of this model changed since this run started (hash {before[:12]}, now "
                f"{now[:12]}); restore them, or start a new run in another --out"
            )
        self.add_facts(weights={**earlier, model: now})

    # Files

    def file(self, name: str) -> Path:
        """Return the path of a file of this run; raises `RunError` for a name that leaves the folder."""
        return self._inside(name)

    def _inside(self, name: str) -> Path:
        if (reason := reason_outside(name)) is not None:
            raise RunError(
                f"{self.path}: the file name {name!r} is not allowed: {reason}; names stay inside the run folder"
            )
        return self.path / name

    def folder(self, name: str) -> Path:
        """Return a subfolder of this run, such as `checkpoints` or `model`; the writer creates it.

        Another process could be first, and a new run refuses a folder that holds something.
        """
        path = self._inside(name)
        if self.is_writer:
            path.mkdir(parents=True, exist_ok=True)
        return path

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file atomically. Returns its path. Raises `DiskFullError` or `RunError`."""
        path = self._inside(name)
        if self.is_writer:
            try:
                write_bytes_whole(path, content)
            except OSError as error:
                raise self.write_error(path, error) from error
        return path

    def write_error(self, path: Path, error: OSError) -> RunError:
        """Return the error for a file that cannot be written: `DiskFullError`, or `RunError` with the reason."""
        if is_disk_full(error):
            return self.disk_full(path)
        return RunError(f"{path}: cannot be written ({error.strerror}); check --out, permissions and free space")

    def disk_full(self, path: Path) -> DiskFullError:
        """Return the error for a file that does not fit on the disk: how much is free, what is saved, what to do."""
        try:
            free = f"{shutil.disk_usage(self.path).free / 1e6:,.1f} MB free"
        except OSError:
            free = "free space unknown"
        kept = f"; {self.kept}" if self.kept else ""
        return DiskFullError(
            f"{path}: cannot be written, the disk or the quota is full ({free}){kept}. Free some space and continue "
            "with --resume"
        )

    def write_text(self, name: str, text: str) -> Path:
        """Write a UTF-8 text file atomically, Markdown with control characters as symbols. Returns its path."""
        return self.write_bytes(name, (printable(text) if name.endswith(".md") else text).encode("utf-8"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write a record or a JSON value atomically; a number that is not finite becomes null. Returns its path."""
        return self.write_text(name, json.dumps(as_json(value), indent=2, ensure_ascii=False) + "\n")

    def write_jsonl(self, name: str, rows: Iterable[Any]) -> Path:
        """Write records or JSON objects as JSON Lines, as `write_json` does. Returns the path."""
        return self.write_text(name, "".join(json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows))

    def read_json(self, name: str) -> Any:
        """Return the value of a JSON file of this run; raises `RunError` if it is missing or not JSON."""
        return _read_json(self._inside(name))

    # Metrics

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; a number that is not finite becomes null."""
        if not self.is_writer:
            return
        line = (json.dumps(as_json(row), ensure_ascii=False) + "\n").encode("utf-8")
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
            raise self.write_error(path, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`; incomplete rows, left by a killed run, are skipped."""
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
        """Reset `metrics.jsonl` to these rows, those of the checkpoint from which a resumed run continues.

        A row that equals the one on disk keeps the disk's order of keys.
        """
        wanted: list[dict[str, Any]] = [as_json(row) for row in rows]
        if self.is_writer and (wanted or (self.path / _METRICS).exists()):
            on_disk = self.read_metrics()[: len(wanted)]
            pairs = zip_longest(wanted, on_disk)
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
        of_model: bool = False,
    ) -> Path:
        """Write `README.md`: remarks, the stage's own sections, then settings, data and versions. Returns its path.

        `head` replaces the model's metadata. `of_model`: also as the card in `model/`. Absolute paths are shortened, so
        that a card names no place on this machine; `run.json` has them whole.
        """
        remarks = "\n".join(f"- {remark['text']}." for remark in self._record.get("remarks", ()))
        data = {
            f"{name}: {path}": f"{'SHA-256' if 'sha256' in fact else 'git SHA-1'} {content_digest(fact)}, "
            f"{fact['bytes']} bytes"
            for name, files in self._record.get("data", {}).items()
            for path, fact in files.items()
        }
        sources = describe_sources(self._record.get("sources", {}))
        versions = {**self._record.get("versions", {}), **self._record.get("checkout", {})}
        common: dict[str, CardSection] = {
            "Settings": dict(flat_settings(self.config)),
            "Data": data,
            "Sources of the data": sources,
            "Versions": versions,
        }
        sections = {"Remarks": remarks, **sections, **common}
        rows = [row for rows in self._record.get("sources", {}).values() for row in rows]
        if head is None:
            head = model_head(base_model, tags, [row["hub_id"] for row in rows if row["hub_id"]])
            head |= {"pipeline_tag": "text-generation"} if of_model else {}
        text = without_places(render_card(title, sections, head=head), self._places())
        if of_model:
            self.write_text(f"model/{_CARD}", text)
        return self.write_text(_CARD, text)

    def _places(self) -> Iterator[str]:
        """Yield what is known to be a path: the data files, and values of the config that exist here."""
        for files in self._record.get("data", {}).values():
            yield from files
        for _, value in flat_settings(self.config):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and os.path.lexists(item):
                    yield item


def failed_without_output(path: Path) -> bool:
    """Return whether the run in a folder failed before it wrote any output, such as by a wrong setting."""
    if any(item.is_file() and item.name not in (_CONFIG, _RECORD, LOCK) for item in path.rglob("*")):
        return False
    try:
        return bool(json.loads((path / _RECORD).read_text(encoding="utf-8"))["status"] == "failed")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_links(path: Path) -> None:
    """Raise `RunError` for a link in a run folder that leads out of it: a resumed run would write or remove there."""
    root = path.resolve()
    for item in path.rglob("*"):
        if item.is_symlink() and not Path(os.path.realpath(item)).is_relative_to(root):
            raise RunError(
                f"{item}: is a link to {os.path.realpath(item)}, outside the run folder; replace it by what it "
                "names, or make --out itself a link"
            )


_HELD_OUT = ("eval_data", "probe")  # inputs of a training whose rows are not in its model


def _sources_of(run: Path, file: str = "") -> list[dict[str, Any]]:
    """Return the sources of what a run wrote; of `bfpo prepare`, which makes several streams, those of one file."""
    try:
        record = load(RunFile, run / _RECORD)
    except RunError:  # the file of another program
        return []
    stream = f"{Path(file).parent.name} " if record.stage == "prepare" else ""
    inputs = [name for name in record.sources if name.startswith(stream) and name not in _HELD_OUT]
    return [source for name in inputs for source in record.sources[name]]


def _earlier_record(path: Path, stage: str, config: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return the record of the run to be resumed; raises `RunError` as `RunFolder.create` says."""
    if not (path / _RECORD).exists():
        raise RunError(f"{path}: is not empty and holds no run of bfpo; set --out to a new or empty folder")
    record: dict[str, Any] = _read_json(path / _RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("config", {}), dict):
        raise RunError(f"{path / _RECORD}: is not the record of a run; start a new run in another --out")
    known = f"{path}: holds a run of `{record.get('stage')}` ({record.get('status')})"
    if record.get("stage") != stage:
        raise RunError(f"{known}, not of `{stage}`; set --out to a new or empty folder")
    if not resume:
        raise RunError(f"{known}; continue it with --resume, or set --out to a new or empty folder")
    earlier, now = dict(flat_settings(record.get("config", {}))), dict(flat_settings(config))
    absent = "(not set)"
    changes = [
        f"{key} was {earlier.get(key, absent)!r}, now {now.get(key, absent)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key, absent) != now.get(key, absent) and not _may_differ(stage, key, earlier, now)
    ]
    if changes:
        raise RunError(
            f"{path}: cannot resume with another config: {'; '.join(changes)}; "
            f"resume with --config {path / _CONFIG}, or start a new run in another --out"
        )
    if record.get("status") != "finished":
        for key in sorted(key for key in now.keys() & earlier.keys() if _is_threads(key) and now[key] != earlier[key]):
            _log.warning(
                "%s: continues with %s %s, before %s; what follows may differ from an uninterrupted run in its last "
                "digits",
                *(path, key, now[key], earlier[key]),
            )
    return record


def _may_differ(stage: str, key: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a run goes on with another value of a key; `earlier`, `now`: the configs by dotted key."""
    if not FREE.isdisjoint(key.split(".")[:-1]):
        return False
    # A run that began before there was such a key; of `reference` also before those of its forecast were recorded.
    if key not in earlier and (_is_off(now[key]) or stage == "reference"):
        return True
    # No answer depends on who asks and how, no loss of a step on how it is cut or what is recomputed, nothing but
    # rounding on how many do the work, or on what trackers call it.
    return (
        key.rpartition(".")[2] in (*HOW_ASKED, "gradient_checkpointing")
        or _is_threads(key)
        or key.endswith("_per_microbatch")
        or key.partition(".")[0] in ("executor", "processes", "run_name")
        or _found_by_the_command(stage, key, now.get(key))
        or (key == "warmup_steps" and now.get("lr_scheduler_type") == "constant")  # there it was never read
    )


def _is_threads(key: str) -> bool:
    return key.rpartition(".")[2] == "threads"


FREE = frozenset(
    {
        *("chat_template_kwargs", "columns", "harmless_columns", "extra_body", "trainer_args", "where", "parts"),
        *("grid", "at_least", "reference_point", "methods", "harm_shares", "config"),
    }
)
"""Keys that hold a mapping with names of the user's own, none of which is newer than a run."""


def _found_by_the_command(stage: str, key: str, value: object) -> bool:
    """Return whether a run goes on with what it has: batches change no answer, the run records its number type."""
    if key.rpartition(".")[2] in ("batch_size", "pairs_per_batch"):
        return value is None or stage == "generate"
    return key == "dtype" and (stage, value) in (("generate", "auto"), ("redteam", "auto"), ("evaluate", None))


def _is_off(value: object) -> bool:
    # The last five are `bad_rows`, `link`, `anchor_scale` and `optim` of every run before, and `attention` of `sft`.
    off: tuple[object, ...] = ({}, [], "", "stop", "squared", "loss", "adamw_torch_fused", "auto")
    return value is None or value is False or value in off


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RunError(f"{path}: is not valid JSON ({error}); start a new run in another --out") from error


def flat_settings(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping by dotted key; lists of mappings are numbered."""
    for key, item in value.items():
        if isinstance(item, list) and item and all(isinstance(one, Mapping) for one in item):
            item = dict(enumerate(item))
        if isinstance(item, Mapping) and item:
            yield from flat_settings(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def model_head(base_model: str | None = None, tags: Sequence[str] = (), datasets: Sequence[str] = ()) -> dict[str, Any]:
    """Return the metadata of a model's card, as the hub reads it: each tag and data set once.

    A base model in a folder is named by the hub id from which its runs began, if that is known.
    """
    head: dict[str, Any] = {"library_name": "transformers", "tags": list(dict.fromkeys(["bfpo", *tags]))}
    base = None if base_model is None else hub_base(base_model)
    head |= {} if base is None else {"base_model": base}
    return head | ({"datasets": list(dict.fromkeys(datasets))} if datasets else {})


def render_card(title: str, sections: Mapping[str, CardSection], *, head: Mapping[str, Any] | None = None) -> str:
    """Return the card as Markdown, without empty sections. `head`: its metadata, by default that of any model."""
    head = model_head() if head is None else head
    parts = [f"---\n{dump_yaml(dict(head))}---", f"# {title}"]
    for name, content in sections.items():
        if content:
            parts += [f"## {name}", content if isinstance(content, str) else _facts(content)]
    return "\n\n".join(parts) + "\n"


def _facts(facts: Mapping[str, object]) -> str:
    return "\n".join(table(["", ""], ([in_words(name), in_words(value)] for name, value in facts.items())))
