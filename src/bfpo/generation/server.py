"""Requests to an OpenAI-compatible server: bounded concurrency, retries, a budget, answers as they arrive."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from bfpo.core.errors import MissingExtraError, ServerError, SettingError, first_line
from bfpo.core.schema import Message
from bfpo.core.secrets import hide_secrets
from bfpo.generation.settings import ServerSpec

__all__ = ["Answer", "Question", "RequestBudget", "Server", "Token"]

_log = logging.getLogger(__name__)

_TOP_LOGPROBS = 20  # the most that the chat endpoint of the reference implementation gives
_COMPLETIONS_LOGPROBS = 5
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SHORTEST_KEY = 8  # shorter keys, such as EMPTY, are not secret and may be words
_FAILURES_IN_A_ROW = 8  # at least; after so many texts without an answer, the server counts as unreachable


@dataclass(frozen=True, slots=True)
class Question:
    """The messages of a chat, or a finished text to continue.

    `template_arguments` go to the server's chat template; unless `needs_arguments`, they are left out for a server that
    refuses them. `as_parts` sends a message's content as a list of one part. `seed` replaces the seed of `ask`.
    """

    content: tuple[Message, ...] | str
    max_new_tokens: int
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    needs_arguments: bool = True
    as_parts: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, with the log-probabilities of the most likely tokens at its position."""

    text: str
    top_logprobs: dict[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer; `text` is `None`, with `fault`, if none arrived.

    `tokens` is empty if the server gives no log-probabilities, `finish_reason` and `num_tokens` are `None` if it does
    not report them. `may_pass`: the fault lies in the server's state or the network, not in the question.
    """

    text: str | None
    tokens: tuple[Token, ...] = ()
    fault: str = ""
    may_pass: bool = False
    finish_reason: str | None = None
    num_tokens: int | None = None


@dataclass(slots=True)
class _Extras:
    """Optional parts of a request that not every server accepts; `known` after the first answer."""

    logprobs: bool = True
    arguments: bool = True
    known: bool = False


class RequestBudget:
    """Counts the requests that are sent, including retries, up to `limit` (`None`: no limit)."""

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise SettingError(f"max_requests: got {limit}; allowed: >= 1, or null")
        self.limit = limit
        self.num_requests = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Count one request that is about to be sent; raises `_Spent` if the budget is used up."""
        with self._lock:
            if self.limit is not None and self.num_requests >= self.limit:
                raise _Spent
            self.num_requests += 1


class _Spent(BaseException):
    """The budget is used up; not an `Exception`, since the client's library would retry the request."""


class Server:
    """A model behind an OpenAI-compatible server.

    `api` is "chat" or "completions". The key is read here, from the variable that `spec` names, and stored nowhere
    else. A request that fails temporarily (no connection, no answer in `timeout` seconds, half an answer, 408, 409,
    429, 5xx) is retried up to `max_retries` times, with growing delays or when the server says (`openai`'s own rules).
    `top_p` is sent if given. A `writer` generates text instead of an opinion: an empty text that it ended itself is an
    answer, and log-probabilities are not requested.

    Raises `MissingExtraError` without `openai`, `SettingError` for a variable that holds no key.
    """

    def __init__(
        self,
        spec: ServerSpec,
        model: str,
        *,
        api: str = "chat",
        temperature: float = 0.0,
        top_p: float | None = None,
        writer: bool = False,
        budget: RequestBudget | None = None,
    ) -> None:
        _check_extra()
        if api not in ("chat", "completions"):
            raise SettingError(f"api: got {api!r}; allowed: chat, completions")
        self.url, self.model, self.api, self.temperature = spec.url, model, api, temperature
        self._spec = spec
        self._budget = budget or RequestBudget()
        self._key = _read_key(spec.api_key_env)
        parts = urlsplit(spec.url)
        if len(self._key) >= _SHORTEST_KEY and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            _log.warning("the key in %s goes to %s unencrypted (http); use https", spec.api_key_env, parts.netloc)
        self._top_p, self._is_writer = top_p, writer
        self._extras = _Extras(logprobs=not writer)

    @property
    def version(self) -> str:
        """Everything except the question that affects an answer, as text."""
        top_p = "" if self._top_p is None else f" top_p={self._top_p:g}"
        return f"{self.url} {self.model} {self.api} temperature={self.temperature:g}{top_p}"

    @property
    def host(self) -> str:
        """The URL's host and port."""
        return urlsplit(self.url).netloc

    def ask(self, questions: Sequence[Question], report: Callable[[int, Answer], None], *, seed: int = 0) -> None:
        """Ask all questions concurrently and report each answer with the question's index, as it arrives.

        A question whose requests all failed gets an answer without text. `seed` matters above temperature 0, if the
        server reads it. Raises `ServerError` if further requests are useless: the key is refused, the model or path is
        unknown, the server cannot be reached, or the budget is used up; earlier answers have been reported.
        """
        if questions:
            _run(self._ask_all(questions, report, seed))

    async def _ask_all(self, questions: Sequence[Question], report: Callable[[int, Answer], None], seed: int) -> None:
        import openai

        from bfpo.generation.transport import BoundedClient

        spec = self._spec
        http = BoundedClient(timeout=spec.timeout, max_connections=spec.max_concurrency, count=self._budget.take)
        client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.url,
            max_retries=spec.max_retries,
            timeout=spec.timeout,
            http_client=http,
        )
        todo = iter(enumerate(questions))
        patience = _Patience(self.url, max(_FAILURES_IN_A_ROW, 2 * self._spec.max_concurrency))
        stopped = False

        async def work() -> None:
            nonlocal stopped
            try:
                for place, question in todo:  # one iterator for all workers: each takes the next one
                    answer = await self._ask_one(client, question, seed)
                    report(place, answer)
                    patience.note(answer)
                    if stopped:
                        return
            except BaseException:
                stopped = True
                raise

        async with client:
            workers = [asyncio.ensure_future(work()) for _ in range(min(self._spec.max_concurrency, len(questions)))]
            await _all_of(workers, self._spec.timeout)

    async def _ask_one(self, client: Any, question: Question, seed: int) -> Answer:
        import openai

        try:
            answer = await self._ask_with_what_it_takes(client, question, seed)
            return answer if answer.text is None else replace(answer, text=self._without_key(answer.text))
        except _Spent:
            raise ServerError(
                f"max_requests: all {self._budget.limit} requests are used up; earlier answers are kept; continue with "
                "--resume (as many requests again), or raise max_requests"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            known = "is set" if self._key else "is not set"
            raise ServerError(
                f"{self.url}: refuses the key (status {error.status_code}); the variable {self._spec.api_key_env} "
                f"{known}; put the key into it, or name another variable with api_key_env"
            ) from None
        except openai.NotFoundError as error:
            raise ServerError(
                f"{self.url}: no such path or model (status 404: {self._clean(error)}); check url (it usually ends in "
                f"/v1) and model ({self.model})"
            ) from None
        except openai.APITimeoutError:
            return Answer(None, fault=f"no answer in {self._spec.timeout:g} s", may_pass=True)
        except openai.APIConnectionError as error:
            return Answer(None, fault=f"no whole answer: {self._clean(error.__cause__ or error)}", may_pass=True)
        except openai.APIStatusError as error:
            passing = error.status_code in (408, 409, 429) or error.status_code >= 500
            return Answer(None, fault=f"status {error.status_code}: {self._clean(error)}", may_pass=passing)
        except openai.OpenAIError as error:
            return Answer(None, fault=f"not an answer: {self._clean(error)}")

    async def _ask_with_what_it_takes(self, client: Any, question: Question, seed: int) -> Answer:
        """Ask with log-probabilities and template arguments, and without those that the server refuses."""
        import openai

        refusal: Exception | None = None
        for extras in self._to_try(question):
            try:
                answer = await self._request(client, question, seed, extras)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refusal = refusal or error
                continue
            if not self._extras.known:
                self._extras = replace(extras, known=True)
                if not (extras.logprobs or self._is_writer):
                    _log.info("%s refuses requests for log-probabilities: only its text is read", self.host)
            return answer
        assert refusal is not None  # at least one request was tried
        raise refusal

    def _to_try(self, question: Question) -> Iterator[_Extras]:
        yield self._extras
        if self._extras.known:
            return
        if self._extras.logprobs:
            yield _Extras(logprobs=False)
        if question.template_arguments and not question.needs_arguments:
            if self._extras.logprobs:
                yield _Extras(arguments=False)
            yield _Extras(logprobs=False, arguments=False)

    async def _request(self, client: Any, question: Question, seed: int, extras: _Extras) -> Answer:
        common: dict[str, Any] = {
            "model": self.model,
            "max_tokens": question.max_new_tokens,
            "temperature": self.temperature,
        }
        if self.temperature > 0:
            common["seed"] = seed if question.seed is None else question.seed
            if self._top_p is not None:
                common["top_p"] = self._top_p
        content = question.content
        if self.api == "completions":
            if not isinstance(content, str):
                raise SettingError("api: 'completions' takes a finished text, and this format asks a chat; use 'chat'")
            logprobs: dict[str, Any] = {"logprobs": _COMPLETIONS_LOGPROBS} if extras.logprobs else {}
            response = await client.completions.create(prompt=content, **common, **logprobs)
            return _read_completion(response, may_be_empty=self._is_writer)
        logprobs = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS} if extras.logprobs else {}
        turns = [Message("user", content)] if isinstance(content, str) else content
        messages = [
            {"role": turn.role, "content": _as_parts(turn.content) if question.as_parts else turn.content}
            for turn in turns
        ]
        if question.template_arguments and extras.arguments:
            common["extra_body"] = {"chat_template_kwargs": dict(question.template_arguments)}
        response = await client.chat.completions.create(messages=messages, **common, **logprobs)
        return _read_chat(response, may_be_empty=self._is_writer)

    def _clean(self, error: BaseException) -> str:
        """Return an error's first line, short and without the key, which some servers repeat."""
        return hide_secrets(self._without_key(first_line(error)))[:200]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= _SHORTEST_KEY else text


class _Patience:
    """Raises after too many texts without an answer in a row, or from the start."""

    def __init__(self, url: str, most: int) -> None:
        self._url, self._most = url, most
        self._num_in_a_row = self._num_failed = 0
        self._any_answer = False

    def note(self, answer: Answer) -> None:
        """Count an answer; raises `ServerError`."""
        failed = answer.text is None
        self._any_answer = self._any_answer or not failed
        self._num_failed += failed
        self._num_in_a_row = self._num_in_a_row + 1 if failed and answer.may_pass else 0
        if self._num_in_a_row >= self._most or (not self._any_answer and self._num_failed >= self._most):
            raise ServerError(
                f"{self._url}: {self._num_failed} texts got no answer, the last {self._most} among them "
                f"({answer.fault}); earlier answers are kept; check the server or its settings, and "
                "continue with --resume"
            )


async def _all_of(workers: Sequence[asyncio.Future[None]], seconds_to_end: float) -> None:
    """Wait for all workers; after an error, the others may only finish the requests that they have sent."""
    try:
        done, pending = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            late, pending = await asyncio.wait(pending, timeout=seconds_to_end)
            done |= late
        errors = [error for worker in done if (error := worker.exception()) is not None]
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    if errors:
        raise errors[0]


def _run(work: Any) -> None:
    """Run a coroutine to its end, also if this thread already runs an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:  # raised again below, in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _check_extra() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "a model behind a server (url) needs the package openai; install it with: pip install 'bfpo[server]'"
        ) from error


def _read_key(name: str) -> str:
    """Return the key in a variable, "" if it is not set: a local server needs none."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise SettingError(f"api_key_env: the variable {name} holds characters that a key cannot have; set it again")
    return key


# ------------------------------------------------------------------------------------------------ reading answers


def _read_chat(response: Any, *, may_be_empty: bool = False) -> Answer:
    """Read an answer of the chat endpoint; anything of an unexpected form counts as missing.

    An empty text is not an answer. With `may_be_empty` it is one if the model ended it itself, and blanks are text.
    """
    choice = _first(getattr(response, "choices", None))
    reason = _reason(choice)
    text = _text(getattr(getattr(choice, "message", None), "content", None), reason, may_be_empty)
    if text is None:
        return _no_text(reason)
    items = getattr(getattr(choice, "logprobs", None), "content", None)
    tokens = []
    for item in items if isinstance(items, list) else ():
        tops = getattr(item, "top_logprobs", None)
        pairs = [(getattr(top, "token", None), getattr(top, "logprob", None)) for top in tops or ()]
        tokens.append(Token(str(getattr(item, "token", "")), _numbers(pairs)))
    return Answer(text, tuple(tokens), finish_reason=reason, num_tokens=_num_tokens(response))


def _read_completion(response: Any, *, may_be_empty: bool = False) -> Answer:
    """Read an answer of the completions endpoint, as `_read_chat` does."""
    choice = _first(getattr(response, "choices", None))
    reason = _reason(choice)
    text = _text(getattr(choice, "text", None), reason, may_be_empty)
    if text is None:
        return _no_text(reason)
    tokens: tuple[Token, ...] = ()
    logprobs = getattr(choice, "logprobs", None)
    words, tops = getattr(logprobs, "tokens", None), getattr(logprobs, "top_logprobs", None)
    if isinstance(words, list) and isinstance(tops, list) and len(words) == len(tops):
        pairs = [(str(w), top.items() if isinstance(top, dict) else ()) for w, top in zip(words, tops, strict=True)]
        tokens = tuple(Token(word, _numbers(top)) for word, top in pairs)
    return Answer(text, tokens, finish_reason=reason, num_tokens=_num_tokens(response))


def _text(text: Any, reason: str | None, may_be_empty: bool) -> str | None:
    """Return the text of an answer, `None` if there is none."""
    if may_be_empty and reason == "stop" and text is None:
        return ""
    if not isinstance(text, str):
        return None
    is_text = bool(text.strip()) or (may_be_empty and (text != "" or reason == "stop"))
    return text if is_text else None


def _no_text(reason: str | None) -> Answer:
    said = "" if reason in (None, "stop") else f" (finish_reason {reason})"
    return Answer(None, fault=f"the answer holds no text{said}")


def _reason(choice: Any) -> str | None:
    reason = getattr(choice, "finish_reason", None)
    return reason if isinstance(reason, str) else None


def _num_tokens(response: Any) -> int | None:
    number = getattr(getattr(response, "usage", None), "completion_tokens", None)
    return number if isinstance(number, int) else None


def _first(items: Any) -> Any:
    return items[0] if isinstance(items, list) and items else None


def _numbers(pairs: Any) -> dict[str, float]:
    """Return the log-probabilities by token; of a token that is listed twice, the first is the more likely."""
    found: dict[str, float] = {}
    for token, logprob in pairs:
        if isinstance(token, str) and isinstance(logprob, (int, float)) and not isinstance(logprob, bool):
            found.setdefault(token, float(logprob))
    return found
