"""Distill between views of a region and on masked patches.

Xu et al., "3DINO", npj Digital Medicine 2025, which is DINOv2 (Oquab et al., TMLR 2024, arXiv 2304.07193) in 3-D:
image-level self-distillation (DINO, arXiv 2104.14294), masked patch-level self-distillation (iBOT, arXiv 2111.07832)
and KoLeo (arXiv 1806.03198).

B batch, V views of a sample, C channel, D H W voxels, N patches of a global view, M masked patches, E width of a
projected vector, K prototypes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.losses.distillation import Targets, koleo, product_dtype, sinkhorn_bias, update_center
from nnssl_ext.losses.fused import attach_gradient, limit_koleo_gradient, prototype_cross_entropy
from nnssl_ext.losses.gather import gather_samples
from nnssl_ext.methods.base import (
    DataGeometry,
    Method,
    OptimizerRecipe,
    ParameterGroup,
    Readable,
    ValidationCheck,
    decays,
)
from nnssl_ext.methods.dino.health import ValidationBuffer, kept_patches, sign_of_collapse
from nnssl_ext.methods.dino.networks import DistilledNetwork, reader_of
from nnssl_ext.methods.dino.settings import (
    GLOBALS,
    MAX_SHARED_REGION,
    DINOSettings,
    patch_level,
    resolved,
    small_crops,
    view_kinds,
)
from nnssl_ext.methods.panels import Panel, axial, principal_colors
from nnssl_ext.networks.base import Backbone, Triple
from nnssl_ext.views.masking import expand_blocks
from nnssl_ext.views.multicrop import draw_patch_masks, draw_views, look_at
from nnssl_ext.views.random import BatchRandom, pack_to_device
from nnssl_ext.views.spatial import SpatialRange


class DINO(Method):
    """A student predicts an EMA teacher's output.

    It does so for other views of a region and for masked patches. Only the encoder is trained. The teacher is exported.
    """

    name = "dino"
    title = "3DINO"
    citation = "Xu et al., npj Digital Medicine 2025; Oquab et al., TMLR 2024, arXiv:2304.07193"
    Settings = DINOSettings
    readable = Readable("masked_patches", "Accuracy on masked patches, among the views of a validation")
    deep_supervision = False
    min_batch_size = 2  # KoLeo needs neighbors
    picture_samples = 4

    settings: DINOSettings
    image_center: Tensor
    patch_center: Tensor
    pairs: Tensor
    kept_patches: Tensor
    teacher_temperature: Tensor

    def __init__(self, backbone: Backbone, settings: DINOSettings, geometry: DataGeometry) -> None:
        settings = resolved(settings, geometry)
        super().__init__(backbone, settings, geometry)
        backbone.train_encoder_only()
        self.warming_up = False
        self.averaged: tuple[list[Tensor], list[Tensor]] | None = None
        self.kinds, self.looks = view_kinds(settings, geometry), settings.intensity.of_views()
        self.student = DistilledNetwork(
            reader_of(backbone, patch_level(settings, geometry)),
            hidden_dim=settings.hidden_dim,
            bottleneck_dim=settings.bottleneck_dim,
            prototypes=settings.prototypes,
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.grid = self.student.reader.grid(geometry.crop_size)
        self.register_buffer("image_center", torch.zeros(settings.prototypes))
        self.register_buffer("patch_center", torch.zeros(settings.prototypes))
        # rows are student views, columns teacher views: every pair but a view with itself
        pairs = torch.ones(GLOBALS + (settings.local_crops or 0), GLOBALS)
        pairs[:GLOBALS].fill_diagonal_(0)
        self.register_buffer("pairs", pairs / pairs.sum(), persistent=False)
        self.register_buffer("kept_patches", kept_patches(math.prod(self.grid)), persistent=False)
        # tensors, so that a compiled method is not compiled again when they change
        last = (settings.teacher_temperature or [1.0])[-1]  # never null once resolved
        self.register_buffer("teacher_temperature", torch.tensor(last), persistent=False)
        self.validation = ValidationBuffer()

    @classmethod
    def sampling(cls, settings: DINOSettings, geometry: DataGeometry) -> tuple[Triple, int]:
        return small_crops(settings, geometry)

    @classmethod
    def crops(cls, settings: DINOSettings, geometry: DataGeometry) -> CropRequest:
        kinds = view_kinds(resolved(settings, geometry), geometry)  # raises before anything is written
        still, each = SpatialRange(geometry.spacing), settings.region > MAX_SHARED_REGION
        views = tuple(kinds) if each else ()
        return CropRequest((Crop(geometry.crop_size, still, scale=settings.region, fit=True, views=views),))

    def optimizer(self) -> OptimizerRecipe:
        settings = self.settings
        return OptimizerRecipe(
            settings.optimizer,
            0.002 * math.sqrt((self.geometry.batch_size or 1) / 1024),  # the published rule
            settings.weight_decay,
            settings.schedule,
            settings.warmup,
            max_grad_norm=settings.max_grad_norm,
            final_weight_decay=settings.final_weight_decay,
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        """Group parameters by layer and weight decay.

        Learning rates fall towards the input. Biases, norms and tokens have no weight decay. Prototypes are frozen at
        first by a learning rate of 0: with zero gradients Adam's first steps after it would be too large.
        """
        layers, decay = self.backbone.layers(), self.settings.layer_decay
        scales = {id(p): decay ** (len(layers) - level) for level, layer in enumerate(layers) for p in layer}
        for parameter in self.backbone.stem.parameters():
            scales[id(parameter)] *= self.settings.stem_lr_scale
        prototypes = {id(self.student.head(level).prototype_weight) for level in ("image", "patch")}
        groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
        for parameter in self.student.parameters():
            if parameter.requires_grad:
                decay_scale = float(decays(parameter))
                frozen = self.settings.freeze_prototypes if id(parameter) in prototypes else 0.0
                groups.setdefault((scales.get(id(parameter), 1.0), decay_scale, frozen), []).append(parameter)
        return [ParameterGroup(parameters, *options) for options, parameters in groups.items()]

    def clipped_modules(self) -> list[nn.Module]:
        """Clip the network and each head separately, as DINOv2.

        At the start of a vision transformer KoLeo's gradient is hundreds of times that of the heads.
        """
        return [self.student.reader, self.student.image_head, self.student.patch_head]

    def train(self, mode: bool = True) -> DINO:
        """Set the student's mode. The teacher stays in evaluation."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def exported(self) -> nn.Module:
        return self.teacher.reader.network

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Crop views of a region and mask the global ones.

        Returns:
            ``global`` (B, 2, C, D, H, W) and ``local`` (B, V, C, D, H, W); ``masked`` (B, 2, N) bool; for each of the M
            masked patches its position ``masked_index`` (M,) among B x 2 x N, its ``weight`` (M,) and its ``sample``
            (M,). For networks without a mask token also ``masked_image``, the global views with masked patches.
        """
        settings, device = self.settings, random.device
        sent: dict[int, Tensor] = {}
        views = {"global": torch.cat([self._view(batch, random, n, sent) for n in range(GLOBALS)], 1)}
        if settings.local_crops:
            views["local"] = self._view(batch, random, GLOBALS, sent)
        number = math.prod(self.grid)
        masked = draw_patch_masks(random, GLOBALS, number, settings.mask_probability, settings.mask_ratio)
        index = masked.flatten().nonzero()[:, 0]
        weight = 1 / masked.sum(-1).clamp_min(1) / GLOBALS  # (B, 2)
        views |= {"masked": masked, "masked_index": index, "weight": weight.flatten()[index // number]}
        views["sample"] = index // (GLOBALS * number)
        drawn = {name: value for name, value in views.items() if name not in ("global", "local")}
        views |= dict(zip(drawn, pack_to_device(list(drawn.values()), device), strict=True))
        if self.student.reader.masks_voxels:
            views["masked_image"] = self._mask(views["global"], views["masked"], random)
        return views

    def _view(self, batch: CropBatch, random: BatchRandom, place: int, sent: dict[int, Tensor]) -> Tensor:
        """Make views of one kind: (B, V, C, D, H, W). ``sent`` keeps regions that kinds share on the device."""
        kind, (intensity, exclusive) = self.kinds[place], self.looks[place]
        if len(batch.boxes) == 1:
            boxes = draw_views(batch.boxes[0], self.geometry.crop_size, kind, random)
        else:
            first = sum(earlier.number for earlier in self.kinds[:place])
            rows = batch.boxes[first : first + kind.number]
            boxes = [box for sample in zip(*rows, strict=True) for box in sample]
        for box in boxes:
            if id(box.data) not in sent:
                sent[id(box.data)] = box.data.to(random.device, non_blocking=random.device.type == "cuda")
        boxes = [replace(box, data=sent[id(box.data)]) for box in boxes]
        return look_at(boxes, kind, intensity, random, exclusive)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute ``loss``, ``image``, ``patch`` and ``koleo``, each (B,)."""
        settings = self.settings
        clean, masked, index = views["global"], views["masked"].flatten(0, 1), views["masked_index"]
        number = len(clean)
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            teacher_features, teacher_patches = teacher.reader(clean.flatten(0, 1))
            teacher_output = teacher.image_head(teacher_features).unflatten(0, (number, GLOBALS))
            target_patches = teacher.patch_head(teacher_patches.flatten(0, 1).index_select(0, index))
        features, patches = student.reader(views.get("masked_image", clean).flatten(0, 1), masked)
        student_output = student.image_head(features).unflatten(0, (number, GLOBALS))
        if "local" in views:
            local, _ = student.reader(views["local"].flatten(0, 1))
            student_output = torch.cat([student_output, student.image_head(local).unflatten(0, (number, -1))], 1)
        predicted_patches = student.patch_head(patches.flatten(0, 1).index_select(0, index))

        image_total, image = self._distill("image", student_output, teacher_output, self.pairs)
        one = self.pairs.new_ones(1, 1)
        patch_total, rows = self._distill(
            "patch", predicted_patches[:, None], target_patches[:, None], one, views["weight"]
        )
        patch = image.new_zeros(number).index_add(0, views["sample"], rows)
        koleo = torch.zeros_like(image)
        if settings.koleo_weight:
            koleo = self._koleo(features.float().unflatten(0, (number, GLOBALS)))
        if not self.training:
            kept = self.kept_patches
            prediction, target = student.patch_head(patches[:, kept]), teacher.patch_head(teacher_patches[:, kept])
            self.validation.add(
                self.geometry.batch_size,
                teacher_features.float(),
                teacher_output,
                prediction,
                target,
                masked[:, kept],
            )
        loss = attach_gradient(image, image_total) + settings.patch_weight * attach_gradient(patch, patch_total)
        return {"loss": loss + (settings.koleo_weight or 0.0) * koleo, "image": image, "patch": patch, "koleo": koleo}

    def picture(self, views: dict[str, Tensor]) -> list[list[Panel]]:
        # not every sample is masked
        sample = int(views["masked"].flatten(1).sum(1).argmax())
        clean, masked = views["global"][sample], views["masked"][sample]
        image = views["masked_image"][sample] if "masked_image" in views else clean
        tokens = self.teacher.reader(clean)[1], self.student.reader(image, masked)[1]
        colors = [self._volumes(own.unflatten(-1, self.grid)) for own in principal_colors(*tokens)]  # (3, 2, D, H, W)
        masked_voxels = self._volumes(masked.unflatten(-1, self.grid).float()) > 0
        student, numbers = clean[:, 0].masked_fill(masked_voxels, torch.nan), masked.sum(1).tolist()
        rows = [
            [
                Panel(f"view {n + 1} (teacher's input)", clean[n, 0]),
                Panel(f"{numbers[n]} masked patches (student's input)", student[n]),
                Panel("teacher's tokens (target)", colors[0][:, n], "colors"),
                Panel("student's tokens", colors[1][:, n], "colors"),
            ]
            for n in range(GLOBALS)
        ]
        if "local" in views:
            rows.append([Panel(f"local view {n + 1}", view) for n, view in enumerate(axial(views["local"][sample]))])
        return rows

    def _volumes(self, values: Tensor) -> Tensor:
        """Repeat values of patches for their voxels: (..., d, h, w) -> (..., D, H, W)."""
        return expand_blocks(values, self.geometry.crop_size, self.student.reader.patch)

    def before_step(self, progress: float) -> None:
        settings = self.settings
        self.warming_up = progress < settings.warmup
        first, last = settings.teacher_temperature or (0.0, 0.0)  # never null once resolved
        share = min(1.0, progress / settings.temperature_warmup) if settings.temperature_warmup else 1.0
        self.teacher_temperature.fill_(first + (last - first) * share)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the teacher towards the student, running statistics included."""
        start = self.settings.teacher_momentum or 0.0
        momentum = 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
        self.averaged = self.averaged or self._averaged()  # large networks take milliseconds to list
        torch._foreach_lerp_(*self.averaged, 1 - momentum)

    @torch.no_grad()
    def after_start_from(self) -> None:
        """Start the student from the teacher. The published high-resolution stage does so."""
        teacher, student = self._averaged()
        torch._foreach_copy_(student, teacher)

    def check_validation(self, measures: dict[str, float]) -> ValidationCheck:
        found = self.validation.measures(self._targets)
        # a vision transformer starts with features that are all alike (LayerScale), until the learning rate has risen
        sign = "" if self.warming_up else sign_of_collapse({**measures, **found}, self.settings)
        return ValidationCheck(found, sign, self.settings.patience)

    @torch.compiler.disable  # the number of masked patches changes from step to step
    def _distill(
        self, level: str, student: Tensor, teacher: Tensor, pairs: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute one level's cross-entropy, and move its center.

        Args:
            level: ``image`` or ``patch``.
            student: (N, S, E) student output.
            teacher: (N, T, E) teacher output.
            pairs: (S, T) weight of each pair.
            weight: (N,) weight of each row in the total.

        Returns:
            The total () with gradient, and the rows (N,) without.
        """
        targets = self._targets(level, teacher)
        prototypes, temperature = self.student.head(level).prototype_weight, self.settings.student_temperature
        result = prototype_cross_entropy(student, prototypes, targets, pairs, temperature, weight=weight)
        if self.training and self.settings.centering == "softmax":
            with torch.no_grad():
                center, momentum = self._center(level), self.settings.center_momentum
                center.copy_(update_center(center, teacher.flatten(0, 1), targets.prototypes, momentum))
        return result

    def _targets(self, level: str, teacher: Tensor) -> Targets:
        prototypes, temperature = self.teacher.head(level).prototypes, self.teacher_temperature
        if self.settings.centering == "sinkhorn":
            bias = sinkhorn_bias(teacher.flatten(0, 1), prototypes, temperature)
        else:
            bias = -self._center(level) / temperature
        return Targets(teacher, prototypes, bias, temperature)

    @torch.compiler.disable  # it registers gradient hooks
    def _koleo(self, features: Tensor) -> Tensor:
        """Compute KoLeo over samples: (B, 2, F) -> (B,)."""
        dtype = product_dtype(features, torch.float32)
        everyone, own = gather_samples(features, self.geometry.batch_size)
        rows = torch.stack([koleo(features[:, v], everyone[:, v], own) for v in range(GLOBALS)]).sum(0)
        if features.requires_grad and dtype == torch.float16:
            limit_koleo_gradient(features, rows)
        return rows

    def _mask(self, image: Tensor, masked: Tensor, random: BatchRandom) -> Tensor:
        """Replace masked patches of (B, 2, C, D, H, W) by noise of the view's mean and deviation, or by its mean."""
        grid = masked.unflatten(-1, self.grid)
        mask = expand_blocks(grid, image.shape[3:], self.student.reader.patch)[:, :, None]
        fill = image.mean((3, 4, 5), keepdim=True).expand_as(image)
        if self.settings.mask_fill == "noise":
            noise = torch.stack([random.normal(b, image.shape[1:]) for b in range(len(image))])
            fill = fill + noise * image.std((3, 4, 5), keepdim=True)
        return torch.where(mask, fill, image)

    def _center(self, level: str) -> Tensor:
        return self.image_center if level == "image" else self.patch_center

    def _averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """List the teacher's and the student's averaged tensors."""
        parameters = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        pairs: list[tuple[Tensor, Tensor]] = [(theirs, own) for theirs, own in parameters if own.requires_grad]
        buffers = zip(self.teacher.buffers(), self.student.buffers(), strict=True)
        pairs += [(theirs, own) for theirs, own in buffers if theirs.is_floating_point()]
        return [theirs for theirs, _ in pairs], [own for _, own in pairs]
