"""The interface of a self-supervised objective.

B batch, C channel, D H W voxels. A method does not depend on the trainer, nor the trainer on any one method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.data.images import SampleRequest, SampleSource
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.data.samples import CaseSource, SampleClasses
from nnssl_ext.methods.panels import Panel
from nnssl_ext.networks.base import Backbone
from nnssl_ext.settings import CommonSettings
from nnssl_ext.views.random import BatchRandom


@dataclass(frozen=True)
class DataGeometry:
    """Describe the data and the network's strides.

    Attributes:
        crop_size: Edges of the network's input, in voxels.
        spacing: Voxel edges in mm, in the same order.
        channels: Channels of a case.
        strides: Cumulative stride of each encoder stage, per axis.
        case_size: Edges in voxels that at least nine in ten cases have. None, before the cases are known, is the crop.
        classes: Classes of the samples, where they are labeled.
        batch_size: Samples per step over all processes; 0 before it is known.
        masked: For each channel, whether nnU-Net normalized within the image's mask and keeps zero outside.
    """

    crop_size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    channels: int
    strides: tuple[tuple[int, ...], ...] = ()
    case_size: tuple[int, int, int] | None = None
    classes: SampleClasses | None = None
    batch_size: int = 0
    masked: tuple[bool, ...] = ()


@dataclass(frozen=True)
class OptimizerRecipe:
    """Optimizer, schedule and clipping of a method.

    Attributes:
        name: ``adam``, ``adamw`` or ``sgd`` (with Nesterov momentum, as nnU-Net).
        learning_rate: Peak, after the warmup.
        weight_decay: Weight decay of every group whose scale is 1.
        schedule: ``constant``, ``poly`` (exponent 0.9, as nnU-Net) or ``cosine``, to zero at the end.
            ``step`` halves it after each fifth of the steps.
        warmup: Share of all steps over which the rate rises linearly.
        max_grad_norm: Largest gradient norm of each of ``Method.clipped_modules``.
        final_weight_decay: Weight decay at the end, reached along a cosine. None keeps it constant.
        momentum: Momentum of ``sgd``.
        betas: Decay rates of Adam's two moments.
    """

    name: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup: float = 0.0
    max_grad_norm: float = 12.0
    final_weight_decay: float | None = None
    momentum: float = 0.99
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with their own learning rate and weight decay.

    Attributes:
        parameters: Trainable parameters.
        lr_scale: Multiple of the learning rate.
        weight_decay_scale: Multiple of the weight decay.
        frozen: Share of the steps, from the first on, with a learning rate of 0.
    """

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay_scale: float = 1.0
    frozen: float = 0.0


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay suits a parameter: not biases, norms and tokens."""
    return parameter.ndim > 1 and len(parameter) > 1


@dataclass(frozen=True)
class Readable:
    """Name a measure that people can interpret. ``key`` is its name in ``forward``'s result."""

    key: str
    title: str


@dataclass(frozen=True)
class ValidationCheck:
    """Result of ``Method.check_validation``.

    Attributes:
        measures: Measures that need all validation samples together. They go into the log.
        collapse: Sign of a feature collapse and its remedy; '' if there is none.
        patience: Validations in a row with such a sign after which a run stops; 0 never stops.
        solved: Advice where the task is solved and teaches little more; '' otherwise.
    """

    measures: dict[str, float] = field(default_factory=dict)
    collapse: str = ""
    patience: int = 5
    solved: str = ""


class Method(nn.Module, ABC):
    """A self-supervised objective around a segmentation network.

    The module under training (compiled, wrapped for several GPUs) is the method. The network is one of its submodules,
    and so are the heads of the objective.

    Class attributes:
        name: Name of its section in the plans and of its file.
        title: Name in reports.
        citation: The publication.
        Settings: Dataclass of its settings, derived from ``OptimizationSettings``.
        readable: The measure that people can interpret.
        learns_from: What its samples are made of, for reports: ``cases`` of the data set, or anything else.
        deep_supervision: Whether the objective uses the network's coarser outputs.
        min_batch_size: Smallest batch at which every term of the objective is informative.
        picture_samples: Validation samples that ``picture`` needs.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    citation: ClassVar[str]
    Settings: ClassVar[type]
    readable: ClassVar[Readable]
    learns_from: ClassVar[str] = "cases"
    deep_supervision: ClassVar[bool] = True
    min_batch_size: ClassVar[int] = 1
    picture_samples: ClassVar[int] = 1

    def __init__(self, backbone: Backbone, settings: Any, geometry: DataGeometry) -> None:
        super().__init__()
        self.network = backbone.network
        self.backbone = backbone
        self.settings = settings
        self.geometry = geometry

    def __str__(self) -> str:
        """Describe in one line what was chosen for these data."""
        return self.title

    @classmethod
    def output_channels(cls, settings: Any, geometry: DataGeometry) -> int | None:
        """Return the heads' width, None for the data set's."""
        return None

    @classmethod
    def check_backbone(cls, backbone: Backbone) -> None:
        """Check that the method can train a network.

        It is on the meta device.

        Raises:
            ValueError: If the network lacks what the method needs, in one line.
        """

    @classmethod
    def samples(cls, common: CommonSettings, index: CaseIndex) -> SampleSource:
        """Open the samples' source. Default: the data set's cases.

        Raises:
            UserError: If there is nothing to read.
        """
        return CaseSource(index)

    @classmethod
    def sampling(cls, settings: Any, geometry: DataGeometry) -> tuple[tuple[int, int, int], int]:
        """Return crop edges and batch size. Default: the plan's.

        It is asked where the plans set neither.

        Args:
            settings: Settings of the method.
            geometry: The data, with the plan's patch as ``crop_size`` and the plan's batch size.
        """
        return geometry.crop_size, geometry.batch_size

    @classmethod
    @abstractmethod
    def crops(cls, settings: Any, geometry: DataGeometry) -> SampleRequest:
        """Return the crops that make one sample."""

    def optimizer(self) -> OptimizerRecipe:
        """Return the optimizer recipe. Default: a peak of 1e-3 on a U-Net."""
        return self.settings.recipe(1e-3, self.backbone)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the parameters to optimize. Default: one group.

        On a vision transformer biases, norms and tokens are a group without weight decay.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not self.backbone.is_transformer:
            return [ParameterGroup(trained)]
        decayed = [parameter for parameter in trained if decays(parameter)]
        plain = [parameter for parameter in trained if not decays(parameter)]
        return [ParameterGroup(decayed), ParameterGroup(plain, weight_decay_scale=0.0)]

    def clipped_modules(self) -> list[nn.Module]:
        """Return modules clipped separately. Default: the whole method."""
        return [self]

    @abstractmethod
    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Make augmented views and the pretext target, without gradient.

        Every random draw comes from ``random``, and all tensors are on ``random.device``.
        """

    @abstractmethod
    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss`` and its terms, each (B,). In evaluation also the readable measure."""

    def before_step(self, progress: float) -> None:
        """Run before each optimizer step. ``progress`` is the finished share of the training, in [0, 1)."""

    def after_step(self, progress: float) -> None:
        """Run after each optimizer step. ``progress`` is the finished share of the training, in [0, 1]."""

    def after_start_from(self) -> None:
        """Start a further stage from a loaded run's state."""

    def check_validation(self, measures: dict[str, float]) -> ValidationCheck:
        """Evaluate all validation samples together.

        Results are equal in all processes.

        Args:
            measures: Means over the validation samples of what ``forward`` returned.
        """
        return ValidationCheck()

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        """Return rows of panels that show input, target and prediction. Default: none.

        It runs in evaluation, without gradient, in the first process alone.

        Args:
            views: Views of ``picture_samples`` samples, or of fewer.
        """
        return []

    @property
    def exported(self) -> nn.Module:
        """Return the network whose weights are written. It is the student, or its teacher."""
        return self.network
