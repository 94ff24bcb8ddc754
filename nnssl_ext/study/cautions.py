"""Write the notes and warnings of a study's report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nnssl_ext.methods import METHODS
from nnssl_ext.recipe import read_json
from nnssl_ext.settings import UNPROTECTED
from nnssl_ext.study.analysis import SHORT, Analysis, count
from nnssl_ext.study.arms import Arm
from nnssl_ext.study.grid import PRETRAINING, Grid
from nnssl_ext.study.protocol import SCRATCH, TOTAL


def notes(analysis: Analysis) -> list[str]:
    """Explain what the tests are about."""
    p, tested = analysis.protocol, len(analysis.tested_arms)
    found = [
        f"The endpoint was fixed before the runs: {analysis.endpoint}. All arms are fine-tuned for {p.steps:,} steps.",
        "A paired run has the same labeled cases, seed and augmentation with and without pretraining.",
    ]
    if p.pretraining_seeds > 1:
        found.append(
            f"Each method was pretrained {p.pretraining_seeds} times. Intervals and p values are about the method: "
            f"Student's t over the means of the pretraining runs."
        )
        if files := [arm.name for arm in analysis.tested_arms if arm.init]:
            found.append(f"Those of {', '.join(files)} are about one file each, by exact sign flips.")
    else:
        found.append(
            "Differences are tested by exact sign flips. All runs of an arm start from one pretraining, so intervals "
            "and p values are about its weights. Another pretraining run may differ by more."
        )
    if tested > 1:
        found.append(f"{count(tested, 'arm')} are tested, each at 5 %. More arms make a false alarm likelier.")
    return found


def warnings(analysis: Analysis) -> list[str]:
    """List what limits this study in particular."""
    grid, p = analysis.grid, analysis.protocol
    found = []
    rises = {labels: analysis.late_rise(labels) for labels in dict.fromkeys((p.primary_labels, grid.cases.groups))}
    for labels, rise in rises.items():
        if rise is not None and rise > SHORT:
            found.append(
                f"Short study: scratch with {analysis.budget(labels)} still rises by {100 * rise:.1f} points over the "
                f"last third of its steps. Longer fine-tuning may change the result."
            )
    if other := _arms_of_another_recipe(grid):
        found.append(
            f"Fine-tuned by another recipe than scratch: {', '.join(other)}. Their differences to scratch are those of "
            f"pretraining and recipe together."
        )
    if p.pretraining_seeds == 2:  # one degree of freedom, see the simulation in docs/how-to/study.md
        found.append(
            "Two pretraining runs: more than half of such studies miss even a gain of 5 points. Take "
            "--pretraining-seeds 4 or more."
        )
    if p.transductive:
        found.append("Transductive: pretraining saw the images (not the labels) of the held-out cases.")
    if grid.cases.duplicates:
        found.append(
            f"{p.dataset} holds images twice. Not trained on, since the same image is held out: "
            f"{_pairs(grid.cases.duplicates)}."
        )
    if p.pretrain_on:
        left_out = read_json(grid.preprocessed.parent / p.pretrain_on / "left_out.json")
        found.append(
            f"Pretraining on {p.pretrain_on}: its cases were compared with the held-out cases by content. Left out: "
            f"{_pairs(left_out) or 'none'}."
        )
    runs = grid.all_runs()
    missing = sum(not grid.done(run) for run in runs)
    if missing:
        found.append(f"{missing} of {len(runs)} runs are not done. The results are without them.")
    for run, log in grid.failures().items():
        found.append(f"Failed: {run.arm.name} {run.name}. Log: {log.relative_to(grid.folder)}.")
    for arm in grid.arms:
        if arm.method and METHODS[arm.method].learns_from != "cases":
            found.append(f"{arm.name} learned from the 2-D images in {grid.common.images}, not from this data set.")
        if arm.init:
            found.append(f"{arm.name} comes from a file. The study does not know which images it has seen.")
    devices = sorted({note["device"] for note in _notes(grid) if "device" in note})
    if len(devices) > 1:
        found.append(f"Runs were made on devices of different precision: {', '.join(devices)}.")
    return found + _rates(grid)


def _arms_of_another_recipe(grid: Grid) -> list[str]:
    """Name arms whose recipe differs beyond the protection of pretrained weights."""

    def recipe(arm: Arm) -> dict[str, Any]:
        return {name: value for name, value in arm.finetune.items() if name not in UNPROTECTED}

    scratch = next(arm for arm in grid.arms if arm.name == SCRATCH)
    return [arm.name for arm in grid.arms if grid.is_pretrained(arm) and recipe(arm) != recipe(scratch)]


def _pairs(left_out: dict[str, str]) -> str:
    return ", ".join(f"{case} = {other}" for case, other in left_out.items())


def _rates(grid: Grid) -> list[str]:
    """Say which rates were not chosen, or are at an end of those tried."""
    arms = [arm for arm in grid.arms if arm.name != TOTAL and grid.rate_is_known(arm)]
    tried = sorted(grid.protocol.rates)
    fixed = [arm for arm in arms if len(grid.rates(arm)) == 1]
    tested = [arm for arm in arms if arm not in fixed and any(map(grid.done, grid.development(arm)))]
    unscored = [arm for arm in tested if not grid.scores_of_rates(arm)]
    at_end = [arm for arm in arms if arm not in fixed + unscored and grid.rate(arm) in (tried[0], tried[-1])]
    found = []
    if fixed:
        found.append(
            f"Rates that were fixed, not chosen: {_named(grid, fixed)}. A rate that suits scratch badly looks "
            "like a gain."
        )
    if unscored:
        found.append(
            f"Rates that could not be chosen, since no trial had a score: {_named(grid, unscored)}. No development "
            f"case shows a class of the endpoint."
        )
    if at_end:
        ends = ", ".join(f"{rate:g}" for rate in tried)
        found.append(
            f"Chosen rates at an end of those tried ({ends}): {_named(grid, at_end)}. A rate beyond may be better."
        )
    return found


def _named(grid: Grid, arms: list[Arm]) -> str:
    return ", ".join(f"{arm.name} {grid.rate(arm):g}" for arm in arms)


def _notes(grid: Grid) -> Iterator[dict]:
    """Yield the notes of each finished fine-tuning."""
    for run in grid.all_runs():
        if run.kind != PRETRAINING and grid.done(run):
            yield read_json(grid.metrics_file(run).with_suffix(".json"))
