"""Pretrained weights from anywhere, as one thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """What the source's network was trained on, as far as its file says.

    Attributes:
        spacing: Millimetres per voxel; None if it was not fixed or is not known.
        strides: Of each encoder stage, per axis; None if not known.
        patch_size: Edges in voxels; None if not known.
    """

    spacing: tuple[float, ...] | None = None
    strides: tuple[tuple[int, ...], ...] | None = None
    patch_size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Source:
    """Pretrained weights and what is known of them.

    Attributes:
        path: The file they were read from.
        kind: What sort of file it is, in words.
        weights: One canonical name for each tensor -> its values.
        geometry: What the network was trained on.
        untrained: Canonical names of tensors that the pretraining left at their initial values.
        citations: Whom to cite, as the file says.
        note: One line worth knowing; '' if there is none.
    """

    path: Path
    kind: str
    weights: dict[str, Tensor]
    geometry: Geometry = Geometry()
    untrained: frozenset[str] = frozenset()
    citations: list[Any] = field(default_factory=list)
    note: str = ""
