"""Exceptions that `bfpo` raises on purpose; each also derives from the matching built-in exception."""

from __future__ import annotations

from pathlib import Path

from bfpo.core.console import one_line
from bfpo.core.remote import file_name

__all__ = [
    "BfpoError",
    "ConfigError",
    "DataError",
    "DiskFullError",
    "HeldError",
    "LabelError",
    "MissingExtraError",
    "ModelError",
    "RunError",
    "ServerError",
    "SettingError",
    "StopRequest",
    "TrainingError",
    "WorkerError",
    "first_line",
]


class BfpoError(Exception):
    """Base of all errors raised on purpose; the command line prints the message and exits with `exit_code`."""

    exit_code: int = 2


class ConfigError(BfpoError, ValueError):
    """A config file or a `--set` value that cannot be used; names the file and the key."""


class SettingError(BfpoError, ValueError):
    """A setting outside its range, such as `beta <= 0`."""


class LabelError(BfpoError, ValueError):
    """A safety label that is outside [0, 1], or unknown where it is required."""


class DataError(BfpoError, ValueError):
    """Data that cannot be used; the message starts with `file:line` if they are known."""

    @classmethod
    def at(cls, file: str | Path, line: int | None, message: str) -> DataError:
        """Return an error whose message starts with `file:line: ` (without a line: `file: `)."""
        name = one_line(file_name(file))
        location = name if line is None else f"{name}:{line}"
        return cls(f"{location}: {message}")


class ModelError(BfpoError, ValueError):
    """A model, tokenizer or choice of trainable parameters that cannot be used."""


class RunError(BfpoError, RuntimeError):
    """A run folder that cannot be written to, read or resumed."""


class HeldError(RunError):
    """A run folder that another process writes to; `on_another_host`: nobody can say if that one still runs."""

    on_another_host = False


class DiskFullError(RunError):
    """A full disk or quota; the message says what is saved and how to continue."""

    exit_code = 1


class WorkerError(RunError):
    """Workers that die again and again, or of which none starts; says how to continue."""

    exit_code = 1


class MissingExtraError(BfpoError, ImportError):
    """An optional dependency that is not installed; names the extra that provides it."""


class TrainingError(BfpoError, RuntimeError):
    """A training run that must stop, such as one whose first loss is not the value that its labels imply."""

    exit_code = 1


class ServerError(BfpoError, RuntimeError):
    """A server that refuses or does not answer, or a spent request limit; says what is kept and how to continue."""

    exit_code = 1


class StopRequest(KeyboardInterrupt):
    """A SIGTERM, handled like Ctrl-C; the command line exits with 143."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if it has none; for errors of other packages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
