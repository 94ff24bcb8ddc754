from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.errors import UserError
from nnssl_ext.methods import SCHEMAS
from nnssl_ext.methods.models_genesis import ModelsGenesis, ModelsGenesisSettings
from nnssl_ext.settings import split_sections
from nnssl_ext.views.corruption import bezier_curve, draw_windows, map_intensities, paint, shuffle_locally
from tests.methods.helpers import build, readable_after, views_of, write_anatomy, write_cases

#: No corruption at all.
BARE = replace(ModelsGenesisSettings(), nonlinear_probability=0, shuffle_probability=0, paint_probability=0)


@pytest.mark.parametrize("reversed_", [False, True])
def test_intensities_are_mapped_monotonically_within_their_range(reversed_: bool) -> None:
    controls = np.random.default_rng(0).random((2, 2))
    places, values = bezier_curve(controls, reversed_)
    assert (np.diff(places) >= 0).all()
    assert (np.diff(values) <= 0).all() if reversed_ else (np.diff(values) >= 0).all()
    image = torch.randn(2, 6, 6, 6)
    mapped = image.clone()
    map_intensities(mapped, controls, reversed_)
    for before, after in zip(image, mapped, strict=True):
        order = after.flatten()[before.flatten().argsort()].diff()
        assert (order <= 1e-5).all() if reversed_ else (order >= -1e-5).all()
        torch.testing.assert_close(torch.stack(after.aminmax()), torch.stack(before.aminmax()))


def test_shuffling_keeps_the_voxels_of_a_window_and_all_outside() -> None:
    image = torch.randn(2, 8, 8, 8)
    shuffled = image.clone()
    corners, edges = np.array([[1, 2, 3]]), np.array([[4, 3, 2]])
    shuffle_locally(shuffled, corners, edges, np.random.default_rng(0))
    inside = torch.zeros(8, 8, 8, dtype=torch.bool)
    inside[1:5, 2:5, 3:5] = True
    assert torch.equal(shuffled[:, ~inside], image[:, ~inside])
    assert not torch.equal(shuffled, image)
    assert torch.equal(shuffled[:, inside].sort(1).values, image[:, inside].sort(1).values)


def test_painting_inside_and_outside_are_complements() -> None:
    image, noise = torch.zeros(1, 8, 8, 8), torch.ones(1, 8, 8, 8)
    windows = draw_windows(np.random.default_rng(0), (8, 8, 8), 3, 0.2, 0.5)
    inner, outer = image.clone(), image.clone()
    paint(inner, *windows, noise, inside=True)
    paint(outer, *windows, noise, inside=False)
    torch.testing.assert_close(inner + outer, noise)
    assert 0 < inner.mean() < 1


@pytest.mark.parametrize("inside", [0.0, 1.0])
def test_painted_noise_has_the_range_of_the_crop(tmp_path: Path, inside: float) -> None:
    """Also after a falling curve, which moves the intensities of most voxels far from zero."""
    painted = replace(BARE, paint_probability=1.0, inside_probability=inside)
    falling = replace(painted, nonlinear_probability=1.0, reversed_probability=1.0)
    folder = write_cases(tmp_path)
    for settings in (painted, falling):
        views = views_of(folder, build(ModelsGenesis, settings), [0, 1])
        for image, target in zip(views["image"].flatten(0, 1), views["target"].flatten(0, 1), strict=True):
            assert target.min() - 1e-4 <= image.min() < image.max() <= target.max() + 1e-4
            if settings is painted:
                noise = (image[image != target] - target.min()) / (target.max() - target.min())
                error = 4 * (12 * len(noise)) ** -0.5  # four standard errors of the mean
                assert noise.mean() == pytest.approx(0.5, abs=error)
                assert noise.std() == pytest.approx(12**-0.5, abs=error)


def test_a_sample_looks_the_same_in_any_batch(tmp_path: Path) -> None:
    folder = write_cases(tmp_path)
    method = build(ModelsGenesis, ModelsGenesisSettings())
    together = views_of(folder, method, [3, 4])
    for place, index in enumerate([3, 4]):
        alone = views_of(folder, method, [index])
        assert all(torch.equal(together[key][place], alone[key][0]) for key in together)


def test_intensity_views_of_other_methods_are_refused() -> None:
    """The method has an intensity transform of its own, so they would change nothing."""
    with pytest.raises(UserError, match=r"unknown setting 'models_genesis\.intensity'"):
        split_sections({"models_genesis": {"intensity": {"noise_probability": 1.0}}}, SCHEMAS, "plans")


def test_without_corruption_the_image_is_the_target(tmp_path: Path) -> None:
    views = views_of(write_cases(tmp_path), build(ModelsGenesis, BARE), [0])
    assert torch.equal(views["image"], views["target"])


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_encoder_decoder_and_the_finest_head_learn(tmp_path: Path, kind: str) -> None:
    method = build(ModelsGenesis, ModelsGenesisSettings(), kind=kind)
    method(views_of(write_cases(tmp_path), method, [0, 1]))["loss"].sum().backward()
    without = {name for name, p in method.network.named_parameters() if p.grad is None}
    assert without == {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}


def test_it_learns_and_with_shuffled_voxels_it_does_not(tmp_path: Path) -> None:
    folder = write_anatomy(tmp_path)
    settings = replace(ModelsGenesisSettings(), nonlinear_probability=0.0, warmup=0.0)
    learned = readable_after(folder, build(ModelsGenesis, settings), 40)
    shuffled = readable_after(folder, build(ModelsGenesis, settings), 40, "before")
    assert learned > shuffled + 0.1
