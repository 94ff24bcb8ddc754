"""Run a study's grid as cluster jobs through submitit.

Each job trains and measures one run, exactly as a local study does. Results are the same files in the same folder, so a
study may go on locally what it began on a cluster.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnssl_ext.environment import cores
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.signals import EndSignals
from nnssl_ext.study.grid import Grid, Run
from nnssl_ext.study.runner import leave_if_stopped, perform, start, wait, workers_of

#: Jobs in flight unless --jobs says otherwise.
JOBS = 16
#: Seconds between two looks at the jobs of each launcher.
POLL_SECONDS = {"slurm": 10.0, "local": 1.0}
#: Hours of a job unless --slurm time=... says otherwise. An interrupted run continues in the next job.
HOURS = 24
#: States in which a job still works, or will.
ALIVE = ("PENDING", "READY", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "PREEMPTED", "SUSPENDED")
#: Seconds in which a cluster that requeues preempted jobs has done so.
REQUEUE_SECONDS = 600.0


def executor_of(folder: Path, launcher: str, device: str, jobs: int, options: Sequence[str]) -> Any:
    """Build submitit's executor.

    Args:
        folder: Holds the jobs' own files.
        launcher: ``slurm``, or ``local`` for submitit's local executor.
        device: ``cuda`` asks for one GPU a job.
        jobs: Jobs that may run at a time.
        options: ``KEY=VALUE`` words for sbatch, such as ``partition=gpu``.

    Raises:
        UserError: Without submitit, without Slurm, or for an option that is not KEY=VALUE.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher needs submitit. Install it with: pip install 'nnssl-ext[slurm]'") from error
    given = {}
    for word in options:
        key, _, value = word.partition("=")
        if not key or not value:
            raise UserError(f"--slurm: expected KEY=VALUE, got '{word}'.")
        given[f"slurm_{key.replace('-', '_')}"] = int(value) if value.isdigit() else value
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=launcher)
    except RuntimeError as error:
        raise UserError(f"--launcher {launcher}: {error}. Run this on a machine that can submit Slurm jobs.") from error
    executor.update_parameters(name="nnssl_ext_study", timeout_min=60 * HOURS)
    if launcher == "local" and device == "cuda":
        raise UserError("--launcher local runs on CPUs. Use -device cpu, or --launcher here, which shares the GPUs")
    if launcher == "slurm":
        own: dict[str, Any] = {"slurm_array_parallelism": jobs}
        if device == "cuda":
            own |= {"gpus_per_node": 1}
        try:
            executor.update_parameters(**{**own, **given})
        except (NameError, TypeError, ValueError) as error:
            raise UserError(f"--slurm: {error}") from error
    return executor


def run_job(grid: Grid, run: Run) -> bool:
    """Train and measure one run. Return whether Slurm interrupted it."""
    warned = []

    def execute(clock: Any) -> int | None:
        # as many threads as a study here gives to a run: stock takes all cores of the machine, allotted or not
        threads = {} if grid.device == "cuda" else {"OMP_NUM_THREADS": str(cores())}
        process = start(grid, run, {"nnUNet_n_proc_DA": workers_of(cores()), **threads})

        def end(number: int, _: Any) -> None:
            warned.append(number)
            process.terminate()  # the training writes a checkpoint

        # Slurm ends a job by the first, and submitit lets it warn by the second before the time limit
        for name in ("SIGTERM", "SIGUSR2"):
            signal.signal(getattr(signal, name), end)
        status = wait(process, clock)
        return None if warned else status

    perform(grid, run, execute)
    return bool(warned)


def run_on_cluster(grid: Grid, executor: Any, jobs: int, poll: float) -> None:
    """Do every unfinished run in jobs.

    Jobs that an earlier call left running are waited for.

    Ctrl-C, SIGTERM and a closed terminal cancel the jobs, which write their checkpoints.

    Args:
        grid: The study's grid. Failed runs are noted in ``grid.failed``.
        executor: As ``executor_of`` builds it.
        jobs: Jobs in flight at a time.
        poll: Seconds between two looks at the jobs.
    """
    note = grid.folder / "cluster" / "jobs.json"
    working, preempted = _left_running(grid, note), dict[str, float]()
    with EndSignals() as signals:
        while not signals.received:
            for run, job in list(working.items()):
                if _has_ended(job, preempted):
                    del working[run]
                    _conclude(grid, run, job)
            waiting = [run for run in grid.ready() if run not in working and run not in grid.failed]
            ready = waiting[: max(0, jobs - len(working))]
            if ready:
                plain = replace(grid, failed={})
                with executor.batch():
                    submitted = [executor.submit(run_job, plain, run) for run in ready]
                working |= dict(zip(ready, submitted, strict=True))
            # at once after the submission: a job without a note would be submitted again
            write_json({_key(run): job.job_id for run, job in working.items()}, note)
            if not working:
                return
            time.sleep(poll)
        for job in working.values():
            job.cancel()
    leave_if_stopped(grid, signals)


def _has_ended(job: Any, preempted: dict[str, float]) -> bool:
    """Return whether a job is over. ``preempted`` notes when jobs were first seen to be."""
    if job.done():
        job.watcher.clear()  # submitit asks Slurm once in ten minutes, and never again after SUSPENDED
    state = _state(job)
    if state != "PREEMPTED":
        preempted.pop(job.job_id, None)
        return job.done() and state not in ALIVE
    return time.monotonic() - preempted.setdefault(job.job_id, time.monotonic()) > REQUEUE_SECONDS


def _was_interrupted(job: Any) -> bool:
    if _state(job) == "PREEMPTED" and not job.paths.result_pickle.exists():  # submitit would wait for a result
        return True
    return job.exception() is None and job.result()


def _conclude(grid: Grid, run: Run, job: Any) -> None:
    done = grid.done(run)
    if not done and _was_interrupted(job):
        print(f"{run.arm.name} {run.name}: interrupted; it continues in another job", flush=True)
        return
    if not done:
        grid.failed[run] = log = grid.log_file(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        if job.exception() is not None:  # the job itself failed: out of time or memory, or a lost node
            with log.open("a", encoding="utf-8") as file:
                file.write(f"Job {job.job_id} failed: {job.exception()}\n")
        grid.failure_mark(run).touch()
    runs = grid.all_runs()
    finished = sum(grid.done(other) for other in runs)
    print(f"{run.arm.name} {run.name}: {'done' if done else 'failed'}; {finished} of {len(runs)} runs done", flush=True)
    if not done:
        print(f"Failed: {run.arm.name} {run.name}. Log: {grid.log_file(run)}", file=sys.stderr)


def _left_running(grid: Grid, note: Path) -> dict[Run, Any]:
    """Find the running jobs of an earlier call."""
    if not note.is_file():
        return {}
    import submitit

    ids, found = read_json(note), {}
    for run in grid.all_runs():
        if _key(run) in ids and not grid.done(run):
            job: Any = submitit.SlurmJob(folder=note.parent, job_id=str(ids[_key(run)]))
            if _state(job) in ALIVE:
                found[run] = job
    return found


def _state(job: Any) -> str:
    return str(job.state).split(" ")[0]


def _key(run: Run) -> str:
    return f"{run.arm.name}/{run.name}"
