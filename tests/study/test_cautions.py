"""Notes and warnings of a report."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from nnssl_ext.recipe import write_json
from nnssl_ext.study.cautions import notes, warnings
from tests.study.test_analysis import about, planted


def test_what_a_reader_must_know(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    assert "2 arms are tested" in " ".join(notes(about(grid)))
    assert "one pretraining" in " ".join(notes(about(grid)))
    (line,) = warnings(about(grid))
    assert "Rates that were fixed, not chosen: scratch 0.01, VolumeFusion 0.01, MaskedAutoencoder 0.01." in line
    grid.protocol = replace(grid.protocol, rates=[0.01, 0.03])
    (line,) = [line for line in warnings(about(grid)) if "Chosen rates" in line]
    assert "(0.01, 0.03): scratch 0.01, VolumeFusion 0.01, MaskedAutoencoder 0.01" in line
    grid.protocol = replace(grid.protocol, rates=[0.003, 0.01, 0.03])
    assert not warnings(about(grid))
    grid.cases.development_subsets.append(["case_01", "case_02"])
    grid.protocol = replace(grid.protocol, development_runs=1)
    for run in grid.development(grid.arms[0]):  # one development case without the class of the endpoint
        rows = pd.DataFrame([(300, "c", "a", math.nan, math.nan)], columns=["step", "case", "organ", "dice", "nsd"])
        rows.to_csv(grid.metrics_file(run), index=False)
        write_json({"seconds": 1.0, "rate": run.rate}, grid.metrics_file(run).with_suffix(".json"))
    (line,) = [line for line in warnings(about(grid)) if line.startswith("Rates")]
    assert "Rates that could not be chosen, since no trial had a score: scratch 0.01. No development case" in line
    for number, warned in ((1, False), (2, True), (4, False)):
        grid.protocol = replace(grid.protocol, pretraining_seeds=number)
        assert any("Two pretraining runs" in line for line in warnings(about(grid))) == warned
    grid.protocol = replace(grid.protocol, pretraining_seeds=1)
    for run, device in zip(grid.compared(grid.arms[0], 0.01), ("cpu", "cuda"), strict=False):
        write_json({"seconds": 1.0, "rate": 0.01, "device": device}, grid.metrics_file(run).with_suffix(".json"))
    assert any("different precision: cpu, cuda" in line for line in warnings(about(grid)))


def test_a_study_that_ends_early_is_called_short(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    assert about(grid).late_rise(2) is None  # no snapshot near two thirds
    grid.protocol = replace(grid.protocol, steps=450, snapshots=[300, 450])
    for run in grid.compared(grid.arms[0], 0.01):
        frame = grid.metrics(run)
        late = frame[frame.step == 300].assign(step=450)
        late["dice"] += 0.012
        pd.concat([frame, late]).to_csv(grid.metrics_file(run), index=False)
    analysis = about(grid)
    assert analysis.late_rise(2) == pytest.approx(0.012)
    short = "Short study: scratch with {} still rises by 1.2 points"
    assert [line for line in warnings(analysis) if line.startswith(short.format("2 labels"))]
    # the reference of the labels saved may be short, too
    assert [line for line in warnings(analysis) if line.startswith(short.format("20 labels"))]
