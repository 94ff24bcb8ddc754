"""Running a study's grid: resumable, several runs at a time where there are several devices, a failed run in nobody's
way."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from nnssl_ext.environment import cores
from nnssl_ext.files import replaced_on_success
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.resources import resource_folder
from nnssl_ext.study.grid import PRETRAINING, Cell, Grid
from nnssl_ext.study.metrics import fold_metrics

#: How long a stopped command may take to end.
GRACE_SECONDS = 20


@dataclass(frozen=True)
class Slot:
    """A place where one run at a time can be: the environment variables that put it there."""

    variables: dict[str, str]


def slots(device: str, jobs: int) -> list[Slot]:
    """The places of this machine: ``jobs`` on each GPU, or ``jobs`` that share the CPU's cores."""
    available = cores()
    if device == "cuda":
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus for _ in range(jobs)]
        workers = str(max(1, min(12, available // max(1, len(places)))))
        return [Slot({"nnUNet_n_proc_DA": workers, **place}) for place in places]
    threads = str(max(1, available // jobs))
    # augmentation in the run's own process: a second one would only compete for the same cores
    return [Slot({"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": threads}) for _ in range(jobs)]


def run_grid(grid: Grid, places: Sequence[Slot]) -> None:
    """Do every run that is not done; failed ones are noted in ``grid.failed`` and tried again by the next call."""
    total = grid.all_cells()
    finished = sum(grid.done(cell) for cell in total)
    bar = tqdm(total=len(total), initial=finished, desc="Runs", unit="run", disable=not sys.stderr.isatty())
    pool = _Pool(grid, bar)
    threads = [threading.Thread(target=pool.work, args=(place,), daemon=True) for place in places]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except BaseException:
        pool.stop()
        raise
    finally:
        bar.close()
    if pool.error is not None:
        raise pool.error


class _Pool:
    """Threads that take the next run that is ready."""

    def __init__(self, grid: Grid, bar: tqdm) -> None:
        self.grid, self.bar = grid, bar
        self.changed = threading.Condition()
        self.running: set[Cell] = set()
        self.processes: set[subprocess.Popen] = set()
        self.stopped = False
        self.error: BaseException | None = None

    def work(self, slot: Slot) -> None:
        while (cell := self._take()) is not None:
            try:
                self._run(cell, slot)
            except BaseException as error:  # it is raised again in the main thread
                self.error = error
                self.stop()
            with self.changed:
                self.running.discard(cell)
                self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            for process in self.processes:
                process.terminate()
            self.changed.notify_all()
        for process in list(self.processes):
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def _take(self) -> Cell | None:
        with self.changed:
            while not self.stopped:
                ready = (c for c in self.grid.ready() if c not in self.running and c not in self.grid.failed)
                cell = next(ready, None)
                if cell is not None:
                    self.running.add(cell)
                    return cell
                if not self.running:
                    return None
                self.changed.wait()
        return None

    def _run(self, cell: Cell, slot: Slot) -> None:
        begin = time.monotonic()
        self.bar.set_postfix_str(f"{cell.arm.name} {cell.name}")
        if not validated(self.grid, cell):
            status = self._command(cell, slot)
            if self.stopped:
                return
            if status or not validated(self.grid, cell):
                self.grid.failed[cell] = self.grid.log_file(cell)
                self.bar.write(f"failed: {cell.arm.name} {cell.name}, see {self.grid.log_file(cell)}", sys.stderr)
                return
        if cell.kind != PRETRAINING:
            keep_metrics(self.grid, cell, time.monotonic() - begin)
        print(f"{cell.arm.name} {cell.name}: {time.monotonic() - begin:.0f} s", flush=True)
        self.bar.update()

    def _command(self, cell: Cell, slot: Slot) -> int:
        grid, log = self.grid, self.grid.log_file(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        grid.write_plans(cell)
        words = grid.command(cell)
        with log.open("ab") as file, self.changed:
            if self.stopped:
                return 0
            process = subprocess.Popen(
                words,
                env=environment(grid, cell, slot),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
            )
            self.processes.add(process)
        status = process.wait()
        with self.changed:
            self.processes.discard(process)
        return status


def environment(grid: Grid, cell: Cell, slot: Slot) -> dict[str, str]:
    """The environment of a run's command."""
    folders = [str(resource_folder("trainers")), *filter(None, [os.environ.get("nnUNet_extTrainer")])]
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "nnUNet_raw": os.environ.get("nnUNet_raw", str(grid.folder)),
        "nnUNet_preprocessed": str(grid.preprocessed.parent),
        "nnUNet_results": str(grid.folder / "results" / cell.arm.name),
        "nnUNet_extTrainer": os.pathsep.join(folders),
        **slot.variables,
    }


def validated(grid: Grid, cell: Cell) -> bool:
    """Whether a run's command has done all of its work."""
    if cell.kind == PRETRAINING:
        return grid.done(cell)
    return (grid.fold_folder(cell) / "validation" / "summary.json").is_file()


def keep_metrics(grid: Grid, cell: Cell, seconds: float) -> None:
    """Measure a validated run's predictions, keep the numbers, and drop checkpoints that nobody will ask for."""
    fold, file = grid.fold_folder(cell), grid.metrics_file(cell)
    dataset_json = read_json(grid.preprocessed / "dataset.json")
    folders = {int(path.name.rpartition("_")[2]): path for path in fold.glob("validation_step_*")}
    folders[grid.last_step(cell)] = fold / "validation"
    frames = []
    for step in sorted(folders):
        frame = fold_metrics(
            folders[step], grid.preprocessed / "gt_segmentations", dataset_json, grid.protocol.tolerance
        )
        frame.insert(0, "step", step)
        frames.append(frame)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json({"seconds": seconds, "rate": cell.rate}, file.with_suffix(".json"))
    with replaced_on_success(file) as temporary:
        pd.concat(frames).to_csv(temporary, index=False)
    if not grid.keep_checkpoints:
        for checkpoint in fold.glob("checkpoint_*.pth"):
            checkpoint.unlink()


def _die_with_parent() -> Callable[[], None]:
    """For Linux: a run does not survive the study's process, whatever ends it, so that no two ever share a folder."""
    library = ctypes.CDLL(None)

    def set_signal() -> None:
        library.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    return set_signal
