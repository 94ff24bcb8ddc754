"""Estimate a training step's GPU memory for the tables of docs/how-to/gpu-memory.md, and measure it on a GPU.

    python -m benchmarks memory [--plans nnUNetPlans.json dataset.json] [--methods NAME ...] [--batch 2] [--measure]

Without plans: one channel, crops of 128 x 128 x 128 at 1 mm, a residual encoder of six stages (32 to 320 features).
torch counts the floating point operations of the forward and backward pass (docs/methods/index.md), heads included,
augmentation not.
With ``--measure`` each step is done three times on the GPU, without torch.compile, and the most that was allocated and
reserved is printed beside the estimate.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Figure, parser, report
from nnssl_ext.methods import METHODS, DataGeometry, Method
from nnssl_ext.networks.backbone import Backbone, UNetBackbone
from nnssl_ext.recipe import read_json
from nnssl_ext.training.memory.estimate import GIB, build_method, planned, quiet, shapes_at, step_memory, view_shapes
from nnssl_ext.training.memory.trace import empty, trace_step, without_memory
from nnssl_ext.training.optimization import build_optimizer

STRIDES = [1, 2, 2, 2, 2, 2]
#: How to build a backbone with so many outputs (None: the data set's), and what the method is told.
Case = tuple[Callable[[int | None], Backbone], Any, DataGeometry]


def residual_encoder(method: type[Method], edge: int, checkpointing: bool) -> Case:
    """Return a residual U-Net of six stages for isotropic cases of one channel."""

    def build(outputs: int | None) -> Backbone:
        network = ResidualEncoderUNet(
            1, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, 3, STRIDES, [1, 3, 4, 6, 6, 6], outputs or 2,
            [1, 1, 1, 1, 1], True, nn.InstanceNorm3d, {"affine": True}, nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True}, deep_supervision=True,
        )  # fmt: skip
        backbone = UNetBackbone(network)
        if checkpointing:
            backbone.checkpoint_activations()
        return backbone

    total = tuple((2**stage,) * 3 for stage in range(len(STRIDES)))
    crop = (edge, edge, edge)
    return build, method.Settings(), DataGeometry(crop, (1.0, 1.0, 1.0), 1, total, crop)


def operations(method: type[Method], case: Case, batch: int) -> int:
    """Count the floating point operations of a step without computing them."""
    build, settings, geometry = case
    built = build_method(method, build, quiet(settings.heaviest()), geometry, torch.device("meta"))
    views = shapes_at(view_shapes(built, 1), view_shapes(built, 2), batch)
    with without_memory() as live:
        empty(built)
        with FlopCounterMode(display=False) as counter:
            trace_step(built, views, live, None)
    return counter.get_total_flops()


def measured(method: type[Method], case: Case, batch: int) -> tuple[int, int]:
    """Return the maximum of bytes that torch allocated and reserved in training steps on the GPU."""
    device = torch.device("cuda")
    build, settings, geometry = case
    built = build_method(method, build, settings, geometry, torch.device("cpu"))
    shapes = view_shapes(built, batch)
    built.to(device)
    recipe = built.optimizer()
    optimizer = build_optimizer(recipe, built.parameter_groups(), 1e-4)
    gc.collect()
    torch.cuda.empty_cache()  # an earlier method's
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        views = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
        with torch.autocast("cuda", torch.bfloat16):
            loss = built(views)["loss"].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(built.parameters(), recipe.max_grad_norm or math.inf)
        optimizer.step()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def main() -> None:
    options = parser(__doc__, repeats=None)
    options.add_argument("--plans", nargs=2, type=Path, metavar=("PLANS", "DATASET"), help="JSON files of a data set")
    options.add_argument("--configuration", default="3d_fullres")
    options.add_argument("--edge", type=int, default=128, help="of the cubic crop, without plans")
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--measure", action="store_true", help="also do the steps, on a GPU")
    arguments = options.parse_args()
    report([row(name, arguments) for name in arguments.methods], arguments.json)


def row(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the operations and GiB that a method needs and, with ``--measure``, the GiB it takes."""
    method, needs, found, counted = METHODS[name], [], dict[str, object](), 0
    for checkpointing in (False, True):
        if arguments.plans:
            plans, dataset = (read_json(path) for path in arguments.plans)
            case = planned(method, plans, arguments.configuration, dataset, checkpointing=checkpointing)
        else:
            case = residual_encoder(method, arguments.edge, checkpointing)
        counted = counted or operations(method, case, arguments.batch)
        needs.append(step_memory(method, *case, "auto"))
        if arguments.measure:
            allocated, reserved = measured(method, case, arguments.batch)
            where = ", checkpointing" if checkpointing else ""
            found[f"estimated{where}"] = gib(needs[-1].allocated(arguments.batch))
            found |= {f"allocated{where}": gib(allocated), f"reserved{where}": gib(reserved)}
    own, twice = needs
    return {
        "method": method.title,
        "Tflop": Figure((counted / 1e12,), 2),
        "weights, gradients, optimizer": gib(own.weights + own.gradients + own.optimiser),
        "kept a sample": gib(own.kept.each),
        "at this batch": gib(own.peak(arguments.batch), 1),
        "with activation checkpointing": gib(twice.peak(arguments.batch), 1),
        **found,
    }


def gib(number: float, digits: int = 2) -> Figure:
    return Figure((number / GIB,), digits)


if __name__ == "__main__":
    main()
