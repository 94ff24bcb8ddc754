"""Record versions, revision and hardware."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from nnssl_ext import __version__
from nnssl_ext.environment import cores
from nnssl_ext.resources import PACKAGE

#: Packages with noted versions.
PACKAGES = ("nnunetv2", "torch", "dynamic-network-architectures", "batchgenerators", "SimpleITK", "scipy", "monai")


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of packages."""
    found = {"nnssl_ext": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


@cache
def revision() -> str:
    """Return a checkout's git revision, else ''."""
    if not (PACKAGE.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(PACKAGE.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def hardware() -> str:
    """Describe the device without the machine's name."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{cores()} CPU cores, {platform.machine()}"
