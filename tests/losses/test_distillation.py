import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.losses import fused
from nnssl_ext.losses.distillation import Targets, koleo, sinkhorn_bias, target_distributions, update_center
from tests.losses.definitions import drawn, prototype_cross_entropy

#: What DINOv2's own losses (Apache-2.0) answered for these inputs.
RECORDED = json.loads((Path(__file__).parent / "data" / "dinov2_losses.json").read_text())
TEACHER, STUDENT = torch.tensor(RECORDED["teacher"]), torch.tensor(RECORDED["student"])  # views, samples, K
AXES = torch.eye(TEACHER.shape[-1])  # as prototypes, they make vectors their own logits
COLD, WARM = RECORDED["teacher_temperature"], RECORDED["student_temperature"]


def targets(vectors: Tensor, bias: Tensor) -> Targets:
    return Targets(vectors, AXES, bias, COLD)


def softmax_bias(vectors: Tensor) -> Tensor:
    return -update_center(torch.zeros(len(AXES)), vectors, AXES, 0.9) / COLD


def image_loss(student: Tensor, teacher: Tensor, bias: Tensor, pairs: Tensor) -> float:
    """Views first, as recorded -> the mean over samples of the sum over pairs."""
    wanted = targets(teacher.transpose(0, 1), bias)
    inputs = student.transpose(0, 1), AXES, wanted, pairs, WARM
    rows = prototype_cross_entropy(*inputs)
    total, same = fused.prototype_cross_entropy(*inputs)
    torch.testing.assert_close(same, rows)
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
def test_masked_patches_equal_dinov2(name: str) -> None:
    teacher, student = torch.tensor(RECORDED["cell_teacher"]), torch.tensor(RECORDED["cell_student"])
    mask = torch.tensor(RECORDED["mask"], dtype=torch.bool)
    bias = softmax_bias(teacher) if name == "softmax" else sinkhorn_bias(teacher, AXES, COLD)
    wanted = targets(teacher[:, None], bias)
    weight = (1 / mask.sum(1).clamp_min(1))[:, None].expand_as(mask)[mask]
    total = prototype_cross_entropy(student[:, None], AXES, wanted, torch.ones(1, 1), WARM, weight).sum()
    assert total.item() / len(mask) == pytest.approx(RECORDED[f"cells_{name}"], rel=1e-5)


def test_koleo_equals_dinov2() -> None:
    features = torch.tensor(RECORDED["features"])
    loss = koleo(features, features, torch.arange(len(features))).mean().item()
    assert loss == pytest.approx(RECORDED["koleo"], rel=1e-5)


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
