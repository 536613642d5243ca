"""The behaviour probe: held-out prompts that the model answers during training, and what its figures decide.

`Probe` asks a model, `ProbeCallback` asks at step 0, every few optimizer steps and at the end, logs the figures as
`probe/...`, keeps the best checkpoint and stops the run by the rules of `bfpo.config.probe`. Nothing of the training
changes: no random number is drawn, the modes of all modules are restored, and the weights are only read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from bfpo.config.probe import KINDS, SHARES, ProbeConfig
from bfpo.core.errors import SettingError
from bfpo.core.provenance import Remark
from bfpo.core.schema import Completion, Message
from bfpo.data.thinking import opens_thought, without_thought
from bfpo.generation.engines import decode
from bfpo.generation.sampling import Answer, Request, answer_batches, end_token_ids, opening_logps
from bfpo.judges.coherence import read_coherence
from bfpo.judges.refusals import last_question, read_refusal
from bfpo.policy.logps import evaluating
from bfpo.training.records import ProbeAnswer, ProbeFile, ProbeRow, probe_share
from bfpo.training.sharding import is_sharded

__all__ = ["OPENING_TOKENS", "PROBE_SHOWN", "Probe", "ProbeCallback", "ProbePrompt", "probe_figures"]

logger = logging.getLogger(__name__)

OPENING_TOKENS = 4
_END_TOKENS = 32  # of a prompt, enough for an opening mark of thoughts
PROBE_SHOWN = {f"probe/{kind}/refused": f"refuses {kind}" for kind in KINDS} | {
    f"probe/{kind}/incoherent": f"incoherent ({kind})" for kind in KINDS
}
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProbePrompt:
    """A prompt of the probe in tokens; `refusals`: the first tokens of each refusal, which follow `before_refusal`.

    These are the tokens of the prompt (an empty tuple stands for them), with what the chat template writes before an
    answer, such as empty thoughts.
    """

    id: str
    kind: str
    messages: tuple[Message, ...]
    prompt_ids: Ids
    refusals: tuple[Ids, ...]
    before_refusal: Ids = ()

    @property
    def text(self) -> str:
        """The texts of all turns."""
        return "\n\n".join(message.content for message in self.messages)


@dataclass(frozen=True)
class Probe:
    """The prompts, empty in all processes but the first, and how they are asked; `end_id`: see `ChatEncoder`."""

    settings: ProbeConfig
    prompts: Sequence[ProbePrompt]
    tokenizer: Any
    end_id: int

    def ask(self, model: Any, own: Mapping[str, Ids] | None = None) -> tuple[list[ProbeAnswer], dict[str, Ids]]:
        """Return the answers in the order of the prompts, and the first tokens of the start's own answers by prompt.

        `own`: what an earlier call returned; without it this model is the start. Raises `SettingError` for a prompt
        that is too long for the model.
        """
        device = next(model.parameters()).device
        with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            batches = answer_batches(
                model,
                [Request(one.id, one.prompt_ids) for one in self.prompts],
                eos_token_ids={*end_token_ids(model, self.tokenizer), self.end_id},
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                temperature=0.0,
            )
            made = {answer.id: answer for batch in batches for answer in batch}
            # Of a prompt that the earlier call did not know (an id of before these were unique) that of now.
            own = {name: _opening(answer, self.end_id) for name, answer in made.items()} | dict(own or {})
            openings: dict[Ids, list[Ids]] = {}  # by the tokens before them; each of these is read once
            for one in self.prompts:
                openings.setdefault(one.prompt_ids, []).append(own[one.id])
                openings.setdefault(one.before_refusal or one.prompt_ids, []).extend(_distinct(one.refusals))
            logps = opening_logps(model, list(openings), list(openings.values()), batch_size=self.settings.batch_size)
        logp_of = {
            (before, opening): logp
            for (before, some), found in zip(openings.items(), logps, strict=True)
            for opening, logp in zip(some, found, strict=True)
        }
        answers = []
        for one in self.prompts:
            text = decode(self.tokenizer, made[one.id].token_ids)
            opened = opens_thought(decode(self.tokenizer, one.prompt_ids[-_END_TOKENS:]))
            reading = _reading(text, one, finished=made[one.id].finished, opened=opened or None)
            before = one.before_refusal or one.prompt_ids
            refused = np.logaddexp.reduce([logp_of[before, opening] for opening in _distinct(one.refusals)])
            answers.append(ProbeAnswer(text, reading, float(refused), logp_of[one.prompt_ids, own[one.id]]))
        return answers, dict(own)


def _opening(answer: Answer, end_id: int) -> Ids:
    return (*answer.token_ids, *([end_id] if answer.finished else []))[:OPENING_TOKENS]


def _distinct(openings: Sequence[Ids]) -> list[Ids]:
    """Return the openings of which no other is the beginning: an answer then starts with at most one of them."""
    unique = list(dict.fromkeys(openings))
    return [one for one in unique if not any(one != other and one[: len(other)] == other for other in unique)]


def _reading(text: str, prompt: ProbePrompt, *, finished: bool, opened: bool | None = None) -> str:
    """Return how an answer is read; one that declines in part counts as refused, an incoherent one only as that.

    Thoughts before it are left out, and one whose thoughts do not end is not read. `opened` as in `split_thought`.
    """
    answer = without_thought(Completion("", prompt.messages, text, finished=finished), opened=opened)
    if text.strip() and not answer.text and not answer.finished:
        return "not read"
    if read_coherence(answer.text, finished=answer.finished, prompt=prompt.text).incoherent:
        return "incoherent"
    found = read_refusal(answer.text, last_question(prompt.messages))
    if found.refused is None:
        return "not read"
    return "refused" if found.refused or found.partly else "complied"


def probe_figures(kinds: Sequence[str], answers: Sequence[ProbeAnswer]) -> dict[str, float]:
    """Return the figures of rules, such as `harmful_refused`, of answers to prompts of these kinds."""
    by_kind = {kind: [one for own, one in zip(kinds, answers, strict=True) if own == kind] for kind in KINDS}
    return {f"{kind}_{share}": probe_share(some, share) for kind, some in by_kind.items() if some for share in SHARES}


@dataclass(slots=True)
class _Seen:
    """What goes into checkpoints: the start's answers, the latest, the best so far, why the run stopped, the cost."""

    own: dict[str, Ids] = field(default_factory=dict)
    start: list[ProbeAnswer] = field(default_factory=list)
    last: list[ProbeAnswer] = field(default_factory=list)
    last_step: int = 0
    best: list[ProbeAnswer] = field(default_factory=list)
    best_step: int | None = None
    best_score: float | None = None
    stopped: str = ""
    seconds: float = 0.0

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> _Seen:
        answers = {name: [ProbeAnswer(**one) for one in held[name]] for name in ("start", "last", "best")}
        return cls(**{**held, **answers, "own": {name: tuple(ids) for name, ids in held["own"].items()}})


class ProbeCallback(TrainerCallback, ExportableState):
    """Asks the probe, in the first process, and acts on its rules in all of them; add it after `MetricsCallback`.

    `write` gets the `probe.json` of each probe. Checkpoints hold what it has seen: a resumed run goes on as one that
    was not stopped. Raises `SettingError` for a sharded model, and before the first step for a condition of `stop`
    that holds already.
    """

    def __init__(self, probe: Probe, trainer: Trainer, write: Callable[[ProbeFile], object]) -> None:
        if is_sharded(trainer):
            raise SettingError(
                "probe: FSDP or DeepSpeed shards this model, and a probe needs whole weights; leave probe out, or "
                "train without sharding"
            )
        self._probe, self._trainer, self._write = probe, trainer, write
        self._rule, self._stops = probe.settings.best_rule(), probe.settings.stop_conditions()
        self.seen = _Seen()
        self.num_probes = 0

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint."""
        return {"args": {}, "attributes": asdict(self.seen)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what a checkpoint holds, or ask the start."""
        stored: Any = state.stateful_callbacks
        name = type(self).__name__
        if state.global_step > 0 and name in stored:
            self.seen = _Seen.of(stored[name]["attributes"])
            return
        self.seen = _Seen()
        if state.is_world_process_zero:
            figures = self._ask(state, control)
            for condition in self._stops:
                if condition.holds(figures, figures):
                    away = "+" if ">" in condition.sign else "-"
                    raise SettingError(
                        f"probe.stop: {str(condition)!r} holds before the first step "
                        f"({figures[condition.figure]:.3g}), so the run would stop at its first probe; set another "
                        f"bound, such as '{condition.figure} {condition.sign} start {away} 0.1', or leave the "
                        "condition out"
                    )
        stored[name] = self.state()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the model if it is time, and act on the rules."""
        step = state.global_step
        if step % self._probe.settings.steps and step < state.max_steps:
            return
        is_best = False
        if state.is_world_process_zero:
            figures = self._ask(state, control)
            is_best = self._is_best(figures)
            met = [str(one) for one in self._stops if one.holds(figures, self._of_start())]
            self.seen.stopped = " and ".join(met) if step < state.max_steps else ""
        decided = torch.tensor([is_best, bool(self.seen.stopped)], dtype=torch.int64, device=args.device)
        if args.world_size > 1:  # the others have asked nothing
            torch.distributed.broadcast(decided, 0)
        if decided[0]:
            self.seen.best_step = step
            control.should_save = True
        if decided[1]:
            if state.is_world_process_zero:
                logger.info("probe: %s: stopping at step %d of %d", self.seen.stopped, step, state.max_steps)
            control.should_training_stop = True

    def ask_kept(self, state: TrainerState, control: TrainerControl) -> None:
        """Ask the model that another rule keeps, whose checkpoint was read, unless it was asked at that step."""
        if state.is_world_process_zero and self.seen.last_step != state.global_step:
            self._ask(state, control)

    def _ask(self, state: TrainerState, control: TrainerControl) -> dict[str, float]:
        """Ask the model, log and write what it answers, and return the figures of the rules."""
        seen, started = self.seen, time.monotonic()
        with self._trainer.accelerator.autocast():
            answers, seen.own = self._probe.ask(self._trainer.model, seen.own)
        seen.seconds += time.monotonic() - started
        self.num_probes += 1
        if self.num_probes == 1:
            logger.info(
                "probe: %d prompts in %.1f s, every %d steps and at the end",
                len(answers), time.monotonic() - started, self._probe.settings.steps,
            )  # fmt: skip
        seen.start = seen.start or answers
        seen.last, seen.last_step = answers, state.global_step
        self._write(self.file(answers, state.global_step))
        kinds = [one.kind for one in self._probe.prompts]
        logs_too = control.should_log
        self._trainer.log(_row(kinds, answers))
        control.should_log = logs_too  # a log resets it, and the row of the loss is due after this
        return probe_figures(kinds, answers)

    def _of_start(self) -> dict[str, float]:
        return probe_figures([one.kind for one in self._probe.prompts], self.seen.start)

    def _is_best(self, figures: Mapping[str, float]) -> bool:
        """Return whether no probe so far is better, and note it; of equal ones the later counts."""
        score, seen = None if self._rule is None else self._rule.score(figures, self._of_start()), self.seen
        if score is None or (seen.best_score is not None and score < seen.best_score):
            return False
        seen.best, seen.best_score = seen.last, score
        return True

    def file(self, answers: Sequence[ProbeAnswer], step: int) -> ProbeFile:
        """Return `probe.json` with these answers beside those of the start."""
        rows = zip(self._probe.prompts, self.seen.start, answers, strict=True)
        return ProbeFile(step, [ProbeRow(one.id, one.kind, one.text, start, now) for one, start, now in rows])

    def of_the_end(self) -> ProbeFile:
        """Return, and write, `probe.json` of the model that is kept: the best one, else the last."""
        seen = self.seen
        kept = self.file(seen.best, seen.best_step) if seen.best_step else self.file(seen.last, seen.last_step)
        self._write(kept)
        return kept

    def remarks(self) -> Iterator[Remark]:
        """Yield what the rules did: which checkpoint is kept, and why the run stopped before its last step."""
        seen = self.seen
        if seen.stopped:
            yield Remark("stopped", f"stopped at step {seen.last_step}, since {seen.stopped}", "note")
        if self._rule is None:
            return
        rule = self._probe.settings.best
        start = self._rule.score(self._of_start(), self._of_start())
        if seen.best_score is None:
            yield Remark("no_best", f"no probe meets the conditions of best ({rule}): model/ is that of the last step")
            return
        of = f"step {seen.best_step} of {seen.last_step}"
        yield Remark("best", f"model/ is that of {of}, the best by {rule} ({seen.best_score:.3g})", "note")
        if start is not None and start >= seen.best_score:
            yield Remark("start_is_best", f"no checkpoint is better than the start by {rule} ({start:.3g})")


def _row(kinds: Sequence[str], answers: Sequence[ProbeAnswer]) -> dict[str, float]:
    """Return the row of `metrics.jsonl`: shares, and means of the log-probs in nats, by kind."""
    row: dict[str, float] = {}
    figures = probe_figures(kinds, answers)
    for kind in dict.fromkeys(kinds):
        some = [one for own, one in zip(kinds, answers, strict=True) if own == kind]
        row[f"probe/{kind}/num_prompts"] = len(some)
        row |= {f"probe/{kind}/{share}": figures[f"{kind}_{share}"] for share in SHARES}
        for name in ("refusal_logp", "own_logp"):
            row[f"probe/{kind}/{name}"] = float(np.mean([getattr(one, name) for one in some]))
    return row
