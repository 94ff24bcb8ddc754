import math
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnssl_ext.data.crops import CropBatch, CropDataset, CropRequest, collate
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.losses.contrastive import hits, info_nce
from nnssl_ext.methods.contrastive_predictive_coding import (
    ContrastivePredictiveCoding,
    ContrastivePredictiveCodingSettings,
)
from nnssl_ext.methods.patches import PatchIntensitySettings
from nnssl_ext.views.random import VIEWS, BatchRandom
from tests.methods.helpers import CPU, batch_of, build, noise_boxes, views_of
from tests.support.looks import without_views

NO_VIEWS = without_views(PatchIntensitySettings)
OURS = ContrastivePredictiveCodingSettings()
BARE = replace(OURS, intensity=NO_VIEWS, standardize=False)


def test_rows_come_in_the_direction_that_is_drawn_and_the_skipped_one_is_not_read(folder: Path) -> None:
    method = build(ContrastivePredictiveCoding, BARE)
    batch = batch_of(folder, method, list(range(40)))
    views = method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))
    assert set(views["direction"].tolist()) == set(range(6))
    assert views["patches"].shape[1] == 4 * method.columns == 16
    one = build(ContrastivePredictiveCoding, replace(BARE, directions="one"))
    assert set(views_of(folder, one, list(range(10)))["direction"].tolist()) == {0}


@pytest.mark.parametrize("loss", ["infonce", "bce"])
@pytest.mark.parametrize("aggregator", ["gru", "convolution"])
def test_every_combination_learns_on_one_batch(folder: Path, aggregator: str, loss: str) -> None:
    method = build(ContrastivePredictiveCoding, replace(BARE, aggregator=aggregator, loss=loss))
    views = views_of(folder, method, [0, 1])
    chance = math.log(32) if loss == "infonce" else math.log(2)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3)
    for _ in range(40):
        value = method(views)["loss"].mean()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert value.item() < 0.5 * chance


def test_prediction_sees_nothing_of_what_it_predicts(folder: Path) -> None:
    method = build(ContrastivePredictiveCoding, BARE)
    views = views_of(folder, method, [0])
    seen: list[torch.Tensor] = []
    method.predict.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    method(views)
    views["patches"][:, -method.targets :] = torch.randn_like(views["patches"][:, -method.targets :])
    method(views)
    assert torch.equal(seen[0], seen[1])


def test_all_patches_of_the_batch_are_candidates_and_accuracy_is_within_a_window(folder: Path) -> None:
    method = build(ContrastivePredictiveCoding, BARE).eval()
    for parameter in method.predict.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        result = method(views_of(folder, method, [0, 1, 2]))
    # cosines with a zero vector are zero: all candidates are equal
    # of a window's 8 targets one overlaps the right one, and is no candidate
    torch.testing.assert_close(result["loss"], torch.full((3,), math.log(3 * 16 - 1)))
    torch.testing.assert_close(result["accuracy"], torch.full((3,), 1 / 7))
    torch.testing.assert_close(result["batch_accuracy"], torch.full((3,), 1 / 47))
    torch.testing.assert_close(result["chance"], torch.full((3,), 1 / 7))


def accuracy_from_padding(folder: Path, fit: bool) -> tuple[float, float]:
    """How often a predicted patch is found by its share of zeros alone; on noise, where nothing else is to be found.

    The share that is expected at a place is known from other windows of the same direction. Returns it and chance.
    """
    method = build(ContrastivePredictiveCoding, replace(BARE, directions="one"))
    (crop,) = method.crops(method.settings, method.geometry).crops
    index = CaseIndex.build(folder)
    # as published, the window is cut where it falls, in its own resolution, and padded
    request = CropRequest((crop if fit else replace(crop, fit=False, scale=1.0),))
    data = CropDataset(index, index.cases, request, 0)
    batch = collate([data[i] for i in range(80)])
    patches = method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))["patches"]
    share = (patches[:, -method.targets :] == 0).float().mean((2, 3, 4, 5))  # (80, T)
    expected = share[:40].mean(0)
    scores = -(share[40:, None] - expected[None, :, None]).abs().flatten(0, 1)
    right = torch.arange(method.targets).repeat(40)
    return hits(scores, right).mean().item(), 1 / method.targets


def test_padding_gives_the_published_task_away_and_not_ours(tmp_path: Path) -> None:
    for case in range(4):
        noise = np.random.default_rng(case).standard_normal((2, 20, 20, 20)).astype(np.float32)
        blosc2.asarray(noise, urlpath=str(tmp_path / f"c{case}.b2nd"), mode="w")
    accuracy, chance = accuracy_from_padding(tmp_path, fit=False)
    assert accuracy > 1.5 * chance
    accuracy, chance = accuracy_from_padding(tmp_path, fit=True)
    assert accuracy == pytest.approx(chance)


def copied(kept_apart: bool) -> float:
    """Share of predicted voxels that the context shows already, where no row is skipped."""
    method = build(ContrastivePredictiveCoding, replace(BARE, skipped_rows=0))
    published = replace(method.layout, rows=replace(method.layout.rows, gap=-1.0, room=0))
    rows = method.layout if kept_apart else published
    starts = rows.starts(torch.arange(6), torch.zeros(6, 3))
    shown = torch.zeros(6, *(2 * edge for edge in rows.window))
    for sample, places in enumerate(starts[:, : -method.targets].tolist()):
        for z, y, x in places:
            shown[sample, z : z + rows.patch[0], y : y + rows.patch[1], x : x + rows.patch[2]] = 1
    asked = [
        shown[sample, z : z + rows.patch[0], y : y + rows.patch[1], x : x + rows.patch[2]].mean()
        for sample, places in enumerate(starts[:, -method.targets :].tolist())
        for z, y, x in places
    ]
    return torch.stack(asked).mean().item()


def test_overlapping_rows_can_be_copied_unless_they_are_kept_apart() -> None:
    assert copied(kept_apart=False) > 0.2
    assert copied(kept_apart=True) == 0


def matched(gap: float) -> tuple[float, float]:
    """How often the face of a patch that is next to the context's is the most like it, and chance; on smooth noise."""
    method = build(ContrastivePredictiveCoding, replace(BARE, directions="one", gap=gap))
    rows = method.layout if gap else replace(method.layout, rows=replace(method.layout.rows, room=0))
    method.layout = rows
    boxes = noise_boxes(rows.window, 60, (1.0, 1.0, 1.0))
    indices = list(range(60))
    patches = method.views(CropBatch(indices, [boxes]), BatchRandom(0, VIEWS, indices, CPU))["patches"][:, :, 0]
    asked = -method.targets
    last = patches[:, asked - method.columns : asked, -1].flatten(2)  # (B, Q, H W), their farther faces
    first = patches[:, asked:, 0].flatten(2)  # (B, T, H W)
    nearest = (last[:, :, None] - first[:, None]).abs().mean(-1).argmin(-1)  # (B, Q)
    return (nearest == torch.arange(method.columns)).float().mean().item(), 1 / method.targets


def test_faces_match_where_context_and_prediction_touch_and_not_in_ours() -> None:
    touching, chance = matched(0.0)
    assert touching > 0.7
    apart, _ = matched(OURS.gap)
    assert apart < 2 * chance


def test_patches_that_share_voxels_with_the_target_are_no_negatives() -> None:
    method = build(ContrastivePredictiveCoding, BARE)
    starts = method.layout.starts(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3))[0]
    patch = torch.tensor(method.layout.patch)
    shared = ((starts[:, None] - starts).abs() < patch).all(-1) & ~torch.eye(len(starts), dtype=torch.bool)
    assert torch.equal(shared[-method.targets :], method.overlaps)
    assert method.overlaps.any(1).all()
    apart = build(ContrastivePredictiveCoding, replace(BARE, overlap=0.0, zoom=4.0))
    assert not apart.overlaps.any()


def test_the_one_negative_shares_no_voxels_with_the_target() -> None:
    method = build(ContrastivePredictiveCoding, replace(BARE, loss="bce"))
    embedded = torch.eye(16, requires_grad=True)[None]
    method.encode, method.embed = lambda _: embedded, torch.nn.Identity()
    drawn = torch.zeros(method.targets, 16)
    for target in range(method.targets):
        # only this target's prediction passes a gradient on
        one = torch.zeros(method.targets, 16).index_fill_(0, torch.tensor(target), 1.0)
        method._predict = lambda *_, prediction=one: prediction
        for draw in torch.linspace(0, 0.99, 40):
            views = {"patches": None, "direction": None, "negative": draw.expand(1, method.targets)}
            views["case"] = torch.zeros(1)
            (gradient,) = torch.autograd.grad(method(views)["loss"].sum(), embedded)
            drawn[target] += gradient[0].abs().sum(1)
    assert torch.equal(drawn == 0, method.overlaps)


@pytest.mark.parametrize("loss", ["infonce", "bce"])
def test_another_window_of_the_same_case_gives_no_negatives(loss: str) -> None:
    method = build(ContrastivePredictiveCoding, replace(BARE, loss=loss))
    embedded = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    method.encode, method.embed = lambda _: embedded, torch.nn.Identity()
    method._predict = lambda *_: torch.ones(2 * method.targets, 16)
    for other, reaches in ((3, False), (4, True)):
        views = {"patches": None, "direction": None, "negative": torch.full((2, method.targets), 0.99)}
        views["case"] = torch.tensor([3, other])
        (gradient,) = torch.autograd.grad(method(views)["loss"][0], embedded)
        assert gradient[0].any()
        assert bool(gradient[1].any()) == reaches


def test_excluded_candidates_have_no_gradient() -> None:
    candidates = torch.randn(4, 8, requires_grad=True)
    excluded = torch.tensor([[False, False, True, False]])
    info_nce(torch.randn(1, 8), candidates, torch.tensor([0]), 0.1, excluded).sum().backward()
    assert candidates.grad is not None
    assert candidates.grad.abs().sum(1).bool().tolist() == [True, True, False, True]
