"""Hold volumes and check geometry, values and label maps."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from nnssl_ext.data.index import SAMPLE, sampled

#: Most voxels of a volume: 8 GB of float32.
MAX_VOXELS = 2**31
#: Largest cosine between two axes that still count as perpendicular (0.6 degrees).
MAX_COSINE = 0.01
#: Values of an image without structure names: fewer are always a label map.
FEW_VALUES = 16
#: Most structures of an atlas.
MANY_VALUES = 2000
#: Share of equal neighbors from which integers are a label map, and where the file's name says so too.
EQUAL_NEIGHBORS, EQUAL_NEIGHBORS_NAMED = 0.6, 0.3
#: Names of label maps: x_seg, x-label, mask_x, aparc+aseg, x_dseg.
LABEL_NAME = re.compile(r"(^|[^a-z])(d?seg|segmentations?|labels?|masks?|rois?|atlas|parc|aseg|aparc|gt)([^a-z]|$)")


class NotWrittenError(Exception):
    """Report what cannot be written. It is plain, so that it passes between processes."""


class Unusable(Exception):  # noqa: N818 (a verdict on a file, not an error of the program)
    """A damaged volume, and why it cannot be used.

    Attributes:
        series: UID of its DICOM series.
        modality: As DICOM names it.
    """

    kind = ""
    series = modality = ""


class NotAnImage(Unusable):
    """An intact file that holds no 3-D image.

    Args:
        kind: Counted at the end of a call, as "localizer".
        detail: Of this file.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass
class Volume:
    """One channel of one image.

    Attributes:
        array: (D, H, W) float32.
        affine: (4, 4), from voxel indices x y z to mm, RAS.
        remarks: What was done to it or is unusual.
        modality: As DICOM names it; empty if unknown.
        series: UID of its DICOM series; empty for files.
    """

    array: np.ndarray
    affine: np.ndarray
    remarks: list[str] = field(default_factory=list)
    modality: str = ""
    series: str = ""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Return the voxel edges in mm, D H W."""
        return tuple(float(edge) for edge in np.linalg.norm(self.affine[:3, :3], axis=0)[::-1])

    @property
    def orientation(self) -> str:
        """Return the directions of axes x y z, as "LPS"."""
        return "".join(nibabel.aff2axcodes(self.affine))

    @property
    def geometry(self) -> dict[str, tuple[float, ...]]:
        """Return spacing, origin and direction, as SimpleITK does."""
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine
        spacing = self.spacing[::-1]
        direction = lps[:3, :3] / spacing
        return {
            "spacing": spacing,
            "origin": tuple(lps[:3, 3].tolist()),
            "direction": tuple(direction.ravel().tolist()),
        }

    def canonical(self) -> Volume:
        """Turn the axes to right, anterior, superior."""
        turn = io_orientation(self.affine)
        array = apply_orientation(self.array.T, turn).T
        affine = self.affine @ inv_ornt_aff(turn, self.array.T.shape)
        return Volume(np.ascontiguousarray(array), affine, self.remarks, self.modality, self.series)

    def check(self, name: str = "") -> None:
        """Refuse images that no method could learn from.

        Args:
            name: Of the file; it helps to tell label maps.

        Raises:
            NotAnImage: For one slice and for label maps.
            Unusable: For NaN, infinite values and constant images.
        """
        if min(self.array.shape) < 2:
            raise NotAnImage("single slice", f"shape {self.array.shape}")
        if not np.isfinite(self.array).all():
            raise Unusable("holds NaN or infinite values")
        if (self.array == self.array[:1, :1, :1]).all():
            raise Unusable("is constant: zero variance")
        structures = label_values(self.array, name)
        if structures:
            raise NotAnImage("label map", f"only {structures} different values")

    def digest(self) -> bytes:
        """Hash voxels, shape and spacing. The hash is equal for equal content in any format and axis order."""
        volume = self.canonical()
        head = f"{volume.array.shape} {[round(round(edge, 6), 4) for edge in volume.spacing]}".encode()
        return hashlib.sha256(head + hashlib.sha256(volume.array.data).digest()).digest()


def checked_affine(affine: np.ndarray) -> np.ndarray:
    """Refuse affines with unknown voxel size or shear.

    Raises:
        Unusable: Otherwise.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or spacing.min() <= 0:
        raise Unusable(f"has unknown voxel size: spacing {tuple(spacing.tolist())}")
    if (cosine := largest_cosine(affine)) > MAX_COSINE:
        raise Unusable(f"is sheared: its axes are {np.degrees(np.arccos(min(1.0, cosine))):.1f} degrees apart, not 90")
    return affine


def largest_cosine(affine: np.ndarray) -> float:
    """Return the largest absolute cosine between two axes. It is infinite for unusable affines."""
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or lengths.min() <= 0:
        return float("inf")
    directions = axes / lengths
    return float(np.abs(directions.T @ directions - np.eye(3)).max())


def label_values(array: np.ndarray, name: str = "") -> int:
    """Count a label map's values (D, H, W), 0 for an image.

    Label maps hold integers, few per volume, in pieces: most neighbors are equal. Images have noise.
    """
    found, counts = np.unique(sampled(array), return_counts=True)
    most = min(MANY_VALUES, max(FEW_VALUES, array.size // 50))
    if len(found) > FEW_VALUES:
        limit = EQUAL_NEIGHBORS_NAMED if LABEL_NAME.search(name.casefold()) else EQUAL_NEIGHBORS
        if len(found) > most or not _integers(found) or _equal_neighbors(array, found[counts.argmax()]) < limit:
            return 0
    values = np.unique(array)
    return len(values) if len(values) <= FEW_VALUES or (len(values) <= most and _integers(values)) else 0


def _equal_neighbors(array: np.ndarray, background: float) -> float:
    """Return the share of equal neighbors within planes. Pairs of background do not count."""
    planes = array[:: max(1, array.size // (20 * SAMPLE))]
    equal = pairs = 0
    for first, second in ((planes[:, :-1], planes[:, 1:]), (planes[:, :, :-1], planes[:, :, 1:])):
        inside = (first != background) | (second != background)
        pairs += int(np.count_nonzero(inside))
        equal += int(np.count_nonzero(inside & (first == second)))
    return equal / max(1, pairs)


def _integers(values: np.ndarray) -> bool:
    return bool((values == np.round(values)).all())
