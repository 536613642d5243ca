"""Who judges completions and who ranks them: a section of keys, or its short form in one word."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from bfpo.core.secrets import looks_secret
from bfpo.core.settings import ConfigPart, FileList, PathText, StageConfig
from bfpo.core.yaml_text import parse_yaml

__all__ = [
    "SERVER_KEYS",
    "JudgeCheckConfig",
    "JudgeConfig",
    "JudgeTrainConfig",
    "LabelledConfig",
    "MaxRequests",
    "RankerConfig",
    "ServerKeys",
]

MaxRequests = Annotated[
    int | None,
    Field(ge=1, description="most requests to servers, those sent again too, per start; null = no limit"),
]
"""A budget of requests; of a whole stage, however many servers it asks."""


class ServerKeys(ConfigPart):
    """Where a server is, its key, and how it is asked; a key or a password in the wrong place is refused unseen."""

    url: str | None = Field(
        default=None,
        description="base URL of an OpenAI-compatible server, such as http://localhost:8000/v1; null = none is asked",
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="NAME of the environment variable that holds the server's key"
    )
    timeout: float = Field(default=60.0, gt=0, description="seconds that one request to the server may take")
    max_concurrency: int = Field(default=8, ge=1, description="most requests to the server at once")
    max_retries: int = Field(
        default=5, ge=0, description="times that a request is sent again after a fault of the server or the network"
    )

    @model_validator(mode="after")
    def _no_secret_and_a_usable_url(self) -> ServerKeys:
        if looks_secret(self.api_key_env):
            raise ValueError(
                "api_key_env: got something that is not the NAME of an environment variable (capitals, digits and _, "
                "such as OPENAI_API_KEY); put the key itself into that variable, never into a setting"
            )
        if self.url is not None:
            _check_url(self.url)
        return self


SERVER_KEYS = frozenset(ServerKeys.model_fields)


def _check_url(url: str) -> None:
    """Raise `ValueError`, without what may be a password, for a base URL that cannot be used."""
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_fine = urlsplit(""), False
    if "@" in url or parts.username or parts.password:
        raise ValueError("url: holds a name or a password; leave them out, a key goes into the variable of api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine or parts.query or parts.fragment:
        raise ValueError(f"url: got {url!r}; needed: http(s)://HOST[:PORT]/v1, without query")


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


class LabelledConfig(ConfigPart):
    """Completions that people have labelled safe or unsafe; a pair file gives two a row."""

    files: FileList = Field(description="JSON lines, CSV or Parquet, one path or a list")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our column name (id, prompt, completion, is_safe, kind): its name in the files, where they differ",
    )
    safe_values: list[str] = Field(
        default=[], description="values of is_safe that mean safe, where it is not true or false; others are left out"
    )
    unsafe_values: list[str] = Field(default=[], description="values of is_safe that mean unsafe")
    where: dict[str, str] = Field(
        default_factory=dict,
        description="only rows whose column (the file's name) fits a pattern such as contrast_*",
    )
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop", description="a row that cannot be read stops the run or is skipped"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> LabelledConfig:
        if bool(self.safe_values) != bool(self.unsafe_values):
            raise ValueError("safe_values, unsafe_values: give both or none")
        return self


_NGRAM_KEYS = ("ngrams", "num_features", "inverse_penalty", "with_prompt", "folds")
_CLASSIFIER_KEYS = (
    "model",
    "revision",
    "max_length",
    "learning_rate",
    "num_train_epochs",
    "batch_size",
    "logging_steps",
    "save_steps",
)


class JudgeTrainConfig(StageConfig):
    """`bfpo judge-train`: train a small judge of safety on labelled completions, or a ranker on pairs."""

    data: LabelledConfig = Field(description="labelled completions; for a ranker, pairs")
    kind: Literal["ngrams", "classifier", "ranker"] = Field(
        default="ngrams",
        description="a judge of hashed n-grams with a logistic regression, a fine-tuned classifier, or a ranker of "
        "helpfulness from the n-grams of pairs",
    )
    name: str = Field(default="trained", min_length=1, description="name that its verdicts carry")
    threshold: float = Field(default=0.5, gt=0, lt=1, description="a text is safe where p(safe) is above this")
    seed: int = Field(default=0, ge=0, description="seed of the folds and of the order of training")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")

    ngrams: list[int] = Field(default=[1, 2], description="n-grams: fewest and most words in a row")
    num_features: int = Field(default=1 << 18, ge=2, description="n-grams: size of the hashed table")
    inverse_penalty: float = Field(default=10.0, gt=0, description="n-grams: C of the logistic regression")
    with_prompt: bool = Field(default=False, description="n-grams: read the prompt's words too")
    folds: int = Field(default=5, ge=2, description="n-grams: parts of a cross-validation by prompt")

    model: PathText | None = Field(default=None, description="classifier: model to start from, folder or hub id")
    revision: str | None = Field(default=None, description="classifier: revision of a model on the hub")
    max_length: int = Field(
        default=512, ge=8, description="classifier: longest prompt + completion in tokens; longer ones are left out"
    )
    learning_rate: float = Field(default=2e-5, gt=0, description="classifier: peak learning rate")
    num_train_epochs: float = Field(default=2.0, gt=0, description="classifier: passes over the data")
    batch_size: int = Field(default=16, ge=1, description="classifier: number of texts per optimizer step")

    logging_steps: int = Field(
        default=10, ge=1, description="classifier: optimizer steps between rows of metrics.jsonl"
    )
    save_steps: int = Field(default=500, ge=1, description="classifier: optimizer steps between checkpoints")

    def unread(self) -> frozenset[str]:
        """Leave out what the other kind reads."""
        if self.kind == "classifier":
            return frozenset(_NGRAM_KEYS)
        return frozenset((*_CLASSIFIER_KEYS, *(("with_prompt", "threshold") if self.kind == "ranker" else ())))

    @model_validator(mode="after")
    def _no_key_in_vain(self) -> JudgeTrainConfig:
        idle = sorted(self.unread() & self.model_fields_set)
        if idle:
            raise ValueError(f"{', '.join(idle)}: not read by kind {self.kind!r}; leave it out")
        if self.kind == "ranker" and self.data.model_fields_set & {"safe_values", "unsafe_values", "where"}:
            raise ValueError("data: safe_values, unsafe_values and where are not read by kind 'ranker'; leave them out")
        if self.kind == "classifier" and self.model is None:
            raise ValueError("model: missing; kind 'classifier' needs a model to start from: a folder or hub id")
        if len(self.ngrams) != 2 or not 1 <= self.ngrams[0] <= self.ngrams[1]:
            raise ValueError(f"ngrams: got {self.ngrams}; allowed: two whole numbers, 1 <= first <= second")
        return self


class JudgeCheckConfig(StageConfig):
    """`bfpo judge-check`: compare a judge's verdicts with people's labels."""

    judge: JudgeConfig = Field(description="the judge: oracle, a folder of judge-train, FORMAT[:MODEL] or a section")
    data: LabelledConfig = Field(description="labelled completions, not those that the judge was trained on")
    limit: int | None = Field(default=None, ge=1, description="number of texts, drawn at random with seed; null = all")
    label_cache: PathText | None = Field(
        default=None,
        description="folder where verdicts are kept, for this run and others; null = bfpo/label in the user's cache",
    )
    max_requests: MaxRequests = None
    mistakes: int = Field(default=20, ge=0, description="number of worst mistakes that are shown")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")
    bootstrap_samples: int = Field(default=2000, ge=100, description="number of bootstrap resamples")
    seed: int = Field(default=0, ge=0, description="seed of the bootstrap and of limit")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; null = torch's own choice")

    def unread(self) -> frozenset[str]:
        """Leave out what needs a server."""
        return frozenset() if self.judge.url is not None else frozenset({"max_requests"})

    @model_validator(mode="after")
    def _no_key_in_vain(self) -> JudgeCheckConfig:
        if idle := sorted(self.unread() & self.model_fields_set):
            raise ValueError(f"{idle[0]}: not read by a judge without url; leave it out")
        return self
