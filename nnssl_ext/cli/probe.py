"""Compare frozen encoders in minutes, under a linear head.

    nnssl_ext probe vf=.../checkpoint_final.pth mae=.../checkpoint_final.pth -d 802 -c 3d_fullres -p PLANS -o PROBE

PLANS are the plans of the checkpoints. An untrained encoder is probed too. The best encoder of a probe need not be the
best after fine-tuning. nnssl_ext study answers that, on another fold than the one of the choice.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from nnssl_ext.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="NAME=FILE", help="pretrained weights and what to call them")
    add("-d", required=True, metavar="DATASET", help="dataset name or ID, planned and preprocessed")
    add("-c", required=True, metavar="CONFIGURATION", help="a 3-D configuration")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="the plans of the weights (nnUNetPlans)")
    add("-o", required=True, metavar="PROBE", help="folder of the probes")
    add("-device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--labels", type=int, default=8, help="labelled cases of each run (8)")
    add("--runs", type=int, default=3, help="runs, each with other cases and another seed (3)")
    add("--steps", type=int, default=300, help="steps of each run (300)")
    add("--rate", type=float, default=0.01, help="AdamW's peak rate (0.01)")
    add("--fold", type=int, default=0, help="the fold whose validation cases are predicted (0)")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="runs at a time on each GPU, or on the CPU (1)")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.environment import check_device, dataset_folder, default_device
    from nnssl_ext.files import replaced_on_success
    from nnssl_ext.recipe import read_json
    from nnssl_ext.study.analysis import Analysis, load_results
    from nnssl_ext.study.arms import arms_of
    from nnssl_ext.study.metrics import tolerance_of
    from nnssl_ext.study.protocol import Protocol
    from nnssl_ext.study.runner import run_grid, slots
    from nnssl_ext.study.study import Study, locked

    folder, device = Path(arguments.o).resolve(), arguments.device
    device = device or default_device()
    check_device(device)
    for name in ("labels", "runs", "steps", "jobs"):
        if (number := getattr(arguments, name)) < 1:
            raise UserError(f"--{name}: expected at least 1, got {number}")
    if not 0 < arguments.rate < math.inf:
        raise UserError(f"--rate: expected a positive number, got {arguments.rate:g}")
    source = dataset_folder(arguments.d)
    dataset = source.name
    protocol = Protocol(
        dataset=dataset,
        configuration=arguments.c,
        plans=arguments.p,
        overlays=["finetune.optimizer=adamw"],
        labels=[arguments.labels],
        subsets=arguments.runs,
        steps=arguments.steps,
        snapshots=[arguments.steps],
        primary_labels=arguments.labels,
        primary_step=arguments.steps,
        rates=[arguments.rate],
        development_runs=1,
        total_baseline=0,
        fold=arguments.fold,
        transductive=False,
        tolerance=tolerance_of(dataset, read_json(source / "dataset.json")),
        seed=arguments.seed,
    )
    study = Study(folder, protocol, arms_of([], arguments.files, 0, option=""), device, finetuner="nnsslTrainer_Probe")
    with locked(folder):
        grid = study.prepare()
        run_grid(grid, slots(device, arguments.jobs))
        results = load_results(grid)
        with replaced_on_success(folder / "results.csv") as temporary:
            results.to_csv(temporary, index=False)
    analysis = Analysis(grid, results)
    print(f"Dice on {len(grid.cases.held_out)} held-out cases, mean and range over {arguments.runs} runs:")
    for arm in grid.arms:
        scores = list(analysis.score(arm.name, arguments.labels, arguments.steps).values())
        name = arm.name if arm.init else "untrained encoder"
        shown = f"{sum(scores) / len(scores):.3f}  {min(scores):.3f} to {max(scores):.3f}" if scores else "failed"
        print(f"  {name:30} {shown}")
    if grid.failed:
        logs = ", ".join(str(log) for log in grid.failed.values())
        raise UserError(f"{len(grid.failed)} runs failed. Their logs: {logs}")
