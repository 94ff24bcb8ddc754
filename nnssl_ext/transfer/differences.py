"""Compare the data of a source with the data of a target."""

from __future__ import annotations

from nnssl_ext.transfer.source import SourceGeometry

#: Spacings that differ by less than this factor are called equal.
EQUAL_SPACING = 1.1


def differences(source: SourceGeometry, target: SourceGeometry) -> list[str]:
    """Describe where the source's normalization, spacing and modality differ from the target's, and by how much.

    What one side does not record is not compared.
    """
    found = []
    if source.normalization and target.normalization and set(source.normalization) ^ set(target.normalization):
        there, here = _listed(source.normalization), _listed(target.normalization)
        found.append(f"Normalization differs: {there} in the source, {here} here.")
    if source.spacing and target.spacing and len(source.spacing) == len(target.spacing):
        factors = tuple(here / there for here, there in zip(target.spacing, source.spacing, strict=True))
        if max(*factors, *(1 / factor for factor in factors)) >= EQUAL_SPACING:
            there, here, times = (" x ".join(f"{n:.3g}" for n in v) for v in (source.spacing, target.spacing, factors))
            found.append(f"Spacing differs: {there} mm in the source, {here} mm here, factors {times}.")
    if source.modalities and target.modalities:
        theirs, ours = ({name.upper() for name in names} for names in (source.modalities, target.modalities))
        if not theirs & ours:
            there, here = _listed(source.modalities), _listed(target.modalities)
            found.append(f"Modality differs: {there} in the source, {here} here.")
    if found:
        found.append("Plans like the source's: nnssl_ext plan --like-source FILE.")
    return found


def _listed(values: tuple[str, ...]) -> str:
    return ", ".join(dict.fromkeys(values))
