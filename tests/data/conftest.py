"""Fixtures of the data tests."""

from pathlib import Path

import blosc2
import numpy as np
import pytest

from tests.datasets import blob


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = tmp_path / "cases"
    result.mkdir()
    for case, shape in enumerate([(20, 22, 24), (30, 16, 18), (9, 21, 40), (16, 16, 16)]):
        image = blob(np.random.default_rng(case), shape)[None]
        blosc2.asarray(image, urlpath=str(result / f"c{case}.b2nd"), mode="w", blocks=(1, 8, 8, 8))
    return result
