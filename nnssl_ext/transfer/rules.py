"""Fit tensors to the target's shapes by rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnssl_ext.networks.positions import resize_positions
from nnssl_ext.transfer import adaptations
from nnssl_ext.transfer.adaptations import MisfitError
from nnssl_ext.transfer.heads import Rows


@dataclass(frozen=True)
class Context:
    """Hold the options and facts that rules need.

    Attributes:
        overlap: Copy the channels that both sides have where widths differ.
        source_grid, target_grid: Tokens per axis of a transformer; None if not known.
        prefix: Register and CLS tokens before the positions.
        rows: Outputs of equal labels: the target's row and the source's.
        labels: The names of these outputs.
    """

    overlap: bool = False
    source_grid: tuple[int, ...] | None = None
    target_grid: tuple[int, ...] | None = None
    prefix: int = 0
    rows: Rows = ()
    labels: tuple[str, ...] = ()


@dataclass
class Fitted:
    """A tensor of the target's shape.

    Attributes:
        tensor: Its values.
        filled: Number of them that come from the source.
        changes: How it was changed, in words; empty if it is as it was.
    """

    tensor: Tensor
    filled: int
    changes: list[str] = field(default_factory=list)


def fit(tensor: Tensor, initial: Tensor, rule: str, context: Context) -> Fitted:
    """Fit a source tensor to a target tensor.

    Args:
        tensor: The source's.
        initial: The target's, at its initial values.
        rule: A key of ``RULES``.
        context: Flags and grids.

    Raises:
        MisfitError: If no rule leads from the one shape to the other, or the source's values are not finite.
    """
    if not torch.isfinite(tensor).all():
        raise MisfitError("the source's values are not finite")
    fitted = RULES[rule](tensor.to(initial.dtype), initial, context)
    if fitted.tensor.shape != initial.shape:
        raise ValueError(f"rule {rule} made {tuple(fitted.tensor.shape)}, expected {tuple(initial.shape)}")
    return fitted


def _convolution(tensor: Tensor, initial: Tensor, context: Context, parts: int = 1, image: bool = False) -> Fitted:
    if tensor.ndim != initial.ndim:
        raise MisfitError(f"a {tensor.ndim - 2}-D kernel for a {initial.ndim - 2}-D network")
    changes = []
    old, new = tensor.shape[2:], initial.shape[2:]
    if old != new:
        tensor = adaptations.kernel(tensor, new)
        changes.append(f"kernel {_edges(old)} -> {_edges(new)}")
    if image and tensor.shape[1] != initial.shape[1]:
        changes.append(_channels(tensor, initial))
        tensor = adaptations.input_channels(tensor, initial.shape[1])
    return _widths(tensor, initial, context, changes, parts)


def _image_convolution(tensor: Tensor, initial: Tensor, context: Context) -> Fitted:
    return _convolution(tensor, initial, context, image=True)


def _concatenation(tensor: Tensor, initial: Tensor, context: Context) -> Fitted:
    # half of the inputs come from below, half from the skip
    if tensor.shape[1] != 2 * tensor.shape[0]:
        raise MisfitError("the source's decoder sees no skips")
    return _convolution(tensor, initial, context, parts=2)


def _upsampling(tensor: Tensor, initial: Tensor, context: Context) -> Fitted:
    if tensor.ndim != initial.ndim:
        raise MisfitError(f"a {tensor.ndim - 2}-D kernel for a {initial.ndim - 2}-D network")
    changes = []
    old, new = tensor.shape[2:], initial.shape[2:]
    if old != new:
        tensor = adaptations.upsampling_kernel(tensor, new)
        changes.append(f"stride {_edges(old)} -> {_edges(new)}")
    return _widths(tensor, initial, context, changes)


def _vector(tensor: Tensor, initial: Tensor, context: Context) -> Fitted:
    if tensor.ndim == 0:
        return _same(tensor, initial, context)
    return _widths(tensor, initial, context, [])


def _image_patches(tensor: Tensor, initial: Tensor, context: Context) -> Fitted:
    changes = []
    old, new = tensor.shape[2:], initial.shape[2:]
    if old != new:
        tensor = adaptations.patch_kernel(tensor, new)
        changes.append(f"patch {_edges(old)} -> {_edges(new)}, resampled")
    if tensor.shape[1] != initial.shape[1]:
        changes.append(_channels(tensor, initial))
        tensor = adaptations.input_channels(tensor, initial.shape[1])
    return _same(tensor, initial, context, changes)


def _positions(tensor: Tensor, initial: Tensor, context: Context) -> Fitted:
    source, target = context.source_grid, context.target_grid
    if source is None or target is None or source == target:
        return _same(tensor, initial, context)
    try:
        tensor = resize_positions(tensor, source, target, context.prefix)
    except ValueError as error:
        raise MisfitError(str(error)) from error
    return _same(tensor, initial, context, [f"positions {_edges(source)} -> {_edges(target)}, interpolated"])


def _same(tensor: Tensor, initial: Tensor, context: Context, changes: Sequence[str] = ()) -> Fitted:
    if tensor.shape != initial.shape:
        raise MisfitError(f"shape {tuple(tensor.shape)} there, {tuple(initial.shape)} here")
    return Fitted(tensor, initial.numel(), list(changes))


def _ones(tensor: Tensor, initial: Tensor, context: Context) -> Fitted:
    if tensor.shape[1:] != initial.shape:
        raise MisfitError(f"attention of shape {tuple(tensor.shape)} there, width {len(initial)} here")
    return Fitted(torch.ones_like(initial), initial.numel(), ["ones: the source has no LayerScale"])


def _widths(tensor: Tensor, initial: Tensor, context: Context, changes: list[str], parts: int = 1) -> Fitted:
    if tensor.shape == initial.shape:
        return Fitted(tensor, initial.numel(), changes)
    old, new = _edges(tensor.shape[:2]), _edges(initial.shape[:2])
    if not context.overlap:
        raise MisfitError(f"width {old} there, {new} here")
    if tensor.ndim > 1 and (tensor.shape[1] % parts or initial.shape[1] % parts):
        raise MisfitError(f"width {old} there, {new} here, not in {parts} equal parts")
    overlaid = adaptations.overlapping_channels(tensor, initial, parts)
    marked = adaptations.overlapping_channels(torch.ones_like(tensor), torch.zeros_like(initial), parts)
    return Fitted(overlaid, int(marked.sum()), [*changes, f"overlapping channels, {old} over {new}"])


def _outputs(tensor: Tensor, initial: Tensor, context: Context) -> Fitted:
    if tensor.shape[1:] != initial.shape[1:]:
        raise MisfitError(f"a head's inputs: {_edges(tensor.shape[1:])} there, {_edges(initial.shape[1:])} here")
    if not context.rows:
        raise MisfitError("no output has the same label")
    result = initial.clone()
    for row, partner in context.rows:
        result[row] = tensor[partner]
    filled = len(context.rows) * initial[0].numel()
    return Fitted(result, filled, [f"outputs of equal labels: {', '.join(context.labels)}"])


def _channels(tensor: Tensor, initial: Tensor) -> str:
    old, new = tensor.shape[1], initial.shape[1]
    return f"image channels {old} -> {new}, {'repeated and rescaled' if new > old else 'averaged'}"


def _edges(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


RULES: dict[str, Callable[[Tensor, Tensor, Context], Fitted]] = {
    "convolution": _convolution,
    "image convolution": _image_convolution,
    "concatenation": _concatenation,
    "upsampling": _upsampling,
    "vector": _vector,
    "image patches": _image_patches,
    "positions": _positions,
    "outputs": _outputs,
    "ones": _ones,
    "same": _same,
}
