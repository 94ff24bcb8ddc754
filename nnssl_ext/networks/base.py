"""What every method asks of a network that plans can build.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.networks.activation_checkpointing import checkpoint_activations

#: Edges or strides along D, H and W.
Triple = tuple[int, int, int]
#: The last part of the name of the layers that stock nnU-Net does not transfer.
HEADS = ".seg_layers."


class LearnedPositions(NamedTuple):
    """A table of what is added to tokens by their place.

    Attributes:
        table: (1, prefix + N, E).
        grid: Tokens per axis, N together.
        prefix: Tokens before them that have no place.
    """

    table: nn.Parameter
    grid: tuple[int, ...]
    prefix: int


class Backbone(ABC):
    """The view of a network: its encoder's features, what of it is trained, and the crops it can take.

    Args:
        network: The network; it is looked at, not owned.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @property
    @abstractmethod
    def strides(self) -> list[tuple[int, ...]]:
        """Cumulative stride of each encoder stage, per axis."""

    @property
    @abstractmethod
    def channels(self) -> list[int]:
        """Channels of each encoder stage."""

    @property
    @abstractmethod
    def stem(self) -> nn.Conv3d:
        """The encoder's first convolution, whose kernels belong to input channels."""

    @abstractmethod
    def features(self, image: Tensor, stages: int | None = None) -> list[Tensor]:
        """Feature maps of the encoder's first stages (None: of all), finest first.

        (B, C, D, H, W) -> [(B, channels[i], *edges / strides[i])].
        """

    @abstractmethod
    def encoder_parameters(self, stages: int | None = None) -> Iterable[nn.Parameter]:
        """The parameters of the parts that ``features(image, stages)`` runs."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The parts, of encoder and decoder, that ``checkpoint_activations`` may compute twice."""

    @abstractmethod
    def crop_problem(self, size: Sequence[int]) -> str:
        """Why the whole network cannot take a crop with these edges; '' if it can."""

    @abstractmethod
    def freeze_coarse_heads(self) -> None:
        """Take the heads of the coarser outputs out of the training; without deep supervision they get no gradient."""

    @abstractmethod
    def drop_depth_strides(self) -> None:
        """Make every stride of the encoder along the first axis one.

        Raises:
            ValueError: If the network's weights depend on its strides.
        """

    def checkpoint_activations(self) -> None:
        """Keep only what goes into each of the ``blocks``, and compute them again in the backward pass."""
        checkpoint_activations(self.blocks())

    def train_encoder_only(self, stages: int | None = None) -> None:
        """Take the decoder, and the encoder's stages after the first ``stages``, out of the training."""
        # a decoder may hold the encoder too, so tensors are told apart by themselves and not by name
        trained = {id(parameter) for parameter in self.encoder_parameters(stages)}
        for parameter in self.network.parameters():
            # what the network keeps out of every training stays out of this one
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)

    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters, stage by stage from the input on, for rates that differ with depth."""
        seen: set[int] = set()
        result = []
        for stages in range(1, len(self.strides) + 1):
            result.append([p for p in self.encoder_parameters(stages) if id(p) not in seen])
            seen.update(id(parameter) for parameter in result[-1])
        return result

    def is_head(self, name: str) -> bool:
        """Whether a tensor of the network's state belongs to the outputs, whose shapes depend on the classes."""
        return HEADS in f".{name}"

    def learned_positions(self) -> LearnedPositions | None:
        """The table of positions, of networks that have one; it belongs to one grid of tokens."""
        return None

    def equalise_input_channels(self) -> None:
        """Give all input channels the same kernels, their mean: they stay equal under inputs that are."""
        weight = self.stem.weight
        with torch.no_grad():
            weight.copy_(weight.mean(1, keepdim=True).expand_as(weight).clone())

    def set_deep_supervision(self, enabled: bool) -> None:
        """Whether the network returns all its outputs, full resolution first, or only the first."""
        decoder: Any = self.network.decoder
        decoder.deep_supervision = enabled


def is_primus(network: nn.Module) -> bool:
    """Tell whether a network is a ``Primus``, without importing its module, which loads all of timm."""
    module = sys.modules.get("dynamic_network_architectures.architectures.primus")
    return module is not None and isinstance(network, module.Primus)


def cumulative(strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Strides from one stage to the next -> strides from the input to each stage, per axis."""
    return [tuple(row) for row in np.cumprod(np.asarray(strides), axis=0).tolist()]


def triple(values: Sequence[int]) -> Triple:
    """Three numbers as the tuple that convolutions take."""
    depth, height, width = values
    return depth, height, width


def edges_problem(size: Sequence[int], total: Sequence[int], least: Sequence[int], last: str = "bottleneck") -> str:
    """Why crop edges do not suit a network; '' if they do.

    Args:
        size: Edges of the crop.
        total: Stride from the input to the bottleneck, whose multiples the edges must be.
        least: Least edge per axis.
        last: What the deepest map is called.
    """
    for axis, (edge, stride, lowest) in enumerate(zip(size, total, least, strict=True)):
        if edge % stride or edge < lowest:
            lower, upper = max(edge // stride * stride, lowest), max(-(-edge // stride) * stride, lowest)
            near = f"{lower}" if lower == upper else f"{lower} or {upper}"
            return (
                f"crop edge {edge} (axis {axis} of {tuple(size)}) does not fit the network: it must be a multiple "
                f"of {stride}, at least {lowest}; use {near}"
            )
    if np.prod([edge // stride for edge, stride in zip(size, total, strict=True)]) < 2:
        return f"crop {tuple(size)} leaves one voxel at the {last} (stride {tuple(total)}); use a larger crop"
    return ""


def drop_depth_strides(modules: Iterable[nn.Module]) -> None:
    """Make the strides of convolutions and pooling layers along the first axis one; no weight depends on them."""
    for module in modules:
        if isinstance(module, nn.Conv3d):
            module.stride = (1, *module.stride[1:])
        elif isinstance(module, (nn.AvgPool3d, nn.MaxPool3d)):
            kernel, stride = (
                size if isinstance(size, (tuple, list)) else (size,) * 3 for size in (module.kernel_size, module.stride)
            )
            module.kernel_size, module.stride = (1, *kernel[1:]), (1, *stride[1:])
