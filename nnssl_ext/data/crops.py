"""Crops: what a method asks for, and the workers that read it, deterministic by counter.

A sample is named by its global index; which case, where, and how it will be turned are pure functions of (seed, index).
A worker reads the box that the crop reaches and nothing else, and augments nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from nnssl_ext.data.cases import open_case
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.views.random import CASES, CROPS, SUBSTITUTES, sample_generator
from nnssl_ext.views.spatial import SourceBox, SpatialRange, half_extent, shrink_to_fit, source_range

#: How often a crop is drawn again for more body, for body in each of its parts, or because it is constant.
BODY_TRIES, PART_TRIES, CONSTANT_TRIES = 8, 24, 32
#: The share of body in each part of a crop from which on it is looked for no further.
MOSTLY = 0.5
#: How many cases in a row may be unreadable for one sample.
MOST_SUBSTITUTES = 8


@dataclass(frozen=True)
class Crop:
    """One crop of a sample.

    Attributes:
        size: Its edges in voxels.
        spatial: What may be done to it.
        other_case: Whether it is from another case.
        scale: Voxels of the case per voxel of the crop: 0.5 magnifies twofold.
        fit: Whether a case that is smaller is magnified further, so that the crop is never padded.
        centered: Whether it lies about the body's center.
        parts: Lowest voxel and edges of what is looked at of it, each of which should be mostly body; () is all.
    """

    size: tuple[int, int, int]
    spatial: SpatialRange
    other_case: bool = False
    scale: float = 1.0
    fit: bool = False
    centered: bool = False
    parts: tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...] = ()


@dataclass(frozen=True)
class CropRequest:
    """The crops that make one sample of a method, in order; the first is always from the sample's own case."""

    crops: tuple[Crop, ...]

    @property
    def fits_cases(self) -> bool:
        """Whether the size of the cases decides about the crops."""
        return any(crop.fit for crop in self.crops)

    @property
    def min_cases(self) -> int:
        return 2 if any(crop.other_case for crop in self.crops) else 1

    def placeholder(self, channels: int, sample: int) -> list[SourceBox]:
        """Return boxes of noise in the place of one sample, to trace shapes."""
        return [noise_box((channels, *crop.size), f"case {row} {sample}") for row, crop in enumerate(self.crops)]


class Sample(NamedTuple):
    """What a worker read for one sample.

    Attributes:
        number: Its global index.
        boxes: One for each crop of the request.
        failure: Why there are none, '' if there are.
        skipped: Names of what could not be read and was replaced.
    """

    number: int
    boxes: list[SourceBox]
    failure: str = ""
    skipped: tuple[str, ...] = ()


@dataclass
class CropBatch:
    """B samples: their global indices, and for each crop of the request the B boxes that were read."""

    indices: list[int]
    boxes: list[list[SourceBox]]
    failure: str = ""
    skipped: tuple[str, ...] = ()

    def pin_memory(self) -> CropBatch:
        boxes = [[box.pin_memory() for box in row] for row in self.boxes]
        return CropBatch(self.indices, boxes, self.failure, self.skipped)

    @property
    def cases(self) -> list[str]:
        """The case of each crop of each sample, for messages."""
        return sorted({box.case for row in self.boxes for box in row})


@dataclass
class CropDataset(Dataset):
    """Samples by global index, for ``torch.utils.data.DataLoader``.

    Args:
        index: Where the cases are and what they are like.
        cases: The cases to draw from.
        request: The crops of a sample.
        seed: The run's seed.
        stream: 0, or ``VALIDATION``: samples of different streams never share draws.
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

    def __repr__(self) -> str:
        return f"CropDataset({len(self.cases)} cases, {len(self.request.crops)} crops a sample)"

    def __getitem__(self, sample: int) -> Sample:
        """A case that cannot be read is named, and another takes its place."""
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
                    boxes.append(self._read(case, crop, generator))
            except Exception as error:  # damaged files raise anything
                bad[case] = f"case '{case}' in {self.folder}: {type(error).__name__}: {error}"
                good = [name for name in self.cases if name not in bad and name not in drawn]
                if not good or len(bad) == MOST_SUBSTITUTES:
                    return Sample(sample, [], "; ".join(bad.values()), tuple(bad.values()))
                drawn[drawn.index(case)] = good[int(substitutes.integers(len(good)))]
                continue
            return Sample(sample, boxes, "", tuple(bad.values()))

    def sources(self, sample: int) -> list[str]:
        """The cases that a sample is read from, for messages."""
        drawn = self.draw_cases(sample)
        return list(drawn[: self.request.min_cases])

    def sample_bytes(self) -> int:
        """Estimate the memory of a sample from a few draws of its crops."""
        generator, channels = np.random.default_rng(0), int(self.index.channels().max())
        voxels = 0
        for crop in self.request.crops:
            draws = [crop.spatial.draw(generator, crop.size) * crop.scale for _ in range(16)]
            reach = np.max([half_extent(matrix, crop.size) for matrix in draws], axis=0)
            voxels += int(np.prod(np.minimum(np.ceil(2 * reach) + 1, self.index.largest_size())))
        return 4 * channels * voxels

    def draw_cases(self, sample: int) -> tuple[str, str]:
        """A sample's own case, each case once before any comes again, and a partner that is another case."""
        number = len(self.cases)
        turn, place = divmod(sample, number)
        own = _shuffled(self.seed, self.stream, turn, number)[place]
        step = sample_generator(self.seed, self.stream + CASES, sample).integers(1, max(2, number))
        return self.cases[own], self.cases[(own + step) % number]

    def _read(self, case: str, crop: Crop, generator: np.random.Generator) -> SourceBox:
        record = self.index[case]
        if record.problem:
            raise ValueError(record.problem)
        data = open_case(self.folder, case)
        if tuple(data.shape) != record.shape:
            raise ValueError(f"has shape {tuple(data.shape)} now and had {record.shape} when the run began")
        volume = np.asarray(data.shape[1:])
        for _ in range(CONSTANT_TRIES):
            matrix, edges = crop.spatial.draw(generator, crop.size) * crop.scale, crop.size
            if crop.fit:
                matrix = shrink_to_fit(matrix, crop.size, (volume - 1) / 2)
                edges = tuple(np.ceil(2 * half_extent(matrix, crop.size) - 1e-6).astype(int) + 1)
            if crop.centered:
                center = body_center(generator, volume, edges, record.body)
            else:
                parts = [np.asarray(part) / crop.size for part in crop.parts]
                center = draw_center(generator, volume, edges, record.body, parts)
            low, high = source_range(center, half_extent(matrix, crop.size), volume)
            box = torch.from_numpy(np.ascontiguousarray(data[(slice(None), *map(slice, low, high))]))
            # one pass over the voxels tells both; NaN is handed through
            darkest, brightest = torch.stack([torch.stack(torch.aminmax(channel)) for channel in box], 1)
            if not torch.equal(darkest, brightest):
                break
        if not (torch.isfinite(darkest).all() and torch.isfinite(brightest).all()):
            raise ValueError("NaN or infinite values")
        return SourceBox(box, matrix, center - low, case)


def noise_box(shape: tuple[int, ...], case: str) -> SourceBox:
    """Return a box of noise (C, D, H, W) about its own center; torch's own generator stays as it is."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return SourceBox(noise, np.eye(3), (np.asarray(shape[1:]) - 1) / 2, case)


def draw_center(
    generator: np.random.Generator,
    volume: np.ndarray,
    size: Sequence[int],
    body: np.ndarray,
    parts: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """The center (3,) of a crop in voxels, where nnU-Net could have put it, preferring places with body.

    A crop lies within the volume; along an axis where the volume is smaller it is centered and will be padded on both
    sides. Of several places the first is taken that shows at least half as much body as the case does on average; with
    parts, the first where each of them is mostly body, or that whose emptiest part shows most.

    Args:
        generator: Where draws come from.
        volume: Edges of the case in voxels.
        size: Edges of the crop.
        body: The case's body map.
        parts: (2, 3) each, lowest corner and edges as shares of the crop's edges.
    """
    edges = np.asarray(size)
    room = volume - edges
    # the lowest and highest corner; negative room is shared by both sides, an odd voxel by chance
    lowest, highest = np.where(room > 0, 0, room // 2), np.where(room > 0, room, -(-room // 2))
    wanted = MOSTLY if parts else body.mean() / 2
    best, best_share = lowest, -1.0
    for _ in range(PART_TRIES if parts else BODY_TRIES):
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
    """The center (3,) of a crop about the body's center, off by up to an eighth of the crop, within the volume."""
    edges = np.asarray(size)
    middle = np.argwhere(body).mean(0) + 0.5 if body.any() else np.asarray(body.shape) / 2
    wanted = middle / body.shape * volume - edges / 2 + generator.uniform(-0.125, 0.125, 3) * edges
    low = np.clip(np.rint(wanted), 0, np.maximum(volume - edges, 0))
    return low + (edges - 1) / 2


def collate(samples: list[Sample]) -> CropBatch:
    """Samples to a batch; boxes keep their own sizes. One failure makes the batch a failure."""
    failure = next((sample.failure for sample in samples if sample.failure), "")
    boxes = [] if failure else [list(row) for row in zip(*(sample.boxes for sample in samples), strict=True)]
    skipped = tuple(name for sample in samples for name in sample.skipped)
    return CropBatch([sample.number for sample in samples], boxes, failure, skipped)


def _body_share(body: np.ndarray, volume: np.ndarray, low: np.ndarray, edges: np.ndarray) -> float:
    cells = np.asarray(body.shape)
    first = np.clip(np.floor(low / volume * cells), 0, cells - 1).astype(int)
    last = np.clip(np.ceil((low + edges) / volume * cells), first + 1, cells).astype(int)
    return float(body[tuple(slice(a, b) for a, b in zip(first, last, strict=True))].mean())


@lru_cache(maxsize=4)
def _shuffled(seed: int, stream: int, turn: int, number: int) -> np.ndarray:
    return np.random.default_rng((seed, stream, 1 << 8, turn)).permutation(number)
