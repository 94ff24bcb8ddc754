"""Fix the protocol of a study before its first run.

It is written into the study's folder once and read back by every later call, so that no result can change it. Arms may
be added to a finished study. Anything else makes another study.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.data.cases import groups_of
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json

SCRATCH, TOTAL = "scratch", "scratch_total"
#: Names of the two baselines in reports.
TITLES = {SCRATCH: "scratch, equal fine-tuning steps", TOTAL: "scratch, equal total steps"}
#: One in this many labeled groups is a development case, up to a maximum.
DEVELOPMENT_SHARE, MAX_DEVELOPMENT = 5, 8
#: Attempts to draw a subset that shows every class.
ATTEMPTS = 1000


@dataclass(frozen=True)
class Protocol:
    """Define a study in JSON values.

    Attributes:
        dataset: DatasetXXX_NAME.
        configuration: Name of a 3-D configuration.
        plans: Plans of the data set to start from.
        overlays: Recipes and settings laid over them for pretraining and fine-tuning.
        labels: Label budgets in rising order, in groups of cases. The last may be all.
        subsets: Paired runs per budget. Label subset and seed change together.
        steps: Fine-tuning steps of every arm.
        snapshots: Steps at which held-out cases are predicted. The last is ``steps``.
        primary_labels, primary_step: The endpoint.
        primary_class: Class whose Dice is the endpoint. '' takes the mean over classes.
        rates: Fine-tuning rates. Each arm takes the best one on development cases.
        development_runs: Runs per arm and rate for that choice.
        total_baseline: Paired runs of scratch with the pretraining's steps added.
        pretraining_seeds: Pretraining runs per method. Pair i starts from run i modulo this number.
        pretrain_on: Data set of the pretraining. '' takes the target's own images.
        group_by: Regular expression that finds a case's group in its name. '' makes each case a group.
        fold: Fold of the data set whose validation cases are held out.
        transductive: Whether pretraining sees the images of held-out cases.
        tolerance: Tolerance of the surface Dice in mm.
        seed: Seed of all random draws.
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
    primary_class: str = ""
    pretraining_seeds: int = 1
    pretrain_on: str = ""
    group_by: str = ""


@dataclass(frozen=True)
class Cases:
    """List the role of each case, sorted.

    Attributes:
        held_out: Predicted by every run, seen by no stage.
        pool: All other cases but ``duplicates``. Pretraining sees them.
        labeled: Cases of the pool that have labels.
        groups: Number of groups among them: the largest budget.
        development: Cases of the pool on which rates are chosen.
        subsets: (labels, subset) -> training cases, nested for each subset.
        development_subsets: Training cases of the development runs, without ``development``.
        duplicates: Cases left out of the pool -> the held-out case with the same image.
    """

    held_out: list[str]
    pool: list[str]
    labeled: list[str]
    groups: int
    development: list[str]
    subsets: dict[tuple[int, int], list[str]]
    development_subsets: list[list[str]]
    duplicates: dict[str, str] = field(default_factory=dict)


def grouped(cases: Sequence[str], pattern: str) -> dict[str, list[str]]:
    """Sort cases into groups that no split may divide, as ``groups_of`` names them."""
    groups: dict[str, list[str]] = {}
    ordered = sorted(cases)
    for case, group in zip(ordered, groups_of(ordered, pattern), strict=True):
        groups.setdefault(group, []).append(case)
    return groups


def draw_cases(
    protocol: Protocol,
    held_out: Sequence[str],
    pool: Sequence[str],
    classes: Mapping[str, set],
    primary: Hashable | None = None,
) -> Cases:
    """Draw development cases and nested label subsets.

    Args:
        held_out, pool: Case identifiers.
        classes: Classes that each labeled case of the pool shows.
        primary: Class of the endpoint, None for the mean over classes.

    Raises:
        UserError: If there are too few cases, or no smallest subset shows every class.
    """
    groups = grouped(sorted(classes), protocol.group_by)
    shown = {group: set().union(*(classes[case] for case in cases)) for group, cases in groups.items()}
    names = sorted(groups)

    def cases_of(chosen: Sequence[str]) -> list[str]:
        return sorted(case for group in chosen for case in groups[group])

    number = max(1, min(MAX_DEVELOPMENT, len(names) // DEVELOPMENT_SHARE))
    choose = len(protocol.rates) > 1
    # by the class of the endpoint the rate is chosen; one case may not show all classes
    wanted = {group: seen & {primary} for group, seen in shown.items()} if primary is not None else {}
    development = _covering_order(names, wanted or shown, number, (protocol.seed, 0), needed=False)[:number]
    rest = sorted(set(names) - set(development))
    if protocol.labels[-1] > len(names) or (choose and protocol.primary_labels > len(rest)):
        noun = "labeled groups" if protocol.group_by else "labeled cases"
        found = f"{protocol.dataset} has {len(names)} {noun} to train on"
        if protocol.labels[-1] > len(names):
            raise UserError(f"{found}. Budgets {protocol.labels} do not fit. Give smaller --labels.")
        raise UserError(
            f"{found}. {number} of them choose the rate, so the endpoint's {protocol.primary_labels} do not fit. Give "
            f"smaller --primary-labels, or one of --rates."
        )
    subsets = {}
    for subset in range(protocol.subsets):
        order = _covering_order(names, shown, protocol.labels[0], (protocol.seed, 1, subset))
        for labels in protocol.labels:
            subsets[labels, subset] = cases_of(order[:labels])
    drawn = []
    for run in range(protocol.development_runs if choose else 0):
        order = _covering_order(rest, shown, protocol.primary_labels, (protocol.seed, 2, run))
        drawn.append(cases_of(order[: protocol.primary_labels]))
    return Cases(sorted(held_out), sorted(pool), sorted(classes), len(names), cases_of(development), subsets, drawn)


def _covering_order(
    groups: Sequence[str], shown: Mapping[str, set], number: int, seed: tuple[int, ...], needed: bool = True
) -> list[str]:
    """Draw an order whose first groups show every class.

    Raises:
        UserError: If none is found. Without ``needed`` any order will do then.
    """
    everything = set().union(*(shown[group] for group in groups))
    generator = np.random.default_rng(seed)
    orders = ([groups[i] for i in generator.permutation(len(groups))] for _ in range(ATTEMPTS))
    first = next(orders)
    for order in chain([first], orders):
        if set().union(*(shown[group] for group in order[:number])) == everything:
            return order
    if not needed:
        return first
    raise UserError(
        f"No {number} of {len(groups)} labeled cases show all of the classes {sorted(everything, key=str)}. Let the "
        f"smallest of --labels be larger."
    )


def keep_protocol(protocol: Protocol, path: Path, keep: bool = True) -> None:
    """Write the protocol, or compare it with the file.

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
                f"{path.parent} holds a study with {entry.name} {before!r}, got {now!r}. Give another -o, or repeat "
                f"the first call's options to continue."
            )


def load_protocol(path: Path) -> Protocol:
    """Read the protocol of a study's folder.

    Raises:
        UserError: If the file is no protocol of this version.
    """
    content: dict[str, Any] = read_json(path)
    known = {entry.name for entry in fields(Protocol)}
    required = known - {"primary_class", "pretraining_seeds", "pretrain_on", "group_by"}
    if not required <= set(content) <= known:
        differing = ", ".join(sorted(set(content) ^ known))
        raise UserError(f"{path} is no protocol of this version. Differing entries: {differing}.")
    return Protocol(**content)
