"""Each adaptation keeps the response that it promises, on values."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.networks.positions import resize_positions
from nnssl_ext.transfer.adaptations import (
    MisfitError,
    input_channels,
    kernel,
    overlapping_channels,
    patch_kernel,
    resizing_matrix,
    upsampling_kernel,
)
from nnssl_ext.transfer.rules import Context, fit


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (1, 4), (2, 3), (4, 7), (4, 1), (3, 2), (5, 4)])
def test_alike_channels_give_the_same_response(old: int, new: int) -> None:
    weight, image = normal(5, old, 3, 3, 3), normal(2, 1, 6, 6, 6)
    adapted = input_channels(weight, new)
    same(F.conv3d(image.expand(-1, new, -1, -1, -1), adapted), F.conv3d(image.expand(-1, old, -1, -1, -1), weight))
    assert all(adapted[:, c].abs().sum() > 0 for c in range(new))


def test_repeated_channels_see_what_they_saw() -> None:
    """Two channels to four: an image that repeats its channels in turn, each of them different, responds the same."""
    weight, image = normal(5, 2, 3, 3, 3), normal(1, 2, 6, 6, 6)
    same(F.conv3d(image.repeat(1, 2, 1, 1, 1), input_channels(weight, 4)), F.conv3d(image, weight))


def test_fewer_channels_prefer_none() -> None:
    weight = normal(5, 4, 3, 3, 3)
    same(input_channels(weight, 2), input_channels(weight[:, [3, 1, 0, 2]], 2))


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_summed_kernel_answers_a_constant_axis_alike(axis: int) -> None:
    weight = normal(4, 3, 3, 3, 3)
    size, padding = [3, 3, 3], [1, 1, 1]
    size[axis - 2], padding[axis - 2] = 1, 0
    edges = [7, 7, 7]
    edges[axis - 2] = 1
    image = normal(2, 3, *edges).expand(2, 3, 7, 7, 7)
    before, after = F.conv3d(image, weight, padding=1), F.conv3d(image, kernel(weight, size), padding=padding)
    # the outermost planes of the wider kernel see padding
    same(after.narrow(axis, 1, 5), before.narrow(axis, 1, 5))
    assert not torch.allclose(after, before)


def test_centred_kernel_answers_everything_alike() -> None:
    weight, image = normal(4, 3, 1, 3, 3), normal(2, 3, 6, 7, 8)
    placed = kernel(weight, (3, 3, 3))
    same(F.conv3d(image, placed, padding=1), F.conv3d(image, weight, padding=(0, 1, 1)))
    same(kernel(placed, (1, 3, 3)), weight)
    same(kernel(weight, (5, 3, 3)).sum(2, keepdim=True), weight)
    # a stride changes where, not what
    strided = F.conv3d(image, placed, stride=(1, 2, 2), padding=1)
    same(strided, F.conv3d(image, weight, stride=(1, 2, 2), padding=(0, 1, 1)))


def test_kernels_of_several_axes_at_once() -> None:
    weight = normal(4, 3, 3, 1, 3)
    adapted = kernel(weight, (1, 3, 3))
    constant = normal(2, 3, 1, 1, 8).expand(2, 3, 7, 7, 8)
    before, after = F.conv3d(constant, weight), F.conv3d(constant, adapted)
    same(after[:, :, 1:-1], before[:, :, :, 1:-1].transpose(2, 3)[:, :, :5].expand(-1, -1, -1, 5, -1))


@pytest.mark.parametrize("size", [(7, 3, 3), (2, 3, 3)])
def test_kernels_without_a_rule(size: tuple[int, ...]) -> None:
    with pytest.raises(MisfitError, match="no rule for a kernel edge"):
        kernel(normal(4, 3, 3, 3, 3), size)
    with pytest.raises(MisfitError, match="no rule for a kernel edge 1 -> 2"):
        kernel(normal(4, 3, 1, 3, 3), (2, 3, 3))


@pytest.mark.parametrize(("old", "new"), [((2, 2, 2), (1, 2, 2)), ((1, 2, 2), (2, 2, 2)), ((2, 2, 2), (4, 1, 2))])
def test_upsampled_constant_keeps_its_mean(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    weight, levels = normal(3, 4, *old), normal(2, 3, 1, 1, 1).expand(2, 3, 4, 5, 6)
    before = F.conv_transpose3d(levels, weight, stride=old)
    after = F.conv_transpose3d(levels, upsampling_kernel(weight, new), stride=new)
    assert after.shape[2:] == torch.Size(e * s for e, s in zip((4, 5, 6), new, strict=True))
    same(after.mean((2, 3, 4)), before.mean((2, 3, 4)))


def test_upsampling_one_axis_leaves_the_others() -> None:
    """A map that is constant along the changed axis only: the mean along it is kept at every place of the others."""
    weight, image = normal(3, 4, 2, 2, 2), normal(1, 3, 1, 5, 6).expand(1, 3, 4, 5, 6)
    before = F.conv_transpose3d(image, weight, stride=2)
    after = F.conv_transpose3d(image, upsampling_kernel(weight, (1, 2, 2)), stride=(1, 2, 2))
    same(after.mean(2), before.mean(2))


def test_overlapping_channels_answer_as_before() -> None:
    """A wider layer: its first channels answer the first inputs as the narrow layer did, the rest is untouched."""
    weight, initial = normal(4, 3, 3, 3, 3), normal(6, 5, 3, 3, 3) + 1
    wide = overlapping_channels(weight, initial)
    image = torch.cat([normal(2, 3, 6, 6, 6), torch.zeros(2, 2, 6, 6, 6, dtype=torch.float64)], 1)
    same(F.conv3d(image, wide)[:, :4], F.conv3d(image[:, :3], weight))
    same(F.conv3d(image, wide)[:, 4:], F.conv3d(image, initial)[:, 4:])
    narrow = overlapping_channels(initial, weight)
    same(narrow, initial[:4, :3])
    same(overlapping_channels(normal(2), torch.zeros(3, dtype=torch.float64))[:2], normal(2))


def test_a_concatenation_overlaps_half_by_half() -> None:
    """Decoder: up-sampled map beside skip. With 3 + 3 channels over 5 + 5, both halves find their own weights."""
    weight, initial = normal(4, 6, 3, 3, 3), torch.zeros(4, 10, 3, 3, 3, dtype=torch.float64)
    wide = overlapping_channels(weight, initial, parts=2)
    below, skip = normal(2, 3, 6, 6, 6), normal(2, 3, 6, 6, 6) - 1
    nothing = torch.ones(2, 2, 6, 6, 6, dtype=torch.float64)
    same(F.conv3d(torch.cat([below, nothing, skip, nothing], 1), wide), F.conv3d(torch.cat([below, skip], 1), weight))


@pytest.mark.parametrize("size", [(8, 8, 8), (6, 8, 5), (4, 7, 4)])
def test_a_grown_patch_becomes_the_same_token(size: tuple[int, ...]) -> None:
    weight, patch = normal(5, 2, 4, 4, 4), normal(3, 2, 4, 4, 4)
    grown = patch
    for axis, edge in enumerate(size, start=2):
        grown = torch.tensordot(grown, resizing_matrix(4, edge), dims=([axis], [1])).movedim(-1, axis)
    same(F.conv3d(grown, patch_kernel(weight, size)), F.conv3d(patch, weight))


def test_resizing_is_torchs_interpolation() -> None:
    line = normal(1, 1, 5)
    same(line @ resizing_matrix(5, 9).T, F.interpolate(line, size=9, mode="linear", align_corners=False))
    line = normal(1, 1, 8)
    same(line @ resizing_matrix(8, 4).T, F.interpolate(line, size=4, mode="area"))
    same(resizing_matrix(7, 3).sum(1), torch.ones(3, dtype=torch.float64))


def test_a_shrunken_patch_keeps_what_it_can_hold() -> None:
    """16 to 8 voxels: every patch that is constant over pairs of voxels becomes the same token."""
    weight, coarse = normal(5, 2, 16, 16, 16), normal(3, 2, 8, 8, 8)
    fine = F.interpolate(coarse, scale_factor=2, mode="nearest")
    same(F.conv3d(coarse, patch_kernel(weight, (8, 8, 8))), F.conv3d(fine, weight))
    same(patch_kernel(weight, (16, 16, 16)), weight)


def test_positions_are_interpolated_in_place() -> None:
    """A table that holds its own coordinates: interpolated, it holds those of the new grid, inside the old one."""
    grid, target = (4, 5, 6), (8, 10, 3)

    def coordinates(shape: tuple[int, int, int]) -> Tensor:
        axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    prefix = normal(1, 2, 3)
    table = torch.cat([prefix, coordinates(grid).reshape(1, -1, 3)], 1)
    result = resize_positions(table, grid, target, prefix=2)
    same(result[:, :2], prefix)
    inner, expected = result[0, 2:].reshape(*target, 3), coordinates(target)
    same(inner[1:-1, 1:-1, :], expected[1:-1, 1:-1, :])
    same(resize_positions(table, grid, grid, prefix=2), table)
    with pytest.raises(MisfitError, match=r"120 positions do not fill a grid of \(4, 5, 5\)"):
        fit(table, result, "positions", Context(source_grid=(4, 5, 5), target_grid=target, prefix=2))
