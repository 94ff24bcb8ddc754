import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl_ext.errors import UserError
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.views.layout import Layout, cut_patches, magnification, solve_layout, standardize
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.rows import Rows, solve_rows
from nnssl_ext.views.spatial import SourceBox, crop_box

CPU = torch.device("cpu")

#: Strides of each stage, least case edges, and whether the encoder is residual.
PLANS = {
    "hippocampus": ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], (35, 50, 36), False),
    "left atrium": ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]], (44, 71, 96), False),
    "128^3, six stages": ([[1, 1, 1]] + 5 * [[2, 2, 2]], (128, 128, 128), True),
    "anisotropic": ([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]], (18, 237, 208), False),
}
CHOICES: dict[str, dict[str, Any]] = {
    "jigsaw": {"min_patches": 4, "max_voxels": 2.0},
    "relative location": {"min_patches": 3, "choices": (1, 3)},
}
COMMON: dict[str, Any] = {"title": "it", "gap": 0.25, "jitter": 0.125, "max_zoom": 2.0}
ROWS: dict[str, Any] = {"title": "it", "max_columns": 2, "max_zoom": 2.0, "max_voxels": 1e9}


def cumulated(strides: list) -> list[tuple[int, ...]]:
    return [tuple(math.prod(step[a] for step in strides[: n + 1]) for a in range(3)) for n in range(len(strides))]


def thin_network(strides: list, residual: bool) -> nn.Module:
    """A network with these strides and the fewest features."""
    common = {
        "input_channels": 1,
        "n_stages": len(strides),
        "features_per_stage": [2] * len(strides),
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": strides,
        "num_classes": 2,
        "n_conv_per_stage_decoder": 1,
        "norm_op": nn.InstanceNorm3d,
        "nonlin": nn.LeakyReLU,
        "conv_bias": True,
        "norm_op_kwargs": {},
        "nonlin_kwargs": {},
    }
    if residual:
        return ResidualEncoderUNet(n_blocks_per_stage=1, **common)
    return PlainConvUNet(n_conv_per_stage=1, **common)


@pytest.mark.parametrize("task", CHOICES)
@pytest.mark.parametrize("plan", PLANS)
def test_layouts_are_legal_on_every_kind_of_plan(plan: str, task: str) -> None:
    strides, case_size, residual = PLANS[plan]
    options = dict(CHOICES[task])
    if "max_voxels" in options:
        options["max_voxels"] *= math.prod(case_size)
    layout = solve_layout(cumulated(strides), case_size, **COMMON, **options)
    assert layout.stages >= len(strides) - 1
    assert layout.zoom == 1  # the network sees the plan's resolution
    assert math.prod(layout.grid) >= options["min_patches"]
    for window, case in zip(layout.window, case_size, strict=True):
        assert window / layout.zoom <= case + 1e-6
    for patch, gap, jitter, total in zip(
        layout.patch, layout.gap, layout.jitter, cumulated(strides)[layout.stages - 1], strict=True
    ):
        assert patch == 2 * total
        assert gap >= patch / 4
        assert jitter >= patch / 8

    # and the encoder takes all patches at once, with two voxels per axis left
    backbone = backbone_of(thin_network(strides, residual))
    features = backbone.features(torch.randn(2, 1, *layout.patch), layout.stages)
    assert tuple(features[-1].shape[2:]) == (2, 2, 2)


@pytest.mark.parametrize("plan", PLANS)
def test_rows_are_legal_on_every_kind_of_plan(plan: str) -> None:
    strides, case_size, _ = PLANS[plan]
    layout = solve_rows(
        cumulated(strides),
        case_size,
        Rows(2, 1, 2, 0.5),
        title="it",
        max_columns=2,
        max_zoom=2.0,
        max_voxels=2 * math.prod(case_size),
    )
    assert layout.stages >= len(strides) - 1
    assert layout.zoom == 1
    assert layout.axes
    assert len({layout.columns_of(axis) for axis in layout.axes}) == 1
    starts = layout.starts(torch.arange(2 * len(layout.axes)), torch.full((2 * len(layout.axes), 3), 1 - 2.0**-24))
    assert starts.shape == (2 * len(layout.axes), 4 * layout.columns_of(layout.axes[0]), 3)
    assert (starts >= 0).all()
    assert (starts + torch.tensor(layout.patch) <= torch.tensor(layout.window)).all()
    assert magnification(layout.window, case_size) == layout.zoom <= 2


@pytest.mark.parametrize(("skipped", "overlap"), [(0, 0.5), (1, 0.5), (0, 0.0), (3, 0.5)])
@pytest.mark.parametrize(("gap", "room"), [(0.0, 0), (0.25, 0), (0.25, 2)])
def test_context_and_prediction_are_apart(skipped: int, overlap: float, gap: float, room: int) -> None:
    rows, edge = Rows(2, skipped, 2, overlap, gap, room), 16
    first, last = (rows.begin(row, edge) for row in (rows.read[1], rows.read[2]))
    assert last - (first + edge) >= gap * edge + room
    assert rows.begin(rows.read[-1], edge) + edge == rows.length(edge)
    assert last - (first + edge) == max(gap * edge + room, (skipped + 1) * rows.pitch(edge) - edge)


def test_rows_run_along_every_direction() -> None:
    layout = solve_rows(
        [(4, 4, 4)], (24, 24, 24), Rows(1, 1, 1, 0.5), title="it", max_columns=2, max_zoom=1, max_voxels=1e9
    )
    assert layout.axes == (0, 1, 2)
    starts = layout.starts(torch.arange(6), torch.zeros(6, 3)).view(6, 2, 4, 3)
    for direction in range(6):
        step = (starts[direction, 1] - starts[direction, 0]).unique(dim=0)
        expected = torch.zeros(1, 3, dtype=torch.int64)
        expected[0, direction // 2] = -8 if direction % 2 else 8
        assert torch.equal(step, expected)


def test_fewer_patches_where_they_would_cost_too_much() -> None:
    strides = cumulated(PLANS["128^3, six stages"][0])
    free = solve_layout(strides, (128,) * 3, **COMMON, min_patches=4)
    bound = solve_layout(strides, (128,) * 3, **COMMON, min_patches=4, max_voxels=128**3 / 4)
    assert free.grid == (3, 3, 3)
    assert free.patch == bound.patch == (32, 32, 32)
    assert math.prod(bound.grid) * 32**3 <= 128**3 / 4 < math.prod(free.grid) * 32**3


def test_a_shallower_stage_where_the_deepest_does_not_fit() -> None:
    strides = cumulated(PLANS["128^3, six stages"][0])
    layout = solve_layout(strides, (48, 48, 48), **COMMON, min_patches=4)
    assert layout.stages < 6
    assert layout.zoom == 1
    assert layout.patch == tuple(2 * stride for stride in strides[layout.stages - 1])


def test_magnified_only_where_no_stage_fits() -> None:
    strides = cumulated(PLANS["hippocampus"][0])
    layout = solve_layout(strides, (14, 14, 14), **COMMON, min_patches=4)
    assert layout.patch == (8, 8, 8)  # the shallowest stage that shows anything
    assert 1 < layout.zoom <= 2
    rows = solve_rows(strides, (16, 16, 16), Rows(2, 1, 2, 0.5), **ROWS)
    assert rows.patch == (8, 8, 8)
    assert 1 < rows.zoom <= 2


def test_one_line_where_nothing_fits() -> None:
    with pytest.raises(
        UserError, match=r"it needs 4 patches of \(8, 8, 8\) voxels side by side, but cases of"
    ) as error:
        solve_layout(cumulated(PLANS["hippocampus"][0]), (6, 6, 6), **COMMON, min_patches=4)
    assert "\n" not in str(error.value)
    # and cases of the size that it names are enough
    (needed,) = re.findall(r"cases of (\d+) x (\d+) x (\d+) would do", str(error.value))
    solve_layout(cumulated(PLANS["hippocampus"][0]), [int(edge) for edge in needed], **COMMON, min_patches=4)
    for plan in PLANS:
        with pytest.raises(UserError, match="it needs 5 rows") as error:
            solve_rows(cumulated(PLANS[plan][0]), (3, 3, 3), Rows(2, 1, 2, 0.5, 0.25), **ROWS)
        (needed,) = re.findall(r"cases of (\d+) x (\d+) x (\d+) would do", str(error.value))
        solve_rows(cumulated(PLANS[plan][0]), [int(edge) for edge in needed], Rows(2, 1, 2, 0.5, 0.25), **ROWS)


def test_rows_run_along_the_axes_that_the_largest_magnification_leaves() -> None:
    """The short axis would need more for the shifts of the patches, and the others need less."""
    layout = solve_rows(cumulated(PLANS["hippocampus"][0]), (14, 24, 24), Rows(2, 1, 2, 0.5, 0.25), **ROWS)
    assert layout.axes == (1, 2)
    assert layout.zoom < 1.5


def test_patches_keep_their_distance_and_are_jittered() -> None:
    layout = Layout((3, 2, 1), (8, 8, 4), (2, 3, 1), (2, 1, 1), 1, 1.0)
    starts = layout.starts(BatchRandom(0, VIEWS, list(range(60)), torch.device("cpu"))).view(60, 3, 2, 3)
    assert starts.amin() >= 0
    assert (starts + torch.tensor(layout.patch) <= torch.tensor(layout.window)).all()
    for axis, least in ((0, 8 + 2), (1, 8 + 3)):
        distance = starts.diff(dim=1 + axis)[..., axis]
        assert distance.min() == least
        assert distance.max() > least
    image = torch.randn(60, 1, *layout.window)
    centre = (np.asarray(layout.window) - 1) / 2
    for sample, window in enumerate(image):
        box, places = SourceBox(window, np.eye(3), centre), starts[sample].flatten(0, 1)
        patches = cut_patches([box], layout.window, places[None], layout.patch, torch.rand(1, 6, 3), CPU)[0]
        for patch, (z, y, x) in zip(patches, places.tolist(), strict=True):
            assert torch.equal(patch, window[:, z : z + 8, y : y + 8, x : x + 4])


MAGNIFIED = Layout((2, 2, 2), (8, 8, 8), (4, 4, 4), (1, 1, 1), 1, 1.6)


def magnified(data: torch.Tensor, layout: Layout = MAGNIFIED) -> SourceBox:
    """A box that holds the window of a layout exactly."""
    scale = (np.asarray(data.shape[1:]) - 1) / (np.asarray(layout.window) - 1)
    return SourceBox(data, np.diag(scale), (np.asarray(data.shape[1:]) - 1) / 2)


def test_patches_of_a_magnified_window_lie_within_a_voxel_of_their_place() -> None:
    edge = round((MAGNIFIED.window[0] - 1) / MAGNIFIED.zoom) + 1
    grid = torch.stack(torch.meshgrid(*(torch.arange(edge, dtype=torch.float32),) * 3, indexing="ij"))
    box, random = magnified(grid), BatchRandom(0, VIEWS, list(range(40)), CPU)
    starts, scale = MAGNIFIED.starts(random), (edge - 2) / (MAGNIFIED.window[0] - 1)
    shifts = torch.rand(40, 8, 3, generator=torch.Generator().manual_seed(0))
    for places, shift in zip(starts, shifts, strict=True):
        patches = cut_patches([box], MAGNIFIED.window, places[None], MAGNIFIED.patch, shift[None], CPU)[0]
        assert torch.allclose(patches[:, :, 0, 0, 0], places * scale + shift, atol=1e-4)
        assert torch.allclose(patches[:, :, -1, -1, -1], (places + 7) * scale + shift, atol=1e-4)
        assert 0 <= patches.min() <= patches.max() <= edge - 1  # and nothing outside is read
    # a neighbour is never nearer than the gap that was asked for, which MAGNIFIED has with 2 voxels for that
    distance = starts.view(40, 2, 2, 2, 3).diff(dim=1)[..., 0] * scale - 7 * scale - 1
    assert distance.min() / scale >= 2 - 1


def told_by_variance(layout: Layout, whole: bool) -> float:
    """How often white noise tells from which of eight places of a window a patch is; chance is 0.125.

    Args:
        layout: Magnified.
        whole: Resample the window as one, as is done without thinking.
    """
    edge, generator = round((layout.window[0] - 1) / layout.zoom) + 1, np.random.default_rng(0)
    random = BatchRandom(0, VIEWS, list(range(300)), CPU)
    found = []
    for places, moved in zip(layout.starts(random), random.uniform(0, 1, (8, 3)), strict=True):
        box = magnified(torch.from_numpy(generator.standard_normal((1, edge, edge, edge)).astype(np.float32)), layout)
        if whole:
            box = SourceBox(crop_box(box, layout.window, CPU)[0], np.eye(3), (np.asarray(layout.window) - 1) / 2)
        found.append(cut_patches([box], layout.window, places[None], layout.patch, moved[None], CPU)[0])
    power = torch.stack(found)[:, :, 0].square()  # (300, 8, D, H, W)
    # smoothing along the three axes multiplies
    lines = [power[:200].mean((0, *(2 + other for other in range(3) if other != axis))) for axis in range(3)]
    expected = torch.einsum("cz,cy,cx->czyx", *(line / line.mean() for line in lines))
    scores = -(power[200:, :, None] / expected + expected.log()).sum((-3, -2, -1))
    return (scores.argmax(-1) == torch.arange(8)).float().mean().item()


@pytest.mark.parametrize(
    "layout",
    [
        Layout((2, 2, 2), (8, 8, 8), (4, 4, 4), (0, 0, 0), 1, 1.6),
        Layout((2, 2, 2), (16, 16, 16), (6, 6, 6), (2, 2, 2), 1, 1.18),
    ],
)
def test_interpolation_tells_the_place_in_a_window_that_is_resampled_as_one_and_not_in_ours(layout: Layout) -> None:
    assert told_by_variance(layout, whole=True) > 0.5
    assert told_by_variance(layout, whole=False) < 0.17


def test_standardized_patches() -> None:
    patches = 3 * torch.randn(2, 4, 1, 6, 6, 6) + 7
    patches[0, 0] = 5
    result = standardize(patches)
    assert not result[0, 0].any()
    deviation, mean = torch.std_mean(result[1], (-3, -2, -1), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.ones_like(deviation))
