"""Running a study's grid: resumable, several runs at a time where there are several devices, a failed run in nobody's
way."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from nnssl_ext.environment import commands_path, cores
from nnssl_ext.external_trainers import trainer_folders
from nnssl_ext.files import replaced_on_success
from nnssl_ext.provenance import revision, versions
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.grid import PRETRAINING, Cell, Grid
from nnssl_ext.study.metrics import fold_metrics

#: How long a stopped command may take to end.
GRACE_SECONDS = 20
#: How often the time that a run has taken is noted, so that it is known of runs that were interrupted, too.
NOTE_SECONDS = 20
#: In a study's folder: its fine-tunings' checkpoints are kept.
KEEP = ".keep_checkpoints"


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
    if grid.keep_checkpoints:
        (grid.folder / KEEP).touch()  # a later call without the option deletes none
    total = grid.all_cells()
    finished = sum(grid.done(cell) for cell in total)
    for cell in total:
        if cell.kind != PRETRAINING and grid.done(cell):
            drop_checkpoints(grid, cell)  # of a run that was killed just before it would have
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
        self.begin, self.ended = time.monotonic(), 0
        self.stopped = False
        self.error: BaseException | None = None

    def work(self, slot: Slot) -> None:
        cell = None
        while not self.stopped:
            try:
                cell = self._take()
                if cell is None:
                    return
                self._run(cell, slot)
            except BaseException as error:  # it is raised again in the main thread
                self.error = error
                self.stop()
            with self.changed:
                self.running -= {cell}
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
        clock = _Clock(self.grid.log_file(cell).with_suffix(".seconds"))
        self.bar.set_postfix_str(f"{cell.arm.name} {cell.name}")
        if not validated(self.grid, cell):
            status = self._command(cell, slot, clock)
            if self.stopped:
                return
            if status or not validated(self.grid, cell):
                self._failed(cell)
                return
        if cell.kind != PRETRAINING:
            try:
                keep_metrics(self.grid, cell, clock.note())
            except Exception:  # a prediction that cannot be read raises anything
                with self.grid.log_file(cell).open("a") as log:
                    log.write(f"its predictions could not be measured:\n{traceback.format_exc()}")
                drop_predictions(self.grid, cell)  # the next call makes them again, from the checkpoints
                self._failed(cell)
                return
        self.grid.failure_mark(cell).unlink(missing_ok=True)
        self.bar.update()
        self.ended += 1
        print(f"{cell.arm.name} {cell.name}: {clock.note():.0f} s; {self._progress()}", flush=True)

    def _failed(self, cell: Cell) -> None:
        log = self.grid.log_file(cell)
        self.grid.failed[cell] = log
        self.grid.failure_mark(cell).touch()
        self.bar.write(f"failed: {cell.arm.name} {cell.name}, see {log}", sys.stderr)

    def _progress(self) -> str:
        """Runs that are done, and about how long the others take if they are like those of this call."""
        cells = self.grid.all_cells()
        left = sum(not self.grid.done(cell) for cell in cells)
        hours = (time.monotonic() - self.begin) / 3600 * left / max(1, self.ended)
        return f"{len(cells) - left} of {len(cells)} runs done, about {hours:.1f} h left"

    def _command(self, cell: Cell, slot: Slot, clock: _Clock) -> int:
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
        while True:
            try:
                status = process.wait(NOTE_SECONDS)
                break
            except subprocess.TimeoutExpired:
                clock.note()
        with self.changed:
            self.processes.discard(process)
        return status


class _Clock:
    """The seconds that a run has taken, those before it was interrupted included.

    Args:
        file: Where they are noted.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.begin = file, time.monotonic()
        text = file.read_text() if file.is_file() else ""
        self.before = float(text) if text else 0.0

    def note(self) -> float:
        seconds = self.before + time.monotonic() - self.begin
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_on_success(self.file) as temporary:
            temporary.write_text(f"{seconds:.1f}")
        return seconds


def environment(grid: Grid, cell: Cell, slot: Slot) -> dict[str, str]:
    """The environment of a run's command."""
    return {
        **os.environ,
        "PATH": commands_path(),
        "PYTHONUNBUFFERED": "1",
        "nnUNet_raw": os.environ.get("nnUNet_raw", str(grid.folder)),
        "nnUNet_preprocessed": str(grid.preprocessed.parent),
        "nnUNet_results": str(grid.folder / "results" / cell.arm.name),
        "nnUNet_extTrainer": trainer_folders(),
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
        truth, tolerance = grid.preprocessed / "gt_segmentations", grid.protocol.tolerance
        frame = fold_metrics(folders[step], truth, dataset_json, tolerance, grid.reader)
        frame.insert(0, "step", step)
        frames.append(frame)
    file.parent.mkdir(parents=True, exist_ok=True)
    made = {"versions": versions(), "revision": revision()}
    write_json({"seconds": seconds, "rate": cell.rate, "device": grid.device, **made}, file.with_suffix(".json"))
    with replaced_on_success(file) as temporary:
        pd.concat(frames).to_csv(temporary, index=False)
    drop_checkpoints(grid, cell)


def drop_predictions(grid: Grid, cell: Cell) -> None:
    """All of a run's, at every snapshot."""
    for folder in grid.fold_folder(cell).glob("validation*"):
        shutil.rmtree(folder)


def drop_checkpoints(grid: Grid, cell: Cell) -> None:
    """Those of a measured run, which nobody will ask for, unless they are to be kept."""
    if not (grid.folder / KEEP).exists():
        for checkpoint in grid.fold_folder(cell).glob("checkpoint_*.pth"):
            checkpoint.unlink()


def _die_with_parent() -> Callable[[], None]:
    """For Linux: a run does not survive the study's process, whatever ends it, so that no two ever share a folder."""
    library = ctypes.CDLL(None)

    def set_signal() -> None:
        library.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    return set_signal
