"""Time each view, and the complete views of each method.

    OMP_NUM_THREADS=1 python -m benchmarks views [--edges 64 128] [--only lists] [--match gamma] [--device cuda]

"each": milliseconds a crop when the view is applied to every crop. "lists": complete samples a second with the default
settings of each method, float32, all crops of a sample cut out of boxes that were read before. Rates are samples per
CPU second, on a GPU per second. ``peers`` compares them with other packages.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Cost, Figure, in_turns, parser, rate, report
from benchmarks.workload import DATA, volume, write_cases
from nnssl_ext.data.crops import CropBatch, CropDataset, CropRequest, collate
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.host_memory import keep_memory
from nnssl_ext.methods import METHODS, DataGeometry, Method
from nnssl_ext.networks.backbone import UNetBackbone
from nnssl_ext.views.appearance import IntensityDraw, IntensitySettings
from nnssl_ext.views.augmentations import listed
from nnssl_ext.views.fusion import BoxLayout, GridLayout, fuse
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.spatial import SourceBox, crop_batch, rotation_matrix

ISOTROPIC = (1.0, 1.0, 1.0)
BATCH = 2


def each(edge: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return every view of one crop of one channel."""
    size = (edge,) * 3
    image = torch.from_numpy(volume(np.random.default_rng(0), (edge + 32,) * 3))[None]
    box = SourceBox(image, np.diag([-1.0, 1, -1]), (np.asarray(image.shape[1:]) - 1) / 2)
    box = box.pin_memory() if device.type == "cuda" else box  # as the loader does
    bent = replace(box, matrix=rotation_matrix((10, -5, 8), ISOTROPIC) / 1.1)
    crop, other = (crop_batch([b], size, device)[0] for b in (box, bent))
    random = BatchRandom(0, VIEWS, [0], device)
    boxes = BoxLayout.draw(random, size, 4, (25, 25), (0.0625, 0.625), (4, 4, 4))
    grid = GridLayout.draw(random, size, 4, [(8, 32)] * 3, 0.7)
    level = boxes.paint(size, device)
    views: dict[str, Callable[[], object]] = {
        "mirror (cut)": lambda: crop_batch([box], size, device),
        "rotation and zoom (cut)": lambda: crop_batch([bent], size, device),
        "boxes painted": lambda: boxes.paint(size, device),
        "grid painted": lambda: grid.paint(size, device),
        "fusion": lambda: fuse(crop, other, level, 4),
    }
    off: dict[str, Any] = {f"{kind.name}_probability": 0.0 for kind in listed(IntensitySettings)}
    for kind in listed(IntensitySettings):
        always = {f"{kind.name}_probability": 1.0, f"{kind.name}_channel_probability": 1.0}
        known = {name: value for name, value in always.items() if hasattr(IntensitySettings(), name)}
        settings = replace(IntensitySettings(), **{**off, **known})
        draw = IntensityDraw.draw(settings, random, 1, ISOTROPIC)
        views[f"{kind.name}, of a copy"] = lambda draw=draw: draw.apply(crop.clone())  # type: ignore[misc]
    return views


def build(name: str, edge: int, change: dict[str, Any]) -> Method:
    """Build a method for cubic crops. Its network has no memory, since views do not need it."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    stages = 4 if edge < 96 else 5
    strides = tuple((2**stage,) * 3 for stage in range(stages))
    geometry = DataGeometry((edge,) * 3, ISOTROPIC, 1, strides, (3 * edge // 2,) * 3, batch_size=BATCH)
    kind = METHODS[name]
    settings = replace(kind.Settings(), **change)
    with torch.device("meta"):
        network = PlainConvUNet(
            1, stages, [32, 64, 128, 256, 320][:stages], nn.Conv3d, 3, [1, *[2] * (stages - 1)], 2,
            kind.output_channels(settings, geometry) or 2, 2, True, nn.InstanceNorm3d, {"affine": True},
            nonlin=nn.LeakyReLU, deep_supervision=True,
        )  # fmt: skip
    return kind(UNetBackbone(network), settings, geometry)


def dataset_of(method: Method, index: CaseIndex) -> CropDataset:
    """Return the samples of a method."""
    request = method.crops(method.settings, method.geometry)
    assert isinstance(request, CropRequest)
    return CropDataset(index, index.cases, request, seed=0)


def views_of(method: Method, batch: CropBatch, device: torch.device) -> dict[str, Tensor]:
    """Make everything between the loader and the network."""
    with torch.no_grad():
        return method.views(batch, BatchRandom(0, VIEWS, batch.indices, device))


def batches(method: Method, index: CaseIndex, number: int) -> list[CropBatch]:
    """Read batches as the loader hands them to the views."""
    dataset = dataset_of(method, index)
    read = [collate([dataset[BATCH * n + b] for b in range(BATCH)]) for n in range(number)]
    return [batch.pin_memory() for batch in read] if torch.cuda.is_available() else read  # as the loader does


def lists(edge: int, index: CaseIndex, device: torch.device, number: int) -> dict[str, Callable[[], object]]:
    """Return the complete views of each method that reads crops."""
    methods = {kind.title: build(name, edge, {}) for name, kind in METHODS.items() if kind.learns_from == "cases"}
    return {title: partial(complete, m, batches(m, index, number), device) for title, m in methods.items()}


def complete(method: Method, read: list[CropBatch], device: torch.device) -> None:
    """Make the views of all batches."""
    for batch in read:
        views_of(method, batch, device)


def _rows(edge: int, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    if arguments.only != "lists":
        turns = _matching(each(edge, device), arguments.match)
        for name, costs in in_turns(turns, arguments.repeats, device=device).items():
            yield _row(edge, name, costs, 1, device)
    if arguments.only != "each":
        with tempfile.TemporaryDirectory() as folder:
            write_cases(Path(folder) / DATA, (3 * edge // 2,) * 3, 4, [edge] * 3)
            index = CaseIndex.build(Path(folder) / DATA, workers=0, show_progress=False)
            turns = _matching(lists(edge, index, device, arguments.batches), arguments.match)
            for name, costs in in_turns(turns, arguments.repeats, device=device).items():
                yield _row(edge, name, costs, BATCH * arguments.batches, device)


def _matching(turns: dict[str, Callable[[], object]], text: str) -> dict[str, Callable[[], object]]:
    found = {name: turn for name, turn in turns.items() if text in name}
    if not found:
        raise SystemExit(f"Expected a part of a view's name, got --match {text}. Views: {', '.join(turns)}.")
    return found


def _row(edge: int, name: str, costs: list[Cost], samples: int, device: torch.device) -> dict[str, object]:
    on_clock = device.type == "cuda"
    milliseconds = Figure(tuple(1000 * (c.wall if on_clock else c.cpu) / samples for c in costs), 2)
    return {"crop": f"{edge}^3", "view": name, "ms": milliseconds, "samples/s": rate(costs, samples, wall=on_clock)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--edges", type=int, nargs="+", default=[64, 128])
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--batches", type=int, default=16, help=f"batches of {BATCH} of a measurement")
    options.add_argument("--only", choices=("each", "lists"), help="one of the two tables")
    options.add_argument("--match", default="", help="only views whose name holds this")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    keep_memory(device.type)  # as our trainers do
    report([row for edge in arguments.edges for row in _rows(edge, arguments, device)], arguments.json)


if __name__ == "__main__":
    main()
