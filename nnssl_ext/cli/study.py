"""Study whether pretraining pays on a data set.

    nnssl_ext study -d 802 -c 3d_fullres --methods scratch MaskedAutoencoder VolumeFusion \\
        --labels 1 2 4 8 24 all --subsets 8 --steps 600 --snapshots 75 150 300 600 -o STUDY

The validation cases of a fold are held out. Methods pretrain on the other images. Fine-tunings take nested subsets of
their labels. The report is STUDY/report.html. A second call continues, and may add arms. --msd runs one study for each
task of the Decathlon and prints the estimated cost first.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.errors import UserError

if TYPE_CHECKING:
    from nnssl_ext.study.grid import Grid
    from nnssl_ext.study.protocol import Protocol
    from nnssl_ext.study.study import Study

#: Default label budgets, as far as the data set reaches. All cases come on top.
BUDGETS = (1, 2, 4, 8, 24)
#: Default steps at which held-out cases are predicted. Two thirds and the end come on top.
SNAPSHOTS = (75, 150, 300)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("-d", metavar="DATASET", help="dataset name or ID, planned and preprocessed")
    data.add_argument("--msd", nargs="+", metavar="TASK", help="tasks of the Decathlon, planned and preprocessed")
    add("-c", required=True, metavar="CONFIGURATION", help="a 3-D configuration")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans to start from (nnUNetPlans)")
    add("-o", required=True, metavar="STUDY", help="folder of the study")
    add("-device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu")
    add("--methods", nargs="+", default=["scratch"], metavar="METHOD", help="trainers without nnsslTrainer_")
    add("--init", nargs="+", default=[], metavar="NAME=FILE", help="pretrained weights from elsewhere, as arms")
    add(
        "--finetune",
        nargs="+",
        default=[],
        metavar="NAME=RECIPE[,SETTING=VALUE]",
        help="compare recipes of fine-tuning on the same weights; the name scratch sets that of the baselines",
    )
    add("--pretrain-on", default="", metavar="DATASET", help="corpus to pretrain on; held-out cases are left out of it")
    add(
        "--pretraining-seeds", type=int, default=1, metavar="N", help="pretraining runs per method, a random effect (1)"
    )
    add("--group-by", default="", metavar="REGEX", help="finds the group in a case's name that no split may divide")
    add(
        "--labels", nargs="+", metavar="N", help="budgets of labeled groups, or all (1 2 4 8 24 all, as far as they go)"
    )
    add("--subsets", type=int, default=8, help="paired runs per budget (8); one pretraining needs 6 for an interval")
    add("--steps", type=int, default=600, help="fine-tuning steps of every arm (600)")
    add("--snapshots", nargs="+", type=int, help="steps at which cases are predicted (75 150 300, as far as they go)")
    add("--primary-labels", type=int, metavar="N", help="budget of the endpoint (2, or the smallest)")
    add("--primary-step", type=int, metavar="N", help="step of the endpoint (300, or the last)")
    add("--primary-class", default="", metavar="NAME", help="class of the endpoint (mean over all classes)")
    add("--rates", nargs="+", type=float, metavar="RATE", help="fine-tuning rates to choose from on development cases")
    add("--development-runs", type=int, default=2, help="runs per arm and rate for that choice (2)")
    add("--total-baseline", type=int, metavar="N", help="paired runs of scratch with equal total steps (all subsets)")
    add("--fold", type=int, default=0, help="fold whose validation cases are held out (0)")
    add("--transductive", action="store_true", help="let pretraining see the held-out images; the report says so")
    add("--tolerance", type=float, metavar="MM", help="tolerance of the surface Dice (the Decathlon's, else 2)")
    add("--seed", type=int, default=0, help="seed of all random draws (0)")
    add("--jobs", type=int, metavar="N", help="runs at a time: on each GPU or on the CPU (1), or on the cluster (16)")
    add(
        "--launcher",
        choices=("here", "slurm", "local"),
        default="here",
        help="where runs are started: by this process, as Slurm jobs, or as submitit's local jobs (here)",
    )
    add(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options of the jobs, such as partition=gpu time=600",
    )
    add("--keep-checkpoints", action="store_true", help="keep the checkpoints of fine-tunings")
    add("--estimate", action="store_true", help="print the estimated cost and stop")
    add("--report-only", action="store_true", help="write the report of the finished runs and stop")
    add("overlays", nargs="*", metavar="RECIPE|SETTING=VALUE", help="laid over the plans, as in nnssl_ext plan")


def run(arguments: argparse.Namespace) -> None:
    from nnssl_ext.environment import check_device, default_device
    from nnssl_ext.study.decathlon.tasks import find_task

    on_slurm = arguments.launcher == "slurm"  # from a machine that need not have a GPU
    device = arguments.device or ("cuda" if on_slurm else default_device())
    if not on_slurm or arguments.estimate:
        check_device(device)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {arguments.jobs}.")
    folder = Path(arguments.o).resolve()
    if not arguments.msd:
        studies = [study_of(arguments, folder, device)]
    else:
        studies = []
        for task in [find_task(word) for word in arguments.msd]:
            own = argparse.Namespace(**{**vars(arguments), "d": task.dataset})
            studies.append(study_of(own, folder / task.folder, device))
    if arguments.estimate or (arguments.msd and not arguments.report_only and not on_slurm):
        _estimate(studies)
    failures = [] if arguments.estimate else [text for study in studies if (text := _run(study, arguments))]
    if failures:
        raise UserError("; ".join(failures))


def study_of(arguments: argparse.Namespace, folder: Path, device: str) -> Study:
    """Build the study of one data set from the options."""
    from nnssl_ext.environment import dataset_folder
    from nnssl_ext.study.arms import arms_of
    from nnssl_ext.study.study import Study, optimizer_of

    protocol = protocol_of(arguments, dataset_folder(arguments.d).name)
    arms = arms_of(arguments.methods, arguments.init, protocol.total_baseline, arguments.finetune)
    if not arguments.rates:
        common = optimizer_of(dataset_folder(protocol.dataset), arguments.p, arguments.c, arguments.overlays)
        for arm in arms:
            own = arm.finetune.get("optimizer", common)
            if own != common and arm.own_rate is None:
                raise UserError(
                    f"--finetune: expected a rate for {own} in the recipe of {arm.name}, got none. The default rates "
                    f"are {common}'s. Add finetune.learning_rate=RATE to the recipe, or give --rates."
                )
    return Study(folder, protocol, arms, device, arguments.keep_checkpoints)


def _estimate(studies: list[Study]) -> None:
    """Print the estimated cost of all studies."""
    from nnssl_ext.study.estimate import estimate
    from nnssl_ext.study.study import locked

    hours = 0.0
    for study in studies:
        with locked(study.folder):
            own, text = estimate(study.prepare(keep=False))
        hours += own
        print(f"{study.protocol.dataset}: {text}", flush=True)
    print(f"all together: about {hours:.2g} h", flush=True)


def _run(study: Study, arguments: argparse.Namespace) -> str:
    """Run one study, print answers, and return failures."""
    from nnssl_ext.study.analysis import Analysis, load_results
    from nnssl_ext.study.report import write_report
    from nnssl_ext.study.study import locked

    # a report may be asked for while another process runs the study
    beside = arguments.report_only and (study.folder / "study.json").is_file()
    with nullcontext() if beside else locked(study.folder):
        grid = study.prepare(keep=not beside)
        if not arguments.report_only:
            _run_grid(grid, arguments)
        report = write_report(grid)
    analysis = Analysis(grid, load_results(grid))
    for arm in analysis.tested_arms:
        print(analysis.answer(arm))
    print(f"the report: {report}", flush=True)
    failures = grid.failures()
    if not failures:
        return ""
    logs = ", ".join(str(log) for log in failures.values())
    return f"{len(failures)} runs failed and are missing from the report. Their logs: {logs}"


def _run_grid(grid: Grid, arguments: argparse.Namespace) -> None:
    """Do every unfinished run, here or on a cluster."""
    if arguments.launcher == "here":
        from nnssl_ext.study.runner import run_grid, slots

        return run_grid(grid, slots(grid.device, arguments.jobs or 1))
    from nnssl_ext.study.cluster import JOBS, POLL_SECONDS, executor_of, run_on_cluster

    jobs = arguments.jobs or JOBS
    executor = executor_of(grid.folder / "cluster", arguments.launcher, grid.device, jobs, arguments.slurm)
    return run_on_cluster(grid, executor, jobs, POLL_SECONDS[arguments.launcher])


def protocol_of(arguments: argparse.Namespace, dataset: str) -> Protocol:
    """Build the protocol from the command line.

    Raises:
        UserError: For numbers that make no study.
    """
    from nnssl_ext.environment import dataset_folder
    from nnssl_ext.recipe import read_json
    from nnssl_ext.study.inputs import pool_size
    from nnssl_ext.study.metrics import tolerance_of
    from nnssl_ext.study.protocol import Protocol
    from nnssl_ext.study.study import optimizer_of

    everything = pool_size(arguments.d, arguments.p, arguments.c, arguments.fold, arguments.group_by)
    words = arguments.labels or [*(str(n) for n in BUDGETS if n < everything), "all"]
    labels = sorted({everything if word == "all" else _positive("--labels", word) for word in words})
    for name in ("subsets", "steps", "development_runs", "pretraining_seeds"):
        _positive(f"--{name.replace('_', '-')}", str(getattr(arguments, name)))
    if arguments.transductive and arguments.pretrain_on:
        raise UserError("--transductive and --pretrain-on: a corpus has no held-out cases. Give one of the two.")
    if arguments.slurm and arguments.launcher != "slurm":
        raise UserError(f"--slurm needs --launcher slurm, got --launcher {arguments.launcher}.")
    if arguments.seed < 0:
        raise UserError(f"--seed: expected at least 0, got {arguments.seed}.")
    total = arguments.subsets if arguments.total_baseline is None else min(arguments.total_baseline, arguments.subsets)
    if total < 0:
        raise UserError(f"--total-baseline: expected at least 0, got {total}.")
    for name, pairs in (("--subsets", arguments.subsets), ("--total-baseline", total)):
        if pairs % arguments.pretraining_seeds:
            raise UserError(
                f"--pretraining-seeds {arguments.pretraining_seeds}: expected a divisor of {name} {pairs}, so that "
                f"each pretraining run has equally many pairs."
            )
    two_thirds = round(2 * arguments.steps / 3)  # shows whether scratch still rises
    usual = [*(step for step in SNAPSHOTS if step < arguments.steps), max(1, two_thirds)]
    asked = usual if arguments.snapshots is None else arguments.snapshots
    snapshots = sorted({*asked, arguments.steps})
    if snapshots[0] < 1 or snapshots[-1] > arguments.steps:
        raise UserError(f"--snapshots: expected steps between 1 and --steps {arguments.steps}, got {snapshots}.")
    primary_labels, primary_step = arguments.primary_labels, arguments.primary_step
    if primary_labels is None:
        primary_labels = 2 if 2 in labels else labels[0]
    if primary_step is None:
        primary_step = 300 if 300 in snapshots else snapshots[-1]
    if primary_labels not in labels or primary_step not in snapshots:
        raise UserError(
            f"The endpoint, {primary_labels} labels at step {primary_step}, must be among --labels {labels} and "
            f"--snapshots {snapshots}."
        )
    rates = arguments.rates
    if not rates:
        optimizer = optimizer_of(dataset_folder(dataset), arguments.p, arguments.c, arguments.overlays)
        rates = [3e-4, 1e-3, 3e-3] if optimizer == "adamw" else [1e-3, 3e-3, 1e-2]
    if not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"--rates: expected positive numbers, got {rates}.")
    tolerance = arguments.tolerance
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"--tolerance: expected millimeters of at least 0, got {tolerance}.")
    if tolerance is None:
        labels_of = None if arguments.msd else read_json(dataset_folder(dataset) / "dataset.json")
        tolerance = tolerance_of(dataset, labels_of)
    same = ("subsets", "steps", "development_runs", "fold", "transductive", "seed", "primary_class")
    return Protocol(
        **{name: getattr(arguments, name) for name in (*same, "pretraining_seeds", "group_by")},
        dataset=dataset,
        configuration=arguments.c,
        plans=arguments.p,
        overlays=list(arguments.overlays),
        labels=labels,
        snapshots=snapshots,
        primary_labels=primary_labels,
        primary_step=primary_step,
        rates=list(dict.fromkeys(rates)),
        total_baseline=total,
        tolerance=tolerance,
        pretrain_on=dataset_folder(arguments.pretrain_on).name if arguments.pretrain_on else "",
    )


def _positive(name: str, word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise UserError(f"{name}: expected a number of at least 1, got '{word}'.")
    return int(word)
