"""Files in memory, and ways to damage them."""

import io
import os

from hypothesis import strategies as st


class Payload:
    """What unpickles to a call of `os.mkdir`, which leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def in_memory(write) -> bytes:
    write(buffer := io.BytesIO())
    return buffer.getvalue()


def damaged(data: bytes):
    """Copies of `data` with bytes replaced, cut out, put in, and cut off."""
    places = st.integers(0, len(data) - 1)
    edit = st.tuples(places, st.integers(0, 40), st.binary(max_size=8))

    def apply(edits, end):
        changed = bytearray(data)
        for start, length, new in edits:
            changed[start : start + length] = new
        return bytes(changed[:end] if end else changed)

    return st.builds(apply, st.lists(edit, min_size=1, max_size=3), st.none() | places)
