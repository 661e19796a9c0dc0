"""Signals among several processes: known to all after the same step, and nobody waits for it."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

from support.system.signals import Listener, Signalled


class Exchanges:
    """One process's side of the exchanges of two, each done once both have begun it."""

    world_size = 2

    def __init__(self, rank: int, begun: list[list[int]], patience_seconds: float):
        self.rank, self.begun, self.patience_seconds = rank, begun, patience_seconds

    def begin_greatest(self, value: int):
        number = len(self.begun[self.rank])
        self.begun[self.rank].append(value)

        def wait() -> int:
            deadline = time.monotonic() + self.patience_seconds
            while not all(len(values) > number for values in self.begun):
                assert time.monotonic() < deadline, "waits for the other process"
            return max(values[number] for values in self.begun)

        return wait


def two(patience_seconds: float) -> tuple[list[Listener], list[Exchanges]]:
    begun = [[], []]
    return [Listener(), Listener()], [Exchanges(rank, begun, patience_seconds) for rank in (0, 1)]


def told(listeners: list[Listener], exchanges: list[Exchanges]) -> list[Signalled]:
    """What each process is told after a step, the first before the second has come so far."""
    pairs = zip(listeners, exchanges, strict=True)
    return [listener.signalled(own, may_be_late=True) for listener, own in pairs]


def test_a_signal_to_one_process_stops_both_one_step_later_and_neither_waits():
    listeners, others = two(patience_seconds=0)
    assert told(listeners, others) == [Signalled.NOTHING] * 2
    listeners[1].hear(signal.SIGTERM, None)
    assert told(listeners, others) == [Signalled.NOTHING] * 2
    assert told(listeners, others) == [Signalled.STOP] * 2
    assert others[0].begun == [[0, 0], [0, 2]]  # none is left under way


def test_a_request_to_save_is_done_once_by_both():
    listeners, others = two(patience_seconds=0)
    listeners[0].hear(signal.SIGUSR1, None)
    assert told(listeners, others) == [Signalled.NOTHING] * 2
    listeners[1].hear(signal.SIGUSR1, None)  # torchrun passes it on, a little later
    assert told(listeners, others) == [Signalled.SAVE] * 2
    for listener in listeners:
        listener.saved()
    listeners[0].hear(signal.SIGTERM, None)
    assert told(listeners, others) == [Signalled.NOTHING] * 2
    assert told(listeners, others) == [Signalled.STOP] * 2


def test_where_no_later_call_comes_both_wait_and_know():
    listeners, others = two(patience_seconds=30)
    told(listeners, others)
    listeners[0].hear(signal.SIGINT, None)
    with ThreadPoolExecutor() as pool:
        found = pool.map(Listener.signalled, listeners, others)
        assert [*found] == [Signalled.STOP] * 2
