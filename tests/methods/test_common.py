from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl_ext.methods import METHODS
from nnssl_ext.methods.common import IntensityViewSettings, SpatialViewSettings
from nnssl_ext.views.appearance import IntensityDraw
from tests.methods.helpers import build, views_of, write_cases

#: It reads images instead of cases.
READS_CASES = [name for name in METHODS if name != "variable_dimension_transform"]
#: Settings under which every view shows in the images. Standardizing undoes brightness and contrast.
SHOWN: dict[str, Any] = {"flip": 0.5, "rot90": 0.5, "affine": 0.5, "standardize": False}


def leaves(settings: Any, names: set[str], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """List view settings by their path, each with an extreme value."""
    for entry in fields(settings):
        path, value, limits = (*prefix, entry.name), getattr(settings, entry.name), entry.metadata
        if is_dataclass(value):
            yield from leaves(value, {own.name for own in fields(value)}, path)
        elif entry.name in names:
            if isinstance(value, bool):
                yield path, not value
            elif isinstance(value, list):
                yield path, [limits["low"]] * len(value)
            else:
                yield path, limits["low"]


def changed(settings: Any, path: tuple[str, ...], value: Any) -> Any:
    first, *rest = path
    return replace(settings, **{first: changed(getattr(settings, first), tuple(rest), value) if rest else value})


@pytest.mark.parametrize("name", READS_CASES)
def test_every_view_setting_changes_the_views(name: str, tmp_path: Path) -> None:
    """A setting without an effect misleads: its section says what the method does."""
    folder, method = write_cases(tmp_path), METHODS[name]
    settings = method.Settings()
    names = {own.name for own in fields(SpatialViewSettings)} if isinstance(settings, SpatialViewSettings) else set()
    settings = replace(settings, **{key: value for key, value in SHOWN.items() if hasattr(settings, key)})
    if isinstance(settings, IntensityViewSettings):
        names_of_chances = [own.name for own in fields(settings.intensity) if own.name.endswith("_probability")]
        chances: dict[str, Any] = dict.fromkeys(names_of_chances, 0.9)
        settings = replace(settings, intensity=replace(settings.intensity, **chances))
    objective = build(method, settings)

    def seen(own: Any) -> list[torch.Tensor]:
        objective.settings = own
        if name == "dino":
            objective.looks = own.intensity.of_views()
        return list(views_of(folder, objective, [0, 1, 2]).values())

    before = seen(settings)
    same = []
    for path, value in leaves(settings, names):
        after = seen(changed(settings, path, value))
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            same.append(".".join(path))
    assert same == []


@pytest.mark.parametrize("name", [name for name in READS_CASES if name != "models_genesis"])
def test_what_nnunet_keeps_zero_stays_zero(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the image, in channels that are normalized within a mask."""
    seen, draw = [], IntensityDraw.draw.__func__  # type: ignore[attr-defined]

    def noted(*words: Any, masked: tuple = (), **more: Any) -> IntensityDraw:
        seen.append(masked)
        return draw(*words, masked=masked, **more)

    monkeypatch.setattr(IntensityDraw, "draw", classmethod(noted))
    method = METHODS[name]
    views_of(write_cases(tmp_path), build(method, method.Settings(), masked=(True, False)), [0, 1])
    assert set(seen) == {(True, False)}
