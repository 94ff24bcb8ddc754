"""A small labelled set cut from the photographs that scikit-image ships: real pixels, labels that can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

#: One class per photograph; grey ones and colour ones.
PHOTOGRAPHS = ("brick", "coffee", "grass", "gravel")


def make_images(folder: Path, classes: int = 3, each: int = 24, edge: int = 48, seed: int = 0) -> Path:
    """Write ``class/number.png`` (every third a .jpg), squares of ``classes`` photographs; returns the folder."""
    generator = np.random.default_rng(seed)
    for name in PHOTOGRAPHS[:classes]:
        (folder / name).mkdir(parents=True)
        photograph = getattr(skimage.data, name)()
        for number in range(each):
            row, column = generator.integers(0, np.array(photograph.shape[:2]) - edge)
            square = Image.fromarray(photograph[row : row + edge, column : column + edge])
            square.save(folder / name / f"{number:03d}.{'png' if number % 3 else 'jpg'}")
    return folder
