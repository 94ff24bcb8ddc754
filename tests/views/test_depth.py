"""2-D images as volumes."""

import torch

from nnssl_ext.views.depth import colors_as_depth
from nnssl_ext.views.random import BatchRandom

CPU = torch.device("cpu")


def images(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 255


def draws(batch: int = 3) -> BatchRandom:
    return BatchRandom(0, 0, list(range(batch)), CPU)


def test_colours_are_slices_in_some_order() -> None:
    pixels = images(8)
    volume = colors_as_depth(pixels, draws(8))
    assert volume.shape == (8, 1, 3, 12, 20)
    assert torch.equal(volume[:, 0].sort(1).values, pixels.sort(1).values)
    assert not torch.equal(volume[:, 0], pixels)
