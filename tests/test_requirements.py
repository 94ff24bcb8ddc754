"""The locked versions and the lower bounds follow from pyproject.toml."""

import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "requirements"))

import freeze
import minimum

LINE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*")


def test_the_lock_names_versions_that_the_bounds_allow_and_nothing_else() -> None:
    first, *lines = (REPOSITORY / "requirements" / "locked.txt").read_text().splitlines()
    assert re.fullmatch(r"# made by `make lock` with Python 3\.\d+\.\d+ on \w+; for pip install -c", first)
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    locked = dict(line.split("==") for line in lines)
    assert list(locked) == sorted(locked)
    for requirement in minimum.declared():
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_lock_is_what_the_bounds_bring_here() -> None:
    found = freeze.closure([Requirement("pytest>=8"), Requirement("timm")])
    assert {"pytest", "pluggy", "iniconfig", "timm", "torch", "huggingface-hub"} <= found.keys()
    assert "ruff" not in found
    assert not [version for version in found.values() if "+" in version]


@pytest.mark.parametrize(
    ("requirement", "bound"),
    [("a>=1.2,<2", "1.2"), ("a>=2.4,!=2.9.*", "2.4"), ("a~=3.1", "3.1"), ("a==1.0", "1.0"), ("a<2", None), ("a", None)],
)
def test_lower_bounds(requirement: str, bound: str | None) -> None:
    found = minimum.lower_bound(Requirement(requirement))
    assert (found and str(found)) == bound


def test_the_minimum_is_derived_from_the_project() -> None:
    words = [sys.executable, str(REPOSITORY / "requirements" / "minimum.py")]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "nnunetv2==2.8.1" in lines
    named = {line.partition("==")[0] for line in lines}
    assert "nibabel" not in named  # it has no bound
    assert {r.name for r in minimum.declared() if ">=" in str(r.specifier)} == named
    assert minimum.constraints([Requirement("a>=1"), Requirement("a>=1.10"), Requirement("a>=1.9")]) == ["a==1.10"]
