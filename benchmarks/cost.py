"""Count the operations and the memory of a step of each method, without computing it.

    python -m benchmarks cost [--patch 128] [--batch 2]

The network is the residual encoder of six stages of benchmarks/memory.py. torch counts the floating point operations
of the forward and backward pass. The memory is what the forward pass keeps for the backward pass in float32. Heads are
included, augmentation is not.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import residual_encoder
from nnssl_ext.methods import METHODS
from nnssl_ext.training.memory.estimate import build_method, quiet, shapes_at, view_shapes
from nnssl_ext.training.memory.trace import empty, trace_step, without_memory


def measure(name: str, edge: int, batch: int) -> tuple[int, int]:
    """Return the floating point operations of a step and the bytes kept for the backward pass."""
    method = METHODS[name]
    build, settings, geometry = residual_encoder(method, edge, checkpointing=False)
    built = build_method(method, build, quiet(settings.heaviest()), geometry, torch.device("meta"))
    views = shapes_at(view_shapes(built, 1), view_shapes(built, 2), batch)
    with without_memory() as live:
        empty(built)
        with FlopCounterMode(display=False) as counter:
            trace = trace_step(built, views, live, None)
    return counter.get_total_flops(), trace.kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=128, help="edge of the cubic crop")
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    reference = None
    for name in METHODS:
        operations, kept = measure(name, arguments.patch, arguments.batch)
        reference = reference or (operations, kept)
        print(
            f"{name:32s} {operations / 1e12:7.2f} Tflop ({operations / reference[0]:.2f} x)   "
            f"{kept / 2**30:6.1f} GiB ({kept / reference[1]:.2f} x)"
        )


if __name__ == "__main__":
    main()
