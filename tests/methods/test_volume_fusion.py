from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.losses.dense import IGNORE
from nnssl_ext.methods import SCHEMAS
from nnssl_ext.methods.volume_fusion import FILTERS, VolumeFusion, VolumeFusionSettings, split_off
from nnssl_ext.recipe import load_recipe
from nnssl_ext.settings import split_sections
from nnssl_ext.views.appearance import IntensitySettings
from nnssl_ext.views.cpu import chunks as slabs
from nnssl_ext.views.fusion import GridLayout
from nnssl_ext.views.intensity import invert
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.spatial import is_resampled
from tests.methods.helpers import CPU, OFF, SIZE, batch_of, build, noise_boxes, views_of

#: No augmentation at all, every voxel a target.
BARE = replace(VolumeFusionSettings(), flip=0, rot90=0, affine=0, intensity=OFF, ignore_below=0, match_noise=False)


@pytest.mark.parametrize("layout", ["boxes", "grid"])
@pytest.mark.parametrize("source", ["other", "same"])
def test_the_level_says_how_much_of_each_source_is_seen(folder: Path, source: str, layout: str) -> None:
    method = build(VolumeFusion, replace(BARE, foreground_case=source, layout=layout, block_edge=[3, 6]))
    batch = batch_of(folder, method, [0, 1, 2])
    views = method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))
    assert views["image"].shape == (3, 2, *SIZE)
    background, foreground = (torch.stack([box.data for box in row]) for row in batch.boxes)
    same_case = [a.case == b.case for a, b in zip(*batch.boxes, strict=True)]
    assert same_case == [source == "same"] * 3
    share = views["level"][:, None].float() / 4
    torch.testing.assert_close(views["image"], share * foreground + (1 - share) * background)
    assert set(views["level"].unique().tolist()) == {0, 1, 2, 3, 4}


def test_undecidable_voxels_and_padding_are_ignored(folder: Path, tmp_path: Path) -> None:
    method = build(VolumeFusion, replace(BARE, ignore_below=0.3))
    batch = batch_of(folder, method, [0, 1])
    difference = torch.stack([(a.data - b.data).abs().amax(0) for a, b in zip(*batch.boxes, strict=True)])
    level = method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))["level"]
    assert torch.equal(level == IGNORE, difference < 0.3)
    assert 0.05 < (level == IGNORE).float().mean() < 0.95
    for row in batch.boxes:
        for box in row:
            box.data, box.center = box.data[:, 4:], box.center - np.array([4, 0, 0])
    padded = method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))
    assert (padded["level"][:, :4] == IGNORE).all()
    assert not padded["image"][:, :, :4].any()


def test_what_nnunet_keeps_zero_is_zero_in_the_fused_image(folder: Path) -> None:
    """Though noise that the fusion took away is added."""
    settings = VolumeFusionSettings(intensity=IntensitySettings(noise_probability=1.0, blur_probability=1.0))
    images = []
    for masked in ((False, False), (True, True)):
        method = build(VolumeFusion, settings, masked=masked)
        batch = batch_of(folder, method, [0, 1])
        for row in batch.boxes:
            for box in row:
                box.data, box.matrix = box.data.clone(), np.eye(3)
                box.data[:, :6] = 0.0
        images.append(method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))["image"])
    plain, kept = images
    outside = (kept == 0).all(1)
    assert 0.1 < outside.float().mean() < 0.9
    assert (plain[outside[:, None].expand_as(plain)] != 0).any()


@pytest.mark.parametrize("at_once", [1, slabs.SAMPLES])
def test_a_sample_looks_the_same_in_any_batch(folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(slabs, "SAMPLES", at_once)
    looks = IntensitySettings(noise_probability=0.5, blur_probability=0.5, histogram_probability=0.5)
    method = build(VolumeFusion, VolumeFusionSettings(remap="percentile", intensity=looks))
    together = views_of(folder, method, [3, 4, 5])
    for place, index in enumerate([3, 4, 5]):
        alone = views_of(folder, method, [index])
        for key in together:
            assert torch.equal(together[key][place], alone[key][0])


def test_blocks_and_boxes_are_thinner_along_a_thick_axis(folder: Path) -> None:
    def shortest_run(layout: str, spacing: tuple) -> list[int]:
        method = build(
            VolumeFusion, replace(BARE, layout=layout, block_edge=[8, 8], min_box_edge=8, boxes=[1, 1]), spacing
        )
        level = method._draw_levels(BatchRandom(0, VIEWS, list(range(30)), CPU)).long()
        found = []
        for axis in (1, 2, 3):
            moved = level.movedim(axis, -1)
            shown = (moved > 0).flatten(1, 2).any(1) if layout == "boxes" else moved[:, 0, 0] > 0
            runs = [len(r) for row in shown.int().tolist() for r in "".join(map(str, row)).strip("0").split("0") if r]
            found.append(min(runs))
        return found

    for layout in ("boxes", "grid"):
        assert shortest_run(layout, (4.0, 1.0, 1.0))[0] < 8
    assert shortest_run("boxes", (1.0, 1.0, 1.0)) == [8, 8, 8]
    assert shortest_run("boxes", (4.0, 1.0, 1.0))[0] == 2


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_the_whole_network_and_every_finer_head_learns(folder: Path, kind: str) -> None:
    method = build(VolumeFusion, VolumeFusionSettings(levels=2), kind=kind)
    for name, parameter in method.named_parameters():
        if name.endswith("norm.weight"):  # residual branches start at zero and pass no gradient
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    result = method(views_of(folder, method, [0, 1]))
    assert {key: tuple(value.shape) for key, value in result.items()} == {
        "loss": (2,),
        "dice_loss": (2,),
        "cross_entropy": (2,),
    }
    result["loss"].sum().backward()
    without = {name for name, p in method.network.named_parameters() if p.grad is None}
    silent = {name for name, p in method.network.named_parameters() if p.grad is not None and not p.grad.any()}
    assert without == set()
    # the coarsest head has no weight in the loss; a bias before an instance norm has no effect
    assert {name for name in silent if not name.endswith("bias")} == {"decoder.seg_layers.0.weight"}


def test_readable_number_only_in_evaluation(folder: Path) -> None:
    method = build(VolumeFusion, VolumeFusionSettings(levels=2)).eval()
    with torch.no_grad():
        dice = method(views_of(folder, method, [0, 1]))[VolumeFusion.readable.key]
    assert dice.shape == (2,)
    assert ((dice >= 0) & (dice <= 1)).all()


def test_it_learns_and_with_shuffled_voxels_it_does_not(folder: Path) -> None:
    """Twenty steps on one fixed batch lower the objective; with levels and voxels unpaired they cannot go as far."""

    def last_loss(shuffled: bool) -> float:
        method = build(VolumeFusion, replace(BARE, levels=2))
        optimiser = torch.optim.AdamW(method.parameters(), 1e-2)
        for step in range(25):
            views = views_of(folder, method, [0, 1])
            if shuffled:
                order = torch.randperm(16**3, generator=torch.Generator().manual_seed(step))
                views["image"] = views["image"].flatten(2)[:, :, order].view_as(views["image"])
            loss = method(views)["loss"].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return loss.item()

    learned, not_learned = last_loss(False), last_loss(True)
    assert learned < 0.8 * not_learned


def test_constant_crops_give_finite_numbers(folder: Path) -> None:
    method = build(VolumeFusion, VolumeFusionSettings(levels=2, remap="percentile"))
    batch = batch_of(folder, method, [0, 1])
    for row in batch.boxes:
        for box in row:
            box.data = torch.zeros_like(box.data)
    views = method.views(batch, BatchRandom(0, VIEWS, [0, 1], CPU))
    result = method(views)
    assert torch.isfinite(views["image"]).all()
    assert torch.isfinite(result["loss"]).all()


def white_noise(method: VolumeFusion, number: int) -> CropBatch:
    """Crops of white noise, in which nothing but the noise can be seen."""
    boxes = [noise_boxes(SIZE, 2 * number)[part::2] for part in (0, 1)]
    return CropBatch(list(range(number)), boxes)


def variance_of_levels(match_noise: bool) -> torch.Tensor:
    """Variance of the voxels of each level, in fused white noise."""
    method = build(VolumeFusion, replace(BARE, match_noise=match_noise))
    batch = white_noise(method, 40)
    views = method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))
    image = views["image"][:, 0]
    return torch.stack([image[views["level"] == level].var() for level in range(5)])


def test_local_noise_reveals_the_level_as_published_and_not_in_ours() -> None:
    share = torch.arange(5) / 4
    published, ours = variance_of_levels(False), variance_of_levels(True)
    torch.testing.assert_close(published, share**2 + (1 - share) ** 2, rtol=0.05, atol=0)
    torch.testing.assert_close(ours, torch.ones(5), rtol=0.1, atol=0)


def test_both_crops_are_resampled_or_neither(folder: Path) -> None:
    method = build(VolumeFusion, replace(VolumeFusionSettings(), affine=0.5))
    background, foreground = batch_of(folder, method, list(range(40))).boxes
    found = [[is_resampled(box.matrix) for box in row] for row in (background, foreground)]
    assert found[0] == found[1]
    assert 10 < sum(found[0]) < 30


def test_filters_come_after_the_fusion_and_labels_do_not_move(folder: Path) -> None:
    of_crops, of_fused = split_off(IntensitySettings(gamma_probability=0.7, noise_probability=0.6), FILTERS)
    assert (of_crops.gamma_probability, of_crops.noise_probability, of_crops.blur_probability) == (0.7, 0, 0)
    assert (of_fused.gamma_probability, of_fused.noise_probability, of_fused.blur_probability) == (0, 0.6, 0.2)
    looks = (replace(OFF, blur_probability=1.0, blur_channel_probability=1.0, blur=[edge, edge]) for edge in (0.0, 1.0))
    sharp, soft = (views_of(folder, build(VolumeFusion, replace(BARE, intensity=look)), [0, 1]) for look in looks)
    assert torch.equal(sharp["level"], soft["level"])
    expected = gaussian_filter(sharp["image"].numpy(), (0, 0, 1, 1, 1))
    inner = (..., slice(4, -4), slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(soft["image"].numpy()[inner], expected[inner], atol=0.02)


def test_both_crops_are_inverted_or_none(folder: Path) -> None:
    method = build(VolumeFusion, replace(BARE, intensity=replace(OFF, invert_probability=0.5)))
    batch = batch_of(folder, method, list(range(16)))
    views = method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))
    plain = [torch.stack([box.data for box in row]) for row in batch.boxes]
    inverted = [invert(crops.clone().flatten(0, 1)).view_as(crops) for crops in plain]
    share, counts = views["level"][:, None].float() / 4, [0, 0]
    for n, image in enumerate(views["image"]):
        fused = [share[n] * front[n] + (1 - share[n]) * back[n] for back, front in (plain, inverted)]
        same = [torch.allclose(image, expected, atol=1e-4) for expected in fused]
        assert sum(same) == 1, n
        counts[same.index(True)] += 1
    assert min(counts) > 2


def test_the_control_fuses_shuffled_voxels_with_the_same_levels(folder: Path) -> None:
    method = build(VolumeFusion, replace(BARE, levels=1)).eval()
    views = views_of(folder, method, [0, 1])
    training = views_of(folder, build(VolumeFusion, replace(BARE, levels=1)), [0, 1])
    assert "shuffled" not in training
    assert all(torch.equal(views[key], training[key]) for key in training)
    batch = batch_of(folder, method, [0, 1])
    for sample in range(2):
        inside = views["level"][sample] == 1
        # each voxel is one of the crop that its level names
        crops = [torch.sort(row[sample].data[0].flatten()).values for row in batch.boxes]
        for crop, voxels in zip(
            crops, (views["shuffled"][sample, 0][region] for region in (~inside, inside)), strict=True
        ):
            assert torch.isin(voxels, crop).all()
    with torch.no_grad():
        assert "shuffled_dice" in method(views)


def test_the_control_ignores_what_is_undecidable_in_it(folder: Path) -> None:
    """Shuffled voxels meet other partners. Where both have one value the level cannot be told."""
    method = build(VolumeFusion, replace(BARE, levels=2, ignore_below=0.3)).eval()
    batch = batch_of(folder, method, [0, 1])
    for row in batch.boxes:
        for box in row:
            box.data = (box.data[:1] > box.data.median()).float()
    views = method.views(batch, BatchRandom(0, VIEWS, batch.indices, CPU))
    for image, level in (("image", "level"), ("shuffled", "shuffled_level")):
        assert (views[image][:, 0][views[level] == 1] == 0.5).all()
        assert (views[level] == 1).any()
    # an answer that is right wherever one can be has the full score
    right = torch.nn.functional.one_hot((views["shuffled_level"] % IGNORE).long(), 3).movedim(-1, 1).float()
    method.network.forward = lambda _: [right]
    assert method(views)["shuffled_dice"].tolist() == [1, 1]


def test_the_control_is_filtered_and_padded_as_the_fused_image(folder: Path) -> None:
    looks = (replace(OFF, blur_probability=1.0, blur_channel_probability=1.0, blur=[edge, edge]) for edge in (0.0, 1.0))
    found = []
    for look in looks:
        method = build(VolumeFusion, replace(BARE, intensity=look)).eval()
        batch = batch_of(folder, method, [0, 1])
        for row in batch.boxes:
            for box in row:
                box.data, box.center = box.data[:, 4:], box.center - np.array([4, 0, 0])
        found.append(method.views(batch, BatchRandom(0, VIEWS, [0, 1], CPU)))
    sharp, soft = found
    assert (soft["shuffled_level"][:, :4] == IGNORE).all()
    assert not soft["shuffled"][:, :, :4].any()
    difference = (soft["shuffled"] - sharp["shuffled"]).abs()
    assert (difference[:, :, 4:] > 0).float().mean() > 0.9


def test_an_overflow_of_the_coarsest_head_is_no_part_of_the_loss(folder: Path) -> None:
    method = build(VolumeFusion, VolumeFusionSettings())
    views, network = views_of(folder, method, [0, 1]), method.network.forward
    expected = method(views)["loss"]
    method.network.forward = lambda image: [*network(image)[:-1], torch.full((2, 5, 4, 4, 4), torch.inf)]
    torch.testing.assert_close(method(views)["loss"], expected)


def test_the_published_grid_leaves_as_much_background_as_the_paper() -> None:
    _, sections = split_sections(load_recipe("volume_fusion_paper_tip").settings, SCHEMAS, "tip")
    random = BatchRandom(0, VIEWS, list(range(60)), CPU)
    s = sections["volume_fusion"]
    assert s.whole_blocks
    for size, expected in (((64, 128, 128), 0.46), ((64, 64, 64), 0.52)):
        layout = GridLayout.draw(random, size, 4, [s.block_edge] * 3, s.foreground_share, s.whole_blocks)
        share = torch.stack([(layout_of(layout, n).paint(size, CPU) == 0).float().mean() for n in range(60)]).mean()
        assert share.item() == pytest.approx(expected, abs=0.04)


def layout_of(layout: GridLayout, sample: int) -> GridLayout:
    """One sample of a layout."""
    one = slice(sample, sample + 1)
    return GridLayout(layout.edge[one], layout.offset[one], layout.level[one])
