"""Pretrainings that are killed again and again end with the weights of those that never were.

    python benchmarks/soak.py [--kills 20] [--minutes 60] [--methods volume_fusion ...] [--output FOLDER]

For each method the stock command trains once without interruption and once killed at random moments (SIGKILL, and every
fourth time SIGTERM), continued with --c and another number of workers each time. Weights, method state, optimiser and
objective values must be equal bit for bit. The memory and the open files of the uninterrupted process are watched. With
--minutes the methods are gone through again, with other seeds, until the time is over. Needs a checkout (tests/ makes
the data). A line per run and soak.json; exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from nnssl_ext import checkpoint  # noqa: E402
from nnssl_ext.methods import METHODS  # noqa: E402
from tests.datasets import dataset_name, make_dataset  # noqa: E402
from tests.images import make_images  # noqa: E402

KIND = "residual"


@dataclass
class Result:
    """One method, killed and not."""

    method: str
    seed: int
    kills: int = 0
    terminated: int = 0
    amid_checkpoint: int = 0
    equal: bool = False
    seconds: float = 0.0
    memory_mib: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)


class Soak:
    """The environment of all runs.

    Args:
        root: An empty folder.
        epochs: Of each run.
    """

    def __init__(self, root: Path, epochs: int) -> None:
        self.root, self.epochs = root, epochs
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.data = make_dataset(root / "preprocessed", KIND)
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

    def write_plans(self, name: str, seed: int) -> None:
        plans = json.loads((self.data / "nnUNetPlans.json").read_text())
        plans["plans_name"] = name
        plans["nnssl_ext"] = {
            "epochs": self.epochs,
            "iterations_per_epoch": 7,
            "validation_iterations": 1,
            "save_every": 1,
            "seed": seed,
            "images": str(self.root / "images"),
        }
        (self.data / f"{name}.json").write_text(json.dumps(plans))

    def start(self, method: str, plans: str, workers: int) -> subprocess.Popen:
        trainer = METHODS[method].trainer
        command = Path(sys.executable).parent / "nnUNetv2_train"
        words = [str(command), dataset_name(KIND), "3d_fullres", "0", "-tr", trainer, "-p", plans, "-device", "cpu"]
        variables = {**self.variables, "nnUNet_n_proc_DA": str(workers)}
        log = (self.root / f"{plans}.log").open("ab")
        return subprocess.Popen([*words, "--c"], env=variables, stdout=log, stderr=subprocess.STDOUT)

    def fold(self, method: str, plans: str) -> Path:
        trainer = METHODS[method].trainer
        return self.root / "results" / dataset_name(KIND) / f"{trainer}__{plans}__3d_fullres" / "fold_0"

    def run(self, method: str, seed: int, kills: int) -> Result:
        result, begin = Result(method, seed), time.monotonic()
        whole, broken = (f"{method}-{seed}-{kind}" for kind in ("whole", "broken"))
        for plans in (whole, broken):
            self.write_plans(plans, seed)
        self._whole(self.start(method, whole, 1), result)
        self._broken(method, broken, kills, random.Random(f"{method} {seed}"), result)
        result.equal = same(self.fold(method, whole), self.fold(method, broken))
        result.seconds = time.monotonic() - begin
        return result

    def _whole(self, process: subprocess.Popen, result: Result) -> None:
        status, files = Path(f"/proc/{process.pid}/status"), Path(f"/proc/{process.pid}/fd")
        while process.poll() is None:
            time.sleep(1)
            try:
                rss = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
                result.memory_mib.append(int(rss.split()[1]) / 1024)
                result.open_files.append(len(list(files.iterdir())))
            except (OSError, StopIteration):  # it ended meanwhile
                continue
        if process.returncode:
            raise SystemExit(f"the uninterrupted run of {result.method} ended with {process.returncode}")

    def _broken(self, method: str, plans: str, kills: int, chance: random.Random, result: Result) -> None:
        fold = self.fold(method, plans)
        while not (fold / "checkpoint_final.pth").is_file():
            process = self.start(method, plans, chance.choice((0, 1, 2)))
            if result.kills + result.terminated < kills:
                before = time.time()
                while process.poll() is None and not any(p.stat().st_mtime > before for p in fold.glob("*.pth")):
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 2))
                if process.poll() is None:
                    number = signal.SIGTERM if (result.kills + result.terminated) % 4 == 3 else signal.SIGKILL
                    process.send_signal(number)
                    result.terminated += number == signal.SIGTERM
                    result.kills += number == signal.SIGKILL
            status = process.wait()
            result.amid_checkpoint += bool(list(fold.glob(".checkpoint_*.tmp")))
            if status not in (0, -signal.SIGKILL):
                raise SystemExit(f"{plans}: ended with status {status}; see {self.root}/{plans}.log")


def same(first: Path, second: Path) -> bool:
    """Whether two runs' final checkpoints are equal bit for bit, times apart."""
    digests = []
    for fold in (first, second):
        content = checkpoint.load(fold / "checkpoint_final.pth")
        log = {key: values for key, values in content["logging"].items() if "timestamps" not in key}
        own = {key: content["nnssl_ext"][key] for key in ("state", "counters")}
        kept = {key: content[key] for key in ("network_weights", "optimizer_state", "_best_ema")}
        digests.append(checkpoint.content_digest({**kept, "logging": log, "nnssl_ext": own}))
    return digests[0] == digests[1]


def told(result: Result) -> str:
    """A line about a run."""
    places = [len(result.memory_mib) * share // 10 for share in (5, 8)]
    memory, files = ([row[place] for place in places if row] for row in (result.memory_mib, result.open_files))
    return (
        f"{result.method}, seed {result.seed}: {result.kills} times killed ({result.amid_checkpoint} amid a "
        f"checkpoint), {result.terminated} times asked to end; {'EQUAL' if result.equal else 'DIFFERENT'}; memory "
        f"after a half and four fifths of the time {memory} MiB, open files {files}; {result.seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--kills", type=int, default=20, help="per method")
    parser.add_argument("--minutes", type=float, default=0, help="go on until this time is over")
    parser.add_argument("--epochs", type=int, default=0, help="of each run, seven steps each (five for each kill)")
    parser.add_argument("--output", type=Path, help="an empty folder (a temporary one)")
    arguments = parser.parse_args()
    root = arguments.output or Path(tempfile.mkdtemp(prefix="soak_"))
    soak = Soak(root, arguments.epochs or 5 * arguments.kills)
    print(f"{shlex.join(sys.argv)}\nin {root}", flush=True)
    begin, seed, results = time.monotonic(), 0, []
    while seed == 0 or time.monotonic() - begin < arguments.minutes * 60:
        for method in arguments.methods:
            results.append(soak.run(method, seed, arguments.kills))
            print(told(results[-1]), flush=True)
            (root / "soak.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
        seed += 1
    return int(not all(result.equal for result in results))


if __name__ == "__main__":
    sys.exit(main())
