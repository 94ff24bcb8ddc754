"""Define uniform access to a network of plans.

B batch, C channel, D H W voxels.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.networks.activation_checkpointing import checkpoint_activations

#: Edges or strides along D, H and W.
Triple = tuple[int, int, int]
#: A change of all tokens, (B, N, E) -> (B, N, E).
Decode = Callable[[Tensor], Tensor]
#: Name of the layers that stock nnU-Net does not transfer.
HEADS = ".seg_layers."


class LearnedPositions(NamedTuple):
    """Learned positions of tokens.

    Attributes:
        table: (1, prefix + N, E).
        grid: Tokens per axis, N together.
        prefix: Tokens before them without a place.
    """

    table: nn.Parameter
    grid: tuple[int, ...]
    prefix: int


class Backbone(ABC):
    """Give uniform access to a network.

    It offers encoder features, trainable parameters and valid crop sizes.

    Args:
        network: The network. It is not owned.

    Class attributes:
        is_transformer: Whether the encoder is a vision transformer, which can leave out masked tokens.
    """

    is_transformer: ClassVar[bool] = False

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @property
    @abstractmethod
    def strides(self) -> list[tuple[int, ...]]:
        """Return each stage's cumulative stride per axis."""

    @property
    @abstractmethod
    def channels(self) -> list[int]:
        """Return the channels of each encoder stage."""

    @property
    @abstractmethod
    def stem(self) -> nn.Conv3d:
        """Return the encoder's first convolution."""

    @abstractmethod
    def features(self, image: Tensor, stages: int | None = None) -> list[Tensor]:
        """Compute maps of the first stages, finest first.

        (B, C, D, H, W) -> [(B, channels[i], *edges / strides[i])].
        """

    def output(self, image: Tensor) -> Any:
        """Compute the network's output, or all outputs under deep supervision.

        (B, C, D, H, W) -> (B, classes, D, H, W). Any crop without a ``crop_problem`` is possible.
        """
        return self.network(image)

    @abstractmethod
    def features_and_output(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the encoder's feature maps and the network's output, without deep supervision.

        (B, C, D, H, W) -> maps as ``features`` returns them, (B, classes, D, H, W). The encoder runs once.
        """

    def train_mask_token(self) -> None:  # noqa: B027 a default
        """Train the mask token, for an objective that masks tokens. Networks without a trainable one do nothing."""

    def visible_output(
        self, image: Tensor, visible: Tensor, decode: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Run the network without its masked tokens. The mask token takes their place in the decoder.

        Args:
            image: (B, C, D, H, W).
            visible: (B, V) positions of the visible tokens.
            decode: Applied to the encoder's tokens (B, N, E) with the mask token in the place of the others.
        """
        raise NotImplementedError("only vision transformers leave out tokens")

    @abstractmethod
    def encoder_parameters(self, stages: int | None = None) -> Iterable[nn.Parameter]:
        """Return the parameters that ``features(image, stages)`` uses."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Return the modules that ``checkpoint_activations`` may recompute."""

    @abstractmethod
    def crop_problem(self, size: Sequence[int]) -> str:
        """Explain why a crop does not fit, else ''."""

    def freeze_coarse_heads(self) -> None:
        """Freeze coarse heads, which get no gradient."""
        decoder: Any = self.network.decoder
        for head in list(decoder.seg_layers)[:-1]:
            head.requires_grad_(False)

    @abstractmethod
    def drop_depth_strides(self) -> None:
        """Set all strides along the first axis to one.

        Raises:
            ValueError: If the network's weights depend on its strides.
        """

    def checkpoint_activations(self) -> None:
        """Recompute each of the ``blocks`` in the backward pass."""
        checkpoint_activations(self.blocks())

    def train_encoder_only(self, stages: int | None = None) -> None:
        """Freeze the decoder and later encoder stages."""
        # a decoder may hold the encoder too, so tensors are compared, not names
        trained = {id(parameter) for parameter in self.encoder_parameters(stages)}
        for parameter in self.network.parameters():
            # parameters that the network always freezes stay frozen
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the encoder's parameters stage by stage."""
        seen: set[int] = set()
        result = []
        for stages in range(1, len(self.strides) + 1):
            result.append([p for p in self.encoder_parameters(stages) if id(p) not in seen])
            seen.update(id(parameter) for parameter in result[-1])
        return result

    def is_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the outputs."""
        return HEADS in f".{name}"

    def learned_positions(self) -> LearnedPositions | None:
        """Return the learned positions, of networks that have any."""
        return None

    def equalize_input_channels(self) -> None:
        """Set all input channels' kernels to their mean."""
        weight = self.stem.weight
        with torch.no_grad():
            weight.copy_(weight.mean(1, keepdim=True).expand_as(weight).clone())

    def set_deep_supervision(self, enabled: bool) -> None:
        """Return all outputs, or only the first."""
        decoder: Any = self.network.decoder
        decoder.deep_supervision = enabled


def is_primus(network: nn.Module) -> bool:
    """Return whether a network is a ``Primus``. Its module is not imported, since that loads all of timm."""
    module = sys.modules.get("dynamic_network_architectures.architectures.primus")
    return module is not None and isinstance(network, module.Primus)


def cumulative(strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Accumulate strides from stage to stage."""
    return [tuple(row) for row in np.cumprod(np.asarray(strides), axis=0).tolist()]


def triple(values: Iterable[int]) -> Triple:
    """Return three numbers as a tuple."""
    depth, height, width = values
    return depth, height, width


def edges_problem(size: Sequence[int], total: Sequence[int], least: Sequence[int], last: str = "bottleneck") -> str:
    """Explain why crop edges do not fit, else ''.

    Args:
        size: Edges of the crop.
        total: Stride from the input to the bottleneck. Edges must be its multiples.
        least: Smallest edge per axis.
        last: Name of the deepest map.
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
    """Set strides along the first axis to one."""
    for module in modules:
        if isinstance(module, nn.Conv3d):
            module.stride = (1, *module.stride[1:])
        elif isinstance(module, (nn.AvgPool3d, nn.MaxPool3d)):
            kernel, stride = (
                size if isinstance(size, (tuple, list)) else (size,) * 3 for size in (module.kernel_size, module.stride)
            )
            module.kernel_size, module.stride = (1, *kernel[1:]), (1, *stride[1:])
