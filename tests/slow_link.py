"""A cable between two network namespaces on which packets take their time, and some are lost.

    python tests/slow_link.py PID PID SECONDS LOSS

Each namespace, named by a process in it, gets an `eth0`; what one sends is read here and written to
the other SECONDS later, but for a share LOSS of the packets. `tc netem` does the same in the
kernel, where that has it. Prints a line when both are there; needs root and /dev/net/tun.
"""

import collections
import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA  # of linux/if_tun.h, as are the flags
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LARGEST = 65536  # bytes of a packet


def ethernet(pid: int) -> int:
    """The file of a new eth0 in the network namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as namespace:
        if libc.setns(namespace.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns of {pid}")
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
    return file


def carry(ends: tuple[int, int], seconds: float, loss: float) -> None:
    """Carry packets both ways, until the process is ended."""
    other = dict(zip(ends, reversed(ends), strict=True))
    on_their_way: collections.deque[tuple[float, int, bytes]] = collections.deque()
    draws = random.Random(0)
    while True:
        wait = on_their_way[0][0] - time.monotonic() if on_their_way else None
        ready, _, _ = select.select(ends, [], [], wait if wait is None else max(wait, 0))
        now = time.monotonic()
        for end in ready:
            packet = os.read(end, LARGEST)
            if draws.random() >= loss:
                on_their_way.append((now + seconds, other[end], packet))
        while on_their_way and on_their_way[0][0] <= now:
            _, end, packet = on_their_way.popleft()
            with contextlib.suppress(OSError):  # lost where the interface is not up
                os.write(end, packet)


if __name__ == "__main__":
    first, second, seconds, loss = sys.argv[1:]
    both = (ethernet(int(first)), ethernet(int(second)))
    print("connected", flush=True)
    carry(both, float(seconds), float(loss))
