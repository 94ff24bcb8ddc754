"""Describe pretrained weights and what their file records."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_ext.configurations import intensities_of
from nnssl_ext.transfer.names import UNet, unet_of

#: Kind of MIS-FM's files.
PUBLISHED_PCT_NET = "MIS-FM's PCT-Net"
#: Published architectures that an adaptation plan may name without their strides: two at every stage but the first.
HALVING = ("ResEncL", "NoSkipResEncL")
#: The intensity properties that CTNormalization reads.
INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")


@dataclass(frozen=True)
class SourceGeometry:
    """Describe the source's data as far as recorded.

    Attributes:
        spacing: Millimeters per voxel; None if it was not fixed or is not known.
        strides: Strides of each encoder stage, per axis; None if not known.
        patch_size: Edges in voxels; None if not known.
        normalization: nnU-Net's scheme for each channel; empty if not known.
        modalities: nnU-Net's name of each channel; empty if not known.
        masked: Whether each channel was normalized within the image's mask; empty if not known.
        intensities: nnU-Net's intensity properties of each channel, which CTNormalization reads; empty if not known.
    """

    spacing: tuple[float, ...] | None = None
    strides: tuple[tuple[int, ...], ...] | None = None
    patch_size: tuple[int, ...] | None = None
    normalization: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    masked: tuple[bool, ...] = ()
    intensities: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class PretrainedWeights:
    """Hold pretrained weights and what is known of them.

    Attributes:
        path: The file they were read from.
        kind: The kind of file, in words.
        weights: One canonical name for each tensor -> its values.
        geometry: The data that the network was trained on.
        untrained: Canonical names of tensors that the pretraining left at their initial values.
        citations: The works to cite, as the file lists them.
        notes: Remarks for the report.
        names: Canonical name -> name in the file, where the reader renamed it.
        outputs: Name of each output channel, in order: labels, or regions; empty if not known.
        regions: Whether the outputs are regions.
        recorded: nnU-Net's record of the training, unchecked: plans, configuration, dataset_json, trainer_name.
        position_grid: Tokens per axis of a transformer's learned positions; empty if not known.
    """

    path: Path
    kind: str
    weights: dict[str, Tensor]
    geometry: SourceGeometry = SourceGeometry()
    untrained: frozenset[str] = frozenset()
    citations: list[Any] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    regions: bool = False
    recorded: Mapping[str, Any] = field(default_factory=dict)
    position_grid: tuple[int, ...] = ()


def planned_geometry(plan: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SourceGeometry:
    """Read the geometry of an adaptation plan."""
    configuration = _first(_inside(plan, "pretrain_plan", "configurations"))
    architecture = _inside(plan, "architecture_plans")
    planned = _inside(architecture, "arch_kwargs").get("strides")
    planned = planned or _inside(configuration, "architecture", "arch_kwargs").get("strides")
    patch = _inside(plan).get("pretrain_patch_size") or configuration.get("patch_size")
    return geometry(
        {**configuration, "patch_size": patch or _inside(plan).get("recommended_downstream_patchsize")},
        planned,
        weights,
        halving=architecture.get("arch_class_name") in HALVING,
        intensities=intensities_of(_inside(plan, "pretrain_plan")),
    )


def geometry(
    configuration: Mapping[str, Any],
    strides: Any,
    weights: Mapping[str, Tensor],
    *,
    halving: bool = False,
    channel_names: Any = None,
    intensities: Any = None,
) -> SourceGeometry:
    """Build a geometry from values of any kind.

    Missing strides come from the decoder's up-sampling kernels.

    Args:
        configuration: A configuration of plans, as a file gives it.
        strides: Strides of each encoder stage, as a file gives them.
        weights: The network's, by canonical names.
        halving: Whether, failing all else, every stage but the first has stride two.
        channel_names: Of the data set, as dataset.json has them.
        intensities: ``foreground_intensity_properties_per_channel`` of the plans.
    """
    masked = configuration.get("use_mask_for_norm")
    network, schemes = unet_of(weights), configuration.get("normalization_schemes")
    sizes = _numbers(configuration.get("spacing"))
    named = isinstance(schemes, Sequence) and all(isinstance(scheme, str) for scheme in schemes)
    return SourceGeometry(
        sizes if sizes and all(edge > 0 for edge in sizes) else None,
        None if network is None else _strides(network, strides, weights, halving),
        tuple(int(edge) for edge in _numbers(configuration.get("patch_size")) or ()) or None,
        tuple(schemes) if schemes and named and not isinstance(schemes, str) else (),
        tuple(map(str, channel_names.values())) if isinstance(channel_names, Mapping) else (),
        tuple(map(bool, masked)) if isinstance(masked, list) else (),
        properties_of(intensities),
    )


def properties_of(given: Any) -> tuple[Mapping[str, float], ...]:
    """Return the intensity properties of each channel, () where something is missing."""
    rows = tuple(given.values()) if isinstance(given, Mapping) else ()
    whole = all(
        isinstance(row, Mapping) and all(isinstance(row.get(name), (int, float)) for name in INTENSITIES)
        for row in rows
    )
    return rows if whole else ()


def _strides(
    network: UNet, given: Any, weights: Mapping[str, Tensor], halving: bool
) -> tuple[tuple[int, ...], ...] | None:
    stages = max(network.stages) + 1
    axes = next(t.ndim - 2 for n, t in weights.items() if n.startswith("encoder.") and n.endswith("conv.weight"))
    if isinstance(given, Sequence) and len(given) == stages:
        rows = [_numbers([row] * axes if isinstance(row, int) else row) for row in given]
        if all(row and len(row) == axes and min(row) >= 1 for row in rows):
            return tuple(tuple(int(step) for step in row or ()) for row in rows)
    # a decoder's up-sampling has the stride of the stage below it as its kernel
    kernels = {stage + 1: tuple(weights[f"{layer}.weight"].shape[2:]) for stage, layer in network.upsampling.items()}
    if set(kernels) == set(range(1, stages)):
        return ((1,) * axes, *(kernels[stage] for stage in range(1, stages)))
    return ((1,) * axes, *((2,) * axes for _ in range(1, stages))) if halving else None


def _numbers(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return None
    known = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    # neither infinite, nor NaN, nor an integer beyond float
    return tuple(values) if known and all(abs(value) <= sys.float_info.max for value in values) else None


def _inside(content: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _first(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((value for value in content.values() if isinstance(value, Mapping)), {})
