"""Fixtures of the tests of methods."""

from pathlib import Path

import pytest

from tests.methods.helpers import write_cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_cases(tmp_path)
