"""What a reader of a study's report must know before its numbers."""

from __future__ import annotations

from collections.abc import Iterator

from nnssl_ext.methods import METHODS
from nnssl_ext.recipe import read_json
from nnssl_ext.study.analysis import count
from nnssl_ext.study.grid import PRETRAINING, Grid
from nnssl_ext.study.protocol import TOTAL


def caution(grid: Grid, tested: int) -> str:
    """What the tests are about; ``tested`` arms beside the baselines."""
    p = grid.protocol
    sentences = [
        f"The endpoint was fixed before the runs: Dice at {count(p.primary_labels, 'label')} after {p.primary_step} "
        f"steps.",
        "The unit is the paired run (label subset and seed), tested by exact sign flips; intervals belong to the same "
        "test.",
        f"Every arm is fine-tuned for {p.steps} steps.",
        "All runs of an arm start from one pretraining: p and interval are about its weights, on these held-out cases, "
        "and another seed's may differ by more.",
    ]
    if tested > 1:
        sentences.append(
            f"{count(tested, 'arm')} are tested against the same runs from scratch, each at 5 %: the more there are, "
            f"the likelier is a gain that is none."
        )
    return " ".join(sentences)


def warnings(grid: Grid) -> list[str]:
    """What limits this study in particular."""
    found = []
    if grid.protocol.transductive:
        found.append("Transductive: pretraining saw the images (not the labels) of the held-out cases.")
    missing = [cell for cell in grid.all_cells() if not grid.done(cell)]
    if missing:
        found.append(f"{len(missing)} of {len(grid.all_cells())} runs are not done; what follows is without them.")
    for cell, log in grid.failures().items():
        found.append(f"Failed: {cell.arm.name} {cell.name}; its log is {log.relative_to(grid.folder)}.")
    for arm in grid.arms:
        if arm.method and METHODS[arm.method].learns_from != "cases":
            found.append(
                f"{arm.name} has seen no case of this data set but the 2-D images in {grid.common.images}: its row is "
                f"about those images as much as about the method."
            )
        if arm.init:
            found.append(f"{arm.name} comes from a file: which images it has seen is not known to this study.")
    devices = sorted({note["device"] for note in _notes(grid) if "device" in note})
    if len(devices) > 1:
        found.append(f"Runs were made on different devices ({', '.join(devices)}), whose precision differs.")
    return found + _rates_at_an_end(grid)


def _rates_at_an_end(grid: Grid) -> list[str]:
    rates = sorted(grid.protocol.rates)
    chosen = {arm.name: grid.rate(arm) for arm in grid.arms if arm.name != TOTAL and grid.rate_is_known(arm)}
    at_end = [f"{name} {rate:g}" for name, rate in chosen.items() if rate in (rates[0], rates[-1])]
    if len(rates) < 2 or not at_end:
        return []
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return [
        f"Fine-tuning rates at an end of those that were tried ({tried}): {', '.join(at_end)}. One beyond might serve "
        f"these arms better."
    ]


def _notes(grid: Grid) -> Iterator[dict]:
    """What was noted of each fine-tuning that is done."""
    for cell in grid.all_cells():
        if cell.kind != PRETRAINING and grid.done(cell):
            yield read_json(grid.metrics_file(cell).with_suffix(".json"))
