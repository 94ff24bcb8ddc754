"""Does the start of a training grow with the number of its cases?

    python benchmarks/startup.py --cases 100 1000 10000

For each number it writes that many tiny preprocessed cases and starts a pretraining three times, each time in a process
of its own: once without a case index, then with it, as after ``nnssl_ext corpus``. A start is everything between the
trainer's class and its first batch: the checks, the index, the split and one batch. Times are wall-clock, memory is the
process's peak beyond what it had after its imports; the file system's cache is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NAME = "Dataset811_Plain"
DATA = "nnUNetPlans_3d_fullres"


def write_cases(root: Path, number: int) -> None:
    """A preprocessed data set of ``number`` cases: a few made, the others copies of their files."""
    from tests.datasets import QUICK, make_dataset

    folder = make_dataset(root / "preprocessed", "plain", cases=8)
    data = folder / DATA
    for case in range(8, number):
        for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
            shutil.copyfile(data / f"case_{case % 8:02d}{suffix}", data / f"case_{case:06d}{suffix}")
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    (folder / "nnUNetPlans.json").write_text(json.dumps({**plans, "nnssl_ext": QUICK}))


def start(root: Path) -> dict[str, float]:
    """Start one pretraining and read its first batch: seconds and MiB, in this process."""
    variables = {"nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results", "nnUNet_raw": "raw"}
    os.environ.update({name: str(root / folder) for name, folder in variables.items()}, nnUNet_n_proc_DA="0")
    import torch

    from nnssl_ext.training.classes import pretraining_trainer

    folder = root / "preprocessed" / NAME
    plans, dataset_json = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    plans["continue_training"] = False  # nnUNetv2_train says so
    trainer = pretraining_trainer("volume_fusion")
    before, begin = peak(), time.perf_counter()
    run = trainer(plans, "3d_fullres", "all", dataset_json, torch.device("cpu"))
    checked = time.perf_counter()
    run.initialize()
    built = time.perf_counter()
    train, _ = run.get_dataloaders()
    next(train)
    batch = time.perf_counter() - built
    return {"checks": checked - begin, "first batch": batch, "memory": peak() - before}


def peak() -> float:
    """Largest resident size of this process so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start)))
        return
    print("| cases | index | checks, s | first batch, s | memory, MiB |\n|---|---|---|---|---|")
    for number in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            write_cases(Path(folder), number)
            for index in ("made", "there", "there"):
                command = [sys.executable, __file__, "--start", folder]
                finished = subprocess.run(command, capture_output=True, text=True, check=True)
                m = json.loads(finished.stdout.splitlines()[-1])
                print(
                    f"| {number:,} | {index} | {m['checks']:.2f} | {m['first batch']:.2f} | {m['memory']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
