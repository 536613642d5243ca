"""The files for Slurm and Ray: shells can read them, and what they run exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "cluster"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.sbatch")), ids=lambda file: file.name)
def test_a_job_is_a_script_whose_files_exist(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    named = re.findall(r"recipes/[\w/.-]+\.(?:yaml|sbatch)", text)
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def said_by(job: str, given: list[str], slurm: dict[str, str], fakes: dict[str, str], folder: Path) -> list[str]:
    """Return what a job writes in an allocation of 64 cores a task; `fakes`: what stands for other programs."""
    for name, line in fakes.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    environment = {**os.environ, **slurm, "SLURM_CPUS_PER_TASK": "64", "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(FOLDER / job), *given]
    return subprocess.run(
        command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("form", ["", "ddp", "zero2", "zero3"])
@pytest.mark.parametrize("command", ["train", "reference"])
def test_a_training_job_launches_its_command_on_the_node_with_its_rank(form: str, command: str, tmp_path: Path) -> None:
    fakes = {
        "scontrol": "echo first; echo second",
        "srun": 'echo "$SRUN_CPUS_PER_TASK"; exec "$@"',
        "accelerate": "printf '%s\\n' \"$@\"",
    }
    given = [command, "--config", "a file.yaml", "--out", "runs/out"]
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "ACCELERATE": form}
    cores, *arguments = said_by("train.sbatch", given, slurm, fakes, tmp_path)
    assert cores == "64"
    place = arguments.index("-m")
    assert arguments[place:] == ["-m", "bfpo", *given, "--resume"]
    options = dict(zip(arguments[1:place:2], arguments[2:place:2], strict=True))
    assert options.pop("--config_file") == f"recipes/accelerate/{form or 'fsdp2'}_multinode.yaml"
    assert (ROOT / "recipes" / "accelerate" / f"{form or 'fsdp2'}_multinode.yaml").is_file()
    ranks = {"--num_machines": "2", "--num_processes": "16", "--machine_rank": "1", "--main_process_ip": "first"}
    assert options == ranks


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("nodes", [1, 8])
def test_a_job_on_ray_starts_a_node_of_it_on_each_and_the_command_on_the_first(nodes: int, tmp_path: Path) -> None:
    fakes = {
        "scontrol": "echo first; echo second",
        "srun": 'echo "$RAY_USAGE_STATS_ENABLED" "$SRUN_CPUS_PER_TASK" "$@"',
        "sleep": ":",
    }
    slurm = {"SLURM_JOB_NODELIST": "n[1-8]", "SLURM_JOB_NUM_NODES": str(nodes)}
    given = ["generate", "--config", "generate.yaml", "--out", "runs/out"]
    said = said_by("ray.sbatch", given, slurm, fakes, tmp_path)
    on_first = "--ntasks=1 --nodelist=first"
    expected = [
        f"0 64 --nodes=1 {on_first} ray start --head --port=6379 --block",
        f"0 64 --overlap --nodes=1 {on_first} bfpo generate --config generate.yaml --out runs/out "
        "--set executor.backend=ray --set executor.address=first:6379 --resume",
    ]
    if nodes > 1:
        expected.append("0 64 --nodes=7 --ntasks=7 --exclude=first ray start --address=first:6379 --block")
    assert sorted(said) == sorted(expected)


def test_the_cluster_file_starts_a_node_for_each_address() -> None:
    made = yaml.safe_load((FOLDER / "ray.yaml").read_text(encoding="utf-8"))
    assert made["min_workers"] == made["max_workers"] == len(made["provider"]["worker_ips"])
    assert "--head" in made["head_start_ray_commands"][-1]
    assert "--address=$RAY_HEAD_IP:6379" in made["worker_start_ray_commands"][-1]
