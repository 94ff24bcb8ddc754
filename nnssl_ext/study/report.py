"""Write a study's report and its table of numbers."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nnssl_ext.environment import cores
from nnssl_ext.files import replaced_on_success
from nnssl_ext.provenance import revision, versions
from nnssl_ext.recipe import read_json
from nnssl_ext.study import pictures
from nnssl_ext.study.analysis import Analysis, Comparison, count, interval, load_results, rounded_p
from nnssl_ext.study.arms import Arm
from nnssl_ext.study.cautions import notes, warnings
from nnssl_ext.study.grid import COMPARISON, PRETRAINING, Grid
from nnssl_ext.study.metrics import read_labels
from nnssl_ext.study.page import Page, Picture, Section, Table, render, render_markdown
from nnssl_ext.study.protocol import SCRATCH, TITLES, TOTAL


def write_report(grid: Grid) -> Path:
    """Write report.html, report.md and results.csv of the finished runs."""
    results = load_results(grid)
    with replaced_on_success(grid.folder / "results.csv") as temporary:
        results.to_csv(temporary, index=False)
    dice, nsd = Analysis(grid, results), Analysis(grid, results, "nsd")
    p = grid.protocol
    page = Page(
        title="Does pretraining pay?",
        subtitle=f"{p.dataset}, {p.configuration}, {p.plans}. {count(len(grid.cases.held_out), 'held-out case')}. "
        f"Endpoint: {dice.endpoint}.",
        summary=_summary(grid, dice),
        plots=_forest(grid, dice),
        notes=notes(dice),
        warnings=warnings(dice),
        sections=[
            *_curves(grid, dice),
            *_held_out_cases(grid, dice),
            _per_class(grid, dice),
            _comparisons(grid, dice),
            _savings(grid, dice),
            _surface(grid, nsd),
            _every_run(grid, dice),
            _protocol(grid),
            _cost(grid),
            _commands(grid),
        ],
    )
    render_markdown(grid.folder / "report.md", page)
    return render(grid.folder / "report.html", page)


def _summary(grid: Grid, dice: Analysis) -> Table:
    """Show each arm at the endpoint in one row."""
    p, rows = grid.protocol, []
    head = ["arm", "Dice", "difference to scratch, points [95 %]", "p", "result"]
    head += ["labels saved"] if len(p.labels) > 1 else []
    head += ["difference to scratch of equal total steps"] if grid.has_total else []
    baseline = list(dice.score(SCRATCH, p.primary_labels, p.primary_step).values())
    rows.append([SCRATCH, f"{np.mean(baseline):.3f}" if baseline else "", "", "", ""])
    for arm in dice.tested_arms:
        row = [arm.name, "", "", "", dice.verdict(arm.name)]
        if found := dice.primary(arm.name):
            e = found.effect
            row[1:4] = [f"{found.arm_mean:.3f}", f"{100 * e.mean:+.1f} {interval(e)}", rounded_p(e.p)]
        rows.append(row)
    for row in rows if len(p.labels) > 1 else []:
        row.append(dice.saving(row[0]))
    for arm, row in zip(dice.tested_arms, rows[1:], strict=True) if grid.has_total else []:
        total = dice.against_total(arm)
        unknown = "not measured" if arm.method else "its steps are not known"
        row.append(dice.total_text(total) if total else unknown)
    for row in rows:
        row += [""] * (len(head) - len(row))
    return Table(head, rows)


def _forest(grid: Grid, dice: Analysis) -> list[Picture]:
    """Draw the differences to scratch."""
    p = grid.protocol
    rows = []
    for arm in dice.tested_arms:
        for c in dice.compare(arm.name, SCRATCH, p.labels, p.primary_step):
            rows.append((arm.name if len(p.labels) == 1 else f"{arm.name}, {count(c.labels, 'label')}", c.effect))
    plots = []
    if rows:
        caption = f"Difference to scratch after {p.primary_step:,} fine-tuning steps"
        plots.append(Picture(pictures.forest(rows), caption))
    totals = [(arm.name, found.effect) for arm in dice.tested_arms if (found := dice.against_total(arm))]
    if grid.has_total and totals:
        caption = f"Difference to scratch of equal total steps, {grid.total_steps():,}"
        plots.append(Picture(pictures.forest(totals), caption))
    return plots


def _curves(grid: Grid, dice: Analysis) -> list[Section]:
    """Draw Dice over budgets and steps."""
    p, names = grid.protocol, [arm.name for arm in grid.arms]
    plots = []
    if len(p.snapshots) > 1:
        lines = {name: dice.curve(name, p.primary_labels) for name in names}
        title = f"Dice over fine-tuning steps, {count(p.primary_labels, 'label')}"
        plots.append(Picture(pictures.with_intervals("fine-tuning steps", lines), title))
    if len(p.labels) > 1:
        budgets = {
            name: {n: list(dice.score(name, n, p.primary_step).values()) for n in p.labels}
            for name in names
            if name != TOTAL
        }
        title = f"Dice over labels, after {p.primary_step:,} steps"
        plots.append(Picture(pictures.with_intervals("labeled cases", budgets), title))
    text = "Lines are means over runs. Bars are 95 % intervals of the mean, or the range of fewer than six runs."
    return [Section("Curves", [text], plots=plots)] if plots else []


def _comparisons(grid: Grid, dice: Analysis) -> Section:
    p, arms = grid.protocol, dice.tested_arms
    against = [SCRATCH, *(arm.name for arm in arms if arm.method == "masked_autoencoder")]
    rows = [
        comparison_row(c)
        for base in against
        for arm in arms
        if arm.name != base
        for c in dice.compare(arm.name, base, p.labels, p.primary_step)
    ]
    rows += [comparison_row(c) for arm in arms if (c := dice.against_total(arm))]
    text = "p over cases is Wilcoxon's over held-out cases. It is about these networks, not about other runs."
    return Section("Every comparison", [text], Table([*HEAD, "p over cases"], rows), folded=True)


#: Columns of a comparison.
HEAD = ["arm", "against", "labels", "steps", "Dice", "other's", "difference, points [95 %]", "p", "p, Holm"]


def _savings(grid: Grid, dice: Analysis) -> Section:
    p, rows = grid.protocol, []
    for arm in dice.tested_arms:
        for budget in p.labels:
            if dice.score(arm.name, budget, p.steps) and dice.score(SCRATCH, budget, p.steps):
                reached = str(dice.reached(arm.name, budget) or "not reached")
                rows.append([arm.name, dice.saving(arm.name), str(budget), str(p.steps), reached])
    rows.append([TITLES[SCRATCH], dice.saving(SCRATCH), "", "", ""])
    text = [
        "Labels: the smallest budget whose lower limit against scratch with all cases lies above -0.5 points. Labels "
        "that scratch saves by this rule are saved by no pretraining.",
        "Steps: the first snapshot at which the arm's mean reaches that of scratch at the end.",
    ]
    head = ["arm", "labels saved", "labels", "steps of scratch", "steps of the arm"]
    return Section("Labels and steps saved", text, Table(head, rows), folded=True)


def _surface(grid: Grid, nsd: Analysis) -> Section:
    p = grid.protocol
    rows = [comparison_row(c) for a in nsd.tested_arms for c in nsd.compare(a.name, SCRATCH, p.labels, p.primary_step)]
    head = [*HEAD[:4], "surface Dice", *HEAD[5:], "p over cases"]
    return Section(f"Normalized surface Dice at {p.tolerance:g} mm", table=Table(head, rows), folded=True)


def comparison_row(c: Comparison) -> list[str]:
    """Format one comparison as a table row."""
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


def _per_class(grid: Grid, dice: Analysis) -> Section:
    p, frame = grid.protocol, dice.results
    names = [arm.name for arm in grid.arms if arm.name != TOTAL]
    frame = frame[(frame.labels == p.primary_labels) & (frame.step == p.primary_step)]
    shared = set.intersection(*(set(runs) for _, runs in frame.groupby("arm")["subset"])) if len(frame) else set()
    frame = frame[frame.subset.isin(shared)]
    # first per run, as the scores are: runs differ in the cases that count
    runs = frame.groupby(["organ", "arm", "subset"], sort=False)["dice"].mean()
    means = runs.groupby(level=["organ", "arm"], sort=False).mean()
    organs = list(dict.fromkeys(frame["organ"]))
    rows = [
        [name, *(f"{means[organ, name]:.3f}" if (organ, name) in means.index else "" for organ in organs)]
        for name in names
    ]
    if len(organs) > len(names):  # a narrow table needs no scrolling
        columns = zip(map(str, organs), *(row[1:] for row in rows), strict=True)
        table = Table(["class", *names], [list(row) for row in columns])
    else:
        table = Table(["arm", *map(str, organs)], rows)
    text = [f"Mean Dice with {count(p.primary_labels, 'label')} after {p.primary_step:,} steps."]
    if frame["dice"].isna().any():
        text.append("A case without a class counts as 0 if the class is predicted, else it is left out, as in nnU-Net.")
    return Section("Per class", text, table)


def _every_run(grid: Grid, dice: Analysis) -> Section:
    """Show a paired run a row, an arm a column."""
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
    table = Table(["labels", "pair", *(arm.title for arm in grid.arms)], rows)
    text = f"Dice after {p.primary_step:,} steps."
    text += f" Of equal total steps: after {grid.total_steps():,}." if grid.has_total else ""
    return Section("Every run", [text], table, folded=True)


def _held_out_cases(grid: Grid, dice: Analysis) -> list[Section]:
    """Show the best, median and worst held-out case."""
    p = grid.protocol
    shown = [
        arm for arm in grid.arms if arm.name != TOTAL and 0 in dice.score(arm.name, p.primary_labels, p.primary_step)
    ]
    shown = [arm for arm in shown if _prediction_folder(grid, arm).is_dir()]  # they may have been deleted
    if len(shown) < 2:
        return []
    frame = dice.results
    frame = frame[(frame.labels == p.primary_labels) & (frame.step == p.primary_step) & (frame.subset == 0)]
    scores = frame.groupby(["arm", "case"])["dice"].mean()
    order = scores[shown[1].name].dropna().sort_values(ascending=False)
    rows, images_found = [], 0
    for title, case in best_median_worst(order.index):
        truth = read_labels(grid.preprocessed / "gt_segmentations" / case, grid.reader)[0]
        image = _image(grid, case)
        images_found += image is not None
        labels = {arm.name: read_labels(_prediction_folder(grid, arm) / case, grid.reader)[0] for arm in shown}
        dices = {arm.name: float(scores.get((arm.name, case), np.nan)) for arm in shown}
        rows.append((f"{title} by {shown[1].name}: {case.split('.')[0]}", case_tiles(image, truth, labels, dices)))
    text = f"First label subset, {count(p.primary_labels, 'label')}, {p.primary_step:,} steps, mean Dice over classes."
    text += "" if images_found else " The images were not found in nnUNet_raw."
    return [Section("Held-out cases", [text], tiles=rows)]


def best_median_worst(cases: Sequence[str]) -> list[tuple[str, str]]:
    """Name the best, median and worst of cases in falling order of Dice."""
    places = {0: "Best", len(cases) - 1: "Worst"}
    places.setdefault(len(cases) // 2, "Median")
    return [(places[place], str(cases[place])) for place in sorted(places)]


def case_tiles(
    image: np.ndarray | None, truth: np.ndarray, labels: dict[str, np.ndarray], dices: dict[str, float]
) -> list[Picture]:
    """Draw ground truth and labels in one axial slice.

    Args:
        image: (D, H, W), or None for an empty background.
        truth: (D, H, W) label map.
        labels: Arm -> (D, H, W) label map.
        dices: Arm -> Dice of the case.
    """
    index, box = pictures.busiest_slice(truth)
    image = np.zeros(truth.shape, np.float32) if image is None else image
    palette = pictures.colors(labels)
    tiles = [Picture(pictures.tile(image[index], truth[index], pictures.COLORS["truth"], box), "ground truth")]
    tiles += [
        Picture(pictures.tile(image[index], own[index], palette[name], box), f"{name}\nDice {dices[name]:.2f}")
        for name, own in labels.items()
    ]
    return tiles


def _prediction_folder(grid: Grid, arm: Arm) -> Path:
    p = grid.protocol
    run = next(c for c in grid.compared(arm, grid.rate(arm)) if c.labels == p.primary_labels and c.subset == 0)
    step = "validation" if p.primary_step == grid.last_step(run) else f"validation_step_{p.primary_step:06d}"
    return grid.fold_folder(run) / step


def _image(grid: Grid, case: str) -> np.ndarray | None:
    """Read a case's raw image, if there is one."""
    name = f"{grid.case_of(case)}_0000{grid.file_ending}"
    raw = Path(os.environ.get("nnUNet_raw", "")) / grid.protocol.dataset / "imagesTr" / name
    return grid.reader.read_images([str(raw)])[0][0] if raw.is_file() else None


def _protocol(grid: Grid) -> Section:
    cases, rows = grid.cases, [[name, str(value)] for name, value in asdict(grid.protocol).items()]
    chose = any(grid.development(arm) for arm in grid.arms)
    rows += [
        ["cases held out", ", ".join(cases.held_out)],
        ["cases on which rates were chosen", ", ".join(cases.development if chose else [])],
        ["cases to draw labels from", str(len(cases.labeled))],
        ["cases whose images pretraining sees", str(len(grid.pretraining_cases))],
    ]
    rows += [[f"rate of {arm.title}", f"{grid.rate(arm):g}"] for arm in grid.arms if grid.rate_is_known(arm)]
    return Section("Protocol", table=Table(["entry", "value"], rows), folded=True)


def _cost(grid: Grid) -> Section:
    rows, made_by = [], dict[str, None]()
    for arm in grid.arms:
        runs = [run for run in grid.all_runs() if run.arm == arm and run.kind != PRETRAINING and grid.done(run)]
        notes = [read_json(grid.metrics_file(run).with_suffix(".json")) for run in runs]
        seconds = sum(note["seconds"] for note in notes)
        made_by |= dict.fromkeys(_software(note.get("versions", {}), note.get("revision", "")) for note in notes)
        seeds = range(grid.protocol.pretraining_seeds) if arm.method else []
        files = [grid.fold_folder(grid.pretraining(arm, seed)) / "pretraining_summary.json" for seed in seeds]
        before = [read_json(file) for file in files if file.is_file()]
        steps, hours = (sum(run[name] for run in before) for name in ("steps", "hours"))
        rows.append([arm.title, str(steps), f"{hours:.2f}", str(len(runs)), f"{seconds / 3600:.2f}"])
    text = [f"{platform.system()} {platform.machine()}, {cores()} CPU cores, {grid.device}"]
    text += [f"Fine-tunings by {software}" for software in made_by]
    text += [f"This report by {_software(versions(), revision())}"]
    head = ["arm", "pretraining steps", "pretraining hours", "fine-tunings", "their hours"]
    return Section("Cost", text, Table(head, rows), folded=True)


def _software(numbers: dict[str, str], commit: str) -> str:
    if not numbers:
        return "unknown versions"
    return ", ".join([*(f"{name} {number}" for name, number in numbers.items()), *filter(None, [commit])])


def _commands(grid: Grid) -> Section:
    runs = [run for run in grid.all_runs() if run.kind != COMPARISON or grid.rate_is_known(run.arm)]
    lines = [
        _study_command(grid),
        "# its runs",
        f"STUDY='.../{grid.folder.name}'",
        'export nnUNet_preprocessed="$STUDY/nnUNet_preprocessed" nnUNet_extTrainer="$(nnssl_ext trainers)"',
        *map(grid.shown_command, runs),
    ]
    return Section("Every command", code="\n".join(lines), folded=True)


def _study_command(grid: Grid) -> str:
    """Return the command that repeats this study's numbers."""
    p = grid.protocol
    words = ["nnssl_ext", "study", "-d", p.dataset, "-c", p.configuration, "-p", p.plans, "-device", grid.device]
    words += ["--methods", SCRATCH, *dict.fromkeys(arm.weights_name for arm in grid.arms if arm.method)]
    inits = dict.fromkeys(arm.weights_name for arm in grid.arms if arm.init)
    files = [f"{name}=STUDY/init/{name}.pth" for name in inits]
    words += ["--init", *files] if files else []
    apart = ("dataset", "configuration", "plans", "overlays", "transductive")
    for name, value in asdict(p).items():
        if name not in apart and value != "":
            values = value if isinstance(value, list) else [value]
            shown = [f"{number:.12g}" if isinstance(number, float) else str(number) for number in values]
            words += [f"--{name.replace('_', '-')}", *shown]
    words += ["--transductive"] if p.transductive else []
    words += _finetune_words(grid)
    return shlex.join([*words, "-o", "STUDY", *p.overlays])


def _finetune_words(grid: Grid) -> list[str]:
    """Return the --finetune option that makes the arms' recipes."""
    recipes = {arm.name.rpartition("+")[2]: arm.finetune for arm in grid.arms if arm.finetune and arm.name != TOTAL}
    words = [
        f"{name}=" + ",".join(f"finetune.{setting}={json.dumps(value)}" for setting, value in settings.items())
        for name, settings in recipes.items()
    ]
    return ["--finetune", *words] if words else []
