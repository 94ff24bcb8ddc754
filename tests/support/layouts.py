"""Names and shapes in published weights."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


def random_weights(layout: Mapping[str, Shape]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in layout.items()}


def encoder_layout(inputs: int, width: int, depth: int, chunks: int) -> dict[str, Shape]:
    """Names and shapes of an encoder as published, at 112^3 with tokens of 16^3; blocks in ``chunks`` groups."""
    layout: dict[str, Shape] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 344, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, inputs, 16, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for number in range(depth):
        block = f"blocks.{number * chunks // depth}.{number}" if chunks else f"blocks.{number}"
        for norm in ("norm1", "norm2"):
            layout |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for name, outputs, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            layout |= {f"{block}.{name}.weight": (outputs, columns), f"{block}.{name}.bias": (outputs,)}
        layout |= {f"{block}.ls1.gamma": (width,), f"{block}.ls2.gamma": (width,)}
    return layout


SMALL = [4, 4, 8, 8, 16]


def normed(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    """A batch norm and the PReLU after it."""
    number = int(name[-1])
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)
    yield f"{name}.num_batches_tracked", ()
    yield f"{name[:-1]}{number + 1}.weight", (1,)


def layer(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def activated(name: str, inputs: int, outputs: int, kernel: Shape) -> Iterator[tuple[str, Shape]]:
    yield from normed(f"{name}.0", inputs)
    yield from layer(f"{name}.2", outputs, inputs, *kernel)


def double(name: str, channels: int, kernel: Shape) -> Iterator[tuple[str, Shape]]:
    yield from activated(f"{name}.conv_conv", channels, channels, kernel)
    yield from normed(f"{name}.conv_conv.3", channels)
    yield from layer(f"{name}.conv_conv.6", channels, channels, *kernel)


def up(name: str, low: int, high: int, flat: bool) -> Iterator[tuple[str, Shape]]:
    yield from normed(f"{name}.up.0", high)
    yield f"{name}.up.2.weight", (high, low, *((1, 2, 2) if flat else (2, 2, 2)))
    yield f"{name}.up.2.bias", (low,)
    yield from activated(f"{name}.conv", 2 * low, low, (1, 3, 3) if flat else (3, 3, 3))


def transformer(name: str, channels: int, heads: int, window: int) -> Iterator[tuple[str, Shape]]:
    for number in range(2):
        block = f"{name}.trans.blocks.{number}"
        yield from layer(f"{block}.norm1", channels)
        yield f"{block}.attn.relative_position_bias_table", ((2 * window - 1) ** 3, heads)
        yield f"{block}.attn.relative_position_index", (window**3, window**3)
        yield from layer(f"{block}.attn.qkv", 3 * channels, channels)
        yield from layer(f"{block}.attn.proj", channels, channels)
        yield from layer(f"{block}.norm2", channels)
        yield from layer(f"{block}.mlp.fc1", 4 * channels, channels)
        yield from layer(f"{block}.mlp.fc2", channels, 4 * channels)
    yield from layer(f"{name}.norm_layer", channels)


def published_layout(
    inputs: int, classes: int, widths: Sequence[int], heads: Sequence[int], window: int
) -> dict[str, Shape]:
    """Names and shapes of a published ``model_state_dict``, written down apart from the network."""
    entries: list[tuple[str, Shape]] = []
    for mode in range(3):
        flat = [mode > 0, mode > 1]
        kernels = [(1, 3, 3) if level else (3, 3, 3) for level in flat]
        embedding, head = f"embeddings.{mode}", f"pred_heads.{mode}"
        entries += layer(f"{embedding}.proj", widths[0], inputs, *kernels[0])
        entries += activated(f"{embedding}.down1.conv", widths[0], widths[1], kernels[1])
        entries += activated(f"{embedding}.down2.conv", widths[1], widths[2], (3, 3, 3))
        for level in range(2):
            entries += double(f"{embedding}.conv{level}", widths[level], kernels[level])
            entries += double(f"{head}.conv{level}", widths[level], kernels[level])
            entries += up(f"{head}.up{level + 1}", widths[level], widths[level + 1], flat[level])
            entries += activated(f"{head}.out_conv{level}.conv", widths[level], classes, (1, 1, 1))
    for level in (2, 3):
        entries += activated(f"pyramid_ct.down{level + 1}.conv", widths[level], widths[level + 1], (3, 3, 3))
        entries += up(f"pyramid_ct.up{level + 1}", widths[level], widths[level + 1], False)
        entries += activated(f"pyramid_ct.out_conv{level}.conv", widths[level], classes, (1, 1, 1))
    for name, level in (("e2", 2), ("d2", 2), ("e3", 3), ("d3", 3), ("e4", 4)):
        entries += double(f"pyramid_ct.convtrans_{name}.conv", widths[level], (3, 3, 3))
        entries += transformer(f"pyramid_ct.convtrans_{name}", widths[level], heads[level - 2], window)
    return dict(entries)
