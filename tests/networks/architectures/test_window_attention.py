import itertools

import pytest
import torch
from torch import Tensor

from nnssl_ext.networks.architectures.window_attention import SwinBlock, merge, partition, relative_positions


def block(*, shifted: bool, window: int = 4, mask_padding: bool = True) -> SwinBlock:
    torch.manual_seed(0)
    made = SwinBlock(
        channels=8,
        window=window,
        heads=2,
        shifted=shifted,
        dropout=0.0,
        drop_path=0.0,
        mask_padding=mask_padding,
    )
    torch.nn.init.normal_(made.attn.relative_position_bias_table)
    torch.nn.init.normal_(made.attn.qkv.bias)
    return made.eval()


def test_merging_is_the_way_back() -> None:
    volume = torch.randn(2, 4, 6, 8, 3)
    windows = partition(volume, (2, 3, 4))
    assert windows.shape == (2 * 2 * 2 * 2, 24, 3)
    assert torch.equal(merge(windows, (2, 3, 4), (4, 6, 8)), volume)


def test_positions_are_numbered_as_published() -> None:
    """The factor of the first axis is 3 w - 1; so offsets share entries, and published tables mean what they meant."""
    index = relative_positions(6).view([6] * 6)
    assert index[0, 0, 0, 0, 0, 0] == 5 * 17 + 5 * 11 + 5
    assert index[5, 5, 5, 0, 0, 0] == 10 * 17 + 10 * 11 + 10
    assert index[1, 0, 0, 0, 0, 0] - index[0, 0, 0, 0, 0, 0] == 17


def by_hand(made: SwinBlock, volume: Tensor) -> Tensor:
    """The block cell by cell: each attends to the real cells of its own window, and to nothing else."""
    _, *size, channels = volume.shape
    normed, attention = made.norm1(volume), made.attn
    # published PCT-Nets do not shift at all where an axis is one window long
    shifted = made.shifted and made.window not in size
    shift = [made.window // 2 if shifted and edge > made.window else 0 for edge in size]
    edges = [min(made.window, edge) for edge in size]
    cells = list(itertools.product(*map(range, size)))
    # after the shift windows start at -w + shift, shift, ... : a first, smaller one is cut off by the border
    home = {cell: tuple((c - s) // e for c, s, e in zip(cell, shift, edges, strict=True)) for cell in cells}
    result = torch.empty_like(volume)
    for cell in cells:
        others = [other for other in cells if home[other] == home[cell]]
        here = attention.qkv(normed[0][cell]).view(3, attention.heads, -1)[0]
        rest = torch.stack([attention.qkv(normed[0][other]) for other in others]).view(len(others), 3, 2, -1)
        w = made.window
        index = torch.tensor(
            [
                (cell[0] - o[0] + w - 1) * (3 * w - 1) + (cell[1] - o[1] + w - 1) * (2 * w - 1) + cell[2] - o[2] + w - 1
                for o in others
            ]
        )
        logits = torch.einsum("hc,nhc->hn", here, rest[:, 1]) * (channels // 2) ** -0.5
        weight = (logits + attention.relative_position_bias_table[index].T).softmax(1)
        result[0][cell] = attention.proj(torch.einsum("hn,nhc->hc", weight, rest[:, 2]).flatten())
    volume = volume + result
    return volume + made.mlp(made.norm2(volume))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(4, 4, 4), (2, 5, 6), (5, 3, 1), (7, 4, 9)])
def test_any_size_equals_attention_by_hand(size: tuple[int, ...], shifted: bool) -> None:
    """Padding, shifts and axes shorter than the window change nothing: no cell sees what is not in its window."""
    made, volume = block(shifted=shifted), torch.randn(1, *size, 8)
    with torch.no_grad():
        assert torch.allclose(made(volume), by_hand(made, volume), atol=1e-5)


def test_published_networks_see_their_padding() -> None:
    volume = torch.randn(1, 5, 4, 4, 8)
    with torch.no_grad():
        hidden, seen = (block(shifted=False, mask_padding=mask)(volume) for mask in (True, False))
        assert torch.allclose(hidden[:, :4], seen[:, :4], atol=1e-6)
        assert not torch.allclose(hidden[:, 4:], seen[:, 4:], atol=1e-3)


def test_samples_of_a_batch_are_apart() -> None:
    made, volume = block(shifted=True), torch.randn(3, 6, 5, 7, 8)
    with torch.no_grad():
        together = made(volume)
        for sample in range(3):
            assert torch.allclose(together[sample], made(volume[sample : sample + 1])[0], atol=1e-6)
