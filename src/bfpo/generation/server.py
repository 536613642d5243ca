"""Requests to an OpenAI-compatible server: bounded concurrency, retries, a budget, answers as they arrive."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from bfpo.core.errors import MissingExtraError, ServerError, SettingError, first_line
from bfpo.core.schema import Message, canonical_json, from_canonical
from bfpo.core.secrets import hide_secrets
from bfpo.data.messages import ends_with_assistant
from bfpo.data.template import with_arguments_as_text
from bfpo.generation.replies import (
    Answer,
    Token,
    blocked_reason,
    error_message,
    lacks_credit,
    may_pass,
    read_chat,
    read_completion,
    refuses_to_continue,
    unsupported_parameter,
)
from bfpo.generation.settings import ServerSpec

__all__ = ["Answer", "Question", "RequestBudget", "Server", "Token"]

_log = logging.getLogger(__name__)

_LOGPROBS = {"chat": 20, "completions": 5}  # of each token: the most that the reference implementation gives
_FEWER_LOGPROBS = (5, 2)  # tried next; one alone would not compare two labels
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SHORTEST_KEY = 8  # shorter keys, such as EMPTY, are not secret and may be words
_SAID = {
    "temperature": "the server samples at its own temperature",
    "top_p": "the server uses its own",
    "seed": "the draws do not repeat",
}
"""What it means that a setting of the sampling is not sent."""
_NO_MESSAGE = re.compile(r"Error code: \d+")  # of the client's library, which reads `error.message` alone
_FAILURES_IN_A_ROW = 8  # at least; after so many texts without an answer, the server counts as unreachable


@dataclass(frozen=True, slots=True)
class Question:
    """The messages of a chat, or a finished text to continue.

    `template_arguments` go to the server's chat template; unless `needs_arguments`, they are left out for a server that
    refuses them. `as_parts` sends a message's content as a list of one part. `seed` replaces the seed of `ask`, `tools`
    is canonical JSON of the tools that the model may call.
    """

    content: tuple[Message, ...] | str
    max_new_tokens: int
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    needs_arguments: bool = True
    as_parts: bool = False
    seed: int | None = None
    tools: str = ""


@dataclass(frozen=True, slots=True)
class _Form:
    """What requests consist of: log-probabilities of a token, the name of the token limit, and what is left out."""

    logprobs: int
    limit: str = "max_tokens"
    left_out: frozenset[str] = frozenset()

    def without(self, part: str) -> _Form:
        """Return the form without a part that the server refuses."""
        if part == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        return replace(self, left_out=self.left_out | {part})


class RequestBudget:
    """Counts the requests that are sent, including retries, up to `limit` (`None`: no limit).

    One that is made within `shared` of another counts for that one too.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise SettingError(f"max_requests: got {limit}; allowed: >= 1, or null")
        self.limit = limit
        self.num_requests = 0
        self._outer = _SHARED.get()
        self._lock = threading.Lock()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Share this budget with all that are made within the block, as those of the stages that a command runs."""
        before = _SHARED.set(self)
        try:
            yield
        finally:
            _SHARED.reset(before)

    def take(self) -> None:
        """Count one request that is about to be sent; raises `_Spent` if the budget is used up."""
        with self._lock:
            if self.limit is not None and self.num_requests >= self.limit:
                raise _Spent(self.limit)
            if self._outer is not None:
                self._outer.take()
            self.num_requests += 1


_SHARED: ContextVar[RequestBudget | None] = ContextVar("shared budget", default=None)


class _Spent(BaseException):
    """The budget of this limit is used up; not an `Exception`, since the client's library would retry the request."""


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
        self._key = "" if spec.key_variable is None else _read_key(spec.key_variable)
        parts = urlsplit(spec.url)
        if len(self._key) >= _SHORTEST_KEY and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            _log.warning("the key in %s goes to %s unencrypted (http); use https", spec.key_variable, parts.netloc)
        self._top_p, self._is_writer = top_p, writer
        self._form = _Form(_LOGPROBS[api], left_out=frozenset({"logprobs"} if writer else ()))
        self._form_is_known = False

    @property
    def version(self) -> str:
        """Everything except the question that affects an answer, as text."""
        top_p = "" if self._top_p is None else f" top_p={self._top_p:g}"
        extra = f" {canonical_json(self._spec.extra_body)}" if self._spec.extra_body else ""
        return f"{self.url} {self.model} {self.api} temperature={self.temperature:g}{top_p}{extra}"

    @property
    def not_sent(self) -> list[str]:
        """The settings that the server refuses, so that requests are sent without them."""
        return sorted(self._form.left_out & _SAID.keys())

    @property
    def host(self) -> str:
        """The URL's host and port."""
        return urlsplit(self.url).netloc

    def ask(self, questions: Sequence[Question], report: Callable[[int, Answer], None], *, seed: int = 0) -> None:
        """Ask all questions concurrently and report each answer with the question's index, as it arrives.

        A question whose requests all failed, or that the server refuses, gets an answer without text. `seed` matters
        above temperature 0, if the server reads it. Raises `ServerError` if further requests are useless: the key is
        refused, the account has no credit, the model or path is unknown, the server cannot be reached, redirects to
        another host or sends too much, or the budget is used up; earlier answers have been reported.
        """
        if questions:
            _run(self._ask_all(questions, report, seed))

    async def _ask_all(self, questions: Sequence[Question], report: Callable[[int, Answer], None], seed: int) -> None:
        import openai

        from bfpo.generation.transport import BoundedClient

        spec = self._spec
        http = BoundedClient(
            timeout=spec.timeout,
            max_connections=spec.max_concurrency,
            count=self._budget.take,
            has_key=bool(self._key),
            is_openai=spec.is_openai,
        )
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

        from bfpo.generation.transport import MOST_BYTES, LossyRedirect, OversizedAnswer, RefusedRedirect

        try:
            return self._cleaned(await self._ask_in_an_accepted_form(client, question, seed))
        except _Spent as error:
            raise ServerError(
                f"max_requests: all {error} requests are used up; earlier answers are kept; continue with "
                "--resume (as many requests again), or raise max_requests"
            ) from None
        except RefusedRedirect as error:
            raise ServerError(
                f"{self.url}: redirects to another host ({error}), which is refused: key and prompts go only to the "
                "host of url; set url to the other one if it is meant"
            ) from None
        except LossyRedirect as error:
            raise ServerError(
                f"{self.url}: redirects to {self._clean(error)} and drops the request's body (status 301, 302 or 303); "
                "set url to that address, without the last part (/chat/completions or /completions)"
            ) from None
        except OversizedAnswer:
            raise ServerError(
                f"{self.url}: an answer has more than {MOST_BYTES >> 20} MiB, which no text of "
                f"{question.max_new_tokens} tokens needs; check that url is one of an OpenAI-compatible server"
            ) from None
        except openai.APITimeoutError:
            return Answer(None, fault=f"no answer in {self._spec.timeout:g} s", may_pass=True)
        except openai.APIConnectionError as error:
            return Answer(None, fault=f"no whole answer: {self._clean(error.__cause__ or error)}", may_pass=True)
        except openai.APIStatusError as error:
            return self._refusal(error.status_code, error)
        except openai.OpenAIError as error:
            return Answer(None, fault=f"not an answer: {self._clean(error)}")

    def _refusal(self, status: int, error: Any) -> Answer:
        """Return the answer for a status that is not a success; raises `ServerError` for one that all requests get."""
        if (reason := blocked_reason(status, error.body)) is not None:
            return Answer(None, fault=hide_secrets(self._without_key(reason)), blocked=True)
        if lacks_credit(status, error.body):
            raise ServerError(
                f"{self.url}: the account has no credit left (status {status}: {self._clean(error)}); earlier answers "
                "are kept; add credit to the account and continue with --resume"
            ) from None
        is_page = isinstance(error.body, str)  # of a firewall, which some prompts look like an attack to
        if status == 401 or (status == 403 and not is_page):
            name = self._spec.key_variable
            known = (
                "no key was sent, since api_key_env names no variable"
                if name is None
                else f"the variable {name} {'is set' if self._key else 'is not set'}"
            )
            raise ServerError(
                f"{self.url}: refuses the key (status {status}); {known}; put the key into an environment variable and "
                "name it with api_key_env"
            ) from None
        if status == 404:
            raise ServerError(
                f"{self.url}: no such path or model (status 404: {self._clean(error)}); check url (it usually ends in "
                f"/v1) and model ({self.model})"
            ) from None
        passing = may_pass(status)
        refused = not passing and status >= 400
        return Answer(None, fault=f"status {status}: {self._clean(error)}", may_pass=passing, refused=refused)

    async def _ask_in_an_accepted_form(self, client: Any, question: Question, seed: int) -> Answer:
        """Ask, and ask again without the parts of the request that the server refuses; these are remembered."""
        import openai

        form: _Form | None = self._form
        tried: set[_Form] = set()
        refusal: openai.APIStatusError | None = None
        while form is not None:
            tried.add(form)
            try:
                answer = await self._request(client, question, seed, form)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                status, body = error.status_code, error.body
                if lacks_credit(status, body) or blocked_reason(status, body) is not None:
                    raise
                if self._continues(question) and refuses_to_continue(error.body):
                    raise ServerError(
                        f"{self.url}: does not continue a message of the assistant (status {error.status_code}: "
                        f"{self._clean(error)}); begun answers need a server that does, such as vLLM or SGLang "
                        "(continue_final_message), or the weights here"
                    ) from None
                part = unsupported_parameter(error.body)
                if part is None:
                    refusal = refusal or error
                form = next((one for one in self._other_forms(form, part, question) if one not in tried), None)
                if form is None:
                    raise refusal or error from None
                continue
            self._learn(form)
            return answer
        raise AssertionError  # the loop ends in its body

    def _other_forms(self, form: _Form, part: str | None, question: Question) -> Iterator[_Form]:
        """Yield the forms to try after a refusal, which may name the part that is not supported."""
        if part is not None:
            part = {"top_logprobs": "logprobs", "max_completion_tokens": "max_tokens"}.get(part, part)
            if part != "chat_template_kwargs" or not question.needs_arguments:
                yield form.without(part)
            return
        if self._form_is_known:
            yield self._form  # another request may have found it since this one was sent
            return
        if "logprobs" not in self._form.left_out:
            for number in _FEWER_LOGPROBS:
                yield replace(self._form, logprobs=min(number, self._form.logprobs))
        yield self._form.without("logprobs")
        if question.template_arguments and not question.needs_arguments:
            yield self._form.without("chat_template_kwargs")
            yield self._form.without("logprobs").without("chat_template_kwargs")

    def _learn(self, form: _Form) -> None:
        """Keep the form of a request that was accepted, and say once what it leaves out."""
        known = self._form
        is_new = form.left_out > known.left_out or form.limit != known.limit or form.logprobs < known.logprobs
        if self._form_is_known and not is_new:
            return
        for part in sorted(form.left_out - known.left_out):
            if part in _SAID:
                _log.warning("%s refuses %s: it is not sent; %s", self.host, part, _SAID[part])
            elif part == "logprobs":
                _log.info("%s refuses requests for log-probabilities: only its text is read", self.host)
        if form.logprobs < known.logprobs:
            _log.info(
                "%s refuses %d log-probabilities of a token: %d are requested",
                *(self.host, known.logprobs, form.logprobs),
            )
        if form.limit != known.limit:
            _log.info("%s refuses max_tokens: max_completion_tokens is sent in its place", self.host)
        self._form, self._form_is_known = form, True

    async def _request(self, client: Any, question: Question, seed: int, form: _Form) -> Answer:
        extra = dict(self._spec.extra_body)
        common: dict[str, Any] = {"model": self.model, form.limit: question.max_new_tokens}
        if "temperature" not in form.left_out:
            common["temperature"] = self.temperature
        if self.temperature > 0:
            if "seed" not in form.left_out:
                common["seed"] = seed if question.seed is None else question.seed
            if self._top_p is not None and "top_p" not in form.left_out:
                common["top_p"] = self._top_p
        asks_logprobs = "logprobs" not in form.left_out
        content = question.content
        if self.api == "completions":
            if not isinstance(content, str):
                raise SettingError("api: 'completions' takes a finished text, and this format asks a chat; use 'chat'")
            logprobs: dict[str, Any] = {"logprobs": form.logprobs} if asks_logprobs else {}
            create = client.completions.with_raw_response.create
            raw = await create(prompt=content, **common, **logprobs, extra_body=extra)
            return read_completion(json.loads(raw.content), writes=self._is_writer)
        logprobs = {"logprobs": True, "top_logprobs": form.logprobs} if asks_logprobs else {}
        turns = [Message("user", content)] if isinstance(content, str) else content
        messages = [
            # The arguments of calls, which are objects here, are JSON text in the API.
            {
                **with_arguments_as_text(turn.as_dict()),
                **({"content": _as_parts(turn.content)} if question.as_parts else {}),
            }
            for turn in turns
        ]
        if question.tools:
            common["tools"] = from_canonical(question.tools)
        if question.template_arguments and "chat_template_kwargs" not in form.left_out:
            extra["chat_template_kwargs"] = self._merged_arguments(question.template_arguments)
        if self._continues(question):  # as vLLM and SGLang name it
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        create = client.chat.completions.with_raw_response.create
        raw = await create(messages=messages, **common, **logprobs, extra_body=extra)
        return read_chat(json.loads(raw.content), writes=self._is_writer)

    def _continues(self, question: Question) -> bool:
        return self._is_writer and not isinstance(question.content, str) and ends_with_assistant(question.content)

    def _merged_arguments(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the server's template: the user's and those of the question."""
        given = self._spec.extra_body.get("chat_template_kwargs") or {}
        if not isinstance(given, Mapping) or (taken := sorted(given.keys() & own.keys())):
            names = ", ".join(taken) if isinstance(given, Mapping) else f"{given!r}"
            raise SettingError(
                f"extra_body.chat_template_kwargs: got {names}; needed: a mapping without {', '.join(own)}, which the "
                "format of the judge sets"
            )
        return {**given, **own}

    def _cleaned(self, answer: Answer) -> Answer:
        """Return the answer without the key, which some servers repeat."""
        return replace(
            answer,
            text=None if answer.text is None else self._without_key(answer.text),
            fault=hide_secrets(self._without_key(answer.fault)),
            reasoning=self._without_key(answer.reasoning),
            tool_calls=self._without_key(answer.tool_calls),
        )

    def _clean(self, error: BaseException) -> str:
        """Return an error's first line, short and without the key, which some servers repeat."""
        text, said = first_line(error), error_message(getattr(error, "body", None))
        if _NO_MESSAGE.fullmatch(text) and said:
            text = f"{text} - {said}"
        return hide_secrets(self._without_key(text))[:200]

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
        failed = answer.text is None and not answer.blocked
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
    """Run a coroutine to its end, also if this thread already runs an event loop, as in a notebook.

    An interrupt ends it: no further request is sent.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    errors: list[BaseException] = []
    started: Future[tuple[asyncio.AbstractEventLoop, Any]] = Future()

    async def noted() -> None:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        await work

    def run() -> None:
        try:
            asyncio.run(noted())
        except BaseException as error:  # raised again below, in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        loop, task = started.result()
        with suppress(RuntimeError):  # the loop has just ended
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
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
