"""Print all direct and indirect dependencies as installed here, which `make lock` writes to locked.txt.

    python requirements/freeze.py > requirements/locked.txt

They are names and versions for `pip install -c`. Other packages of the environment and the package itself are left out.
"""

from __future__ import annotations

import platform
from importlib import metadata

from minimum import declared
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def closure(roots: list[Requirement]) -> dict[str, str]:
    """Return the versions by name of requirements and of everything that they need here.

    Raises:
        PackageNotFoundError: If one of them is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = list(roots)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            distribution = metadata.distribution(name)
            found[name] = Version(distribution.version).public
            for line in distribution.requires or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo.append(needed)
    return found


if __name__ == "__main__":
    print(f"# made by `make lock` with Python {platform.python_version()} on {platform.system()}; for pip install -c")
    print("\n".join(f"{name}=={version}" for name, version in sorted(closure(declared()).items())))
