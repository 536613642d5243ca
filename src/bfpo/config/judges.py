"""Who judges completions and who ranks them: a section of keys, or its short form in one word."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from bfpo.config.base import PathText
from bfpo.config.server import SERVER_KEYS, ServerKeys
from bfpo.core.yaml_text import parse_yaml

__all__ = ["JudgeConfig", "RankerConfig"]

_SERVER = SERVER_KEYS | {"api", "temperature"}
_LOCAL = frozenset({"revision", "dtype", "batch_size", "max_length"})
_OFTEN = frozenset({"format", "name", "model"})


class _Asked(ServerKeys):
    """What judges and rankers share."""

    format: str = Field(min_length=1, description="how it is asked and how its answer is read")
    name: str | None = Field(
        default=None, min_length=1, description="name in verdicts and reports; null = from format and model"
    )
    model: PathText | None = Field(default=None, description="model: folder or hub id; null = the format's own")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = Field(
        default=None, description="number type that holds the weights; auto = as saved; null = the format's own"
    )
    batch_size: int = Field(default=16, ge=1, description="number of texts per forward pass")
    max_length: int | None = Field(
        default=None, ge=1, description="longest text in tokens; a longer one is unscored; null = the format's own"
    )
    api: Literal["chat", "completions"] | None = Field(
        default=None, description="endpoint of the server; null = as the format asks"
    )
    temperature: float = Field(
        default=0.0, ge=0, description="sampling temperature of a server's answers; several votes need one above 0"
    )

    def settings(self) -> dict[str, Any]:
        """Return the keys that are read with their values, as plain keyword arguments."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.read()}

    def read(self) -> frozenset[str]:
        """Return the names of the keys that this format reads."""
        if self.format == "oracle":
            return frozenset({"format"})
        if self.format == "refusal-phrases":
            return frozenset({"format", "name"})
        if self.format == "trained":
            return _OFTEN
        where = _LOCAL if self.url is None else _SERVER
        return _OFTEN | where | self._own()

    def _own(self) -> frozenset[str]:
        return frozenset()

    @property
    def title(self) -> str:
        """The format and the model, in a word."""
        shown = self.format if self.model is None else f"{self.format}:{self.model}"
        return self.name or (shown if self.url is None else f"{shown} at {self.url}")

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: object) -> object:
        return _mapping_of(value) if isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _no_key_in_vain(self) -> _Asked:
        idle = sorted(self.model_fields_set - self.read())
        if idle:
            where = (
                ""
                if self.format in ("oracle", "refusal-phrases", "trained")
                else " with url"
                if self.url
                else " without url"
            )
            raise ValueError(f"{', '.join(idle)}: not read by {self.format!r}{where}; leave it out")
        if self.format in ("trained", "classifier", "pairwise") and self.model is None:
            raise ValueError(f"model: missing; {self.format!r} needs one: a folder, or a hub id")
        if self.url is not None and self.format in ("classifier", "reward-model", "pairrm"):
            raise ValueError(f"url: {self.format!r} cannot be asked over a server that writes text; leave url out")
        if self.url is not None and self.model is None:
            raise ValueError("model: missing; with url it is the name that the server gives its model")
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.read()}


class JudgeConfig(_Asked):
    """A judge of safety; short: `oracle`, a folder of `bfpo judge-train`, `FORMAT`, `FORMAT:MODEL`, a .yaml file."""

    format: str = Field(
        min_length=1,
        description="oracle, refusal-phrases, trained, classifier, or how a guard is asked, such as qwen3guard",
    )
    threshold: float = Field(default=0.5, gt=0, lt=1, description="a text is safe where p(safe) is at least this")
    controversial: Literal["safe", "unsafe", "unscored"] | None = Field(
        default=None, description="what the middle label of qwen3guard counts as; null = unsafe"
    )
    policy: PathText | None = Field(
        default=None, description="text file with the policy of shieldgemma or gpt-oss-safeguard; null = their own"
    )
    criterion: str | None = Field(default=None, description="criterion of granite-guardian; null = harm")
    safe_label: str | int | None = Field(
        default=None, description="a classifier's class that means safe, or its number"
    )
    unsafe_label: str | int | None = Field(default=None, description="in its place, the class that means unsafe")
    text: Literal["pair", "completion"] = Field(
        default="pair", description="what a classifier reads: prompt and completion, or the completion alone"
    )

    def _own(self) -> frozenset[str]:
        if self.format == "classifier":
            return frozenset({"threshold", "safe_label", "unsafe_label", "text"})
        return frozenset({"threshold", "controversial", "policy", "criterion"})

    @model_validator(mode="after")
    def _one_class(self) -> JudgeConfig:
        if self.format == "classifier" and (self.safe_label is None) == (self.unsafe_label is None):
            raise ValueError("safe_label, unsafe_label: exactly one of the two must be given for a classifier")
        return self


class RankerConfig(_Asked):
    """A ranker of helpfulness; short: `oracle`, a folder of `bfpo judge-train`, `pairrm`, `reward-model:MODEL`.

    Also `pairwise:MODEL`, or a .yaml file.
    """

    format: str = Field(
        min_length=1, description="oracle, trained, reward-model, pairrm, or pairwise (a generative model, both orders)"
    )


def _mapping_of(short: str | Path) -> object:
    """Return the keys that a short form stands for; raises `ValueError` for a file that cannot be used."""
    text = str(short)
    if text.lower().endswith((".yaml", ".yml")):
        try:
            value, _ = parse_yaml(Path(text).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"got {text}; the file cannot be read ({error.strerror})") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"got {text}; the file is not valid YAML") from error
        if not isinstance(value, dict):
            raise ValueError(f"got {text}; it must hold a mapping of keys to values")
        return value
    if (Path(text) / "judge.json").is_file():
        return {"format": "trained", "model": text}
    name, colon, model = text.partition(":")
    return {"format": name, "model": model} if colon else {"format": text}
