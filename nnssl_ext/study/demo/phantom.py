"""Make the phantom, a small segmentation problem of any size.

Each case is an ellipsoid body with five organs of varied shape, place, texture and contrast, unlabeled structures
that look like them, a bias field and noise. Two organs, the left and the right twin, look alike and are told apart by
their place alone. A few labeled cases do not saturate it. D H W voxels, in SimpleITK's array order.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from scipy.ndimage import gaussian_filter, map_coordinates
from tqdm import tqdm

from nnssl_ext.errors import UserError
from nnssl_ext.recipe import write_json

#: Labels of the organs, in the order of dataset.json.
ORGANS = ("liver", "twin_left", "twin_right", "vessel", "lesion")
#: Value of voxels whose label is not known: every voxel of an unlabeled case.
IGNORE_LABEL = len(ORGANS) + 1


@dataclass(frozen=True)
class PhantomOptions:
    """Options of a phantom data set.

    Attributes:
        cases: All cases: labeled, unlabeled and test.
        labeled: Labeled training cases.
        test: Labeled cases held out for evaluation.
        seed: The same seed gives the same bytes.
        channels: Channels of a case, each with contrasts of its own.
        spacing: Voxel edges in mm (depth, height, width).
        field_of_view: Edges of the volume in mm.
    """

    cases: int = 60
    labeled: int = 6
    test: int = 14
    seed: int = 0
    channels: int = 1
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    field_of_view: float = 48.0

    def check(self) -> None:
        """Refuse numbers that make no data set."""
        if self.labeled < 1 or self.test < 1 or self.cases < self.labeled + self.test:
            raise UserError(
                f"a phantom of {self.cases} cases with {self.labeled} labeled and {self.test} test cases cannot be "
                f"made: give at least one of each, and no more than --cases together"
            )
        if self.channels < 1 or min(self.spacing) <= 0 or max(self.spacing) > self.field_of_view / 8:
            raise UserError(
                f"channels must be at least 1 and spacings between 0 and {self.field_of_view / 8:g} mm, "
                f"got {self.channels} and {self.spacing}"
            )


def write_phantom(folder: Path, options: PhantomOptions) -> None:
    """Write an ordinary nnU-Net raw data set.

    Unlabeled cases stand beside the labeled ones, every voxel of theirs with nnU-Net's ignore label. A
    ``splits_final.json`` comes along: fold 0 trains on the labeled cases alone, fold 1 on all that are not test cases
    (for pretraining, which reads no labels); both validate on the test cases. nnU-Net's planning takes it over.

    Args:
        folder: ``nnUNet_raw/DatasetXXX_NAME``; it must not exist.

    Raises:
        UserError: If the options make no sense or the folder exists.
    """
    options.check()
    if folder.exists():
        raise UserError(f"{folder} exists. Remove it or give another number with -d")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a call that is stopped leaves no half data set
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".phantom_") as unfinished:
        whole = Path(unfinished) / folder.name
        _write_cases(whole, options)
        whole.rename(folder)


def _write_cases(folder: Path, options: PhantomOptions) -> None:
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    names = {"labeled": [], "unlabeled": [], "test": []}  # type: dict[str, list[str]]
    for number in tqdm(range(options.cases), desc="Making cases", disable=None):  # no bar where nobody watches
        kind = "labeled" if number < options.labeled else "unlabeled"
        kind = "test" if number >= options.cases - options.test else kind
        name = f"phantom_{number:03d}"
        names[kind].append(name)
        image, label = make_case(options, number)
        if kind == "unlabeled":
            label = np.full_like(label, IGNORE_LABEL)
        for channel, volume in enumerate(image):
            _write(volume, folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz", options.spacing)
        _write(label, folder / "labelsTr" / f"{name}.nii.gz", options.spacing)

    labels = {"background": 0, **{organ: value for value, organ in enumerate(ORGANS, 1)}, "ignore": IGNORE_LABEL}
    write_json(
        {
            "channel_names": {str(channel): f"MR{channel}" for channel in range(options.channels)},
            "labels": labels,
            "numTraining": options.cases,
            "file_ending": ".nii.gz",
            "description": f"nnssl_ext phantom, seed {options.seed}",
        },
        folder / "dataset.json",
    )
    write_json(
        [
            {"train": names["labeled"], "val": names["test"]},
            {"train": names["labeled"] + names["unlabeled"], "val": names["test"]},
        ],
        folder / "splits_final.json",
    )


def make_case(options: PhantomOptions, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Make image (C, D, H, W) int16 and label (D, H, W) uint8."""
    generator = np.random.default_rng((options.seed, number))
    shape = tuple(round(options.field_of_view * generator.uniform(0.9, 1.1) / s) for s in options.spacing)
    grid = _warped_grid(generator, shape)
    label, strange = _draw_organs(generator, grid)
    body: Any = sum((axis / radius) ** 2 for axis, radius in zip(grid, (0.92, 0.88, 0.9), strict=True)) < 1
    channels = [_appearance(generator, label, strange, body, channel) for channel in range(options.channels)]
    return np.stack(channels), label


def _warped_grid(generator: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return deformed and rotated coordinates in [-1, 1]."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    bends = [_smooth(generator, shape, 4) for _ in range(3)]
    points = np.stack([axis + 0.07 * bend for axis, bend in zip(axes, bends, strict=True)])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        angle = generator.uniform(-0.2, 0.2)
        points[[a, b]] = [
            np.cos(angle) * points[a] - np.sin(angle) * points[b],
            np.sin(angle) * points[a] + np.cos(angle) * points[b],
        ]
    return list(points / generator.uniform(0.88, 1.08))


def _draw_organs(generator: np.random.Generator, grid: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels and a map of unlabeled structures."""

    def ellipsoid(centre: tuple, radii: tuple, jitter: float = 0.08, size: float = 0.2) -> np.ndarray:
        middle = np.asarray(centre) + generator.uniform(-jitter, jitter, 3)
        extent = np.asarray(radii) * generator.uniform(1 - size, 1 + size, 3)
        return sum(((g - m) / r) ** 2 for g, m, r in zip(grid, middle, extent, strict=True)) < 1

    label = np.zeros(grid[0].shape, np.uint8)
    strange = np.zeros(grid[0].shape, np.uint8)
    # structures without a label, somewhere in the body, with an organ's looks
    for _ in range(int(generator.integers(3, 7))):
        place = tuple(generator.uniform(-0.6, 0.6, 3))
        strange[ellipsoid(place, (0.15, 0.14, 0.16), 0.0, 0.4)] = generator.integers(1, len(ORGANS) + 1)

    liver = ellipsoid((0.0, -0.25, -0.3), (0.5, 0.38, 0.36))
    label[liver & ~ellipsoid((0.0, 0.05, -0.05), (0.3, 0.25, 0.25))] = 1
    for value, side in ((2, -1), (3, 1)):
        twin = ellipsoid((0.1, 0.42, side * 0.42), (0.34, 0.24, 0.22))
        label[twin & ~ellipsoid((0.1, 0.42, side * 0.28), (0.1, 0.1, 0.1))] = value
    # a vessel: a thin tube along a bent line through the whole body
    phase, bow = generator.uniform(0, 2 * np.pi), generator.uniform(0.08, 0.2)
    along = grid[0]
    distance = (grid[1] - 0.2 - bow * np.sin(2.5 * along + phase)) ** 2 + (
        grid[2] - bow * np.cos(2 * along + phase)
    ) ** 2
    label[(distance < generator.uniform(0.10, 0.14) ** 2) & (np.abs(along) < 0.85)] = 4
    # a lesion lies in the liver, or nowhere
    inside = np.argwhere(label == 1)
    if len(inside) and generator.random() < 0.85:
        place = inside[generator.integers(len(inside))]
        centre = tuple(g[tuple(place)] for g in grid)
        lesion = ellipsoid(centre, (0.2, 0.18, 0.19), 0.0, 0.3)
        label[lesion & (label == 1)] = 5
    return label, np.where(label == 0, strange, 0)


def _appearance(
    generator: np.random.Generator, label: np.ndarray, strange: np.ndarray, body: np.ndarray, channel: int
) -> np.ndarray:
    """Make the intensities of one channel.

    Contrasts of this case, texture per organ, bias field, blur and Rician noise.
    """
    tissue = generator.uniform(0.35, 0.5)
    sign = 1 if channel % 2 == 0 else -1  # a second channel has the opposite contrast
    contrasts = sign * np.array([0.0, 0.16, 0.24, 0.24, 0.34, -0.10]) * generator.uniform(0.8, 1.3)
    contrasts[1:] += generator.normal(0, 0.03, len(ORGANS))
    contrasts[3] = contrasts[2]  # the twins look alike
    looks = np.where(label > 0, label, strange)
    image = np.where(body, tissue + contrasts[looks], 0.02)
    coarse, fine = _smooth(generator, label.shape, 8), _smooth(generator, label.shape, 20)
    image += np.where(body, 0.06 * coarse, 0)  # tissue is not even
    image += np.where(np.isin(looks, (1, 5)), 0.05 * fine, 0)
    image *= 1 + 0.25 * _smooth(generator, label.shape, 2)
    image = gaussian_filter(image, generator.uniform(0.4, 0.9))
    noise = generator.uniform(0.02, 0.05)
    image = np.hypot(
        image + noise * generator.standard_normal(label.shape), noise * generator.standard_normal(label.shape)
    )
    return np.clip(image * 1000 * generator.uniform(0.7, 1.4), 0, 32767).astype(np.int16)


def _smooth(generator: np.random.Generator, shape: tuple[int, ...], knots: int) -> np.ndarray:
    """Draw a smooth, about standard normal field. It interpolates ``knots`` values per axis by cubic splines."""
    coarse = np.pad(generator.standard_normal((knots,) * 3), 1, mode="reflect")
    points = np.meshgrid(*(np.linspace(1, knots, n) for n in shape), indexing="ij")
    return map_coordinates(coarse, points, order=3)


def _write(volume: np.ndarray, path: Path, spacing: tuple[float, float, float]) -> None:
    image = SimpleITK.GetImageFromArray(volume)
    image.SetSpacing([float(edge) for edge in reversed(spacing)])
    SimpleITK.WriteImage(image, str(path))
