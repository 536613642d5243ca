"""BFPO's objective as a thin trainer on TRL's `DPOTrainer`, for those who stay with TRL; the extra `trl`.

TRL prepares the data, the reference and the model. The loss is ours: log-probs by `bfpo.policy.logps`, the objective by
`preference_loss`. There is no buffer, no packing, no check of the first loss and no resume of two streams; for these
use `bfpo.BFPOTrainer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor
from transformers.utils.versions import require_version

from bfpo.core.errors import LabelError, MissingExtraError, SettingError, first_line
from bfpo.objective.losses import preference_loss
from bfpo.objective.methods import ReadsBeside, make_method
from bfpo.policy.logps import sequence_logps
from bfpo.policy.probe import choose_form

try:
    require_version("trl>=1.16")
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
except ImportError as error:
    raise MissingExtraError(
        f"bfpo.integrations.trl: needs trl >= 1.16 ({first_line(error)}); pip install 'bfpo[trl]', on Python 3.11 "
        "or newer"
    ) from error

__all__ = ["LABELS", "LabelledPairCollator", "TRLBFPOTrainer"]

LABELS = ("chosen_is_safe", "rejected_is_safe")
"""The two columns of a data set that TRL does not know: bits, or probabilities of being safe."""
_THEIR_LOSS = (
    "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing",
    "use_weighting", "discopop_tau", "router_aux_loss_coef",
)  # fmt: skip
_LOGGED = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip
_CITATION = """\
@inproceedings{zhang2025bfpo,
    title     = {{Bi-Factorial Preference Optimization: Balancing Safety-Helpfulness in Language Models}},
    author    = {Wenxuan Zhang and Philip Torr and Mohamed Elhoseiny and Adel Bibi},
    booktitle = {International Conference on Learning Representations},
    year      = 2025,
}"""


class LabelledPairCollator:
    """TRL's collator of pairs, and the labels of the P pairs as (P,) float64 tensors.

    Raises `LabelError` for a row without one of the labels, or with something else than a number there.
    """

    def __init__(self, pairs: DataCollatorForPreference) -> None:
        self.pairs = pairs

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of some rows."""
        batch: dict[str, Any] = self.pairs(list(examples))
        for name in LABELS:
            values = [example.get(name) for example in examples]
            if None in values:
                raise LabelError(
                    f"{name}: missing in a row of the data set; needed: the columns {' and '.join(LABELS)} with true, "
                    "false or a probability in [0, 1]"
                )
            for value in values:
                if not isinstance(value, (bool, int, float)):
                    raise LabelError(f"{name}: got {value!r}; allowed: true, false or a probability in [0, 1]")
            batch[name] = torch.tensor(values, dtype=torch.float64)
        return batch


class TRLBFPOTrainer(DPOTrainer):  # type: ignore[misc]
    """A `trl.DPOTrainer` whose loss is a method of `bfpo`, on a data set with two more columns, `LABELS`.

    `method` is a name of `METHODS` and `settings` are its settings besides beta, which is `args.beta`. Settings of
    TRL's own losses are refused, as are a method that reads more than the margin, `compute_metrics` and images.
    `rewards/*` and `logps/*` are logged as TRL's trainer does.

    Raises `SettingError` for these, and the errors of `make_method`.
    """

    data_collator: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *,
        method: str = "bfpo",
        settings: Mapping[str, float | str] | None = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        if args is None:
            raise SettingError("args: missing; give a trl.DPOConfig, whose beta is read")
        own = {one.name: one for one in fields(DPOConfig) if one.name in _THEIR_LOSS}
        defaults = {
            name: one.default if one.default_factory is MISSING else one.default_factory() for name, one in own.items()
        }
        changed = [name for name, default in defaults.items() if getattr(args, name) != default]
        if changed:
            raise SettingError(f"args: {', '.join(changed)}: of TRL's own losses, not read here; leave it out")
        self.method = make_method(method, beta=args.beta, **(settings or {}))
        if self.method.shifted or isinstance(self.method, ReadsBeside):
            raise SettingError(f"method: {method} reads more than the margin; train it with bfpo.BFPOTrainer")
        if others.get("data_collator") is not None:
            raise SettingError("data_collator: not read, the labels need their own; leave it out")
        if others.get("compute_metrics") is not None:
            raise SettingError("compute_metrics: there are no logits of whole sequences here; leave it out")
        args.remove_unused_columns = False  # the labels would be removed
        self._describe(method)
        self._pairs: list[Tensor] = []
        super().__init__(model, ref_model, args, processing_class=processing_class, **others)
        if not isinstance(self.data_collator, DataCollatorForPreference):
            raise SettingError("train_dataset: has images, which are not read here; leave their column out")
        self.data_collator = LabelledPairCollator(self.data_collator)
        # Whether the head alone gives the model's logits; TRL bounds the lengths itself.
        alike = {"process_index": args.process_index, "num_processes": args.world_size}
        choose_form(self.model, "padded", longest_text=1, **alike)

    def _describe(self, method: str) -> None:
        """Set what TRL writes on the model card: the attributes that each of its trainers sets for its own method."""
        self._tag_names = list(dict.fromkeys(["trl", "bfpo", method]))
        self._name = self.method.title
        self._paper = {"title": self.method.paper, "id": self.method.paper.removeprefix("arXiv ")}
        if method == "bfpo":
            title = "Bi-Factorial Preference Optimization: Balancing Safety-Helpfulness in Language Models"
            self._paper |= {"title": title, "citation": _CITATION}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the mean loss of the P pairs of a batch.

        Raises `SettingError` for `return_outputs`.
        """
        if return_outputs:
            raise SettingError("return_outputs: there are no logits of whole sequences here; leave it out")
        chosen, rejected = sequence_logps(model, _as_microbatch(inputs)).logps.chunk(2)
        if "ref_chosen_logps" in inputs:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self.ref_model or model, inputs)
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
        self._note(chosen, rejected, self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected))
        labels = (inputs[name].to(margin.device) for name in LABELS)
        return preference_loss(margin, *labels, method=self.method).loss.mean().float()

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Return TRL's reference log-probs of a batch, whose labels the model does not take."""
        return super().compute_ref_log_probs(model, {key: value for key, value in inputs.items() if key not in LABELS})

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Return the loss of a held-out batch, and nothing else."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def evaluation_loop(self, *given: Any, metric_key_prefix: str = "eval", **others: Any) -> Any:
        """Return TRL's result of an evaluation, with the means over its pairs."""
        of_training, self._pairs = self._pairs, []
        found = super().evaluation_loop(*given, metric_key_prefix=metric_key_prefix, **others)
        found.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._means().items()})
        self._pairs = of_training
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row; one of training has the means over the pairs since the last."""
        if "loss" in logs:
            logs.update(self._means())
        super().log(logs, start_time)

    def _note(self, chosen: Tensor, rejected: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> None:
        """Keep what is logged of the P pairs of a batch, `_LOGGED`; each argument is (P,)."""
        margins = chosen_rewards - rejected_rewards
        values = [chosen_rewards, rejected_rewards, margins, (margins > 0).to(margins), chosen, rejected]
        self._pairs.append(self.accelerator.gather_for_metrics(torch.stack(values, dim=1).detach()))

    def _means(self) -> dict[str, float]:
        """Return the means over the pairs kept, and forget them."""
        pairs, self._pairs = self._pairs, []
        return dict(zip(_LOGGED, torch.cat(pairs).mean(dim=0).tolist(), strict=True)) if pairs else {}


def _as_microbatch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return TRL's padded batch in the form of `sequence_logps`: completion tokens and the places that predict them."""
    input_ids = inputs["input_ids"]
    sequence, place = inputs["completion_mask"][:, 1:].nonzero(as_tuple=True)
    return {
        "input_ids": input_ids,
        "source": sequence * input_ids.shape[1] + place,
        "targets": input_ids[sequence, place + 1],
        "sequence": sequence,
        "chosen_is_safe": inputs["chosen_is_safe"],
    }
