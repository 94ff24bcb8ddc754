"""Does pretraining pay on a data set? Fine-tuning with and without it, at several label budgets, over paired runs.

    nnssl_ext study -d 802 -c 3d_fullres --methods scratch MaskedAutoencoder VolumeFusion \\
        --labels 1 2 4 8 24 all --subsets 8 --steps 600 --snapshots 75 150 300 600 -o STUDY

A fold's validation cases are held out; methods pretrain on the others, whose labels are then taken in nested subsets.
The report is STUDY/report.html. Called again, it goes on where it stopped; more methods may be added. With --msd it
runs for tasks of the Decathlon, each in a folder of its own, and says before it starts what that will cost.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_ext.errors import UserError

if TYPE_CHECKING:
    from nnssl_ext.study.protocol import Protocol
    from nnssl_ext.study.study import Study

#: Budgets of labelled cases, as far as there are more cases than that; all of them come on top.
BUDGETS = (1, 2, 4, 8, 24)
#: Steps at which held-out cases are predicted, as far as the fine-tuning goes; its end comes on top.
SNAPSHOTS = (75, 150, 300)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("-d", metavar="DATASET", help="dataset name or ID, planned and preprocessed")
    data.add_argument("--msd", nargs="+", metavar="TASK", help="tasks of the Decathlon, planned and preprocessed")
    add("-c", required=True, metavar="CONFIGURATION", help="a 3-D configuration")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans to start from (nnUNetPlans)")
    add("-o", required=True, metavar="STUDY", help="folder of the study; all of it goes there")
    add("-device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--methods", nargs="+", default=["scratch"], metavar="METHOD", help="trainers without nnsslTrainer_")
    add("--init", nargs="+", default=[], metavar="NAME=FILE", help="pretrained weights from elsewhere, as arms")
    add("--labels", nargs="+", metavar="N", help="labelled cases, or all (1 2 4 8 24 as far as there are more, all)")
    add("--subsets", type=int, default=8, help="paired runs per budget (8); below 6 no interval exists")
    add("--steps", type=int, default=600, help="fine-tuning steps of every arm (600)")
    add("--snapshots", nargs="+", type=int, help="steps at which cases are predicted (75 150 300, as far as they go)")
    add("--primary-labels", type=int, metavar="N", help="the endpoint's budget (2, or the smallest)")
    add("--primary-step", type=int, metavar="N", help="the endpoint's step (300, or the last)")
    add("--rates", nargs="+", type=float, metavar="RATE", help="fine-tuning rates to choose from on development cases")
    add("--development-runs", type=int, default=2, help="runs per arm and rate for that (2)")
    add("--total-baseline", type=int, metavar="N", help="paired runs of scratch with equal total steps (all subsets)")
    add("--fold", type=int, default=0, help="the fold whose validation cases are held out (0)")
    add("--transductive", action="store_true", help="pretraining sees the held-out images; the report says so")
    add("--tolerance", type=float, metavar="MM", help="of the surface Dice (the Decathlon's for its tasks, else 2)")
    add("--seed", type=int, default=0, help="of all random draws (0)")
    add("--jobs", type=int, default=1, help="runs at a time on each GPU, or on the CPU (1)")
    add("--keep-checkpoints", action="store_true", help="keep the fine-tunings' checkpoints")
    add("--estimate", action="store_true", help="say what it will cost and stop")
    add("--report-only", action="store_true", help="write the report of the runs that are done and stop")
    add("overlays", nargs="*", metavar="RECIPE|SETTING=VALUE", help="laid over the plans, as in nnssl_ext plan")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from nnssl_ext.study.decathlon.tasks import find_task

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device was found; use -device cpu")
    if arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {arguments.jobs}")
    folder = Path(arguments.o).resolve()
    if not arguments.msd:
        studies = [study_of(arguments, folder, device)]
    else:
        studies = []
        for task in [find_task(word) for word in arguments.msd]:
            own = argparse.Namespace(**{**vars(arguments), "d": task.dataset})
            studies.append(study_of(own, folder / task.folder, device))
    if arguments.estimate or (arguments.msd and not arguments.report_only):
        _estimate(studies)
    failures = [] if arguments.estimate else [text for study in studies if (text := _run(study, arguments))]
    if failures:
        raise UserError("; ".join(failures))


def study_of(arguments: argparse.Namespace, folder: Path, device: str) -> Study:
    """The study that the command line's words define, of data set ``arguments.d``."""
    from nnssl_ext.environment import dataset_folder
    from nnssl_ext.study.arms import arms_of
    from nnssl_ext.study.study import Study

    protocol = protocol_of(arguments, dataset_folder(arguments.d).name)
    arms = arms_of(arguments.methods, arguments.init, protocol.total_baseline)
    return Study(folder, protocol, arms, device, arguments.keep_checkpoints)


def _estimate(studies: list[Study]) -> None:
    """Print what each study will cost, and all of them; everything is checked by then."""
    from nnssl_ext.study.estimate import estimate
    from nnssl_ext.study.study import locked

    hours = 0.0
    for study in studies:
        with locked(study.folder):
            cost = estimate(study.prepare(keep=False))
        hours += cost.hours
        print(f"{study.protocol.dataset}: {cost}", flush=True)
    print(f"together: about {hours:.2g} h", flush=True)


def _run(study: Study, arguments: argparse.Namespace) -> str:
    """Run one study and print its answers; returns which runs failed."""
    from nnssl_ext.study.analysis import Analysis, load_results
    from nnssl_ext.study.report import write_report
    from nnssl_ext.study.runner import run_grid, slots
    from nnssl_ext.study.study import locked

    # a report may be wanted while the study runs in another process
    beside = arguments.report_only and (study.folder / "study.json").is_file()
    with nullcontext() if beside else locked(study.folder):
        grid = study.prepare(keep=not beside)
        if not arguments.report_only:
            run_grid(grid, slots(study.device, arguments.jobs))
        report = write_report(grid)
    analysis = Analysis(grid, load_results(grid))
    for arm in analysis.tested_arms:
        print(analysis.answer(arm))
    print(f"the report: {report}", flush=True)
    failures = grid.failures()
    if not failures:
        return ""
    logs = ", ".join(str(log) for log in failures.values())
    return f"{len(failures)} runs failed and are missing from the report; their logs: {logs}"


def protocol_of(arguments: argparse.Namespace, dataset: str) -> Protocol:
    """The protocol that the command line's words define.

    Raises:
        UserError: For numbers that make no study.
    """
    from nnssl_ext.environment import dataset_folder
    from nnssl_ext.study.metrics import tolerance_of
    from nnssl_ext.study.protocol import Protocol
    from nnssl_ext.study.study import optimiser_of, pool_size

    everything = pool_size(arguments.d, arguments.p, arguments.c, arguments.fold)
    words = arguments.labels or [*(str(n) for n in BUDGETS if n < everything), "all"]
    labels = sorted({everything if word == "all" else _positive("--labels", word) for word in words})
    asked = arguments.snapshots or [step for step in SNAPSHOTS if step < arguments.steps]
    snapshots = sorted({*asked, arguments.steps})
    if arguments.subsets < 1 or arguments.steps < 1 or arguments.development_runs < 1 or arguments.seed < 0:
        raise UserError("--subsets, --steps and --development-runs must be at least 1, --seed at least 0")
    if snapshots[0] < 1 or snapshots[-1] > arguments.steps:
        raise UserError(f"--snapshots {snapshots} must lie between 1 and --steps {arguments.steps}")
    primary_labels = arguments.primary_labels or (2 if 2 in labels else labels[0])
    primary_step = arguments.primary_step or (300 if 300 in snapshots else snapshots[-1])
    if primary_labels not in labels or primary_step not in snapshots:
        raise UserError(
            f"the endpoint, {primary_labels} labels at step {primary_step}, must be among --labels {labels} and "
            f"--snapshots {snapshots}"
        )
    rates = arguments.rates
    if not rates:
        optimiser = optimiser_of(dataset_folder(dataset), arguments.p, arguments.c, arguments.overlays)
        rates = [3e-4, 1e-3, 3e-3] if optimiser == "adamw" else [1e-3, 3e-3, 1e-2]
    if min(rates) <= 0:
        raise UserError(f"--rates must be positive, got {rates}")
    total = arguments.subsets if arguments.total_baseline is None else arguments.total_baseline
    return Protocol(
        dataset=dataset,
        configuration=arguments.c,
        plans=arguments.p,
        overlays=list(arguments.overlays),
        labels=labels,
        subsets=arguments.subsets,
        steps=arguments.steps,
        snapshots=snapshots,
        primary_labels=primary_labels,
        primary_step=primary_step,
        rates=list(rates),
        development_runs=arguments.development_runs,
        total_baseline=min(total, arguments.subsets),
        fold=arguments.fold,
        transductive=arguments.transductive,
        tolerance=tolerance_of(dataset) if arguments.tolerance is None else arguments.tolerance,
        seed=arguments.seed,
    )


def _positive(name: str, word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise UserError(f"{name} takes numbers of at least 1, or all; got '{word}'")
    return int(word)
