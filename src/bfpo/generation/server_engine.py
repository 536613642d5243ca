"""The engine that asks an OpenAI-compatible server for completions."""

from __future__ import annotations

from collections.abc import Sequence

from bfpo.core.errors import ServerError
from bfpo.generation.engines import Made, Report, Task, completion_seed
from bfpo.generation.server import Question, Server
from bfpo.generation.server_answers import Answer

__all__ = ["ServerEngine"]


class ServerEngine:
    """A model behind a server (a `writer`), which renders the prompt itself; each request has its completion's seed."""

    def __init__(self, server: Server, *, max_new_tokens: int, seed: int) -> None:
        self._server, self._max_new_tokens, self._seed = server, max_new_tokens, seed

    def complete(self, tasks: Sequence[Task], report: Report) -> None:
        """Report each completion as it comes; one that ended by itself has the finish reason `stop`.

        Raises `ServerError` as `Server.ask` does, and at the end where completions never came.
        """
        lost: list[str] = []

        def read(place: int, answer: Answer) -> None:
            task = tasks[place]
            if answer.text is None:
                lost.append(f"{task.id!r}: {answer.fault}")
                return
            # JSON may hold half a surrogate pair, which no file can.
            text = answer.text.encode("utf-8", "replace").decode()
            report([Made(task.id, text, answer.finish_reason == "stop", answer.num_tokens)])

        questions = [
            Question(task.messages, self._max_new_tokens, seed=completion_seed(self._seed, task.id)) for task in tasks
        ]
        self._server.ask(questions, read)
        if lost:
            raise ServerError(f"{self._server.url}: {len(lost)} of {len(tasks)} completions got no answer ({lost[0]})")
