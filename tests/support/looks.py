"""Intensity settings that change nothing."""

from typing import Any, TypeVar

from nnssl_ext.views.augmentations import IntensitySettings, listed

Settings = TypeVar("Settings", bound=IntensitySettings)


def without_views(kind: type[Settings], **change: Any) -> Settings:
    """Return settings of this kind with all chances at zero but for ``change``."""
    return kind(**{**{f"{view.name}_probability": 0.0 for view in listed(kind)}, **change})
