"""Which wheels a machine without a network needs beside torch and transformers, and how large they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bfpo.core.console import show, show_table
from bfpo.core.errors import RunError

__all__ = ["LIMIT", "loads", "needed_wheels", "show_wheels", "wheel_sizes"]

LIMIT = 64 * 2**20
"""Bytes that can usually be carried at once."""

THERE = ("torch", "transformers")
# What a part of the table needs, the most valuable first. Others of bfpo's dependencies are not imported by the kit.
WANTED = {
    "accelerate": "everything",
    "pydantic": "everything",
    "jinja2": "everything",
    "rich": "everything",
    "typer": "everything",
    "pyarrow": "bfpo sft",
    "trl": "TRL's rows",
    "datasets": "TRL's rows",
    "peft": "LoRA",
    "pytest": "the tests marked gpu",
    "hypothesis": "the tests marked gpu",
    "liger-kernel": "TRL with Liger kernels",
    "bitsandbytes": "QLoRA",
}


def needed_wheels(there: Collection[str] = ()) -> dict[str, str]:
    """Return the packages to carry and what each is for: what is wanted with its requirements, without what is there.

    `there`: names of packages that the machine has beside torch, transformers and what these two require. The
    requirements are read from the packages installed here; one that is not installed here counts alone.
    """
    # Only some versions of what transformers requires bring pydantic.
    have = _with_requirements(THERE) - _with_requirements(["pydantic"]) | {canonicalize_name(name) for name in there}
    needed: dict[str, str] = {}
    for name, use in WANTED.items():
        for package in sorted(_with_requirements([name]) - have, key=lambda one: (one != name, one)):
            needed.setdefault(package, use)
    return needed


def _with_requirements(names: Iterable[str]) -> set[str]:
    waiting = [Requirement(name) for name in names]
    found: set[str] = set()
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), tuple(sorted(wanted.extras))
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            one = Requirement(line)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append(one)
    return found


def wheel_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of the wheels in a folder by package."""
    return {canonicalize_name(path.name.split("-")[0]): path.stat().st_size for path in sorted(folder.glob("*.whl"))}


def show_wheels(folder: Path, there: Collection[str], python: str) -> None:
    """Download the wheels of this machine's versions to a folder by pip, show their sizes, and say what fits.

    `python`: the version of the other machine, such as 3.12. Raises `RunError` where pip fails.
    """
    needed = needed_wheels(there)
    folder.mkdir(parents=True, exist_ok=True)
    for name in needed.keys() - wheel_sizes(folder).keys():
        _download(name, folder, python)
    sizes = wheel_sizes(folder)
    placed = loads({name: sizes[name] for name in needed})
    rows = [
        [name, f"{sizes[name] / 2**20:.2f}", use, "above the limit" if placed[name] is None else str(placed[name])]
        for name, use in needed.items()
    ]
    show_table(["wheel", "MiB", "needed for", "load"], rows)
    total = sum(sizes[name] for name, load in placed.items() if load is not None)
    several = max((load for load in placed.values() if load is not None), default=1)
    show(
        f"{total / 2**20:.1f} MiB, in loads of at most {LIMIT / 2**20:.0f} MiB: {several}; install all of them there "
        "before the run: what is missing costs the rows that need it"
    )


def loads(sizes: Mapping[str, int]) -> dict[str, int | None]:
    """Return by package the first load, from 1, that has room for its wheel; `None` for one above the limit alone."""
    totals: list[int] = []
    placed: dict[str, int | None] = {}
    for name, size in sizes.items():
        if size > LIMIT:
            placed[name] = None
            continue
        place = next((i for i, total in enumerate(totals) if total + size <= LIMIT), len(totals))
        totals += [0] if place == len(totals) else []
        totals[place] += size
        placed[name] = place + 1
    return placed


def _download(name: str, folder: Path, python: str) -> None:
    try:
        wanted = f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        wanted = name
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={python}", "--implementation=cp", *platforms, "-d", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"--wheels: pip cannot download {wanted}: {done.stderr.strip()[-500:]}")
