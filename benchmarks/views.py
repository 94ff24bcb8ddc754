"""Views: each transform, each method's full list, and what others need for the same.

    OMP_NUM_THREADS=1 python -m benchmarks views [--edges 64 128] [--only lists] [--match VolumeFusion] [--device cuda]

"each": milliseconds a crop when the transform is applied to every crop. "lists": complete samples a second, all crops
of a sample cut out of boxes that were read before, with the default probabilities of each method, float32.
"VolumeFusion, equal list" has no rotation, zoom, quarter turn and no ignored voxels, and nnU-Net's chances for each
channel of the rest: mirror 0.5 an axis, noise 0.1, blur 0.2 * 0.5, brightness 0.15, contrast 0.15, low resolution
0.25 * 0.5, gamma 0.1 + 0.3. "every channel" is without nnU-Net's halves: blur 0.2, low resolution 0.25.
Rates are samples per CPU second, on a GPU per second. A peer is measured in the same turns where it is installed
(``pip install PYMIC``): PyMIC's Crop4VolumeFusion and VolumeFusion with the ranges of its example.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from nnssl_ext.views import filters, intensity
from nnssl_ext.views.fusion import BoxLayout, GridLayout, fuse
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.spatial import SourceBox, crop_batch, rotation_matrix

ISOTROPIC = (1.0, 1.0, 1.0)
BATCH = 2


def each(edge: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Every transform on one crop of one channel."""
    image = torch.from_numpy(volume(np.random.default_rng(0), (edge + 32,) * 3))[None]
    box = SourceBox(image, np.diag([-1.0, 1, -1]), (np.asarray(image.shape[1:]) - 1) / 2)
    bent = replace(box, matrix=rotation_matrix((10, -5, 8), ISOTROPIC) / 1.1)
    crop, other = (crop_batch([b], (edge,) * 3, device)[0] for b in (box, bent))
    random = BatchRandom(0, VIEWS, [0], device)
    boxes = BoxLayout.draw(random, (edge,) * 3, 4, (25, 25), (0.0625, 0.625), (4, 4, 4))
    grid = GridLayout.draw(random, (edge,) * 3, 4, [(8, 32)] * 3, 0.7)
    level = boxes.paint((edge,) * 3, device)

    def strength(value: float) -> Tensor:
        return torch.full((1, 1), value)

    return {
        "mirror (cut)": lambda: crop_batch([box], (edge,) * 3, device),
        "rotation and zoom (cut)": lambda: crop_batch([bent], (edge,) * 3, device),
        "noise": lambda: intensity.add_noise(crop, torch.full((1,), 1e-3), random),
        "brightness": lambda: intensity.scale_brightness(crop, strength(0.999)),
        "contrast": lambda: intensity.stretch_contrast(crop, strength(0.999)),
        "gamma": lambda: intensity.adjust_gamma(crop, strength(0.999)),
        "blur": lambda: filters.blur(crop.clone(), strength(0.75), ISOTROPIC),
        "sharpening": lambda: filters.sharpen(crop.clone(), strength(0.75), ISOTROPIC),
        "low resolution": lambda: filters.lower_resolution(crop.clone(), strength(0.75), ISOTROPIC),
        "histogram shift": lambda: filters.shift_histogram(crop, torch.rand(1, 1, 8), torch.ones(1, 1).bool()),
        "Gibbs ringing": lambda: filters.gibbs_ringing(crop.clone(), strength(0.7)),
        "boxes painted": lambda: boxes.paint((edge,) * 3, device),
        "grid painted": lambda: grid.paint((edge,) * 3, device),
        "fusion": lambda: fuse(crop, other, level, 4),
    }


def build(name: str, edge: int, change: dict[str, Any]) -> Method:
    """A method for crops of one edge; its network takes no memory, since views do not need it."""
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


def equal_list(channels: float = 0.5) -> dict[str, Any]:
    """VolumeFusion's settings with the transforms and probabilities of nnU-Net's own list.

    Args:
        channels: Chance of a channel, once a sample is blurred or lowered in resolution.
    """
    settings = METHODS["volume_fusion"].Settings()
    looks = replace(
        settings.intensity,
        blur_probability=0.2 * channels,
        low_resolution_probability=0.25 * channels,
        gamma_probability=0.4,
    )
    return {"intensity": looks, "affine": 0.0, "rot90": 0.0, "ignore_below": 0.0}


def batches(method: Method, index: CaseIndex, number: int) -> list[CropBatch]:
    """What the loader hands to the views."""
    request = method.crops(method.settings, method.geometry)
    assert isinstance(request, CropRequest)
    dataset = CropDataset(index, index.cases, request, seed=0)
    return [collate([dataset[BATCH * n + b] for b in range(BATCH)]) for n in range(number)]


def lists(edge: int, index: CaseIndex, device: torch.device, number: int) -> dict[str, Callable[[], object]]:
    """The complete views of each method that reads crops."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "VolumeFusion, equal list": ("volume_fusion", equal_list()),
        "VolumeFusion, every channel": ("volume_fusion", equal_list(1.0)),
    }
    kinds |= {kind.title: (name, {}) for name, kind in METHODS.items() if kind.learns_from == "cases"}
    result: dict[str, Callable[[], object]] = {}
    for title, (name, change) in kinds.items():
        method = build(name, edge, change)
        result[title] = partial(complete, method, batches(method, index, number), device)
    return result


def complete(method: Method, read: list[CropBatch], device: torch.device) -> None:
    """Everything between the loader and the network."""
    with torch.no_grad():
        for batch in read:
            method.views(batch, BatchRandom(0, VIEWS, batch.indices, device))


def pymic(edge: int, number: int) -> dict[str, Callable[[], object]]:
    """PyMIC's own transforms on as many samples, from one volume of the size that ours are cut from."""
    if importlib.util.find_spec("pymic") is None:
        return {}
    from pymic.transform.crop4vf import Crop4VolumeFusion, VolumeFusion

    crop = Crop4VolumeFusion({"crop4volumefusion_output_size": [edge] * 3, "task": "segmentation"})
    fusion = VolumeFusion({"task": "segmentation"})
    image = volume(np.random.default_rng(0), (3 * edge // 2,) * 3)[None]

    def run() -> None:
        for _ in range(BATCH * number):
            fusion(crop({"image": image.copy(), "names": ["a"]}))

    return {"PyMIC's VolumeFusion": run}


def _rows(edge: int, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    """The rows of one crop edge."""
    if arguments.only != "lists":
        turns = _matching(each(edge, device), arguments.match)
        for name, costs in in_turns(turns, arguments.repeats, device=device).items():
            yield _row(edge, name, costs, 1, device)
    if arguments.only != "each":
        few = min(4, arguments.batches)
        with tempfile.TemporaryDirectory() as folder:
            write_cases(Path(folder) / DATA, (3 * edge // 2,) * 3, 4, [edge] * 3)
            index = CaseIndex.build(Path(folder) / DATA, workers=0, show_progress=False)
            peers = pymic(edge, few)
            turns = _matching(lists(edge, index, device, arguments.batches) | peers, arguments.match)
            for name, costs in in_turns(turns, arguments.repeats, device=device).items():
                yield _row(edge, name, costs, BATCH * (few if name in peers else arguments.batches), device)


def _matching(turns: dict[str, Callable[[], object]], text: str) -> dict[str, Callable[[], object]]:
    found = {name: turn for name, turn in turns.items() if text in name}
    if not found:
        raise SystemExit(f"--match {text}: no view is called so; there are {', '.join(turns)}")
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
    rows = [row for edge in arguments.edges for row in _rows(edge, arguments, device)]
    report(rows, arguments.json)


if __name__ == "__main__":
    main()
