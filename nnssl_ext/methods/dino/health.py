"""Measure 3DINO's validation and signs of collapse.

B samples of a batch, n samples of a validation, N patches of a view, F features, E width of a projected vector.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.losses.distillation import MAX_LOGITS, Targets, target_distributions
from nnssl_ext.losses.gather import gather_samples
from nnssl_ext.losses.health import (
    effective_rank,
    entropies,
    feature_deviation,
    off_diagonal_cosine,
    retrieval_accuracy,
)
from nnssl_ext.methods.dino.settings import DINOSettings

#: Below this information, in nats, at the image and the patch level, the targets have collapsed.
MIN_INFORMATION = 0.005
#: Above this entropy, as a share of the largest, collapsed targets are uniform. Otherwise they are all one prototype.
UNIFORM_ENTROPY = 0.9
#: Features have collapsed below this effective rank or above this mean cosine.
MIN_RANK, MAX_COSINE = 1.5, 0.9999
#: Validations with fewer samples show no collapse.
MIN_SAMPLES = 4
#: Patches kept of a view, and samples kept of a validation: each patch is compared with all others.
KEPT_PATCHES, KEPT_SAMPLES = 32, 128


def kept_patches(number: int) -> Tensor:
    """Choose fixed patches all over a view for validation."""
    order = np.random.default_rng(number).permutation(number)[:KEPT_PATCHES]
    return torch.from_numpy(np.sort(order).astype(np.int64))  # on Windows numpy before 2.0 draws int32


class ValidationBuffer:
    """Collect outputs of the first validation batches."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []
        self._samples = 0

    @torch.compiler.disable
    def add(
        self, total: int, features: Tensor, output: Tensor, prediction: Tensor, patches: Tensor, masked: Tensor
    ) -> None:
        """Add a batch, as far as there is room.

        Args:
            total: Samples of the batch over all processes.
            features: (2 B, F) teacher features of the global views.
            output: (B, 2, E) teacher output of these views.
            prediction: (2 B, N, E) student output of some of their patches.
            patches: (2 B, N, E) teacher output of these patches.
            masked: (2 B, N) bool, whether the patch was masked for the student.
        """
        room = KEPT_SAMPLES - self._samples
        if room <= 0:
            return
        tensors = [tensor.unflatten(0, (len(output), -1)) for tensor in (features, prediction, patches, masked.float())]
        batch = tuple(gather_samples(tensor, total)[0][:room] for tensor in (output, *tensors))
        self._samples += len(batch[0])
        self._batches.append(batch)

    def measures(self, targets: Callable[[str, Tensor], Targets]) -> dict[str, float]:
        """Compute all measures, and empty the buffer.

        ``targets`` takes ``image`` or ``patch`` and teacher output (n, 1, E).
        """
        if not self._batches:
            return {}
        output, features, prediction, patches, masked = (
            torch.cat(tensors) for tensors in zip(*self._batches, strict=True)
        )
        self._batches.clear()
        self._samples = 0
        found = {
            "masked_patches": masked_accuracy(prediction.flatten(0, 1), patches.flatten(0, 1), masked.flatten(0, 1) > 0)
        }
        for level, vectors in (("image", output.flatten(0, 1)), ("patch", patches.flatten(0, 2))):
            of_level = targets(level, vectors[:, None])
            rows = max(1, MAX_LOGITS // len(of_level.prototypes))
            chunks = (target_distributions(of_level._replace(vectors=v))[:, 0] for v in of_level.vectors.split(rows))
            found[f"{level}_entropy"], found[f"{level}_information"] = entropies(chunks)
        found |= {
            "view_retrieval": retrieval_accuracy(*output.unbind(1)),
            "feature_deviation": feature_deviation(features.flatten(0, 1)),
            "effective_rank": effective_rank(features[:, 0]),
            "off_diagonal_cosine": off_diagonal_cosine(features[:, 0]),
        }
        views = output.shape[0] * output.shape[1]
        return {name: value.item() for name, value in found.items()} | {
            "samples": float(len(output)),
            "chance": 1 / views,
        }


def masked_accuracy(prediction: Tensor, patches: Tensor, masked: Tensor) -> Tensor:
    """Compute how often a masked patch matches its view.

    The prediction of a patch is compared with the teacher output of all views at the same place. Other places of the
    same view are no candidates: a network knows the place of a patch from its padding alone. Student and teacher output
    of V views are (V, N, E), ``masked`` is (V, N) bool.
    """
    nearest = torch.einsum("vne,wne->nvw", prediction, patches).argmax(2)  # (N, V)
    right = (nearest == torch.arange(len(patches), device=patches.device)).T
    return (right & masked).sum() / masked.sum().clamp_min(1)


def sign_of_collapse(measures: dict[str, float], settings: DINOSettings) -> str:
    """Return a sign of collapse and its remedy, else ''."""
    if measures.get("samples", 0) < MIN_SAMPLES:
        return ""
    # the information of a level that is not trained is arbitrary; the image level always is
    levels = ["image", "patch"] if settings.patch_weight and settings.mask_probability else ["image"]
    information = max(measures[f"{level}_information"] for level in levels)
    if information < MIN_INFORMATION:
        return _collapsed_targets(max(measures[f"{level}_entropy"] for level in levels), information, settings)
    rank, cosine = measures["effective_rank"], measures["off_diagonal_cosine"]
    if rank < MIN_RANK or cosine > MAX_COSINE:
        return (
            f"the features of all images are alike (effective rank {rank:.2f}, mean cosine {cosine:.5f}). Raise "
            f"dino.koleo_weight (now {settings.koleo_weight}) or lower learning_rate"
        )
    return ""


def _collapsed_targets(entropy: float, information: float, settings: DINOSettings) -> str:
    temperature, found = settings.teacher_temperature, f"entropy {entropy:.3f}, information {information:.4f} nats"
    if entropy > UNIFORM_ENTROPY:
        return (
            f"the teacher's targets are uniform for every image ({found}). Lower dino.teacher_temperature (now "
            f"{temperature}) or learning_rate"
        )
    return (
        f"the teacher's targets are the same for every image ({found}). Turn on centering (dino.centering, "
        f"dino.center_momentum below 1) or raise dino.teacher_temperature (now {temperature})"
    )
