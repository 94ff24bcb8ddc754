"""Compare source and target data, and plan alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from nnssl_ext.configurations import PROPERTIES, configuration_of
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import legal_patch
from nnssl_ext.transfer.source import INTENSITIES, SourceGeometry

#: Spacings that differ by less than this factor are called equal.
EQUAL_SPACING = 1.1
#: nnU-Net's scheme of fixed numbers.
CT = "CTNormalization"
#: Normalization within the image's mask, and without one.
MASKED = {True: "within the image's mask", False: "over the whole image"}


def differences(source: SourceGeometry, target: SourceGeometry) -> list[str]:
    """Describe differences in normalization, spacing and modality. What one side does not record is not compared."""
    found = []
    if source.normalization and target.normalization and not _alike(source.normalization, target.normalization):
        there, here = _listed(source.normalization), _listed(target.normalization)
        found.append(f"Normalization differs: {there} in the source, {here} here.")
    elif CT in source.normalization and CT in target.normalization and target.intensities:
        there, here = map(_fixed_numbers, (source, target))
        if not there:
            found.append(f"{CT} has fixed numbers. The source does not record them: compare them with {here}.")
        elif there != here:
            found.append(f"The numbers of {CT} differ: {there} in the source, {here} here.")
    if source.masked and target.masked and not _alike(source.masked, target.masked):
        there, here = (_listed([MASKED[channel] for channel in side.masked]) for side in (source, target))
        found.append(f"Normalization differs: {there} in the source, {here} here.")
    if source.spacing and target.spacing and len(source.spacing) == len(target.spacing):
        factors = tuple(here / there for here, there in zip(target.spacing, source.spacing, strict=True))
        if max(*factors, *(1 / factor for factor in factors)) >= EQUAL_SPACING:
            there, here, times = map(_product, (source.spacing, target.spacing, factors))
            found.append(f"Spacing differs: {there} mm in the source, {here} mm here, factors {times}.")
    if found:
        found.append("Plans like the source's: nnssl_ext plan -d DATASET -c CONFIGURATION -o NAME --like-source FILE.")
    if source.modalities and target.modalities:
        theirs, ours = ([name.upper() for name in names] for names in (source.modalities, target.modalities))
        if not set(theirs) & set(ours):
            there, here = _listed(source.modalities), _listed(target.modalities)
            found.append(f"Modality differs: {there} in the source, {here} here.")
        elif theirs != ours and set(theirs) == set(ours):
            there, here = _listed(source.modalities), _listed(target.modalities)
            found.append(f"Channels are in another order: {there} in the source, {here} here. They are not reordered.")
    return found


def _alike(one: Sequence[object], other: Sequence[object]) -> bool:
    return one == other if len(one) == len(other) else set(one) == set(other)


def _fixed_numbers(side: SourceGeometry) -> str:
    """Describe the numbers of the channels that have fixed ones."""
    found = []
    for scheme, row in zip(side.normalization, side.intensities, strict=False):  # corpora may list more channels
        if scheme == CT:
            mean, deviation, low, high = (row[name] for name in INTENSITIES)
            found.append(f"mean {mean:.4g}, deviation {deviation:.4g}, clipped to {low:.4g} to {high:.4g}")
    return _listed(found)


def _listed(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def plans_like(
    plans: Mapping[str, Any], geometry: SourceGeometry, name: str, configurations: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Give plans a source's spacing, normalization and patch.

    The data must be preprocessed again.

    Args:
        plans: A data set's plans.
        geometry: The source's. What it does not record stays as it is.
        name: Name of the new plans, which their preprocessed data gets too.
        configurations: The configurations to change.

    Returns:
        The new plans, and lines about the changes.

    Raises:
        UserError: If the source records none of the three, or a patch that the network cannot take.
    """
    if not (geometry.spacing or geometry.normalization or geometry.patch_size):
        raise UserError("Expected a source that records spacing, normalization or patch, got one that records none")
    result, lines = deepcopy(dict(plans)), []
    result["configurations"] |= {name: configuration_of(plans, name) for name in configurations}
    for configuration in configurations:
        target = result["configurations"][configuration]
        axes = len(target["spacing"])
        if geometry.spacing and len(geometry.spacing) == axes:
            sizes = zip(target["median_image_size_in_voxels"], target["spacing"], geometry.spacing, strict=True)
            target["median_image_size_in_voxels"] = [size * old / new for size, old, new in sizes]
            target["spacing"] = list(geometry.spacing)
        if geometry.patch_size and len(geometry.patch_size) == axes:
            wanted = {**target, "patch_size": list(geometry.patch_size)}
            target["patch_size"] = legal_patch(wanted, None)
        if geometry.normalization:
            channels = len(target["normalization_schemes"])
            alike = len(set(geometry.normalization)) == 1 or len(geometry.normalization) == channels
            if not alike:
                raise UserError(
                    f"Expected one normalization or {channels}, got {_listed(geometry.normalization)}. Plan without "
                    f"--like-source and set normalization_schemes by hand"
                )
            target["normalization_schemes"] = list((geometry.normalization * channels)[:channels])
            if geometry.masked:
                target["use_mask_for_norm"] = list((geometry.masked * channels)[:channels])
            if CT in geometry.normalization and geometry.intensities:
                rows = (geometry.intensities * channels)[:channels]
                result[PROPERTIES] = {str(channel): dict(row) for channel, row in enumerate(rows)}
            elif CT in geometry.normalization:
                lines.append(f"{CT} keeps this data set's numbers: the source does not record its own")
        target["data_identifier"] = f"{name}_{configuration}"
        lines.append(
            f"{configuration}: spacing {_product(target['spacing'])} mm, {_listed(target['normalization_schemes'])}, "
            f"patch {_product(target['patch_size'])}"
        )
    if result.get(PROPERTIES) != plans.get(PROPERTIES):  # the data of other configurations have the old numbers
        for other, content in result["configurations"].items():
            if other not in configurations and "data_identifier" in content:  # else it inherits one
                content["data_identifier"] = f"{name}_{other}"
    return result, lines


def _product(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in values)
