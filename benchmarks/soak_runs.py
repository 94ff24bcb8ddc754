"""Train one method of the soak without interruption and with kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from nnssl_ext import checkpoint
from nnssl_ext.environment import program
from nnssl_ext.methods import TRAINERS
from tests.datasets import dataset_name, make_dataset, make_labelled
from tests.images import make_images

REPOSITORY = Path(__file__).resolve().parent.parent
#: The fine-tuner's name among the methods.
FINETUNE = "finetune"
STEPS = 7
#: The smallest of each; a collapse of something this small is none.
SETTINGS = {
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "prototypes": 64, "local_crops": 2, "patience": 0},
}


@dataclass
class Result:
    """One run with kills and one without."""

    method: str
    seed: int
    epochs: int = 0
    kills: int = 0
    terminated: int = 0
    amid_checkpoint: int = 0
    equal: bool = False
    seconds: float = 0.0
    #: Once a second, of the uninterrupted process's second epoch to its last.
    memory_mib: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)


class Soak:
    """Return the environment of all runs.

    Args:
        root: An empty folder.
        epochs: Of each run.
    """

    def __init__(self, root: Path, epochs: int) -> None:
        self.root, self.epochs = root, epochs
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir(parents=True, exist_ok=True)
        make_dataset(root / "preprocessed", "residual")
        make_labelled(root / "preprocessed")
        make_images(root / "images", classes=2, each=20)
        self.variables = {
            **os.environ,
            "nnUNet_raw": str(root / "raw"),
            "nnUNet_preprocessed": str(root / "preprocessed"),
            "nnUNet_results": str(root / "results"),
            "nnUNet_extTrainer": str(REPOSITORY / "trainers"),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, method: str, seed: int, kills: int) -> Result:
        """Train twice and compare."""
        result, begin = Result(method, seed, self.epochs), time.monotonic()
        whole, broken = (f"{method}-{seed}-{kind}" for kind in ("whole", "broken"))
        for plans in (whole, broken):
            self._write_plans(method, plans, seed)
        self._whole(self._start(method, whole, 1), self._fold(method, whole), result)
        epoch_seconds = epoch_time(self._fold(method, whole))
        self._broken(method, broken, kills, epoch_seconds, result)
        result.equal = same(self._fold(method, whole), self._fold(method, broken))
        result.seconds = time.monotonic() - begin
        return result

    def _dataset(self, method: str) -> str:
        return dataset_name("labelled" if method == FINETUNE else "residual")

    def _trainer(self, method: str) -> str:
        return "nnsslTrainer_Finetune" if method == FINETUNE else TRAINERS[method]

    def _fold(self, method: str, plans: str) -> Path:
        return self.root / "results" / self._dataset(method) / f"{self._trainer(method)}__{plans}__3d_fullres/fold_0"

    def _write_plans(self, method: str, name: str, seed: int) -> None:
        folder = self.root / "preprocessed" / self._dataset(method)
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        steps = self.epochs * STEPS
        plans["plans_name"] = name
        plans["nnssl_ext"] = {
            "epochs": self.epochs,
            "iterations_per_epoch": STEPS,
            "validation_iterations": 1,
            "save_every": 1,
            "seed": seed,
            "images": str(self.root / "images"),
            FINETUNE: {
                "steps": steps,
                "steps_per_epoch": STEPS,
                "validation_iterations": 1,
                "save_every": 1,
                "seed": seed,
                "weight_average_decay": 0.9,
                "snapshots": [steps // 2],
            },
            **SETTINGS,
        }
        (folder / f"{name}.json").write_text(json.dumps(plans))

    def _start(self, method: str, plans: str, workers: int) -> subprocess.Popen:
        words = [program("nnUNetv2_train"), self._dataset(method), "3d_fullres", "0"]
        words += ["-tr", self._trainer(method), "-p", plans]
        variables = {**self.variables, "nnUNet_n_proc_DA": str(workers)}
        with (self.root / f"{plans}.log").open("ab") as log:
            return subprocess.Popen(
                [*words, "-device", "cpu", "--c"], env=variables, stdout=log, stderr=subprocess.STDOUT
            )

    def _whole(self, process: subprocess.Popen, fold: Path, result: Result) -> None:
        status, files = Path(f"/proc/{process.pid}/status"), Path(f"/proc/{process.pid}/fd")
        while process.poll() is None:
            time.sleep(1)
            try:
                rss = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
                count = len(list(files.iterdir()))
            except (OSError, StopIteration):  # it ended meanwhile
                continue
            # from the first epoch's end; whole cases are predicted after the last, with memory of their own
            if not (fold / "checkpoint_best.pth").is_file() or (fold / "checkpoint_final.pth").is_file():
                continue
            result.memory_mib.append(int(rss.split()[1]) / 1024)
            result.open_files.append(count)
        if process.returncode:
            raise SystemExit(f"the uninterrupted run of {result.method} ended with {process.returncode}")

    def _broken(self, method: str, plans: str, kills: int, epoch_seconds: float, result: Result) -> None:
        fold, chance = self._fold(method, plans), random.Random(f"{method} {result.seed}")
        while not (fold / "checkpoint_final.pth").is_file():
            process = self._start(method, plans, chance.choice((0, 1, 2)))
            number = result.kills + result.terminated
            if result.kills < kills:
                _wait_for_checkpoint(process, fold)
                if number % 4 == 1:
                    _wait_for_writing(process, fold)
                else:
                    time.sleep(chance.uniform(0, 2 * epoch_seconds))
                if process.poll() is None:
                    sent = signal.SIGTERM if number % 4 == 3 else signal.SIGKILL
                    process.send_signal(sent)
                    result.terminated += sent == signal.SIGTERM
                    result.kills += sent == signal.SIGKILL
            ended = process.wait()
            result.amid_checkpoint += bool(list(fold.glob(".checkpoint_*.tmp")))
            if ended not in (0, -signal.SIGKILL):
                raise SystemExit(f"{plans}: ended with status {ended}; see {self.root}/{plans}.log")


def _wait_for_checkpoint(process: subprocess.Popen, fold: Path) -> None:
    """Wait until this process has written a checkpoint, so that each start gets further."""
    before = time.time()
    while process.poll() is None and not any(_written(path) > before for path in fold.glob("checkpoint_*.pth")):
        time.sleep(0.02)


def _wait_for_writing(process: subprocess.Popen, fold: Path) -> None:
    """Wait until a checkpoint is being written."""
    while process.poll() is None and not any(fold.glob(".checkpoint_*.tmp")):
        time.sleep(0.002)


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # replaced or removed meanwhile
        return 0.0


def epoch_time(fold: Path) -> float:
    """Return the mean seconds of an epoch of a finished run."""
    log = checkpoint.load(fold / "checkpoint_final.pth")["logging"]
    starts, ends = log["epoch_start_timestamps"], log["epoch_end_timestamps"]
    return sum(end - start for start, end in zip(starts, ends, strict=True)) / len(ends)


def same(first: Path, second: Path) -> bool:
    """Return whether two final checkpoints are equal bit for bit, except for times."""
    digests = []
    for fold in (first, second):
        content = checkpoint.load(fold / "checkpoint_final.pth")
        log = {key: values for key, values in content["logging"].items() if "timestamps" not in key}
        own = {k: content["nnssl_ext"].get(k) for k in ("state", "counters", "step", "trained_weights")}
        kept = {key: content[key] for key in ("network_weights", "optimizer_state", "_best_ema")}
        digests.append(checkpoint.content_digest({**kept, "logging": log, "nnssl_ext": own}))
    return digests[0] == digests[1]
