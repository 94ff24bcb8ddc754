"""Count the memory that a network keeps for its backward pass, for the table of docs/reference/networks.md.

    python -m benchmarks activation_memory vit_small 96 96 96

Tensors have shapes, types and lifetimes but no memory (``nnssl_ext.training.memory.trace``). Counted is everything
that one more sample's forward pass leaves, with all outputs, in float32 and in mixed precision. What is not: temporary
buffers and cuDNN's workspaces. ``nnssl_ext plan`` estimates a whole step.
"""

from __future__ import annotations

import argparse

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.recipe import default_kwargs, load_recipe
from nnssl_ext.training.memory.estimate import GIB
from nnssl_ext.training.memory.trace import autocast, empty, without_memory


def build(recipe: str, checkpointing: bool) -> nn.Module:
    """Build a recipe's network for isotropic data, one channel and three classes."""
    architecture = load_recipe(recipe).architecture
    name = architecture["network_class_name"]
    kwargs = {**default_kwargs(name, [1.0, 1.0, 1.0], recipe), **architecture["arch_kwargs"]}
    if "checkpointing" in kwargs:
        kwargs["checkpointing"] = False
    network = get_network_from_plans(name, kwargs, [], 1, 3, deep_supervision=True)
    if checkpointing:
        backbone_of(network).checkpoint_activations()
    return network


def kept(network: nn.Module, size: list[int], dtype: torch.dtype | None) -> int:
    """Return the bytes that a sample's forward pass keeps for the backward pass.

    Args:
        network: On the meta device.
        size: Edges of the patch.
        dtype: Of autocast; None is float32.
    """
    left = []
    with without_memory() as live:
        empty(network)
        for batch in (1, 2):
            image = torch.empty(batch, 1, *size)
            before = live.now
            with autocast(dtype):
                outputs = network(image)
            left.append(live.now - before)
            del outputs
    return left[1] - left[0]  # low copies of the weights are in both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe that names a network")
    parser.add_argument("size", nargs=3, type=int, help="edges of the patch")
    parser.add_argument("--checkpointing", action="store_true", help="compute blocks twice")
    arguments = parser.parse_args()
    with torch.device("meta"):
        network = build(arguments.recipe, arguments.checkpointing).train()
    single, mixed = (kept(network, arguments.size, dtype) / GIB for dtype in (None, torch.bfloat16))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{arguments.recipe} at {arguments.size}: {parameters / 1e6:.1f} M parameters, {single:.2f} GiB a sample in "
        f"float32, {mixed:.2f} GiB mixed; weights, gradients and AdamW {16 * parameters / GIB:.2f} GiB"
    )


if __name__ == "__main__":
    main()
