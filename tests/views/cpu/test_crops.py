import itertools

import numpy as np
import pytest
import torch

from nnssl_ext.views.cpu.crops import source_axes
from nnssl_ext.views.spatial import SourceBox, SpatialRange, crop_batch, resample_batch

CPU = torch.device("cpu")
SIZE = (6, 7, 9)


def volume(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 13, 14, 15), generator=torch.Generator().manual_seed(0))


def agree(boxes: list[SourceBox], size: tuple[int, int, int] = SIZE) -> torch.Tensor | None:
    found, expected = crop_batch(boxes, size, CPU), resample_batch(boxes, size, CPU)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=5e-5)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None and expected[1] is not None:
        assert torch.equal(found[1], expected[1])
    return found[1]


@pytest.mark.parametrize("scale", [1.0, 0.61, 1.37])
@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_scaled_mirrored_and_turned_crops_are_the_definitions(order: tuple[int, ...], scale: float) -> None:
    boxes = []
    for signs in itertools.product((1, -1), repeat=3):
        matrix = np.zeros((3, 3))
        matrix[range(3), order] = signs
        assert source_axes(matrix) == list(order)
        edges = np.asarray(SIZE)[list(order)]
        middle = np.array([6.0, 6.0, 7.0]) + (0.5 * (edges % 2 == 0) if scale == 1 else 0.13)
        shifts = np.array([[0, 0, 0], [0, 6, -5], [0.5, 0, 0], [0.5, 0.5, 0.5]])  # the last two lie between voxels
        boxes += [SourceBox(volume(), matrix * scale, middle + shift) for shift in shifts]
    inside = agree(boxes)
    assert inside is not None
    assert not inside.all()


def test_other_matrices_mix_axes() -> None:
    matrix = SpatialRange((1.0, 1.0, 1.0), affine=1.0, rotation=20).draw(np.random.default_rng(0), SIZE)
    assert source_axes(matrix) is None
    agree([SourceBox(volume(), matrix, np.array([6.0, 6.5, 7.0]))])


def test_axes_scaled_by_themselves_and_single_planes() -> None:
    box = SourceBox(volume(1, 1, 14, 15), np.diag([1.0, 0.4, -1.9]), np.array([0.0, 6.2, 7.4]))
    agree([box], (1, 8, 7))
    agree([SourceBox(volume(1, 1, 14, 15), np.diag([0.7, 0.4, 1.2]), np.array([0.0, 6.2, 7.4]))], (3, 8, 7))


def test_boxes_of_different_sizes_are_resampled_together() -> None:
    boxes = [
        SourceBox(volume(2, *shape), np.diag([0.9, -1.5, 0.8]), np.asarray(shape) / 2 - 0.4)
        for shape in ((13, 14, 15), (9, 20, 11), (16, 8, 12))
    ]
    together, inside = resample_batch(boxes, SIZE, CPU)
    assert inside is not None
    for n, box in enumerate(boxes):
        alone, within = resample_batch([box], SIZE, CPU)
        torch.testing.assert_close(together[n], alone[0], rtol=0, atol=1e-5)
        assert inside[n].all() if within is None else torch.equal(inside[n], within[0])


def test_crops_of_one_box_share_its_data() -> None:
    data = [volume(2, 13, 14, 15), volume(2, 12, 18, 14)]
    boxes = [
        SourceBox(values, np.diag([scale, 0.8, -0.7]), np.asarray(values.shape[1:]) / 2 - 0.6)
        for values in data
        for scale in (0.5, 0.9, 1.1)
    ]
    agree(boxes)
    agree(boxes[1:])  # unequal groups
