"""Provenance of a run: versions, platform, git commit, data sources. Environment variables are never recorded."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

from bfpo._version import __version__
from bfpo.core.files import file_digest

__all__ = [
    "Remark",
    "RunFile",
    "content_digest",
    "describe_checkout",
    "describe_platform",
    "describe_sources",
    "describe_versions",
    "documents_folder",
    "hub_base",
    "model_in",
    "model_name",
    "prepared_from",
    "run_above",
    "run_digest",
    "run_of_model",
    "weights_digest",
]

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Remark:
    """What a training did or did not do, in one sentence; `code` names the kind. `level`: warning, or note."""

    code: str
    text: str
    level: Literal["warning", "note"] = "warning"


@dataclass(frozen=True, slots=True)
class RunFile:
    """What readers take from `run.json`, to which every stage adds facts of its own.

    `data`: input -> file -> its hash and size. `sources`: input -> the data sets that it is made of. `completions`:
    what `bfpo generate` counted. `remarks`: on a training that has ended. `model_runs`: path of a model in the config
    -> `run_digest` of the run that it is from. `weights`: path of a model that was asked or trained -> its
    `weights_digest`. `judges`: suite, or "completions" -> versions of the judges of its answers; "guard", "ranker" ->
    those of the guard and of the ranker of all suites.
    """

    OPEN: ClassVar[bool] = True

    stage: str = "unknown"
    status: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    completions: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, Any] = field(default_factory=dict)
    model_runs: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    judges: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    created: str = ""
    updated: str = ""
    seconds: float | None = None
    gpu_joules: float | None = None
    error: str = ""
    remarks: list[Remark] = field(default_factory=list)


def describe_versions() -> dict[str, str | None]:
    """Return the versions of Python, bfpo and the packages that affect its numbers; `None` if not installed.

    Reads metadata only; imports none of them.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "bfpo": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def run_above(path: str | Path, levels: int = 4) -> Path | None:
    """Return the run folder that a file or a model is in, at most `levels` folders up; `None` if there is none."""
    here = Path(path)
    return next(
        (folder for folder in [here, *here.absolute().parents][:levels] if (folder / "run.json").is_file()), None
    )


def run_of_model(model: str) -> Path | None:
    """Return the run folder that a model is in; `None` for an id of the hub."""
    return run_above(model) if Path(model).is_dir() else None


def model_in(model: str) -> str:
    """Return the folder `model` of a run folder that is given in place of its model; any other name unchanged."""
    folder = Path(model)
    is_run = (folder / "run.json").is_file() and not (folder / "config.json").is_file()
    return str(folder / "model") if is_run else model


def model_name(model: str) -> str:
    """Return a short name of a folder or hub id: its last part; of the folder `model` of a run that of the run."""
    if not Path(model).is_dir():
        return Path(model).name
    path = Path(model_in(model)).absolute()
    return path.parent.name if path.name == "model" and (path.parent / "run.json").is_file() else path.name


def hub_base(model: str) -> str | None:
    """Return the hub id from which a model began, through the runs that trained it; `None` if that is not known."""
    for _ in range(20):  # a chain of runs; one that names itself must end, too
        if not Path(model).is_dir():
            return model if model.count("/") < 2 and not model.startswith((".", "~", "/")) else None
        run = run_of_model(model_in(model))
        try:
            config = {} if run is None else json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
            model = config["model"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        if not isinstance(model, str):
            return None
    return None


def run_digest(run: RunFile) -> str:
    """Return a hash of a run's stage, time of creation, config and data, which a move keeps; "" without a time."""
    if not run.created:
        return ""
    parts = [run.stage, run.created, run.config, run.data]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")


def weights_digest(model: str) -> str | None:
    """Return a hash of the files of a model's folder: weights, configs, tokenizer, chat template; `None` for a hub id.

    Raises `OSError` for a file that cannot be read.
    """
    folder = Path(model)
    files = sorted(file for file in folder.glob("*") if file.suffix in _MODEL_FILES) if folder.is_dir() else []
    if not any(file.suffix == ".safetensors" for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(f"{file.name} {_digest_of(str(file), facts.st_size, facts.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)  # an evaluation asks a model once for each way of sampling
def _digest_of(file: str, size: int, changed: int) -> str:
    return file_digest(file)


def content_digest(fact: Mapping[str, Any]) -> str:
    """Return the digest of a data file in `run.json`; of some on the hub git's own is known, and no SHA-256."""
    return str(fact.get("sha256") or fact["git_sha1"])


def prepared_from(file: str | Path, sha256: str) -> list[dict[str, Any]]:
    """Return the sources of a file made by `bfpo prepare`: name, licence, hub id and revision, from its manifest.

    Empty if there is no manifest that lists the file with this hash.
    """
    path = Path(file).absolute()
    try:
        manifest = json.loads((path.parents[1] / "manifest.json").read_text(encoding="utf-8"))
        stream = path.parent.name
        if manifest["files"][f"{stream}/{path.name}"]["sha256"] != sha256:
            return []
        names = ("name", "licence", "hub_id", "revision")
        return [{name: row[name] for name in names} for row in manifest["sources"] if row["stream"] == stream]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []


def describe_sources(inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return the sources of each input as rows for a card."""
    return {
        f"{name}: {source['name']}": f"licence {source['licence'] or 'unknown'}, {source['hub_id'] or 'own files'}"
        + (f" at {source['revision']}" if source["revision"] else "")
        for name, sources in inputs.items()
        for source in sources
    }


def describe_platform() -> dict[str, str | int | None]:
    """Return the operating system, the machine type and the number of CPU cores."""
    return {"system": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count()}


def documents_folder() -> Path:
    """Return the folder with `docs`, `recipes` and `examples`, which messages name: a clone, or of the environment."""
    clone = Path(__file__).resolve().parents[3]
    return clone if (clone / "docs").is_dir() else Path(sysconfig.get_path("data")) / "share" / "doc" / "bfpo"


def describe_checkout() -> dict[str, str | bool]:
    """Return the git commit of the package and whether tracked files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[3]  # above src/bfpo/core
    if not (root / ".git").exists():
        return {}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "changed": changed}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
