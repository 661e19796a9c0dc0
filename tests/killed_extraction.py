"""latent_dataset.py with small parts, killed at a moment of choice: run, or imported.

    python tests/killed_extraction.py RANK:EVENT {options of latent_dataset.py}

Kills the process RANK at its EVENTth change to the disk; where there is none of either, the work
is done to the end.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import latent_dataset
from support.system.command import run_command


class Killer:
    """Kills its process at the nth of the calls that change what is on the disk."""

    def __init__(self, at: int | None):
        self.at, self.events = at, []
        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, self.before(getattr(os, name), name))
        os.pwrite = self.amid(os.pwrite)

    def count(self, name):
        self.events.append(name)
        return len(self.events) - 1 == self.at

    def before(self, function, name):
        def patched(*args, **kwargs):
            if self.count(name):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return patched

    def amid(self, pwrite):
        def patched(descriptor, values, offset):
            if self.count("pwrite"):
                pwrite(descriptor, values[: len(values) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return pwrite(descriptor, values, offset)

        return patched


if __name__ == "__main__":
    rank, event = sys.argv[1].split(":")
    latent_dataset.PART_IMAGES = 4
    if os.environ["RANK"] == rank:
        Killer(int(event))
    run_command(lambda: latent_dataset.main(sys.argv[2:]))
