from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods.patches import PatchIntensitySettings
from nnssl_ext.methods.relative_patch_location import RelativePatchLocation, RelativePatchLocationSettings
from nnssl_ext.views.random import VIEWS, BatchRandom
from tests.methods.helpers import CPU, build, noise_boxes, views_of, with_asked_gap, write_cases
from tests.support.looks import without_views

NO_VIEWS = without_views(PatchIntensitySettings)
OURS = replace(RelativePatchLocationSettings(), neighbors_per_window=26)
#: Patches as published: next to each other, in their own intensities.
PUBLISHED = replace(OURS, gap=0.0, jitter=0.0, standardize=False, intensity=NO_VIEWS)


def test_each_neighbor_lies_where_its_class_says() -> None:
    method = with_asked_gap(build(RelativePatchLocation, PUBLISHED))
    assert method.classes == 26
    assert method.layout.grid == (3, 3, 3)
    boxes = noise_boxes(method.layout.window, 2)
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in method.layout.window), indexing="ij")).float()
    for box in boxes:
        box.data = place  # each voxel shows where it is
    views = method.views(CropBatch([0, 1], [boxes]), BatchRandom(0, VIEWS, [0, 1], CPU))
    corner = views["patches"][..., 0, 0, 0]
    sides = (corner[:, 1:] - corner[:, :1]) / torch.tensor(method.layout.patch)
    cells = [cell for cell in np.ndindex(3, 3, 3) if cell != (1, 1, 1)]
    for sample in range(2):
        assert sorted(views["location"][sample].tolist()) == list(range(26))
        for side, location in zip(sides[sample], views["location"][sample], strict=True):
            assert side.tolist() == [c - 1 for c in cells[location]]


def test_neighbors_are_drawn_without_repetition(tmp_path: Path) -> None:
    method = build(RelativePatchLocation, replace(OURS, neighbors_per_window=5))
    views = views_of(write_cases(tmp_path), method, [0, 1, 2])
    assert views["patches"].shape[1] == 6
    for row in views["location"]:
        assert len(row.unique()) == 5
    assert not torch.equal(views["location"][0], views["location"][1])


def nearest_class(settings: RelativePatchLocationSettings) -> float:
    """How often the class is told from the difference of two patches' means; volumes are brighter to one side."""
    method = with_asked_gap(build(RelativePatchLocation, settings))
    boxes = noise_boxes(method.layout.window, 40)
    axes = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in method.layout.window), indexing="ij")
    drift = torch.from_numpy((axes[0] + 3 * axes[1] + 9 * axes[2])[None].astype(np.float32))
    for box in boxes:
        box.data = 0.3 * box.data + drift
    indices = list(range(40))
    views = method.views(CropBatch(indices, [boxes]), BatchRandom(0, VIEWS, indices, CPU))
    means = views["patches"].mean((2, 3, 4, 5))
    difference, label = means[:, 1:] - means[:, :1], views["location"]
    centres = torch.stack([difference[:20][label[:20] == location].mean() for location in range(26)])
    guess = (difference[20:, :, None] - centres).abs().argmin(-1)
    return (guess == label[20:]).float().mean().item()


def test_intensity_drift_gives_the_published_location_away_and_not_ours() -> None:
    assert nearest_class(PUBLISHED) > 0.9
    assert nearest_class(OURS) < 0.1


def touching(settings: RelativePatchLocationSettings) -> float:
    """How often the neighbour on the far side of an axis is the one whose face is most like the centre's."""
    method = with_asked_gap(build(RelativePatchLocation, settings))
    boxes = noise_boxes(method.layout.window, 40, (1.0, 1.0, 1.0))
    indices = list(range(40))
    views = method.views(CropBatch(indices, [boxes]), BatchRandom(0, VIEWS, indices, CPU))
    face = views["patches"][:, 0, 0, -1]  # (B, H, W) the centre's last plane
    others = views["patches"][:, 1:, 0, 0]  # (B, N, H, W) the neighbours' first
    best = (others - face[:, None]).abs().mean((-2, -1)).argmin(1)
    # 21 is the cell (2, 1, 1), counted without the centre
    return (views["location"].gather(1, best[:, None]) == 21).float().mean().item()


def test_edges_match_in_the_published_task_and_not_in_ours() -> None:
    assert touching(PUBLISHED) > 0.9
    assert touching(OURS) < 0.3
