"""Feature maps of whole volumes from tiles."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnssl_ext.errors import UserError
from nnssl_ext.features.window import Encoder, Grid, feature_maps
from nnssl_ext.networks.backbone import backbone_of
from tests.datasets import make_plans
from tests.support.networks import KINDS, network
from tests.transfer.helpers import built, noise, planned


def encoder(net: nn.Module, patch: tuple[int, ...] = (16, 16, 16)) -> Encoder:
    return Encoder(backbone_of(net), patch, "cpu")


def maps(found: Encoder, image: Tensor, *stages: int, batch: int = 2) -> tuple[Grid, dict[int, Tensor]]:
    grid = Grid.of(image.shape[1:], found.patch, found.strides[-1])
    return grid, feature_maps(found, image, grid, stages or range(len(found.strides)), batch)


def volume(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_a_volume_of_one_patch_are_the_encoders_output(kind: str) -> None:
    patch = make_plans(kind)["configurations"]["3d_fullres"]["patch_size"]
    found = encoder(network(kind), patch)
    image = volume(*patch)
    with torch.no_grad():
        expected = found.backbone.features(image[None])
    _, stitched = maps(found, image)
    assert list(stitched) == list(range(len(expected)))
    for stage, by_hand in enumerate(expected):
        assert (stitched[stage] - by_hand[0]).abs().max() < 1e-5


def pointwise(**more: Any) -> nn.Module:
    """A U-Net whose features depend on one voxel: any misplaced tile shows."""
    plan = planned(kernel_sizes=[[1, 1, 1]] * 3, norm_op=None, norm_op_kwargs=None, **more)
    return noise(built(plan))


@pytest.mark.parametrize("shape", [(21, 19, 16), (37, 30, 17), (16, 45, 33)])
def test_tiles_agree_with_the_encoder_on_the_whole_volume(shape: tuple[int, ...]) -> None:
    """Edges are no multiples of the stride, so that nnU-Net's own tiles would begin between the encoder's samples."""
    found, image = encoder(pointwise()), volume(*shape)
    grid, stitched = maps(found, image)
    assert max(map(len, grid.starts)) > 1
    with torch.no_grad():
        expected = found.backbone.features(grid.pad(image)[None])
    for stage, whole in enumerate(expected):
        assert (stitched[stage] - whole[0]).abs().max() < 1e-5 * whole.abs().max()


def test_a_tile_between_samples_would_be_seen() -> None:
    found, image = encoder(pointwise()), volume(32, 16, 16)
    shifted = Grid((32, 16, 16), (0, 0, 0), (32, 16, 16), ((0, 7, 16), (0,), (0,)))
    stitched = feature_maps(found, image, shifted, (1,), 1)[1]
    with torch.no_grad():
        expected = found.backbone.features(image[None])[1][0]
    assert (stitched - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_repeating_volume_has_repeating_features(kind: str) -> None:
    """Norms and padding see the same in each tile of a volume that repeats with the window's step."""
    found, repeats = encoder(noise(network(kind))), 6
    image = volume(8, 16, 16).repeat(1, repeats, 1, 1)
    _, stitched = maps(found, image)
    for stage, features in stitched.items():
        period = 8 // found.strides[stage][0]
        inner = features[:, 2 * period : -2 * period]
        assert (inner[:, period:] - inner[:, :-period]).abs().max() < 1e-5 * features.abs().max()


def test_a_shifted_volume_has_shifted_features() -> None:
    found, shift = encoder(noise(network("plain"))), 8
    image = volume(64, 16, 16)
    _, first = maps(found, image[:, :-shift])
    _, second = maps(found, image[:, shift:])
    for stage, stride in enumerate(found.strides):
        steps, skip = shift // stride[0], 16 // stride[0]
        pair = first[stage][:, steps:][:, skip:-skip], second[stage][:, :-steps][:, skip:-skip]
        assert pair[0].shape[1] > 0
        assert (pair[0] - pair[1]).abs().max() < 1e-5 * first[stage].abs().max()


@pytest.mark.parametrize(
    ("shape", "patch", "total"),
    [
        ((9, 40, 33), (16, 16, 32), (4, 4, 8)),
        ((5, 7, 9), (8, 8, 8), (8, 8, 8)),
        ((40, 130, 154), (32, 48, 48), (8, 16, 16)),
        ((300, 200, 100), (160, 112, 80), (32, 16, 16)),
    ],
)
def test_tiles_begin_at_strides_and_cover_all(
    shape: tuple[int, ...], patch: tuple[int, ...], total: tuple[int, ...]
) -> None:
    grid = Grid.of(shape, patch, total)
    for axis, starts in enumerate(grid.starts):
        assert all(start % total[axis] == 0 for start in starts)
        ends = [start + patch[axis] for start in starts]
        assert starts[0] == 0
        assert ends[-1] == grid.padded[axis] >= shape[axis]
        gaps = [after - before for before, after in pairwise(starts)]
        assert all(0 < gap <= max(patch[axis] // 2, total[axis]) for gap in gaps)
    image = volume(*shape)
    assert torch.equal(grid.crop(grid.pad(image)), image)


def test_a_small_volume_lies_in_the_middle_as_nnunet_pads_it() -> None:
    from acvl_utils.cropping_and_padding.padding import pad_nd_image

    grid, image = Grid.of((5, 16, 11), (16, 16, 16), (4, 4, 4)), volume(5, 16, 11)
    assert torch.equal(grid.pad(image), pad_nd_image(image, (16, 16, 16), "constant"))


def test_batches_of_tiles_change_nothing() -> None:
    found, image = encoder(network("plain")), volume(30, 20, 18)
    pair = [maps(found, image, 2, batch=batch)[1][2] for batch in (1, 5)]
    assert (pair[0] - pair[1]).abs().max() < 1e-5


def test_a_2d_network_reads_slice_by_slice() -> None:
    flat = planned(
        conv_op="torch.nn.modules.conv.Conv2d",
        norm_op="torch.nn.modules.instancenorm.InstanceNorm2d",
        kernel_sizes=[[3, 3]] * 3,
        strides=[[1, 1], [2, 2], [2, 2]],
    )
    found, image = encoder(noise(built(flat)), (16, 16)), volume(3, 16, 16)
    _, stitched = maps(found, image)
    with torch.no_grad():
        expected = found.backbone.features(image.transpose(0, 1))
    for stage, by_hand in enumerate(expected):
        assert stitched[stage].shape == by_hand.transpose(0, 1).shape
        assert (stitched[stage] - by_hand.transpose(0, 1)).abs().max() < 1e-5 * by_hand.abs().max()


def test_a_patch_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(UserError, match="must be a multiple of 4"):
        encoder(network("plain"), (15, 16, 16))
