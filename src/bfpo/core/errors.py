"""The kinds of error that `bfpo` raises on purpose; each is also the standard type it stands for."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "BfpoError",
    "ConfigError",
    "DataError",
    "DiskFullError",
    "LabelError",
    "MissingExtraError",
    "ModelError",
    "RunError",
    "ServerError",
    "SettingError",
    "StopRequest",
    "TrainingError",
]


class BfpoError(Exception):
    """Base of every error raised on purpose; the command line prints its text and exits with `exit_code`."""

    exit_code: int = 2


class ConfigError(BfpoError, ValueError):
    """A config file or a `--set` value that cannot be used; names the file and the key."""


class SettingError(BfpoError, ValueError):
    """A setting outside its range, such as `beta <= 0`."""


class LabelError(BfpoError, ValueError):
    """A safety label that is unknown or outside [0, 1] where it must be known."""


class DataError(BfpoError, ValueError):
    """Data that cannot be used; the text starts with `file:line` where there is one."""

    @classmethod
    def at(cls, file: str | Path, line: int | None, message: str) -> DataError:
        """Return an error whose text starts with the place, `file:line: `."""
        place = f"{file}:{line}" if line is not None else f"{file}"
        return cls(f"{place}: {message}")


class ModelError(BfpoError, ValueError):
    """A model, tokenizer or choice of trainable parameters that cannot be used."""


class RunError(BfpoError, RuntimeError):
    """A run folder that cannot be written to, read or resumed."""


class DiskFullError(RunError):
    """A disk or quota that is full; says what is safe and how to go on."""

    exit_code = 1


class MissingExtraError(BfpoError, ImportError):
    """An optional dependency that is not installed; names the extra that brings it."""


class TrainingError(BfpoError, RuntimeError):
    """A training run that must not go on, such as a first loss that the labels do not imply."""

    exit_code = 1


class ServerError(BfpoError, RuntimeError):
    """A server that refuses, does not answer, or may not be asked any more; says what is kept and how to go on."""

    exit_code = 1


class StopRequest(KeyboardInterrupt):
    """A request to stop from outside (SIGTERM), handled like Ctrl-C; the command line exits with 143."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, its kind where it has none: for errors of other packages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
