"""Checkpoints of what trains: frozen weights are those of the start model, so a checkpoint holds their hash alone.

The chat template of the training is beside them, since the start may have another.

The file of what trains has a name of its own, so that nothing loads it as a whole model. `resumable` gives the trainer
a folder in which it has the name that `Trainer.train` reads; weights that it lacks stay those of the start model.
Under FSDP and DeepSpeed the weights to resume from are in parts, which accelerate or DeepSpeed's engine write and read.
Adapters are left to peft, whose checkpoints hold only them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from bfpo.core.errors import RunError
from bfpo.core.files import write_text_whole
from bfpo.core.records import as_json, load
from bfpo.policy.trained import CHAT_TEMPLATE, FACTS, TRAINED, TrainedFile, frozen_digest
from bfpo.training.sharding import is_sharded

__all__ = [
    "TrainedSaver",
    "leaves_out_frozen",
    "only_trained",
    "resumable",
    "state_of_trained",
]


class TrainedSaver(Trainer):
    """A trainer whose checkpoints leave out frozen weights."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `transformers.Trainer` does; for a checkpoint (`_internal_call`) only what trains.

        Under FSDP accelerate writes the weights, in parts; see `only_trained`. Under DeepSpeed the trainer lets its
        engine write them next, and whole ones are also here, with which the checkpoint can be loaded as a model.
        """
        if output_dir is None or not _internal_call or not leaves_out_frozen(self):
            super().save_model(output_dir, _internal_call)
            return
        if self.is_deepspeed_enabled:
            _write_only_trained(self.model_wrapped)
        if not self.args.should_save:
            return
        folder, model = Path(output_dir), _model(self)
        folder.mkdir(parents=True, exist_ok=True)
        trained = _trained(model)
        if not (self.is_fsdp_enabled or any(hasattr(parameter, "ds_id") for parameter in trained.values())):  # ZeRO-3
            frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False)}
            buffers = {name: value for name, value in model.state_dict().items() if name not in frozen}
            tensors = {name: value.detach().contiguous() for name, value in {**trained, **buffers}.items()}
            save_file(tensors, folder / TRAINED, metadata={"format": "pt"})
        facts = TrainedFile(sorted(trained), self.frozen_digest)
        write_text_whole(folder / FACTS, json.dumps(as_json(facts), indent=2) + "\n")
        template = getattr(self.processing_class, "chat_template", None)
        template = template.get("default") if isinstance(template, dict) else template
        if template:
            write_text_whole(folder / CHAT_TEMPLATE, template)

    @cached_property
    def frozen_digest(self) -> str:
        """The SHA-256 of name, shape, dtype and content of the frozen weights; read before they are sharded."""
        return frozen_digest(_model(self), _trained(_model(self)).keys())


def _model(trainer: Trainer) -> Any:
    return trainer.model


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def leaves_out_frozen(trainer: Trainer) -> bool:
    """Return whether the trainer's checkpoints hold only what trains."""
    model = _model(trainer)
    if hasattr(model, "peft_config"):
        return False
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and "SHARDED_STATE_DICT" not in str(getattr(plugin, "state_dict_type", "")):
        return False
    return any(not parameter.requires_grad for parameter in model.parameters())


@contextmanager
def resumable(trainer: Trainer, checkpoint: Path) -> Iterator[Path]:
    """Yield the folder to give to `Trainer.train` in order to resume from a checkpoint, of this or an earlier version.

    Raises `RunError` if the frozen weights, or what trains, are not those of the run that wrote it.
    """
    if not (checkpoint / FACTS).is_file():  # whole, an adapter, or written before frozen weights were left out
        yield checkpoint
        return
    if trainer.is_world_process_zero():
        _check(trainer, checkpoint)
    if trainer.is_deepspeed_enabled or not (checkpoint / TRAINED).is_file():  # its engine, or accelerate, reads parts
        yield checkpoint
        return
    with TemporaryDirectory(prefix="bfpo-resume-") as place:
        for path in checkpoint.iterdir():
            (Path(place) / (SAFE_WEIGHTS_NAME if path.name == TRAINED else path.name)).symlink_to(path.resolve())
        log = logging.getLogger("transformers.trainer")
        log.addFilter(_is_not_of_missing)  # frozen weights are missing, which has been checked
        try:
            yield Path(place)
        finally:
            log.removeFilter(_is_not_of_missing)


def _is_not_of_missing(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("There were missing keys in the checkpoint model loaded")


def _check(trainer: Trainer, checkpoint: Path) -> None:
    facts = load(TrainedFile, checkpoint / FACTS)
    assert isinstance(trainer, TrainedSaver)
    if set(facts.trained) != _trained(_model(trainer)).keys():
        raise RunError(
            f"{checkpoint}: holds {len(facts.trained)} trained weights, others than this config trains; resume with "
            "the config that the run started with"
        )
    if facts.frozen_sha256 != trainer.frozen_digest:
        raise RunError(
            f"{checkpoint}: holds what trains only, and the frozen weights of the model are not those that the run "
            f"started from (SHA-256 {trainer.frozen_digest[:12]}, then {facts.frozen_sha256[:12]}); put the start "
            "model back to what it was, or start the run again in a new folder"
        )


@contextmanager
def only_trained(trainer: Trainer) -> Iterator[None]:
    """Let a model that FSDP or DeepSpeed shards take a state without frozen weights, and under FSDP give such a one.

    Accelerate and DeepSpeed write and read it. Without them nothing changes. The whole model cannot be gathered from
    FSDP meanwhile.
    """
    if not is_sharded(trainer) or not leaves_out_frozen(trainer):
        yield
        return
    if isinstance(trainer, TrainedSaver) and trainer.is_world_process_zero():
        _ = trainer.frozen_digest  # while the weights are whole
    with state_of_trained(_model(trainer)):
        yield


@contextmanager
def state_of_trained(model: Any) -> Iterator[None]:
    """Leave frozen parameters out of `model.state_dict()`, and do not miss them in `model.load_state_dict`.

    Only those that FSDP has sharded are left out: before, and on the meta device, the state is that from which
    accelerate shards a model.
    """

    def take(module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = sorted(set(incompatible.missing_keys) - _frozen(model))

    hook = model.register_load_state_dict_post_hook(take)
    try:
        with _gives_no_frozen(model, lambda value: isinstance(value, DTensor) and not value.is_meta):
            yield
    finally:
        hook.remove()


@contextmanager
def _gives_no_frozen(model: Any, leaves_out: Callable[[Tensor], bool] = lambda value: True) -> Iterator[None]:
    """Leave frozen parameters, also under a second name, out of `model.state_dict()`."""

    def give(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in _frozen(model):
            if prefix + name in state and leaves_out(state[prefix + name]):
                del state[prefix + name]

    hook = model.register_state_dict_post_hook(give)
    try:
        yield
    finally:
        hook.remove()


def _frozen(model: Any) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _write_only_trained(engine: Any) -> None:
    """Let a DeepSpeed engine leave frozen weights out of the checkpoints that the trainer has it write.

    Its option alone would write an embedding again that is also the output head, under that name.
    """
    if "save_checkpoint" in vars(engine):
        return
    write = engine.save_checkpoint

    @wraps(write)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with _gives_no_frozen(engine.module):
            return write(*args, **{**kwargs, "exclude_frozen_parameters": True})

    engine.save_checkpoint = save_checkpoint
