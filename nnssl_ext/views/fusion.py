"""Draw VolumeFusion's maps: a level 0..K per voxel.

A level is the share of the foreground crop.

A layout is drawn on the CPU. Boxes are painted there too, a grid on the device for the whole batch. Boxes are those of
Wang et al., arXiv 2306.16925, the grid that of IEEE TIP 34:6041.

B batch, D H W voxels, K levels, M boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.losses.dense import IGNORE
from nnssl_ext.views.cpu.chunks import voxel_chunks
from nnssl_ext.views.cpu.kernels import quantized_normal
from nnssl_ext.views.random import BatchRandom, pack_to_device, to_device

#: Voxels of a volume whose noise is measured, at most.
MEASURED = 1 << 14
#: What interpolation leaves in constant regions, as a share of the intensities.
ROUNDING = 1e-5


@dataclass
class BoxLayout:
    """Lay out boxes. Later ones cover earlier ones.

    ``low`` and ``high`` (B, M, 3), ``level`` (B, M), 0 where absent.
    """

    low: Tensor
    high: Tensor
    level: Tensor

    @classmethod
    def draw(
        cls,
        random: BatchRandom,
        size: Sequence[int],
        levels: int,
        count: Sequence[int],
        edge: Sequence[float],
        min_edge: Sequence[int],
    ) -> BoxLayout:
        """Draw boxes, each with a level from 1..K.

        ``count`` and ``edge`` are ranges: of their number, and of an edge as a share of the crop's. ``min_edge`` is the
        smallest edge in voxels, per axis.
        """
        most = count[1]
        draws = random.uniform(0.0, 1.0, (1 + 7 * most,)).numpy()  # whose small arrays are faster than torch's
        boxes = count[0] + (draws[:, :1] * (most - count[0] + 1)).astype(int)  # (B, 1)
        share, *rest = draws[:, 1:].reshape(-1, 7, most).swapaxes(0, 1)  # (B, M) each
        level = (1 + np.minimum((share * levels).astype(int), levels - 1)) * (np.arange(most) < boxes)
        # an edge and a place along each axis; boxes stay within the crop
        shortest = [min(max(round(edge[0] * n), least), n) for n, least in zip(size, min_edge, strict=True)]
        longest = [min(max(round(edge[1] * n), short), n) for n, short in zip(size, shortest, strict=True)]
        span = np.subtract(longest, shortest)
        box_edge = shortest + np.minimum((np.stack(rest[:3], -1) * (span + 1)).astype(int), span)
        room = np.asarray(size) - box_edge
        low = np.minimum((np.stack(rest[3:], -1) * (room + 1)).astype(int), room)
        return cls(*map(torch.from_numpy, (low, low + box_edge, level)))

    def paint(self, size: Sequence[int], device: torch.device) -> Tensor:
        """Paint the map (B, D, H, W) uint8."""
        result = np.zeros((len(self.level), *size), np.uint8)
        boxes = zip(result, self.low.tolist(), self.high.tolist(), self.level.tolist(), strict=True)
        for canvas, lows, highs, levels in boxes:
            for (a, b, c), (d, e, f), level in zip(lows, highs, levels, strict=True):
                if level:
                    canvas[a:d, b:e, c:f] = level
        return to_device(torch.from_numpy(result), device)


@dataclass
class GridLayout:
    """Lay out blocks of one size per sample.

    ``edge`` and ``offset`` (B, 3), ``level`` (B, blocks D, blocks H, blocks W).
    """

    edge: Tensor
    offset: Tensor
    level: Tensor

    @classmethod
    def draw(
        cls,
        random: BatchRandom,
        size: Sequence[int],
        levels: int,
        edges: Sequence[Sequence[int]],
        share: float,
        whole: bool = False,
    ) -> GridLayout:
        """Draw blocks. A ``share`` is foreground, with levels from 1..K.

        ``edges`` are ranges of a block's edge in voxels, per axis. ``whole`` takes whole blocks only, at most as long
        as the crop. The border that is left is background.
        """
        if whole:  # a block that is longer than the crop would never be whole
            edges = [[min(end, length) for end in ends] for ends, length in zip(edges, size, strict=True)]
        edge = torch.stack([random.integers(low, high) for low, high in edges], -1)
        place = random.uniform(0, 1, (3,))
        lengths = torch.tensor(size)
        # of whole blocks the first begins within the remainder, behind one block of border
        offset = edge - (place * (lengths % edge + 1)).long() if whole else (place * edge).long()
        cells = tuple(length // low + 2 for length, (low, _) in zip(size, edges, strict=True))
        level = random.integers(1, levels, cells) * random.chance(share, cells)
        if whole:
            for axis, number in enumerate(cells):
                index = torch.arange(number)
                inside = (index >= 1) & (index <= (lengths[axis] // edge[:, axis])[:, None])  # (B, cells)
                level = level * inside.view(len(edge), *(number if a == axis else 1 for a in range(3)))
        return cls(edge, offset, level)

    def paint(self, size: Sequence[int], device: torch.device) -> Tensor:
        """Paint the map (B, D, H, W) uint8."""
        if device.type == "mps":  # not tried there
            return self.paint(size, torch.device("cpu")).to(device)
        edge, offset, level = pack_to_device([self.edge, self.offset, self.level.to(torch.uint8)], device)
        block = [
            (torch.arange(length, device=device) + offset[:, axis, None]) // edge[:, axis, None]
            for axis, length in enumerate(size)
        ]
        sample = torch.arange(len(edge), device=device)[:, None, None, None]
        return level[sample, block[0][:, :, None, None], block[1][:, None, :, None], block[2][:, None, None, :]]


class MissingNoise:
    """White noise that hides the level of a mixture.

    The mixture a F + (1 - a) B has less noise than F or B, so local noise would reveal min(a, 1 - a). This fills the
    variance up to that of the noisier crop. Where a crop is constant, such as clipped air, it has no noise.

    Attributes:
        deviation: (B, C, 2, 2, K + 1), the deviation that each level lacks. The twos are voxels without and with noise
            in F, then in B.
    """

    def __init__(
        self,
        foreground: Tensor,
        background: Tensor,
        levels: int,
        random: BatchRandom,
        masked: Sequence[bool] = (),
    ) -> None:
        """Measure the crops F and B, (B, C, D, H, W) each.

        Zeros of ``masked`` channels lie outside of the image.
        """
        noise = noise_variance(torch.stack([some_rows(foreground), some_rows(background)]))  # (2, B, C)
        noisy = torch.arange(2, device=noise.device)
        front, back = noise[..., None, None, None]  # (B, C, 1, 1, 1)
        front, back = front * noisy[:, None, None], back * noisy[:, None]
        weight = torch.arange(levels + 1, device=noise.device) / levels
        mixed = weight.square() * front + (1 - weight).square() * back
        self.deviation = (torch.maximum(front, back) - mixed).clamp_min_(0).sqrt_()
        self._ranges = [inner_range(foreground), inner_range(background)]
        self._masked = [channel for channel, kept in enumerate(masked) if kept]
        on_cpu = foreground.device.type == "cpu"
        self._sources = [(random.bits if on_cpu else random.noise)(sample) for sample in range(len(foreground))]

    def entries(self, foreground: Tensor, background: Tensor, level: Tensor, samples: slice) -> Tensor:
        """Return each voxel's place in the table.

        (B, C, V) crops of some samples and levels (B, V) -> (B, C, V).
        """
        crops = list(zip((foreground, background), self._ranges, strict=True))
        front, back = (
            ((crop > low[samples]) & (crop < high[samples])).view(torch.uint8) for crop, (low, high) in crops
        )
        for channel in self._masked:
            for inner, (crop, _) in zip((front, back), crops, strict=True):
                inner[:, channel].masked_fill_(crop[:, channel] == 0, 0)
        levels = self.deviation.shape[-1]
        return torch.add(level[:, None].long(), front, alpha=2 * levels).add_(back, alpha=levels)

    def add(self, mixture: Tensor, entries: Tensor, samples: slice) -> None:
        """Add noise to voxels of some samples, (B, C, V)."""
        deviation = self.deviation[samples].flatten(2).gather(2, entries)
        for row, scale, source in zip(mixture, deviation, self._sources[samples], strict=True):
            if isinstance(source, np.random.SFC64):
                row.addcmul_(scale, quantized_normal(source, row.numel()).view(row.shape))
            else:
                row.addcmul_(scale, torch.randn(row.shape, generator=source, device=row.device))


def fuse(
    foreground: Tensor,
    background: Tensor,
    level: Tensor,
    levels: int,
    ignore_below: float = 0.0,
    ignored: int = IGNORE,
    missing: MissingNoise | None = None,
) -> Tensor:
    """Mix ``foreground`` into ``background`` in place.

    Its weight is level / K. Where they differ by less than ``ignore_below`` in every channel, ``ignored`` is written
    into the level (B, D, H, W) uint8.
    """
    # views, not copies: both are written to
    flat, over = level.view(len(level), -1), foreground.flatten(2)
    under = background.view(*background.shape[:2], -1)
    for samples, voxels in voxel_chunks(under):
        front, back, share = over[samples, :, voxels], under[samples, :, voxels], flat[samples, voxels]
        weight = share[:, None].to(back.dtype).div_(levels)
        alike = (front - back).abs_().amax(1) < ignore_below if ignore_below else None
        if missing is None:
            back.lerp_(front, weight)
        else:
            entries = missing.entries(front, back, share, samples)  # of the crops as they are
            missing.add(back.lerp_(front, weight), entries, samples)
        if alike is not None:  # last: ignored voxels get the noise of their level
            share.masked_fill_(alike, ignored)
    return background


def some_rows(image: Tensor) -> Tensor:
    """Return evenly spaced rows along the last axis, ``MEASURED`` voxels of a volume at most."""
    step = max(1, math.ceil(math.sqrt(math.prod(image.shape[-3:]) / MEASURED)))
    return image[..., ::step, ::step, :]


def inner_range(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range between an image's extremes: (B, C, D, H, W) -> twice (B, C, 1).

    What is clipped, and most empty air, lies at an extreme but for rounding errors.
    """
    low, high = image.flatten(2).aminmax(dim=-1, keepdim=True)
    return low.lerp(high, ROUNDING), high.lerp(low, ROUNDING)


def noise_variance(image: Tensor) -> Tensor:
    """Estimate white noise: (..., D, H, W) -> (...).

    The median absolute second difference along the last axis is robust to edges. Constant regions, such as air that
    was set to zero, are left out.
    """
    if image.shape[-1] < 3:
        return image.new_zeros(image.shape[:-3])
    second = (image[..., 2:] - 2 * image[..., 1:-1] + image[..., :-2]).abs().flatten(-3)
    constant = ROUNDING * image.flatten(-3).abs().amax(-1, keepdim=True)
    median = torch.where(second > constant, second, torch.nan).nanmedian(-1).values.nan_to_num(0.0)
    # the median of |N(0, 1)| is 0.6745, and 1, -2, 1 multiply the variance by 6
    return (median / 0.6745) ** 2 / 6
