from dataclasses import replace
from typing import Any

import pytest
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnssl_ext.methods import DataGeometry
from nnssl_ext.methods.dino.dino import DINO
from nnssl_ext.methods.dino.settings import DINOSettings, patch_level
from nnssl_ext.networks.backbone import backbone_of

SMALL = replace(DINOSettings(), hidden_dim=16, bottleneck_dim=8, prototypes=32)


@pytest.mark.parametrize(
    ("crop", "strides", "expected"),
    [
        ((64, 64, 64), ((1,) * 3, (2,) * 3, (4,) * 3, (8,) * 3, (16,) * 3, (32,) * 3), (16, 16, 16)),
        # 16 would leave four patches
        ((16, 32, 32), ((1,) * 3, (2,) * 3, (4,) * 3, (8,) * 3, (8, 16, 16)), (8, 8, 8)),
        ((8, 128, 128), ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16), (1, 32, 32)), (1, 16, 16)),
        # the last stage strides along the depth alone, and would leave 18 patches
        ((4, 24, 24), ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8), (2, 8, 8)), (1, 8, 8)),
        ((16, 16, 16), ((1,) * 3, (2,) * 3, (4,) * 3, (8,) * 3), (4, 4, 4)),
        ((96, 96, 96), ((16,) * 3,), (16, 16, 16)),
    ],
)
def test_a_crop_has_enough_patches(crop: Any, strides: Any, expected: Any) -> None:
    plan = DataGeometry(crop, (1.0, 1.0, 1.0), 1, strides)
    assert strides[patch_level(SMALL, plan)] == expected
    # the deepest map of a stride that is asked for is taken, however few patches that leaves
    deepest = [stride for stride in strides if max(stride) <= max(expected)][-1]
    assert strides[patch_level(replace(SMALL, token_stride=max(expected)), plan)] == deepest


def test_patches_are_those_of_the_chosen_stage() -> None:
    """The deepest stage strides along the depth alone. It has the same largest stride and half the patches."""
    steps = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2], [2, 1, 1]]
    common: dict[str, Any] = {"input_channels": 1, "num_classes": 2, "conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d}
    stages: dict[str, Any] = {"n_stages": 5, "features_per_stage": [2] * 5, "strides": steps, "kernel_sizes": 3}
    blocks: dict[str, Any] = {"n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1, "nonlin": nn.LeakyReLU}
    backbone = backbone_of(PlainConvUNet(**common, **stages, **blocks))
    plan = DataGeometry((4, 24, 24), (1.0, 1.0, 1.0), 1, tuple(backbone.strides))
    assert DINO(backbone, SMALL, plan).grid == (4, 3, 3)
