"""What a training step of each method costs on a plan's network, counted on tensors without memory.

    python benchmarks/cost.py [--patch 128 128 128] [--batch 2]

A residual encoder of six stages (32 to 320 features) is built on torch's meta device; floating point operations of
forward and backward passes are counted by torch, and the memory of activations as the bytes autograd keeps for the
backward pass in float32. Heads are included, augmentation is not.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods import METHODS, Geometry, Method
from nnssl_ext.networks.backbone import UNetBackbone
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.spatial import SourceBox


def build(name: str, patch: tuple[int, int, int]) -> tuple[Method, tuple]:
    """The method on a six-stage residual U-Net, on the meta device, and the edges of its crops."""
    strides = [1, 2, 2, 2, 2, 2]
    features = [32, 64, 128, 256, 320, 320]
    total = tuple((2**stage,) * 3 for stage in range(len(strides)))
    geometry = Geometry(patch, (1.0, 1.0, 1.0), 1, total, patch)
    method = METHODS[name]
    settings = method.Settings()
    if hasattr(settings, "aggregator"):
        # mixed precision, and so the GRU, does not know the meta device; the other aggregator costs as little
        settings = replace(settings, aggregator="convolution")
    # the permutations of a jigsaw are drawn, so only the network lives on the meta device at first
    with torch.device("meta"):
        network = ResidualEncoderUNet(
            1, 6, features, nn.Conv3d, 3, strides, [1, 3, 4, 6, 6, 6], method.output_channels(settings, geometry) or 2,
            [1, 1, 1, 1, 1], True, nn.InstanceNorm3d, {"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
        )  # fmt: skip
    built = method(UNetBackbone(network), settings, geometry)
    return built, tuple(crop.size for crop in method.crops(settings, geometry).crops)


def measure(name: str, patch: tuple[int, int, int], batch_size: int) -> tuple[float, float]:
    """Floating point operations and bytes kept for the backward pass, of one step."""
    method, sizes = build(name, patch)
    boxes = [
        [SourceBox(torch.randn(1, *size), torch.eye(3).numpy(), (torch.tensor(size).numpy() - 1) / 2, f"c{row}{b}")
         for b in range(batch_size)]
        for row, size in enumerate(sizes)
    ]  # fmt: skip
    indices = list(range(batch_size))
    views = method.views(CropBatch(indices, boxes), BatchRandom(0, VIEWS, indices, torch.device("cpu")))
    views = {key: value.to("meta") for key, value in views.items()}
    method.to("meta").train()
    parameters = {id(p) for p in method.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in parameters:
            kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = method(views)["loss"].sum()
        loss.backward()
    return counter.get_total_flops(), sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=[128, 128, 128])
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    reference = None
    for name in METHODS:
        operations, kept = measure(name, tuple(arguments.patch), arguments.batch)
        reference = reference or (operations, kept)
        print(
            f"{name:32s} {operations / 1e12:7.2f} Tflop ({operations / reference[0]:.2f} x)   "
            f"{kept / 2**30:6.1f} GiB ({kept / reference[1]:.2f} x)"
        )


if __name__ == "__main__":
    main()
