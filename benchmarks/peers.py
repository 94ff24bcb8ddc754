"""Compare complete samples with those of stock nnU-Net and MONAI, like for like, on one core.

    OMP_NUM_THREADS=1 python -m benchmarks peers [--edges 64 128] [--batches 40] [--repeats 7] [--match TEXT]

VolumeFusion: two crops with nnU-Net's own list (mirror, noise, blur, brightness, contrast, low resolution, two gammas
that keep mean and deviation, each with nnU-Net's chances), then the fusion. No rotation and no zoom on either side.
"stock nnU-Net" runs nnU-Net's own transforms on the same crops. "ours, by default" filters the fused image once
instead of each crop, and matches its noise.

3DINO: 2 global and 8 local views of half the edge with the chances and ranges of its paper. "MONAI" is MONAI's
transforms in the order of ours.

All sides read the same boxes beforehand and take turns. Every repeat draws new samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Cost, once, parser, rate, ratios, report
from benchmarks.views import BATCH, build, dataset_of, views_of
from benchmarks.workload import DATA, write_cases
from nnssl_ext.data.crops import CropBatch, CropDataset, collate
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.host_memory import keep_memory
from nnssl_ext.views.random import VIEWS, BatchRandom

CPU = torch.device("cpu")
#: VolumeFusion's settings with crops cut straight and no ignored voxels. The intensity list is nnU-Net's by default.
STRAIGHT = {"affine": 0.0, "rot90": 0.0, "ignore_below": 0.0}
#: The whole list on each crop, as stock's transforms apply it, and nothing after the fusion.
EQUAL_LIST = {**STRAIGHT, "degrade_fused": False, "match_noise": False}


class Side:
    """One side of a comparison: ``read`` is not timed, ``make`` is."""

    def __init__(self, make: Callable[[CropBatch], object], dataset: CropDataset, batches: int) -> None:
        self.make, self.dataset, self.batches = make, dataset, batches
        self.ready: list[CropBatch] = []

    def read(self, repeat: int) -> None:
        """Read the boxes of a repeat's samples."""
        first = repeat * self.batches
        numbers = [[BATCH * (first + n) + b for b in range(BATCH)] for n in range(self.batches)]
        self.ready = [collate([self.dataset[number] for number in row]) for row in numbers]

    def run(self) -> None:
        """Make the samples that were read."""
        with torch.no_grad():
            for batch in self.ready:
                self.make(batch)


def turns(sides: dict[str, Side], repeats: int) -> dict[str, list[Cost]]:
    """Time all sides in turns on new samples for each repeat. The first repeat warms up."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            side.read(repeat)
            cost = once(side.run)
            if repeat:
                costs[name].append(Cost(cost.cpu / side.batches, cost.wall / side.batches))
    return costs


def volume_fusion(edge: int, index: CaseIndex, batches: int) -> dict[str, Side]:
    """Return the sides that make samples of VolumeFusion."""
    method, default = build("volume_fusion", edge, EQUAL_LIST), build("volume_fusion", edge, STRAIGHT)
    dataset = dataset_of(method, index)
    stock = stock_transforms(edge)
    return {
        "ours": Side(lambda batch: views_of(method, batch, CPU), dataset, batches),
        "ours, by default": Side(lambda batch: views_of(default, batch, CPU), dataset, batches),
        "stock nnU-Net": Side(lambda batch: stock_fusion(stock, method, batch, edge), dataset, batches),
    }


def stock_transforms(edge: int) -> Any:
    """Return stock nnU-Net's training transforms without the spatial one, which crops and turns."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    whole = nnUNetTrainer.get_training_transforms((edge,) * 3, (0.0, 0.0), None, (0, 1, 2), False)
    whole.transforms = [part for part in whole.transforms if type(part).__name__ != "SpatialTransform"]
    return whole


def stock_fusion(stock: Any, method: Any, batch: CropBatch, edge: int) -> Tensor:
    """Make VolumeFusion's samples with stock's transforms, and fuse them with plain torch."""
    levels = method._draw_levels(BatchRandom(0, VIEWS, batch.indices, CPU)).float()[:, None] / method.settings.levels
    segmentation = torch.zeros(1, edge, edge, edge, dtype=torch.int16)
    crops = []
    for row in batch.boxes:
        images = []
        for box in row:
            start = [max(0, (length - edge) // 2) for length in box.data.shape[1:]]
            image = box.data[(slice(None), *(slice(s, s + edge) for s in start))].clone()
            images.append(stock(image=image, segmentation=segmentation.clone())["image"])
        crops.append(torch.stack(images))
    return torch.lerp(crops[0], crops[1], levels)


def dino(edge: int, index: CaseIndex, batches: int) -> dict[str, Side]:
    """Return the sides that make samples of 3DINO."""
    method = build("dino", edge, {})
    dataset = dataset_of(method, index)
    peer = monai(method.settings, edge)
    return {
        "ours": Side(lambda batch: views_of(method, batch, CPU), dataset, batches),
        "MONAI": Side(lambda batch: [peer(box.data) for box in batch.boxes[0]], dataset, batches),
    }


def monai(settings: Any, edge: int) -> Callable[[Tensor], list[Tensor]]:
    """Return MONAI's transforms for 3DINO's views, with our settings' chances and ranges.

    Xu et al., "3DINO", npj Digital Medicine 2025: random resized crops, mirrors, quarter turns, then gamma, noise,
    histogram shift, smoothing, sharpening and Gibbs ringing.
    """
    from monai import transforms as m

    s = settings.intensity

    def pipeline(size: int) -> Callable[[Tensor], Tensor]:
        flips = [m.RandFlip(settings.flip, spatial_axis=axis) for axis in range(3)]
        turns = [m.RandRotate90(settings.rot90, max_k=3, spatial_axes=axes) for axes in ((0, 1), (1, 2), (0, 2))]
        return m.Compose(
            [
                m.Resize((size,) * 3, mode="trilinear"),
                *flips,
                *turns,
                m.RandGaussianNoise(s.noise_probability, std=s.noise[1]),
                m.RandGaussianSmooth(*[tuple(s.blur)] * 3, prob=s.blur_probability),  # type: ignore[misc,arg-type]
                m.RandGaussianSharpen(prob=s.sharpen_probability),
                m.RandGibbsNoise(s.gibbs_probability, alpha=(1 - s.gibbs[1], 1 - s.gibbs[0])),
                m.RandAdjustContrast(s.gamma_probability, gamma=tuple(s.gamma)),
                m.RandHistogramShift(8, s.histogram_probability),
            ]
        )

    kinds = [(2, pipeline(edge), settings.global_area, settings.global_depth)]
    kinds.append((settings.local_crops, pipeline(edge // 2), settings.local_area, settings.local_depth))
    generator = np.random.default_rng(0)

    def views(region: Tensor) -> list[Tensor]:
        made = []
        for number, transform, area, depth in kinds:
            for _ in range(number):
                plane = np.sqrt(generator.uniform(*area))
                shares = (generator.uniform(*depth), plane, plane)
                lengths = [max(2, round(n * share)) for n, share in zip(region.shape[1:], shares, strict=True)]
                made.append(transform(m.RandSpatialCrop(lengths, random_size=False)(region)))
        return made

    return views


def rows(edge: int, arguments: Any) -> Iterator[dict[str, object]]:
    """Yield the rows of one crop edge."""
    with tempfile.TemporaryDirectory() as folder:
        write_cases(Path(folder) / DATA, (3 * edge // 2,) * 3, 4, [edge] * 3)
        index = CaseIndex.build(Path(folder) / DATA, workers=0, show_progress=False)
        kinds = {
            "VolumeFusion": (volume_fusion, arguments.batches),
            "3DINO": (dino, max(1, arguments.batches // 8)),
        }
        for title, (make, batches) in kinds.items():
            if arguments.match not in title:
                continue
            costs = turns(make(edge, index, batches), arguments.repeats)
            for name, found in costs.items():
                yield {
                    "samples": f"{title}, {edge}^3",
                    "made by": name,
                    "samples/s of a core": rate(found, BATCH),
                    "our speed over it": ratios(found, costs["ours"]),
                }


def main() -> None:
    options = parser(__doc__, repeats=7)
    options.add_argument("--edges", type=int, nargs="+", default=[64, 128])
    options.add_argument("--batches", type=int, default=40, help=f"batches of {BATCH} of a measurement")
    options.add_argument("--match", default="", help="only samples whose name holds this")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    keep_memory("cpu")  # as our trainers do
    report([row for edge in arguments.edges for row in rows(edge, arguments)], arguments.json)


if __name__ == "__main__":
    main()
