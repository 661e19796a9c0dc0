"""The scripts of examples/ do what their first lines say."""

import os
import subprocess

from commands import ROOT

STUBS = {
    "scontrol": "echo first-node",
    "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
    "python": 'printf "[%s]" "$@"; echo " rank $RANK at $MASTER_ADDR"',
}


def test_the_job_script_passes_on_all_that_follows_the_config(tmp_path):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "x", "JOB_ID": 1, "CPUS_PER_TASK": 1, "PROCID": 3, "LOCALID": 1}
    slurm |= {"NTASKS": 4, "NNODES": 2}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", ROOT / "examples" / "slurm.sh", "c.yaml", "--set", "a=b c", "--check-data"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    options = "[--config][c.yaml][--set][a=b c][--check-data]"
    assert ended.stdout == f"[train.py]{options} rank 3 at first-node\n"
    assert subprocess.run(command[:2], env=environment, capture_output=True).returncode != 0
