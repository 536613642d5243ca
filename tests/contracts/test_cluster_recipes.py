"""The files for Slurm and Ray: shells can read them, and what they run exists."""

from __future__ import annotations

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


def test_the_cluster_file_starts_a_node_for_each_address() -> None:
    made = yaml.safe_load((FOLDER / "ray.yaml").read_text(encoding="utf-8"))
    assert made["min_workers"] == made["max_workers"] == len(made["provider"]["worker_ips"])
    assert "--head" in made["head_start_ray_commands"][-1]
    assert "--address=$RAY_HEAD_IP:6379" in made["worker_start_ray_commands"][-1]
