import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnssl_ext.losses.distillation import Targets
from nnssl_ext.methods.dino.dino import DINO
from nnssl_ext.methods.dino.health import (
    KEPT_PATCHES,
    KEPT_SAMPLES,
    ValidationBuffer,
    kept_patches,
    masked_accuracy,
    sign_of_collapse,
)
from nnssl_ext.methods.dino.settings import DINOSettings
from tests.methods.dino.test_dino import BROKEN, LEARNING, SMALL, trained, validated
from tests.methods.helpers import build, write_anatomy

HEALTHY = {
    "samples": 50.0,
    "image_information": 0.001,  # of a small batch for long; patches say enough
    "patch_information": 0.5,
    "image_entropy": 0.999,
    "patch_entropy": 0.9,
    "effective_rank": 20.0,
    "off_diagonal_cosine": 0.9,
}


@pytest.mark.parametrize(
    ("changed", "sign"),
    [
        ({}, ""),
        ({"patch_information": 0.001}, "targets are uniform for every image"),
        ({"patch_information": 0.001, "image_entropy": 0.1, "patch_entropy": 0.2}, "the same for every image"),
        ({"effective_rank": 1.1}, "features of all images are alike"),
        ({"off_diagonal_cosine": 0.99999}, "features of all images are alike"),
        ({"samples": 2.0, "patch_information": 0.0}, ""),
    ],
)
def test_signs(changed: dict[str, float], sign: str) -> None:
    found = sign_of_collapse({**HEALTHY, **changed}, DINOSettings())
    assert sign in found
    assert bool(found) == bool(sign)


@pytest.mark.parametrize("off", [{"patch_weight": 0.0}, {"mask_probability": 0.0}])
def test_a_level_that_is_not_trained_is_no_sign_of_health(off: dict[str, Any]) -> None:
    measures = {**HEALTHY, "image_information": 0.0}
    assert not sign_of_collapse(measures, DINOSettings())
    assert "uniform" in sign_of_collapse(measures, DINOSettings(**off))
    assert not sign_of_collapse({**HEALTHY, "image_information": 0.5, "patch_information": 0.0}, DINOSettings(**off))


def test_masked_accuracy_are_compared_at_their_place() -> None:
    # what a patch shows is told by its view's direction, where it lies by its place's, which is larger
    views, places = torch.eye(6)[:3], torch.eye(6)[3:5]
    patches = views[:, None] + 5 * places
    masked = torch.ones(3, 2, dtype=torch.bool)
    assert masked_accuracy(patches, patches, masked) == 1
    only_places = (5 * places).expand(3, -1, -1)
    assert masked_accuracy(only_places, patches, masked) == pytest.approx(1 / 3)
    assert masked_accuracy(patches.roll(1, 0), patches, masked) == 0
    # patches that are seen do not count
    masked[1:] = False
    mixed = torch.cat([patches[:1], patches[1:].flip(0)])
    assert masked_accuracy(mixed, patches, masked) == 1
    assert masked_accuracy(patches, patches, masked & False) == 0


@pytest.mark.parametrize("patches", [(6, 6, 6), (8, 8, 8), (5, 4, 4), (4, 4, 4), (7, 7, 7), (2, 8, 8)])
def test_patches_that_are_looked_at_lie_all_over_the_view(patches: tuple[int, int, int]) -> None:
    """Every n-th of them would lie in one plane of common grids."""
    number = math.prod(patches)

    def planes(chosen: np.ndarray) -> list[int]:
        return [len(set(place.tolist())) for place in np.unravel_index(chosen, patches)]

    assert all(seen >= edge - 1 for seen, edge in zip(planes(kept_patches(number).numpy()), patches, strict=True))
    if patches in ((6, 6, 6), (8, 8, 8)):
        assert planes(np.arange(number)[:: number // KEPT_PATCHES])[-1] == 1


def test_no_collapse_is_told_while_the_rate_rises() -> None:
    """A vision transformer's first features are all alike."""
    method = build(DINO, replace(SMALL, warmup=0.1), kind="vit")
    alike = {"samples": 8.0, "image_information": 1.0, "patch_information": 1.0, "image_entropy": 0.5}
    alike |= {"patch_entropy": 0.5, "effective_rank": 1.0, "off_diagonal_cosine": 1.0}
    for progress, told in ((0.05, False), (0.2, True)):
        method.before_step(progress)
        assert bool(method.check_validation(alike).collapse) == told


def test_it_learns_and_its_health_is_told(tmp_path: Path) -> None:
    folder = write_anatomy(tmp_path)
    method = build(DINO, LEARNING)
    untrained = validated(folder, method)["masked_patches"]
    trained(folder, method, 80, 1e-3)
    measures = validated(folder, method)
    health = {"image_entropy", "patch_entropy", "feature_deviation", "effective_rank", "off_diagonal_cosine"}
    assert health | {"view_retrieval", "image_information", "patch_information"} <= set(measures)
    assert measures["samples"] == 16
    assert measures["masked_patches"] > max(untrained, 5 * measures["chance"])
    assert method.check_validation(measures).collapse == ""


def test_a_broken_run_shows_its_sign(tmp_path: Path) -> None:
    folder = write_anatomy(tmp_path)
    method = build(DINO, BROKEN)
    trained(folder, method, 10)
    sign = method.check_validation(validated(folder, method)).collapse
    assert "targets are uniform" in sign
    assert "dino.teacher_temperature" in sign
    # every image and every patch the same, but sharply; Sinkhorn would spread them evenly
    method = build(DINO, replace(LEARNING, centering="softmax"))
    with torch.no_grad():
        for head in (method.teacher.image_head, method.teacher.patch_head):
            head.mlp[-1].weight.zero_()
            head.mlp[-1].bias.copy_(head.prototype_weight[0])
    assert "the same for every image" in method.check_validation(validated(folder, method)).collapse
    # the same features of every image
    method = build(DINO, LEARNING)
    with torch.no_grad():
        method.teacher.reader.voxel[0].weight.zero_()
    assert "features of all images are alike" in method.check_validation(validated(folder, method)).collapse
    # one validation sample tells nothing
    assert method.check_validation({"samples": 2.0, "image_information": 0.0, "patch_information": 0.0}).collapse == ""


def test_a_large_validation_is_seen_in_part() -> None:
    """Each patch is compared with all others: thousands of samples would not fit any memory."""
    buffer, width = ValidationBuffer(), 4
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, width, generator=generator), dim=-1)

    for _ in range(0, 3 * KEPT_SAMPLES, 100):
        patches, masked = unit(200, 2), torch.ones(200, 2, dtype=torch.bool)
        buffer.add(100, torch.randn(200, 5), unit(100, 2), patches, patches, masked)
    prototypes = unit(6)
    for _ in range(2):  # and forgotten
        measures = buffer.measures(lambda _, vectors: Targets(vectors, prototypes, torch.zeros(6), 0.1))
        if measures:
            assert measures["samples"] == KEPT_SAMPLES
            assert measures["masked_patches"] == 1
    assert not measures
