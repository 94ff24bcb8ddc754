"""Cases, methods and batches for the tests of methods."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks.learning import shuffle_voxels
from nnssl_ext.data.crops import CropBatch, CropDataset, CropRequest, collate
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.methods import DataGeometry, Method
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.views.appearance import IntensitySettings
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.spatial import SourceBox
from tests.datasets import blob
from tests.support.looks import without_views
from tests.support.networks import network

CPU = torch.device("cpu")
SIZE, CASE = (16, 16, 16), (20, 20, 20)
#: No intensity view at all.
OFF = without_views(IntensitySettings)


def write_cases(folder: Path) -> Path:
    for case in range(4):
        image = np.stack([blob(np.random.default_rng((case, channel)), CASE) for channel in range(2)])
        blosc2.asarray(image, urlpath=str(folder / f"c{case}.b2nd"), mode="w")
    return folder


def write_anatomy(folder: Path, cases: int = 24) -> Path:
    """Cases with the same three organs at about the same places, in noise: one can tell where one is, and which way."""
    for case in range(cases):
        generator = np.random.default_rng(case)
        axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, edge) for edge in CASE), indexing="ij"))
        axes += generator.uniform(-0.1, 0.1, (3, 1, 1, 1))
        image = 0.3 * generator.standard_normal((2, *CASE))
        for centre, radius, intensity in (
            ((0.5, -0.3, 0.1), 0.35, 1.5),
            ((-0.4, 0.5, -0.3), 0.25, -1.5),
            ((0.0, 0.1, 0.6), 0.2, 2.5),
        ):
            image += intensity * (((axes - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) < radius**2)
        image = (image - image.mean()) / image.std()
        blosc2.asarray(image.astype(np.float32), urlpath=str(folder / f"c{case:02d}.b2nd"), mode="w")
    return folder


def readable_after(folder: Path, method: Any, steps: int, shuffled: str = "") -> float:
    """The readable number on cases that were not trained on, after some steps.

    Args:
        folder: Cases; the last third of them is not trained on.
        method: The objective.
        steps: Of four samples each.
        shuffled: Put voxels in another order, ``before`` views are made of a case or ``after``, in each by itself.
    """
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3)
    cases = CaseIndex.build(folder).cases
    seen, unseen = cases[: 2 * len(cases) // 3], cases[2 * len(cases) // 3 :]
    if shuffled:
        shuffle_voxels(method, shuffled)

    def views(first: int, number: int, of: list[str]) -> dict[str, Tensor]:
        indices = list(range(first, first + number))
        return method.views(batch_of(folder, method, indices, of), BatchRandom(0, VIEWS, indices, CPU))

    method.train()
    for step in range(steps):
        loss = method(views(4 * step, 4, seen))["loss"].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    method.eval()
    with torch.no_grad():
        found = [method(views(10_000 + 16 * part, 16, unseen))[method.readable.key].mean() for part in range(3)]
    return torch.stack(found).mean().item()


def noise_boxes(size: tuple, number: int, spread: tuple = (0.0, 0.0, 0.0)) -> list[SourceBox]:
    """Boxes of one channel of smoothed noise that hold a crop exactly; ``spread`` in voxels per axis."""
    boxes = []
    for index in range(number):
        noise = np.random.default_rng(index).standard_normal((1, *size))
        smooth = gaussian_filter(noise, (0, *spread), mode="wrap") if any(spread) else noise
        data = torch.from_numpy((smooth / smooth.std()).astype(np.float32))
        boxes.append(SourceBox(data, np.eye(3), (np.asarray(size) - 1) / 2, f"c{index}"))
    return boxes


def build(
    method: type[Method], settings: Any, spacing: tuple = (1.0, 1.0, 1.0), kind: str = "plain", masked: tuple = ()
) -> Any:
    strides = tuple(backbone_of(network(kind)).strides)
    geometry = DataGeometry(SIZE, spacing, 2, strides, CASE, masked=masked)
    outputs = method.output_channels(settings, geometry) or 3
    torch.manual_seed(0)
    return method(backbone_of(network(kind, 2, outputs)), settings, geometry)


def with_asked_gap(method: Any) -> Any:
    """A puzzle whose patches have just the gap that is asked for: its windows are not magnified, nothing is moved."""
    gap = tuple(math.ceil(method.settings.gap * edge) for edge in method.layout.patch)
    method.layout = replace(method.layout, gap=gap)
    return method


def batch_of(folder: Path, method: Method, indices: list[int], cases: list[str] | None = None) -> CropBatch:
    index = CaseIndex.build(folder)
    request = method.crops(method.settings, method.geometry)
    assert isinstance(request, CropRequest)
    data = CropDataset(index, cases or index.cases, request, 0)
    return collate([data[i] for i in indices])


def views_of(folder: Path, method: Method, indices: list[int]) -> dict[str, Tensor]:
    return method.views(batch_of(folder, method, indices), BatchRandom(0, VIEWS, indices, CPU))
