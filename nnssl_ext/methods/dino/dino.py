"""3DINO: a student tells what a slowly following teacher says of other views of a region, and of cells it cannot see.

Xu et al., "3DINO", npj Digital Medicine 2025, which is DINOv2 (Oquab et al., TMLR 2024, arXiv 2304.07193) in 3-D:
image-level self-distillation (DINO, arXiv 2104.14294), masked patch-level self-distillation (iBOT, arXiv 2111.07832)
and KoLeo (arXiv 1806.03198). Encoder only; what is written is the teacher.

B batch (G over all processes), V views of a sample, C channel, D H W voxels, N cells of a global view, M hidden cells,
E width of a projected vector, K prototypes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.data.crops import Crop, CropBatch, CropRequest
from nnssl_ext.losses.distillation import Targets, koleo, sinkhorn_bias, update_center
from nnssl_ext.losses.fused import attach_gradient, limit_koleo_gradient, prototype_cross_entropy
from nnssl_ext.losses.gather import gather_samples
from nnssl_ext.methods.base import DataGeometry, Method, OptimizerRecipe, ParameterGroup, Readable, ValidationCheck
from nnssl_ext.methods.dino.health import Seen, seen_cells, sign_of_collapse
from nnssl_ext.methods.dino.networks import DistilledNetwork, reader_of
from nnssl_ext.methods.dino.settings import DINOSettings, local_size
from nnssl_ext.networks.base import Backbone
from nnssl_ext.views.masking import expand_blocks
from nnssl_ext.views.multicrop import ViewKind, crop_views, draw_patch_masks
from nnssl_ext.views.random import BatchRandom, to_device
from nnssl_ext.views.spatial import SpatialRange

GLOBALS = 2
#: From this many samples a step on, Sinkhorn has enough of them to balance prototypes.
SINKHORN_BATCH = 256
#: The total, through which gradients flow, and what each sample gives to it.
Distilled = tuple[Tensor, Tensor]


class DINO(Method):
    """See the module's docstring."""

    name = "dino"
    title = "3DINO"
    citation = "Xu et al., npj Digital Medicine 2025; Oquab et al., TMLR 2024, arXiv:2304.07193"
    Settings = DINOSettings
    readable = Readable("hidden_cells", "Hidden cells told from the same place in other views")
    deep_supervision = False
    min_batch_size = 2  # KoLeo spreads neighbours

    settings: DINOSettings
    image_centre: Tensor
    cell_centre: Tensor
    pairs: Tensor
    teacher_temperature: Tensor
    prototypes_move: Tensor

    def __init__(self, backbone: Backbone, settings: DINOSettings, geometry: DataGeometry) -> None:
        super().__init__(backbone, settings, geometry)
        backbone.train_encoder_only()
        self.warming_up = False
        self.local_size = local_size(settings, geometry)
        self.student = DistilledNetwork(
            reader_of(backbone, settings.cell_stride),
            hidden=settings.hidden,
            bottleneck=settings.bottleneck,
            prototypes=settings.prototypes,
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.cells = self.student.reader.cells(geometry.crop_size)
        self.register_buffer("image_centre", torch.zeros(settings.prototypes))
        self.register_buffer("cell_centre", torch.zeros(settings.prototypes))
        # the student's views in rows, the teacher's in columns: every pair but a view with itself
        pairs = torch.ones(GLOBALS + settings.local_crops, GLOBALS)
        pairs[:GLOBALS].fill_diagonal_(0)
        self.register_buffer("pairs", pairs / pairs.sum(), persistent=False)
        # what changes from step to step is a tensor: a compiled method must not notice
        self.register_buffer("teacher_temperature", torch.tensor(settings.teacher_temperature[1]), persistent=False)
        self.register_buffer("prototypes_move", torch.ones(()), persistent=False)
        batch = geometry.batch_size
        automatic = "sinkhorn" if batch >= SINKHORN_BATCH else "softmax"
        self.centring = automatic if settings.centring == "auto" else settings.centring
        self.seen = Seen()

    @classmethod
    def crops(cls, settings: DINOSettings, geometry: DataGeometry) -> CropRequest:
        local_size(settings, geometry)  # an illegal one is found before anything is written
        still = SpatialRange(geometry.spacing)
        return CropRequest((Crop(geometry.crop_size, still, scale=settings.region, fit=True),))

    def optimizer(self) -> OptimizerRecipe:
        settings = self.settings
        return OptimizerRecipe(
            settings.optimizer,
            5e-4,
            settings.weight_decay,
            settings.schedule,
            settings.warmup,
            max_grad_norm=settings.clip,
            final_weight_decay=settings.final_weight_decay,
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        """Slower towards the input; no weight decay of biases, norms and tokens."""
        layers, decay = self.backbone.layers(), self.settings.layer_decay
        rates = {id(p): decay ** (len(layers) - level) for level, layer in enumerate(layers) for p in layer}
        for parameter in self.backbone.stem.parameters():
            rates[id(parameter)] *= self.settings.stem_rate
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.student.parameters():
            if parameter.requires_grad:
                decays = float(parameter.ndim > 1 and len(parameter) > 1)
                groups.setdefault((rates.get(id(parameter), 1.0), decays), []).append(parameter)
        return [ParameterGroup(parameters, rate, decays) for (rate, decays), parameters in groups.items()]

    def clipped_modules(self) -> list[nn.Module]:
        """As DINOv2: at the start of a vision transformer KoLeo's gradient is hundreds of times the heads'."""
        return [self.student.reader, self.student.image_head, self.student.cell_head]

    def train(self, mode: bool = True) -> DINO:
        """The teacher always predicts: without dropout, with running statistics."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def exported(self) -> nn.Module:
        return self.teacher.reader.network

    def views(self, batch: CropBatch, random: BatchRandom) -> dict[str, Tensor]:
        """Two global and several local views of a region, and which cells of the global ones are hidden.

        ``global`` (B, 2, C, D, H, W), ``local`` (B, V, C, D, H, W), ``hidden`` (B, 2, N) bool; ``row`` (M,) the hidden
        cells among B x 2 x N, ``weight`` (M,) and ``owner`` (M,) their share in which sample; ``seen``,
        the global views with hidden cells replaced, for networks that cannot hide cells themselves.
        """
        settings, region, device = self.settings, self.geometry.crop_size, random.device
        turns = SpatialRange(self.geometry.spacing, settings.flip, settings.rot90)

        def cut(number: int, size: tuple[int, int, int], area: list[float], depth: list[float]) -> Tensor:
            kind = ViewKind(number, size, (area[0], area[1]), (depth[0], depth[1]), turns)
            return crop_views(batch.boxes[0], region, kind, settings.intensity, random)

        views = {"global": cut(GLOBALS, region, settings.global_area, settings.global_depth)}
        if settings.local_crops:
            views["local"] = cut(settings.local_crops, self.local_size, settings.local_area, settings.local_depth)
        number = math.prod(self.cells)
        hidden = draw_patch_masks(random, GLOBALS, number, settings.mask_probability, settings.mask_ratio)
        row = hidden.flatten().nonzero()[:, 0]
        share = 1 / hidden.sum(-1).clamp_min(1) / GLOBALS  # (B, 2)
        views |= {"hidden": hidden, "row": row, "weight": share.flatten()[row // number]}
        views["owner"] = row // (GLOBALS * number)
        views = {name: to_device(value, device) for name, value in views.items()}
        if self.student.reader.hides_voxels:
            views["seen"] = self._hide(views["global"], views["hidden"], random)
        return views

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` and its terms ``image``, ``cells`` and ``spread``, each (B,)."""
        clean, hidden, row = views["global"], views["hidden"].flatten(0, 1), views["row"]
        number = len(clean)
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            features, cells = teacher.reader(clean.flatten(0, 1))
            said = teacher.image_head(features).unflatten(0, (number, GLOBALS))
            said_of_cells = teacher.cell_head(cells.flatten(0, 1)[row])
        own_features, own_cells = student.reader(views.get("seen", clean).flatten(0, 1), hidden)
        own = student.image_head(own_features).unflatten(0, (number, GLOBALS))
        if "local" in views:
            local, _ = student.reader(views["local"].flatten(0, 1))
            own = torch.cat([own, student.image_head(local).unflatten(0, (number, -1))], 1)
        own_of_cells = student.cell_head(own_cells.flatten(0, 1)[row])

        image_total, image = self._distil("image", own, said, self.pairs)
        one = self.pairs.new_ones(1, 1)
        cell_total, per_cell = self._distil("cell", own_of_cells[:, None], said_of_cells[:, None], one, views["weight"])
        cell = image.new_zeros(number).index_add(0, views["owner"], per_cell)
        spread = self._spread(own_features.float().unflatten(0, (number, GLOBALS)))
        if not self.training:
            some = to_device(seen_cells(cells.shape[1]), cells.device)
            guessed, right = student.cell_head(own_cells[:, some]), teacher.cell_head(cells[:, some])
            self.seen.add(self.geometry.batch_size, features.float(), said, guessed, right, hidden[:, some])
        settings = self.settings
        loss = attach_gradient(image, image_total) + settings.cell_weight * attach_gradient(cell, cell_total)
        return {"loss": loss + settings.koleo_weight * spread, "image": image, "cells": cell, "spread": spread}

    def before_step(self, progress: float) -> None:
        self.warming_up = progress < self.settings.warmup
        first, last = self.settings.teacher_temperature
        share = min(1.0, progress / self.settings.temperature_warm_up) if self.settings.temperature_warm_up else 1.0
        self.teacher_temperature.fill_(first + (last - first) * share)
        self.prototypes_move.fill_(float(progress >= self.settings.freeze_prototypes))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the teacher a little towards the student; batch norms' statistics too."""
        start = self.settings.momentum
        momentum = 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
        pairs = [(theirs, mine) for theirs, mine in self._paired() if theirs.is_floating_point()]
        torch._foreach_lerp_([theirs for theirs, _ in pairs], [mine for _, mine in pairs], 1 - momentum)

    def check_validation(self, measures: dict[str, float]) -> ValidationCheck:
        found = self.seen.measures(self._targets)
        # a vision transformer starts with features that are all alike (LayerScale), and leaves that as the rate rises
        sign = "" if self.warming_up else sign_of_collapse({**measures, **found}, self.settings)
        return ValidationCheck(found, sign, self.settings.patience)

    @torch.compiler.disable  # the number of hidden cells is another at each step
    def _distil(self, level: str, own: Tensor, said: Tensor, pairs: Tensor, weight: Tensor | None = None) -> Distilled:
        """Cross-entropy of (N, S, E) under the targets of (N, T, E), over weighted pairs: its total, and (N,)."""
        targets = self._targets(level, said)
        directions, temperature = self._head(self.student, level).directions, self.settings.student_temperature
        result = prototype_cross_entropy(
            own, directions, targets, pairs, temperature, weight=weight, prototype_scale=self.prototypes_move
        )
        if self.training and self.centring == "softmax":
            with torch.no_grad():
                centre = self._centre(level)
                centre.copy_(
                    update_center(centre, said.flatten(0, 1), targets.prototypes, self.settings.centre_momentum)
                )
        return result

    def _targets(self, level: str, said: Tensor) -> Targets:
        prototypes, temperature = self._head(self.teacher, level).prototypes, self.teacher_temperature
        if self.centring == "sinkhorn":
            bias = sinkhorn_bias(said.flatten(0, 1), prototypes, temperature)
        else:
            bias = -self._centre(level) / temperature
        return Targets(said, prototypes, bias, temperature)

    @torch.compiler.disable  # it listens to gradients
    def _spread(self, features: Tensor) -> Tensor:
        """KoLeo of each global view among the same view of all samples: (B, 2, F) -> (B,); 0 for one sample."""
        kind = features.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        everyone, own = gather_samples(features, self.geometry.batch_size)
        rows = torch.stack([koleo(features[:, v], everyone[:, v], own) for v in range(GLOBALS)]).sum(0)
        if features.requires_grad and dtype == torch.float16:
            limit_koleo_gradient(features, rows)
        return rows

    def _hide(self, image: Tensor, hidden: Tensor, random: BatchRandom) -> Tensor:
        """``image`` (B, 2, C, D, H, W) with hidden cells as noise of the view's mean and deviation, or as its mean."""
        mask = expand_blocks(hidden.unflatten(-1, self.cells), image.shape[3:], self.student.reader.cell)[:, :, None]
        fill = image.mean((3, 4, 5), keepdim=True).expand_as(image)
        if self.settings.mask_fill == "noise":
            noise = torch.stack([random.normal(b, image.shape[1:]) for b in range(len(image))])
            fill = fill + noise * image.std((3, 4, 5), keepdim=True)
        return torch.where(mask, fill, image)

    @staticmethod
    def _head(network: DistilledNetwork, level: str) -> Any:
        return network.image_head if level == "image" else network.cell_head

    def _centre(self, level: str) -> Tensor:
        return self.image_centre if level == "image" else self.cell_centre

    def _paired(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What of the teacher follows what of the student."""
        for theirs, mine in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if mine.requires_grad:
                yield theirs, mine
        yield from zip(self.teacher.buffers(), self.student.buffers(), strict=True)
