"""COMMAND `chat`: talk to one model, or to two side by side, in the terminal or from a script."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.config import ChatConfig, load_config, read_template
from bfpo.core.console import Outcome, one_line, show, show_error
from bfpo.core.errors import BfpoError, ConfigError
from bfpo.core.provenance import model_in, model_name
from bfpo.core.records import as_json
from bfpo.core.schema import Verdict
from bfpo.core.screen import replies_on_screen
from bfpo.data.chat import ChatEncoder
from bfpo.generation.sampling import end_token_ids
from bfpo.generation.talk import Reply, Talk
from bfpo.judges.asking import judge_answers
from bfpo.judges.judges import Judge, check_opinions, make_judge
from bfpo.policy.devices import to_gpu, use_threads
from bfpo.policy.load import load_policy, load_tokenizer
from bfpo.policy.precision import decoding_dtype
from bfpo.policy.source import check_source, read_config

__all__ = ["run"]

_log = logging.getLogger(__name__)

_HELP = """\
/reset                begin a new conversation
/system TEXT          begin a new one with this system prompt; without TEXT: with the chat template's own
/set KEY VALUE        change temperature, top_p, max_new_tokens or seed
/help                 show this
/quit                 end (also Ctrl-D)
Any other line is a message. A line that ends with \\ goes on in the next; // begins a message with /.
Ctrl-C ends a reply early."""
_CHANGEABLE = ("temperature", "top_p", "max_new_tokens", "seed")


def run(config: Path | None, settings: Sequence[str]) -> Outcome:
    """Read messages from the terminal or from stdin, show the replies, and return the conversations.

    Raises the errors of the config, the models and the judge. Where stdin is no terminal, a wrong line is a
    `ConfigError`; on a terminal it is said and the conversation goes on.
    """
    loaded = load_config(ChatConfig, config, settings)
    check_opinions([] if loaded.judge is None else [loaded.judge])
    use_threads(loaded.threads)
    places = [(loaded.model, loaded.revision)]
    places += [] if loaded.against is None else [(loaded.against, loaded.against_revision)]
    if places[1:] == places[:1]:
        raise ConfigError(f"against: got {loaded.against}, which is model itself; give another model or revision")
    for key, (model, revision) in zip(("model", "against"), places, strict=False):
        check_source(key, model_in(model), revision=revision)
    names = _names(places)
    chats = [_encoder(model, revision, loaded) for model, revision in places]  # its errors come before weights are read
    talks = [_open(name, *place, chat, loaded) for name, place, chat in zip(names, places, chats, strict=True)]
    judge = None if loaded.judge is None else make_judge(loaded.judge)
    is_terminal = sys.stdin.isatty()
    session = _Chat(loaded, lambda changes: load_config(ChatConfig, config, [*settings, *changes]), talks, judge)
    if is_terminal:
        show(f"{' against '.join(names)}; /help shows the commands, /quit ends.")
    for number, line in _lines(is_terminal):
        if not is_terminal:
            show(f"you> {line}")
        try:
            if not session.take(line):
                break
        except BfpoError as error:
            if not is_terminal:
                raise type(error)(f"stdin, line {number}: {error}") from error
            show_error(f"error: {error}")
    models = [{"name": name, "model": model} for name, (model, _) in zip(names, places, strict=True)]
    facts = {"models": models, "judge": None if judge is None else judge.name, "conversations": session.told}
    return Outcome(0, facts)


def _names(places: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return short names of models: the last part of each, or of its run; whole where two are equal."""
    short = [model_name(model) for model, _ in places]
    if len(set(short)) == len(short):
        return short
    return [model if revision is None else f"{model} at {revision}" for model, revision in places]


def _encoder(model: str, revision: str | None, config: ChatConfig) -> ChatEncoder:
    tokenizer = load_tokenizer(model_in(model), revision=revision)
    return ChatEncoder(tokenizer, read_template(config.chat_template), config.chat_template_kwargs)


def _open(name: str, model: str, revision: str | None, chat: ChatEncoder, config: ChatConfig) -> Talk:
    found = model_in(model)
    dtype, why = decoding_dtype(config.dtype, read_config(found, revision=revision).dtype)
    _log.info("%s: weights in %s (%s)", name, dtype, why)
    policy = load_policy(found, dtype=dtype, revision=revision)
    to_gpu(policy.model)
    ends = {*end_token_ids(policy.model, policy.tokenizer), chat.end_id}
    return Talk(name, policy.model, chat, ends, system=config.system, thinking=config.thinking)


def _lines(is_terminal: bool) -> Iterator[tuple[int, str]]:
    """Yield the lines of the input with their numbers; one that ends with a backslash is joined with the next."""
    begun: list[str] = []
    number = 0
    if is_terminal:
        import readline  # noqa: F401 - gives `input` its editing and its history
    while True:
        try:
            line = input("...> " if begun else "you> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            show()
            break
        if not is_terminal and not line:
            break
        number += 1
        line = line.rstrip("\r\n")
        if line.endswith("\\"):
            begun.append(line[:-1])
            continue
        yield number, "\n".join([*begun, line])
        begun = []
    if begun:
        yield number, "\n".join(begun)


class _Chat:
    """The conversations of a session, and its settings, which `/set` changes."""

    def __init__(
        self,
        config: ChatConfig,
        change: Callable[[Sequence[str]], ChatConfig],
        talks: Sequence[Talk],
        judge: Judge | None,
    ) -> None:
        self._config, self._change, self._talks, self._judge = config, change, talks, judge
        self._changes: list[str] = []
        self._system = config.system
        self._num_replies = 0
        self._turns: list[dict[str, Any]] = []
        self._all: list[tuple[str | None, list[dict[str, Any]]]] = [(self._system, self._turns)]

    @property
    def told(self) -> list[dict[str, Any]]:
        """The conversations with their turns, as plain values; empty ones are left out."""
        return [{"system": system, "turns": turns} for system, turns in self._all if turns]

    def take(self, line: str) -> bool:
        """Do what a line says; return whether the session goes on. Raises `ConfigError` for an unknown command."""
        command, _, rest = line.strip().partition(" ")
        if not command:
            return True
        if not command.startswith("/") or command.startswith("//"):
            self._answer(line.strip().removeprefix("/") if command.startswith("//") else line)
        elif command == "/quit":
            return False
        elif command == "/help":
            show(_HELP)
        elif command == "/reset":
            self._begin(self._system)
        elif command == "/system":
            self._begin(rest.strip() or None)
        elif command == "/set":
            self._set(rest.strip())
        else:
            raise ConfigError(
                f"{one_line(command)}: unknown; allowed: /reset, /system, /set, /help, /quit, or // for a message "
                "that begins with /"
            )
        return True

    def _begin(self, system: str | None) -> None:
        self._system, self._turns = system, []
        self._all.append((system, self._turns))
        for talk in self._talks:
            talk.reset(system)
        show("A new conversation." if system is None else f"A new conversation with the system prompt: {system}")

    def _set(self, text: str) -> None:
        key, _, value = text.partition(" ")
        if key not in _CHANGEABLE or not value.strip():
            raise ConfigError(f"/set: got {one_line(text)!r}; needed: one of {', '.join(_CHANGEABLE)}, and a value")
        changes = [*self._changes, f"{key}={value.strip()}"]
        self._config = self._change(changes)
        self._changes = changes
        show(f"{key} = {getattr(self._config, key)}")

    def _answer(self, text: str) -> None:
        """Show and keep every model's reply to a message; one that a model cannot take is told to none."""
        for talk in self._talks:
            talk.check(text)
        sampling = {key: getattr(self._config, key) for key in _CHANGEABLE}
        name = f"reply-{self._num_replies}"
        turn: dict[str, Any] = {"user": text, "replies": []}
        with replies_on_screen([talk.name for talk in self._talks]) as screen:
            for place, talk in enumerate(self._talks):
                reply = talk.reply(text, name, partial(screen.part, place), **sampling)
                verdict = None if self._judge is None else judge_answers(self._judge, [reply.completion])[0]
                screen.end(place, _remarks(reply, verdict))
                turn["replies"].append(_facts(talk.name, reply, verdict))
        self._num_replies += 1
        self._turns.append(turn)


def _remarks(reply: Reply, verdict: Verdict | None) -> str:
    """Return what is to be said of a reply: that it does not end, and the verdict."""
    said = []
    if not reply.completion.finished:
        said.append("stopped" if reply.stopped else f"cut after {reply.num_tokens} tokens")
    if verdict is not None:
        found = []
        if verdict.label != "unscored" or verdict.refused is None:
            odds = "" if verdict.p_safe is None else f" ({verdict.p_safe:.2f})"
            why = f" ({verdict.reason})" if verdict.label == "unscored" and verdict.reason else ""
            found.append(f"{verdict.label}{odds}{why}")
        if verdict.refused is not None:
            declines = "declines in part" if verdict.partly_refused else "does not decline"
            found.append("declines" if verdict.refused else declines)
        said.append(f"{verdict.judge}: {', '.join(found)}")
    return "; ".join(said)


def _facts(name: str, reply: Reply, verdict: Verdict | None) -> dict[str, Any]:
    made = reply.completion
    facts = {"model": name, "text": made.text, "reasoning": made.reasoning, "finished": made.finished}
    return {**facts, "num_tokens": reply.num_tokens, "verdict": None if verdict is None else as_json(verdict)}
