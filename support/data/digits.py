"""scikit-learn's 1,797 digits, in two halves by a fixed permutation; nothing is fetched."""

import numpy as np

from support.data.images import LabelledImages

TRAINING_COUNT = 1_197
LEVELS = 16  # the brightest value in scikit-learn's copy
CLASS_NAMES = tuple("0123456789")


def load_training_set() -> LabelledImages:
    """The 1,197 digits to train on, 8 x 8 and grey."""
    return _in_fixed_order().part(slice(TRAINING_COUNT))


def load_test_set() -> LabelledImages:
    """The other 600, which no step trains on."""
    return _in_fixed_order().part(slice(TRAINING_COUNT, None))


def _in_fixed_order() -> LabelledImages:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / LEVELS)).astype(np.uint8)[..., None]
    # RandomState's stream is frozen: the halves are the same with every version of NumPy.
    order = np.random.RandomState(0).permutation(len(pixels))
    return LabelledImages(pixels[order], digits.target.astype(np.int64)[order])
