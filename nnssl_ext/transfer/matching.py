"""Which tensor of the source stands for which tensor of the target; no values are looked at here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nnssl_ext.networks.backbone import HEADS
from nnssl_ext.transfer.names import UNet

#: Tensors of a layer beside its convolution's weight; they mean nothing without it.
COMPANIONS = (
    "conv.bias",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
)

#: Layers of a decoder's stage that see the up-sampled map beside the skip.
CONCATENATED = ("convs.0", "blocks.0.conv1", "blocks.0.skip")


@dataclass(frozen=True)
class Match:
    """What a tensor of the target is to be filled from.

    Attributes:
        source: The source's tensor; '' if there is none.
        rule: How it is fitted: a key of ``fitting.RULES``.
        reason: Why there is none.
        leader: The target's tensor without which this one stays as it is.
    """

    source: str = ""
    rule: str = "same"
    reason: str = ""
    leader: str = ""


def by_name(targets: Iterable[str], sources: Iterable[str]) -> dict[str, Match]:
    """Each of the target's tensors with the source's of the same name."""
    present = set(sources)
    return {
        name: Match(name) if name in present else Match(reason="the source has no tensor of this name")
        for name in targets
    }


def heads(targets: Iterable[str]) -> dict[str, Match]:
    """Segmentation heads: they stay as they are, always."""
    return {name: Match(reason="a segmentation head is never transferred") for name in targets if HEADS in f".{name}"}


def image_readers(targets: Iterable[str], first_layers: Iterable[str]) -> list[str]:
    """Names of the weights that see the image's channels, among the target's."""
    wanted = {f"{layer}.weight" for layer in first_layers}
    return [name for name in targets if name in wanted]


def unet(target: UNet, source: UNet, alignment: Mapping[int, int | None]) -> dict[str, Match]:
    """A U-Net's layers from another's.

    Args:
        target, source: Their layers.
        alignment: The source's stage for each stage of the target.
    """
    result: dict[str, Match] = {}
    if target.stem:
        absent = "" if source.stem else "the source has no layer that reads an image"
        result.update(_layer(target.stem, source.stem, "image convolution", absent))
    for stage, parts in target.stages.items():
        theirs = alignment[stage]
        for part, layer in parts.items():
            if theirs is None:
                result.update(_layer(layer, None, "convolution", "no stage of the source has this resolution"))
            else:
                partner, reason = _partner(target, source, stage, theirs, part)
                result.update(_layer(layer, partner, "convolution", reason))
    result.update(_decoder(target, source, alignment))
    return result


def _partner(target: UNet, source: UNet, stage: int, theirs: int, part: str) -> tuple[str | None, str]:
    if target.residual == source.residual:
        layer = source.stages[theirs].get(part)
        return layer, "" if layer else f"stage {theirs} of the source has no such layer"
    if target.bottleneck_blocks or source.bottleneck_blocks:
        return None, "bottleneck blocks have no counterpart in a plain encoder"
    if part.endswith("skip"):
        return None, "a plain encoder has no residual connections"
    place = target.path(stage).index(target.stages[stage][part])
    path = source.path(theirs)
    return (path[place], "") if place < len(path) else (None, f"stage {theirs} of the source has fewer layers")


def _decoder(target: UNet, source: UNet, alignment: Mapping[int, int | None]) -> dict[str, Match]:
    result: dict[str, Match] = {}
    for stage, parts in target.decoder.items():
        theirs = alignment[stage]
        for part, layer in parts.items():
            partner = source.decoder.get(-1 if theirs is None else theirs, {}).get(part)
            rule = "concatenation" if part.startswith(CONCATENATED) else "convolution"
            result.update(_layer(layer, partner, rule, "" if partner else "no such layer in the source's decoder"))
    for stage, layer in target.upsampling.items():
        theirs, below = alignment[stage], alignment[stage + 1]
        partner = None if theirs is None or below != theirs + 1 else source.upsampling.get(theirs)
        reason = "" if partner else "the source's decoder does not lead from the one resolution to the other"
        weight = f"{layer}.weight"
        result[weight] = Match(f"{partner}.weight" if partner else "", "upsampling", reason)
        result[f"{layer}.bias"] = Match(f"{partner}.bias" if partner else "", "vector", reason, weight)
    return result


def _layer(layer: str, partner: str | None, rule: str, reason: str) -> dict[str, Match]:
    """The matches of a convolution, its bias and its norm."""
    weight = f"{layer}.conv.weight"
    result = {weight: Match(f"{partner}.conv.weight" if partner else "", rule, reason)}
    for companion in COMPANIONS:
        source = f"{partner}.{companion}" if partner else ""
        result[f"{layer}.{companion}"] = Match(source, "vector", reason, weight)
    return result


def transformer(targets: Iterable[str], sources: Iterable[str], first_layers: Iterable[str]) -> dict[str, Match]:
    """By name, with the rules that positions, the stem and Primus's decoder need."""
    result = by_name(targets, sources)
    for name in image_readers(result, first_layers):
        result[name] = Match(result[name].source, "image patches", result[name].reason)
    for name, match in result.items():
        if name.endswith("pos_embed"):
            result[name] = Match(match.source, "positions", match.reason)
        elif name.startswith("up_projection."):
            result[name] = Match(reason="the decoder is fresh: its widths follow from the number of classes")
    return result
