"""Small networks of every family, filled with noise, as sources and targets."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnssl_ext.transfer.names import canonical_weights
from nnssl_ext.transfer.source import PretrainedWeights, SourceGeometry
from nnssl_ext.transfer.transfer import TargetNetwork
from tests.datasets import architecture

MILLIMETRE = (1.0, 1.0, 1.0)


def planned(kind: str = "plain", **changes: Any) -> dict:
    """A small architecture; ``stages`` repeats the last stage, other changes replace arch_kwargs."""
    plan = deepcopy(architecture(kind))
    kwargs = plan["arch_kwargs"]
    stages = changes.pop("stages", kwargs["n_stages"])
    for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"):
        if name in kwargs:
            kwargs[name] = [*kwargs[name], *[kwargs[name][-1]] * stages][:stages]
    kwargs.update(n_stages=stages, n_conv_per_stage_decoder=[1] * (stages - 1))
    kwargs.update(changes)
    return plan


def built(plan: dict, channels: int = 1, outputs: int = 3) -> nn.Module:
    network: nn.Module = get_network_from_plans(
        plan["network_class_name"], plan["arch_kwargs"], plan["_kw_requires_import"], channels, outputs, True
    )
    return network


def noise(network: nn.Module, seed: int = 1) -> nn.Module:
    """Every tensor of the network filled with noise, so that none has a value by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return network


def source(
    plan: dict, channels: int = 1, outputs: int = 3, spacing: tuple = MILLIMETRE, **more: Any
) -> PretrainedWeights:
    network: Any = noise(built(plan, channels, outputs))
    weights = canonical_weights(network.state_dict())
    strides = tuple(tuple(stride) for stride in network.encoder.strides)
    return PretrainedWeights(
        Path("source.pth"), "test", weights, SourceGeometry(spacing, strides, (16, 16, 16)), **more
    )


def target(plan: dict, channels: int = 1, outputs: int = 3, spacing: tuple = MILLIMETRE) -> TargetNetwork:
    torch.manual_seed(0)
    return TargetNetwork(built(plan, channels, outputs), spacing, (16, 16, 16))


def primus(channels: int = 1, outputs: int = 3, patch: int = 4, shape: tuple = (8, 8, 8), width: int = 72) -> nn.Module:
    return Primus(channels, width, (patch,) * 3, outputs, 2, 6, shape, scale_attn_inner=True, init_values=0.1)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, int]:
    """How many values of each tensor are not what they were."""
    return {name: int((before[name] != after[name]).sum()) for name in before}
