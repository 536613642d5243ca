"""Settings of judges and rankers: one class for each kind, which also has a short form in one word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from bfpo.core.errors import ConfigError
from bfpo.core.inputs import reason_outside
from bfpo.core.settings import ConfigPart, OneOf, PathText
from bfpo.core.yaml_text import read_yaml
from bfpo.data.settings import TemplateKwargs
from bfpo.generation.settings import BatchSize, ServerSpec, is_openai
from bfpo.judges.formats import FORMAT_SETTINGS

__all__ = [
    "FINDS_NO_HARM",
    "GUARD_KEYS",
    "ClassifierSpec",
    "GuardSpec",
    "JudgeConfig",
    "LocalRankerSpec",
    "LocalSpec",
    "OracleRankerSpec",
    "OracleSpec",
    "RankerConfig",
    "RefusalSpec",
    "ServedGuardSpec",
    "ServedRankerSpec",
    "TrainedRankerSpec",
    "TrainedSpec",
    "loads_model",
]


GUARD_KEYS = ("controversial", "policy", "criterion", "behaviour", "context")
"""Keys of single guard formats, in the order in which they are checked."""

FINDS_NO_HARM = "refusal-phrases finds refusals, not harm; name a judge of safety"
"""Why `RefusalSpec` judges no safety."""


class _Named(ConfigPart):
    name: str | None = Field(
        default=None, min_length=1, description="name in verdicts and reports; null = from format and model"
    )


class _Trained(_Named):
    model: PathText = Field(description="folder `model` of a run of `bfpo judge-train`")


class LocalSpec(_Named):
    """A model that is loaded on this machine."""

    model: PathText | None = Field(default=None, description="model: folder or hub id; null = the format's own")
    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = Field(
        default=None, description="number type that holds the weights; auto = as saved; null = the format's own"
    )
    batch_size: BatchSize = None
    max_length: int | None = Field(
        default=None, ge=1, description="longest text in tokens; a longer one is unscored; null = the format's own"
    )


class _Served(_Named, ServerSpec):
    """A model behind a server."""

    model: PathText = Field(description="model: the name that the server gives it")
    api: Literal["chat", "completions"] | None = Field(
        default=None, description="endpoint of the server; null = as the format asks"
    )
    temperature: float = Field(
        default=0.0, ge=0, description="sampling temperature of a server's answers; several votes need one above 0"
    )
    max_answer_tokens: int | None = Field(
        default=None,
        ge=1,
        description="longest answer of the judge in tokens, with the thoughts of one that thinks; null = the format's",
    )


class _ByFormat(OneOf):
    """The short forms of judges and rankers."""

    chosen_by: ClassVar[str] = "format"

    format: str = Field(min_length=1)

    @classmethod
    def called(cls, values: Mapping[str, Any]) -> str:
        """Return the format as given, of a guard or ranker also whether it has a url."""
        return super().called(values) + (f" {cls.mode}" if cls.mode in ("with url", "without url") else "")

    @property
    def source(self) -> str | None:
        """The judge's model, if it has one."""
        model: str | None = getattr(self, "model", None)
        return model

    @property
    def title(self) -> str:
        """The format and the model as a short name."""
        shown = self.format if self.source is None else f"{self.format}:{self.source}"
        at = f" at {self.url}" if isinstance(self, ServerSpec) else ""
        return getattr(self, "name", None) or f"{shown}{at}"

    @classmethod
    def spelled_out(cls, value: Any) -> Any:
        """Return the keys of a short form; raises `ValueError` for a file that cannot be used."""
        return _mapping_of(str(value)) if isinstance(value, (str, Path)) else value


_READ_FILES = ("phrases", "policy")
"""Keys that name a file of text."""
_ALLOWED = (
    "allowed: a file in the folder of the judge's file, or any path where the keys of the judge are in the config"
)


def _beside(file: Path, key: str, name: object) -> object:
    """Return the path of a file that a judge's file names: in its folder, since the judge may be somebody else's."""
    if not isinstance(name, str):
        return name
    if (reason := reason_outside(name)) is not None:
        raise ValueError(f"got {file}, whose {key} is {name!r}: {reason}; {_ALLOWED}")
    found = file.parent / name
    if not found.resolve().is_relative_to(file.parent.resolve()):
        raise ValueError(f"got {file}, whose {key} {name!r} is a link out of its folder; {_ALLOWED}")
    return str(found)


def _check_key(file: Path, judge: Mapping[str, object]) -> None:
    """Raise `ValueError` if a judge's file, which may be somebody else's, chooses the key that its server gets."""
    name, url = judge.get("api_key_env"), judge.get("url")
    if name is None or (name == "OPENAI_API_KEY" and isinstance(url, str) and is_openai(url)):
        return
    raise ValueError(
        f"got {file}, which sets api_key_env: a file of its own may not choose which key goes to its url; allowed: "
        "OPENAI_API_KEY for https://api.openai.com. Write the keys of the judge into your config, or use --set"
    )


def _mapping_of(text: str) -> object:
    if text.lower().endswith((".yaml", ".yml")):
        try:
            value, _ = read_yaml(text, "the judge")
        except ConfigError as error:
            raise ValueError(f"got {text}; {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"got {text}; it must hold a mapping of keys to values")
        _check_key(Path(text), value)
        return {key: _beside(Path(text), key, item) if key in _READ_FILES else item for key, item in value.items()}
    if (Path(text) / "judge.json").is_file():
        return {"format": "trained", "model": text}
    name, colon, model = text.partition(":")
    return {"format": name, "model": model} if colon else {"format": text}


# ------------------------------------------------------------------------------------------------------------ judges


class JudgeConfig(_ByFormat):
    """A judge of safety; short: `oracle`, a folder of `bfpo judge-train`, `FORMAT`, `FORMAT:MODEL`, a .yaml file."""

    format: str = Field(
        min_length=1,
        description="oracle, refusal-phrases, trained, classifier, or how a guard is asked, such as qwen3guard",
    )

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the format, or for a guard's format whether it runs here or on a server."""
        format = values.get("format")
        if format in ("oracle", "refusal-phrases", "trained", "classifier"):
            return str(format)
        return "without url" if values.get("url") is None else "with url"


class OracleSpec(JudgeConfig, mode="oracle"):
    """The exact rules of the closed world of `bfpo demo`."""

    format: str = "oracle"


class RefusalSpec(JudgeConfig, _Named, mode="refusal-phrases"):
    """Rules that find refusals in English answers."""

    format: str = "refusal-phrases"
    phrases: PathText | None = Field(
        default=None,
        description="text file of more phrases of refusals, one a line; /regular expressions/ in slashes; null = none",
    )


class TrainedSpec(JudgeConfig, _Trained, mode="trained"):
    """A judge of `bfpo judge-train`."""

    format: str = "trained"
    threshold: float | None = Field(
        default=None, gt=0, lt=1, description="p(safe) from which on a text is safe; null = as training chose"
    )
    base_model: PathText | None = Field(
        default=None,
        description="the language model whose hidden states a judge of kind probe reads, with the weights of the "
        "training: folder or hub id; null = where training had it",
    )


class _Threshold(ConfigPart):
    threshold: float = Field(default=0.5, gt=0, lt=1, description="a text is safe where p(safe) is at least this")


class ClassifierSpec(JudgeConfig, LocalSpec, _Threshold, mode="classifier"):
    """Any sequence classifier, given its safe or its unsafe class."""

    format: str = "classifier"
    model: PathText = Field(description="model: folder or hub id")
    safe_label: str | int | None = Field(
        default=None, description="a classifier's class that means safe, or its number"
    )
    unsafe_label: str | int | None = Field(default=None, description="in its place, the class that means unsafe")
    windows: bool = Field(
        default=False,
        description="an answer that is too long is read in overlapping windows, and the least safe one counts; false = "
        "it is unscored",
    )
    text: Literal["pair", "completion"] = Field(
        default="pair", description="what a classifier reads: prompt and completion, or the completion alone"
    )

    @model_validator(mode="after")
    def _one_class(self) -> ClassifierSpec:
        if (self.safe_label is None) == (self.unsafe_label is None):
            raise ValueError("safe_label, unsafe_label: exactly one of the two must be given for a classifier")
        return self


class _GuardKeys(_Threshold):
    """Keys of single guard formats (`FORMAT_SETTINGS`)."""

    format: str
    controversial: Literal["safe", "unsafe", "unscored"] | None = Field(
        default=None, description="what the middle label of qwen3guard counts as; null = unsafe"
    )
    policy: PathText | None = Field(
        default=None,
        description="text file with the policy of gpt-oss-safeguard, or with the principles of shieldgemma, each after "
        "'* ' and asked about alone; null = their own",
    )
    criterion: str | None = Field(
        default=None, description="criterion of granite-guardian, for 4.1 a sentence too; null = harm"
    )
    behaviour: str | None = Field(
        default=None, min_length=1, description="the behaviour that harmbench-contextual looks for; null = our wording"
    )
    context: str | None = Field(
        default=None, description="context of harmbench-contextual, with {prompt} for the prompt; null = {prompt}"
    )

    @model_validator(mode="after")
    def _keys_of_the_format(self) -> _GuardKeys:
        for key in GUARD_KEYS:
            readers = [name for name, keys in FORMAT_SETTINGS.items() if key in keys]
            if getattr(self, key) is not None and self.format in FORMAT_SETTINGS and self.format not in readers:
                raise ValueError(f"{key}: not a key of {self.format!r}; it belongs to {', '.join(map(repr, readers))}")
        return self


class GuardSpec(JudgeConfig, LocalSpec, _GuardKeys, mode="without url", words="a guard without url"):
    """A guard model that is loaded on this machine."""

    chat_template_kwargs: TemplateKwargs = Field(default={})


class ServedGuardSpec(JudgeConfig, _Served, _GuardKeys, mode="with url", words="a guard with url"):
    """A guard model behind a server."""


def loads_model(spec: JudgeConfig | RankerConfig | None) -> bool:
    """Return whether a judge or ranker is a neural model that is loaded here, which several workers can share out."""
    if not isinstance(spec, TrainedSpec):
        return isinstance(spec, LocalSpec)
    try:
        kind = json.loads((Path(spec.model) / "judge.json").read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # reported where the judge is made
        return False
    return kind in ("classifier", "probe")


# ----------------------------------------------------------------------------------------------------------- rankers


class RankerConfig(_ByFormat):
    """A ranker of helpfulness; short: `oracle`, a folder of `bfpo judge-train`, `pairrm`, `reward-model:MODEL`.

    Also `pairwise:MODEL`, or a .yaml file.
    """

    format: str = Field(
        min_length=1, description="oracle, trained, reward-model, pairrm, or pairwise (a generative model, both orders)"
    )

    @classmethod
    def mode_of(cls, values: Mapping[str, Any]) -> str:
        """Return the format, or for a model's format whether it runs here or on a server."""
        format = values.get("format")
        if format in ("oracle", "trained"):
            return str(format)
        return "without url" if values.get("url") is None else "with url"


class OracleRankerSpec(RankerConfig, mode="oracle"):
    """The exact order of the closed world of `bfpo demo`."""

    format: str = "oracle"


class TrainedRankerSpec(RankerConfig, _Trained, mode="trained"):
    """A ranker of `bfpo judge-train`."""

    format: str = "trained"


class LocalRankerSpec(RankerConfig, LocalSpec, mode="without url", words="a model without url"):
    """A reward model, PairRM or a generative model that is loaded here."""

    chat_template_kwargs: TemplateKwargs = Field(default={})

    @model_validator(mode="after")
    def _generative_has_a_model(self) -> LocalRankerSpec:
        if self.format == "pairwise" and self.model is None:
            raise ValueError("model: missing; 'pairwise' needs one: a folder, or a hub id")
        if self.format == "pairrm" and self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs: 'pairrm' has no chat template; leave it out")
        return self


class ServedRankerSpec(RankerConfig, _Served, mode="with url", words="a model with url"):
    """A generative model behind a server."""

    @model_validator(mode="after")
    def _writes_text(self) -> ServedRankerSpec:
        if self.format != "pairwise":
            raise ValueError(f"url: a server writes text, and {self.format!r} reads none; allowed with url: 'pairwise'")
        return self
