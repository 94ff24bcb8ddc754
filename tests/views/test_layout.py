import math
from itertools import product
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl_ext.errors import UserError
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.views.layout import Layout, cut_patches, magnification, solve_layout, standardise
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.rows import Rows, solve_rows

#: Strides of each stage, least case edges, and whether the encoder is residual.
PLANS = {
    "hippocampus": ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], (35, 50, 36), False),
    "left atrium": ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]], (44, 71, 96), False),
    "128^3, six stages": ([[1, 1, 1]] + 5 * [[2, 2, 2]], (128, 128, 128), True),
    "anisotropic": ([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]], (18, 237, 208), False),
}
CHOICES: dict[str, dict[str, Any]] = {
    "jigsaw": {"fewest": 4, "most_voxels": 2.0},
    "relative location": {"fewest": 3, "choices": (1, 3)},
}
COMMON: dict[str, Any] = {"title": "it", "gap": 0.25, "jitter": 0.125, "most_zoom": 2.0}


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
    if "most_voxels" in options:
        options["most_voxels"] *= math.prod(case_size)
    layout = solve_layout(cumulated(strides), case_size, **COMMON, **options)
    assert layout.stages == len(strides)
    assert math.prod(layout.cells) >= options["fewest"]
    assert 1 <= layout.zoom <= 2
    for window, case in zip(layout.window, case_size, strict=True):
        assert window / layout.zoom <= case + 1e-6
    for patch, gap, jitter, total in zip(layout.patch, layout.gap, layout.jitter, cumulated(strides)[-1], strict=True):
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
        columns=2,
        most_zoom=2.0,
        most_voxels=2 * math.prod(case_size),
    )
    assert layout.stages == len(strides)
    assert layout.axes
    assert len({layout.beside(axis) for axis in layout.axes}) == 1
    starts = layout.starts(torch.arange(2 * len(layout.axes)), torch.full((2 * len(layout.axes), 3), 1 - 2.0**-24))
    assert starts.shape == (2 * len(layout.axes), 4 * layout.beside(layout.axes[0]), 3)
    assert (starts >= 0).all()
    assert (starts + torch.tensor(layout.patch) <= torch.tensor(layout.window)).all()
    assert magnification(layout.window, case_size) == layout.zoom <= 2


def test_context_and_prediction_share_no_voxel_unless_no_row_is_skipped() -> None:
    def shared(rows: Rows) -> bool:
        first, last = rows.read[rows.context - 1], rows.read[rows.context]
        return first * rows.pitch(16) + 16 > last * rows.pitch(16)

    assert shared(Rows(2, 0, 2, 0.5))
    assert not shared(Rows(2, 1, 2, 0.5))
    assert not shared(Rows(2, 0, 2, 0.0))
    with pytest.raises(UserError, match="it: with overlap 0.5 and 0 skipped rows, context and prediction share voxels"):
        solve_rows(
            [(1, 1, 1), (8, 8, 8)], (99,) * 3, Rows(2, 0, 2, 0.5), title="it", columns=2, most_zoom=2, most_voxels=1e9
        )


def test_rows_run_along_every_direction() -> None:
    layout = solve_rows(
        [(4, 4, 4)], (24, 24, 24), Rows(1, 1, 1, 0.5), title="it", columns=2, most_zoom=1, most_voxels=1e9
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
    free = solve_layout(strides, (128,) * 3, **COMMON, fewest=4)
    bound = solve_layout(strides, (128,) * 3, **COMMON, fewest=4, most_voxels=2 * 128**3)
    assert free.cells == (3, 3, 3)
    assert math.prod(bound.cells) * 64**3 <= 2 * 128**3 < math.prod(free.cells) * 64**3


def test_a_shallower_stage_where_the_deepest_does_not_fit() -> None:
    strides = cumulated(PLANS["128^3, six stages"][0])
    layout = solve_layout(strides, (48, 48, 48), **COMMON, fewest=4)
    assert layout.stages < 6
    assert layout.patch == tuple(2 * stride for stride in strides[layout.stages - 1])


def test_one_line_where_nothing_fits() -> None:
    with pytest.raises(
        UserError, match=r"it needs 4 patches of \(8, 8, 8\) voxels side by side, but cases of"
    ) as error:
        solve_layout(cumulated(PLANS["hippocampus"][0]), (6, 6, 6), **COMMON, fewest=4)
    assert "\n" not in str(error.value)


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
    patches = cut_patches(image, starts.flatten(1, 2), layout.patch)
    for sample, (cell, place) in product(range(60), enumerate(product(range(3), range(2)))):
        z, y, x = starts[sample, place[0], place[1]].tolist()
        assert torch.equal(patches[sample, cell], image[sample, :, z : z + 8, y : y + 8, x : x + 4])


def test_standardised_patches() -> None:
    patches = 3 * torch.randn(2, 4, 1, 6, 6, 6) + 7
    patches[0, 0] = 5
    result = standardise(patches)
    assert not result[0, 0].any()
    deviation, mean = torch.std_mean(result[1], (-3, -2, -1), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.ones_like(deviation))
