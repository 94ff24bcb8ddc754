import pytest
import torch

from nnssl_ext.views.fusion import BoxLayout, GridLayout, MissingNoise, fuse, noise_variance, some_rows
from nnssl_ext.views.random import VIEWS, BatchRandom

CPU = torch.device("cpu")


def random(samples: int = 4) -> BatchRandom:
    return BatchRandom(0, VIEWS, list(range(samples)), CPU)


def painted_one_by_one(layout: BoxLayout, size: tuple[int, int, int]) -> torch.Tensor:
    result = torch.zeros(len(layout.level), *size, dtype=torch.uint8)
    for sample, levels in enumerate(layout.level):
        for box, level in enumerate(levels):
            if level:
                low, high = layout.low[sample, box], layout.high[sample, box]
                result[sample, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = int(level)
    return result


@pytest.mark.parametrize("count", [(10, 40), (52, 52), (1, 1)])
def test_boxes_equal_painting_them_one_by_one(count: tuple[int, int]) -> None:
    size = (12, 20, 24)
    layout = BoxLayout.draw(random(), size, 4, count, (0.1, 0.6), (1, 2, 2))
    assert torch.equal(layout.paint(size, CPU), painted_one_by_one(layout, size))


def test_boxes_keep_their_limits() -> None:
    size = (16, 32, 32)
    layout = BoxLayout.draw(random(50), size, 4, (10, 40), (0.125, 0.5), (1, 6, 2))
    edge = layout.high - layout.low
    for axis, (least, most) in enumerate(((2, 8), (6, 16), (4, 16))):
        assert edge[..., axis].min() == least
        assert edge[..., axis].max() == most
        assert layout.low[..., axis].min() == 0
        assert layout.high[..., axis].max() == size[axis]
    present = (layout.level > 0).sum(1)
    assert 10 <= present.min() <= present.max() <= 40
    assert set(layout.level.unique().tolist()) == {0, 1, 2, 3, 4}


def test_background_share_is_the_papers() -> None:
    """arXiv 2306.16925's sampler leaves 49 % background on average and 27-72 % between the 5th and 95th percentile.

    Ours has the mean and the upper end; its lower end is 35 %, because boxes never hang over the crop's border.
    """
    size = (64, 128, 128)
    shares = []
    for start in range(0, 120, 10):
        r = BatchRandom(0, VIEWS, list(range(start, start + 10)), CPU)
        levels = BoxLayout.draw(r, size, 4, (10, 40), (0.0625, 0.625), (8, 8, 8)).paint(size, CPU)
        shares.append((levels == 0).float().mean((1, 2, 3)))
    share = torch.cat(shares)
    assert share.mean().item() == pytest.approx(0.49, abs=0.03)
    assert share.quantile(0.05).item() == pytest.approx(0.35, abs=0.04)
    assert share.quantile(0.95).item() == pytest.approx(0.70, abs=0.04)


def test_grid_is_made_of_blocks() -> None:
    size = (16, 24, 24)
    layout = GridLayout.draw(random(60), size, 4, ((2, 4), (8, 12), (8, 12)), 0.7)
    levels = layout.paint(size, CPU)
    assert levels.dtype == torch.uint8
    for sample in range(60):
        # along an axis the level changes at block borders only, which are the same everywhere
        for axis in range(3):
            change = levels[sample].long().diff(dim=axis).ne(0)
            places = torch.nonzero(change.any(tuple(a for a in range(3) if a != axis))).flatten()
            edge, offset = int(layout.edge[sample, axis]), int(layout.offset[sample, axis])
            assert all((int(place) + 1 + offset) % edge == 0 for place in places)
    assert (levels > 0).float().mean().item() == pytest.approx(0.7, abs=0.05)
    assert set(levels.unique().tolist()) == {0, 1, 2, 3, 4}


def test_whole_blocks_are_no_longer_than_the_crop() -> None:
    """In longer ones no sample would have any foreground."""
    size = (12, 40, 40)
    levels = GridLayout.draw(random(40), size, 4, ((8, 32),) * 3, 1.0, whole=True).paint(size, CPU)
    assert (levels > 0).flatten(1).any(1).all()


def test_fusion_is_the_convex_combination() -> None:
    foreground, background = torch.full((1, 1, 1, 1, 5), 8.0), torch.full((1, 1, 1, 1, 5), 4.0)
    level = torch.arange(5, dtype=torch.uint8).reshape(1, 1, 1, 5)
    assert fuse(foreground, background, level, 4).flatten().tolist() == [4, 5, 6, 7, 8]


def test_voxels_that_are_alike_are_ignored_and_fused_all_the_same() -> None:
    foreground = torch.randn(2, 2, 5, 200, 200, generator=torch.Generator().manual_seed(0))
    background = foreground + torch.where(torch.arange(5) < 3, 0.05, 0.5)[:, None, None]
    background[:, 1, 0] += 1
    level = torch.randint(0, 5, (2, 5, 200, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = level.clone()
    expected = torch.lerp(background, foreground, before[:, None] / 4)
    assert torch.equal(fuse(foreground, background, level, 4, 0.1, 9), expected)
    assert (level[:, 1:3] == 9).all()
    for plane in (0, 3, 4):
        assert torch.equal(level[:, plane], before[:, plane])


def noisy(deviation: float, seed: int) -> torch.Tensor:
    """A ball with soft tissue contrast, in noise."""
    places = torch.linspace(-1, 1, 64)
    radius = torch.stack(torch.meshgrid(places, places, places, indexing="ij")).square().sum(0)
    noise = torch.randn(1, 2, 64, 64, 64, generator=torch.Generator().manual_seed(seed))
    return (radius < 0.5).float() * 2 + deviation * noise


def test_noise_is_measured_beside_edges_and_air() -> None:
    image = noisy(0.3, 0)
    assert noise_variance(some_rows(image))[0].tolist() == pytest.approx([0.09, 0.09], rel=0.15)
    image[..., :32] = 0.0
    assert noise_variance(some_rows(image))[0].tolist() == pytest.approx([0.09, 0.09], rel=0.15)
    # interpolated air that is not zero has rounding errors
    image[..., :40] = -1.37 + 1e-7 * torch.randn(image[..., :40].shape, generator=torch.Generator().manual_seed(0))
    assert noise_variance(some_rows(image))[0].tolist() == pytest.approx([0.09, 0.09], rel=0.35)
    assert noise_variance(torch.ones(1, 1, 8, 8, 8)).item() == 0
    assert noise_variance(torch.ones(1, 1, 8, 8, 2)).item() == 0


@pytest.mark.parametrize("device_source", [False, True])
def test_missing_noise_fills_up_to_the_noisier_crop(device_source: bool) -> None:
    front, back = noisy(0.1, 1), noisy(0.4, 2)
    source = random(1)
    missing = MissingNoise(front, back, 4, source)
    share = torch.arange(5) / 4
    expected = (0.16 - (share**2 * 0.01 + (1 - share) ** 2 * 0.16)).sqrt()
    torch.testing.assert_close(missing.deviation[0, 0, 1, 1], expected, rtol=0.1, atol=0.02)
    if device_source:  # what other devices than the CPU use
        missing._sources = [source.noise(0)]
    level = torch.full((1, 64, 64, 64), 2, dtype=torch.uint8)
    plain = fuse(front, back.clone(), level.clone(), 4)
    added = fuse(front, back.clone(), level.clone(), 4, missing=missing) - plain
    assert added.std().item() == pytest.approx(missing.deviation[0, :, 1, 1, 2].mean().item(), rel=0.01)
    assert abs(added.mean().item()) < 0.005
    assert abs(torch.corrcoef(added.flatten(2)[0])[0, 1].item()) < 0.01  # channels have noise of their own


def test_ignored_voxels_get_the_noise_of_their_level() -> None:
    front = noisy(0.3, 1)
    level = torch.full((1, 64, 64, 64), 2, dtype=torch.uint8)
    mixed = fuse(front, front.clone(), level, 4, 0.05, missing=MissingNoise(front, front, 4, random(1)))
    assert (level == 255).all()
    assert (mixed - front).std().item() == pytest.approx(0.3 / 2**0.5, rel=0.05)


@pytest.mark.parametrize("masked", [False, True])
def test_noise_in_constant_air_does_not_tell_the_level(masked: bool) -> None:
    """Where a crop is constant it has no noise, and a fusion takes none away."""
    front, back = noisy(0.3, 1), noisy(0.3, 2)
    for crop, air in ((front, slice(0, 32)), (back, slice(16, 48))):  # of both from 16 to 32
        crop[..., air, :] = 0 if masked else crop.min() - 1
    deviations = []
    for level in range(5):
        levels = torch.full((1, 64, 64, 64), level, dtype=torch.uint8)
        mixed = fuse(front, back.clone(), levels, 4, missing=MissingNoise(front, back, 4, random(1), [masked] * 2))
        aside = mixed[:, :, :8]  # of the ball
        deviations.append([aside[..., first : first + 16, :].std().item() for first in range(0, 64, 16)])
    for level, found in enumerate(deviations):
        assert found[1] < 1e-4, level
        assert [found[0], *found[2:]] == pytest.approx([0.3] * 3, rel=0.1), level
