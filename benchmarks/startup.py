"""Time the start of a training, against stock's and against the number of cases.

    python -m benchmarks startup --against-stock
    python -m benchmarks startup --cases 100 1000 10000

``--against-stock`` measures the wall and CPU seconds from the call of ``nnUNetv2_train`` to its line "Epoch 0". The
empty trainer is a subclass of stock's without a body: nnU-Net imports all of its own trainers before it finds one
outside. All trainers take turns on a data set of eight tiny cases with an index.

Otherwise pretrainings start on folders of tiny preprocessed cases, each in a process of its own. The first start makes
the case index, the others find it. A start is everything from the trainer's class to its first batch: checks with the
index, network, split and one batch. Memory is the process's peak beyond what it had after its imports. The file cache
is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from benchmarks.gpu.context import cpu_seconds
from benchmarks.measure import Figure, parser, report
from nnssl_ext.environment import program
from nnssl_ext.resources import resource_folder

NAME = "Dataset811_Plain"
DATA = "nnUNetPlans_3d_fullres"
EMPTY = "EmptyTrainer"
EMPTY_TRAINER = f"""from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class {EMPTY}(nnUNetTrainer):
    pass
"""


def write_cases(root: Path, number: int) -> None:
    """Write a preprocessed data set of many cases, most of them copies."""
    from tests.datasets import QUICK, make_dataset

    folder = make_dataset(root / "preprocessed", "plain", cases=8)
    data = folder / DATA
    for case in range(8, number):
        for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
            shutil.copyfile(data / f"case_{case % 8:02d}{suffix}", data / f"case_{case:06d}{suffix}")
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    (folder / "nnUNetPlans.json").write_text(json.dumps({**plans, "nnssl_ext": QUICK}))


def variables(root: Path) -> dict[str, str]:
    """Return nnU-Net's variables."""
    return {f"nnUNet_{part}": str(root / part) for part in ("raw", "preprocessed", "results")}


def start(root: Path) -> dict[str, float]:
    """Start one pretraining in this process and read its first batch. Return seconds and MiB."""
    os.environ |= {**variables(root), "nnUNet_n_proc_DA": "0"}
    import torch

    from nnssl_ext.training.pretraining.classes import pretraining_trainer

    folder = root / "preprocessed" / NAME
    plans, dataset_json = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    plans["continue_training"] = False  # nnUNetv2_train says so
    trainer = pretraining_trainer("volume_fusion")
    before, begin = peak(), time.perf_counter()
    run = trainer(plans, "3d_fullres", cast("int", "all"), dataset_json, torch.device("cpu"))
    checked = time.perf_counter()
    run.initialize()
    train, _ = run.get_dataloaders()
    next(train)
    ready = time.perf_counter()
    return {"checks": checked - begin, "first batch": ready - checked, "memory": peak() - before}


def peak() -> float:
    """Return the largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(root: Path) -> dict[str, float]:
    """Run ``start`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.startup", "--start", str(root)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def row(number: int, index: str, runs: list[dict[str, float]]) -> dict[str, object]:
    """Return one row of the table."""
    columns = (("checks, s", "checks", 3), ("first batch, s", "first batch", 3), ("memory, MiB", "memory", 0))
    figures = {title: Figure(tuple(run[name] for run in runs), digits) for title, name, digits in columns}
    return {"cases": f"{number:,}", "index": index, **figures}


def until_first_epoch(root: Path, trainer: str) -> tuple[float, float]:
    """Return the wall and CPU seconds until ``nnUNetv2_train`` begins its first epoch, then stop it."""
    folder = root / "trainers" if trainer == EMPTY else resource_folder("trainers")
    environment = {**os.environ, **variables(root), "nnUNet_extTrainer": str(folder), "PYTHONUNBUFFERED": "1"}
    command = [program("nnUNetv2_train"), "811", "3d_fullres", "all", "-tr", trainer, "-device", "cpu"]
    begin = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.rstrip().endswith("Epoch 0"):
                seconds = time.perf_counter() - begin, cpu_seconds(process.pid)
                os.killpg(process.pid, signal.SIGKILL)  # stock's workers would outlive it
                return seconds
    sys.exit("".join(lines))


def against_stock(repeats: int, trainers: Sequence[str]) -> list[dict[str, object]]:
    """Return one row for each trainer, stock's first."""
    with tempfile.TemporaryDirectory() as folder:
        write_cases(Path(folder), 8)
        empty = Path(folder) / "trainers" / f"{EMPTY}.py"
        empty.parent.mkdir()
        empty.write_text(EMPTY_TRAINER)
        turns = [{name: until_first_epoch(Path(folder), name) for name in trainers} for _ in range(repeats + 1)][1:]
    rows: list[dict[str, object]] = []
    for name in trainers:
        row: dict[str, object] = {"trainer": name}
        for place, unit in enumerate(("s", "CPU s")):
            row[f"to the first epoch, {unit}"] = Figure(tuple(turn[name][place] for turn in turns), 2)
            more = tuple(turn[name][place] - turn[trainers[0]][place] for turn in turns)
            row[f"more than stock, {unit}"] = Figure(more, 2)
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", type=int, nargs="+", default=[100, 1000, 10_000])
    options.add_argument("--against-stock", action="store_true")
    options.add_argument("--trainers", nargs="+", help="with --against-stock: only these of ours")
    options.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start)))
        return
    if arguments.against_stock:
        from nnssl_ext.methods import METHODS, TRAINERS

        ours = [TRAINERS[name] for name, method in METHODS.items() if method.learns_from == "cases"]
        report(
            against_stock(arguments.repeats, ["nnUNetTrainer", EMPTY, *(arguments.trainers or ours)]), arguments.json
        )
        return
    rows = []
    for number in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            write_cases(Path(folder), number)
            rows.append(row(number, "made", [measure(Path(folder))]))
            rows.append(row(number, "there", [measure(Path(folder)) for _ in range(arguments.repeats)]))
    report(rows, arguments.json)


if __name__ == "__main__":
    main()
