"""What the trainer does differently where FSDP or DeepSpeed will shard its model; both are faked here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import is_torch_version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bfpo.core.errors import SettingError
from bfpo.data.pack import collate_pairs
from bfpo.policy.head import tied_embedding
from bfpo.policy.load import set_trainable
from bfpo.policy.logps import sequence_logps
from bfpo.policy.reference.sources import AdapterOff
from bfpo.training import sharding
from bfpo.training.sharding import is_sharded, prepare_sharding, whole_state
from bfpo.training.trainer import BFPOTrainer
from messages import raises
from tiny import tiny_model, tiny_pairs, tiny_trainer


class ShardedTrainer(BFPOTrainer):
    """Says that FSDP is on, as accelerate does before it wraps the model."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True


def with_masters() -> Any:
    model = set_trainable(tiny_model(dtype=torch.bfloat16), ["*.down_proj.weight"], None)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model


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

    made = tiny_trainer(tmp_path, trainer=Unsharded, model=with_masters(), reference="swap", bf16=True)
    assert made.form == "packed"


def test_log_probs_leave_fsdp2_as_they_are() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    accelerator = fake_accelerator(fsdp_version=2, mixed_precision_policy=policy)
    prepare_sharding(accelerator, tiny_model())
    kept = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert kept.output_dtype is None
    assert (kept.param_dtype, kept.reduce_dtype) == (torch.bfloat16, torch.float32)
    prepare_sharding(fake_accelerator(fsdp_version=2, mixed_precision_policy=None), tiny_model())
    prepare_sharding(SimpleNamespace(state=SimpleNamespace()), tiny_model())  # type: ignore[arg-type]
    with raises(SettingError, "fsdp_version"):
        prepare_sharding(fake_accelerator(fsdp_version=1, mixed_precision_policy=policy), tiny_model())


def test_an_fsdp2_that_wants_one_dtype_is_refused_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = fake_accelerator(fsdp_version=2, mixed_precision_policy=None)
    uniform, model = tiny_model(), with_masters()
    prepare_sharding(accelerator, model)
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    monkeypatch.setattr(sharding, "is_torch_version", lambda relation, version: (relation, version) == ("<", "2.8"))
    monkeypatch.setattr(sharding, "compare_versions", lambda name, relation, version: True)
    with raises(SettingError, "2.8"):
        prepare_sharding(accelerator, model)
    prepare_sharding(accelerator, set_trainable(uniform, ["*.down_proj.weight"], None))
    monkeypatch.setattr(sharding, "compare_versions", lambda name, relation, version: False)
    prepare_sharding(accelerator, model)


@pytest.mark.parametrize(
    ("stage", "device", "old", "refused"),
    [
        (2, "cpu", "deepspeed", "offload_optimizer_device"),
        (1, "nvme", "deepspeed", "offload_optimizer_device"),
        (2, "cpu", "", ""),
        (2, "none", "deepspeed", ""),
        (3, "cpu", "deepspeed", ""),
        (3, "none", "accelerate", "accelerate"),
    ],
)
def test_versions_that_do_not_add_up_gradients_are_refused(
    monkeypatch: pytest.MonkeyPatch, stage: int, device: str, old: str, refused: str
) -> None:
    asked = {("deepspeed", "<", "0.19.0"), ("accelerate", "<", "1.8.0")}
    monkeypatch.setattr(sharding, "compare_versions", lambda *one: one in asked and one[0] == old)
    plugin = SimpleNamespace(zero_stage=stage, offload_optimizer_device=device)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    with raises(SettingError, refused) if refused else nullcontext():
        prepare_sharding(accelerator, tiny_model())


@pytest.mark.parametrize("fsdp", [True, False])
def test_fsdp2_reduces_the_gradients_of_every_micro_batch(tmp_path: Path, fsdp: bool) -> None:
    """Until it reduces them every process has all of them, which `bfpo doctor` divides by the processes."""
    made, waiting = tiny_trainer(tmp_path, trainer=ShardedTrainer if fsdp else BFPOTrainer, reference="swap"), []
    made.accelerator.no_sync = lambda model: waiting.append(model) or nullcontext()
    with made._accumulating(made.model):
        assert made.accelerator.sync_gradients is False
    assert made.accelerator.sync_gradients
    assert waiting == ([] if fsdp else [made.model])


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(is_torch_version("<", "2.8"), reason="its FSDP2 wants one dtype for all weights")
@pytest.mark.usefixtures("one_process")
def test_gradients_of_adapters_are_float32_after_a_first_pass_without_them() -> None:
    """The reference comes before the policy: the first forward pass of FSDP2 has the adapters off."""
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    model = set_trainable(tiny_model(dtype=torch.bfloat16), "all", lora).train()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.get_base_model().model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    batch = collate_pairs(tiny_pairs(5, 1), form="padded")
    AdapterOff(model).logps(model, batch)
    sequence_logps(model, batch).logps.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert {None if gradient is None else gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.skipif(is_torch_version("<", "2.8"), reason="as above")
@pytest.mark.usefixtures("one_process")
def test_a_sharded_head_that_is_tied_and_trains_has_the_gradients_of_a_whole_one() -> None:
    batch, gradients = collate_pairs(tiny_pairs(5, 1), form="padded"), []
    for shard in (False, True):
        model = tiny_model(dtype=torch.float64, tie_word_embeddings=True).train()
        if shard:
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        assert (tied_embedding(model, model.lm_head) is None) == shard
        sequence_logps(model, batch, chunk_rows=3).logps.sum().backward()
        gradients.append([getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


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


def test_reference_and_soft_labels_are_not_rounded_under_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Trainer` casts every floating tensor of its inputs to the dtype of DeepSpeed's weights."""
    main = [
        replace(pair, chosen_is_safe=0.7, rejected_is_safe=0.301, ref_chosen_logps=-300.7, ref_rejected_logps=-151.3)
        for pair in tiny_pairs(4)
    ]

    def loss_of_a_step(deepspeed: bool) -> float:
        made = tiny_trainer(tmp_path, main=main, reference="precompute", check_start=False)
        [microbatch] = made.data_collator.microbatches(main, range(4), 4)
        microbatch["is_seen"] = torch.tensor([300.7])  # the cast is simulated: it reaches a tensor of the inputs
        seen: list[Any] = []
        compute_loss = made.compute_loss
        made.compute_loss = lambda model, inputs, **more: seen.append(inputs) or compute_loss(model, inputs, **more)
        made.create_optimizer()
        made.is_deepspeed_enabled = deepspeed
        settings = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16), enable_msamp=False)
        with monkeypatch.context() as patch:
            patch.setattr(type(made.accelerator.state), "deepspeed_plugin", settings)
            loss = float(made._microbatch_step(made.model, microbatch, 4, check=False))
        assert seen[0]["is_seen"].dtype == (torch.bfloat16 if deepspeed else torch.float32)
        assert seen[0]["ref_logps"].dtype == (torch.bfloat16 if deepspeed else torch.float64)
        return loss

    assert loss_of_a_step(True) == loss_of_a_step(False)


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
