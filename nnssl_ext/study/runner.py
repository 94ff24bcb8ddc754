"""Run a grid in parallel, resumable and past failures."""

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
from contextlib import suppress
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from nnssl_ext.environment import MAX_TIME, commands_path, cores, program
from nnssl_ext.errors import UserError, disk_is_full
from nnssl_ext.external_trainers import trainer_folders
from nnssl_ext.files import replaced_on_success
from nnssl_ext.provenance import revision, versions
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.signals import EndSignals
from nnssl_ext.study.grid import PRETRAINING, Grid, Run
from nnssl_ext.study.metrics import fold_metrics
from nnssl_ext.training.wrapping import arithmetic, mixed_precision

#: Seconds that stopped commands may take to end: a step, and its checkpoint.
GRACE_SECONDS = 120
#: Seconds between two notes of a run's time, so that interrupted runs are timed too.
NOTE_SECONDS = 20
#: File in a study's folder that keeps the checkpoints of fine-tunings.
KEEP = ".keep_checkpoints"
#: Environment variables of one place for runs.
Slot = dict[str, str]


def slots(device: str, jobs: int) -> list[Slot]:
    """List the places of this machine. There are ``jobs`` on each GPU, or ``jobs`` that share the CPU."""
    available = cores()
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus for _ in range(jobs)]
        workers = workers_of(available // max(1, len(places)))
        return [{"nnUNet_n_proc_DA": workers, **place} for place in places]
    threads = str(max(1, available // jobs))
    # augmentation in the run's own process: a worker would only compete for the same cores
    return [{"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": threads} for _ in range(jobs)]


def workers_of(available: int) -> str:
    """Return a run's nnUNet_n_proc_DA: the user's, else one for each of its cores, up to nnU-Net's 12."""
    return os.environ.get("nnUNet_n_proc_DA") or str(max(1, min(12, available)))


def run_grid(grid: Grid, places: Sequence[Slot]) -> None:
    """Do every unfinished run.

    Failed runs are noted in ``grid.failed``. The next call tries them again.

    Raises:
        SystemExit: With status 128 + signal, after Ctrl-C, SIGTERM or a closed terminal. No finished step is lost.
    """
    if grid.keep_checkpoints:
        (grid.folder / KEEP).touch()  # a later call without the option deletes none
    total = grid.all_runs()
    finished = sum(grid.done(run) for run in total)
    for run in total:
        if run.kind != PRETRAINING and grid.done(run):
            drop_checkpoints(grid, run)  # a kill may have come before they were deleted
    bar = tqdm(total=len(total), initial=finished, desc="Runs", unit="run", disable=not sys.stderr.isatty())
    with EndSignals() as signals:
        pool = _Pool(grid, bar, signals)
        threads = [threading.Thread(target=pool.work, args=(place,), daemon=True) for place in places]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive() and not signals.received:
                    thread.join(0.2)
            if signals.received:
                pool.stop()
        except BaseException:
            pool.stop(0)
            raise
        finally:
            bar.close()
    if pool.error is not None:
        raise pool.error
    leave_if_stopped(grid, signals)


def leave_if_stopped(grid: Grid, signals: EndSignals) -> None:
    """End this process if a signal asked for it."""
    if signals.received:
        runs = grid.all_runs()
        print(
            f"Stopped by {signals.received}: {sum(map(grid.done, runs))} of {len(runs)} runs are done, interrupted "
            f"ones keep their steps. Call the same command again to go on.",
            file=sys.stderr,
        )
        raise SystemExit(128 + getattr(signal, signals.received))


class _Pool:
    """Threads that each take the next ready run."""

    def __init__(self, grid: Grid, bar: tqdm, signals: EndSignals) -> None:
        self.grid, self.bar, self.signals = grid, bar, signals
        self.changed = threading.Condition()
        self.running: set[Run] = set()
        self.processes: set[subprocess.Popen] = set()
        self.begin, self.ended = time.monotonic(), 0
        self.stopped = False
        self.error: BaseException | None = None

    def work(self, slot: Slot) -> None:
        run = None
        while not self.stopped:
            try:
                run = self._take()
                if run is None:
                    return
                self._run(run, slot)
            except BaseException as error:  # raised again in the main thread
                self.error = error
                self.stop()
            with self.changed:
                self.running -= {run}
                self.changed.notify_all()

    def stop(self, seconds: float = GRACE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        with self.changed:
            self.stopped = True
            for process in self.processes:
                if os.name != "nt" or not self.signals.received:  # there, Ctrl-C reached it, and this would kill it
                    process.terminate()
            self.changed.notify_all()
        for process in list(self.processes):
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _take(self) -> Run | None:
        with self.changed:
            while not (self.stopped or self.signals.received):
                ready = (c for c in self.grid.ready() if c not in self.running and c not in self.grid.failed)
                run = next(ready, None)
                if run is not None:
                    self.running.add(run)
                    return run
                if not self.running:
                    return None
                self.changed.wait()
        return None

    def _run(self, run: Run, slot: Slot) -> None:
        self.bar.set_postfix_str(f"{run.arm.name} {run.name}")
        seconds = perform(self.grid, run, lambda clock: self._command(run, slot, clock))
        if self.stopped or self.signals.received:
            return
        if seconds is None:
            self.grid.failed[run] = log = self.grid.log_file(run)
            self.bar.write(f"Failed: {run.arm.name} {run.name}. Log: {log}", sys.stderr)
            return
        self.bar.update()
        self.ended += 1
        print(f"{run.arm.name} {run.name}: {seconds:.0f} s; {self._progress()}", flush=True)

    def _progress(self) -> str:
        """Report finished runs and extrapolate the remaining hours."""
        runs = self.grid.all_runs()
        left = sum(not self.grid.done(run) for run in runs)
        # failed runs are not repeated by this call
        hours = (time.monotonic() - self.begin) / 3600 * (left - len(self.grid.failed)) / max(1, self.ended)
        return f"{len(runs) - left} of {len(runs)} runs done, about {hours:.1f} h left"

    def _command(self, run: Run, slot: Slot, clock: _Clock) -> int | None:
        with self.changed:
            if self.stopped:
                return None
            process = start(self.grid, run, slot)
            self.processes.add(process)
        status = wait(process, clock)
        with self.changed:
            self.processes.discard(process)
        return None if self.stopped or self.signals.received else status


def perform(grid: Grid, run: Run, execute: Callable[[_Clock], int | None]) -> float | None:
    """Train and measure one run.

    Args:
        run: A run that is ready.
        execute: Run the command and return its status, None if the study was stopped.

    Returns:
        Seconds that the run has taken, None if it failed or was stopped.
    """
    clock = _Clock(grid.log_file(run).with_suffix(".seconds"))
    if not validated(grid, run):
        status = execute(clock)
        if status is None:
            return None
        if status or not validated(grid, run):
            grid.failure_mark(run).touch()
            return None
    if run.kind != PRETRAINING:
        try:
            keep_metrics(grid, run, clock.note())
        except (Exception, UserError) as error:  # an unreadable prediction raises anything
            if disk_is_full(error):  # the predictions are fine
                line = error.line if isinstance(error, UserError) else str(error)
                raise UserError(f"{line}. Make room and call the same command again.") from error
            with grid.log_file(run).open("a", encoding="utf-8") as log:
                log.write(f"The predictions could not be measured:\n{traceback.format_exc()}")
            if not isinstance(error, _NoSnapshotError):
                drop_predictions(grid, run)  # the next call predicts again, from the checkpoints
            grid.failure_mark(run).touch()
            return None
    grid.failure_mark(run).unlink(missing_ok=True)
    return clock.note()


def start(grid: Grid, run: Run, slot: Slot) -> subprocess.Popen:
    """Start a run's command. Output goes to its log."""
    log = grid.log_file(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    grid.write_plans(run)
    # a run ends with this process, so that no two runs ever share a folder: 1 is PR_SET_PDEATHSIG
    tie = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL) if sys.platform == "linux" else None
    words = grid.command(run)
    with log.open("ab") as file:
        return subprocess.Popen(
            [program(words[0]), *words[1:]],
            env=environment(grid, run, slot),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=tie,
        )


def wait(process: subprocess.Popen, clock: _Clock) -> int:
    """Wait for a command and note its time."""
    while True:
        try:
            return process.wait(NOTE_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(OSError):  # the next one counts these seconds too
                clock.note()


class _Clock:
    """Measure the seconds of a run across interruptions.

    Args:
        file: Holds the seconds so far.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.begin = file, time.monotonic()
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        self.before = float(text) if text else 0.0

    def note(self) -> float:
        seconds = self.before + time.monotonic() - self.begin
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_on_success(self.file) as temporary:
            temporary.write_text(f"{seconds:.1f}", encoding="utf-8")
        return seconds


def environment(grid: Grid, run: Run, slot: Slot) -> dict[str, str]:
    """Return the environment of a run's command."""
    return {
        **os.environ,
        "PATH": commands_path(),
        "PYTHONUNBUFFERED": "1",
        "nnUNet_raw": os.environ.get("nnUNet_raw", str(grid.folder)),
        "nnUNet_preprocessed": str(grid.preprocessed.parent),
        "nnUNet_results": str(grid.folder / "results" / run.arm.name),
        "nnUNet_extTrainer": trainer_folders(),
        MAX_TIME: "",  # a run that leaves early counts as failed
        **slot,
    }


def validated(grid: Grid, run: Run) -> bool:
    """Return whether a run's command has finished."""
    if run.kind == PRETRAINING:
        return grid.done(run)
    return (grid.fold_folder(run) / "validation" / "summary.json").is_file()


class _NoSnapshotError(UserError):
    """Report predictions that no call can make again."""


def keep_metrics(grid: Grid, run: Run, seconds: float) -> None:
    """Measure a run's predictions and delete its checkpoints."""
    fold, file = grid.fold_folder(run), grid.metrics_file(run)
    dataset_json = read_json(grid.preprocessed / "dataset.json")
    folders = {int(path.name.rpartition("_")[2]): path for path in fold.glob("validation_step_*")}
    folders[grid.last_step(run)] = fold / "validation"
    wanted = grid.snapshots(run)
    if missing := sorted(set(wanted) - set(folders)):
        raise _NoSnapshotError(
            f"{fold}: expected predictions after steps {wanted}, got none after {missing}: a checkpoint was "
            f"not written, or was deleted. Delete {fold} and call the study again."
        )
    frames, expected = [], set(grid.folds[run.fold]["val"])
    for step in sorted(folders):
        truth, tolerance = grid.preprocessed / "gt_segmentations", grid.protocol.tolerance
        frame = fold_metrics(folders[step], truth, dataset_json, tolerance, grid.reader)
        if (found := {grid.case_of(file) for file in frame["case"]}) != expected:
            raise UserError(
                f"{folders[step]}: expected predictions of the {len(expected)} cases of the split, got {len(found)}, "
                f"{len(found - expected)} of them others. Delete {fold} and call the study again."
            )
        frame.insert(0, "step", step)
        frames.append(frame)
    file.parent.mkdir(parents=True, exist_ok=True)
    made = {"versions": versions(), "revision": revision()}
    precision = mixed_precision(torch.device(grid.device), grid.finetune_settings(run)["precision"])
    device = f"{grid.device} {arithmetic(precision)}"
    write_json({"seconds": seconds, "rate": run.rate, "device": device, **made}, file.with_suffix(".json"))
    with replaced_on_success(file) as temporary:
        pd.concat(frames).to_csv(temporary, index=False)
    drop_checkpoints(grid, run)


def drop_predictions(grid: Grid, run: Run) -> None:
    """Delete a run's predictions at every snapshot."""
    for folder in grid.fold_folder(run).glob("validation*"):
        shutil.rmtree(folder)


def drop_checkpoints(grid: Grid, run: Run) -> None:
    """Delete a measured run's checkpoints, unless kept."""
    if not (grid.folder / KEEP).exists():
        for checkpoint in grid.fold_folder(run).glob("checkpoint_*.pth"):
            checkpoint.unlink()
