"""Define 3DINO's settings and the sizes they imply."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from nnssl_ext.errors import UserError
from nnssl_ext.methods.base import DataGeometry
from nnssl_ext.methods.common import TrainingSettings
from nnssl_ext.networks.base import Triple, triple
from nnssl_ext.settings import setting
from nnssl_ext.views.appearance import CustomIntensitySettings, Exclusive, IntensitySettings, default
from nnssl_ext.views.multicrop import ViewKind
from nnssl_ext.views.spatial import SpatialRange

XU, DINOV2 = "3DINO", "DINOv2"
#: Above this multiple of the crop, each view reads its own box instead of one box for the region.
MAX_SHARED_REGION = 2.0
#: Global views of a sample, and local ones where they are half as large.
GLOBALS, LOCALS = 2, 8
#: Published temperatures and momentum suit this many samples per step.
LARGE_BATCH = 256
#: Patches are the voxels of a map with at most this stride, and a crop has at least so many of them.
MAX_STRIDE, MIN_PATCHES = 16, 32
#: KoLeo needs this many samples per step. With 16, its gradient is still four times that of the image term.
KOLEO_BATCH = 64
#: Samples per step where the plan has fewer. Crops shrink instead, so that the voxels per step stay about the plan's.
MIN_BATCH, MAX_BATCH = 16, 64
#: Voxels per step may exceed the plan's by this factor to reach ``MIN_BATCH``.
MAX_EXCESS = 1.5


@dataclass(frozen=True)
class DINOIntensitySettings(CustomIntensitySettings):
    """Strong intensity views for 3DINO. A histogram must not reveal which views share a region."""

    gamma_probability: float = default("gamma_probability", 0.8, source=XU)
    noise_probability: float = default("noise_probability", 0.8, source=XU)
    noise: list[float] = default("noise", [0.0, 0.1])
    histogram_probability: float = default("histogram_probability", 0.8, source=XU)
    blur_probability: float = default("blur_probability", 0.5, source=XU)
    sharpen_probability: float = default("sharpen_probability", 0.5, source=XU)
    gibbs_probability: float = default("gibbs_probability", 0.2, source=XU)
    exclusive_probability: float | None = setting(
        0.8,
        "Chance that a view gets one of gamma curve, noise and histogram shift, whose own chances are weights; null "
        "draws each by its own chance.",
        source=XU,
        low=0,
        high=1,
    )
    filters_by_view: bool = setting(
        True,
        "Whether the first global view is blurred or sharpened, the second gets Gibbs ringing, and local ones are "
        "blurred; false gives all views all filters.",
        source=XU,
    )

    def of_views(self) -> list[tuple[IntensitySettings, list[Exclusive]]]:
        """Return settings and exclusive groups of the first and second global view and of local views."""
        groups = []
        if self.exclusive_probability is not None:
            groups.append(Exclusive(("gamma", "noise", "histogram"), self.exclusive_probability))
        if not self.filters_by_view:
            return [(self, groups)] * 3
        return [
            (replace(self, gibbs_probability=0.0), [*groups, Exclusive(("blur", "sharpen"), 1.0)]),
            (replace(self, blur_probability=0.0, sharpen_probability=0.0), groups),
            (replace(self, sharpen_probability=0.0, gibbs_probability=0.0), groups),
        ]


@dataclass(frozen=True)
class DINOSettings(TrainingSettings):
    """Settings of 3DINO."""

    region: float = setting(
        1.25,
        "Edge of the region that views are cropped from, as a multiple of the crop's, at most the case.",
        source="the case in 3DINO",
        low=0.1,
        high=100,
    )
    global_area: list[float] = setting(
        [0.48, 1.0], "Range of a global view's share of the region's plane.", source=XU, low=0.01, high=1, length=2
    )
    global_depth: list[float] = setting(
        [0.5, 1.0], "Range of the share of its depth.", source=XU, low=0.01, high=1, length=2
    )
    local_crops: int | None = setting(
        None,
        "Local views of a sample; null is 8, or as many as have the voxels of the global ones together.",
        source="8 in 3DINO",
        low=0,
    )
    local_size: list[int] | None = setting(
        None,
        "Edges of a local view in voxels; null is half of the crop's, rounded up to what the network takes.",
        source="half in 3DINO",
        low=1,
        length=3,
    )
    local_area: list[float] = setting(
        [0.16, 0.48], "Range of a local view's share of the region's plane.", source=XU, low=0.01, high=1, length=2
    )
    local_depth: list[float] = setting(
        [0.2, 0.5], "Range of the share of its depth.", source=XU, low=0.01, high=1, length=2
    )
    flip: float = setting(0.3, "Chance of a flip, per axis and view.", source=XU, low=0, high=1)
    rot90: float = setting(
        0.3, "Chance of quarter turns in a plane of equal edges and spacing.", source=XU, low=0, high=1
    )
    intensity: DINOIntensitySettings = field(default_factory=DINOIntensitySettings)
    token_stride: int | None = setting(
        None,
        "Patches are the voxels of the deepest feature map with at most this stride, or a transformer's tokens; null "
        "is 16, or less where a crop would have fewer than 32 patches.",
        source="tokens of 16 in 3DINO",
        low=1,
    )
    mask_probability: float = setting(0.5, "Chance that a global view has masked patches.", source=XU, low=0, high=1)
    mask_ratio: list[float] = setting(
        [0.2, 0.75], "Range of the share of patches that is then masked.", source=XU, low=0, high=1, length=2
    )
    mask_fill: str = setting(
        "noise",
        "Content of masked patches for networks without a mask token: noise like the view, or its mean.",
        choices=("noise", "mean"),
    )
    hidden_dim: int = setting(1024, "Width of the heads' layers.", source="2048 in 3DINO", low=1)
    bottleneck_dim: int = setting(256, "Width of a projected vector.", source=XU, low=2)
    prototypes: int = setting(4096, "Prototypes of each head.", source="65,536 in 3DINO", low=2)
    student_temperature: float = setting(0.1, "Temperature of the student.", source=XU, low=0.001)
    teacher_temperature: list[float] | None = setting(
        None,
        "Temperature of the teacher at the start and after its warmup; null is 0.04 and 0.07 from 256 samples per step "
        "on, 0.02 and 0.03 below.",
        source="0.04 and 0.07 in 3DINO",
        low=0.001,
        length=2,
    )
    temperature_warmup: float = setting(
        0.3, "Share of the steps over which the teacher's temperature rises.", source=DINOV2, low=0, high=1
    )
    centering: str = setting(
        "auto",
        "Method that keeps all prototypes in use; auto is sinkhorn.",
        source=XU,
        choices=("auto", "softmax", "sinkhorn"),
    )
    center_momentum: float = setting(0.9, "Momentum of the mean that softmax centering subtracts.", low=0, high=1)
    teacher_momentum: float | None = setting(
        None,
        "EMA momentum of the teacher at the start, 1 at the end; null is 0.992 from 256 samples per step on, 0.996 "
        "below.",
        source="0.992 in 3DINO",
        low=0,
        high=1,
    )
    patch_weight: float = setting(1.0, "Weight of the masked-patch term.", source=XU, low=0)
    koleo_weight: float | None = setting(
        None, "Weight of KoLeo; null is 0.1 from 64 samples per step on, 0 below.", source="0.1 in 3DINO", low=0
    )
    freeze_prototypes: float = setting(
        0.01, "Share of the steps before the student's prototypes move.", source=DINOV2, low=0, high=1
    )
    weight_decay: float = setting(0.04, "Weight decay at the start.", source=XU, low=0)
    final_weight_decay: float | None = setting(
        None, "Weight decay at the end; null keeps it constant.", source="0.4 in 3DINO", low=0
    )
    warmup: float = setting(0.1, "Share of the steps over which the learning rate rises.", source=XU, low=0, high=0.9)
    max_grad_norm: float = setting(3.0, "Largest gradient norm of the network, and of each head.", source=XU, low=0.001)
    layer_decay: float = setting(
        1.0, "Learning rate of a layer as a multiple of the next layer's.", source="0.9 in 3DINO", low=0.01, high=1
    )
    stem_lr_scale: float = setting(
        1.0,
        "Multiple of the first convolution's learning rate.",
        source="0.2 in 3DINO",
        low=0,
        high=1,
    )
    patience: int = setting(
        10, "Validations in a row with a sign of collapse after which a run stops; 0 never stops.", low=0
    )

    def heaviest(self) -> DINOSettings:
        return replace(self, mask_probability=1.0, mask_ratio=[max(self.mask_ratio)] * 2)


def local_size(settings: DINOSettings, geometry: DataGeometry) -> Triple:
    """Compute the edges of a local view in voxels. A ``UserError`` if set ones do not fit the network."""
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
            f"dino.local_size: expected multiples of {list(total)}, at least {least}, got {settings.local_size}. "
            f"Use {legal}."
        )
    return triple(settings.local_size)


def view_kinds(settings: DINOSettings, geometry: DataGeometry) -> list[ViewKind]:
    """Return global and local views, if there are any."""
    turns = SpatialRange(geometry.spacing, settings.flip, settings.rot90)
    kinds = [
        (GLOBALS // 2, geometry.crop_size, settings.global_area, settings.global_depth),
        (GLOBALS // 2, geometry.crop_size, settings.global_area, settings.global_depth),
        (settings.local_crops or 0, local_size(settings, geometry), settings.local_area, settings.local_depth),
    ]
    return [ViewKind(n, size, (a[0], a[1]), (d[0], d[1]), turns, geometry.masked) for n, size, a, d in kinds if n]


def resolved(settings: DINOSettings, geometry: DataGeometry) -> DINOSettings:
    """Replace null settings by values for crop and batch."""
    large = geometry.batch_size >= LARGE_BATCH
    room = GLOBALS * math.prod(geometry.crop_size) // math.prod(local_size(settings, geometry))
    automatic: dict[str, Any] = {
        "teacher_temperature": [0.04, 0.07] if large else [0.02, 0.03],
        "teacher_momentum": 0.992 if large else 0.996,
        "koleo_weight": 0.1 if geometry.batch_size >= KOLEO_BATCH else 0.0,
        "local_crops": max(1, min(LOCALS, room)),
    }
    chosen = {name: value for name, value in automatic.items() if getattr(settings, name) is None}
    if settings.centering == "auto":
        chosen["centering"] = "sinkhorn"
    return replace(settings, **chosen)


def patch_level(settings: DINOSettings, geometry: DataGeometry) -> int:
    """Choose the encoder stage whose voxels are patches."""
    limit = settings.token_stride or MAX_STRIDE
    levels = [level for level, stride in enumerate(geometry.strides) if max(stride) <= limit] or [0]
    if settings.token_stride:
        return levels[-1]
    enough = [
        level
        for level in levels
        if math.prod(edge // step for edge, step in zip(geometry.crop_size, geometry.strides[level], strict=True))
        >= MIN_PATCHES
    ]
    return (enough or levels[:1])[-1]


def view_voxels(settings: DINOSettings, geometry: DataGeometry) -> int:
    """Count the voxels of all views of a sample."""
    number = resolved(settings, geometry).local_crops or 0
    return GLOBALS * math.prod(geometry.crop_size) + number * math.prod(local_size(settings, geometry))


def small_crops(settings: DINOSettings, geometry: DataGeometry) -> tuple[Triple, int]:
    """Trade crop size for samples: crop edges and batch size.

    A step keeps about the voxels of the plan's patch and batch, which ``geometry`` holds. The aim is 16 samples; a plan
    with as many is kept. Each crop keeps two voxels at the bottleneck along strided axes. A transformer keeps four
    tokens per axis.
    """
    patch, batch = geometry.crop_size, geometry.batch_size
    if batch >= MIN_BATCH:
        return triple(patch), batch
    total, transformer = geometry.strides[-1], len(geometry.strides) == 1
    shrink = (batch / MIN_BATCH) ** (1 / 3)
    edges = []
    for edge, step in zip(patch, total, strict=True):
        lowest = step * (4 if transformer else 2 if step > 1 else 1)
        edges.append(min(edge, max(lowest, round(edge * shrink / step) * step)))
    crop = triple(edges)
    voxels, budget = view_voxels(settings, replace(geometry, crop_size=crop)), view_voxels(settings, geometry) * batch
    samples = max(batch, budget // voxels)
    if samples < MIN_BATCH and MIN_BATCH * voxels <= MAX_EXCESS * budget:
        samples = MIN_BATCH
    return crop, min(samples, MAX_BATCH)
