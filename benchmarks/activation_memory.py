"""How much memory a network of ours keeps for its backward pass, counted without a GPU: the table of docs/networks.md.

    python benchmarks/activation_memory.py vit_small 96 96 96

Tensors have shapes but no memory (torch's meta device). What is counted: everything autograd holds after one forward
pass of one sample with all outputs, each storage once, in float32; half of it under mixed precision. What is not:
temporary buffers, cuDNN's workspaces, and a fused attention's savings.
"""

from __future__ import annotations

import argparse

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnssl_ext.recipe import default_kwargs, load_recipe

GIB = 2**30


def build(recipe: str, checkpointing: bool) -> nn.Module:
    """The network of a recipe for isotropic data, one channel and three classes."""
    architecture = load_recipe(recipe).architecture
    name = architecture["network_class_name"]
    kwargs = {**default_kwargs(name, [1.0, 1.0, 1.0], recipe), **architecture["arch_kwargs"]}
    if "checkpointing" in kwargs:
        kwargs["checkpointing"] = checkpointing
    return get_network_from_plans(name, kwargs, [], 1, 3, deep_supervision=True)


def kept(network: nn.Module, image: Tensor) -> int:
    """Bytes that one forward pass leaves for the backward pass, parameters aside."""
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(image)
    return sum(storage.nbytes() for storage in storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe that names a network")
    parser.add_argument("size", nargs=3, type=int, help="edges of the patch")
    parser.add_argument("--checkpointing", action="store_true", help="compute blocks twice")
    arguments = parser.parse_args()
    with torch.device("meta"):
        network = build(arguments.recipe, arguments.checkpointing).train()
        activations = kept(network, torch.zeros(1, 1, *arguments.size)) / GIB
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{arguments.recipe} at {arguments.size}: {parameters / 1e6:.1f} M parameters, {activations:.2f} GiB a sample "
        f"in float32, {activations / 2:.2f} GiB mixed; weights, gradients and AdamW {16 * parameters / GIB:.2f} GiB"
    )


if __name__ == "__main__":
    main()
