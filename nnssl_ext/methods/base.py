"""The one interface of a self-supervised objective.

B batch, C channel, D H W voxels. A method names no trainer, and the trainer names no method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from nnssl_ext.data.crops import CropBatch, CropRequest
from nnssl_ext.data.images import ImageRequest
from nnssl_ext.networks.base import Backbone
from nnssl_ext.views.random import BatchRandom


@dataclass(frozen=True)
class Geometry:
    """What a method is told of the data and of the network's strides.

    Attributes:
        crop_size: Edges of the crop the network is fed with, in voxels.
        spacing: Voxel edges in mm, in the same order.
        channels: Channels of a case.
        strides: Cumulative stride of each encoder stage, per axis.
        image_classes: Classes of the 2-D images, for methods that learn from them.
        image_chance: Accuracy of always answering the most frequent of them.
        batch_size: Samples a step over all processes; 0 before it is known.
        case_size: Edges in voxels that at least nine in ten cases have; None, before cases are known, is the crop.
    """

    crop_size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    channels: int
    strides: tuple[tuple[int, ...], ...] = ()
    case_size: tuple[int, int, int] | None = None
    image_classes: tuple[str, ...] = ()
    image_chance: float = 0.0
    batch_size: int = 0


@dataclass(frozen=True)
class OptimiserRecipe:
    """How a method wants to be optimised.

    Attributes:
        name: ``adam``, ``adamw`` or ``sgd`` (with Nesterov momentum, as nnU-Net).
        learning_rate: Peak, after the warm-up.
        weight_decay: Of weight matrices and kernels alike.
        schedule: ``constant``, ``poly`` (exponent 0.9, as nnU-Net) or ``cosine``, to zero at the end.
        warm_up: Share of all steps over which the rate rises linearly.
        clip: Largest norm of the gradient of each of ``Method.clipped_parts``.
        final_weight_decay: What the weight decay reaches at the end, along a cosine; None leaves it as it is.
        momentum: Of ``sgd``.
    """

    name: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warm_up: float = 0.0
    clip: float = 12.0
    final_weight_decay: float | None = None
    momentum: float = 0.99


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are optimised alike.

    Attributes:
        parameters: Those that take a gradient.
        rate: Multiple of the learning rate.
        decay: Multiple of the weight decay.
    """

    parameters: list[nn.Parameter]
    rate: float = 1.0
    decay: float = 1.0


@dataclass(frozen=True)
class Readable:
    """The number beside the loss that a person can read; ``key`` is its name in ``forward``'s result."""

    key: str
    title: str
    higher_is_better: bool = True


class Method(nn.Module, ABC):
    """A self-supervised objective around a segmentation network whose architecture it does not own.

    The module under training (compiled, wrapped for several GPUs) is the method; ``network`` is a part of it. Heads
    of its own live beside the network.

    Class attributes:
        name: Its section in the plans, and its file's name.
        trainer: The name behind ``-tr``.
        title, citation: For people.
        Settings: The dataclass of its settings.
        readable: The number a person can read.
        needs_images: Whether samples are 2-D images of ``nnssl_ext.images``.
        deep_supervision: Whether the objective uses the network's coarser outputs.
        fewest_samples: The smallest batch with which every term of the objective says something.
        patience: Epochs in a row in which ``diagnose`` finds a collapse before the run stops.
    """

    name: ClassVar[str]
    trainer: ClassVar[str]
    title: ClassVar[str]
    citation: ClassVar[str]
    Settings: ClassVar[type]
    readable: ClassVar[Readable]
    needs_images: ClassVar[bool] = False
    deep_supervision: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 1
    patience: int = 5

    def __init__(self, backbone: Backbone, settings: Any, geometry: Geometry) -> None:
        super().__init__()
        self.network = backbone.network
        self.backbone = backbone
        self.settings = settings
        self.geometry = geometry

    @classmethod
    def output_channels(cls, settings: Any, geometry: Geometry) -> int | None:
        """Width of the network's heads while pretraining; None leaves the data set's."""
        return None

    @classmethod
    def check_backbone(cls, backbone: Backbone) -> None:
        """Called before anything is written, with a network without memory.

        Raises:
            ValueError: If the method needs of the network what it has not, in one line.
        """

    @classmethod
    @abstractmethod
    def crops(cls, settings: Any, geometry: Geometry) -> CropRequest | ImageRequest:
        """What one sample is made of."""

    @classmethod
    def heaviest(cls, settings: Any) -> Any:
        """Settings that draw what takes most memory at every step, for estimates of it."""
        return settings

    @abstractmethod
    def optimiser(self) -> OptimiserRecipe:
        """How to optimise the trainable parameters."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters to optimise; all alike where a method does not say otherwise."""
        return [ParameterGroup([parameter for parameter in self.parameters() if parameter.requires_grad])]

    def clipped_parts(self) -> list[nn.Module]:
        """The parts whose gradients are shortened each for itself; all of it where a method does not say otherwise."""
        return [self]

    @abstractmethod
    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Augmented views and the pretext target, without gradient, on ``random.device``; every draw from it."""

    @abstractmethod
    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` and its named terms, each (B,), on the device; in evaluation also the readable number."""

    def describe(self) -> str:
        """What was chosen for these data, for the log; '' if nothing was."""
        return ""

    def before_step(self, progress: float) -> None:
        """Called before each optimiser step with the share of the training that is done, in [0, 1)."""

    def end_validation(self) -> dict[str, float]:
        """What can be measured only on all validation crops together, equal in all processes; called after them."""
        return {}

    def diagnose(self, measures: dict[str, float]) -> str:
        """The sign by which a validation's means and measures show a collapse, and what to change; '' if none."""
        return ""

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step with the share of the training that is done, in [0, 1]."""

    @property
    def exported(self) -> nn.Module:
        """The network whose weights are written: the student, or its teacher."""
        return self.network
