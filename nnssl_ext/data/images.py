"""Read labeled 2-D images, ``class/image.png``, as samples.

C colours, H W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from nnssl_ext.data.crops import CropRequest, Sample, noise_box, shuffled
from nnssl_ext.data.samples import CaseSource, Datasets, SampleClasses, Split
from nnssl_ext.errors import UserError
from nnssl_ext.views.random import CASES, CROPS, VALIDATION, sample_generator
from nnssl_ext.views.spatial import SourceBox

SUFFIXES = (".png", ".jpg", ".jpeg")
#: One in this many images of each class is kept for validation.
VALIDATION_SHARE = 20
#: How many other images are tried in the place of one that cannot be read.
SUBSTITUTES = 8


@dataclass(frozen=True)
class ImageRequest:
    """Request one random resized crop (Szegedy et al., CVPR 2015).

    Attributes:
        size: Edges H, W of the crop in pixels.
        area: Least and largest share of the image's area that it shows.
        aspect: Least and largest ratio of its edges in the image.
        flip: Chance of a left-right mirror.
    """

    size: tuple[int, int]
    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    #: It needs no case at all.
    min_cases = 0
    fits_cases = False

    def placeholder(self, channels: int, sample: int) -> list[SourceBox]:
        """Return a box of noise for tracing shapes."""
        return [noise_box((3, 1, *self.size), "0/image.png")]


class ImageFolder:
    """The images below a folder, one subfolder per class.

    Args:
        folder: With ``class/image.png`` or ``.jpg``; classes are numbered in the order of their names.

    Raises:
        UserError: If there are fewer than two classes, or a class without images.
    """

    kind = "images"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name))
        except OSError as error:
            raise UserError(f"nnssl_ext.images: cannot read the folder {folder}: {error.strerror}") from error
        if len(names) < 2:
            raise UserError(
                f"nnssl_ext.images: {folder} has {len(names)} subfolders, expected one for each of two or more "
                f"classes: CLASS/IMAGE.png or .jpg"
            )
        #: Paths relative to the folder, class by class.
        self.files = [self._list(name) for name in names]
        # one in so many of each class is validated on
        counts = [len(files[::VALIDATION_SHARE]) for files in self.files]
        self.classes = SampleClasses(tuple(names), max(counts) / sum(counts))

    def __len__(self) -> int:
        return sum(map(len, self.files))

    @cached_property
    def training(self) -> list[str]:
        """Images to learn from."""
        return [name for files in self.files for place, name in enumerate(files) if place % VALIDATION_SHARE]

    @cached_property
    def validation(self) -> list[str]:
        """Return the validation images, at least one per class."""
        return [name for files in self.files for name in files[::VALIDATION_SHARE]]

    def summary(self, training_cases: int) -> str:
        return f"images in {self.folder}"

    def left_out(self) -> list[str]:
        return []

    def fingerprint(self) -> dict[str, str]:
        """Return one digest of all names. The images are not read."""
        names = "\n".join(name for files in self.files for name in files)
        return {f"the list of {len(self)} images": hashlib.sha256(names.encode()).hexdigest()}

    def datasets(self, request: Any, seed: int, split: Split, log: Callable[[str], None]) -> Datasets:
        log(f"Learning from {self.summary(0)}; this data set's own images are not used.")
        return ImageDataset(self, request, seed), ImageDataset(self, request, seed, VALIDATION)

    def _list(self, name: str) -> list[str]:
        paths = (path.relative_to(self.folder) for path in (self.folder / name).rglob("*") if _is_image(path))
        files = sorted(path.as_posix() for path in paths if not any(map(_hidden, path.parts)))
        if len(files) < 2:
            raise UserError(
                f"nnssl_ext.images: class '{name}' in {self.folder} has {len(files)} images, expected at least two "
                f"(one is for validation): .png or .jpg"
            )
        return files


@dataclass
class ImageDataset(Dataset):
    """Read regions of images as uint8, by global index.

    Args:
        stream: 0, or ``VALIDATION``: other images, and other draws.
    """

    images: ImageFolder
    request: ImageRequest
    seed: int
    stream: int = 0

    def __post_init__(self) -> None:
        self.names = self.images.validation if self.stream == VALIDATION else self.images.training

    def __getitem__(self, sample: int) -> Sample:
        """Read a region. Another image replaces one that cannot be read, which is named."""
        skipped = []
        substitutes = sample_generator(self.seed, self.stream + CASES, sample)
        row = self._row(sample)
        for _ in range(SUBSTITUTES):
            name = self.names[row]
            try:
                box = self._read(name, sample)
            except Exception:  # damaged images raise anything
                skipped.append(name)
                row = int(substitutes.integers(len(self.names)))
                continue
            return Sample(sample, [box], "", tuple(skipped))
        listed = ", ".join(skipped)
        return Sample(sample, [], f"{len(skipped)} images in a row cannot be read: {listed}", tuple(skipped))

    def sources(self, sample: int) -> list[str]:
        """Return the files of a sample, for messages."""
        return [self.names[self._row(sample)]]

    def sample_bytes(self) -> int:
        """Estimate the memory of a sample. Images are reduced to less than twice the crop's edges."""
        return 4 * 3 * self.request.size[0] * self.request.size[1]

    def _row(self, sample: int) -> int:
        """Draw an image. Each comes once before any comes again."""
        turn, place = divmod(sample, len(self.names))
        return int(shuffled(self.seed, self.stream, turn, len(self.names))[place])

    def _read(self, name: str, sample: int) -> SourceBox:
        generator = sample_generator(self.seed, self.stream + CROPS, sample)
        with Image.open(self.images.folder / name) as image:
            low, high = draw_region(generator, image.height, image.width, self.request)
            flip = generator.random() < self.request.flip
            # averaging while reading: what is left is at least as fine as the crop
            factor = max(1, int(min((high - low) / self.request.size)))
            region = eight_bit(image).crop((int(low[1]), int(low[0]), int(high[1]), int(high[0]))).reduce(factor)
        pixels = np.array(region)  # (H, W, C)
        edges = np.array(pixels.shape[:2])
        scale = (edges - 1) / np.maximum(np.asarray(self.request.size) - 1, 1)
        matrix = np.diag([1.0, scale[0], -scale[1] if flip else scale[1]])
        data = torch.from_numpy(pixels.transpose(2, 0, 1)[:, None].copy())
        return SourceBox(data, matrix, np.array([0.0, *((edges - 1) / 2)]), name)


def draw_region(
    generator: np.random.Generator, height: int, width: int, request: ImageRequest
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a region: lowest corner and end (2,) in pixels."""
    area = generator.uniform(*request.area) * height * width
    ratio = np.exp(generator.uniform(*np.log(request.aspect)))
    edges = np.sqrt([area / ratio, area * ratio])
    edges = np.clip(np.rint(edges), 1, [height, width]).astype(int)
    low = generator.integers(0, np.array([height, width]) - edges + 1)
    return low, low + edges


def eight_bit(image: Image.Image) -> Image.Image:
    """Convert an image to three colors of eight bits. More bits are stretched to their range."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8))
    return image.convert("RGB")


def _hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or comes from macOS's archives."""
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


#: The crops that make one sample.
SampleRequest = CropRequest | ImageRequest
#: Where the samples of a run come from.
SampleSource = CaseSource | ImageFolder
