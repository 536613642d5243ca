"""The files for `accelerate launch` say what they mean, in keys that accelerate reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import TrainingArguments

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
NAMES = {"ddp", "fsdp2", "zero2", "zero3"}


def launched(path: Path, *more: str) -> Any:
    """Return the arguments of `accelerate launch` with the file, as accelerate completes them."""
    given = ["--config_file", str(path), *more, "-m", "bfpo", "train"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    return args


def test_there_is_a_file_for_each_way_on_one_node_and_several() -> None:
    assert {path.stem for path in FILES} == NAMES | {f"{name}_multinode" for name in NAMES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_loads_the_file(path: Path) -> None:
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.mixed_precision == "no"
    assert config.num_processes == 8 * config.num_machines
    assert (config.num_machines > 1) == path.stem.endswith("_multinode")
    kind = path.stem.removesuffix("_multinode")
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(kind, "DEEPSPEED")
    if kind.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(kind[-1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_a_section_is_an_option_of_accelerate(path: Path) -> None:
    """Accelerate itself takes what it does not know there and says nothing."""
    known = vars(launch_command_parser().parse_args(["x"]))
    for name, section in yaml.safe_load(path.read_text()).items():
        for key in section if isinstance(section, dict) else ():
            assert key in known, f"{path.name}: {name}.{key}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_launcher_takes_the_file(path: Path) -> None:
    several = path.stem.endswith("_multinode")
    args = launched(path, *(("--machine_rank", "1", "--main_process_ip", "10.0.0.1") if several else ()))
    assert args.mixed_precision == "no"
    assert (args.num_machines, args.num_processes) == ((2, 16) if several else (1, 8))
    assert int(args.machine_rank) == (1 if several else 0)
    assert args.main_process_ip == ("10.0.0.1" if several else None)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(
        path.stem.startswith(kind) for kind in ("ddp", "fsdp", "zero")
    )


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_multinode"])
def test_the_processes_see_fsdp2_as_the_file_has_it(name: str) -> None:
    environment = prepare_multi_gpu_env(launched(FOLDER / f"{name}.yaml", "--main_process_ip", "10.0.0.1"))
    with mock.patch.dict(os.environ, environment):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "SHARDED_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.activation_checkpointing is False
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.mixed_precision_policy is None


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "no")])
def test_the_training_config_decides_the_precision(tmp_path: Path, bf16: bool, precision: str) -> None:
    environment = prepare_multi_gpu_env(launched(FOLDER / "ddp.yaml"))
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    with mock.patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": "no"}):
        args = TrainingArguments(output_dir=str(tmp_path), bf16=bf16, use_cpu=True, report_to="none")
        chosen = getattr(args, "mixed_precision", None) or os.environ["ACCELERATE_MIXED_PRECISION"]
    assert chosen == precision
    with mock.patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": "bf16"}):  # why the files say "no"
        args = TrainingArguments(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
        chosen = getattr(args, "mixed_precision", None) or os.environ["ACCELERATE_MIXED_PRECISION"]
    assert chosen == "bf16"


def test_fsdp2_is_in_every_torch_that_is_allowed() -> None:
    from torch.distributed.fsdp import fully_shard

    assert callable(fully_shard)
    assert tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 6)
