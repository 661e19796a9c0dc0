"""Make a folder of class folders to try training on: crops of photographs that need no download.

    python examples/sample_photos.py photos

writes 240 pictures of 96x96 pixels in four classes: each class is one photograph that comes with
scikit-learn or scikit-image (of requirements_soflow_dev.txt), and each of its pictures another
crop. Of a folder of your own, where every picture is a photograph, there is more to learn.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

CROP = 0.85  # of the photograph's height
SIDE = 96  # pixels of the pictures written


def photographs() -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] by class; all of them lie in the installed packages."""
    china, flower = sklearn.datasets.load_sample_images().images
    cat, cup = skimage.data.chelsea(), skimage.data.coffee()
    return {"cat": cat, "china": china, "cup": cup, "flower": flower}


def write_crops(folder: Path, photograph: np.ndarray, count: int) -> None:
    """Write `count` square crops from random places of a photograph, as JPEG files."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    side = int(CROP * len(photograph))
    for number in range(count):
        top, left = (int(source.integers(0, long - side + 1)) for long in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + side, left : left + side])
        crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(
            folder / f"{number}.jpg", quality=95
        )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="made anew; one folder per class in it")
    parser.add_argument("--per-class", type=int, default=60, metavar="N", help="(default 60)")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists")
    for name, photograph in photographs().items():
        write_crops(arguments.folder / name, photograph, arguments.per_class)
    print(
        f"{arguments.per_class} pictures each of {', '.join(photographs())} in {arguments.folder}"
    )


if __name__ == "__main__":
    main()
