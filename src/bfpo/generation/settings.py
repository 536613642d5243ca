"""Settings of the model that generates: on a server, or loaded here."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from bfpo.core.secrets import hide_in_values, looks_secret
from bfpo.core.settings import ConfigPart, PathText
from bfpo.data.settings import TemplateKwargs

__all__ = ["HOW_ASKED", "BatchSize", "Engine", "MaxRequests", "ServerSpec", "WeightsSpec", "is_openai"]

Engine = Literal["transformers", "vllm", "server"]
"""What runs a model; vllm needs the extra vllm and a GPU, server an OpenAI-compatible server at `url`."""

BatchSize = Annotated[
    int | None,
    Field(ge=1, description="number of texts worked on at once; null = by their tokens and the memory of the device"),
]
"""How many texts are in one forward pass; no result depends on it."""

MaxRequests = Annotated[
    int | None,
    Field(ge=1, description="most requests to servers, those sent again too, per start; null = no limit"),
]
"""A budget of requests of a whole command, over all its servers."""


class ServerSpec(ConfigPart):
    """A server's address, key and limits; a key or password in the wrong place is refused and not shown."""

    url: str = Field(description="base URL of an OpenAI-compatible server, such as http://localhost:8000/v1")
    api_key_env: str | None = Field(
        default=None,
        description="NAME of the environment variable that holds the server's key; null = OPENAI_API_KEY at "
        "api.openai.com, no key at any other host",
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="further keys of every request, as the server documents them, such as {chat_template_kwargs: "
        "{enable_thinking: false}}",
    )
    timeout: float = Field(default=60.0, gt=0, description="seconds that one request to the server may take")
    max_concurrency: int = Field(default=8, ge=1, description="most requests to the server at once")
    max_retries: int = Field(
        default=5, ge=0, description="times that a request is sent again after a fault of the server or the network"
    )

    @model_validator(mode="after")
    def _no_secret_and_a_usable_url(self) -> ServerSpec:
        if self.api_key_env is not None and looks_secret(self.api_key_env):
            raise ValueError(
                "api_key_env: got something that is not the NAME of an environment variable (capitals, digits and _, "
                "such as OPENAI_API_KEY); put the key itself into that variable, never into a setting"
            )
        _check_url(self.url)
        _check_extra_body(self.extra_body)
        return self

    @property
    def is_openai(self) -> bool:
        """Whether the server is OpenAI's own, to which the key in OPENAI_API_KEY belongs."""
        return is_openai(self.url)

    @property
    def key_variable(self) -> str | None:
        """The environment variable with the key; `None`: no key is sent."""
        return "OPENAI_API_KEY" if self.api_key_env is None and self.is_openai else self.api_key_env


HOW_ASKED = frozenset({"max_requests", *(ServerSpec.model_fields.keys() - {"url", "extra_body"})})
"""Keys of a server that say how it is asked: no answer depends on them."""


def is_openai(url: str) -> bool:
    """Return whether a URL is one of OpenAI's own servers."""
    parts = urlsplit(url)
    return parts.scheme == "https" and f".{parts.hostname}".endswith(".api.openai.com")


_SET_HERE = frozenset(
    {
        *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"),
        *("logprobs", "top_logprobs", "n", "best_of", "echo", "stream", "stream_options", "tools"),
    }
)


def _check_extra_body(extra: dict[str, Any]) -> None:
    """Raise `ValueError` for keys of a request that bfpo sets, for secrets, and for values that JSON does not have."""
    if taken := sorted(extra.keys() & _SET_HERE):
        raise ValueError(
            f"extra_body: got {', '.join(taken)}; bfpo sets these itself, or cannot read the answers that they give; "
            "allowed: any other key of the server"
        )
    if hide_in_values(extra) != extra:
        raise ValueError("extra_body: holds a key or a password; put it into the environment variable of api_key_env")
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra_body: has no form in JSON ({error}); use text, numbers, lists and mappings") from error


def _check_url(url: str) -> None:
    """Raise `ValueError` for a base URL that cannot be used, without showing a possible password."""
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_fine = urlsplit(""), False
    if "@" in url or parts.username or parts.password:
        raise ValueError("url: holds a name or a password; leave them out, a key goes into the variable of api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine or parts.query or parts.fragment:
        raise ValueError(f"url: got {url!r}; needed: http(s)://HOST[:PORT]/v1, without query")


class WeightsSpec(ConfigPart):
    """A model that is loaded here, and the limits of its prompts."""

    revision: str | None = Field(default=None, description="revision (commit, tag or branch) of a model on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="auto",
        description="number type that holds the weights; auto = bfloat16 where the device computes in it natively, "
        "else float32, and float16 for weights saved so on a GPU; of engine vllm its own choice",
    )
    max_prompt_length: int = Field(default=1024, ge=1, description="longest prompt in tokens")
    long_prompts: Literal["stop", "skip"] = Field(
        default="stop", description="a prompt that is longer stops the run, or is left out and counted"
    )
    chat_template: PathText | None = Field(
        default=None,
        description="file with a Jinja chat template; null = the tokenizer's own, else the documented default",
    )
    chat_template_kwargs: TemplateKwargs = Field(default={})
