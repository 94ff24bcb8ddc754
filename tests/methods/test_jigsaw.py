from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods.jigsaw import Jigsaw, JigsawSettings, distant_permutations
from nnssl_ext.methods.patches import PatchIntensitySettings
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.spatial import SourceBox
from tests.methods.helpers import CPU, batch_of, build, noise_boxes, views_of, with_asked_gap, write_cases
from tests.support.looks import without_views

NO_VIEWS = without_views(PatchIntensitySettings)
#: Patches as published: next to each other, in their own intensities.
PUBLISHED = replace(JigsawSettings(), gap=0.0, jitter=0.0, standardize=False, intensity=NO_VIEWS, max_voxels=99.0)
OURS = replace(JigsawSettings(), max_voxels=99.0)


def read(method: Jigsaw, boxes: list[SourceBox]) -> torch.Tensor:
    """Patches of windows, one channel: (B, cells D, cells H, cells W, D, H, W)."""
    indices = list(range(len(boxes)))
    patches = method.views(CropBatch(indices, [boxes]), BatchRandom(0, VIEWS, indices, CPU))["patches"]
    return patches[:, :, 0].unflatten(1, method.layout.grid)


def test_a_hundred_permutations_far_from_each_other() -> None:
    chosen = distant_permutations(np.random.default_rng(0), 27, 100)
    assert chosen.shape == (100, 27)
    assert (np.sort(chosen) == np.arange(27)).all()
    distance = (chosen[:, None] != chosen[None]).sum(-1)
    assert distance[~np.eye(100, dtype=bool)].min() >= 25
    # the published set is drawn without looking: some of its orders are nearer
    drawn = np.random.default_rng(0).permuted(np.tile(np.arange(27), (100, 1)), axis=1)
    assert (drawn[:, None] != drawn[None]).sum(-1)[~np.eye(100, dtype=bool)].min() < 25


@pytest.mark.parametrize(("number", "expected"), [(2, 2), (3, 6), (4, 24), (8, 100)])
def test_small_puzzles_have_fewer_orders(number: int, expected: int) -> None:
    chosen = distant_permutations(np.random.default_rng(0), number, 100)
    assert len(np.unique(chosen, axis=0)) == len(chosen) == expected


def test_permutations_follow_from_the_seed_and_stay_in_the_state() -> None:
    first, again = build(Jigsaw, OURS), build(Jigsaw, OURS)
    assert torch.equal(first.permutations, again.permutations)
    torch.manual_seed(1)
    other = Jigsaw(again.backbone, OURS, again.geometry)
    assert not torch.equal(first.permutations, other.permutations)
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.permutations, other.permutations)


def solved(patches: torch.Tensor, permutations: torch.Tensor) -> float:
    """Share of windows whose order is found from the patches' means alone: the one that makes them a linear ramp."""
    means = patches.mean((-3, -2, -1)).double()
    cells = torch.stack(torch.meshgrid(*(torch.arange(n) for n in means.shape[1:]), indexing="ij"), -1)
    places = torch.cat([cells.flatten(0, 2).double(), torch.ones(means[0].numel(), 1)], 1)
    off_plane = torch.eye(len(places), dtype=torch.float64) - places @ torch.linalg.pinv(places)
    right = 0
    for window, mean in enumerate(means.flatten(1)):
        answer = window % len(permutations)
        shuffled = mean[permutations[answer]]
        candidates = torch.stack([shuffled[order.argsort()] for order in permutations])
        right += int((candidates @ off_plane).norm(dim=1).argmin() == answer)
    return right / len(means)


def test_intensity_drift_solves_the_published_puzzle_and_not_ours() -> None:
    for settings, least, most in ((PUBLISHED, 0.95, 1.0), (OURS, 0.0, 0.1)):
        method = with_asked_gap(build(Jigsaw, settings))
        ramps = noise_boxes(method.layout.window, 50)
        for index, box in enumerate(ramps):
            axes = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in method.layout.window), indexing="ij")
            slope = np.random.default_rng(index).standard_normal(3)
            box.data = torch.from_numpy(sum(s * a for s, a in zip(slope, axes, strict=True))[None].astype(np.float32))
        assert least <= solved(read(method, ramps), method.permutations) <= most


def matched(patches: torch.Tensor) -> float:
    """Share of patches whose right-hand neighbour is the patch with the most similar face."""
    right, left = patches[:, :-1].flatten(1, 3)[..., -1, :, :], patches[..., 0, :, :].flatten(1, 3)
    number, step = right.shape[1], patches.shape[2] * patches.shape[3]
    distance = (right[:, :, None] - left[:, None]).abs().mean((-2, -1))  # (B, N with a neighbour, N)
    return (distance.argmin(-1) == torch.arange(number) + step).float().mean().item()


def test_edges_match_in_the_published_puzzle_and_not_in_ours() -> None:
    found = {}
    for name, settings in (("published", PUBLISHED), ("ours", OURS)):
        method = with_asked_gap(build(Jigsaw, settings))
        found[name] = matched(read(method, noise_boxes(method.layout.window, 30, (1.0, 1.0, 1.0))))
    assert found["published"] > 0.95
    assert found["ours"] < 0.3


def test_the_head_sees_patches_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    method = build(Jigsaw, OURS)
    views = views_of(write_cases(tmp_path), method, [0, 1])
    seen: list[torch.Tensor] = []
    method.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method(views)
    embedded = method.embed(method.encode(views["patches"]))
    for sample in range(2):
        for puzzle, order in enumerate(views["order"][sample]):
            expected = embedded[sample, method.permutations[order]].flatten()
            torch.testing.assert_close(seen[0][sample, puzzle], expected)


def test_patches_look_different_from_each_other(tmp_path: Path) -> None:
    folder = write_cases(tmp_path)
    plain = replace(OURS, intensity=NO_VIEWS, standardize=False)
    bare = views_of(folder, build(Jigsaw, plain), [0])["patches"]
    strong = PatchIntensitySettings(
        gamma_probability=1.0, gamma=[0.5, 2.0], contrast_probability=0, noise_probability=0
    )
    changed = views_of(folder, build(Jigsaw, replace(plain, intensity=strong)), [0])["patches"]
    difference = (changed - bare).abs().mean((-3, -2, -1)).flatten()
    assert (difference > 0).all()
    assert len(difference.unique()) > len(difference) / 2


def test_magnified_windows_hold_all_patches(tmp_path: Path) -> None:
    method = build(Jigsaw, replace(OURS, gap=1.0))  # too far apart for the cases
    (boxes,) = batch_of(write_cases(tmp_path), method, [0]).boxes
    assert method.layout.zoom > 1
    np.testing.assert_allclose(boxes[0].matrix, np.eye(3) * boxes[0].matrix[0, 0])
    assert boxes[0].matrix[0, 0] == pytest.approx(1 / method.layout.zoom, rel=0.05)
