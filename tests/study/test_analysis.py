"""What a study and its report say of planted numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnssl_ext.recipe import write_json
from nnssl_ext.study.analysis import MARGIN, Analysis, load_results
from nnssl_ext.study.arms import Arm, arms_of
from nnssl_ext.study.cautions import notes, warnings
from nnssl_ext.study.grid import Grid
from nnssl_ext.study.protocol import SCRATCH, TOTAL, draw_cases
from nnssl_ext.study.report import write_report
from tests.study.test_protocol import ALL, HELD_OUT, POOL, PROTOCOL


def planted(tmp_path: Path, gain: float, arms: list[Arm] | None = None, missing: int = 0) -> Grid:
    """A finished study whose numbers we made: pretraining adds ``gain``, runs differ by half a point."""
    protocol = replace(PROTOCOL, subsets=8, rates=[0.01])
    cases = draw_cases(protocol, HELD_OUT, POOL, ALL)
    grid = Grid(tmp_path, protocol, cases, arms or arms_of(["VolumeFusion", "MaskedAutoencoder"], [], 0))
    grid.preprocessed.mkdir(parents=True)
    plans = {"plans_name": "study", "nnssl_ext": {"epochs": 10, "iterations_per_epoch": 100}}
    write_json(plans, grid.preprocessed / f"{protocol.plans}_study.json")
    write_json({"file_ending": ".nii.gz"}, grid.preprocessed / "dataset.json")
    generator = np.random.default_rng(0)
    for arm in grid.arms:
        if arm.method:
            folder = grid.fold_folder(grid.pretraining(arm))
            folder.mkdir(parents=True, exist_ok=True)
            write_json({"steps": 1000, "hours": 1.0}, folder / "pretraining_summary.json")
            (folder / "checkpoint_final.pth").touch()
        for run in grid.compared(arm, 0.01)[: len(grid.compared(arm, 0.01)) - missing]:
            ceiling = 0.9 - 0.2 / run.labels
            rows = [
                (step, case, organ, ceiling - 30 / step + gain * (arm.name == "VolumeFusion") + luck, 0.5)
                for step in protocol.snapshots
                for luck in [generator.normal(0, 0.005)]
                for case in HELD_OUT
                for organ in ("a", "b")
            ]
            file = grid.metrics_file(run)
            file.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows, columns=["step", "case", "organ", "dice", "nsd"]).to_csv(file, index=False)
            write_json({"seconds": 60.0, "rate": 0.01}, file.with_suffix(".json"))
    return grid


def about(grid: Grid) -> Analysis:
    """Analyze the finished runs of a grid."""
    return Analysis(grid, load_results(grid))


def test_a_planted_gain_is_said_and_a_null_too(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03)
    analysis = Analysis(grid, load_results(grid))
    found = analysis.primary("VolumeFusion")
    assert found is not None
    assert found.effect.low < 0.03 < found.effect.high
    assert found.effect.p == pytest.approx(2 / 2**8)
    answers = {arm.name: analysis.answer(arm) for arm in analysis.tested_arms}
    assert "significant gain, +" in answers["VolumeFusion"]
    assert "of labels saved (8 instead of 20, by scratch alone none shown)" in answers["VolumeFusion"]
    assert "no significant difference" in answers["MaskedAutoencoder"]
    assert analysis.reached("VolumeFusion", 2) == 600
    budgets = analysis.compare("VolumeFusion", SCRATCH, grid.protocol.labels, 300)
    assert [c.adjusted for c in budgets] == pytest.approx([4 * 2 / 2**8] * 4)


def test_saved_labels_are_not_measured_while_budgets_are_missing(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    assert Analysis(grid, load_results(grid)).saving("MaskedAutoencoder") == "none shown"
    for run in grid.compared(next(arm for arm in grid.arms if arm.name == "MaskedAutoencoder"), 0.01):
        if run.labels == grid.protocol.labels[-2]:
            grid.metrics_file(run).unlink()
    analysis = Analysis(grid, load_results(grid))
    assert analysis.saving("MaskedAutoencoder") == "not measured"
    assert "Saving of labels not measured" in analysis.answer(
        next(a for a in grid.arms if a.name == "MaskedAutoencoder")
    )


def test_nothing_is_decided_before_all_pairs_are_there(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03)
    arm = next(arm for arm in grid.arms if arm.name == "VolumeFusion")
    for run in grid.compared(arm, 0.01):
        if run.subset >= 6 and run.labels in (2, grid.protocol.labels[-2]):
            grid.metrics_file(run).unlink()
    analysis = Analysis(grid, load_results(grid))
    found = analysis.primary(arm.name)
    assert found is not None
    assert found.effect.p < 0.05  # six pairs would be enough for that
    assert "not decided yet, +" in analysis.answer(arm)
    assert "6 of 8 paired runs" in analysis.answer(arm)
    assert grid.protocol.labels[-2] not in (analysis.saved(arm.name), None)
    # budgets without a run will be tested, too
    for run in grid.compared(arm, 0.01):
        if run.labels != 2:
            grid.metrics_file(run).unlink(missing_ok=True)
    analysis = Analysis(grid, load_results(grid))
    only = analysis.compare(arm.name, SCRATCH, grid.protocol.labels, 300)
    assert [(c.labels, c.adjusted) for c in only] == [(2, pytest.approx(len(grid.protocol.labels) * only[0].effect.p))]
    assert analysis.saving(arm.name) == "not measured"


def test_steps_are_saved_on_the_same_pairs(tmp_path: Path) -> None:
    """The runs that scratch lacks are the good ones of the arm: they must not count."""
    grid = planted(tmp_path, 0.0)
    scratch = grid.arms[0]
    for run in grid.compared(scratch, 0.01):
        if run.subset >= 2:
            grid.metrics_file(run).unlink()
    arm = next(arm for arm in grid.arms if arm.name == "VolumeFusion")
    for run in grid.compared(arm, 0.01):
        frame = grid.metrics(run)
        frame["dice"] += 0.5 if run.subset >= 2 else -0.5
        frame.to_csv(grid.metrics_file(run), index=False)
    assert Analysis(grid, load_results(grid)).reached(arm.name, 2) is None


def test_the_report_of_a_planted_study(tmp_path: Path) -> None:
    grid = planted(tmp_path, -0.03, missing=1)
    analysis = Analysis(grid, load_results(grid))
    assert "significant loss" in analysis.answer(grid.arms[1])
    (grid.preprocessed / "gt_segmentations").mkdir(parents=True)
    grid.protocol = replace(grid.protocol, transductive=True)
    # no predictions are there to be drawn: the first subset of the endpoint is left out
    for arm in grid.arms:
        grid.metrics_file(next(c for c in grid.compared(arm, 0.01) if (c.labels, c.subset) == (2, 0))).unlink()
    page = write_report(grid)
    text = (tmp_path / "report.md").read_text()
    assert "not decided yet" in text
    assert "Transductive" in text
    assert "runs are not done" in text
    assert "MaskedAutoencoder | 2 |" in text  # the control is compared with
    assert page.read_text().count("data:image/png;base64,") == text.count("](report/") == 3


def test_the_report_shows_every_run(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03, missing=1)
    (grid.preprocessed / "gt_segmentations").mkdir(parents=True)
    for arm in grid.arms:
        grid.metrics_file(next(c for c in grid.compared(arm, 0.01) if (c.labels, c.subset) == (2, 0))).unlink()
    write_report(grid)
    shown = (tmp_path / "report.md").read_text().split("## Every run")[1].split("\n## ")[0]
    rows = [
        [word.strip() for word in line.strip("| ").split("|")] for line in shown.splitlines() if line.count("|") > 3
    ]
    analysis = Analysis(grid, load_results(grid))
    p = grid.protocol
    wanted = {arm.name: analysis.score(arm.name, p.primary_labels, p.primary_step) for arm in grid.arms}
    mine = {int(row[1]): row[2:] for row in rows[2:] if row[0] == str(p.primary_labels)}
    assert sorted(mine) == list(range(1, 8))
    for subset, values in mine.items():
        assert values == [f"{wanted[arm.name][subset]:.4f}" for arm in grid.arms]


def test_the_report_averages_classes_over_runs(tmp_path: Path) -> None:
    """Runs that leave out cases without a class weigh as much as others."""
    grid = planted(tmp_path, 0.0)
    p = grid.protocol
    for run in grid.compared(grid.arms[0], 0.01):
        frame = pd.read_csv(grid.metrics_file(run))
        frame["dice"] = 0.8 if run.subset else 0.4
        if run.subset:
            frame.loc[frame["case"] != HELD_OUT[0], "dice"] = np.nan
        frame.to_csv(grid.metrics_file(run), index=False)
    write_report(grid)
    text = (tmp_path / "report.md").read_text().split("## Per class")[1].split("\n## ")[0]
    scratch = about(grid).score(SCRATCH, p.primary_labels, p.primary_step)
    assert f"{np.mean(list(scratch.values())):.3f}" == "0.750"
    assert text.count("0.750") == 2, text  # one of each class
    assert "A case without a class counts as 0 if the class is predicted" in text


def test_labels_that_scratch_needs_neither_are_not_saved(tmp_path: Path) -> None:
    """So short a training has no use for all labels: the arm's budget is scratch's, too."""
    grid = planted(tmp_path, 0.0)
    for arm in grid.arms:
        for run in grid.compared(arm, 0.01):
            frame = grid.metrics(run)
            frame["dice"] = 0.7 + 0.001 * run.subset + 0.01 * (arm.name == "VolumeFusion")
            frame.to_csv(grid.metrics_file(run), index=False)
    analysis = Analysis(grid, load_results(grid))
    answer = analysis.answer(grid.arms[1])
    assert f"No saving of labels shown: {grid.protocol.labels[0]} of 20 are enough for scratch too" in answer
    assert analysis.saving(SCRATCH).endswith(f"({grid.protocol.labels[0]} of 20)")


def test_the_lower_limit_decides_which_budget_suffices(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    costs = dict(zip(grid.protocol.labels, (0.05, MARGIN + 1e-6, MARGIN - 1e-6, 0.0), strict=True))
    for arm in grid.arms:
        for run in grid.compared(arm, 0.01):
            cost = costs[run.labels] if arm.name == "VolumeFusion" else 0.05 * (run.labels < 20)
            frame = grid.metrics(run)
            frame["dice"] = 0.7 - cost
            frame.to_csv(grid.metrics_file(run), index=False)
    analysis = about(grid)
    assert (analysis.saved("VolumeFusion"), analysis.saved(SCRATCH)) == (grid.protocol.labels[2], None)
    assert analysis.reached("VolumeFusion", 20) == 300
    # budgets are tested from the largest down: a lucky small one after a failure does not count
    for run in grid.compared(grid.arms[1], 0.01):
        frame = grid.metrics(run)
        frame["dice"] = 0.7 - (0.05 if run.labels == grid.protocol.labels[2] else 0.0)
        frame.to_csv(grid.metrics_file(run), index=False)
    assert about(grid).saved("VolumeFusion") is None


def test_the_answer_names_the_baseline_of_equal_total_steps(tmp_path: Path) -> None:
    arms = arms_of(["VolumeFusion"], [], 8)
    grid = planted(tmp_path, 0.03, arms)
    grid.protocol = replace(grid.protocol, total_baseline=8)
    assert "Against scratch of equal total steps: not measured." in Analysis(grid, load_results(grid)).answer(arms[1])
    total = next(arm for arm in arms if arm.name == TOTAL)
    for run in grid.compared(total, 0.01):
        grid.metrics_file(run).parent.mkdir(parents=True, exist_ok=True)
        write_json({"seconds": 60.0, "rate": 0.01}, grid.metrics_file(run).with_suffix(".json"))
        frame = grid.metrics(grid.compared(arms[1], 0.01)[0]).assign(step=grid.total_steps(), dice=0.1)
        frame.to_csv(grid.metrics_file(run), index=False)
    answer = Analysis(grid, load_results(grid)).answer(arms[1])
    assert "Against scratch of equal total steps: +" in answer
    assert "not decided yet" not in answer
    grid.metrics_file(grid.compared(total, 0.01)[-1]).unlink()
    answer = Analysis(grid, load_results(grid)).answer(arms[1])
    assert "], 7 of 8 pairs, not decided yet." in answer


def test_the_steps_behind_a_file_are_not_known(tmp_path: Path) -> None:
    """So it is not compared with scratch of equal total steps."""
    file = tmp_path / "weights.pth"
    file.touch()
    arms = arms_of(["VolumeFusion"], [f"other={file}"], 8)
    grid = planted(tmp_path / "study", 0.03, arms)
    grid.protocol = replace(grid.protocol, total_baseline=8)
    total = arms[-1]
    for run in grid.compared(total, 0.01):
        grid.metrics_file(run).parent.mkdir(parents=True, exist_ok=True)
        write_json({"seconds": 60.0, "rate": 0.01}, grid.metrics_file(run).with_suffix(".json"))
        frame = grid.metrics(grid.compared(arms[1], 0.01)[0]).assign(step=grid.total_steps(), dice=0.1)
        frame.to_csv(grid.metrics_file(run), index=False)
    analysis = about(grid)
    assert "equal total steps" in analysis.answer(arms[1])
    assert "equal total steps" not in analysis.answer(arms[2])
    text = write_report(grid).with_suffix(".md").read_text()
    assert "its steps are not known" in text


def test_another_recipe_than_scratch_is_said(tmp_path: Path) -> None:
    words = ["a=finetune.optimizer=adamw,finetune.learning_rate=0.01", "b=finetune.encoder_lr_scale=0.5"]
    grid = planted(tmp_path, 0.0, arms_of(["VolumeFusion"], [], 0, words))
    (line,) = [line for line in warnings(about(grid)) if "another recipe" in line]
    assert "than scratch: VolumeFusion+a. Their" in line


@pytest.mark.parametrize("own", [True, False])
def test_the_report_names_development_cases_that_chose_a_rate(tmp_path: Path, own: bool) -> None:
    words = ["scratch=finetune.learning_rate=0.01", "x=finetune.learning_rate=0.01"] if own else []
    grid = planted(tmp_path, 0.0, arms_of(["VolumeFusion"], [], 0, words))
    grid.protocol = replace(grid.protocol, rates=[0.01, 0.03])
    grid.cases = replace(grid.cases, development=["case_03"], development_subsets=[["case_04"]])
    text = write_report(grid).with_suffix(".md").read_text()
    assert ("| cases on which rates were chosen |  |" in text) == own
    assert ("| cases on which rates were chosen | case_03 |" in text) != own


def test_five_pairs_cannot_decide(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03)
    grid.protocol = replace(grid.protocol, subsets=5)
    results = load_results(grid)
    answer = Analysis(grid, results[results.subset < 5]).answer(grid.arms[1])
    assert "cannot be decided with 5 pairs" in answer


def test_predictions_that_were_cleared_away_do_not_stop_the_report(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03)
    write_report(grid)
    assert "Held-out cases" not in (tmp_path / "report.md").read_text()


def test_no_run_at_all_is_no_answer(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0, missing=10**6)
    analysis = Analysis(grid, load_results(grid))
    assert all("no pair of runs is finished" in analysis.answer(arm) for arm in analysis.tested_arms)


def test_the_endpoint_may_be_one_class(tmp_path: Path) -> None:
    """A gain in class b alone is the endpoint's gain, and half of it the mean's."""
    grid = planted(tmp_path, 0.0)
    for run in grid.compared(grid.arms[1], 0.01):
        frame = grid.metrics(run)
        frame.loc[frame.organ == "b", "dice"] += 0.04
        frame.to_csv(grid.metrics_file(run), index=False)
    mean = about(grid).primary("VolumeFusion")
    grid.protocol = replace(grid.protocol, primary_class="b")
    analysis = about(grid)
    rare = analysis.primary("VolumeFusion")
    assert mean is not None
    assert rare is not None
    assert rare.effect.mean - mean.effect.mean == pytest.approx(0.02)
    assert analysis.endpoint == "Dice of b with 2 labels after 300 steps"


def test_several_pretraining_runs_widen_the_interval(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03)
    one = about(grid).primary("VolumeFusion")
    grid.protocol = replace(grid.protocol, pretraining_seeds=2)
    analysis = about(grid)
    two = analysis.primary("VolumeFusion")
    assert one is not None
    assert two is not None
    assert (two.effect.mean, two.effect.pretrainings) == (pytest.approx(one.effect.mean), 2)
    assert two.effect.high - two.effect.low > one.effect.high - one.effect.low
    runs = [run for run in grid.compared(grid.arms[1], 0.01) if run.labels == 2]
    for run in runs[1::2]:  # those of one pretraining run
        frame = grid.metrics(run)
        frame.assign(dice=frame.dice + 0.05).to_csv(grid.metrics_file(run), index=False)
    shifted = about(grid).primary("VolumeFusion")
    assert shifted is not None
    assert shifted.effect.p > two.effect.p
    assert shifted.effect.high - shifted.effect.low > 0.05
    assert "8 paired runs over 2 pretraining runs" in analysis.answer(grid.arms[1])
    assert "about the method" in " ".join(notes(analysis))


def test_the_summary_stands_on_top(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03)
    text = write_report(grid).read_text()
    assert text.index("difference to scratch, points") < text.index("Curves")
    assert text.count("font-size") == 0
    assert text.count("<details>") >= 5


def test_a_drawn_pretraining_counts_on_either_side(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.touch()
    grid = planted(tmp_path / "study", 0.03, arms_of(["VolumeFusion"], [f"other={file}"], 0))
    grid.protocol = replace(grid.protocol, pretraining_seeds=2)
    analysis = about(grid)
    one, other = analysis.primary("VolumeFusion", "other"), analysis.primary("other", "VolumeFusion")
    assert one is not None
    assert other is not None
    assert (one.effect.low, one.effect.high) == pytest.approx((-other.effect.high, -other.effect.low))
    assert one.effect.p == pytest.approx(other.effect.p)


@pytest.mark.parametrize("pattern", [r"^(.)", r"(\d+)$"])
def test_groups_are_those_of_the_cases_not_of_their_files(tmp_path: Path, pattern: str) -> None:
    grid = planted(tmp_path, 0.03)
    for arm in grid.arms:
        for run in grid.compared(arm, 0.01):
            frame = grid.metrics(run)
            frame.assign(case=frame.case + ".nii.gz").to_csv(grid.metrics_file(run), index=False)
    grid.protocol = replace(grid.protocol, group_by=pattern)
    found = about(grid).primary("VolumeFusion")
    assert found is not None
    assert (found.cases < 1) == (pattern == r"(\d+)$")  # all cases in one group decide nothing


def test_the_cost_counts_every_pretraining(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.03)
    grid.protocol = replace(grid.protocol, pretraining_seeds=2)
    folder = grid.fold_folder(grid.pretraining(grid.arms[1], 1))
    folder.mkdir(parents=True)
    write_json({"steps": 1000, "hours": 1.0}, folder / "pretraining_summary.json")
    assert "| VolumeFusion | 2000 | 2.00 |" in write_report(grid).with_suffix(".md").read_text()
