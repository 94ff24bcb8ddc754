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

#: The longest derivative of KoLeo by a vector that float16 layers get.
LONGEST = 2.0**2
#: Logits that are held at once; more samples are computed piece by piece.
ELEMENTS = 1 << 25


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

    def to(self, dtype: torch.dtype) -> Targets:
        """With prototypes of another type, in which logits are computed."""
        return self._replace(prototypes=self.prototypes.to(dtype))


@torch.compiler.disable  # its gradient is written out, and the number of samples may be another at each step
def prototype_cross_entropy(
    student: Tensor,
    directions: Tensor,
    targets: Targets,
    pairs: Tensor,
    temperature: float,
    *,
    weight: Tensor | None = None,
    moving: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the student's distributions under the teacher's, over weighted pairs of vectors.

    Never more than ``ELEMENTS`` logits are held, and none for the backward pass: the forward pass computes the gradient
    of the total as it goes, which needs no logit a second time.

    Args:
        student: (N, S, E), on the unit sphere.
        directions: (K, E) of the student's prototypes, of any length.
        targets: The teacher's side, which gets no gradient.
        pairs: (S, T) weight of each pair.
        temperature: The student's.
        weight: (N,) of each sample in the total; None is 1.
        moving: Factor of the directions' gradient.

    Returns:
        The total (), through which gradients flow, and what each sample gives to it (N,), without gradient; float32.
    """
    kind = student.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else student.dtype
    weight = student.new_ones(len(student), dtype=torch.float32) if weight is None else weight
    # the two products with the prototypes are in autocast's type, everything else in float32
    with torch.autocast(kind, enabled=False):
        total, rows = _PrototypeCrossEntropy.apply(
            student, directions, *targets, pairs, temperature, weight, moving, dtype, torch.is_grad_enabled()
        )
    return total, rows


def carried(rows: Tensor, total: Tensor) -> Tensor:
    """``rows`` (B,) without gradient, whose sum has the gradient of ``total`` ()."""
    return rows + (total - total.detach()) / max(1, len(rows))


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        student: Tensor,
        directions: Tensor,
        teacher: Tensor,
        teacher_prototypes: Tensor,
        bias: Tensor,
        teacher_temperature: Tensor | float,
        pairs: Tensor,
        temperature: float,
        weight: Tensor,
        moving: Tensor | float,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        targets = Targets(teacher, teacher_prototypes, bias, teacher_temperature).to(dtype)
        length = directions.float().norm(dim=1, keepdim=True)
        prototypes = directions / length
        low = prototypes.to(dtype)
        if pairs.shape == (1, 1):  # one weight for all is a weight of the samples
            weight = weight * pairs[0, 0]
        losses = torch.empty(len(student), dtype=torch.float32, device=student.device)
        to_student = torch.empty_like(student) if with_gradient else None
        to_prototypes = torch.zeros_like(prototypes)
        mass = pairs.sum(1)[:, None]
        for rows in _pieces(student, teacher, directions):
            logs = _logits(student[rows], low, temperature).log_softmax(-1)  # (n, S, K)
            wanted = _wanted(targets, rows, pairs)
            losses[rows] = -torch.einsum("nsk,nsk->n", wanted, logs) * weight[rows]
            if to_student is not None:
                probable = logs.exp_() if pairs.shape == (1, 1) else logs.exp_().mul_(mass)
                flat = probable.sub_(wanted).flatten(0, 1).to(dtype)
                scale = (weight[rows] / temperature)[:, None, None]
                to_student[rows] = (flat @ low).view_as(student[rows]) * scale
                _add_product(to_prototypes, flat.T, (student[rows] * scale).flatten(0, 1).to(dtype))
        # what changes a prototype's length changes nothing
        along = torch.linalg.vecdot(to_prototypes, prototypes)[:, None]
        to_directions = to_prototypes.addcmul_(along, prototypes, value=-1).mul_(moving / length)
        context.gradients = to_student, to_directions
        context.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_student, to_directions = context.gradients
        context.gradients = None
        upstream = gradients[0]
        return to_student.mul_(upstream), to_directions.mul_(upstream), *(None,) * 10


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total`` += left @ right, in float32 whatever the factors' type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _pieces(student: Tensor, teacher: Tensor, prototypes: Tensor) -> list[slice]:
    each = (student.shape[1] + teacher.shape[1]) * len(prototypes)
    step = max(1, ELEMENTS // each)
    return [slice(low, low + step) for low in range(0, len(student), step)]


def _logits(vectors: Tensor, prototypes: Tensor, temperature: Tensor | float, bias: Tensor | None = None) -> Tensor:
    """(n, S, E) against (K, E) -> (n, S, K) float32, multiplied in the prototypes' type."""
    scaled = (vectors.flatten(0, -2) / temperature).to(prototypes.dtype)
    if bias is not None and prototypes.dtype == bias.dtype:
        logits = torch.addmm(bias, scaled, prototypes.T)
    else:
        logits = (scaled @ prototypes.T).float()
        logits = logits if bias is None else logits.add_(bias)
    return logits.unflatten(0, vectors.shape[:-1])


def _wanted(targets: Targets, rows: slice, pairs: Tensor) -> Tensor:
    """(n, S, K), for each of the student's vectors the weighted sum of its targets; of a single pair the target."""
    logits = _logits(targets.vectors[rows], targets.prototypes, targets.temperature, targets.bias)
    distributions = logits.softmax(-1)  # (n, T, K)
    return distributions if pairs.shape == (1, 1) else torch.einsum("st,ntk->nsk", pairs, distributions)


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
    got, then by what each sample got; the last division is the softmax that makes the targets. Never more than
    ``ELEMENTS`` logits are held: of more samples they are computed piece by piece, again in each iteration.
    """
    bias = prototypes.new_zeros(len(prototypes), dtype=torch.float32)
    with torch.autocast(vectors.device.type, enabled=False):
        pieces = (vectors.float() / temperature).split(max(1, ELEMENTS // len(prototypes)))
        columns = prototypes.float().T
        kept = pieces[0] @ columns if len(pieces) == 1 else None
        for iteration in range(iterations):
            got = torch.full_like(bias, -torch.inf)
            for piece in pieces:
                scores = piece @ columns if kept is None else kept  # (n, K)
                if iteration:
                    scores = scores - (scores + bias).logsumexp(1, keepdim=True)
                got = torch.logaddexp(got, scores.logsumexp(0)) if len(piece) else got
            bias = -_logsumexp_everywhere(got)
    return bias


def _logsumexp_everywhere(own: Tensor) -> Tensor:
    """Of what each process has (K,), minus infinity where it has nothing; 0 where nobody has anything."""
    if dist.is_available() and dist.is_initialized():
        largest = own.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        largest = torch.where(largest.isfinite(), largest, 0.0)
        total = (own - largest).exp()
        dist.all_reduce(total)
        own = total.log() + largest
    return torch.where(own.isfinite(), own, 0.0)


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


def held_by_float16(features: Tensor, rows: Tensor) -> None:
    """Let no feature's gradient through KoLeo be longer than what float16 layers can pass on.

    It is one over the distance of neighbours, which are all alike at the start of a vision transformer: a gradient
    scaler would fall below one for it, and most other gradients would be zero in float16. Whatever the scale is, the
    same gradients are shortened.

    Args:
        features: (..., F), used for nothing else.
        rows: (N,), KoLeo's.
    """
    upstream: list[Tensor] = []

    def shortened(gradient: Tensor) -> Tensor:
        limit = LONGEST * upstream.pop()
        length = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        return torch.where(length > limit, gradient * (limit / length), gradient)

    rows.register_hook(lambda gradient: upstream.append(gradient.abs().amax()))
    features.register_hook(shortened)
