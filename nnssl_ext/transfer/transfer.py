"""Pretrained weights into a live network, with a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.errors import UserError
from nnssl_ext.transfer import matching
from nnssl_ext.transfer.adaptations import MisfitError
from nnssl_ext.transfer.alignment import align, align_by_index, resolutions
from nnssl_ext.transfer.matching import Match
from nnssl_ext.transfer.names import UNet, canonical_name, unet_of
from nnssl_ext.transfer.report import ADAPTED, COPIED, LEFT, Report, Row
from nnssl_ext.transfer.rules import Context, Fitted, fit
from nnssl_ext.transfer.source import Source

PHYSICAL, INDEX = "resolution", "index"


@dataclass(frozen=True)
class Target:
    """A network as a trainer built it, and what it will be trained on.

    Attributes:
        network: At its initial values.
        spacing: Millimetres per voxel.
        patch_size: Edges in voxels.
    """

    network: nn.Module
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            tensors.setdefault(canonical_name(name), tensor)
        object.__setattr__(self, "tensors", tensors)

    @property
    def first_layers(self) -> list[str]:
        """Canonical names of the layers that see the image's channels."""
        layers: Any = getattr(self.network, "keys_to_in_proj", ())
        return [canonical_name(f"{layer}.").removesuffix(".") for layer in layers]

    @property
    def strides(self) -> list[Sequence[int]] | None:
        """Of each encoder stage, or None for a network without stages."""
        encoder: Any = getattr(self.network, "encoder", None)
        return getattr(encoder, "strides", None)


def transfer(source: Source, target: Target, *, overlap: bool = False, alignment: str = PHYSICAL) -> Report:
    """Fill the target's network with what fits of the source.

    Args:
        source: The pretrained weights.
        target: The network; its tensors are changed in place, so all their names agree.
        overlap: Where widths differ, copy the channels that both sides have.
        alignment: ``PHYSICAL``, stages of like resolution, or ``INDEX``, stages of like number.

    Raises:
        UserError: If nothing of the source fits; the network is then as it was.
    """
    matches, remarks, index_used = match(source, target, alignment)
    context = _context(source, target, overlap)
    fitted, rows = _fit_all(source, target, matches, context)
    report = Report(rows, _unused(source, rows), remarks)
    if not index_used and alignment == PHYSICAL:
        other, _, _ = match(source, target, INDEX)
        by_index = sum(row.filled for row in _fit_all(source, target, other, context)[1])
        if by_index > report.filled:
            report.remarks.append(
                f"Stages were matched by their resolution; matched by their number, {by_index:,} parameters would come "
                f"from the source: --align {INDEX}."
            )
    if not report.filled:
        raise UserError(
            f"nothing of {source.path.name} ({source.kind}) fits the target network: {_first_reason(rows)}. "
            f"{' '.join(report.remarks)} Nothing was written"
        )
    with torch.no_grad():
        for name, result in fitted.items():
            target.tensors[name].copy_(result.tensor)
    return report


def match(source: Source, target: Target, alignment: str) -> tuple[dict[str, Match], list[str], bool]:
    """The match of each of the target's tensors, remarks, and whether stages were matched by their number."""
    ours, theirs = unet_of(target.tensors), unet_of(source.weights)
    remarks = [source.note] if source.note else []
    by_index = False
    if ours and theirs:
        stages, remark = _stages(source, target, ours, theirs, alignment)
        by_index = stages == align_by_index(list(theirs.stages), list(ours.stages))
        remarks += [remark]
        # what lies outside encoder and decoder has no stage: by name
        outside = [n for n in target.tensors if not n.startswith(("encoder.", "decoder."))]
        matches = {**matching.by_name(outside, source.weights), **matching.unet(ours, theirs, stages)}
    elif any(name.endswith("pos_embed") for name in target.tensors):
        matches = matching.transformer(target.tensors, source.weights, target.first_layers)
    else:
        matches = matching.by_name(target.tensors, source.weights)
        for name in matching.image_readers(target.tensors, target.first_layers):
            matches[name] = Match(matches[name].source, "image convolution", matches[name].reason)
    matches.update(matching.heads(target.tensors))
    return matches, remarks, by_index


def _stages(
    source: Source, target: Target, ours: UNet, theirs: UNet, alignment: str
) -> tuple[dict[int, int | None], str]:
    spacing, strides = source.geometry.spacing, source.geometry.strides
    if alignment == INDEX or not (spacing and strides and target.strides) or len(spacing) != len(target.spacing):
        why = "" if alignment == INDEX else ", since the source's spacing or strides are not known"
        stages = align_by_index(list(theirs.stages), list(ours.stages))
        return stages, f"Stages were matched by their number{why}."
    source_sizes, target_sizes = resolutions(spacing, strides), resolutions(target.spacing, target.strides)
    stages = align({s: source_sizes[s] for s in theirs.stages}, {s: target_sizes[s] for s in ours.stages})
    pairs = ", ".join(
        f"{stage} ({_millimetres(target_sizes[stage])}) "
        + (f"from {partner} ({_millimetres(source_sizes[partner])})" if partner is not None else "from none")
        for stage, partner in stages.items()
    )
    return stages, f"Stages by resolution (mm): {pairs}."


def _fit_all(
    source: Source, target: Target, matches: Mapping[str, Match], context: Context
) -> tuple[dict[str, Fitted], list[Row]]:
    fitted: dict[str, Fitted] = {}
    rows = []
    for name, tensor in target.tensors.items():
        found = matches.get(name, Match(reason="the source has nothing of this kind"))
        reason = found.reason or _absent(source, found, fitted)
        if not reason:
            try:
                fitted[name] = fit(source.weights[found.source], tensor.detach(), found.rule, context)
            except MisfitError as misfit:
                reason = str(misfit)
        trained = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        if name not in fitted:
            rows.append(Row(name, tuple(tensor.shape), LEFT, reason, found.source, trained, 0))
            continue
        result = fitted[name]
        action = ADAPTED if result.changes else COPIED
        filled = result.filled if trained else 0
        rows.append(Row(name, tuple(tensor.shape), action, ", ".join(result.changes), found.source, trained, filled))
    return fitted, rows


def _absent(source: Source, found: Match, fitted: Mapping[str, Fitted]) -> str:
    if found.leader and found.leader not in fitted:
        return "its convolution was left"
    if found.source in source.untrained:
        return "the pretraining did not train it"
    return "" if found.source in source.weights else "the source has no such tensor"


def _context(source: Source, target: Target, overlap: bool) -> Context:
    registers = getattr(target.network, "register_tokens", None)
    prefix = 0 if registers is None else registers.shape[1]
    prefix += any(name.endswith("cls_token") for name in target.tensors)
    return Context(
        overlap,
        _grid(source.weights, target.first_layers, source.geometry.patch_size, prefix),
        _grid(target.tensors, target.first_layers, target.patch_size, prefix),
        prefix,
    )


def _grid(
    weights: Mapping[str, Tensor], first_layers: Sequence[str], patch_size: Sequence[int] | None, prefix: int
) -> tuple[int, ...] | None:
    """Tokens per axis, from the patch embedding's kernel; the cube root of their number where the patch is unknown."""
    kernels = [weights[f"{layer}.weight"].shape[2:] for layer in first_layers if f"{layer}.weight" in weights]
    tables = [t for n, t in weights.items() if n.endswith("pos_embed")]
    if not tables or not kernels:
        return None
    tokens = tables[0].shape[1] - prefix
    if patch_size is not None and len(patch_size) == len(kernels[0]):
        grid = tuple(edge // token for edge, token in zip(patch_size, kernels[0], strict=True))
        if torch.Size(grid).numel() == tokens:
            return grid
    edge = round(tokens ** (1 / 3))
    return (edge,) * 3 if edge**3 == tokens else None


def _unused(source: Source, rows: Sequence[Row]) -> dict[str, int]:
    used = {row.source for row in rows if row.action != LEFT}
    return {name: tensor.numel() for name, tensor in source.weights.items() if name not in used}


def _first_reason(rows: Sequence[Row]) -> str:
    row = max(rows, key=lambda row: row.parameters)
    return f"'{row.name}': {row.note}"


def _millimetres(resolution: Sequence[float]) -> str:
    return "x".join(f"{edge:.3g}" for edge in resolution)
