import pytest
import torch

from nnssl_ext.views.masking import block_moments, draw_block_mask, expand_blocks
from nnssl_ext.views.random import VIEWS, BatchRandom


def random(samples: int) -> BatchRandom:
    return BatchRandom(0, VIEWS, list(range(samples)), torch.device("cpu"))


@pytest.mark.parametrize(("size", "block"), [((16, 16, 16), (4, 4, 4)), ((10, 12, 7), (3, 4, 2))])
def test_whole_blocks_are_hidden_in_the_right_number(size: tuple, block: tuple) -> None:
    mask = draw_block_mask(random(5), size, block, 0.75)
    assert mask.shape == (5, *size)
    cells = mask[:, :: block[0], :: block[1], :: block[2]]
    assert torch.equal(expand_blocks(cells, size, block), mask)
    assert cells.flatten(1).sum(1).unique().tolist() == [round(0.75 * cells[0].numel())]
    assert not torch.equal(mask[0], mask[1])


def test_never_all_and_never_none() -> None:
    for ratio, expected in ((0.01, 1), (0.99, 7)):
        assert draw_block_mask(random(1), (4, 4, 4), (2, 2, 2), ratio)[0, ::2, ::2, ::2].sum() == expected


def test_every_block_is_hidden_equally_often() -> None:
    share = draw_block_mask(random(2000), (4, 4, 4), (2, 2, 2), 0.5).float().mean(0)
    assert (share - 0.5).abs().max() < 0.06


def test_moments_are_those_of_each_block_cut_off_ones_too() -> None:
    image = torch.randn(2, 2, 7, 6, 5, generator=torch.Generator().manual_seed(0))
    mean, variance = block_moments(image, (3, 4, 2))
    assert mean.shape == variance.shape == (2, 2, 3, 2, 3)
    for corner, place in (
        ((0, 0, 0), (slice(0, 3), slice(0, 4), slice(0, 2))),
        ((2, 1, 2), (slice(6, 7), slice(4, 6), slice(4, 5))),
    ):
        part = image[(slice(None), slice(None), *place)].flatten(2)
        torch.testing.assert_close(mean[(slice(None), slice(None), *corner)], part.mean(2))
        torch.testing.assert_close(variance[(slice(None), slice(None), *corner)], part.var(2, unbiased=False))


def test_a_block_may_be_longer_than_the_image() -> None:
    image = torch.randn(2, 1, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, variance = block_moments(image, (16, 4, 4))
    assert mean.shape == variance.shape == (2, 1, 1, 2, 2)
    torch.testing.assert_close(mean[..., 0, 0, 1], image[..., :4, 4:].mean((2, 3, 4)))
    torch.testing.assert_close(variance[..., 0, 0, 1], image[..., :4, 4:].var((2, 3, 4), unbiased=False))
