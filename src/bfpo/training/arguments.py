"""Arguments of preference training: those of `transformers.TrainingArguments` and the method's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from bfpo.core.errors import SettingError
from bfpo.objective.methods import Method, check_number, make_method, method_settings

__all__ = ["BFPOConfig"]


if TYPE_CHECKING:
    MethodOrName = Method | str

    class _MethodSettings:
        beta: float
else:
    MethodOrName = str  # what `HfArgumentParser` reads
    _MethodSettings = make_dataclass(
        "_MethodSettings",
        [
            (name, (str if each.choices else float) | None, field(default=None, metadata={"help": each.description}))
            for name, each in method_settings().items()
        ],
    )


@dataclass
class BFPOConfig(_MethodSettings, TrainingArguments):
    """`transformers.TrainingArguments` with the method and its settings; the defaults are the published ones.

    `per_device_train_batch_size` counts pairs of each stream per batch of the loader, which is cut into micro-batches
    of at most `max_tokens_per_microbatch` tokens (`None`: not at all); the loss does not depend on it. `attention`:
    rows of "packed" pairs with a shared prompt, "padded" ones, or "auto": packed where the model takes them. `method`:
    a name of `METHODS`, with its settings as further arguments (`beta`, `alpha`, ...; the method's default where not
    given), or an object, as `BFPO(beta=0.1)`. `reduction`: "sum" (the paper) or "mean" of a completion's log-probs.
    `anchor_weight`, `anchor_scale`: see `add_anchor`. `buffer_weight`: of the buffer's mean loss, beside the main's.
    `reference`: "auto", "precompute", "swap" or "adapter_off". `reference_cache`: root folder of the reference
    log-probs that "auto" and "precompute" read and add to; `None` keeps none
    (`bfpo.core.files.user_cache_folder("reference")` is that of the command line). `check_start`: stop a run whose
    first loss is not what the labels imply.

    Raises `SettingError` for a value outside its range.
    """

    if TYPE_CHECKING:  # the settings of the methods are fields too

        def __init__(self, output_dir: str | None = None, *, method: MethodOrName = "bfpo", **more: Any) -> None: ...

    method: MethodOrName = field(default="bfpo", metadata={"help": "the loss"})
    reduction: str = field(default="sum", metadata={"help": "log-probs of a completion: sum or mean over tokens"})
    anchor_weight: float = field(default=0.0, metadata={"help": "weight of the anchor relative to the normalised loss"})
    anchor_scale: str = field(default="loss", metadata={"help": "what anchor_weight is relative to: loss or gradient"})
    buffer_weight: float = field(default=1.0, metadata={"help": "weight of the buffer's mean loss"})
    reference: str = field(default="auto", metadata={"help": "auto, precompute, swap or adapter_off"})
    reference_cache: str | None = field(default=None, metadata={"help": "folder of reference log-probs; None = none"})
    attention: str = field(default="auto", metadata={"help": "auto, packed or padded"})
    max_tokens_per_microbatch: int | None = field(
        default=8192, metadata={"help": "most tokens of a forward pass, both streams together"}
    )
    check_start: bool = field(default=True, metadata={"help": "stop if the first loss is not what the labels imply"})

    learning_rate: float = field(default=5e-7, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "schedule of the learning rate"})
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up: optimizer steps, or below 1 a share of them"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between logs"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay off: the model does not accept all columns"}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "off: what is not finite is an error here"})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "trackers"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        given = {name: value for name in method_settings() if (value := getattr(self, name)) is not None}
        self._method = make_method(self.method, **given)
        self.method = self._method.name
        for name in self._method.settings():  # to be read, and logged, with the other arguments
            setattr(self, name, getattr(self._method, name))
        check_number("anchor_weight", self.anchor_weight, ge=0)
        check_number("buffer_weight", self.buffer_weight, gt=0)
        if self.anchor_scale not in ("loss", "gradient"):
            raise SettingError(f"anchor_scale: got {self.anchor_scale!r}; allowed: 'loss', 'gradient'")
        if self.reduction not in ("sum", "mean"):
            raise SettingError(f"reduction: got {self.reduction!r}; allowed: 'sum', 'mean'")
        if self.attention not in ("auto", "packed", "padded"):
            raise SettingError(f"attention: got {self.attention!r}; allowed: 'auto', 'packed', 'padded'")
        if self.max_tokens_per_microbatch is not None and self.max_tokens_per_microbatch < 1:
            raise SettingError(
                f"max_tokens_per_microbatch: got {self.max_tokens_per_microbatch!r}; allowed: a whole number of at "
                "least 1, or None"
            )
        if self.remove_unused_columns:
            raise SettingError("remove_unused_columns: got True; allowed: False, the batch holds labels and masks")
        if self.restore_callback_states_from_checkpoint:
            raise SettingError(
                "restore_callback_states_from_checkpoint: got True; allowed: False, it would replace the callback that "
                "holds the metrics since the last log"
            )
        if self.data_seed is None:  # else the order of the pairs would depend on what was drawn before
            self.data_seed = self.seed

    def method_object(self) -> Method:
        """Return the method with the settings that these arguments have now."""
        return replace(self._method, **{name: getattr(self, name) for name in self._method.settings()})
