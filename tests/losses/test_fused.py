from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nnssl_ext.losses import distillation
from nnssl_ext.losses.distillation import koleo, sinkhorn_bias, update_center
from nnssl_ext.losses.fused import MAX_KOLEO_GRADIENT, attach_gradient, limit_koleo_gradient, prototype_cross_entropy
from tests.losses import definitions
from tests.losses.definitions import drawn


@pytest.mark.parametrize("elements", [1, 500, 1 << 24])
def test_chunks_equal_the_definition_in_value_and_gradient(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "MAX_LOGITS", elements)
    pairs = torch.tensor([[0.0, 0.2], [0.2, 0.0], [0.3, 0.3]])
    weight = torch.linspace(0.5, 2, 7)
    student, own, wanted = drawn()
    expected = definitions.prototype_cross_entropy(student, own, wanted, pairs, 0.1, weight)
    (3 * expected.sum()).backward()
    assert student.grad is not None
    assert own.grad is not None
    again, its = student.detach().requires_grad_(), own.detach().requires_grad_()
    total, rows = prototype_cross_entropy(again, its, wanted, pairs, 0.1, weight=weight)
    (3 * attach_gradient(rows, total)).sum().backward()
    assert torch.allclose(rows, expected, atol=1e-5)
    assert not rows.requires_grad
    assert again.grad is not None
    assert its.grad is not None
    assert torch.allclose(again.grad, student.grad, atol=1e-5)
    assert torch.allclose(its.grad, own.grad, atol=1e-5)


def test_no_logits_are_kept_or_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    student, own, wanted = drawn(samples=64, prototypes=512)
    monkeypatch.setattr(distillation, "MAX_LOGITS", 4 * 5 * 512)
    largest: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            largest.append(
                max(
                    (t.numel() for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)),
                    default=0,
                )
            )
            return result

    with Watch():
        prototype_cross_entropy(student, own, wanted, torch.ones(3, 2), 0.1)[0].backward()
    assert max(largest) <= 4 * 3 * 512
    largest.clear()
    with Watch():
        chunks = sinkhorn_bias(wanted.vectors[:, 0], wanted.prototypes, 0.06)
    assert max(largest) <= 4 * 5 * 512
    largest.clear()
    with Watch():
        definitions.prototype_cross_entropy(student, own, wanted, torch.ones(3, 2), 0.1)
    assert max(largest) >= 64 * 3 * 512
    largest.clear()
    monkeypatch.undo()
    with Watch():
        whole = sinkhorn_bias(wanted.vectors[:, 0], wanted.prototypes, 0.06)
    assert max(largest) >= 64 * 512
    assert torch.allclose(chunks, whole, atol=1e-5)


def test_mixed_precision_is_near_and_finite() -> None:
    student, own, wanted = drawn()
    _, exact = prototype_cross_entropy(student, own, wanted, torch.ones(3, 2), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        total, rows = prototype_cross_entropy(student, own, wanted, torch.ones(3, 2), 0.1)
    total.backward()
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, exact, rtol=0.03)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_no_masked_patch_is_a_zero_gradient_and_moves_no_center() -> None:
    student, own, wanted = drawn()
    none = wanted._replace(vectors=wanted.vectors[:0])
    total, rows = prototype_cross_entropy(student[:0], own, none, torch.ones(3, 2), 0.1)
    total.backward()
    assert rows.shape == (0,)
    assert own.grad is not None
    assert (own.grad == 0).all()
    center = torch.arange(40.0)
    assert torch.equal(update_center(center, none.vectors[:, 0], own.detach(), 0.9), center)
    assert sinkhorn_bias(none.vectors[:, 0], own.detach(), 0.05).isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_koleo_gradients_are_limited_alike_at_any_scale(scale: float) -> None:
    directions = torch.eye(4)
    near = torch.stack([directions[0], directions[0] + 1e-5 * directions[1], directions[2], directions[3]])
    gradients = []
    for limit in (False, True):
        features = near.clone().requires_grad_()
        rows = koleo(features, features, torch.arange(4))
        if limit:
            limit_koleo_gradient(features, rows)
        (scale * rows.sum()).backward()
        assert features.grad is not None
        gradients.append(features.grad / scale)
    plain, limited = gradients
    assert plain[:2].norm(dim=1).min() > 1e4
    torch.testing.assert_close(limited[:2].norm(dim=1), torch.full((2,), MAX_KOLEO_GRADIENT))
    torch.testing.assert_close(F.normalize(limited[:2], dim=1), F.normalize(plain[:2], dim=1))
    assert torch.equal(limited[2:], plain[2:])
