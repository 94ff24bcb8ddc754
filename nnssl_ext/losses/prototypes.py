"""Cross-entropy between two networks' distributions over prototypes, and what keeps it from collapsing.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021, arXiv 2104.14294; Zhou et
al., "iBOT", ICLR 2022, arXiv 2111.07832; Oquab et al., "DINOv2", TMLR 2024, arXiv 2304.07193.

N samples, S student and T teacher vectors of each, E width of a vector, K prototypes. Vectors and prototypes are on
the unit sphere. Centring and Sinkhorn both amount to one number per prototype that is added to the teacher's scaled
logits: a target is ``softmax(teacher @ prototypes.T / temperature + bias)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

#: Logits that are held at once; more samples are computed piece by piece.
ELEMENTS = 1 << 24


class Targets(NamedTuple):
    """Where targets come from.

    Attributes:
        vectors: (N, T, E) of the teacher.
        prototypes: (K, E) of the teacher.
        bias: (K,).
        temperature: The lower, the sharper.
    """

    vectors: Tensor
    prototypes: Tensor
    bias: Tensor
    temperature: Tensor | float


def prototype_cross_entropy(
    student: Tensor, prototypes: Tensor, targets: Targets, pairs: Tensor, temperature: float
) -> Tensor:
    """Sum over pairs of vectors of the cross-entropy of the student's distribution under the teacher's, (N,) float32.

    Neither pass holds more than ``ELEMENTS`` logits: the backward pass computes them again.

    Args:
        student: (N, S, E).
        prototypes: (K, E) of the student.
        targets: The teacher's side, which gets no gradient.
        pairs: (S, T) weight of each pair.
        temperature: The student's.
    """
    kind = student.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else student.dtype
    loss: Tensor = _PrototypeCrossEntropy.apply(student, prototypes, *targets, pairs, temperature, dtype)
    return loss


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        student: Tensor,
        prototypes: Tensor,
        teacher: Tensor,
        teacher_prototypes: Tensor,
        bias: Tensor,
        teacher_temperature: Tensor | float,
        pairs: Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> Tensor:
        context.save_for_backward(student, prototypes, teacher, teacher_prototypes, bias, pairs)
        context.temperatures, context.dtype = (teacher_temperature, temperature), dtype
        targets = Targets(teacher, teacher_prototypes, bias, teacher_temperature)
        loss = torch.empty(len(student), dtype=torch.float32, device=student.device)
        mass = pairs.sum(1)  # (S,)
        for rows in _pieces(student, teacher, prototypes):
            logits = _logits(student[rows], prototypes, temperature, dtype)  # (n, S, K)
            wanted = _wanted(targets, rows, pairs, dtype)
            loss[rows] = (logits.logsumexp(-1) * mass).sum(1) - torch.linalg.vecdot(wanted, logits).sum(1)
        return loss

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student, prototypes, teacher, teacher_prototypes, bias, pairs = context.saved_tensors
        (teacher_temperature, temperature), dtype = context.temperatures, context.dtype
        targets = Targets(teacher, teacher_prototypes, bias, teacher_temperature)
        upstream = gradients[0] / temperature
        to_student = torch.empty_like(student)
        to_prototypes = torch.zeros_like(prototypes)
        mass = pairs.sum(1)[:, None]
        for rows in _pieces(student, teacher, prototypes):
            piece = _logits(student[rows], prototypes, temperature, dtype).softmax(-1)
            piece = piece.mul_(mass).sub_(_wanted(targets, rows, pairs, dtype)).mul_(upstream[rows, None, None])
            flat = piece.flatten(0, 1).to(dtype)
            to_student[rows] = (flat @ prototypes.to(dtype)).view_as(student[rows]).to(student.dtype)
            to_prototypes += (flat.T @ student[rows].flatten(0, 1).to(dtype)).to(prototypes.dtype)
        return to_student, to_prototypes, None, None, None, None, None, None, None


def _pieces(student: Tensor, teacher: Tensor, prototypes: Tensor) -> list[slice]:
    each = (student.shape[1] + teacher.shape[1]) * len(prototypes)
    step = max(1, ELEMENTS // each)
    return [slice(low, low + step) for low in range(0, len(student), step)]


def _logits(vectors: Tensor, prototypes: Tensor, temperature: Tensor | float, dtype: torch.dtype) -> Tensor:
    # without autocast, so that both passes compute the same
    with torch.autocast(vectors.device.type, enabled=False):
        scaled = vectors.flatten(0, -2).to(dtype) @ (prototypes / temperature).to(dtype).T
    return scaled.float().unflatten(0, vectors.shape[:-1])


def _wanted(targets: Targets, rows: slice, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, S, K), for each of the student's vectors the weighted sum of its targets."""
    logits = _logits(targets.vectors[rows], targets.prototypes, targets.temperature, dtype)
    distributions = logits.add_(targets.bias).softmax(-1)  # (n, T, K)
    if pairs.shape == (1, 1):
        return distributions.mul_(pairs[0, 0])
    return torch.einsum("st,ntk->nsk", pairs, distributions)


def target_distributions(targets: Targets) -> Tensor:
    """The targets themselves, (N, T, K) float32."""
    with torch.autocast(targets.vectors.device.type, enabled=False):
        logits = targets.vectors.float() @ targets.prototypes.float().T / targets.temperature
    return (logits + targets.bias).softmax(-1)


def moved_centre(centre: Tensor, vectors: Tensor, prototypes: Tensor, momentum: float) -> Tensor:
    """The moving average (K,) of the logits of (N, E) over all processes, one step further; as it was if N is 0."""
    with torch.autocast(vectors.device.type, enabled=False):
        total = torch.cat([vectors.float().sum(0), vectors.new_full((1,), len(vectors), dtype=torch.float32)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        # without asking the device whether there is any
        mean = (total[:-1] / total[-1].clamp_min(1)) @ prototypes.float().T
        return torch.lerp(centre, mean, (1 - momentum) * total[-1].clamp_max(1))


def sinkhorn_bias(vectors: Tensor, prototypes: Tensor, temperature: Tensor | float, iterations: int = 3) -> Tensor:
    """The bias (K,) with which the targets of (N, E) use all prototypes alike.

    Sinkhorn and Knopp's iterations in logarithms, over the samples of all processes: divide by what each prototype
    got, then by what each sample got; the last division is the softmax that makes the targets.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        scores = vectors.float() @ prototypes.float().T / temperature  # (N, K)
    per_sample = scores.new_zeros((len(scores), 1))
    bias = scores.new_zeros(len(prototypes))
    for _ in range(iterations):
        bias = -_logsumexp_everywhere(scores - per_sample)
        per_sample = (scores + bias).logsumexp(1, keepdim=True)
    return bias


def _logsumexp_everywhere(values: Tensor) -> Tensor:
    """Over rows (N, K) of all processes, (K,); no row has the weight of all of them, so nothing is minus infinity."""
    if not (dist.is_available() and dist.is_initialized()):
        return values.logsumexp(0) if len(values) else values.new_zeros(values.shape[1])
    largest = values.max(0).values if len(values) else values.new_full(values.shape[1:], -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    total = (values - largest).exp().sum(0)
    dist.all_reduce(total)
    # no vector in any process: nothing to balance
    return torch.where(total > 0, total.clamp_min(1e-38).log() + largest, 0.0)


def koleo(vectors: Tensor, everyone: Tensor, own: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Minus the logarithm of the distance to the nearest other vector on the unit sphere, (N,) float32.

    Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, arXiv 1806.03198; Kozachenko and Leonenko
    1987. It spreads vectors evenly. A single vector has no neighbour: 0.

    Args:
        vectors: (N, F) of this process.
        everyone: (G, F), of all processes.
        own: (N,) where ``vectors`` are among them.
        epsilon: Keeps equal vectors finite.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        mine, others = F.normalize(vectors.float(), dim=1), F.normalize(everyone.float(), dim=1)
        if len(others) < 2:
            return vectors.float().sum(1) * 0
        similar = (mine @ others.T).detach().scatter_(1, own[:, None], -2.0)
        distance = F.pairwise_distance(mine, others[similar.argmax(1)], eps=epsilon)
        return -(distance + epsilon).log()
