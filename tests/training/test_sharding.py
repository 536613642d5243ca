"""What the trainer does differently where FSDP or DeepSpeed will shard its model; both are faked here."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from bfpo.core.errors import SettingError
from bfpo.policy.load import set_trainable
from bfpo.training.sharding import is_sharded, prepare_sharding, whole_state
from bfpo.training.trainer import BFPOTrainer
from messages import raises
from tiny import tiny_model, tiny_pairs, tiny_trainer


class ShardedTrainer(BFPOTrainer):
    """Says that FSDP is on, as accelerate does before it wraps the model."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True


def fake_accelerator(**settings: Any) -> Any:
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**settings)))


@pytest.mark.parametrize("autocast", [lambda: torch.autocast("cuda", torch.bfloat16), nullcontext], ids=["fsdp", "ds"])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_model_with_masters_is_tried_on_the_cpu_before_it_is_sharded(tmp_path: Path, autocast: Any) -> None:
    """Accelerate's autocast is that of the GPU, or none under DeepSpeed; the model is on the CPU until then."""

    class Unsharded(ShardedTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.autocast = autocast

    model = set_trainable(tiny_model(dtype=torch.bfloat16), ["*.down_proj.weight"], None)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    made = tiny_trainer(tmp_path, trainer=Unsharded, model=model, reference="swap", bf16=True)
    assert made.form == "packed"


def test_log_probs_leave_fsdp2_as_they_are() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    accelerator = fake_accelerator(fsdp_version=2, mixed_precision_policy=policy)
    prepare_sharding(accelerator)
    kept = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert kept.output_dtype is None
    assert (kept.param_dtype, kept.reduce_dtype) == (torch.bfloat16, torch.float32)
    prepare_sharding(fake_accelerator(fsdp_version=2, mixed_precision_policy=None))
    prepare_sharding(SimpleNamespace(state=SimpleNamespace()))  # type: ignore[arg-type]
    with raises(SettingError, "fsdp_version"):
        prepare_sharding(fake_accelerator(fsdp_version=1, mixed_precision_policy=policy))


@pytest.mark.parametrize(("fsdp", "deepspeed"), [(True, False), (False, True), (False, False)])
def test_whole_weights_are_gathered_from_the_wrapped_model(fsdp: bool, deepspeed: bool) -> None:
    wrapped = object()
    trainer: Any = SimpleNamespace(
        is_fsdp_enabled=fsdp,
        is_deepspeed_enabled=deepspeed,
        model_wrapped=wrapped,
        accelerator=SimpleNamespace(get_state_dict=lambda model: {"of": model}),
    )
    assert is_sharded(trainer) == (fsdp or deepspeed)
    assert whole_state(trainer) == ({"of": wrapped} if fsdp or deepspeed else None)


@pytest.mark.parametrize(("lora", "expected"), [(False, "swap"), (True, "adapter_off")])
def test_the_reference_pass_does_not_run_before_sharding(tmp_path: Path, lora: bool, expected: str) -> None:
    def model() -> Any:
        return set_trainable(tiny_model(), "all", {"r": 2, "target_modules": ["q_proj"]} if lora else None)

    main, held_out, cache = tiny_pairs(12), tiny_pairs(3, 9), str(tmp_path / "cache")

    def made(kind: type[BFPOTrainer], reference: str, **settings: Any) -> BFPOTrainer:
        settings = {"main": main, "reference_cache": cache, "max_steps": 9, **settings}
        return tiny_trainer(tmp_path, trainer=kind, model=model(), reference=reference, **settings)

    assert made(ShardedTrainer, "auto").reference_name == expected
    with raises(SettingError):
        made(ShardedTrainer, "precompute")
    made(BFPOTrainer, "precompute")
    assert made(ShardedTrainer, "precompute").reference_name == "precompute"
    assert made(ShardedTrainer, "auto").reference_name == "precompute"
    # rows of held-out pairs would have to be computed too
    assert made(ShardedTrainer, "auto", eval_dataset=held_out).reference_name == expected
    with raises(SettingError):
        made(ShardedTrainer, "precompute", eval_dataset=held_out)
