"""The report of a study: one self-contained HTML file, a Markdown twin, and the table of all numbers."""

from __future__ import annotations

import os
import platform
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from nnssl_ext.environment import cores
from nnssl_ext.files import replaced_on_success
from nnssl_ext.provenance import revision, versions
from nnssl_ext.recipe import read_json
from nnssl_ext.study import pictures
from nnssl_ext.study.analysis import Analysis, Comparison, count, interval, load_results, rounded_p
from nnssl_ext.study.arms import Arm
from nnssl_ext.study.cautions import caution, warnings
from nnssl_ext.study.grid import COMPARISON, PRETRAINING, Grid
from nnssl_ext.study.metrics import read_labels
from nnssl_ext.study.page import Page, Section, Table, render, render_markdown
from nnssl_ext.study.protocol import SCRATCH, TITLES, TOTAL


def write_report(grid: Grid) -> Path:
    """Write report.html, report.md and results.csv of the runs that are done."""
    results = load_results(grid)
    with replaced_on_success(grid.folder / "results.csv") as temporary:
        results.to_csv(temporary, index=False)
    dice, nsd = Analysis(grid, results), Analysis(grid, results, "nsd")
    p = grid.protocol
    page = Page(
        title="Does pretraining pay?",
        subtitle=f"{p.dataset}, {p.configuration}, plans {p.plans}; {count(len(grid.cases.held_out), 'held-out case')}",
        answers=[dice.answer(arm) for arm in dice.tested_arms],
        caution=caution(grid, len(dice.tested_arms)),
        warnings=warnings(grid),
        sections=[
            *_sections_of_numbers(grid, dice, nsd),
            *_slices(grid, dice),
            _protocol(grid),
            _cost(grid),
            _commands(grid),
        ],
    )
    render_markdown(grid.folder / "report.md", page)
    return render(grid.folder / "report.html", page)


def _sections_of_numbers(grid: Grid, dice: Analysis, nsd: Analysis) -> list[Section]:
    p, arms = grid.protocol, dice.tested_arms
    budgets = p.labels
    against = [SCRATCH, *(a.name for a in arms if a.method == "masked_autoencoder")]
    rows = [
        comparison_row(c)
        for base in against
        for arm in arms
        if arm.name != base
        for c in dice.compare(arm.name, base, budgets, p.primary_step)
    ]
    rows += [comparison_row(c) for arm in arms if (c := dice.primary(arm.name, TOTAL))]
    head = ["arm", "against", "labels", "steps", "arm's Dice", "other's", "difference (points) [95 %]", "p", "p, Holm"]
    head.append("p over cases")
    saved = []
    for arm in arms:
        saved += [
            [
                arm.name,
                dice.saving(arm.name),
                str(budget),
                str(p.steps),
                str(dice.reached(arm.name, budget) or "not reached"),
            ]
            for budget in budgets
            if dice.score(arm.name, budget, p.steps) and dice.score(SCRATCH, budget, p.steps)
        ]
    saved.append([TITLES[SCRATCH], dice.saving(SCRATCH), "", "", ""])
    surface = [comparison_row(c) for arm in arms for c in nsd.compare(arm.name, SCRATCH, budgets, p.primary_step)]
    names = [arm.name for arm in grid.arms]
    return [
        Section(
            "Dice, with and without pretraining",
            ["p over cases: Wilcoxon over held-out cases, given these networks: it says nothing about other runs."],
            Table(head, rows),
            [
                pictures.with_intervals(
                    f"After {p.primary_step} steps",
                    "labelled cases",
                    {name: {n: list(dice.score(name, n, p.primary_step).values()) for n in budgets} for name in names},
                ),
                pictures.with_intervals(
                    f"At {count(p.primary_labels, 'label')}",
                    "fine-tuning steps",
                    {name: dice.curve(name, p.primary_labels) for name in names},
                ),
            ],
        ),
        Section(
            "Labels and steps saved",
            [
                "Labels: the smallest budget whose lower limit against scratch with all cases lies above -0.5 points. "
                "Scratch's own row says how many labels are more than training for so long makes use of, which no "
                "pretraining has saved. Steps: the first snapshot at which the arm's mean is scratch's at the end of "
                "the same budget."
            ],
            Table(["arm", "labels saved", "labels", "scratch's steps", "arm's steps"], saved),
        ),
        Section(
            f"Normalised surface Dice at {p.tolerance:g} mm", table=Table([*head[:4], "arm's", *head[5:]], surface)
        ),
        Section("Per class", table=_per_class(grid, dice)),
        Section(
            "Every run",
            [f"Dice after {p.primary_step} steps; of equal total steps, after {grid.total_steps()}."],
            _every_run(grid, dice),
        ),
    ]


def comparison_row(c: Comparison) -> list[str]:
    """The runs of one comparison."""
    return [
        c.arm,
        TITLES.get(c.against, c.against),
        str(c.labels),
        str(c.step),
        f"{c.arm_mean:.3f}",
        f"{c.against_mean:.3f}",
        f"{100 * c.effect.mean:+.1f} {interval(c.effect)}, n = {c.effect.pairs}",
        *map(rounded_p, (c.effect.p, c.adjusted, c.cases)),
    ]


def _per_class(grid: Grid, dice: Analysis) -> Table:
    p, frame = grid.protocol, dice.results
    names = [arm.name for arm in grid.arms if arm.name != TOTAL]
    frame = frame[(frame.labels == p.primary_labels) & (frame.step == p.primary_step)]
    shared = set.intersection(*(set(runs) for _, runs in frame.groupby("arm")["subset"])) if len(frame) else set()
    frame = frame[frame.subset.isin(shared)]
    means = frame.groupby(["organ", "arm"], sort=False)["dice"].mean() if len(frame) else pd.Series(dtype=float)
    rows = [
        [str(organ), *(f"{means[organ, name]:.3f}" if (organ, name) in means.index else "" for name in names)]
        for organ in dict.fromkeys(frame["organ"])
    ]
    return Table([f"class, {count(p.primary_labels, 'label')}, {p.primary_step} steps", *names], rows)


def _every_run(grid: Grid, dice: Analysis) -> Table:
    """The numbers under the tests: a paired run a row, an arm a column."""
    p, rows = grid.protocol, []
    for labels in p.labels:
        scores = [
            dice.score(arm.name, labels, grid.total_steps() if arm.name == TOTAL else p.primary_step)
            for arm in grid.arms
        ]
        rows += [
            [str(labels), str(subset), *(f"{own[subset]:.4f}" if subset in own else "" for own in scores)]
            for subset in sorted(set().union(*scores))
        ]
    return Table(["labels", "pair", *(arm.title for arm in grid.arms)], rows)


def _slices(grid: Grid, dice: Analysis) -> list[Section]:
    """The best, median and worst held-out case of the first tested arm's first run, with the outlines of all arms."""
    p = grid.protocol
    shown = [
        arm for arm in grid.arms if arm.name != TOTAL and 0 in dice.score(arm.name, p.primary_labels, p.primary_step)
    ]
    shown = [arm for arm in shown if _prediction_folder(grid, arm).is_dir()]  # they may have been cleared away
    if len(shown) < 2:
        return []
    frame = dice.results
    frame = frame[(frame.labels == p.primary_labels) & (frame.step == p.primary_step) & (frame.subset == 0)]
    order = frame[frame.arm == shown[1].name].groupby("case")["dice"].mean().sort_values(ascending=False)
    overlays, seen = [], 0
    for title, place in {"best": 0, "median": len(order) // 2, "worst": len(order) - 1}.items():
        case = str(order.index[place])
        folders = {"truth": grid.preprocessed / "gt_segmentations"}
        folders |= {arm.name: _prediction_folder(grid, arm) for arm in shown}
        outlines = {name: read_labels(folder / case, grid.reader)[0] for name, folder in folders.items()}
        image = _image(grid, case)
        seen += image is not None
        image = np.zeros(outlines["truth"].shape, np.float32) if image is None else image
        overlays.append(pictures.Overlay(f"{title}: {case.split('.')[0]} ({order.iloc[place]:.2f})", image, outlines))
    text = f"By {shown[1].name}'s Dice, first label subset, {count(p.primary_labels, 'label')}, {p.primary_step} steps."
    text += "" if seen else " The images are not drawn: they were not found in nnUNet_raw."
    return [Section("Held-out cases", [text], images=[pictures.slices(overlays)])]


def _prediction_folder(grid: Grid, arm: Arm) -> Path:
    p = grid.protocol
    run = next(c for c in grid.compared(arm, grid.rate(arm)) if c.labels == p.primary_labels and c.subset == 0)
    step = "validation" if p.primary_step == grid.last_step(run) else f"validation_step_{p.primary_step:06d}"
    return grid.fold_folder(run) / step


def _image(grid: Grid, case: str) -> np.ndarray | None:
    """The raw image behind a held-out case, where nnUNet_raw is at hand."""
    ending = read_json(grid.preprocessed / "dataset.json")["file_ending"]
    name = case.removesuffix(ending)
    raw = Path(os.environ.get("nnUNet_raw", "")) / grid.protocol.dataset / "imagesTr" / f"{name}_0000{ending}"
    return grid.reader.read_images([str(raw)])[0][0] if raw.is_file() else None


def _protocol(grid: Grid) -> Section:
    cases, rows = grid.cases, [[name, str(value)] for name, value in asdict(grid.protocol).items()]
    rows += [
        ["cases held out", ", ".join(cases.held_out)],
        ["cases on which rates were chosen", ", ".join(cases.development)],
        ["cases to draw labels from", str(len(cases.labelled))],
        ["cases whose images pretraining sees", str(len(grid.folds[0]["train"]))],
    ]
    rows += [[f"rate of {arm.title}", f"{grid.rate(arm):g}"] for arm in grid.arms if grid.rate_is_known(arm)]
    return Section("Protocol", table=Table(["what", "value"], rows))


def _cost(grid: Grid) -> Section:
    rows, made_by = [], dict[str, None]()
    for arm in grid.arms:
        runs = [run for run in grid.all_runs() if run.arm == arm and run.kind != PRETRAINING and grid.done(run)]
        notes = [read_json(grid.metrics_file(run).with_suffix(".json")) for run in runs]
        seconds = sum(note["seconds"] for note in notes)
        made_by |= dict.fromkeys(_software(note.get("versions", {}), note.get("revision", "")) for note in notes)
        summary = grid.fold_folder(grid.pretraining(arm)) / "pretraining_summary.json" if arm.method else None
        before = read_json(summary) if summary and summary.is_file() else {"steps": 0, "hours": 0.0}
        rows.append(
            [arm.title, str(before["steps"]), f"{before['hours']:.2f}", str(len(runs)), f"{seconds / 3600:.2f}"]
        )
    text = [f"{platform.system()} {platform.machine()}, {cores()} CPU cores, {grid.device}"]
    text += [f"Fine-tunings by {software}" for software in made_by]
    text += [f"This report by {_software(versions(), revision())}"]
    head = ["arm", "pretraining steps", "pretraining hours", "fine-tunings", "their hours"]
    return Section("Cost", text, Table(head, rows))


def _software(numbers: dict[str, str], commit: str) -> str:
    if not numbers:
        return "versions that were not noted"
    return ", ".join([*(f"{name} {number}" for name, number in numbers.items()), *filter(None, [commit])])


def _commands(grid: Grid) -> Section:
    runs = [run for run in grid.all_runs() if run.kind != COMPARISON or grid.rate_is_known(run.arm)]
    lines = [
        _study_command(grid),
        "# which is",
        f"STUDY=.../{grid.folder.name}",
        'export nnUNet_preprocessed="$STUDY/nnUNet_preprocessed" nnUNet_extTrainer="$(nnssl_ext trainers)"',
        *map(grid.shown_command, runs),
    ]
    return Section("Every command", code="\n".join(lines))


def _study_command(grid: Grid) -> str:
    """The command that makes this study, without what does not change its numbers."""
    p = grid.protocol
    words = ["nnssl_ext", "study", "-d", p.dataset, "-c", p.configuration, "-p", p.plans, "-device", grid.device]
    words += ["--methods", SCRATCH, *(arm.name for arm in grid.pretrained_arms())]
    files = [f"{arm.name}=STUDY/init/{arm.name}.pth" for arm in grid.arms if arm.init]
    words += ["--init", *files] if files else []
    words += ["--labels", *map(str, p.labels), "--subsets", str(p.subsets), "--steps", str(p.steps)]
    words += ["--snapshots", *map(str, p.snapshots), "--rates", *(f"{rate:g}" for rate in p.rates)]
    words += ["--primary-labels", str(p.primary_labels), "--primary-step", str(p.primary_step)]
    words += ["--development-runs", str(p.development_runs), "--total-baseline", str(p.total_baseline)]
    words += ["--fold", str(p.fold), "--tolerance", f"{p.tolerance:g}", "--seed", str(p.seed)]
    words += ["--transductive"] if p.transductive else []
    return shlex.join([*words, "-o", "STUDY", *p.overlays])
