"""Readable definitions of losses that the package computes in a faster way, and inputs for both."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.losses.distillation import Targets, target_distributions


def prototype_cross_entropy(
    student: Tensor,
    prototype_weight: Tensor,
    targets: Targets,
    pairs: Tensor,
    temperature: float,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy between teacher and student distributions.

    ``nnssl_ext.losses.fused`` has the version that trains, with equal values and gradients.

    It takes the same arguments and returns (N,) losses in float32.
    """
    with torch.autocast(student.device.type, enabled=False):
        logits = student.float() @ F.normalize(prototype_weight.float(), dim=-1).T / temperature  # (N, S, K)
    target = target_distributions(targets)  # (N, T, K)
    rows = -torch.einsum("st,ntk,nsk->n", pairs, target, logits.log_softmax(-1))
    return rows if weight is None else rows * weight


def drawn(samples: int = 7, views: int = 3, width: int = 8, prototypes: int = 40) -> tuple[Tensor, Tensor, Targets]:
    """Draw a student's vectors and prototypes, and a teacher's."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    student, own = unit(samples, views, width).requires_grad_(), unit(prototypes, width).requires_grad_()
    bias = torch.randn(prototypes, generator=generator)
    return student, own, Targets(unit(samples, 2, width), unit(prototypes, width), bias, 0.06)
