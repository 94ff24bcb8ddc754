"""Locate the trainers/ and plans/ folders, inside the package or beside it in a checkout."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """Return the folder ``trainers`` or ``plans``, from a wheel or a checkout."""
    packaged = PACKAGE / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name
