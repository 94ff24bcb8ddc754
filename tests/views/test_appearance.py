from dataclasses import fields

import torch

from nnssl_ext.settings import check_settings
from nnssl_ext.views.appearance import IntensityDraw, IntensitySettings
from nnssl_ext.views.random import VIEWS, BatchRandom

SPACING = (1.0, 1.0, 1.0)
CHANCES = [f.name for f in fields(IntensitySettings) if f.name.endswith("_probability")]


def strengths(chances: dict[str, float]) -> IntensitySettings:
    return check_settings(IntensitySettings, chances, "test")


def batch() -> torch.Tensor:
    return torch.randn(3, 2, 9, 10, 11, generator=torch.Generator().manual_seed(1))


def applied(settings: IntensitySettings, volume: torch.Tensor, indices: list[int] | None = None) -> torch.Tensor:
    random = BatchRandom(0, VIEWS, indices or [4, 5, 6], torch.device("cpu"))
    return IntensityDraw.draw(settings, random, volume.shape[1], SPACING).apply(volume, random)


def test_identity_at_zero_strength() -> None:
    assert torch.equal(applied(strengths(dict.fromkeys(CHANCES, 0.0)), batch()), batch())


def test_everything_at_full_strength_is_finite_on_constant_and_ordinary_crops() -> None:
    settings = strengths(dict.fromkeys(CHANCES, 1.0))
    for volume in (torch.zeros(3, 2, 9, 10, 11), torch.full((3, 2, 9, 10, 11), -1e4), batch()):
        assert torch.isfinite(applied(settings, volume)).all()


def test_each_chance_changes_something_and_follows_its_sample() -> None:
    for name in CHANCES:
        settings = strengths({**dict.fromkeys(CHANCES, 0.0), name: 1.0})
        changed = applied(settings, batch())
        assert all(not torch.equal(a, b) for a, b in zip(changed, batch(), strict=True)), name
        torch.testing.assert_close(applied(settings, batch()[1:2], [5])[0], changed[1])
