"""The study through its command: real trainings, killed at random, and what the report says of planted numbers."""

import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import write_json
from nnssl_ext.study.analysis import Analysis, load_results
from nnssl_ext.study.grid import Arm, Grid, arms_of
from nnssl_ext.study.protocol import SCRATCH, TOTAL, draw_cases
from nnssl_ext.study.report import write_report
from nnssl_ext.study.runner import slots
from tests.conftest import Environment
from tests.study.test_protocol import ALL, HELD_OUT, POOL, PROTOCOL

Data = Callable[[str], Environment]
WORDS = ["study", "-d", "817", "-c", "3d_fullres", "-device", "cpu", "--methods", "scratch", "VolumeFusion"]
WORDS += ["--labels", "2", "--subsets", "2", "--steps", "4", "--snapshots", "2", "--total-baseline", "1"]
WORDS += ["epochs=1", "iterations_per_epoch=2", "validation_iterations=1", "finetune.steps_per_epoch=2"]
RATE = ["--rates", "0.01"]


def comparable(study: Path) -> tuple[str, str]:
    """All numbers of a study, and its report without what a clock says."""
    text = re.sub(r"## Cost.*?(?=\n## )", "", (study / "report.md").read_text(), flags=re.DOTALL)
    return (study / "results.csv").read_text(), text.replace(study.name, "STUDY")


def call(environment: Environment, study: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nnssl_ext", *WORDS, *RATE, "-o", study],
        cwd=environment.root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_killed_at_ten_points_the_report_is_the_same(with_data: Data) -> None:
    environment = with_data("labelled")
    before = {path: path.stat().st_mtime_ns for path in environment.dataset("labelled").rglob("*")}
    whole = call(environment, "whole")
    out, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, out

    generator = random.Random(0)
    for _ in range(10):
        broken = call(environment, "broken")
        try:
            broken.wait(timeout=generator.uniform(4, 16))
        except subprocess.TimeoutExpired:
            broken.send_signal(signal.SIGKILL)
        broken.communicate()
    broken = call(environment, "broken")
    out, _ = broken.communicate(timeout=600)
    assert broken.returncode == 0, out
    assert comparable(environment.root / "broken") == comparable(environment.root / "whole")

    results = pd.read_csv(environment.root / "whole" / "results.csv")
    assert set(results["arm"]) == {SCRATCH, "VolumeFusion", TOTAL}
    assert set(results[results.arm == TOTAL]["step"]) == {6}
    assert not results["dice"].isna().any()
    # the user's own data set is as it was
    assert {path: path.stat().st_mtime_ns for path in environment.dataset("labelled").rglob("*")} == before


def test_a_failed_run_is_reported_and_stops_nobody(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    (environment.root / "bad.pth").write_bytes(b"nothing")
    study = [*WORDS[:8], "scratch", "--init", "bad=bad.pth", *WORDS[10:], *RATE, "-o", "st"]
    with pytest.raises(UserError, match="2 runs failed and are missing .* logs: .*labels_2_subset_0.txt"):
        main(study)
    results = pd.read_csv(environment.root / "st" / "results.csv")
    assert set(results["arm"]) == {SCRATCH}
    text = (environment.root / "st" / "report.md").read_text()
    assert "Failed: bad labels_2_subset_0" in text
    assert "no pair of runs is finished" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "VolumeFussion"], "unknown method 'VolumeFussion'; known: scratch, VolumeFusion"),
        (["--labels", "0"], "--labels takes numbers of at least 1, or all; got '0'"),
        (["--labels", "2", "100"], "budgets .* do not fit"),
        (["--primary-labels", "3"], "the endpoint, 3 labels"),
        (["--snapshots", "9"], r"must lie between 1 and --steps 4"),
        (["--init", "x=missing.pth"], "expected NAME=FILE"),
        (["--fold", "7"], "has 5 folds"),
        (["-p", "nothing"], "has no plans 'nothing'"),
        (["-c", "3d_half"], "no configuration '3d_half'"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_bad_words_are_one_line_and_write_nothing(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    place = WORDS.index("epochs=1")
    with pytest.raises(UserError, match=message):
        main([*WORDS[:place], *words, "-o", "st", *WORDS[place:]])
    assert [path.name for path in (environment.root / "st").rglob("*") if path.name != ".lock"] == []


def planted(tmp_path: Path, gain: float, arms: list[Arm] | None = None, missing: int = 0) -> Grid:
    """A finished study whose numbers we made: pretraining adds ``gain``, runs differ by half a point."""
    protocol = replace(PROTOCOL, subsets=8, rates=[0.01])
    cases = draw_cases(protocol, HELD_OUT, POOL, ALL)
    grid = Grid(tmp_path, protocol, cases, arms or arms_of(["VolumeFusion", "MaskedAutoencoder"], [], 0))
    generator = np.random.default_rng(0)
    for arm in grid.arms:
        if arm.method:
            folder = grid.fold_folder(grid.pretraining(arm))
            folder.mkdir(parents=True)
            write_json({"steps": 1000, "hours": 1.0}, folder / "pretraining_summary.json")
        for cell in grid.grid(arm, 0.01)[: len(grid.grid(arm, 0.01)) - missing]:
            ceiling = 0.9 - 0.2 / cell.labels
            rows = [
                (step, case, organ, ceiling - 30 / step + gain * (arm.name == "VolumeFusion") + luck, 0.5)
                for step in protocol.snapshots
                for luck in [generator.normal(0, 0.005)]
                for case in HELD_OUT
                for organ in ("a", "b")
            ]
            file = grid.metrics_file(cell)
            file.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows, columns=["step", "case", "organ", "dice", "nsd"]).to_csv(file, index=False)
            write_json({"seconds": 60.0, "rate": 0.01}, file.with_suffix(".json"))
    return grid


def test_a_planted_gain_is_said_and_a_null_too(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03)
    analysis = Analysis(grid, load_results(grid))
    found = analysis.primary("VolumeFusion")
    assert found is not None
    assert found.effect.low < 0.03 < found.effect.high
    assert found.effect.p == pytest.approx(2 / 2**8)
    answers = {arm.name: analysis.answer(arm) for arm in analysis.tested_arms}
    assert "a significant gain, +" in answers["VolumeFusion"]
    assert "of labels saved (8 instead of 20)" in answers["VolumeFusion"]
    assert "no significant gain" in answers["MaskedAutoencoder"]
    assert analysis.reached("VolumeFusion", 2) == 600
    budgets = analysis.compare("VolumeFusion", SCRATCH, grid.protocol.labels, 300)
    assert [c.adjusted for c in budgets] == pytest.approx([4 * 2 / 2**8] * 4)


def test_saved_labels_are_not_measured_while_budgets_are_missing(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    assert Analysis(grid, load_results(grid)).saving("MaskedAutoencoder") == "none shown"
    for cell in grid.grid(next(arm for arm in grid.arms if arm.name == "MaskedAutoencoder"), 0.01):
        if cell.labels == grid.protocol.labels[-2]:
            grid.metrics_file(cell).unlink()
    analysis = Analysis(grid, load_results(grid))
    assert analysis.saving("MaskedAutoencoder") == "not measured"
    assert "saving of labels not measured" in analysis.answer(
        next(a for a in grid.arms if a.name == "MaskedAutoencoder")
    )


def test_the_report_of_a_planted_study(tmp_path: Path) -> None:
    grid = planted(tmp_path, -0.03, missing=1)
    (grid.preprocessed / "gt_segmentations").mkdir(parents=True)
    grid.protocol = replace(grid.protocol, transductive=True)
    # no predictions are there to be drawn: the first subset of the endpoint is left out
    for arm in grid.arms:
        grid.metrics_file(next(c for c in grid.grid(arm, 0.01) if (c.labels, c.subset) == (2, 0))).unlink()
    page = write_report(grid)
    text = (tmp_path / "report.md").read_text()
    assert "significantly worse than scratch" in text
    assert "Transductive" in text
    assert "runs are not done" in text
    assert "MaskedAutoencoder | 2 |" in text  # the control is compared with
    assert page.read_text().count("data:image/png;base64,") == text.count("](report/") == 2


def test_no_run_at_all_is_no_answer(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0, missing=10**6)
    analysis = Analysis(grid, load_results(grid))
    assert all("no pair of runs is finished" in analysis.answer(arm) for arm in analysis.tested_arms)


def test_rates_are_the_best_on_development_cases(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, development_runs=2)
    grid = Grid(tmp_path, protocol, draw_cases(protocol, HELD_OUT, POOL, ALL), [Arm(SCRATCH)])
    wanted = {0.01: (0.5, 0.7), 0.001: (0.65, 0.65)}
    for cell in grid.development(grid.arms[0]):
        file = grid.metrics_file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [(300, "c", "a", wanted[cell.rate][cell.subset], 0.5), (600, "c", "a", 0.9 * (cell.rate > 0.005), 0.5)]
        pd.DataFrame(rows, columns=["step", "case", "organ", "dice", "nsd"]).to_csv(file, index=False)
    assert grid.rate_is_known(grid.arms[0])
    assert grid.rate(grid.arms[0]) == 0.001


def test_cpu_slots_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnssl_ext.study.runner.cores", lambda: 8)
    assert [slot.variables["OMP_NUM_THREADS"] for slot in slots("cpu", 3)] == ["2"] * 3
