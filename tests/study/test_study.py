"""The study through its command: real trainings, killed at random.

``STUDY_KILLS`` sets how often (``make soak`` takes ten).
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json
from nnssl_ext.study.grid import Grid, Run
from nnssl_ext.study.protocol import SCRATCH, TOTAL
from nnssl_ext.study.study import Study
from tests.conftest import Environment

Data = Callable[[str], Environment]
WORDS = ["study", "-d", "817", "-c", "3d_fullres", "-device", "cpu", "--methods", "scratch", "VolumeFusion"]
WORDS += ["--labels", "2", "--subsets", "2", "--steps", "4", "--snapshots", "2", "--total-baseline", "1"]
WORDS += ["epochs=1", "iterations_per_epoch=2", "validation_iterations=1", "finetune.steps_per_epoch=2"]
RATE = ["--rates", "0.01"]
KILLS = int(os.environ.get("STUDY_KILLS", "2"))


def comparable(study: Path) -> tuple[str, str]:
    """All numbers of a study, and its report without what a clock says."""
    text = re.sub(r"## Cost.*?(?=\n## )", "", (study / "report.md").read_text(), flags=re.DOTALL)
    return (study / "results.csv").read_text(), text.replace(study.name, "STUDY")


def call(environment: Environment, study: str) -> subprocess.Popen[str]:
    small = [] if KILLS > 2 else ["--subsets", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "nnssl_ext", *WORDS, *RATE, *small, "-o", study],
        cwd=environment.root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], seconds: float = 600) -> None:
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out


@pytest.mark.slow
def test_killed_at_random_points_the_report_is_the_same(with_data: Data) -> None:
    environment = with_data("labelled")
    before = {path: path.stat().st_mtime_ns for path in environment.dataset("labelled").rglob("*")}
    began = time.monotonic()
    finish(call(environment, "whole"))
    lasts = time.monotonic() - began

    generator, broken, hits = random.Random(0), ["broken_0"], 0
    while hits < KILLS:
        process = call(environment, broken[-1])
        try:
            finish(process, generator.uniform(1, 0.6 * lasts))
            broken.append(f"broken_{len(broken)}")  # it was done before: the next kill is another study's
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            hits += 1
    for study in broken:
        finish(call(environment, study))
        assert comparable(environment.root / study) == comparable(environment.root / "whole")

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
    command = Grid.command

    def failing(grid: Grid, run: Run) -> list[str]:
        """Fail every fine-tuning of the pretrained weights."""
        return [sys.executable, "-c", "raise SystemExit(3)"] if run.arm.method and run.labels else command(grid, run)

    monkeypatch.setattr(Grid, "command", failing)
    study = [*WORDS, "--total-baseline", "0", *RATE, "-o", "st"]
    with pytest.raises(UserError, match="2 runs failed and are missing .* logs: .*labels_2_subset_0.txt"):
        main(study)
    results = pd.read_csv(environment.root / "st" / "results.csv")
    assert set(results["arm"]) == {SCRATCH}
    text = (environment.root / "st" / "report.md").read_text()
    assert "Failed: VolumeFusion labels_2_subset_0" in text
    assert "| VolumeFusion |  |  |  | not measured |" in text
    # a later call that runs nothing knows it still
    with pytest.raises(UserError, match="2 runs failed and are missing"):
        main([*study, "--report-only"])
    assert "Failed: VolumeFusion labels_2_subset_0" in (environment.root / "st" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "VolumeFussion"], "unknown method 'VolumeFussion'. Known: scratch, VolumeFusion"),
        (["--labels", "0"], "--labels: expected a number of at least 1, got '0'"),
        (["--labels", "2", "100"], "Budgets .* do not fit"),
        (["--primary-labels", "3"], "The endpoint, 3 labels"),
        (["--primary-labels", "0"], "The endpoint, 0 labels"),
        (["--primary-step", "0"], "The endpoint, .* at step 0"),
        (["--snapshots", "9"], r"expected steps between 1 and --steps 4"),
        (["--init", "x=missing.pth"], "expected NAME=FILE"),
        (["--fold", "7"], "expected 0 to 4"),
        (["--fold", "-1"], "expected 0 to 4"),
        (["-p", "nothing"], "has no plans 'nothing'"),
        (["-c", "3d_half"], "no configuration '3d_half'"),
        (["--pretraining-seeds", "3"], "expected a divisor of --subsets 2"),
        (["--primary-class", "liver"], "--primary-class: expected one of"),
        (["--primary-class", "background"], "--primary-class: expected one of (?!background)"),
        (["--rates", "nan"], r"--rates: expected positive numbers, got \[nan\]"),
        (["--tolerance", "-1"], "--tolerance: expected millimeters of at least 0, got -1.0"),
        (["--finetune", "total=finetune_stock"], "expected a name other than total"),
        (["--transductive", "--pretrain-on", "817"], "a corpus has no held-out cases"),
        (["--slurm", "partition=gpu"], "--slurm needs --launcher slurm, got --launcher here"),
        (["--group-by", "z+"], r"got none of 'z\+' in"),
        (["--pretrain-on", "777"], "777"),
        (["--finetune", "x=nothing"], "unknown recipe"),
        (["--jobs", "0"], "--jobs: expected at least 1"),
        (["--total-baseline", "-1"], "--total-baseline: expected at least 0, got -1"),
        (["--pretraining-seeds", "2"], "expected a divisor of --total-baseline 1"),
        (["--pretrain-on", "817"], "--pretrain-on .*: expected another data set than Dataset817"),
        (
            ["--labels", "all"],
            r"choose the rate, so the endpoint's \d+ do not fit. Give smaller --primary-labels, or one",
        ),
        (["--finetune", "a=finetune.optimizer=adamw"], r"expected a rate for adamw in the recipe of VolumeFusion\+a"),
        (["--group-by", r"no(\d+)|."], "Put all alternatives into one"),
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


def test_settings_are_checked_against_the_studys_own_steps(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    with pytest.raises(UserError, match="finetune.warmup=4 leaves none of 4 steps"):
        main([*WORDS, "finetune.warmup=4", "-o", "st"])
    with pytest.raises(UserError, match="seed belongs to the study. Use --seed"):
        main([*WORDS, "seed=1", "-o", "st"])
    with pytest.raises(UserError, match="max_time would end runs early"):
        main([*WORDS, "max_time=1", "-o", "st"])
    with pytest.raises(UserError, match="start_from: a study's pretraining starts from random weights"):
        main([*WORDS, "start_from=weights.pth", "-o", "st"])
    # where nothing is pretrained it does not matter
    without = [word for word in WORDS if word != "VolumeFusion"]
    main([*without, "start_from=weights.pth", "--report-only", "-o", "st"])


def test_cascades_are_left_to_nnunet(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that had a next stage would be predicted for it by stock, with mirroring."""
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    file = environment.dataset("labelled") / "nnUNetPlans.json"
    plans = read_json(file)
    plans["configurations"]["3d_fullres"]["next_stage"] = "3d_cascade_fullres"
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_fullres", "next_stage": None}
    plans["configurations"]["3d_cascade_fullres"] = cascade
    write_json(plans, file)
    with pytest.raises(UserError, match="'3d_cascade_fullres' is a cascade stage"):
        main([*["3d_cascade_fullres" if word == "3d_fullres" else word for word in WORDS], *RATE, "-o", "st"])
    main([*WORDS, "--report-only", "-o", "st"])
    for plans_file in (environment.root / "st").rglob("nnUNetPlans_study*.json"):
        assert read_json(plans_file)["configurations"]["3d_fullres"]["next_stage"] is None
    assert [*(environment.root / "st").rglob("nnUNetPlans_study.json")]


def test_the_class_of_the_endpoint_is_held_out(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    file = environment.dataset("labelled") / "dataset.json"
    content = read_json(file)
    write_json({**content, "labels": {**content["labels"], "never": len(content["labels"])}}, file)
    place = WORDS.index("epochs=1")
    with pytest.raises(UserError, match="--primary-class never: expected it in a held-out case of .* found it in none"):
        main([*WORDS[:place], "--primary-class", "never", "-o", "st", *WORDS[place:]])
    name = next(name for name in content["labels"] if name != "background")
    for folder, value in (("st", [content["labels"][name]]), ("text", str(content["labels"][name]))):
        write_json({**content, "labels": {**content["labels"], name: value}}, file)
        main([*WORDS[:place], *RATE, "--primary-class", name, "-o", folder, "--report-only", *WORDS[place:]])


def test_weights_that_do_not_fit_are_named_with_plans_that_the_user_has(
    with_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    torch.save({"network_weights": {}}, "w.pth")
    words = [word for word in WORDS if word != "VolumeFusion"]
    place = words.index("epochs=1")
    study = [*words[:place], *RATE, "--init", "x=w.pth", "-o", "st", *words[place:]]
    with pytest.raises(UserError) as error:
        main(study)
    advice = shlex.split(str(error.value).partition("Fit it with ")[2])
    file = str(environment.root / "w.pth")
    words = [
        "nnssl_ext",
        "transfer",
        file,
        "-d",
        "817",
        "-c",
        "3d_fullres",
        "-tr",
        "nnsslTrainer_Finetune",
        "-o",
        "FILE",
    ]
    assert advice == words
    narrow = "architecture.arch_kwargs.features_per_stage=[2,4,8]"
    with pytest.raises(UserError, match=r"-p nnUNetPlans_study .* its plans: nnssl_ext plan -d .*features_per_stage"):
        main([*study, narrow])


def test_a_rate_that_is_given_twice_counts_once(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    place = WORDS.index("epochs=1")
    main([*WORDS[:place], "--rates", "0.01", "0.003", "1e-2", "-o", "st", "--report-only", *WORDS[place:]])
    assert read_json(environment.root / "st" / "study.json")["rates"] == [0.01, 0.003]


def test_a_folder_that_cannot_be_made_is_one_line(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    Path("file").touch()
    with pytest.raises(UserError, match="expected a folder that can be written for the study in .*file/st"):
        main([*WORDS, *RATE, "--report-only", "-o", "file/st"])


def test_slurm_takes_gpus_that_this_machine_does_not_have(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    devices = []

    def note_device(study: Study, _: object) -> str:
        devices.append(study.device)
        return ""

    monkeypatch.setattr("nnssl_ext.cli.study._run", note_device)
    place = WORDS.index("-device")
    main([*WORDS[:place], *WORDS[place + 2 :], "--launcher", "slurm", "-o", "st"])
    assert devices == ["cuda"]


def test_an_estimate_decides_nothing(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    for labels in ("2", "4"):
        main(
            [
                *WORDS[: WORDS.index("--labels")],
                "--labels",
                labels,
                *WORDS[WORDS.index("--labels") + 2 :],
                "--estimate",
                "-o",
                "st",
            ]
        )
    assert "all together: about" in capsys.readouterr().out
    assert not (environment.root / "st" / "study.json").exists()


def test_what_all_runs_share_may_not_change_between_calls(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    only = [*WORDS, *RATE, "--report-only", "-o", "st"]
    main(only)
    main(only)
    splits = environment.dataset("labelled") / "splits_final.json"
    before = splits.read_bytes() if splits.is_file() else None
    held_out = read_json(environment.root / "st" / "nnUNet_preprocessed" / splits.parent.name / splits.name, list)[-1]
    cases = sorted({*held_out["val"], *(path.stem for path in splits.parent.glob("*3d_fullres/*.pkl"))})
    other = [case for case in cases if case not in held_out["val"]][: len(held_out["val"])]
    try:
        # as many held out, but others
        write_json([{"train": [case for case in cases if case not in other], "val": other}], splits)
        with pytest.raises(UserError, match="was begun with other held-out cases: new runs could not be compared"):
            main(only)
    finally:
        splits.write_bytes(before) if before else splits.unlink()


def test_the_seed_is_the_pretrainings_too_and_the_rates_follow_the_optimiser(
    with_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    main([*WORDS, 'finetune.optimizer="adamw"', "--seed", "3", "--report-only", "-o", "st"])
    (file,) = (environment.root / "st").rglob("nnUNetPlans_study.json")
    assert read_json(file)["nnssl_ext"]["seed"] == 3
    assert read_json(environment.root / "st" / "study.json")["rates"] == [3e-4, 1e-3, 3e-3]
