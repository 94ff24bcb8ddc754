"""Run a benchmark on the code of any checkout of the repository, old versions included."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
#: Set in the process that runs on the chosen checkout.
CODE = "NNSSL_BENCHMARK_CODE"


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--code`` to a benchmark's options."""
    parser.add_argument("--code", type=Path, default=REPOSITORY, help="checkout to run (default: this one)")


def run_on(code: Path, module: str) -> None:
    """Run a benchmark on another checkout and end with its status.

    In the process that was started for it, return at once.

    Args:
        code: Root folder of a checkout.
        module: Benchmark to run with the words of the command line.
    """
    if CODE in os.environ:
        return
    words = [str(Path(word).resolve()) if word.endswith(".json") else word for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nnssl_ext", "trainers", "plans"):
            (Path(folder) / name).symlink_to(code.resolve() / name)
        (Path(folder) / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
        environment = {**os.environ, "PYTHONPATH": folder, CODE: str(code.resolve())}
        command = [sys.executable, "-P", "-m", f"benchmarks.{module}", *words]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


def set_environment(root: Path) -> None:
    """Point nnU-Net to an empty environment on one thread. Call it before anything imports nnU-Net."""
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
        os.environ[f"nnUNet_{name}"] = str(root / name)
    trainers = Path(os.environ.get(CODE, REPOSITORY)) / "trainers"
    os.environ |= {"nnUNet_extTrainer": str(trainers), "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def spelled(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a section's settings from their first names to those of the version that runs."""
    from nnssl_ext.methods import SCHEMAS

    known = {f.name for f in fields(SCHEMAS[section])}
    try:
        from nnssl_ext.renamed import RENAMED
    except ImportError:  # version 0.1
        RENAMED = {}
    new = {**RENAMED.get("*", {}), **RENAMED.get(section, {})}
    return {name if name in known else new.get(name, name): value for name, value in values.items()}


def trainer_name(method: str) -> str:
    """Return the name of a method's trainer, as ``-tr`` takes it."""
    name = {"dino": "3DINO"}.get(method) or "".join(word.capitalize() for word in method.split("_"))
    return f"nnsslTrainer_{name}"
