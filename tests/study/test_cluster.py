"""A study as jobs of submitit's local executor."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.study import cluster
from nnssl_ext.study.cluster import executor_of, run_on_cluster
from nnssl_ext.study.grid import Grid
from nnssl_ext.study.protocol import SCRATCH
from tests.conftest import Environment
from tests.study.test_analysis import planted
from tests.study.test_study import RATE, WORDS, comparable

Data = Callable[[str], Environment]


def pending(tmp_path: Path) -> Grid:
    """Build a study with two runs that are trained and predicted, but not measured."""
    grid = planted(tmp_path, 0.0)
    for run in grid.compared(grid.arms[0], 0.01)[:2]:
        grid.metrics_file(run).unlink()
        summary = grid.fold_folder(run) / "validation" / "summary.json"
        summary.parent.mkdir(parents=True)
        summary.write_text("{}")
    return grid


@pytest.mark.integration
def test_failed_jobs_are_failed_runs(tmp_path: Path) -> None:
    """The predictions cannot be measured: each job marks its own run, and the others go on."""
    grid = pending(tmp_path)
    executor = executor_of(tmp_path / "cluster", "local", "cpu", 2, [])
    run_on_cluster(grid, executor, 2, poll=0.2)
    assert len(grid.failed) == 2
    assert set(grid.failures()) == set(grid.failed)
    for log in grid.failed.values():
        assert "could not be measured" in log.read_text()


def test_jobs_give_the_report_of_a_local_study(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study whose pretraining and fine-tuning are done again as jobs, the second after the first."""
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    words = [*WORDS, *RATE, "--subsets", "1", "--total-baseline", "0", "--snapshots", "4"]
    main([*words, "-o", "here"])
    here, jobs = (environment.root / name for name in ("here", "jobs"))
    shutil.copytree(here, jobs, symlinks=True)
    for part in ("results", "runs", "logs"):
        shutil.rmtree(jobs / part / "VolumeFusion")
    (jobs / "report.md").unlink()

    main([*words, "-o", "jobs", "--launcher", "local", "--jobs", "2"])
    assert comparable(jobs) == comparable(here)
    results = pd.read_csv(jobs / "results.csv")
    assert set(results["arm"]) == {SCRATCH, "VolumeFusion"}
    assert not results["dice"].isna().any()
    assert len(list((jobs / "cluster").glob("*_result.pkl"))) == 2
    assert not (here / "cluster").exists()


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected KEY=VALUE, got 'partition'"):
        executor_of(tmp_path, "local", "cpu", 1, ["partition"])
    with pytest.raises(UserError, match="--launcher local runs on CPUs"):
        executor_of(tmp_path, "local", "cuda", 1, [])


def test_a_job_that_slurm_warns_is_interrupted_and_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By USR2, which submitit asks Slurm for. The training gets SIGTERM, and another job continues it."""
    grid = planted(tmp_path, 0.0)
    run, ended = grid.compared(grid.arms[0], 0.01)[0], []
    grid.metrics_file(run).unlink()
    monkeypatch.setattr(cluster, "start", lambda *_: SimpleNamespace(terminate=lambda: ended.append("SIGTERM")))
    monkeypatch.setattr(cluster, "wait", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    try:
        assert cluster.run_job(grid, run)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR2), before, strict=True):
            signal.signal(number, handler)
    assert ended == ["SIGTERM"]
    job = SimpleNamespace(exception=lambda: None, result=lambda: True, state="COMPLETED")
    cluster._conclude(grid, run, job)
    assert not grid.failed
    assert run in list(grid.ready())


def test_the_state_of_a_job_is_slurms_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for sacct. submitit keeps the first state after which it takes a job as finished."""
    import submitit

    states, command = tmp_path / "states", tmp_path / "sacct"
    command.write_text(f"#!/bin/sh\ncat {states}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job: Any = submitit.SlurmJob(folder=tmp_path, job_id="7")
    preempted: dict[str, float] = {}

    def has_ended(state: str) -> bool:
        states.write_text(f"JobID|State|NodeList\n7|{state}|node\n")
        return cluster._has_ended(job, preempted)

    assert [has_ended(state) for state in ("SUSPENDED", "RUNNING", "REQUEUED", "PENDING")] == [False] * 4
    job.paths.result_pickle.parent.mkdir(parents=True, exist_ok=True)
    job.paths.result_pickle.touch()
    assert not has_ended("COMPLETING")
    assert has_ended("COMPLETED")
    assert has_ended("CANCELLED by 0")


def test_a_preempted_job_may_be_requeued_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a result submitit itself would wait for ever."""
    grid = planted(tmp_path, 0.0)
    run, preempted = grid.compared(grid.arms[0], 0.01)[0], dict[str, float]()
    grid.metrics_file(run).unlink()
    paths = SimpleNamespace(result_pickle=tmp_path / "none")
    job = SimpleNamespace(job_id="7", state="PREEMPTED", done=lambda: False, paths=paths)
    assert not cluster._has_ended(job, preempted)
    monkeypatch.setattr(cluster, "REQUEUE_SECONDS", -1.0)
    assert cluster._has_ended(job, preempted)
    cluster._conclude(grid, run, job)
    assert not grid.failed
    job.state = "RUNNING"
    assert not cluster._has_ended(job, preempted)
    assert not preempted
