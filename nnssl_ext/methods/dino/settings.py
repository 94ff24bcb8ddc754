"""Settings of 3DINO, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nnssl_ext.errors import UserError
from nnssl_ext.methods.base import DataGeometry
from nnssl_ext.methods.common import TrainingSettings
from nnssl_ext.networks.base import Triple, triple
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import IntensitySettings

XU, DINOV2 = "3DINO", "DINOv2"


@dataclass(frozen=True)
class DINOIntensitySettings(IntensitySettings):
    """Strong intensity views, so that views of a region are not told by their histograms."""

    gamma_probability: float = setting(0.8, "Chance of a gamma curve, per channel.", source=XU, low=0, high=1)
    noise_probability: float = setting(0.8, "Chance of Gaussian noise, per sample.", source=XU, low=0, high=1)
    noise: list[float] = setting(
        [0.0, 0.1], "Range of the noise's standard deviation, in normalised intensities.", low=0, length=2
    )
    histogram_probability: float = setting(0.8, "Chance of a histogram shift, per channel.", source=XU, low=0, high=1)
    blur_probability: float = setting(0.5, "Chance of a Gaussian blur, per channel.", source=XU, low=0, high=1)
    sharpen_probability: float = setting(0.2, "Chance of unsharp masking, per channel.", source=XU, low=0, high=1)
    gibbs_probability: float = setting(0.2, "Chance of Gibbs ringing, per channel.", source=XU, low=0, high=1)


@dataclass(frozen=True)
class DINOSettings(TrainingSettings):
    """Settings of 3DINO."""

    region: float = setting(
        1.25,
        "Edge of the region that views are cut from, as a multiple of the crop's; never more than the case.",
        source="the case in 3DINO",
        low=0.1,
        high=100,
    )
    global_area: list[float] = setting(
        [0.48, 1.0], "Share of the region's plane that a global view shows.", source=XU, low=0.01, high=1, length=2
    )
    global_depth: list[float] = setting([0.5, 1.0], "The same of its depth.", source=XU, low=0.01, high=1, length=2)
    local_crops: int = setting(8, "Local views of a sample.", source=XU, low=0)
    local_size: list[int] | None = setting(
        None,
        "Edges of a local view; null is half of the crop's, the next that the network takes.",
        source="half in 3DINO",
        low=1,
        length=3,
    )
    local_area: list[float] = setting(
        [0.16, 0.48], "Share of the region's plane that a local view shows.", source=XU, low=0.01, high=1, length=2
    )
    local_depth: list[float] = setting([0.2, 0.5], "The same of its depth.", source=XU, low=0.01, high=1, length=2)
    flip: float = setting(0.3, "Chance of a mirror, per axis and view.", source=XU, low=0, high=1)
    rot90: float = setting(
        0.3, "Chance of quarter turns in a plane of equal edges and spacing.", source=XU, low=0, high=1
    )
    intensity: DINOIntensitySettings = field(default_factory=DINOIntensitySettings)
    cell_stride: int = setting(
        16,
        "Of feature maps, cells are voxels of the deepest one with at most this stride; of transformers, tokens.",
        source="tokens of 16 in 3DINO",
        low=1,
    )
    mask_probability: float = setting(0.5, "Chance that a global view hides cells.", source=XU, low=0, high=1)
    mask_ratio: list[float] = setting(
        [0.2, 0.75], "Range of the share of cells that is then hidden.", source=XU, low=0, high=1, length=2
    )
    mask_fill: str = setting(
        "noise",
        "What networks without a mask token see in hidden cells: noise like the view, or its mean.",
        choices=("noise", "mean"),
    )
    hidden: int = setting(1024, "Width of the heads' layers.", source="2048 in 3DINO", low=1)
    bottleneck: int = setting(256, "Width of a projected vector.", source=XU, low=2)
    prototypes: int = setting(4096, "Prototypes of each head.", source="65,536 in 3DINO", low=2)
    student_temperature: float = setting(0.1, "Of the student's distribution.", source=XU, low=0.001)
    teacher_temperature: list[float] = setting(
        [0.04, 0.07], "Of the teacher's, at first and after the warm-up.", source=XU, low=0.001, length=2
    )
    temperature_warm_up: float = setting(
        0.3, "Share of the steps over which the teacher's temperature rises.", source=DINOV2, low=0, high=1
    )
    centring: str = setting(
        "auto",
        "What keeps all prototypes in use; auto is softmax below 256 samples a step, sinkhorn from there on.",
        source="sinkhorn in 3DINO",
        choices=("auto", "softmax", "sinkhorn"),
    )
    centre_momentum: float = setting(0.9, "Of the moving mean that softmax centring subtracts.", low=0, high=1)
    momentum: float = setting(0.992, "Of the teacher at first; 1 at the end.", source=XU, low=0, high=1)
    cell_weight: float = setting(1.0, "Weight of the hidden cells' term.", source=XU, low=0)
    koleo_weight: float = setting(0.1, "Weight of KoLeo.", source=XU, low=0)
    freeze_prototypes: float = setting(
        0.01, "Share of the steps before the student's prototypes move.", source=DINOV2, low=0, high=1
    )
    weight_decay: float = setting(0.04, "Weight decay at first.", source=XU, low=0)
    final_weight_decay: float | None = setting(
        None, "Weight decay at the end; null leaves it.", source="0.4 in 3DINO", low=0
    )
    warmup: float = setting(0.1, "Share of the steps with a rising learning rate.", source=XU, low=0, high=0.9)
    clip: float = setting(3.0, "Largest norm of the gradient of the network, and of each head.", source=XU, low=0.001)
    layer_decay: float = setting(
        1.0, "Learning rate of a layer as a multiple of the next one's.", source="0.9 in 3DINO", low=0.01, high=1
    )
    stem_rate: float = setting(
        1.0, "Multiple of the first convolution's learning rate.", source="0.2 in 3DINO", low=0, high=1
    )
    patience: int = setting(
        10, "Epochs in a row with a sign of collapse after which the run stops; 0 never stops.", low=0
    )

    def heaviest(self) -> DINOSettings:
        return replace(self, mask_probability=1.0, mask_ratio=[max(self.mask_ratio)] * 2)


def local_size(settings: DINOSettings, geometry: DataGeometry) -> Triple:
    """Edges of a local view in voxels.

    Raises:
        UserError: If those that are set do not fit the network.
    """
    total = geometry.strides[-1]
    # residual encoders need two voxels at the bottleneck along a strided axis
    least = [2 * step if step > 1 else 1 for step in total]
    size = geometry.crop_size
    legal = [
        min(edge, max(lowest, -(-edge // (2 * step)) * step))
        for edge, step, lowest in zip(size, total, least, strict=True)
    ]
    if settings.local_size is None:
        return triple(legal)
    wrong = [
        edge
        for edge, step, lowest in zip(settings.local_size, total, least, strict=True)
        if edge % step or edge < lowest
    ]
    if wrong:
        raise UserError(
            f"dino.local_size {settings.local_size} does not fit the network: edges must be multiples of "
            f"{list(total)}, at least {least}; use {legal}"
        )
    return triple(settings.local_size)
