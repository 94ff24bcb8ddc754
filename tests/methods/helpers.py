"""Cases, methods and batches for the tests of methods."""

from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from torch import Tensor

from nnssl_ext.data.crops import CropBatch, CropDataset, collate
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.methods import Geometry, Method
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.views.appearance import IntensitySettings
from nnssl_ext.views.random import VIEWS, BatchRandom
from tests.datasets import blob
from tests.networks.test_backbone import network

CPU = torch.device("cpu")
SIZE, CASE = (16, 16, 16), (20, 20, 20)
#: No intensity view at all.
OFF = IntensitySettings(gamma_probability=0, brightness_probability=0, contrast_probability=0, noise_probability=0)


def write_cases(folder: Path) -> Path:
    for case in range(4):
        image = np.stack([blob(np.random.default_rng((case, channel)), CASE) for channel in range(2)])
        blosc2.asarray(image, urlpath=str(folder / f"c{case}.b2nd"), mode="w")
    return folder


def build(method: type[Method], settings: Any, spacing: tuple = (1.0, 1.0, 1.0), kind: str = "plain") -> Any:
    geometry = Geometry(SIZE, spacing, 2, tuple(backbone_of(network(kind)).strides), CASE)
    outputs = method.output_channels(settings, geometry) or 3
    torch.manual_seed(0)
    return method(backbone_of(network(kind, 2, outputs)), settings, geometry)


def batch_of(folder: Path, method: Method, indices: list[int]) -> CropBatch:
    index = CaseIndex.build(folder)
    data = CropDataset(index, index.cases, method.crops(method.settings, method.geometry), 0)
    return collate([data[i] for i in indices])


def views_of(folder: Path, method: Method, indices: list[int]) -> dict[str, Tensor]:
    return method.views(batch_of(folder, method, indices), BatchRandom(0, VIEWS, indices, CPU))
