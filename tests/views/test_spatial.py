import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from nnssl_ext.views.spatial import (
    SourceBox,
    SpatialRange,
    crop_batch,
    crop_box,
    half_extent,
    rotation_matrix,
    shrink_to_fit,
    subview,
)

CPU = torch.device("cpu")
ISOTROPIC = (1.0, 1.0, 1.0)


def volume(shape: tuple[int, ...] = (2, 12, 13, 14)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_identity_at_zero_strength() -> None:
    matrix = SpatialRange(ISOTROPIC).draw(np.random.default_rng(0), (6, 8, 4))
    assert np.array_equal(matrix, np.eye(3))
    data = volume()
    crop, inside = crop_box(SourceBox(data, matrix, np.array([4.5, 5.5, 6.5])), (6, 8, 4), CPU)
    assert torch.equal(crop, data[:, 2:8, 2:10, 5:9])
    assert inside is None


@pytest.mark.parametrize("signs", itertools.product((1, -1), repeat=3))
@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_signed_permutations_are_exact_and_agree_with_resampling(order: tuple, signs: tuple) -> None:
    matrix = np.zeros((3, 3))
    for source_axis, (crop_axis, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[source_axis, crop_axis] = sign
    size = (4, 6, 8)
    edges = np.abs(matrix) @ np.array(size)
    # the box hangs over the volume's border on one side
    center = np.array([1.0, 5.0, 6.0]) + (edges - 1) / 2 - np.array([2, 0, 0])
    copied = crop_box(SourceBox(volume(), matrix, center), size, CPU)
    # a matrix that is not exactly a permutation goes the other way
    resampled = crop_box(SourceBox(volume(), matrix + 1e-9 * np.ones((3, 3)), center), size, CPU)
    assert copied[0].shape == (2, *size)
    assert copied[1] is not None
    assert resampled[1] is not None
    assert torch.equal(copied[1], resampled[1])
    assert not copied[1].all()
    torch.testing.assert_close(copied[0], resampled[0], atol=1e-4, rtol=1e-4)


def test_resampling_agrees_with_scipy() -> None:
    matrix = SpatialRange((2.0, 1.0, 1.0), affine=1.0, rotation=20, zoom=(0.8, 1.2)).draw(
        np.random.default_rng(1), (5, 6, 7)
    )
    data, center, size = volume((1, 12, 13, 14)), np.array([5.3, 6.1, 6.8]), (5, 6, 7)
    crop, inside = crop_box(SourceBox(data, matrix, center), size, CPU)
    offsets = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size), indexing="ij"))
    points = np.einsum("ij,jdhw->idhw", matrix, offsets) + center[:, None, None, None]
    assert inside is None
    expected = map_coordinates(data[0].numpy(), points, order=1)
    np.testing.assert_allclose(crop[0].numpy(), expected, atol=1e-4)


def test_reach_is_what_a_cut_needs() -> None:
    """A box cut down to the reach gives the same crop as the whole volume."""
    data, center, size = volume((1, 30, 30, 30)), np.array([14.2, 15.7, 13.9]), (8, 6, 7)
    spatial = SpatialRange(ISOTROPIC, flip=0.5, rot90=0.5, affine=1.0, rotation=30, zoom=(0.8, 1.2))
    for seed in range(10):
        matrix = spatial.draw(np.random.default_rng(seed), size)
        half = half_extent(matrix, size)
        low, high = np.floor(center - half).astype(int), np.ceil(center + half).astype(int) + 1
        part = data[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
        whole = crop_box(SourceBox(data, matrix, center), size, CPU)
        small = crop_box(SourceBox(part, matrix, center - low), size, CPU)
        torch.testing.assert_close(whole[0], small[0], atol=1e-4, rtol=1e-4)
        assert whole[1] is small[1] is None


def test_quarter_turns_only_where_the_grid_maps_to_itself() -> None:
    def off_diagonal(spacing: tuple, size: tuple) -> set[tuple[int, int]]:
        found = set()
        for seed in range(100):
            matrix = SpatialRange(spacing, rot90=1.0).draw(np.random.default_rng(seed), size)
            found |= {(int(a), int(b)) for a, b in np.argwhere(np.abs(matrix) > 0.5) if a != b}
        return found

    assert off_diagonal(ISOTROPIC, (8, 8, 8)) == {(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)}
    assert off_diagonal((3.0, 1.0, 1.0), (8, 8, 8)) == {(1, 2), (2, 1)}
    assert off_diagonal(ISOTROPIC, (8, 8, 4)) == {(0, 1), (1, 0)}
    assert off_diagonal((3.0, 2.0, 1.0), (8, 8, 8)) == set()


def test_rotation_is_in_millimetres_and_spares_thick_slices() -> None:
    spacing = np.array([2.0, 1.0, 0.5])
    matrix = SpatialRange(tuple(spacing), affine=1.0, rotation=40).draw(np.random.default_rng(3), (8, 8, 8))
    assert np.allclose(np.linalg.det(matrix), 1)
    rotation = matrix * spacing[:, None] / spacing[None]  # in millimetres it is a rotation: orthogonal
    ratio_above_limit = spacing.max() / spacing.min() > 3
    assert ratio_above_limit
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(matrix[0], [1, 0, 0], atol=1e-12)  # the thick axis stays
    assert not np.allclose(matrix, np.eye(3))


def test_zoom_magnifies() -> None:
    matrix = SpatialRange(ISOTROPIC, affine=1.0, zoom=(2.0, 2.0)).draw(np.random.default_rng(0), (8, 8, 8))
    np.testing.assert_allclose(matrix, np.eye(3) / 2)


def test_zoom_mixes_no_thick_slices() -> None:
    spatial = SpatialRange((10.0, 1.5, 1.5), affine=1.0, rotation=30, zoom=(2.0, 2.0))
    matrix = spatial.draw(np.random.default_rng(0), (8, 64, 64))
    np.testing.assert_allclose(matrix[0], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(matrix[:, 0], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(matrix[1:, 1:] @ matrix[1:, 1:].T, np.eye(2) / 4, atol=1e-12)


def test_outside_is_zero_and_marked() -> None:
    data = torch.ones(1, 4, 4, 4)
    boxes = [
        SourceBox(data, np.eye(3), np.array([1.5, 1.5, 1.5])),
        SourceBox(data, np.eye(3) * 1.5, np.array([1.5, 1.5, 1.5])),
    ]
    crops, inside = crop_batch(boxes, (8, 8, 8), CPU)
    assert crops.shape == (2, 1, 8, 8, 8)
    assert inside is not None
    assert torch.equal(crops.bool(), inside)
    assert 0 < inside[0].sum() <= 4**3
    assert inside[0].sum() > inside[1].sum() > 0


def test_a_batch_is_the_same_as_its_crops_one_by_one_where_some_hang_over() -> None:
    turned = SpatialRange(ISOTROPIC, flip=0.5, rot90=1.0).draw(np.random.default_rng(1), (6, 6, 6))
    boxes = [
        SourceBox(volume(), matrix, np.array(center))
        for matrix in (np.eye(3), turned, np.eye(3) * 0.9)
        for center in ((5.5, 6.5, 6.5), (1.5, 6.5, 11.5))
    ]
    crops, inside = crop_batch(boxes, (6, 6, 6), CPU)
    assert inside is not None
    assert inside.shape == (6, 1, 6, 6, 6)
    for box, crop, within in zip(boxes, crops, inside, strict=True):
        alone, place = crop_box(box, (6, 6, 6), CPU)
        assert torch.equal(alone, crop)
        assert within.all() if place is None else torch.equal(place, within)


def test_one_slice_is_enough() -> None:
    crop, inside = crop_box(
        SourceBox(torch.ones(1, 1, 6, 6), np.eye(3) * 1.01, np.array([0.0, 2.5, 2.5])), (3, 4, 4), CPU
    )
    assert torch.isfinite(crop).all()
    assert inside is not None
    assert inside[0, 1].all()
    assert not inside[0, 0].any()


def test_a_part_never_leaves_what_was_read() -> None:
    generator = np.random.default_rng(0)
    data = volume((1, 20, 22, 18))
    box = SourceBox(data, np.eye(3) * 0.8, np.array([9.0, 11.0, 8.0]), "a")
    assert subview(box, (16, 16, 16), np.eye(3)).center.tolist() == [9.0, 11.0, 8.0]
    np.testing.assert_array_equal(subview(box, (16, 16, 16), np.eye(3)).matrix, box.matrix)
    room = half_extent(box.matrix, (16, 16, 16))
    for _ in range(50):
        view = rotation_matrix(generator.uniform(-40, 40, 3), (1, 2, 1)) * generator.uniform(0.5, 1.5)
        found = subview(box, (16, 16, 16), view, generator.uniform(-1, 1, 3))
        assert (abs(found.center - box.center) + half_extent(found.matrix, (16, 16, 16)) <= room + 1e-9).all()
        assert found.case == "a"
    zoomed = subview(box, (16, 16, 16), np.eye(3) / 2, (1, -1, 0))
    np.testing.assert_allclose(zoomed.center - box.center, [3, -3, 0])


def test_a_turn_is_a_rotation_in_millimetres() -> None:
    spacing = np.array([4.0, 1.0, 1.0])
    matrix = rotation_matrix((0, 90, 0), spacing)
    millimetres = matrix * spacing[:, None] / spacing[None, :]
    np.testing.assert_allclose(millimetres @ millimetres.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(abs(millimetres), [[0, 0, 1], [0, 1, 0], [1, 0, 0]], atol=1e-12)


def test_one_plane_is_repeated_and_not_magnified() -> None:
    data = volume((1, 1, 20, 20))
    center = np.array([0.0, 9.5, 9.5])
    inner, _ = crop_box(SourceBox(data, np.eye(3), center), (1, 8, 8), CPU)
    for size, region in (((8, 8, 8), (16, 16, 16)), ((1, 8, 8), (1, 16, 16))):
        read = shrink_to_fit(np.eye(3), region, np.array([0.0, 9.5, 9.5]))
        crop, outside = crop_box(subview(SourceBox(data, read, center), region, np.eye(3), view_size=size), size, CPU)
        assert outside is None
        torch.testing.assert_close(crop, inner.expand_as(crop))
    fitted = shrink_to_fit(np.eye(3), (8, 8, 8), np.array([0, 7 / 4, 7 / 2]))
    np.testing.assert_allclose(fitted, np.diag([0, 0.5, 0.5]))
