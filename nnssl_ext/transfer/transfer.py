"""Fill a network with pretrained weights and report it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_ext.errors import UserError
from nnssl_ext.networks.architectures.pct_net import PCTNet
from nnssl_ext.networks.backbone import HEADS, Backbone, backbone_of
from nnssl_ext.networks.weight_length import convolution_lengths, scale_to_lengths
from nnssl_ext.transfer import matching, names
from nnssl_ext.transfer.adaptations import MisfitError
from nnssl_ext.transfer.alignment import align, align_by_index, resolutions
from nnssl_ext.transfer.differences import differences
from nnssl_ext.transfer.heads import matching_rows
from nnssl_ext.transfer.matching import Match
from nnssl_ext.transfer.names import UNet, canonical_name, unet_of
from nnssl_ext.transfer.report import ADAPTED, COPIED, LEFT, Report, Row
from nnssl_ext.transfer.rules import Context, Fitted, fit
from nnssl_ext.transfer.source import PUBLISHED_PCT_NET, PretrainedWeights, SourceGeometry

#: Stages of like resolution, of like number, or by number where both encoders are of one family.
PHYSICAL, INDEX, AUTO = "resolution", "index", "auto"
#: Less of the encoder than this is an error, unless it is allowed.
LEAST_ENCODER = 0.1
#: What to do about a source of another family than the target's.
ADVICE = {
    names.PRIMUS: "Give the trainer that builds it, such as -tr nnUNet_Primus_M_Trainer",
    names.PCT_NET: "Give plans of nnssl_ext plan ... mis_fm",
    names.VIT: "Give plans of nnssl_ext plan ... 3dino, or a vit recipe of its size",
    names.U_NET: "Give plans whose network is a U-Net, and a trainer that builds it",
    names.RESNET: "Give plans whose network is a U-Net, and a trainer that builds it",
}


@dataclass(frozen=True)
class TargetNetwork:
    """Hold a built network and its future data.

    Attributes:
        network: At its initial values.
        spacing: Millimeters per voxel.
        patch_size: Edges in voxels.
        normalization: nnU-Net's scheme for each channel; empty if not known.
        modalities: nnU-Net's name of each channel; empty if not known.
        outputs: Label or region of each output channel; empty where heads must stay as they are.
        regions: Whether the outputs are regions.
        masked: Whether each channel is normalized within the image's mask; empty if not known.
        intensities: nnU-Net's intensity properties of each channel; empty if not known.
    """

    network: nn.Module
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    normalization: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    regions: bool = False
    masked: tuple[bool, ...] = ()
    intensities: tuple[Mapping[str, float], ...] = ()
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            tensors.setdefault(canonical_name(name), tensor)
        object.__setattr__(self, "tensors", tensors)

    @property
    def geometry(self) -> SourceGeometry:
        """Describe the target's data as a source's."""
        normalized = (self.normalization, self.modalities, self.masked, self.intensities)
        return SourceGeometry(self.spacing, None, self.patch_size, *normalized)

    @property
    def first_layers(self) -> list[str]:
        """List the layers that see the image's channels."""
        layers: Any = getattr(self.network, "keys_to_in_proj", ())
        return [canonical_name(f"{layer}.").removesuffix(".") for layer in layers]

    @property
    def image_readers(self) -> list[str]:
        """List convolutions beside the first layers that see the image's channels."""
        return list(getattr(self.network, "image_readers", ()))

    @property
    def strides(self) -> list[Sequence[int]] | None:
        """Return the encoder stages' strides, None without stages."""
        encoder: Any = getattr(self.network, "encoder", None)
        return getattr(encoder, "strides", None)

    @property
    def backbone(self) -> Backbone | None:
        """Return the backbone, None for unknown networks."""
        try:
            return backbone_of(self.network)
        except ValueError:
            return None


def transfer(
    source: PretrainedWeights,
    target: TargetNetwork,
    *,
    overlap: bool = False,
    alignment: str = AUTO,
    initial_lengths: bool = False,
    allow_partial: bool = False,
) -> Report:
    """Fill the target network with the tensors that fit.

    Args:
        source: The pretrained weights.
        target: The network. Its tensors are changed in place, so all their names agree.
        overlap: Where widths differ, copy the channels that both sides have.
        alignment: Stages of like resolution (``PHYSICAL``), of like number (``INDEX``), or by number where both
            encoders are of one family, else by resolution (``AUTO``).
        initial_lengths: Scale convolutions that a norm follows to the lengths that they have in the target now.
        allow_partial: Accept a transfer that fills less than a tenth of the encoder.

    Raises:
        UserError: If nothing of the source fits, or less than a tenth of the encoder is filled. The network is then as
            it was.
    """
    context = _context(source, target, overlap)
    fitted, report, aligned = _fitted(source, target, alignment, context)
    report.remarks += _remarks(source, target, context)
    other = PHYSICAL if aligned == INDEX else INDEX
    if aligned:
        share = _fitted(source, target, other, context)[1].filled
        if share != report.filled:
            report.remarks.append(
                f"Stages were matched by their {_WORDS[aligned]}; by their {_WORDS[other]}, {share:,} parameters would "
                f"come from the source instead of {report.filled:,}: nnssl_ext transfer --align {other}."
            )
    _refuse_unfilled(source, target, report, allow_partial)
    lengths = convolution_lengths(target.network)
    with torch.no_grad():
        for name, result in fitted.items():
            target.tensors[name].copy_(result.tensor)
    if initial_lengths:
        weights, factors = scale_to_lengths(target.network, target.network.state_dict(), lengths)
        target.network.load_state_dict(weights)
        taken = {name for name in fitted if target.tensors[name].numel()}
        report.lengths = {name: factor for name, factor in factors.items() if canonical_name(name) in taken}
    return report


_WORDS = {INDEX: "number", PHYSICAL: "resolution"}


def _fitted(
    source: PretrainedWeights, target: TargetNetwork, alignment: str, context: Context
) -> tuple[dict[str, Fitted], Report, str]:
    """Fit all tensors that can be fitted.

    Returns:
        The fitted tensors, the report, and the way stages were matched: '' where both ways lead to the same.
    """
    matches, remarks, aligned = match(source, target, alignment)
    fitted, rows = _fit_all(source, target, matches, context)
    return fitted, Report(rows, _unused(source, rows), [*source.notes, *remarks]), aligned


def _refuse_unfilled(source: PretrainedWeights, target: TargetNetwork, report: Report, allow_partial: bool) -> None:
    families = [names.family_of(tensors) for tensors in (source.weights, target.tensors)]
    advice = ""
    if families[0] and families[0] != families[1]:
        advice = f" The source is a {families[0]}, the target a {families[1] or 'network of another kind'}."
        advice += f" {ADVICE[families[0]]}."
    if not report.filled:
        row = max(report.rows, key=lambda row: row.parameters)
        raise UserError(
            f"nothing of {source.path.name} ({source.kind}) fits the target network: '{row.name}': {row.note}.{advice} "
            f"{' '.join(report.remarks)} Nothing was written"
        )
    if report.encoder_share < LEAST_ENCODER and not allow_partial:
        raise UserError(
            f"only {report.encoder_share:.1%} of the encoder would come from {source.path.name} ({source.kind})."
            f"{advice} {' '.join(report.remarks)} Nothing was written. "
            f"nnssl_ext transfer --allow-partial does it nevertheless"
        )


def match(source: PretrainedWeights, target: TargetNetwork, alignment: str) -> tuple[dict[str, Match], list[str], str]:
    """Match each of the target's tensors.

    Returns:
        The matches, remarks, and the way stages were matched.
    """
    ours, theirs = unet_of(target.tensors), unet_of(source.weights)
    remarks, aligned = [], ""
    if ours and theirs:
        stages, remark, aligned = _stages(source, target, ours, theirs, alignment)
        absent = "no stage of the source has this resolution" if aligned == PHYSICAL else ""
        remarks.append(remark)
        layers = matching.unet(ours, theirs, stages, absent or "the source has no stage of this number")
        # what lies outside encoder and decoder has no stage; further layers of a stage have its number in their names
        numbered = all(partner in (stage, None) for stage, partner in stages.items())
        named = [n for n in target.tensors if numbered or not n.startswith(("encoder.", "decoder."))]
        matches = {**matching.by_name(named, source.weights), **layers}
    elif any(name.endswith("pos_embed") for name in target.tensors):
        matches = matching.transformer(target.tensors, source.weights, target.first_layers)
        matches |= matching.image_convolutions(matches, target.image_readers)
    else:
        matches = matching.by_name(target.tensors, source.weights)
        matches |= matching.image_convolutions(matches, target.first_layers)
    labels = bool(target.outputs and source.outputs and target.regions == source.regions)
    labels = labels and not (theirs and not theirs.decoder)  # a probe's heads read the encoder
    matches.update(matching.heads(target.tensors, source.weights, labels))
    if ours and theirs and labels:
        matches.update(_aligned_heads(ours, theirs, stages, target.tensors))
    return matches, remarks, aligned


def _aligned_heads(
    ours: UNet, theirs: UNet, stages: Mapping[int, int | None], targets: Mapping[str, Tensor]
) -> dict[str, Match]:
    """Match heads by the decoder stages that they read. They are numbered from the coarsest stage on."""
    last = {id(net): max(net.stages) - 1 for net in (ours, theirs)}
    result = {}
    for name in targets:
        found = re.match(r"decoder\.seg_layers\.(\d+)\.(\w+)$", name)
        if found:
            partner = stages[last[id(ours)] - int(found[1])]
            source = "" if partner is None else f"decoder.seg_layers.{last[id(theirs)] - partner}.{found[2]}"
            result[name] = Match(source, "outputs", "" if source else "the source has no head of this stage")
    return result


def _stages(
    source: PretrainedWeights, target: TargetNetwork, ours: UNet, theirs: UNet, alignment: str
) -> tuple[dict[int, int | None], str, str]:
    """Match stages of the two encoders.

    Returns:
        The matches, a remark, and the way that was taken: '' where both ways lead to the same.
    """
    spacing, strides = source.geometry.spacing, source.geometry.strides
    by_index = align_by_index(list(theirs.stages), list(ours.stages))
    if not (spacing and strides and target.strides) or len(spacing) != len(target.spacing):
        why = "" if alignment == INDEX else ", since the source's spacing or strides are not known"
        return by_index, f"Stages were matched by their number{why}.", ""
    source_sizes, target_sizes = resolutions(spacing, strides), resolutions(target.spacing, target.strides)
    stages = align({s: source_sizes[s] for s in theirs.stages}, {s: target_sizes[s] for s in ours.stages})
    family = ours.residual == theirs.residual and ours.bottleneck_blocks == theirs.bottleneck_blocks
    way = (INDEX if family else PHYSICAL) if alignment == AUTO else alignment
    chosen = by_index if way == INDEX else stages
    pairs = ", ".join(
        f"{stage} ({_millimeters(target_sizes[stage])}) "
        + (f"from {partner} ({_millimeters(source_sizes[partner])})" if partner is not None else "from none")
        for stage, partner in chosen.items()
    )
    return chosen, f"Stages by {_WORDS[way]} (mm): {pairs}.", "" if stages == by_index else way


def _fit_all(
    source: PretrainedWeights, target: TargetNetwork, matches: Mapping[str, Match], context: Context
) -> tuple[dict[str, Fitted], list[Row]]:
    fitted: dict[str, Fitted] = {}
    rows, encoder = [], _encoder_tensors(target)
    for name, tensor in target.tensors.items():
        found = matches.get(name, Match(reason="the source has nothing of this kind"))
        reason = found.reason or _absent(source, found, fitted)
        if not reason:
            try:
                fitted[name] = fit(source.weights[found.source], tensor.detach(), found.rule, context)
            except MisfitError as misfit:
                reason = str(misfit)
        trained = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        theirs = "" if found.rule == "ones" else source.names.get(found.source, found.source)
        inside = id(tensor) in encoder
        if name not in fitted:
            rows.append(Row(name, tuple(tensor.shape), LEFT, reason, theirs, trained, 0, inside))
            continue
        result = fitted[name]
        action, note = ADAPTED if result.changes else COPIED, ", ".join(result.changes)
        filled = result.filled if trained else 0
        rows.append(Row(name, tuple(tensor.shape), action, note, theirs, trained, filled, inside))
    return fitted, rows


def _encoder_tensors(target: TargetNetwork) -> set[int]:
    """Collect the encoder's parameters. Of an unknown network, all but those of the heads."""
    if target.backbone is not None:
        return {id(parameter) for parameter in target.backbone.encoder_parameters()}
    return {id(tensor) for name, tensor in target.tensors.items() if HEADS not in f".{name}"}


def _absent(source: PretrainedWeights, found: Match, fitted: Mapping[str, Fitted]) -> str:
    if found.leader and found.leader not in fitted:
        return "its convolution was left"
    if found.source in source.untrained:
        return "the pretraining did not train it"
    return "" if found.source in source.weights else "the source has no such tensor"


def _context(source: PretrainedWeights, target: TargetNetwork, overlap: bool) -> Context:
    learned = target.backbone.learned_positions() if target.backbone else None
    registers = getattr(target.network, "register_tokens", None)
    prefix = 0 if registers is None else registers.shape[1]
    prefix += any(name.endswith("cls_token") for name in target.tensors)
    own = _grid(target.tensors, target.first_layers, target.patch_size, prefix)
    rows = matching_rows(target.outputs, source.outputs) if target.regions == source.regions else ()
    return Context(
        overlap,
        _grid(source.weights, target.first_layers, source.geometry.patch_size, prefix, source.position_grid),
        learned.grid if learned else own,
        prefix,
        rows,
        tuple(target.outputs[row] for row, _ in rows),
    )


def _grid(
    weights: Mapping[str, Tensor],
    first_layers: Sequence[str],
    patch_size: Sequence[int] | None,
    prefix: int,
    recorded: tuple[int, ...] = (),
) -> tuple[int, ...] | None:
    """Compute the tokens per axis.

    They are recorded, or follow from the edges of a token, or are the cube root of their number where those do not fit.
    """
    edges = _token_edges(weights, first_layers)
    table = next((tensor for name, tensor in weights.items() if name.endswith("pos_embed")), None)
    if table is None or not edges:
        return None
    tokens = table.shape[1] - prefix
    if recorded and torch.Size(recorded).numel() == tokens:
        return recorded
    if patch_size is not None and len(patch_size) == len(edges):
        grid = tuple(edge // token for edge, token in zip(patch_size, edges, strict=True))
        if torch.Size(grid).numel() == tokens:
            return grid
    edge = round(tokens ** (1 / 3))
    return (edge,) * 3 if edge**3 == tokens else None


def _token_edges(weights: Mapping[str, Tensor], first_layers: Sequence[str]) -> tuple[int, ...]:
    """Compute the edges of a token.

    They are those of the patch embedding's kernel, or two for each stage of a convolutional stem.
    """
    stages = {int(found[1]) for name in weights if (found := re.match(r"down_projection\.stages\.(\d+)\.", name))}
    if stages:
        return (2 ** len(stages),) * 3
    kernels = [weights[f"{layer}.weight"].shape[2:] for layer in first_layers if f"{layer}.weight" in weights]
    kernels += [tensor.shape[2:] for name, tensor in weights.items() if name == "down_projection.proj.weight"]
    return tuple(kernels[0]) if kernels else ()


def _remarks(source: PretrainedWeights, target: TargetNetwork, context: Context) -> list[str]:
    """List what a user should know beside the table."""
    remarks = differences(source.geometry, target.geometry)
    grids = context.source_grid, context.target_grid
    if any(name.endswith("pos_embed") for name in source.weights) and None not in grids and grids[0] != grids[1]:
        own = "x".join(map(str, grids[0] or ()))
        advice = ""
        if hasattr(getattr(target.network, "backbone", None), "position_grid"):
            advice = f" To keep them, plan with architecture.arch_kwargs.position_grid={list(grids[0] or ())}."
        remarks.append(f"The source's positions belong to {own} tokens and were interpolated.{advice}")
    if isinstance(target.network, PCTNet) and source.kind == PUBLISHED_PCT_NET:
        attention: Any = target.network.pyramid_ct.convtrans_e2.trans.blocks[0]
        if attention.mask_padding:
            remarks.append(
                "The published weights were trained with visible padding, these plans hide it (mask_padding): outputs "
                "differ where a map is no multiple of the window. The recipe mis_fm keeps it visible."
            )
    if target.outputs and not context.rows:
        remarks.append("No output has the label of one of the source's: heads stay at their initial values.")
    return remarks


def _unused(source: PretrainedWeights, rows: Sequence[Row]) -> dict[str, int]:
    used = {row.source for row in rows if row.action != LEFT}
    theirs = {source.names.get(name, name): tensor.numel() for name, tensor in source.weights.items()}
    return {name: numbers for name, numbers in theirs.items() if name not in used}


def _millimeters(resolution: Sequence[float]) -> str:
    return "x".join(f"{edge:.3g}" for edge in resolution)
