import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nnssl_ext.losses import distillation as module
from nnssl_ext.losses.distillation import (
    Targets,
    carried,
    held_by_float16,
    koleo,
    moved_centre,
    prototype_cross_entropy,
    sinkhorn_bias,
    target_distributions,
)

#: What DINOv2's own losses (Apache-2.0) answered for these inputs.
RECORDED = json.loads((Path(__file__).parent / "data" / "dinov2_losses.json").read_text())
TEACHER, STUDENT = torch.tensor(RECORDED["teacher"]), torch.tensor(RECORDED["student"])  # views, samples, K
AXES = torch.eye(TEACHER.shape[-1])  # as prototypes, they make vectors their own logits
COLD, WARM = RECORDED["teacher_temperature"], RECORDED["student_temperature"]


def targets(vectors: Tensor, bias: Tensor) -> Targets:
    return Targets(vectors, AXES, bias, COLD)


def softmax_bias(vectors: Tensor) -> Tensor:
    return -moved_centre(torch.zeros(len(AXES)), vectors, AXES, 0.9) / COLD


def image_loss(student: Tensor, teacher: Tensor, bias: Tensor, pairs: Tensor) -> float:
    """Views first, as recorded -> the mean over samples of the sum over pairs."""
    wanted = targets(teacher.transpose(0, 1), bias)
    total, rows = prototype_cross_entropy(student.transpose(0, 1), AXES, wanted, pairs, WARM)
    assert total.item() == pytest.approx(rows.sum().item())
    return rows.mean().item()


def test_image_level_equals_dinov2() -> None:
    everyone = TEACHER.flatten(0, 1)
    softmax, sinkhorn = softmax_bias(everyone), sinkhorn_bias(everyone, AXES, COLD)
    assert torch.allclose(-softmax * COLD, torch.tensor(RECORDED["centre"]), atol=1e-6)
    for bias, name in ((softmax, "softmax"), (sinkhorn, "sinkhorn")):
        found = target_distributions(targets(everyone[:, None], bias))[:, 0]
        assert torch.allclose(found, torch.tensor(RECORDED[f"{name}_targets"]), atol=1e-5)
        local = image_loss(STUDENT[2:], TEACHER, bias, torch.ones(4, 2))
        assert local == pytest.approx(RECORDED[f"image_{name}_local"], rel=1e-5)
    crossed = image_loss(STUDENT[:2], TEACHER, softmax, 1 - torch.eye(2)) / 2
    assert crossed == pytest.approx(RECORDED["image_softmax_global"], rel=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sinkhorn"])
def test_hidden_cells_equal_dinov2(name: str) -> None:
    teacher, student = torch.tensor(RECORDED["cell_teacher"]), torch.tensor(RECORDED["cell_student"])
    mask = torch.tensor(RECORDED["mask"], dtype=torch.bool)
    bias = softmax_bias(teacher) if name == "softmax" else sinkhorn_bias(teacher, AXES, COLD)
    wanted = targets(teacher[:, None], bias)
    weight = (1 / mask.sum(1).clamp_min(1))[:, None].expand_as(mask)[mask]
    total, _ = prototype_cross_entropy(student[:, None], AXES, wanted, torch.ones(1, 1), WARM, weight=weight)
    assert total.item() / len(mask) == pytest.approx(RECORDED[f"cells_{name}"], rel=1e-5)


def test_koleo_equals_dinov2() -> None:
    features = torch.tensor(RECORDED["features"])
    loss = koleo(features, features, torch.arange(len(features))).mean().item()
    assert loss == pytest.approx(RECORDED["koleo"], rel=1e-5)


def drawn(samples: int = 7, views: int = 3, width: int = 8, prototypes: int = 40) -> tuple[Tensor, Tensor, Targets]:
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    student, own = unit(samples, views, width).requires_grad_(), unit(prototypes, width).requires_grad_()
    bias = torch.randn(prototypes, generator=generator)
    return student, own, Targets(unit(samples, 2, width), unit(prototypes, width), bias, 0.06)


def plain(student: Tensor, own: Tensor, wanted: Targets, pairs: Tensor, temperature: float) -> Tensor:
    """The same as one writes it down, all logits at once."""
    logs = (student @ F.normalize(own, dim=-1).T / temperature).log_softmax(-1)
    return -torch.einsum("st,ntk,nsk->n", pairs, target_distributions(wanted), logs)


@pytest.mark.parametrize("elements", [1, 500, 1 << 24])
def test_pieces_equal_the_whole_in_value_and_gradient(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ELEMENTS", elements)
    pairs = torch.tensor([[0.0, 0.2], [0.2, 0.0], [0.3, 0.3]])
    weight = torch.linspace(0.5, 2, 7)
    student, own, wanted = drawn()
    expected = plain(student, own, wanted, pairs, 0.1) * weight
    (3 * expected.sum()).backward()
    assert student.grad is not None
    assert own.grad is not None
    for moving in (1.0, 0.0):
        again, its = student.detach().requires_grad_(), own.detach().requires_grad_()
        total, rows = prototype_cross_entropy(again, its, wanted, pairs, 0.1, weight=weight, moving=moving)
        (3 * carried(rows, total)).sum().backward()
        assert torch.allclose(rows, expected, atol=1e-5)
        assert not rows.requires_grad
        assert again.grad is not None
        assert its.grad is not None
        assert torch.allclose(again.grad, student.grad, atol=1e-5)
        assert torch.allclose(its.grad, moving * own.grad, atol=1e-5)


def test_no_logits_are_kept_or_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    student, own, wanted = drawn(samples=64, prototypes=512)
    monkeypatch.setattr(module, "ELEMENTS", 4 * 5 * 512)
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
        pieces = sinkhorn_bias(wanted.vectors[:, 0], wanted.prototypes, 0.06)
    assert max(largest) <= 4 * 5 * 512
    largest.clear()
    with Watch():
        plain(student, own, wanted, torch.ones(3, 2), 0.1)
    assert max(largest) >= 64 * 3 * 512
    largest.clear()
    monkeypatch.undo()
    with Watch():
        whole = sinkhorn_bias(wanted.vectors[:, 0], wanted.prototypes, 0.06)
    assert max(largest) >= 64 * 512
    assert torch.allclose(pieces, whole, atol=1e-5)


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


def test_no_hidden_cell_is_a_zero_gradient_and_moves_no_centre() -> None:
    student, own, wanted = drawn()
    none = wanted._replace(vectors=wanted.vectors[:0])
    total, rows = prototype_cross_entropy(student[:0], own, none, torch.ones(3, 2), 0.1)
    total.backward()
    assert rows.shape == (0,)
    assert own.grad is not None
    assert (own.grad == 0).all()
    centre = torch.arange(40.0)
    assert torch.equal(moved_centre(centre, none.vectors[:, 0], own.detach(), 0.9), centre)
    assert sinkhorn_bias(none.vectors[:, 0], own.detach(), 0.05).isfinite().all()


def test_sinkhorn_uses_all_prototypes_alike() -> None:
    vectors, own = drawn(samples=400, prototypes=20)[0].detach()[:, 0], drawn(prototypes=20)[1].detach()
    vectors = F.normalize(vectors + 2, dim=-1)  # all to one side: a few prototypes would get nearly everything
    for bias, fair in ((torch.zeros(20), False), (sinkhorn_bias(vectors, own, 0.05, iterations=20), True)):
        used = target_distributions(Targets(vectors[:, None], own, bias, 0.05)).mean((0, 1))
        assert (used.max() < 1.1 / 20) == fair


def test_koleo_of_equal_and_of_single_vectors_is_finite() -> None:
    same = torch.ones(4, 8).requires_grad_()
    loss = koleo(same, same, torch.arange(4))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert same.grad is not None
    assert same.grad.isfinite().all()
    half = torch.full((4, 8), 3e4, dtype=torch.float16)
    assert koleo(half, half, torch.arange(4)).isfinite().all()
    alone = torch.randn(1, 8)
    assert koleo(alone, alone, torch.zeros(1, dtype=torch.int64)) == 0


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_what_float16_cannot_hold_is_shortened_whatever_the_scale_and_nothing_else(scale: float) -> None:
    directions = torch.eye(4)
    near = torch.stack([directions[0], directions[0] + 1e-5 * directions[1], directions[2], directions[3]])
    gradients = []
    for held in (False, True):
        features = near.clone().requires_grad_()
        rows = koleo(features, features, torch.arange(4))
        if held:
            held_by_float16(features, rows)
        (scale * rows.sum()).backward()
        assert features.grad is not None
        gradients.append(features.grad / scale)
    plain, held_ones = gradients
    assert plain[:2].norm(dim=1).min() > 1e4
    torch.testing.assert_close(held_ones[:2].norm(dim=1), torch.full((2,), module.LONGEST))
    torch.testing.assert_close(F.normalize(held_ones[:2], dim=1), F.normalize(plain[:2], dim=1))
    assert torch.equal(held_ones[2:], plain[2:])
