"""Settings of the workers that share a command's work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bfpo.core.settings import ConfigPart, OneOf

__all__ = ["Executed", "ExecutedRuns", "ExecutorConfig", "LocalExecutor", "RayExecutor", "workers_on"]


class ExecutorConfig(OneOf):
    """Workers that share the work: processes of this machine, or actors of a Ray cluster. The output is the same."""

    chosen_by: ClassVar[str] = "backend"

    backend: Literal["local", "ray"] = Field(
        default="local", description="where the workers are: processes of this machine, or a Ray cluster (extra ray)"
    )
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="number of workers; auto = one per GPU, without GPUs 1 (on ray one per node), of `sweep` one per "
        "core; of `bfpo prepare`, `compare` and `demo` one per core",
    )
    gpus_per_worker: float | None = Field(
        default=None,
        ge=0,
        description="GPUs of a worker; below 1 several share one; null = 1 where there are GPUs, none for `bfpo "
        "prepare`, `compare` and `demo`",
    )

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the back end."""
        return "ray" if values.get("backend") == "ray" else "local"

    @model_validator(mode="after")
    def _whole_gpus(self) -> ExecutorConfig:
        gpus = self.gpus_per_worker
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            raise ValueError(f"gpus_per_worker: got {gpus:g}; allowed: a whole number, or one below 1")
        return self


class LocalExecutor(ExecutorConfig, mode="local"):
    """Processes of this machine; a single worker is this process."""


class RayExecutor(ExecutorConfig, mode="ray"):
    """Actors of a Ray cluster that runs."""

    address: str | None = Field(
        default=None,
        min_length=1,
        description="address of the cluster, as HOST:6379; null = RAY_ADDRESS, else the cluster that runs here",
    )
    cpus_per_worker: int = Field(default=1, ge=1, description="CPU cores of a worker, which are also its threads")


class Executed(ConfigPart):
    """The key of commands whose work is shared by workers."""

    executor: ExecutorConfig = Field(
        default=LocalExecutor(),
        description="workers that share the work: how many, on this machine or on a Ray cluster; changes no output",
    )

    several_gpus: ClassVar[bool] = False
    """Whether a worker can use more than one GPU."""

    @model_validator(mode="after")
    def _gpus_that_are_used(self) -> Executed:
        gpus = self.executor.gpus_per_worker
        if gpus is not None and gpus > 1 and not self.several_gpus:
            raise ValueError(
                f"executor.gpus_per_worker: got {gpus:g}; allowed: at most 1, since a model is on one GPU here "
                "(several are used by `bfpo generate` with engine vllm)"
            )
        return self


class ExecutedRuns(Executed):
    """The same for commands that had the key `processes` for it, which their earlier configs still hold."""

    @model_validator(mode="before")
    @classmethod
    def _processes_are_workers(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "processes" not in values:
            return values
        values = dict(values)
        given = values.pop("processes")
        if given is not None and "executor" in values:
            raise ValueError("processes: was replaced by executor.workers, which is given too; leave processes out")
        return values if given is None else {**values, "executor": {"workers": given}}


def workers_on(gpus: float, each: float) -> int:
    """Return how many workers that take `each` GPUs fit some GPUs; one that takes a share is on one GPU alone."""
    return int(gpus) * int(1 / each + 1e-9) if each < 1 else int(gpus / each)
