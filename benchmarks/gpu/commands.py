"""Run what users run: the stock commands, torchrun with one rank, and a study's next runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nnunetv2
import torch

from benchmarks.gpu.context import GRACE, Context, NoTimeLeftError, end_group
from benchmarks.workload import CONFIGURATION, TINY_DATASET, TINY_NUMBER, write_tiny

STOCK = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
#: Stock's trainer with fewer steps.
SHORT = "nnUNetTrainer_short"
SHORT_CODE = f"""import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class {SHORT}(nnUNetTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 5, 2
"""
VOLUME_FUSION = "nnsslTrainer_VolumeFusion"
#: Seconds that the shortest command takes on a GPU.
START = 12


class Bench:
    """An nnU-Net environment with one tiny phantom, and its commands."""

    def __init__(self, context: Context, name: str, **settings: Any) -> None:
        self.context, self.root = context, context.folder(name)
        for part in ("raw", "preprocessed", "results", "trainers"):
            (self.root / part).mkdir()
        (self.root / "trainers" / f"{SHORT}.py").write_text(SHORT_CODE)
        self.data = write_tiny(self.root)
        self.variables = {f"nnUNet_{part}": str(self.root / part) for part in ("raw", "preprocessed", "results")}
        trainers = os.environ.get("nnUNet_extTrainer", "")
        self.variables["nnUNet_extTrainer"] = os.pathsep.join([trainers, str(self.root / "trainers")])
        self.variables |= {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "1"}
        plans = json.loads((self.data / "nnUNetPlans.json").read_text())
        plans["nnssl_ext"] = {"epochs": 2, "iterations_per_epoch": 5, "validation_iterations": 1, **settings}
        plans["nnssl_ext"]["finetune"] = {"steps": 10, "steps_per_epoch": 5}
        (self.data / "nnUNetPlans.json").write_text(json.dumps(plans))

    def words(self, trainer: str, *more: str, fold: str = "0") -> list[str]:
        """Return the stock command that trains."""
        command = [sys.executable, "-W", "ignore", "-c", STOCK, str(TINY_NUMBER), CONFIGURATION, fold]
        return [*command, "-tr", trainer, "-device", self.context.kind, *more]

    def environment(self, compiled: bool) -> dict[str, str]:
        """Return the variables of a command, which finds this checkout and the programs beside packages in a folder."""
        folders = {"PYTHONPATH": Path.cwd(), "PATH": Path(nnunetv2.__file__).parents[1] / "bin"}
        found = {
            name: os.pathsep.join([str(folder), *filter(None, [os.environ.get(name)])])
            for name, folder in folders.items()
        }
        return {**os.environ, **found, **self.variables, "nnUNet_compile": "t" if compiled else "f"}

    def run(self, command: list[str], compiled: bool = False) -> float:
        """Run a command to its end; return its seconds.

        Raises:
            RuntimeError: If it fails, with the end of its output.
            NoTimeLeftError: If it does not end in time. The row stays unfinished.
        """
        begin = time.monotonic()
        process = subprocess.Popen(
            command,
            env=self.environment(compiled),
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=max(1.0, self.context.left - 2 * GRACE))
        except subprocess.TimeoutExpired:
            end_group(process.pid)
            output, _ = process.communicate()
            print(output[-6000:], flush=True)
            # our trainers end with status 0 when asked to
            raise NoTimeLeftError(f"{shlex.join(command[-6:])}, which did not end in time") from None
        print(output[-6000:], flush=True)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command[-6:])} ended with {process.returncode}.\n{output[-3000:]}")
        return round(time.monotonic() - begin, 1)

    def fold(self, trainer: str, fold: str = "0") -> Path:
        """Return the folder of a run."""
        folder = self.root / "results" / TINY_DATASET / f"{trainer}__nnUNetPlans__{CONFIGURATION}"
        return folder / f"fold_{fold}"

    def kill_after_checkpoint(self, command: list[str], file: Path) -> float:
        """Start a command, kill it once a file is there, and return its seconds."""
        begin = time.monotonic()
        process = subprocess.Popen(
            command, env=self.environment(True), cwd=self.root, stdout=subprocess.DEVNULL, start_new_session=True
        )
        # a session of its own outlives the part, so it ends before
        while process.poll() is None and not file.is_file() and self.context.left > 5:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not file.is_file():
            raise RuntimeError(f"Expected {file.name} before the end, got none. Status {process.returncode}.")
        return round(time.monotonic() - begin, 1)


def line(context: Context) -> None:
    """Run the line of commands: pretraining, kill, continuation, fine-tunings, probe."""
    bench = Bench(context, "line", epochs=4 if context.tiny else 20, save_every=1)
    fold = bench.fold(VOLUME_FUSION)
    final = fold / "checkpoint_final.pth"
    with context.row("pretraining, killed", 10) as row:
        row["seconds"] = bench.kill_after_checkpoint(bench.words(VOLUME_FUSION), fold / "checkpoint_latest.pth")
        row["ended by itself"] = final.is_file()
    with context.row("pretraining, continued with --c", START) as row:
        row["seconds"] = bench.run(bench.words(VOLUME_FUSION, "--c"), compiled=True)
    with context.row("the network equals the file under every alias") as row:
        row |= compare_with_file(bench, final)
    weights = ("-pretrained_weights", str(final))
    with context.row("stock fine-tuning", START) as row:
        row["seconds"] = bench.run(bench.words(SHORT, *weights))
    # nnU-Net compiles where it can; the others do not, since each compiled network takes a minute
    for trainer in ("nnsslTrainer_Probe", "nnsslTrainer_Finetune"):
        with context.row(trainer, START) as row:
            row["seconds"] = bench.run(bench.words(trainer, *weights), compiled=trainer == "nnsslTrainer_Finetune")


def compare_with_file(bench: Bench, file: Path) -> dict[str, Any]:
    """Load a checkpoint into a stock trainer and compare all tensors but the heads'."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    os.environ |= bench.environment(False)
    names = TINY_DATASET, CONFIGURATION, 0, "nnUNetTrainer", "nnUNetPlans"
    stock = get_trainer_from_args(*names, device=bench.context.device)
    maybe_load_checkpoint(stock, False, False, str(file))
    loaded = stock.network.state_dict()
    saved = torch.load(file, map_location="cpu", weights_only=True)["network_weights"]
    handed = [name for name in loaded if ".seg_layers." not in name]
    result: dict[str, Any] = {"tensors": len(handed), "names differ": sorted(set(loaded) ^ set(saved))}
    result["different"] = [name for name in handed if not torch.equal(loaded[name].cpu(), saved[name])]
    if result["different"] or result["names differ"]:
        result["failed"] = "Expected equal tensors, got differences."
    return result


def ranks(context: Context) -> None:
    """Compare torchrun with one rank to no ranks: objective and weights."""
    # Adam would turn the rounding errors of biases before a norm, whose gradient is zero, into whole steps
    plain = {"volume_fusion": {"optimizer": "sgd"}}
    bench = Bench(context, "ranks", epochs=1, precision="float32", **plain)
    bench.variables["NVIDIA_TF32_OVERRIDE"] = "0"  # two processes may choose different algorithms
    ours = ["-m", "nnssl_ext.train", str(TINY_NUMBER), CONFIGURATION]
    options = ["-tr", VOLUME_FUSION, "-device", context.kind]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    launcher += ["--nproc_per_node", "1"]
    with context.row("without ranks", START) as row:
        row["seconds"] = bench.run([sys.executable, *ours, "0", *options])
    alone = bench.fold(VOLUME_FUSION)
    kept = alone.rename(alone.parent / "fold_0_alone") if alone.is_dir() else alone
    with context.row("torchrun, one rank", START) as row:
        row["seconds"] = bench.run([sys.executable, *launcher, *ours, "0", *options])
        one, other = (
            torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=True)
            for folder in (kept, alone)
        )
        losses = [content["logging"]["train_losses"][0] for content in (one, other)]
        flat = [
            torch.cat([w.flatten().double() for w in content["network_weights"].values()]) for content in (one, other)
        ]
        row["objectives"] = [float(loss) for loss in losses]
        row["weights, relative difference"] = float((flat[0] - flat[1]).norm() / flat[0].norm())
        if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]) or row["weights, relative difference"] > 1e-3:
            row["failed"] = "Expected equal objectives and weights, got differences."


def pay(context: Context) -> None:
    """Continue a study for the time that is left. Its folder comes back in the output.

    ``--pay FOLDER`` holds ``preprocessed/`` (data sets with plans), ``words.txt`` (the words after ``nnssl_ext study``,
    without -o and -device) and, from an earlier call, ``study/``.
    """
    bench = Bench(context, "pay")
    words = f"-d {TINY_NUMBER} -c {CONFIGURATION} --methods scratch VolumeFusion --labels 2 --subsets 1 --steps 2"
    words += " --snapshots 1 --total-baseline 0 --rates 0.01 --development-runs 1"
    if context.study is not None:
        words = (context.study / "words.txt").read_text()
        bench.variables["nnUNet_preprocessed"] = str((context.study / "preprocessed").resolve())
        if (context.study / "study").is_dir():
            shutil.copytree(context.study / "study", context.output / "study", symlinks=True, dirs_exist_ok=True)
    settings = [] if context.study else ["epochs=1", "iterations_per_epoch=2", "validation_iterations=1"]
    with context.row("study", 5) as row:
        command = [sys.executable, "-W", "ignore", "-m", "nnssl_ext", "study", *shlex.split(words)]
        command += ["-device", context.kind, "-o", str(context.output / "study"), *settings]
        process = subprocess.Popen(command, env=bench.environment(False), cwd=bench.root, start_new_session=True)
        try:
            row["status"] = process.wait(
                min(20.0, context.left) if context.tiny else max(1.0, context.left - 2 * GRACE)
            )
        except subprocess.TimeoutExpired:
            end_group(process.pid)  # runs keep their steps, and the next call goes on
            process.wait()
            row["status"] = "stopped when the time was over"
        results = context.output / "study" / "results.csv"
        row["finished runs"] = len(list((context.output / "study" / "runs").glob("*/*.csv")))
        row["results"] = results.is_file()
        if isinstance(row["status"], int) and row["status"]:
            row["failed"] = f"The study ended with {row['status']}; see pay.log."
