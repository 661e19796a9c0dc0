"""Running the project's commands as a user does: in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(
    *arguments: object, folder: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The finished process of `python {arguments}` in `folder`, its output captured.

    With one thread, as the tests themselves: threads that wait for each other on a busy machine
    are many times slower.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(*arguments: object, folder: Path = ROOT) -> str:
    """The output of a command that has to succeed."""
    finished = run(*arguments, folder=folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def digits_settings(folder: Path, **values: object) -> list[str]:
    """Options of a small, quick digits run in `folder`."""
    settings = {
        "working_dir": folder,
        "total_steps": 6,
        "batch_size": 12,
        "eval_demo_steps": 0,
        "eval_steps": 0,
        "eval_num_samples": 10,
        "ckpt_saving_steps": 0,
        "logging_steps": 2,
        "eval_demo_shape": "[2, 2]",
        **values,
    }
    options = [f"--set={key}={value}" for key, value in settings.items()]
    return ["--config", str(ROOT / "configs" / "digits.yaml"), *options]
