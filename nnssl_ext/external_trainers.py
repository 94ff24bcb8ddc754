"""Find trainers in nnUNet_extTrainer, as nnU-Net does.

nnU-Net looks through its own trainers, then imports the modules of each folder in order until one has the name.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import io
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from nnssl_ext.errors import UserError
from nnssl_ext.resources import resource_folder


def named_trainer_folders() -> list[str]:
    """List the folders that nnUNet_extTrainer names."""
    return [folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder.strip()]


def is_ours(folder: str | Path) -> bool:
    """Return whether a folder is that of our trainers."""
    return Path(folder).resolve() == resource_folder("trainers").resolve()


def trainer_folders() -> str:
    """Return nnUNet_extTrainer with our trainers."""
    named = named_trainer_folders()
    return os.pathsep.join(named if any(map(is_ours, named)) else [*named, str(resource_folder("trainers"))])


def our_trainers() -> list[str]:
    """List the names of our trainers."""
    return sorted(path.stem for path in resource_folder("trainers").glob("nnsslTrainer_*.py"))


def find_trainer(name: str) -> type:
    """Return a trainer class by its name.

    Raises:
        UserError: If it is not found, or a module fails that nnU-Net imports on the way.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every module
            return recursive_find_trainer_class_by_name(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # another user's module may fail in any way, SystemExit included
        for folder in named_trainer_folders():
            for file, reason in failing_modules(Path(folder)):
                raise UserError(
                    f"trainer '{name}' cannot be looked up: {file}, which nnUNet_extTrainer names, cannot be imported "
                    f"({reason}). Repair it or take its folder out"
                ) from error
        if not isinstance(error, RuntimeError):
            raise UserError(f"trainer '{name}' cannot be used: {type(error).__name__}: {error}") from error
        near = difflib.get_close_matches(name, [*our_trainers(), *_stock_trainers()], n=1, cutoff=0.4)
        hint = (
            f"Did you mean '{near[0]}'?"
            if near
            else "nnssl_ext methods lists ours. Is its folder in nnUNet_extTrainer?"
        )
        raise UserError(f"trainer '{name}' was not found by nnU-Net. {hint}") from error


def failing_modules(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield a folder's modules that fail to import."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder.absolute()))
    try:
        for name, file in _modules(folder):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    importlib.import_module(name)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                yield file, " ".join(f"{type(error).__name__}: {error}".split())
    finally:
        sys.path.remove(str(folder.absolute()))
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder.absolute())):
                del sys.modules[name]


def holder_of(trainer: str) -> Path | None:
    """Return the file that defines a trainer, else None."""
    defines = re.compile(rf"^(class {trainer}\b|{trainer}\s*=|(from|import) .*\b{trainer}\b)", re.MULTILINE)
    for folder in [*_stock_folders(), *map(Path, named_trainer_folders())]:
        for _, file in _modules(folder):
            if defines.search(file.read_text(encoding="utf-8", errors="replace")):
                return file
    return None


def _modules(folder: Path, package: str = "") -> Iterator[tuple[str, Path]]:
    """Yield names and files of a folder's modules."""
    entries = list(pkgutil.iter_modules([str(folder)]))
    for entry in entries:
        if not entry.ispkg and (folder / f"{entry.name}.py").is_file():
            yield f"{package}{entry.name}", folder / f"{entry.name}.py"
    for entry in entries:
        if entry.ispkg:
            yield from _modules(folder / entry.name, f"{package}{entry.name}.")


def _stock_trainers() -> list[str]:
    """List the names of nnU-Net's trainers."""
    return [name.rpartition(".")[2] for folder in _stock_folders() for name, _ in _modules(folder)]


def _stock_folders() -> list[Path]:
    """Locate nnU-Net's own trainers without importing any."""
    found = importlib.util.find_spec("nnunetv2")
    locations = found.submodule_search_locations if found else None
    return [Path(path) / "training" / "nnUNetTrainer" for path in locations or ()]
