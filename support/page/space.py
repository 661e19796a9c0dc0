"""What makes an exported folder a Hugging Face Space: an app.py, what it needs, and the code."""

import re
import shutil
from pathlib import Path

from support.system.command import ROOT

APP_FILE, REQUIREMENTS_FILE, CODE_FOLDER = "app.py", "requirements.txt", "soflow"
SAMPLING, SERVING = "requirements_soflow.txt", "requirements_soflow_demo.txt"
APP = f'''"""The demo of this folder's model: `python {APP_FILE}` serves it to this machine alone.

As a Hugging Face Space it listens where that says.
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER / "{CODE_FOLDER}"))

import demo

host = os.environ.get("GRADIO_SERVER_NAME", demo.LOCALHOST)
port = int(os.environ.get("GRADIO_SERVER_PORT", demo.PORT))
if __name__ == "__main__":
    demo.run_command(lambda: demo.run(str(FOLDER), "", host, port))
'''


def write_space(folder: Path) -> None:
    """Write them all into the folder."""
    (folder / APP_FILE).write_text(APP)
    needed = "".join((ROOT / name).read_text() for name in (SAMPLING, SERVING))
    (folder / REQUIREMENTS_FILE).write_text(needed)
    code = folder / CODE_FOLDER
    shutil.copytree(
        ROOT / "support", code / "support", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in [*ROOT.glob("*.py"), ROOT / "LICENSE", *(ROOT / n for n in (SAMPLING, SERVING))]:
        shutil.copy(path, code)


def card_lines() -> str:
    """What a Space's card has to say in its first lines."""
    version = re.search(r"^gradio==(\S+)", (ROOT / SERVING).read_text(), re.MULTILINE)
    assert version is not None
    return f"sdk: gradio\nsdk_version: {version[1]}\napp_file: {APP_FILE}\n"
