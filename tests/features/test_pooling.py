"""Vectors of maps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nnssl_ext.features.pooling import IMAGE, masks, pooled
from nnssl_ext.features.window import Grid

SHAPE, STRIDE = (6, 9, 7), (2, 4, 2)
GRID = Grid.of(SHAPE, (8, 8, 8), (4, 4, 4))


def random_map(channels: int = 3) -> Tensor:
    edges = [edge // step for edge, step in zip(GRID.padded, STRIDE, strict=True)]
    return torch.randn(channels, *edges, generator=torch.Generator().manual_seed(0))


def by_hand(found: Tensor, mask: np.ndarray) -> np.ndarray:
    """Repeat each feature over its voxels, and average over the mask's voxels."""
    voxels = found.numpy().astype(float)
    for axis, step in enumerate(STRIDE):
        voxels = voxels.repeat(step, axis + 1)
    inside = tuple(slice(b, b + e) for b, e in zip(GRID.before, SHAPE, strict=True))
    return voxels[(slice(None), *inside)][:, mask].mean(1)


def vectors(pool: str, labels: Tensor | None = None, names: dict[int, str] | None = None) -> dict[str, Tensor]:
    found = pooled({0: random_map()}, masks(pool, SHAPE, labels, names or {}), GRID, [STRIDE], pool == "max")
    return {region: stages[0] for region, stages in found.items()}


def test_the_mean_counts_voxels_of_the_image_only() -> None:
    assert GRID.padded != SHAPE
    expected = by_hand(random_map(), np.ones(SHAPE, bool))
    assert vectors("mean")[IMAGE].numpy() == pytest.approx(expected, abs=1e-5)


def test_labels_are_pooled_by_their_share_of_each_feature() -> None:
    labels = torch.randint(0, 4, SHAPE, generator=torch.Generator().manual_seed(1))
    found = vectors("mask", labels, {1: "organ", 2: "ignore"})
    assert list(found) == [IMAGE, "organ", "3"]
    for region, value in (("organ", 1), ("3", 3)):
        assert found[region].numpy() == pytest.approx(by_hand(random_map(), labels.numpy() == value), abs=1e-5)


def test_a_case_without_labels_has_the_vector_of_the_image() -> None:
    found = vectors("mask", torch.zeros(SHAPE, dtype=torch.int))
    assert list(found) == [IMAGE]
    assert torch.equal(found[IMAGE], vectors("mean")[IMAGE])


def test_octants_follow_each_other() -> None:
    found, ones = vectors("octants")[IMAGE].reshape(8, 3), np.zeros(SHAPE, bool)
    ones[3:, :5, 3:] = True  # the sixth: second half, first half, second half, where odd edges share their middle
    assert found[5].numpy() == pytest.approx(by_hand(random_map(), ones), abs=1e-5)


def test_octants_of_a_slice_are_never_empty() -> None:
    grid = Grid.of((1, 8, 8), (1, 8, 8), (1, 4, 4))
    found = pooled({0: torch.ones(1, 1, 2, 2)}, masks("octants", (1, 8, 8), None, {}), grid, [(1, 4, 4)])
    assert found[IMAGE][0].tolist() == [1] * 8


def test_the_maximum_leaves_padding_out() -> None:
    shape = (3, 9, 3)
    grid, found = Grid.of(shape, (8, 8, 8), (4, 4, 4)), random_map()
    touched = grid.share(torch.ones(shape), STRIDE) > 0
    assert not touched.all()
    found[:, ~touched] = 100
    largest = pooled({0: found}, masks("max", shape, None, {}), grid, [STRIDE], True)[IMAGE][0]
    assert torch.equal(largest, found[:, touched].amax(1))
