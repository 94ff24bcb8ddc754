"""Self-distillation over prototypes, and what keeps it from collapsing.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021, arXiv 2104.14294; Zhou et
al., "iBOT", ICLR 2022, arXiv 2111.07832; Oquab et al., "DINOv2", TMLR 2024, arXiv 2304.07193.

N samples, S student and T teacher vectors of each, E width of a vector, K prototypes. Vectors and prototypes are on
the unit sphere. Centering and Sinkhorn both add one number per prototype to the teacher's scaled logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

#: Logits held in memory at once. More samples are processed in chunks.
MAX_LOGITS = 1 << 25


class Targets(NamedTuple):
    """Describe the teacher's distributions.

    ``softmax(vectors @ prototypes.T / temperature + bias)``

    Attributes:
        vectors: (N, T, E) teacher output.
        prototypes: (K, E) of the teacher.
        bias: (K,) from centering or Sinkhorn.
        temperature: Temperature of the softmax.
    """

    vectors: Tensor
    prototypes: Tensor
    bias: Tensor
    temperature: Tensor | float


def target_distributions(targets: Targets) -> Tensor:
    """Compute the teacher's distributions, (N, T, K) in float32."""
    with torch.autocast(targets.vectors.device.type, enabled=False):
        logits = targets.vectors.float() @ targets.prototypes.float().T / targets.temperature
    return (logits + targets.bias).softmax(-1)


def update_center(center: Tensor, vectors: Tensor, prototypes: Tensor, momentum: float) -> Tensor:
    """Update the mean of teacher logits over all processes.

    Args:
        center: (K,) the average so far.
        vectors: (N, E) teacher output of this process. With N = 0 everywhere the center does not change.
        prototypes: (K, E) of the teacher.
        momentum: Share of the old average.

    Returns:
        (K,) the new average.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        total = torch.cat([vectors.float().sum(0), vectors.new_full((1,), len(vectors), dtype=torch.float32)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        # the count stays on the device: reading it would make the host wait
        mean = (total[:-1] / total[-1].clamp_min(1)) @ prototypes.float().T
        return torch.lerp(center, mean, (1 - momentum) * total[-1].clamp_max(1))


def product_dtype(tensor: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """Return the type of matrix products under autocast, another without it."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise


def sinkhorn_bias(vectors: Tensor, prototypes: Tensor, temperature: Tensor | float, iterations: int = 3) -> Tensor:
    """Compute the bias that spreads targets evenly.

    Sinkhorn-Knopp iterations in logarithms over the samples of all processes. Each iteration divides by the total of
    each prototype, then by the total of each sample. The last division is the softmax of the targets.

    Args:
        vectors: (N, E) teacher output of this process.
        prototypes: (K, E) of the teacher.
        temperature: Temperature of the teacher.
        iterations: Number of iterations. DINOv2 takes 3.

    Returns:
        (K,) the bias.
    """
    bias = prototypes.new_zeros(len(prototypes), dtype=torch.float32)
    dtype = product_dtype(vectors, torch.float32)  # logits are products in autocast's type, as those of the targets
    with torch.autocast(vectors.device.type, enabled=False):
        chunks = (vectors.float() / temperature).to(dtype).split(max(1, MAX_LOGITS // len(prototypes)))
        columns = prototypes.to(dtype).T
        # a single chunk is kept, several are computed again in each iteration
        kept = (chunks[0] @ columns).float() if len(chunks) == 1 else None
        for iteration in range(iterations):
            total = torch.full_like(bias, -torch.inf)
            for chunk in chunks:
                scores = (chunk @ columns).float() if kept is None else kept  # (n, K)
                if iteration:
                    scores = scores - (scores + bias).logsumexp(1, keepdim=True)
                total = torch.logaddexp(total, scores.logsumexp(0)) if len(chunk) else total
            bias = -_all_reduce_logsumexp(total)
    return bias


def _all_reduce_logsumexp(own: Tensor) -> Tensor:
    """Combine all processes' log-sums (K,). 0 where no process has a sample."""
    if dist.is_available() and dist.is_initialized():
        largest = own.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        largest = torch.where(largest.isfinite(), largest, 0.0)
        total = (own - largest).exp()
        dist.all_reduce(total)
        own = total.log() + largest
    return torch.where(own.isfinite(), own, 0.0)


def koleo(vectors: Tensor, everyone: Tensor, own: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Compute minus the log distance to the nearest vector.

    Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, arXiv 1806.03198. Minimizing it spreads
    vectors evenly over the unit sphere. A single vector has no neighbor: its value is 0.

    Args:
        vectors: (N, F) of this process.
        everyone: (G, F) of all processes.
        own: (N,) positions of ``vectors`` in ``everyone``.
        epsilon: Keeps the value of equal vectors finite.

    Returns:
        (N,) in float32.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        mine, others = F.normalize(vectors.float(), dim=1), F.normalize(everyone.float(), dim=1)
        if len(others) < 2:
            return vectors.float().sum(1) * 0
        similarity = (mine @ others.T).detach().scatter_(1, own[:, None], -2.0)
        distance = F.pairwise_distance(mine, others[similarity.argmax(1)], eps=epsilon)
        return -(distance + epsilon).log()
