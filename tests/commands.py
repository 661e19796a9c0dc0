"""Running the project's commands as a user does: in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, env: dict[str, str] | None = None, **options):
    """The finished process of `python {arguments}` in the project's folder, its output captured."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def succeed(*arguments: object, **options) -> str:
    """The output of a command that has to succeed."""
    finished = run(*arguments, **options)
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
