"""The tables that NumPy's float32 normals are drawn by, for the page to draw the same ones.

The ziggurat (Marsaglia and Tsang, 2000) covers the half bell exp(-x^2 / 2) by LAYERS layers of one
area. A draw of 23 bits is a place in one of them, which nearly always lies below the curve.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

LAYERS = 256
TAIL_START = 3.6541528853610088  # where the lowest of 256 layers goes over into the tail
DRAWS = 2**23


def tables() -> Mapping[str, float | Sequence[float]]:
    """By layer, the lowest first and then from the top: `width` of a draw's unit; `inside`, the
    draws below which are under the curve for sure; `height` of the curve at the layer's end.
    """
    start_height = _bell(TAIL_START)
    tail_area = math.sqrt(math.pi / 2) * math.erfc(TAIL_START / math.sqrt(2))
    area = TAIL_START * start_height + tail_area
    ends = [TAIL_START]  # of the layers from below; their one area says how high each is
    while len(ends) < LAYERS - 1:
        ends.append(_inverse_bell(area / ends[-1] + _bell(ends[-1])))
    ends.reverse()
    lowest = area / start_height  # as wide as a rectangle of its area would be
    shares = [TAIL_START / lowest, 0.0]
    shares += [above / end for above, end in itertools.pairwise(ends)]
    return {
        "tailStart": float(np.float32(TAIL_START)),
        "width": [float(np.float32(end / DRAWS)) for end in [lowest, *ends]],
        "inside": [int(share * DRAWS) for share in shares],
        "height": [1.0, *(float(np.float32(_bell(end))) for end in ends)],
    }


def _bell(x: float) -> float:
    return math.exp(-x * x / 2)


def _inverse_bell(height: float) -> float:
    return math.sqrt(-2 * math.log(height))
