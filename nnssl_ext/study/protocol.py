"""The protocol of a label-efficiency study: what is compared, on which cases, decided before the first run.

It is written into the study's folder once and read back ever after, so that nothing that is seen on the way can change
it. Methods may be added to a finished study; anything else is another study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json

SCRATCH, TOTAL = "scratch", "scratch_total"
#: What the two baselines are, in words.
TITLES = {SCRATCH: "scratch, equal fine-tuning steps", TOTAL: "scratch, equal total steps"}
#: Fractions of the pool that rates are chosen on, and at most so many cases.
DEVELOPMENT_SHARE, MOST_DEVELOPMENT = 5, 8
#: Tries to draw a subset in which every class is present.
TRIES = 1000


@dataclass(frozen=True)
class Protocol:
    """What defines a study. All of it is JSON.

    Attributes:
        dataset: DatasetXXX_NAME.
        configuration: As for nnUNetv2_train.
        plans: The data set's plans that are started from.
        overlays: Recipes and settings laid over them, for pretraining and fine-tuning alike.
        labels: Budgets of labelled cases in rising order; the last may be all cases.
        subsets: Paired runs per budget: label subset and seed change together.
        steps: Fine-tuning steps of every arm.
        snapshots: Steps at which the held-out cases are predicted; the last is ``steps``.
        primary_labels, primary_step: The endpoint that was fixed before the runs.
        rates: Fine-tuning rates of which each arm takes the best on development cases.
        development_runs: Runs per arm and rate for that choice.
        total_baseline: Paired runs of the scratch baseline with pretraining's steps added; 0: none.
        fold: The data set's fold whose validation cases are held out.
        transductive: Whether pretraining sees the images of the held-out cases.
        tolerance: Of the normalised surface Dice in mm.
        seed: Of everything.
    """

    dataset: str
    configuration: str
    plans: str
    overlays: list[str]
    labels: list[int]
    subsets: int
    steps: int
    snapshots: list[int]
    primary_labels: int
    primary_step: int
    rates: list[float]
    development_runs: int
    total_baseline: int
    fold: int
    transductive: bool
    tolerance: float
    seed: int


@dataclass(frozen=True)
class Cases:
    """Which case is for what; all lists sorted.

    Attributes:
        held_out: Predicted by every run, seen by no stage.
        pool: All others; what pretraining sees.
        labelled: Those of the pool that have labels.
        development: The part of the pool on which rates are chosen.
        subsets: (labels, subset) -> training cases; nested for each subset.
        development_subsets: Training cases of the development runs; they spare ``development``.
    """

    held_out: list[str]
    pool: list[str]
    labelled: list[str]
    development: list[str]
    subsets: dict[tuple[int, int], list[str]]
    development_subsets: list[list[str]]


def draw_cases(protocol: Protocol, held_out: Sequence[str], pool: Sequence[str], classes: Mapping[str, set]) -> Cases:
    """Draw development cases and nested label subsets, every class present in the smallest.

    Args:
        protocol: The study's.
        held_out, pool: Case identifiers.
        classes: For each labelled case of the pool, the classes it shows.

    Raises:
        UserError: If there are too few cases, or no subset of the smallest size shows every class.
    """
    pool, labelled = sorted(pool), sorted(classes)
    number = max(1, min(MOST_DEVELOPMENT, len(labelled) // DEVELOPMENT_SHARE))
    choose = len(protocol.rates) > 1
    development = _covering_order(labelled, classes, number, (protocol.seed, 0), needed=False)[:number]
    rest = sorted(set(labelled) - set(development))
    if protocol.labels[-1] > len(labelled) or (choose and protocol.primary_labels > len(rest)):
        raise UserError(
            f"{protocol.dataset} has {len(labelled)} labelled cases to train on ({number if choose else 0} of them "
            f"choose the rate); budgets {protocol.labels} do not fit, give fewer --labels"
        )
    subsets = {}
    for subset in range(protocol.subsets):
        order = _covering_order(labelled, classes, protocol.labels[0], (protocol.seed, 1, subset))
        for labels in protocol.labels:
            subsets[labels, subset] = sorted(order[:labels])
    drawn = []
    for run in range(protocol.development_runs if choose else 0):
        order = _covering_order(rest, classes, protocol.primary_labels, (protocol.seed, 2, run))
        drawn.append(sorted(order[: protocol.primary_labels]))
    return Cases(sorted(held_out), pool, labelled, sorted(development), subsets, drawn)


def _covering_order(
    cases: Sequence[str], classes: Mapping[str, set], least: int, seed: tuple[int, ...], needed: bool = True
) -> list[str]:
    """A random order of the cases whose first ``least`` show every class that any case shows.

    Raises:
        UserError: If none is found; without ``needed`` any order will do then.
    """
    everything = set().union(*(classes[case] for case in cases))
    generator = np.random.default_rng(seed)
    orders = ([cases[i] for i in generator.permutation(len(cases))] for _ in range(TRIES))
    first = next(orders)
    for order in chain([first], orders):
        if set().union(*(classes[case] for case in order[:least])) == everything:
            return order
    if not needed:
        return first
    raise UserError(
        f"no {least} of {len(cases)} cases were found that show all of the classes {sorted(everything, key=str)}; let "
        f"the smallest of --labels be larger"
    )


def keep_protocol(protocol: Protocol, path: Path, keep: bool = True) -> None:
    """Write the protocol (with ``keep``), or check that it is the one that was written.

    Raises:
        UserError: If the folder holds another study.
    """
    if not path.is_file():
        if keep:
            write_json(asdict(protocol), path)
        return
    stored = load_protocol(path)
    for entry in fields(Protocol):
        before, now = getattr(stored, entry.name), getattr(protocol, entry.name)
        if before != now:
            raise UserError(
                f"{path.parent} holds a study with {entry.name} {before!r}, this one has {now!r}; give another -o, or "
                f"call it with the same words to go on"
            )


def load_protocol(path: Path) -> Protocol:
    """The protocol of a study's folder.

    Raises:
        UserError: If it is not one.
    """
    content: dict[str, Any] = read_json(path)
    known = {entry.name for entry in fields(Protocol)}
    if set(content) != known:
        raise UserError(f"{path} is no study of this version; differing: {', '.join(sorted(set(content) ^ known))}")
    return Protocol(**content)
