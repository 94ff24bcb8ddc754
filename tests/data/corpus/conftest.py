"""Fixtures of the tests of corpora."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Environment
from tests.volumes import volume, write_image


@pytest.fixture
def target(with_data: Callable[[str], Environment]) -> Environment:
    return with_data("plain")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four volumes in four formats, in folders."""
    for number, name in enumerate(("a/one.nii.gz", "a/two.nii", "b/three.nrrd", "b/four.mha")):
        write_image(tmp_path / "images" / name, volume(number), (1.0, 1.0, 2.0))
    return tmp_path / "images"
