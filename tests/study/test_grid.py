"""Which runs a study has, and with what."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.arms import Arm, arms_of
from nnssl_ext.study.grid import COMPARISON, Grid
from nnssl_ext.study.inputs import keep_files
from nnssl_ext.study.protocol import SCRATCH, draw_cases
from tests.study.test_analysis import planted
from tests.study.test_protocol import ALL, HELD_OUT, POOL, PROTOCOL


def test_rates_are_the_best_on_development_cases(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, development_runs=2)
    grid = Grid(tmp_path, protocol, draw_cases(protocol, HELD_OUT, POOL, ALL), [Arm(SCRATCH)])
    wanted = {0.01: (0.5, 0.7), 0.001: (0.65, 0.65)}
    for run in grid.development(grid.arms[0]):
        file = grid.metrics_file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [(300, "c", "a", wanted[run.rate][run.subset], 0.5), (600, "c", "a", 0.9 * (run.rate > 0.005), 0.5)]
        pd.DataFrame(rows, columns=["step", "case", "organ", "dice", "nsd"]).to_csv(file, index=False)
    assert grid.rate_is_known(grid.arms[0])
    assert grid.rate(grid.arms[0]) == 0.001


def test_a_failed_development_run_takes_its_rate_out(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, development_runs=2)
    scratch = Arm(SCRATCH)
    grid = Grid(tmp_path, protocol, draw_cases(protocol, HELD_OUT, POOL, ALL), [scratch])
    for run in grid.development(scratch):
        if (run.rate, run.subset) == (0.01, 1):
            grid.failed[run] = grid.log_file(run)
            continue
        file = grid.metrics_file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [(300, "c", "a", 0.5 + 10 * run.rate, 0.5)]
        pd.DataFrame(rows, columns=["step", "case", "organ", "dice", "nsd"]).to_csv(file, index=False)
    assert grid.rate_is_known(scratch)
    assert grid.rate(scratch) == max(rate for rate in protocol.rates if rate != 0.01)
    assert any(run.kind == COMPARISON for run in grid.ready())
    # what was compared with stays, though the failed run may succeed later
    run = grid.compared(scratch, 0.001)[0]
    write_json({"seconds": 1.0, "rate": 0.001}, grid.metrics_file(run).with_suffix(".json"))
    grid.failed.clear()
    assert grid.rate_is_known(scratch)
    assert grid.rate(scratch) == 0.001


def test_the_long_baseline_needs_no_pretraining_to_succeed(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0, arms_of(["VolumeFusion", "MaskedAutoencoder"], [], 1))
    assert grid.total_steps() == grid.protocol.steps + 1000
    grid.fold_folder(grid.pretraining(grid.arms[2])).joinpath("pretraining_summary.json").unlink()
    assert grid.total_steps() == grid.protocol.steps + 1000
    assert grid.rate_is_known(grid.arms[-1])


def test_what_spares_weights_is_not_done_from_scratch(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    file = grid.preprocessed / f"{grid.protocol.plans}_study.json"
    write_json(
        {
            **read_json(file),
            "nnssl_ext": {"finetune": {"head_only_steps": 100, "encoder_lr_scale": 0.1, "layer_decay": 0.5}},
        },
        file,
    )
    found = {}
    for arm in grid.arms:
        run = grid.compared(arm, 0.01)[0]
        grid.write_plans(run)
        found[arm.name] = read_json(grid.preprocessed / f"{grid.plans_name(run)}.json")["nnssl_ext"]["finetune"]
    assert (found[SCRATCH]["head_only_steps"], found[SCRATCH]["encoder_lr_scale"]) == (0, 1.0)
    assert (found[SCRATCH]["layer_decay"], found["VolumeFusion"]["layer_decay"]) == (1.0, 0.5)
    assert (found["VolumeFusion"]["head_only_steps"], found["VolumeFusion"]["encoder_lr_scale"]) == (100, 0.1)
    # nor by a recipe of the baseline's own
    (scratch,) = (arm for arm in arms_of(["scratch"], [], 0, ["scratch=finetune_sawtooth"]) if arm.name == SCRATCH)
    run = replace(grid.compared(grid.arms[0], 0.01)[0], arm=scratch)
    grid.write_plans(run)
    plans = read_json(grid.preprocessed / f"{grid.plans_name(run)}.json")["nnssl_ext"]["finetune"]
    assert plans["freeze_encoder_steps"] == 0


def test_a_name_stays_with_its_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    first.write_bytes(b"a")
    second.write_bytes(b"b")
    keep_files([Arm("x", init=str(first))], tmp_path / "study", keep=False)
    assert not (tmp_path / "study").exists()
    for _ in range(2):
        keep_files([Arm("x", init=str(first))], tmp_path / "study", keep=True)
    keep_files([Arm("y", init=str(second))], tmp_path / "study", keep=True)
    with pytest.raises(UserError, match="x=.*b.pth is another file than the one that .* knows by this name"):
        keep_files([Arm("x", init=str(second))], tmp_path / "study", keep=True)
    copy = tmp_path / "study" / "init" / "x.pth"
    first.write_bytes(b"c")  # as a checkpoint_latest.pth does
    assert copy.read_bytes() == b"a"
    with pytest.raises(UserError, match="x=.*a.pth is another file than the one"):
        keep_files([Arm("x", init=str(first))], tmp_path / "study", keep=True)
    with pytest.raises(UserError, match="neither scratch nor a method"):
        arms_of([], [f"VolumeFusion={first}"], 0)


def test_a_rate_without_a_score_is_not_chosen(tmp_path: Path) -> None:
    grid = Grid(tmp_path, PROTOCOL, draw_cases(PROTOCOL, HELD_OUT, POOL, ALL), [Arm(SCRATCH)])
    first, second = PROTOCOL.rates
    for run in grid.development(grid.arms[0]):
        file = grid.metrics_file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [(300, "c", "a", float("nan") if run.rate == first else 0.5, 0.5)]
        pd.DataFrame(rows, columns=["step", "case", "organ", "dice", "nsd"]).to_csv(file, index=False)
    assert grid.rate(grid.arms[0]) == second


def test_recipes_are_arms_on_the_same_weights(tmp_path: Path) -> None:
    words = ["scratch=finetune.optimizer=sgd", "slow=finetune.learning_rate=0.001", "adam=finetune.optimizer=adamw"]
    arms = arms_of(["VolumeFusion"], [], 0, words)
    assert [arm.name for arm in arms] == [SCRATCH, "VolumeFusion+slow", "VolumeFusion+adam"]
    grid = planted(tmp_path, 0.0, arms)
    assert len(grid.pretrainings()) == 1
    slow, adam = arms[1:]
    assert (grid.rates(slow), grid.rates(adam)) == ([0.001], [0.01])
    assert grid.development(slow) == []
    runs = [grid.compared(arm, grid.rate(arm))[0] for arm in (slow, adam)]
    assert grid.weights(runs[0]) == grid.weights(runs[1])
    found = []
    for run in runs:
        grid.write_plans(run)
        found.append(read_json(grid.preprocessed / f"{grid.plans_name(run)}.json")["nnssl_ext"]["finetune"])
    assert [plan["learning_rate"] for plan in found] == [0.01, 0.01]  # the planted runs' own
    assert found[1]["optimizer"] == "adamw"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("x", "expected NAME=RECIPE, got 'x'"),
        ("x=epochs=3", "expected fine-tuning settings only, got epochs"),
        ("x=finetune.steps=3", "finetune.steps belongs to the study"),
        ("x=nothing", "unknown recipe 'nothing'"),
    ],
)
def test_bad_recipes_are_one_line(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        arms_of(["VolumeFusion"], [], 0, [word])


def test_pairs_share_out_the_pretraining_runs(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    grid.protocol = replace(grid.protocol, pretraining_seeds=2)
    assert [run.name for run in grid.pretrainings()] == ["pretraining", "pretraining_seed_1"] * 2
    arm = grid.arms[1]
    files = {run.subset: grid.weights(run) for run in grid.compared(arm, 0.01)}
    assert files[0] == files[2] != files[1] == files[3]
    second = grid.pretrainings()[1]
    grid.write_plans(second)
    plans = read_json(grid.preprocessed / f"{grid.plans_name(second)}.json")
    assert plans["nnssl_ext"]["seed"] == grid.protocol.seed + 1


def test_commands_of_folders_with_spaces_run(tmp_path: Path) -> None:
    grid = planted(tmp_path / "my study", 0.0, arms_of(["VolumeFusion"], [], 0))
    line = grid.shown_command(grid.compared(grid.arms[1], 0.01)[0])
    shell = f"STUDY='{grid.folder}'; nnUNetv2_train() {{ printf '%s\\n' \"$nnUNet_results\" \"$@\"; }}; {line}"
    words = subprocess.run(["bash", "-c", shell], check=True, capture_output=True, text=True).stdout.splitlines()
    assert words[0] == str(grid.folder / "results" / "VolumeFusion")
    assert words[-2:] == ["-pretrained_weights", str(grid.weights(grid.compared(grid.arms[1], 0.01)[0]))]


def test_the_baselines_recipe_stays(tmp_path: Path) -> None:
    """Also that it has none."""
    plain, gentle = Arm(SCRATCH), Arm(SCRATCH, finetune={"warmup": 0.1})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    keep_files([plain], tmp_path / "a", keep=True)
    with pytest.raises(UserError, match="the recipe of scratch has changed"):
        keep_files([gentle], tmp_path / "a", keep=True)
    keep_files([gentle], tmp_path / "b", keep=True)
    with pytest.raises(UserError, match="the recipe of scratch has changed"):
        keep_files([plain], tmp_path / "b", keep=True)
    # a study from before it was noted, with a finished run
    (tmp_path / "c" / "runs" / SCRATCH).mkdir(parents=True)
    (tmp_path / "c" / "runs" / SCRATCH / "labels_2_subset_0.csv").touch()
    with pytest.raises(UserError, match="the recipe of scratch has changed"):
        keep_files([gentle], tmp_path / "c", keep=True)


def test_labels_of_any_name_are_read(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    run = grid.compared(grid.arms[0], 0.01)[0]
    rows = [(300, "1", "1", 0.5, 0.5), (300, "1", "NA", 0.25, float("nan"))]
    pd.DataFrame(rows, columns=["step", "case", "organ", "dice", "nsd"]).to_csv(grid.metrics_file(run), index=False)
    frame = grid.metrics(run)
    assert frame["organ"].tolist() == ["1", "NA"]
    assert frame["dice"].tolist() == [0.5, 0.25]
    assert np.isnan(frame["nsd"][1])


@pytest.mark.parametrize("transductive", [False, True])
def test_held_out_images_are_pretrained_on_only_if_asked(tmp_path: Path, transductive: bool) -> None:
    protocol = replace(PROTOCOL, transductive=transductive)
    grid = Grid(tmp_path, protocol, draw_cases(protocol, HELD_OUT, POOL, ALL), [Arm(SCRATCH)])
    assert set(grid.pretraining_cases) == {*POOL, *(HELD_OUT if transductive else ())}


def test_a_pretraining_is_done_without_weights_that_nothing_needs(tmp_path: Path) -> None:
    grid = planted(tmp_path, 0.0)
    run = grid.pretraining(grid.arms[1])
    (grid.fold_folder(run) / "checkpoint_final.pth").unlink()
    assert grid.done(run)
    grid.metrics_file(grid.compared(grid.arms[0], 0.01)[0]).unlink()
    assert grid.done(run)
    grid.metrics_file(grid.compared(grid.arms[1], 0.01)[0]).unlink()
    assert not grid.done(run)
    assert next(grid.ready()) == run
