"""What methods read beside the margin, in training: other log-probs of the pairs, their groups, a state over the steps.

Axes: P pairs, S entries of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bfpo.core.errors import DataError, SettingError
from bfpo.data.chat import ChatEncoder
from bfpo.data.pack import MicroBatch, on_device, split_by_tokens
from bfpo.data.store import LazyPairs, reference_logps, safety_labels, text_lengths, token_lengths
from bfpo.data.tokenize import Ids, TokenPair
from bfpo.objective.methods import METHODS, Beside, Method, ReadsBeside
from bfpo.objective.pointwise import desirable_answers
from bfpo.policy.logps import sequence_logps
from bfpo.policy.reference.forward_pass import MAX_TOKENS, ReferencePass
from bfpo.training.arguments import BFPOConfig

__all__ = ["MethodInputs", "check_paired", "looked_up"]

Collate = Callable[[Sequence[TokenPair]], MicroBatch]
_Even = Callable[[list[MicroBatch], Callable[[], MicroBatch]], list[MicroBatch]]
_Place = tuple[int, int, bool]
"""Of a companion its list, its place there, and whether it is the buffer's."""
_STREAMS = ("main", "buffer")
_POINTWISE = " and ".join(name for name, method in METHODS.items() if method.pointwise)


def check_paired(method: Method, lists: Iterable[Sequence[TokenPair]]) -> None:
    """Raise `DataError` for an answer without a pair unless the method is pointwise."""
    if method.pointwise:
        return
    for pairs in lists:
        lacking = np.flatnonzero(token_lengths(pairs)[:, 2] == 0)
        if len(lacking):
            raise DataError(
                f"{len(lacking)} of {len(pairs)} rows are single answers ({pairs[int(lacking[0])].pair_id}, ...), and "
                f"the method {method.name!r} compares two; use pairs, or a method that takes single answers "
                f"({_POINTWISE})"
            )


def looked_up(tables: Sequence[Tensor], inputs: Mapping[str, Any], *, training: bool) -> Tensor:
    """Return the rows of a micro-batch's pairs, on its device: (P, ...).

    `tables`: one for each stream, then one for held-out pairs, by a pair's place.
    """
    index = inputs["pair_index"].cpu()
    if not training:
        rows = tables[-1][index]
    elif len(tables) == 1 or not bool(inputs["is_buffer"].any()):
        rows = tables[0][index]
    else:
        streams = inputs["is_buffer"].long().tolist()
        rows = torch.stack([tables[s][i] for s, i in zip(streams, index, strict=True)])
    return rows.to(inputs["pair_index"].device)


def _unprompted_ids(tokenizer: Any) -> Ids:
    """Return the token that unconditional text starts from, (1,) int32."""
    return np.asarray(ChatEncoder(tokenizer).encode((), (), name="an empty prompt").prompt[-1:], np.int32)


class _Companions(LazyPairs):
    """Pairs made of those of a list, without reference log-probs; see `ReadsBeside.companion`.

    `longest`: the tokens of the longest text of the data, prompt and completion.
    """

    def __init__(self, pairs: Sequence[TokenPair], start: Ids | None, longest: int) -> None:
        self._pairs, self._start, self._longest = pairs, start, longest

    def __len__(self) -> int:
        return len(self._pairs)

    def _pair(self, place: int) -> TokenPair:
        pair = self._pairs[place]
        prompt, other = (self._start, pair) if self._start is not None else self._mismatched(place, pair)
        labels = (pair.chosen_is_safe, pair.rejected_is_safe)
        return TokenPair(pair.pair_id, prompt, other.chosen_ids, other.rejected_ids, *labels)

    def _mismatched(self, place: int, pair: TokenPair) -> tuple[Ids, TokenPair]:
        """Return the prompt of a pair, cut so that no text is longer than `longest`, and the pair with its answers.

        That is half the data away, as neighbours may share a prompt or a subject; where it has the same prompt, the
        first of those 1, 2, 4, ... further on that has not, so that a run of any length is left in few steps.
        """

        def further(step: int) -> TokenPair:
            return self._pairs[(place + (len(self) + 1) // 2 + step) % len(self)]

        steps = (0, *(2**power for power in range(len(self).bit_length())))
        other = further(next((step for step in steps if not _same_prompt(pair, further(step))), 0))
        room = self._longest - max(len(other.chosen_ids), len(other.rejected_ids))
        return pair.prompt_ids[-room:], other


def _same_prompt(one: TokenPair, other: TokenPair) -> bool:
    """Return whether two pairs have the same prompt, of which one may be cut more than the other."""
    shared = min(len(one.prompt_ids), len(other.prompt_ids))
    return np.array_equal(one.prompt_ids[-shared:], other.prompt_ids[-shared:])


class MethodInputs:
    """What a method with `reads` gets, pair by pair, and its state from step to step.

    `lists`: the streams, then at most one list of held-out pairs that can be looked up. The log-probs of companions
    under the model as it is now, the reference, are computed here once; they are read from and added to the cache, as
    those of the pairs. `categories`: of each list, the name of each pair's category, "" for none; without it all pairs
    share one. `collate`: pairs -> a micro-batch on the device.

    Raises `SettingError` for categories of other sizes, and where a model that will be sharded would have to compute
    log-probs before it is.
    """

    def __init__(
        self,
        method: ReadsBeside,
        model: nn.Module,
        lists: Sequence[Sequence[TokenPair]],
        args: BFPOConfig,
        *,
        tokenizer: Any,
        collate: Collate,
        form: Any,
        mixed_precision: str,
        sharded: bool,
        num_streams: int,
        categories: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.method = method
        self._args, self._collate, self._form, self._device = args, collate, form, args.device
        self.names = self._groups(lists, num_streams, categories)
        self._state = torch.zeros(len(self.names), dtype=torch.float64, device=args.device)
        self._held_out: Tensor | None = None  # the state of an evaluation, where it has one of its own
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=args.device)
        self._balance = [_balance(pairs) for pairs in lists] if "balance" in method.reads else []
        self._companions: list[_Companions] = []
        self._companion_logps: list[Tensor] = []
        if method.companion:
            start = _unprompted_ids(tokenizer) if method.companion == "unprompted" else None
            longest = max(int(text_lengths(pairs).max(initial=0)) for pairs in lists)
            self._companions = [_Companions(pairs, start, longest) for pairs in lists]
            self._companion_logps = self._pass(model, mixed_precision, sharded=sharded)

    def _groups(
        self, lists: Sequence[Sequence[TokenPair]], num_streams: int, categories: Sequence[Sequence[str]] | None
    ) -> list[str]:
        """Return the names of the state's entries; by category, keep that of each pair."""
        self._category: list[Tensor] = []
        if self.method.state_by != "category":
            return list(_STREAMS[:num_streams])
        if categories is None:
            categories = [[""] * len(pairs) for pairs in lists]
        sizes, wanted = [len(each) for each in categories], [len(pairs) for pairs in lists]
        if sizes != wanted:
            raise SettingError(f"categories: got {sizes} names; allowed: {wanted}, one for each pair of each list")
        names = sorted({name for each in categories for name in each})
        place = {name: number for number, name in enumerate(names)}
        self._category = [torch.tensor([place[name] for name in each], dtype=torch.int64) for each in categories]
        return names

    def _pass(self, model: nn.Module, mixed_precision: str, *, sharded: bool) -> list[Tensor]:
        args = self._args
        look_up = ReferencePass(
            model,
            self._companions,
            cache=args.reference_cache,
            mixed_precision=mixed_precision,
            process_index=args.process_index,
            num_processes=args.world_size,
        )
        if sharded and look_up.num_missing():
            raise SettingError(
                f"{self.method.name}: it needs log-probs of {look_up.num_missing()} more texts before training, and "
                "until FSDP or DeepSpeed shards the model it is on the CPU, where they would take too long; fill the "
                "cache beforehand with bfpo reference --config FILE, launched without sharding"
            )
        found, _ = look_up.run(collate=self._collate, max_tokens=args.max_tokens_per_microbatch or MAX_TOKENS)
        columns = [reference_logps(pairs) for pairs in found]
        return [torch.from_numpy(np.stack(pair, axis=1)) for pair in columns if pair is not None]

    # In a step

    def of(
        self,
        inputs: Mapping[str, Any],
        *,
        drift: Tensor,
        reference: Tensor,
        logps: Tensor,
        tokens: Tensor,
        per: Tensor,
        training: bool,
    ) -> Beside:
        """Return what the method reads of a micro-batch.

        (N,) each: `drift` and `reference` sums in nats, `logps` those of the policy, `tokens`, and `per`, by which a
        sum is divided in the reduction of the loss.
        """
        reads = self.method.reads
        found: dict[str, Tensor] = {
            "drift": (drift / per).view(2, -1),
            "present": (tokens > 0).view(2, -1),
            "group": self._group(inputs, training=training),
            "state": self._state if training or self._held_out is None else self._held_out,
        }
        if "reference" in reads:
            found["reference"] = (reference / per).view(2, -1)
        if "mean_logps" in reads:
            found["mean_logps"] = (logps.detach() / tokens.clamp(min=1)).view(2, -1)
        if "information" in reads:
            alone = looked_up(self._companion_logps, inputs, training=training).T
            found["information"] = (reference.view(2, -1) - alone) / tokens.clamp(min=1).view(2, -1)
        if self._balance:
            found["balance"] = self._balance_of(inputs, training=training)
        return replace(Beside.at_rest(drift[: len(inputs["pair_index"])]), **found)

    def _group(self, inputs: Mapping[str, Any], *, training: bool) -> Tensor:
        if self._category:
            return looked_up(self._category, inputs, training=training)
        return inputs["is_buffer"].long()  # type: ignore[no-any-return]

    def _balance_of(self, inputs: Mapping[str, Any], *, training: bool) -> Tensor:
        by_list = torch.stack(self._balance).to(inputs["pair_index"].device)
        which = inputs["is_buffer"].long() if training else torch.full_like(inputs["pair_index"], len(by_list) - 1)
        return by_list[which].T

    def add(self, inputs: Mapping[str, Any], beside: Beside) -> None:
        """Add the pairs of a micro-batch of training to the sums that the next state is made from."""
        if self.method.state_by and not self._mismatched:
            self._sums += self.method.observe(inputs["chosen_is_safe"], inputs["rejected_is_safe"], beside)

    @property
    def _mismatched(self) -> bool:
        return self.method.companion == "mismatched"

    def start_step(
        self,
        model: nn.Module,
        microbatches: Sequence[MicroBatch],
        *,
        even: _Even,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Make the state of a step from the companions of its pairs in all processes, for a method that needs that.

        Call it without gradient. `even` fills up micro-batches so that all processes have as many.
        """
        if self._mismatched:
            places = [
                (int(is_buffer), int(index), bool(is_buffer))
                for batch in microbatches
                if "is_filler" not in batch
                for is_buffer, index in zip(batch["is_buffer"].tolist(), batch["pair_index"].tolist(), strict=True)
            ]
            self._state = self._state_of(model, self._cut(places), even=even, reduce=reduce)

    def start_evaluation(self, model: nn.Module, *, even: _Even, reduce: Callable[[Tensor], Tensor]) -> None:
        """Make the state of an evaluation likewise, from all held-out pairs: no loss depends on the batches then."""
        if self._mismatched:
            last, args = len(self._companions) - 1, self._args
            mine = range(args.process_index, len(self._companions[last]), args.world_size)
            parts = [mine[start : start + args.eval_batch_size] for start in range(0, len(mine), args.eval_batch_size)]
            batches = [batch for part in parts for batch in self._cut([(last, index, False) for index in part])]
            self._held_out = self._state_of(model, batches, even=even, reduce=reduce)

    def _state_of(
        self, model: nn.Module, batches: list[MicroBatch], *, even: _Even, reduce: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the state from the companions of this process; all processes call it."""
        sums = torch.zeros_like(self._sums)
        for batch in even(batches, lambda: self._batch([(0, 0, False)])):
            on_it = on_device(batch, self._device)
            found = sequence_logps(model, on_it)
            if "is_filler" in batch:
                continue
            per = found.num_tokens.double().clamp(min=1) if self._args.reduction == "mean" else 1.0
            drift = ((found.logps - on_it["companion_logps"]) / per).view(2, -1)
            present = (found.num_tokens > 0).view(2, -1)
            known = {"drift": drift, "present": present, "group": on_it["is_buffer"].long(), "state": self._state}
            beside = replace(Beside.at_rest(drift[0]), **known)
            sums += self.method.observe(on_it["chosen_is_safe"], on_it["rejected_is_safe"], beside)
        return self.method.next_state(self._state, reduce(sums))

    def _cut(self, places: Sequence[_Place]) -> list[MicroBatch]:
        """Return micro-batches of the companions at some places."""
        pairs = [self._companions[number][index] for number, index, _ in places]
        groups = split_by_tokens(
            token_lengths(pairs).tolist(), form=self._form, max_tokens=self._args.max_tokens_per_microbatch
        )
        return [self._batch([places[i] for i in group]) for group in groups if group]

    def _batch(self, places: Sequence[_Place]) -> MicroBatch:
        batch = self._collate([self._companions[number][index] for number, index, _ in places])
        logps = torch.stack([self._companion_logps[number][index] for number, index, _ in places])
        batch["companion_logps"] = logps.T.flatten()
        batch["is_buffer"] = torch.tensor([is_buffer for *_, is_buffer in places])
        return batch

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Make the next state from the sums of the step, `reduce`d over processes."""
        if self.method.state_by and not self._mismatched:
            self._state = self.method.next_state(self._state, reduce(self._sums.clone()))
            self._sums.zero_()

    # Between steps

    @property
    def figures(self) -> dict[str, float]:
        """The state for a row of the log, `state/<name>`; that of an unnamed category is `state/no category`."""
        values = self.state() if self.method.state_by else []
        return {f"state/{name or 'no category'}": value for name, value in zip(self.names, values, strict=False)}

    def state(self) -> list[float]:
        """Return the state between two steps, as JSON values."""
        values: list[float] = self._state.tolist()
        return values

    def load(self, state: Sequence[float] | None) -> None:
        """Restore what `state` returned; `None` is the start."""
        self._sums.zero_()
        self._state = torch.zeros_like(self._state) if state is None else self._state.new_tensor(state)


def _balance(pairs: Sequence[TokenPair]) -> Tensor:
    """Return how many pairs there are for each desirable, and for each undesirable answer, (2,) float64."""
    chosen, rejected = (torch.tensor(each) for each in safety_labels(pairs))
    present = torch.tensor(token_lengths(pairs)[:, 1:]).T > 0
    wanted = torch.stack(desirable_answers(chosen, rejected))
    counts = torch.stack([(wanted & present).sum(), (~wanted & present).sum()]).double()
    return len(pairs) / counts.clamp(min=1)
