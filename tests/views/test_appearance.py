from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from nnssl_ext.settings import check_settings, setting
from nnssl_ext.views.appearance import IntensityDraw, default
from nnssl_ext.views.augmentations import Augmentation, Chosen, IntensitySettings, listed
from nnssl_ext.views.random import VIEWS, BatchRandom

SPACING = (1.0, 1.0, 1.0)
CPU = torch.device("cpu")
CHANCES = [f"{kind.name}_probability" for kind in listed(IntensitySettings)]


def strengths(chances: dict[str, float]) -> IntensitySettings:
    return check_settings(IntensitySettings, chances, "test")


def only(name: str, chance: float = 1.0) -> IntensitySettings:
    return strengths({**dict.fromkeys(CHANCES, 0.0), name: chance})


def batch() -> torch.Tensor:
    return torch.randn(3, 2, 9, 10, 11, generator=torch.Generator().manual_seed(1))


def drawn(settings: IntensitySettings, indices: list[int], channels: int = 2, views: int = 1) -> IntensityDraw:
    return IntensityDraw.draw(settings, BatchRandom(0, VIEWS, indices, CPU), channels, SPACING, views)


def applied(settings: IntensitySettings, volume: torch.Tensor, indices: list[int] | None = None) -> torch.Tensor:
    return drawn(settings, indices or [4, 5, 6], volume.shape[1]).apply(volume)


def test_identity_at_zero_strength() -> None:
    assert torch.equal(applied(strengths(dict.fromkeys(CHANCES, 0.0)), batch()), batch())


def test_everything_at_full_strength_is_finite_on_constant_and_ordinary_crops() -> None:
    settings = strengths(dict.fromkeys(CHANCES, 1.0))
    for volume in (torch.zeros(3, 2, 9, 10, 11), torch.full((3, 2, 9, 10, 11), -1e4), batch()):
        assert torch.isfinite(applied(settings, volume)).all()
        drawn(settings, [4, 5, 6]).apply_definition(found := volume.flatten(0, 1))
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", CHANCES)
def test_each_chance_changes_something_and_follows_its_sample(name: str) -> None:
    settings = strengths({**dict.fromkeys(CHANCES, 0.0), name: 1.0, "blur_channel_probability": 1.0})
    changed = applied(settings, batch(), [14, 15, 16])
    assert all(not torch.equal(a, b) for a, b in zip(changed, batch(), strict=True))
    torch.testing.assert_close(applied(settings, batch()[1:2], [15])[0], changed[1])


@pytest.mark.parametrize("name", [name for name in CHANCES if name != "noise_probability"])
def test_the_cpu_has_the_values_of_the_definition(name: str) -> None:
    draw = drawn(only(name, 0.7), list(range(6)))
    volumes = torch.randn(6, 2, 20, 24, 70, generator=torch.Generator().manual_seed(3))
    expected = volumes.flatten(0, 1).clone()
    draw.apply_definition(expected)
    (step,) = draw.steps
    assert 0 < len(step[1].rows) < 12
    assert not torch.equal(expected, volumes.flatten(0, 1))
    torch.testing.assert_close(draw.apply(volumes).flatten(0, 1), expected, rtol=0, atol=5e-5)


def test_some_samples_get_what_they_get_in_the_whole_batch() -> None:
    settings = strengths(dict.fromkeys(CHANCES, 0.5))
    draw, volumes = drawn(settings, list(range(6))), torch.randn(6, 2, 9, 10, 11)
    expected = draw.apply(volumes.clone())
    for samples in (slice(0, 1), slice(1, 4), slice(4, 6), slice(0, 6)):
        assert torch.equal(draw.of(samples).apply(volumes[samples].clone()), expected[samples])


def test_views_of_a_sample_are_images_of_their_own() -> None:
    draw = drawn(only("gamma_probability", 0.5), list(range(50)), channels=2, views=4)
    (step,) = draw.steps
    images = Counter((step[1].rows // 2).tolist())
    assert set(images.values()) == {2}  # all channels of an image, each with its own exponent
    assert 60 < len(images) < 140
    assert len(step[1].host.unique()) == len(step[1].rows)


def test_the_default_is_nnunets_list() -> None:
    """``nnUNetTrainer.get_training_transforms``, in its order; mirrors are spatial views here."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    transforms = nnUNetTrainer.get_training_transforms((32, 32, 32), (-0.1, 0.1), None, (), False).transforms
    theirs = [t for t in transforms if hasattr(t, "apply_probability")]
    ours = IntensitySettings().in_use
    assert [kind.name for kind in ours] == [
        "noise", "blur", "brightness", "contrast", "low_resolution", "inverted_gamma", "gamma",
    ]  # fmt: skip
    settings = IntensitySettings()
    ranges = {
        "noise": "noise_variance", "blur": "blur_sigma", "brightness": "multiplier_range",
        "contrast": "contrast_range", "low_resolution": "scale", "inverted_gamma": "gamma", "gamma": "gamma",
    }  # fmt: skip
    for kind, their in zip(ours, theirs, strict=True):
        assert getattr(settings, f"{kind.name}_probability") == their.apply_probability
        assert getattr(settings, f"{kind.name}_channel_probability", 1.0) == their.transform.p_per_channel
        limits = getattr(their.transform, ranges[kind.name])
        limits = getattr(limits, "contrast_range", limits)
        assert tuple(getattr(settings, kind.name.removeprefix("inverted_"))) == tuple(limits)
    assert [their.transform.p_invert_image for their in theirs[-2:]] == [1, 0]
    assert settings.retain_stats == all(their.transform.p_retain_stats for their in theirs[-2:])


@pytest.mark.parametrize("limits", [(0.7, 1.5), (1.1, 1.5), (0.5, 0.9)])
def test_factors_are_drawn_as_nnunet_draws_them(limits: tuple[float, float]) -> None:
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast

    np.random.seed(0)
    theirs = np.array([BGContrast(limits)() for _ in range(4000)])
    settings = replace(only("gamma_probability"), gamma=list(limits))
    (step,) = drawn(settings, list(range(500)), channels=8).steps
    ours = step[1].host.flatten().numpy()
    quantiles = np.linspace(0, 1, 21)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(theirs, quantiles), atol=0.02)


def test_chances_are_those_of_images_and_channels() -> None:
    settings = only("blur_probability", 0.4)
    (step,) = drawn(settings, list(range(4000)), channels=2).steps
    images = Counter((step[1].rows // 2).tolist())
    assert len(images) / 4000 == pytest.approx(0.4 * 0.75, abs=0.03)
    assert len(step[1].rows) / 8000 == pytest.approx(0.4 * 0.5, abs=0.02)


@dataclass(frozen=True)
class Offset(Augmentation):
    """One value for all voxels: the class that a new augmentation needs."""

    name = "offset"
    offset_probability: float = setting(1.0, "Chance of an offset.", low=0, high=1)
    offset: list[float] = setting([2.0, 3.0], "Range of the offset.", length=2)

    @classmethod
    def apply(cls, volumes: torch.Tensor, chosen: Chosen) -> None:
        volumes.add_(chosen.values.view(-1, 1, 1, 1))


@dataclass(frozen=True)
class WithOffset(IntensitySettings, Offset):
    """The line that a new augmentation needs: its name among the bases."""

    noise_probability: float = default("noise_probability", 0.0)


def test_an_augmentation_is_one_class_and_one_line() -> None:
    settings = check_settings(WithOffset, {**dict.fromkeys(CHANCES, 0.0), "offset": [4.0, 5.0]}, "test")
    moved = applied(settings, batch()) - batch()
    assert ((moved >= 3.99) & (moved <= 5.01)).all()
    torch.testing.assert_close(moved, moved[..., :1, :1, :1].expand_as(moved), rtol=0, atol=1e-5)
    assert moved.amax() - moved.amin() > 0.1
    assert listed(WithOffset)[-1] is Offset
    assert "offset_probability" in [field.name for field in fields(WithOffset)]


def test_another_default_keeps_the_description() -> None:
    by_name = {field.name: field for field in fields(WithOffset)}
    before = {field.name: field for field in fields(IntensitySettings)}["noise_probability"]
    assert WithOffset().noise_probability == 0.0
    assert by_name["noise_probability"].metadata["doc"] == before.metadata["doc"]


@pytest.mark.parametrize("cpu", [True, False])
def test_masked_channels_stay_zero_outside_of_the_image(cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnssl_ext.views.appearance.has_kernels", lambda *_: cpu)
    image, settings = batch(), strengths(dict.fromkeys(CHANCES, 1.0))
    image[..., :4] = 0.0
    image[:, 1, ..., :4] = -1.0  # as air is where a channel is normalized over the whole image
    random = [BatchRandom(0, VIEWS, [4, 5, 6], CPU) for _ in range(2)]
    plain = IntensityDraw.draw(settings, random[0], 2, SPACING).apply(image.clone())
    draw = IntensityDraw.draw(settings, random[1], 2, SPACING, masked=(True, False))
    masked = draw.of(slice(1, 3)).apply(image[1:].clone())
    assert (masked[:, 0, ..., :4] == 0).all()
    assert (plain[:, 0, ..., :4] != 0).any()
    torch.testing.assert_close(masked[:, 1], plain[1:, 1])
    torch.testing.assert_close(masked[:, 0, ..., 4:], plain[1:, 0, ..., 4:])
