"""Print the lower bounds of pyproject.toml as constraints for pip, which `make test-minimum` installs.

    python requirements/minimum.py > minimum.txt

A dependency without a lower bound gets no line. pip then takes the newest that fits the rest. This needs packaging, and
tomli before Python 3.11.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def declared(pyproject: Path = PYPROJECT) -> list[Requirement]:
    """Return the direct requirements of the package and its development."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


def lower_bound(requirement: Requirement) -> Version | None:
    """Return the lowest version that a requirement names, or None."""
    bounds = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==", "~=")]
    return max(bounds, default=None)


def constraints(requirements: list[Requirement]) -> list[str]:
    """Return ``name==version`` of each lower bound. The highest counts where a name stands twice."""
    found: dict[str, Version] = {}
    for requirement in requirements:
        bound = lower_bound(requirement)
        if bound is not None:
            found[requirement.name] = max(bound, found.get(requirement.name, bound))
    return [f"{name}=={found[name]}" for name in sorted(found, key=str.lower)]


if __name__ == "__main__":
    print("\n".join(constraints(declared())))
