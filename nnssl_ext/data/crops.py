"""Request crops and read them from cases.

Case, place and matrix of a sample are pure functions of (seed, global index). A worker reads only the box that a crop
needs, and augments nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from nnssl_ext.data.cases import open_case
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.views.multicrop import ViewKind, draw_view
from nnssl_ext.views.random import CASES, CROPS, SUBSTITUTES, sample_generator
from nnssl_ext.views.spatial import (
    SourceBox,
    SpatialRange,
    crop_box,
    half_extent,
    is_resampled,
    shrink_to_fit,
    source_range,
)

#: Most draws of a crop: for more body, for body in each of its patches, and because it is constant.
BODY_TRIES, PATCH_TRIES, CONSTANT_TRIES = 8, 24, 32
#: A share of body in each patch that ends the draws.
ENOUGH_BODY = 0.5
#: Most unreadable cases in a row for one sample.
MAX_SUBSTITUTES = 8


@dataclass(frozen=True)
class Crop:
    """One crop of a sample.

    Attributes:
        size: Its edges in voxels.
        spatial: Its spatial view.
        other_case: Whether it is from another case.
        scale: Voxels of the case per voxel of the crop; 0.5 magnifies twofold.
        fit: Whether a smaller case is magnified along its short axes, so that the crop needs no padding.
        isotropic: Whether ``fit`` magnifies all axes alike instead.
        centered: Whether it lies about the body's center.
        resampled_alike: Whether it is resampled exactly where the sample's first crop is.
        parts: Lowest voxel and edges of each patch of it, which should be mostly body; () is the whole crop.
        views: Views of the crop that are read one by one instead of the crop, for crops of many voxels.
    """

    size: tuple[int, int, int]
    spatial: SpatialRange
    other_case: bool = False
    scale: float = 1.0
    fit: bool = False
    centered: bool = False
    resampled_alike: bool = False
    isotropic: bool = False
    parts: tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...] = ()
    views: tuple[ViewKind, ...] = ()


@dataclass(frozen=True)
class CropRequest:
    """Request the crops of one sample. The first is always from the sample's own case."""

    crops: tuple[Crop, ...]

    @property
    def fits_cases(self) -> bool:
        """Return whether crops depend on the cases' size."""
        return any(crop.fit for crop in self.crops)

    @property
    def min_cases(self) -> int:
        """Return how many different cases a sample needs."""
        return 2 if any(crop.other_case for crop in self.crops) else 1

    def placeholder(self, channels: int, sample: int) -> list[SourceBox]:
        """Return boxes of noise for tracing shapes."""
        sizes = [
            size
            for crop in self.crops
            for size in ([kind.size for kind in crop.views for _ in range(kind.number)] or [crop.size])
        ]
        return [noise_box((channels, *size), f"case {row} {sample}") for row, size in enumerate(sizes)]


class Sample(NamedTuple):
    """One sample as a worker read it.

    Attributes:
        number: Its global index.
        boxes: One for each crop of the request, or for each view of a crop with views.
        failure: Why there are no boxes; '' if there are.
        skipped: Messages about cases that could not be read and were replaced.
    """

    number: int
    boxes: list[SourceBox]
    failure: str = ""
    skipped: tuple[str, ...] = ()


@dataclass
class CropBatch:
    """Hold B samples: indices, and B boxes per crop."""

    indices: list[int]
    boxes: list[list[SourceBox]]
    failure: str = ""
    skipped: tuple[str, ...] = ()

    def pin_memory(self) -> CropBatch:
        boxes = [[box.pin_memory() for box in row] for row in self.boxes]
        return CropBatch(self.indices, boxes, self.failure, self.skipped)

    @property
    def cases(self) -> list[str]:
        """Return the names of all cases in the batch."""
        return sorted({box.case for row in self.boxes for box in row})


@dataclass
class CropDataset(Dataset):
    """Samples by global index, for ``torch.utils.data.DataLoader``.

    Args:
        index: Folder and properties of the cases.
        stream: 0, or ``VALIDATION``. Samples of different streams never share draws.
    """

    index: CaseIndex
    cases: list[str]
    request: CropRequest
    seed: int
    stream: int = 0
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.index.folder
        self.cases = sorted(self.cases)

    def __getitem__(self, sample: int) -> Sample:
        """Read a sample. Another case replaces one that cannot be read."""
        drawn = list(self.draw_cases(sample))
        bad: dict[str, str] = {}
        substitutes = sample_generator(self.seed, self.stream + SUBSTITUTES, sample)
        while True:
            generator = sample_generator(self.seed, self.stream + CROPS, sample)
            boxes: list[SourceBox] = []
            case = drawn[0]
            try:
                for crop in self.request.crops:
                    case = drawn[1 if crop.other_case else 0]
                    resample = is_resampled(boxes[0].matrix) if crop.resampled_alike else None
                    boxes += self._read(case, crop, generator, resample)
            except Exception as error:  # damaged files raise anything
                bad[case] = f"case '{case}' in {self.folder}: {type(error).__name__}: {error}"
                good = [name for name in self.cases if name not in bad and name not in drawn]
                if not good or len(bad) == MAX_SUBSTITUTES:
                    return Sample(sample, [], "; ".join(bad.values()), tuple(bad.values()))
                drawn[drawn.index(case)] = good[int(substitutes.integers(len(good)))]
                continue
            return Sample(sample, boxes, "", tuple(bad.values()))

    def sources(self, sample: int) -> list[str]:
        """Return the cases of a sample, for messages."""
        drawn = self.draw_cases(sample)
        return list(drawn[: self.request.min_cases])

    def sample_bytes(self) -> int:
        """Estimate the memory of a sample from a few draws."""
        generator, channels = np.random.default_rng(0), int(self.index.channels().max())
        voxels = 0
        for crop in self.request.crops:
            if crop.views:
                voxels += sum(kind.number * math.prod(kind.size) for kind in crop.views)
                continue
            draws = [crop.spatial.draw(generator, crop.size) * crop.scale for _ in range(16)]
            reach = np.max([half_extent(matrix, crop.size) for matrix in draws], axis=0)
            voxels += int(np.prod(np.minimum(np.ceil(2 * reach) + 1, self.index.largest_size())))
        return 4 * channels * voxels

    def draw_cases(self, sample: int) -> tuple[str, str]:
        """Draw a sample's own case and another one. Each case comes once before any comes again."""
        number = len(self.cases)
        turn, place = divmod(sample, number)
        own = shuffled(self.seed, self.stream, turn, number)[place]
        step = sample_generator(self.seed, self.stream + CASES, sample).integers(1, max(2, number))
        return self.cases[own], self.cases[(own + step) % number]

    def _read(self, case: str, crop: Crop, generator: np.random.Generator, resample: bool | None) -> list[SourceBox]:
        record = self.index[case]
        if record.problem:
            raise ValueError(record.problem)
        data = open_case(self.folder, case)
        if tuple(data.shape) != record.shape:
            raise ValueError(f"expected shape {record.shape}, as when the run began, got {tuple(data.shape)}")
        for _ in range(CONSTANT_TRIES):
            region = _place(crop, generator, np.asarray(data.shape[1:]), record.body, case, resample)
            if crop.views:
                return [
                    _read_view(data, region, crop, kind, generator) for kind in crop.views for _ in range(kind.number)
                ]
            box, constant = _read_box(data, region, crop.size)
            if not constant:
                break
        return [box]


def _place(
    crop: Crop,
    generator: np.random.Generator,
    volume: np.ndarray,
    body: np.ndarray,
    case: str,
    resample: bool | None = None,
) -> SourceBox:
    """Draw the matrix and center of a crop.

    Args:
        volume: (3,) edges of the case.
        resample: Whether the crop is rotated and zoomed. None decides by chance.
    """
    matrix, edges = crop.spatial.draw(generator, crop.size, resample=resample) * crop.scale, crop.size
    if crop.fit:
        matrix = shrink_to_fit(matrix, crop.size, (volume - 1) / 2, isotropic=crop.isotropic)
        edges = tuple(np.ceil(2 * half_extent(matrix, crop.size) - 1e-6).astype(int) + 1)
    if crop.centered:
        center = body_center(generator, volume, edges, body)
    else:
        parts = [np.asarray(part) / crop.size for part in crop.parts]
        center = draw_center(generator, volume, edges, body, parts)
    return SourceBox(torch.empty(0), matrix, center, case)


def _read_box(data: Any, place: SourceBox, size: Sequence[int]) -> tuple[SourceBox, bool]:
    """Read a crop's box and whether it is constant.

    Raises:
        ValueError: If it holds a value that is not finite.
    """
    low, high = source_range(place.center, half_extent(place.matrix, size), np.asarray(data.shape[1:]))
    box = torch.from_numpy(np.ascontiguousarray(data[(slice(None), *map(slice, low, high))]))
    # one pass finds constants and, as it propagates NaN, non-finite values
    darkest, brightest = torch.stack([torch.stack(torch.aminmax(channel)) for channel in box], 1)
    if not (torch.isfinite(darkest).all() and torch.isfinite(brightest).all()):
        raise ValueError("NaN or infinite values")
    return replace(place, data=box, center=place.center - low), torch.equal(darkest, brightest)


def _read_view(data: Any, region: SourceBox, crop: Crop, kind: ViewKind, generator: np.random.Generator) -> SourceBox:
    """Read a view's box, cut to the view's size."""
    for _ in range(CONSTANT_TRIES):
        box, constant = _read_box(data, draw_view(region, crop.size, kind, generator), kind.size)
        if not constant:
            break
    if math.prod(box.data.shape[1:]) <= math.prod(kind.size):
        return box
    view, _ = crop_box(box, kind.size, torch.device("cpu"))
    return SourceBox(view, np.eye(3), (np.asarray(kind.size) - 1) / 2, box.case)


def noise_box(shape: tuple[int, ...], case: str) -> SourceBox:
    """Return a box of noise (C, D, H, W). torch's own generator keeps its state."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return SourceBox(noise, np.eye(3), (np.asarray(shape[1:]) - 1) / 2, case)


def draw_center(
    generator: np.random.Generator,
    volume: np.ndarray,
    size: Sequence[int],
    body: np.ndarray,
    parts: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Draw a crop's center (3,), preferring body.

    A crop lies within the volume. Along an axis where the volume is smaller it is centered and padded on both sides.
    The first of several places is taken that has at least half the case's mean share of body. With patches it is the
    first where each patch is mostly body, or else the one whose emptiest patch has the largest share.

    Args:
        volume: Edges of the case in voxels.
        size: Edges of the crop.
        parts: (2, 3) for each patch, lowest corner and edges as shares of the crop's edges.
    """
    edges = np.asarray(size)
    room = volume - edges
    # the lowest and highest corner; negative room is shared by both sides, an odd voxel by chance
    lowest, highest = np.where(room > 0, 0, room // 2), np.where(room > 0, room, -(-room // 2))
    wanted = ENOUGH_BODY if parts else body.mean() / 2
    best, best_share = lowest, -1.0
    for _ in range(PATCH_TRIES if parts else BODY_TRIES):
        low = generator.integers(lowest, highest + 1)
        places = [(low + part[0] * edges, part[1] * edges) for part in parts] or [(low, edges)]
        share = min(_body_share(body, volume, first, extent) for first, extent in places)
        if share > best_share:
            best, best_share = low, share
        if share >= wanted:
            break
    return best + (edges - 1) / 2


def body_center(
    generator: np.random.Generator, volume: np.ndarray, size: Sequence[int], body: np.ndarray
) -> np.ndarray:
    """Draw a crop's center (3,) near the body's center.

    It lies within an eighth of the crop's edges and in the volume.
    """
    edges = np.asarray(size)
    middle = np.argwhere(body).mean(0) + 0.5 if body.any() else np.asarray(body.shape) / 2
    wanted = middle / body.shape * volume - edges / 2 + generator.uniform(-0.125, 0.125, 3) * edges
    low = np.clip(np.rint(wanted), 0, np.maximum(volume - edges, 0))
    return low + (edges - 1) / 2


def collate(samples: list[Sample]) -> CropBatch:
    """Collate samples. One failure makes the batch a failure."""
    failure = next((sample.failure for sample in samples if sample.failure), "")
    boxes = [] if failure else [list(row) for row in zip(*(sample.boxes for sample in samples), strict=True)]
    skipped = tuple(name for sample in samples for name in sample.skipped)
    return CropBatch([sample.number for sample in samples], boxes, failure, skipped)


def _body_share(body: np.ndarray, volume: np.ndarray, low: np.ndarray, edges: np.ndarray) -> float:
    bins = np.asarray(body.shape)
    first = np.clip(np.floor(low / volume * bins), 0, bins - 1).astype(int)
    last = np.clip(np.ceil((low + edges) / volume * bins), first + 1, bins).astype(int)
    return float(body[tuple(slice(a, b) for a, b in zip(first, last, strict=True))].mean())


@lru_cache(maxsize=4)
def shuffled(seed: int, stream: int, turn: int, number: int) -> np.ndarray:
    """Draw the order of the samples of a turn."""
    return np.random.default_rng((seed, stream, 1 << 8, turn)).permutation(number)
