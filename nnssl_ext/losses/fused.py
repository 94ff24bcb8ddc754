"""Compute losses with hand-written gradients.

Values equal those of the definitions, with less memory and fewer passes.

B batch, V voxels, K classes or prototypes. N samples, S student and T teacher vectors of each, E width of a vector.
The definitions are ``dense.dice_cross_entropy`` and, in tests, ``tests.losses.definitions.prototype_cross_entropy``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.losses import dense, distillation
from nnssl_ext.losses.dense import IGNORE, SMOOTH
from nnssl_ext.losses.distillation import Targets

#: Largest gradient of KoLeo by one vector that float16 layers receive.
MAX_KOLEO_GRADIENT = 2.0**2


def dice_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``dense.dice_cross_entropy``, eagerly with its gradient written out.

    A compiler fuses the definition itself.

    Args:
        logits: (B, K, D, H, W).
        target: (B, D, H, W) uint8, classes 0..K-1 or ``IGNORE``.

    Returns:
        Dice loss (B,) and cross-entropy (B,); both 0 for a sample without counted voxels.
    """
    if torch.compiler.is_compiling():
        with torch.autocast(logits.device.type, enabled=False):
            return dense.dice_cross_entropy(logits, target)
    return _DiceCrossEntropy.apply(logits, target)


class _DiceCrossEntropy(torch.autograd.Function):
    """Compute Dice and cross-entropy in four passes.

    Autograd needs a dozen over (B, K, V), and keeps five tensors of that size instead of one.

    Below, y is a voxel's label, p a probability, c whether the voxel counts.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        target = target.flatten(1)  # (B, V)
        counted = target != IGNORE
        label = torch.where(counted, target, 0).long()
        voxels = counted.sum(1)
        probability = F.log_softmax(logits.float(), 1).flatten(2)  # (B, K, V)
        entropy = -(probability.gather(1, label[:, None])[:, 0] * counted).sum(1) / voxels.clamp_min(1)
        probability.exp_().mul_(counted[:, None])
        chosen = probability.gather(1, label[:, None])[:, 0]  # (B, V)

        classes = torch.arange(logits.shape[1], dtype=target.dtype, device=logits.device).view(1, -1, 1)
        truth = target[:, None] == classes  # (B, K, V)
        overlap, true = torch.where(truth, probability, 0.0).sum(2), truth.sum(2)
        # a class that is neither there nor predicted counts as right: 0 / 0 -> 1
        above, below = 2 * overlap + SMOOTH, true + probability.sum(2) + SMOOTH
        dice = (1 - (above / below).mean(1)) * (voxels > 0)

        own, every = -2 / below / logits.shape[1], above / below**2 / logits.shape[1]
        context.save_for_backward(probability, chosen, label, counted, voxels, own.float(), every.float())
        context.shape, context.dtype = logits.shape, logits.dtype
        return dice.to(entropy.dtype), entropy

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # the Dice loss falls with p of class k by c (own_k [k = y] + every_k), the entropy with log p of y by c / V;
        # through the softmax: p_k (d_k - sum_j p_j d_j), and c (p_k - [k = y]) / V
        probability, chosen, label, counted, voxels, own, every = context.saved_tensors
        dice = gradients[0][:, None] * counted  # (B, V)
        entropy = (gradients[1] / voxels.clamp_min(1))[:, None] * counted
        mine = own.gather(1, label) * chosen
        mean = mine + torch.einsum("bkv,bk->bv", probability, every)
        result = torch.addcmul((entropy - dice * mean)[:, None], dice[:, None], every[:, :, None]).mul_(probability)
        result.scatter_add_(1, label[:, None], (dice * mine - entropy)[:, None])
        return result.view(context.shape).to(context.dtype), None


@torch.compiler.disable  # its gradient is written out, and the number of samples changes from step to step
def prototype_cross_entropy(
    student: Tensor,
    prototype_weight: Tensor,
    targets: Targets,
    pairs: Tensor,
    temperature: float,
    *,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy between teacher and student distributions.

    It goes in chunks and keeps no logits. The forward pass also computes the gradient of the total, so that no logit is
    needed a second time.

    Args:
        student: (N, S, E) student output, on the unit sphere.
        prototype_weight: (K, E) of the student's prototypes, of any length.
        targets: The teacher's side, without gradient.
        pairs: (S, T) weight of each pair of vectors.
        temperature: Temperature of the student.
        weight: (N,) weight of each sample. None is 1.

    Returns:
        The total () with gradient, and the losses (N,) without; float32.
    """
    dtype = distillation.product_dtype(student, student.dtype)
    weight = student.new_ones(len(student), dtype=torch.float32) if weight is None else weight
    # only the two products with the prototypes are in autocast's type
    with torch.autocast(student.device.type, enabled=False):
        total, rows = _PrototypeCrossEntropy.apply(
            student,
            prototype_weight,
            *targets,
            pairs,
            temperature,
            weight,
            dtype,
            torch.is_grad_enabled(),
        )
    return total, rows


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Compute loss and gradients one chunk at a time."""

    @staticmethod
    def forward(
        context: Any,
        student: Tensor,
        prototype_weight: Tensor,
        teacher: Tensor,
        teacher_prototypes: Tensor,
        bias: Tensor,
        teacher_temperature: Tensor | float,
        pairs: Tensor,
        temperature: float,
        weight: Tensor,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        targets = Targets(teacher, teacher_prototypes.to(dtype), bias, teacher_temperature)
        norm = prototype_weight.float().norm(dim=1, keepdim=True)
        prototypes = prototype_weight / norm
        low = prototypes.to(dtype)
        single = pairs.shape == (1, 1)
        if single:  # the weight of the only pair is a weight of the samples
            weight = weight * pairs[0, 0]
        losses = torch.empty(len(student), dtype=torch.float32, device=student.device)
        to_student = torch.empty_like(student) if with_gradient else None
        to_prototypes = torch.zeros_like(prototypes)
        mass = pairs.sum(1)[:, None]
        for rows in _chunks(student, teacher, prototype_weight):
            logs = _logits(student[rows], low, temperature).log_softmax(-1)  # (n, S, K)
            target = _targets(targets, rows, pairs)
            losses[rows] = -torch.einsum("nsk,nsk->n", target, logs) * weight[rows]
            if to_student is not None:
                prediction = logs.exp_() if single else logs.exp_().mul_(mass)
                flat = prediction.sub_(target).flatten(0, 1).to(dtype)
                scale = (weight[rows] / temperature)[:, None, None]
                to_student[rows] = (flat @ low).view_as(student[rows]) * scale
                _add_product(to_prototypes, flat.T, (student[rows] * scale).flatten(0, 1).to(dtype))
        # the length of a prototype does not matter: remove the gradient along it
        along = torch.linalg.vecdot(to_prototypes, prototypes)[:, None]
        to_weight = to_prototypes.addcmul_(along, prototypes, value=-1).div_(norm)
        context.gradients = to_student, to_weight
        context.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_student, to_weight = context.gradients
        context.gradients = None
        upstream = gradients[0]
        return to_student.mul_(upstream), to_weight.mul_(upstream), *(None,) * 9


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``, summed in float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunks(student: Tensor, teacher: Tensor, prototypes: Tensor) -> list[slice]:
    """Split samples to at most ``MAX_LOGITS`` logits."""
    each = (student.shape[1] + teacher.shape[1]) * len(prototypes)
    step = max(1, distillation.MAX_LOGITS // each)
    return [slice(low, low + step) for low in range(0, len(student), step)]


def _logits(vectors: Tensor, prototypes: Tensor, temperature: Tensor | float, bias: Tensor | None = None) -> Tensor:
    """Compute logits of (n, S, E) in float32: (n, S, K). They are multiplied in the prototypes' type."""
    scaled = (vectors.flatten(0, -2) / temperature).to(prototypes.dtype)
    if bias is not None and prototypes.dtype == bias.dtype:
        logits = torch.addmm(bias, scaled, prototypes.T)
    else:
        logits = (scaled @ prototypes.T).float()
        logits = logits if bias is None else logits.add_(bias)
    return logits.unflatten(0, vectors.shape[:-1])


def _targets(targets: Targets, rows: slice, pairs: Tensor) -> Tensor:
    """Sum each student vector's targets: (n, S, K)."""
    logits = _logits(targets.vectors[rows], targets.prototypes, targets.temperature, targets.bias)
    distributions = logits.softmax(-1)  # (n, T, K)
    return distributions if pairs.shape == (1, 1) else torch.einsum("st,ntk->nsk", pairs, distributions)


def attach_gradient(rows: Tensor, total: Tensor) -> Tensor:
    """Attach the gradient of ``total`` () to ``rows`` (B,)."""
    return rows + (total - total.detach()) / max(1, len(rows))


def limit_koleo_gradient(features: Tensor, rows: Tensor) -> None:
    """Limit KoLeo's gradient to what float16 layers can represent.

    It is one over the distance of neighbors, and a vision transformer starts with features that are nearly equal. A
    gradient scaler would fall below one, and most other gradients would underflow. The limit scales with the loss, so
    that every scale clips the same gradients.

    Args:
        features: (..., F) features used by KoLeo alone.
        rows: (N,) values of KoLeo.
    """
    upstream: list[Tensor] = []

    def limited(gradient: Tensor) -> Tensor:
        limit = MAX_KOLEO_GRADIENT * upstream.pop()
        norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        return torch.where(norm > limit, gradient * (limit / norm), gradient)

    rows.register_hook(lambda gradient: upstream.append(gradient.abs().amax()))
    features.register_hook(limited)
