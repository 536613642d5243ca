"""A conversation with a model that is loaded here: its replies in parts, as they are made."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from bfpo.core.errors import SettingError
from bfpo.core.schema import Completion, Message
from bfpo.data.chat import ChatEncoder
from bfpo.data.thinking import Thinking, opens_thought, without_thought
from bfpo.data.tokenize import check_ids, ids_to_check
from bfpo.generation.engines import decode
from bfpo.generation.sampling import Request, answer_batches, positions_left
from bfpo.policy.source import num_embeddings

__all__ = ["Reply", "Talk"]

_END_TOKENS = 32  # of a prompt, enough for an opening mark of thoughts


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply: the prompt with its answer, apart from its thoughts; `stopped`: Ctrl-C cut it."""

    completion: Completion
    num_tokens: int
    stopped: bool = False


class Talk:
    """A model and the conversation so far. A reply depends on the conversation, the settings and its id alone."""

    def __init__(
        self,
        name: str,
        model: Any,
        chat: ChatEncoder,
        eos_token_ids: Collection[int],
        *,
        system: str | None = None,
        thinking: Thinking | None = None,
    ) -> None:
        self.name = name
        self._model, self._chat, self._ends, self._thinking = model, chat, frozenset(eos_token_ids), thinking
        self._num_embeddings = ids_to_check(chat.tokenizer, num_embeddings(model.config))
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forget the conversation and begin a new one."""
        self._messages: tuple[Message, ...] = () if system is None else (Message("system", system),)

    def check(self, text: str) -> tuple[tuple[Message, ...], tuple[int, ...], int | None]:
        """Return the conversation with a message, its tokens, and how many a reply may have; raises as `reply` does."""
        prompt = (*self._messages, Message("user", text))
        ids = tuple(self._chat.encode(prompt, (), name="the conversation").prompt)
        check_ids(ids, self._chat.tokenizer, self._num_embeddings, "the conversation")
        left = positions_left(self._model.config, len(ids))
        if left is not None and left <= 0:
            raise SettingError(
                f"the conversation has {len(ids)} tokens and the model {len(ids) + left} positions, so there is no "
                "room for a reply; begin a new one with /reset, or write a shorter message"
            )
        return prompt, ids, left

    def reply(
        self, text: str, id: str, on_text: Callable[[str], None], *, max_new_tokens: int, **sampling: Any
    ) -> Reply:
        """Return the model's reply to a message; `on_text` gets its parts while it is made.

        It has at most `max_new_tokens`, and no more than the model has positions left. `sampling` as of
        `answer_batches`. After Ctrl-C the reply is what was made until then.

        Raises `SettingError` for a conversation that leaves no room for a reply, `RefusedChatError` for one that the
        chat template refuses, `ModelError` for a token that the model lacks; the message is then not part of the
        conversation.
        """
        prompt, ids, left = self.check(text)
        max_new_tokens = max_new_tokens if left is None else min(max_new_tokens, left)
        watch = _Watch(self._chat.tokenizer, len(ids), on_text)
        stopped = False
        try:
            (answer,) = next(
                answer_batches(
                    self._model,
                    [Request(id, ids)],
                    eos_token_ids=self._ends,
                    max_new_tokens=max_new_tokens,
                    processors=[watch],
                    **sampling,
                )
            )
            made, finished = list(answer.token_ids), answer.finished
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt:  # SIGTERM ends the command
                raise
            made, finished, stopped = watch.token_ids, False, True
        watch.show(made, last=finished)
        answered = decode(self._chat.tokenizer, made, finished=finished)
        whole = Completion(id, prompt, answered, self.name, finished=finished)
        opened = opens_thought(decode(self._chat.tokenizer, ids[-_END_TOKENS:]), (self._thinking or Thinking()).pairs)
        completion = self._chat.without_written(without_thought(whole, self._thinking, opened=opened or None))
        self._messages = (*prompt, Message("assistant", completion.text))
        return Reply(replace(completion, model=self.name), len(made), stopped)


class _Watch(LogitsProcessor):
    """Shows the text of the tokens so far before the next one is chosen; leaves the logits as they are."""

    def __init__(self, tokenizer: Any, width: int, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._width, self._on_text = tokenizer, width, on_text
        self._shown = 0
        self.token_ids: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged."""
        self.show(input_ids[0, self._width :].tolist())
        return scores

    def show(self, token_ids: list[int], *, last: bool = False) -> None:
        """Hand on the new text, except the bytes of a character that may not be whole yet."""
        self.token_ids = token_ids
        text = decode(self._tokenizer, token_ids, finished=last)
        if len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)
