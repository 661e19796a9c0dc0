"""Signals by which the system asks a run to save, or to save and stop."""

import contextlib
import enum
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator

from support.system.processes import Processes


class Signalled(enum.IntEnum):
    """The request of a signal; of several, the greatest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


MEANINGS: dict[int, Signalled] = {
    signal.SIGUSR1: Signalled.SAVE,
    signal.SIGTERM: Signalled.STOP,  # schedulers send it before they kill
    signal.SIGINT: Signalled.STOP,  # Ctrl-C
}


class Listener:
    """Remembers requests until they are carried out, and shares them with the other processes."""

    def __init__(self):
        self._signalled = Signalled.NOTHING
        self._exchange: Callable[[], int] | None = None  # the one under way
        self._is_saved = False  # since that began

    def hear(self, number: int, frame: object) -> None:
        """The signal handler. A repeated signal adds nothing: torchrun passes them on as well."""
        self._signalled = max(self._signalled, MEANINGS[number])

    def signalled(self, processes: Processes, may_be_late: bool = False) -> Signalled:
        """What any of the processes was told, the same on all; all have to call this.

        With `may_be_late`, several processes learn of a signal at the next call, so that none of
        them waits here for the slowest.
        """
        told = self._exchanged()
        if told is Signalled.STOP:
            return told
        self._exchange = processes.begin_greatest(self._signalled)
        if may_be_late and processes.world_size > 1:
            return told
        return max(told, self._exchanged())

    def saved(self) -> None:
        """Forget the request for a save, which has been carried out."""
        self._is_saved = True
        if self._signalled is Signalled.SAVE:
            self._signalled = Signalled.NOTHING

    def _exchanged(self) -> Signalled:
        """The result of the exchange under way, unless it has been carried out already."""
        told = Signalled(self._exchange()) if self._exchange else Signalled.NOTHING
        is_done = told is Signalled.SAVE and self._is_saved
        self._exchange, self._is_saved = None, False
        return Signalled.NOTHING if is_done else told


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """A block in which these signals are remembered instead of ending the process."""
    listener = Listener()
    before = {number: signal.signal(number, listener.hear) for number in MEANINGS}
    try:
        yield listener
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_to_parent(worker: int) -> None:
    """Let a loader worker ignore signals to its process group: the run still needs it.

    It ends with the loader, or at once when the run is gone. A fork server would keep it alive, and
    with it the locks that it inherited.
    """
    for number in MEANINGS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a loader worker is started by the run
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
