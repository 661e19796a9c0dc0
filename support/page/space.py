"""The files that make an exported folder a Hugging Face Space: app.py, requirements and code."""

import platform
import shutil
from pathlib import Path

from support.system.command import ROOT

APP_FILE, REQUIREMENTS_FILE, CODE_FOLDER = "app.py", "requirements.txt", "soflow"
SAMPLING, SERVING = "requirements_soflow.txt", "requirements_soflow_demo.txt"
APP = f'''"""A demo of this folder's model: `python {APP_FILE}` serves it to this machine only.

A Hugging Face Space sets another address in the environment.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER / "{CODE_FOLDER}"))

import demo

if __name__ == "__main__":
    demo.run_command(lambda: demo.main([str(FOLDER)]))
'''


def write_space(folder: Path) -> None:
    """Write app.py, its requirements and the code into the folder."""
    (folder / APP_FILE).write_text(APP)
    needed = "".join((ROOT / name).read_text() for name in (SAMPLING, SERVING))
    (folder / REQUIREMENTS_FILE).write_text(needed)
    code = folder / CODE_FOLDER
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "support", code / "support", ignore=ignored)
    for path in [*ROOT.glob("*.py"), ROOT / "LICENSE", *(ROOT / n for n in (SAMPLING, SERVING))]:
        shutil.copy(path, code)


def card_lines() -> str:
    """The lines that a Space needs at the head of its card."""
    lines = (ROOT / SERVING).read_text().splitlines()
    version = next(line for line in lines if line.startswith("gradio==")).removeprefix("gradio==")
    # Without a version of Python, a Space has 3.10, which is too old.
    python = ".".join(platform.python_version_tuple()[:2])
    sdk = f"sdk: gradio\nsdk_version: {version}\n"
    return f"{sdk}python_version: '{python}'\napp_file: {APP_FILE}\n"
