import numpy as np
import pytest
import torch

from nnssl_ext.views import multicrop
from nnssl_ext.views.appearance import IntensitySettings
from nnssl_ext.views.multicrop import ViewKind, draw_patch_masks, draw_views, look_at
from nnssl_ext.views.random import BatchRandom
from nnssl_ext.views.spatial import SourceBox, SpatialRange
from tests.support.looks import without_views

CPU = torch.device("cpu")
REGION = (20, 30, 30)
OFF = without_views(IntensitySettings)


def crop_views(boxes: list, region: tuple, of: ViewKind, looks: IntensitySettings, random: BatchRandom) -> torch.Tensor:
    return look_at(draw_views(boxes, region, of, random), of, looks, random)


def places(scale: float = 1.0) -> SourceBox:
    """A region whose channels are the coordinates of its voxels, with nothing around it."""
    edges = [round((edge - 1) * scale) + 1 for edge in REGION]
    grid = np.stack(np.meshgrid(*(np.arange(edge, dtype=np.float32) for edge in edges), indexing="ij"))
    return SourceBox(torch.from_numpy(grid), np.eye(3) * scale, (np.asarray(edges) - 1) / 2)


def kind(
    size: tuple[int, int, int],
    area: tuple[float, float],
    depth: tuple[float, float],
    flip: float = 0.0,
    rot90: float = 0.0,
) -> ViewKind:
    return ViewKind(3, size, area, depth, SpatialRange((1.0, 1.0, 1.0), flip, rot90))


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("size", [REGION, (10, 12, 12)])
def test_views_show_the_share_that_was_asked_for_and_no_padding(size: tuple[int, int, int], scale: float) -> None:
    random = BatchRandom(0, 2, range(6), CPU)
    box = places(scale)
    views = crop_views([box] * 6, REGION, kind(size, (0.16, 0.49), (0.2, 0.5)), OFF, random)
    assert views.shape == (6, 3, 3, *size)
    # from the first voxel's center to the last's, as a share of the region's
    first, last = views[..., 0, 0, 0], views[..., -1, -1, -1]
    share = (last - first) / (torch.tensor(box.data.shape[1:]) - 1)
    assert (share[..., 0] > 0.19).all()
    assert (share[..., 0] < 0.51).all()
    assert (share[..., 1:] > 0.39).all()
    assert (share[..., 1:] < 0.71).all()
    assert torch.allclose(share[..., 1], share[..., 2], atol=1e-3)
    assert share.flatten(0, 1).std(0).min() > 0.03
    # coordinates run on linearly to the border: nothing outside was read
    for axis in range(3):
        steps = views.select(2, axis).diff(dim=axis + 2)
        assert torch.allclose(steps, steps.mean((2, 3, 4), keepdim=True).expand_as(steps), atol=1e-3)
    assert first.flatten(0, 1).std(0).min() > 0.5  # from different places


def test_views_are_turned_and_look_different() -> None:
    random = BatchRandom(0, 2, range(8), CPU)
    views = crop_views([places()] * 8, REGION, kind((12, 12, 12), (0.3, 1.0), (0.3, 1.0), flip=0.5), OFF, random)
    rising = (views[:, :, 0, -1] - views[:, :, 0, 0]).mean((2, 3)) > 0
    assert 0 < rising.float().mean() < 1
    looks = without_views(IntensitySettings, gamma_probability=1.0)
    one = kind(REGION, (1.0, 1.0), (1.0, 1.0))
    bent = crop_views([places()], REGION, one, looks, BatchRandom(0, 2, [0], CPU))
    assert not torch.allclose(bent[:, 0], bent[:, 1])


def test_a_sample_draws_the_same_in_any_batch() -> None:
    of = kind((12, 12, 12), (0.3, 1.0), (0.3, 1.0), flip=0.5, rot90=0.5)
    together = crop_views([places()] * 3, REGION, of, IntensitySettings(), BatchRandom(5, 2, [7, 8, 9], CPU))
    alone = crop_views([places()], REGION, of, IntensitySettings(), BatchRandom(5, 2, [8], CPU))
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize(("tries", "most"), [(32, 0.05), (1, 0.95)])
def test_views_of_nothing_but_air_are_drawn_again(monkeypatch: pytest.MonkeyPatch, tries: int, most: float) -> None:
    monkeypatch.setattr(multicrop, "CONSTANT_TRIES", tries)
    data = torch.full((1, *REGION), -1.0)
    data[:, :6, :10, :10] = torch.rand(1, 6, 10, 10, generator=torch.Generator().manual_seed(0))
    corner = SourceBox(data, np.eye(3), (np.asarray(REGION) - 1) / 2)
    random = BatchRandom(0, 2, range(40), CPU)
    views = crop_views([corner] * 40, REGION, kind((6, 8, 8), (0.1, 0.3), (0.2, 0.4)), OFF, random)
    empty = (views.flatten(2).std(2) < 1e-3).float().mean()
    assert most - 0.4 < empty < most
    # a region without anything is shown as it is
    nothing = SourceBox(torch.zeros(1, *REGION), np.eye(3), (np.asarray(REGION) - 1) / 2)
    alone = BatchRandom(0, 2, [0], CPU)
    assert crop_views([nothing], REGION, kind((6, 8, 8), (0.1, 0.3), (0.2, 0.4)), OFF, alone).std() < 1e-3


def test_masks_hide_what_was_asked_for() -> None:
    masks = draw_patch_masks(BatchRandom(0, 2, range(200), CPU), 2, 100, 0.5, (0.2, 0.75))
    share = masks.float().mean(-1)
    assert masks.shape == (200, 2, 100)
    assert 0.4 < (share > 0).float().mean() < 0.6
    hiding = share[share > 0]
    assert hiding.min() >= 0.2
    assert hiding.max() <= 0.75
    assert hiding.mean().item() == pytest.approx(0.475, abs=0.04)
    assert masks.float().mean((0, 1)).std() < 0.05  # no place is preferred


@pytest.mark.parametrize(
    ("probability", "ratio", "expected"), [(0.0, (0.5, 0.5), 0), (1.0, (1.0, 1.0), 8), (1, (0, 0), 1)]
)
def test_none_all_and_at_least_one(probability: float, ratio: tuple[float, float], expected: int) -> None:
    masks = draw_patch_masks(BatchRandom(0, 2, range(5), CPU), 2, 8, probability, ratio)
    assert (masks.sum(-1) == expected).all()
