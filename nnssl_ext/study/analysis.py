"""Answer a study's questions from its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nnssl_ext.study.arms import Arm
from nnssl_ext.study.grid import Grid
from nnssl_ext.study.protocol import SCRATCH, TOTAL, grouped
from nnssl_ext.study.statistics import Effect, case_wilcoxon, effect, holm, random_effect

RUN = ["arm", "labels", "subset", "step"]
#: Two-sided p at which a gain is called significant.
ALPHA = 0.05
#: Dice that saved labels may cost.
MARGIN = 0.005
#: A study is short if scratch still rises by more than this in the last third of its steps.
SHORT = 0.005


@dataclass(frozen=True)
class Comparison:
    """One arm against another at one budget and step.

    Attributes:
        arm, against: Names of the arms.
        labels, step: Budget and step.
        arm_mean, against_mean: Mean scores over the shared pairs.
        effect: Effect of the paired differences.
        adjusted: p adjusted by Holm over the budgets of this comparison.
        cases: Wilcoxon's p over cases, given these networks.
    """

    arm: str
    against: str
    labels: int
    step: int
    arm_mean: float
    against_mean: float
    effect: Effect
    adjusted: float
    cases: float


def load_results(grid: Grid) -> pd.DataFrame:
    """Read the metrics of every compared run. Columns: arm, labels, subset, rate, step, case, organ, dice, nsd."""
    frames = []
    for arm in grid.arms:
        if not grid.rate_is_known(arm):
            continue
        for run in grid.compared(arm, grid.rate(arm)):
            if grid.done(run):
                frame = grid.metrics(run)
                for place, (name, value) in enumerate(
                    (("arm", arm.name), ("labels", run.labels), ("subset", run.subset), ("rate", run.rate))
                ):
                    frame.insert(place, name, value)
                frames.append(frame)
    columns = [*RUN[:3], "rate", "step", "case", "organ", "dice", "nsd"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


class Analysis:
    """Answer a study's questions from its finished runs.

    Args:
        results: Table of ``load_results``.
        metric: ``dice`` or ``nsd``.
    """

    def __init__(self, grid: Grid, results: pd.DataFrame, metric: str = "dice") -> None:
        self.grid, self.protocol, self.results, self.metric = grid, grid.protocol, results, metric
        self.scores = grid.score(results, metric, RUN) if len(results) else pd.Series(dtype=float)

    @property
    def tested_arms(self) -> list[Arm]:
        """Return all arms but the two baselines."""
        return [arm for arm in self.grid.arms if arm.name not in (SCRATCH, TOTAL)]

    def score(self, arm: str, labels: int, step: int) -> dict[int, float]:
        """Return subset -> score at one budget and step."""
        if not len(self.scores):
            return {}
        chosen = self.scores.reset_index()
        chosen = chosen[(chosen.arm == arm) & (chosen.labels == labels) & (chosen.step == step)]
        values = dict(zip(chosen.subset, chosen[self.metric], strict=True))
        return {int(subset): float(value) for subset, value in values.items() if math.isfinite(value)}

    def compare(self, arm: str, against: str, budgets: Sequence[int], step: int) -> list[Comparison]:
        """Compare two arms at several budgets. Budgets without pairs are left out."""
        last = self.grid.total_steps() if against == TOTAL else step
        found = []
        for labels in budgets:
            mine, theirs = self.score(arm, labels, step), self.score(against, labels, last)
            pairs = sorted(set(mine) & set(theirs))
            if pairs:
                means = [float(np.mean([side[pair] for pair in pairs])) for side in (mine, theirs)]
                difference = self._effect(arm, against, {pair: mine[pair] - theirs[pair] for pair in pairs})
                cases = self._cases(arm, against, labels, step, last, pairs)
                found.append((labels, means, difference, cases))
        # a budget that is not measured yet will be tested too
        adjusted = holm([difference.p for _, _, difference, _ in found] + [1.0] * (len(budgets) - len(found)))
        return [
            Comparison(arm, against, labels, step, means[0], means[1], difference, p, cases)
            for (labels, means, difference, cases), p in zip(found, adjusted, strict=False)
        ]

    def _effect(self, arm: str, against: str, differences: dict[int, float]) -> Effect:
        """Compute an effect over pairs. Where both arms share their weights, or none was drawn, pairs vary alone."""
        runs = self.protocol.pretraining_seeds
        weights = {name: self._arm(name).weights_name for name in (arm, against)}
        drawn = self._arm(arm).method or self._arm(against).method
        if runs == 1 or not drawn or weights[arm] == weights[against]:
            return effect(list(differences.values()))
        return random_effect([[d for pair, d in differences.items() if pair % runs == run] for run in range(runs)])

    def _arm(self, name: str) -> Arm:
        return next(arm for arm in self.grid.arms if arm.name == name)

    def late_rise(self, labels: int) -> float | None:
        """Return scratch's rise over the last third of steps. None if it is not measured."""
        steps = self.protocol.steps
        before = [step for step in self.protocol.snapshots if 0.6 * steps <= step <= 0.7 * steps]
        if not before:
            return None
        early, late = self.score(SCRATCH, labels, before[-1]), self.score(SCRATCH, labels, steps)
        pairs = sorted(set(early) & set(late))
        return float(np.mean([late[pair] - early[pair] for pair in pairs])) if pairs else None

    def primary(self, arm: str, against: str = SCRATCH) -> Comparison | None:
        """Compare an arm at the endpoint. Against equal total steps, at the end of fine-tuning."""
        p = self.protocol
        step = p.steps if against == TOTAL else p.primary_step
        found = self.compare(arm, against, [p.primary_labels], step)
        return found[0] if found else None

    def saved(self, arm: str) -> int | None:
        """Return the smallest budget below all that is shown to suffice, against scratch with all cases.

        Budgets are tested from the largest down to the first that fails. The order is fixed, so none needs adjustment.
        """
        everything, steps = self.grid.cases.groups, self.protocol.steps
        reference = self.score(SCRATCH, everything, steps)
        found = None
        for labels in sorted((n for n in self.protocol.labels if n < everything), reverse=True):
            mine = self.score(arm, labels, steps)
            gains = {pair: mine[pair] - reference[pair] for pair in sorted(set(mine) & set(reference))}
            if len(gains) < self.protocol.subsets or self._effect(arm, SCRATCH, gains).low <= -MARGIN:
                break
            found = labels
        return found

    def saving(self, arm: str) -> str:
        """Describe the labels saved, such as "62 % (24 of 64)"."""
        labels, everything = self.saved(arm), self.grid.cases.groups
        if labels is not None:
            return f"{100 * (1 - labels / everything):.0f} % ({labels} of {everything})"
        return "none shown" if self._measured(arm) else "not measured"

    def _measured(self, arm: str) -> bool:
        """Return whether all runs behind ``saved`` are done."""
        everything, steps = self.grid.cases.groups, self.protocol.steps
        fewer = [labels for labels in self.protocol.labels if labels < everything]
        runs = [self.score(SCRATCH, everything, steps), *(self.score(arm, n, steps) for n in fewer)]
        return all(len(scores) == self.protocol.subsets for scores in runs)

    def curve(self, arm: str, labels: int) -> dict[int, list[float]]:
        """Return step -> scores of an arm's runs."""
        steps = [self.grid.total_steps()] if arm == TOTAL else self.protocol.snapshots
        return {step: list(self.score(arm, labels, step).values()) for step in steps}

    def reached(self, arm: str, labels: int) -> int | None:
        """Return the first snapshot that reaches scratch's final mean."""
        final = self.score(SCRATCH, labels, self.protocol.steps)
        scores = {step: self.score(arm, labels, step) for step in self.protocol.snapshots}
        shared = sorted(set(final).intersection(*scores.values()))
        if not shared:
            return None
        means = {step: float(np.mean([runs[pair] for pair in shared])) for step, runs in scores.items()}
        target = float(np.mean([final[pair] for pair in shared]))
        return next((step for step in sorted(means) if means[step] >= target), None)

    @property
    def endpoint(self) -> str:
        """Describe the endpoint, such as "Dice with 8 labels after 2,000 steps"."""
        p = self.protocol
        of = f" of {p.primary_class}" if p.primary_class else ""
        return f"Dice{of} with {self.budget(p.primary_labels)} after {p.primary_step:,} steps"

    def budget(self, labels: int) -> str:
        """Describe a budget, such as "8 labels"."""
        return count(labels, "labeled group" if self.protocol.group_by else "label")

    def verdict(self, arm: str) -> str:
        """Describe whether an arm differs from scratch."""
        found = self.primary(arm)
        if found is None:
            return "not measured"
        e = found.effect
        if e.pairs < self.protocol.subsets:  # stopping at the first good look finds gains that do not exist
            return "not decided yet"
        if not math.isfinite(e.low):
            return f"cannot be decided with {count(e.pairs, 'pair')}"
        if e.p > ALPHA:
            return "no significant difference"
        return "significant gain" if e.mean > 0 else "significant loss"

    def against_total(self, arm: Arm) -> Comparison | None:
        """Compare with scratch of equal total steps. The steps behind a file are not known."""
        return self.primary(arm.name, TOTAL) if arm.method else None

    def total_text(self, found: Comparison) -> str:
        """Describe a comparison with scratch of equal total steps."""
        e, planned = found.effect, self.protocol.total_baseline
        open_ = f", {e.pairs} of {count(planned, 'pair')}, not decided yet" if e.pairs < planned else ""
        return f"{100 * e.mean:+.1f} {interval(e)}{open_}"

    def answer(self, arm: Arm) -> str:
        """Summarize an arm in one sentence."""
        found = self.primary(arm.name)
        if found is None:
            return f"{arm.name}: no pair of runs is finished at the endpoint."
        e, p = found.effect, self.protocol
        pairs = count(p.subsets, "paired run")
        pairs = pairs if e.pairs == p.subsets else f"{e.pairs} of {pairs}"
        if e.pretrainings > 1:
            pairs += f" over {count(e.pretrainings, 'pretraining run')}"
        total = self.against_total(arm)
        longer = self.total_text(total) if total else "not measured"
        comparable = self.grid.has_total and arm.method
        against = f" Against scratch of equal total steps: {longer}." if comparable else ""
        return (
            f"{arm.name}: {self.verdict(arm.name)}, {100 * e.mean:+.1f} points {interval(e)}, {significance(e.p)}, "
            f"{pairs}. {self.labels_sentence(arm.name)}.{against}"
        )

    def labels_sentence(self, arm: str) -> str:
        """Describe the labels saved beside those of scratch."""
        labels, alone, everything = self.saved(arm), self.saved(SCRATCH), self.grid.cases.groups
        if labels is None:
            return "No saving of labels shown" if self._measured(arm) else "Saving of labels not measured"
        if alone is not None and alone <= labels:
            return f"No saving of labels shown: {alone} of {everything} are enough for scratch too"
        scratch = "none shown" if self._measured(SCRATCH) else "not measured"
        if alone is not None:
            scratch = f"{alone} of {everything}"
        share = f"{100 * (1 - labels / everything):.0f} %"
        return f"{share} of labels saved ({labels} instead of {everything}, by scratch alone {scratch})"

    def _cases(self, arm: str, against: str, labels: int, step: int, last: int, pairs: list[int]) -> float:
        frame = self.results[(self.results.labels == labels) & self.results.subset.isin(pairs)]
        if self.protocol.primary_class:
            frame = frame[frame.organ == self.protocol.primary_class]
        if self.protocol.group_by:  # cases of a group are no independent evidence
            groups = grouped(self.grid.cases.held_out, self.protocol.group_by)
            group_of = {case: group for group, cases in groups.items() for case in cases}
            frame = frame.assign(case=frame.case.map(self.grid.case_of).map(group_of))
        sides = [
            frame[(frame.arm == name) & (frame.step == at)].groupby("case")[self.metric].mean()
            for name, at in ((arm, step), (against, last))
        ]
        return case_wilcoxon((sides[0] - sides[1]).to_numpy())


def rounded_p(p: float) -> str:
    """Format a p value: '0.031' or '< 0.001'. Near the limit '0.0498' or '0.0503', so that one sees the side."""
    return "< 0.001" if p < 0.0005 else f"{p:.4f}" if 0.0495 <= p < 0.0505 and p != 0.05 else f"{p:.3f}"


def significance(p: float) -> str:
    """Format a named p value: 'p = 0.031' or 'p < 0.001'."""
    text = rounded_p(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def interval(e: Effect) -> str:
    """Format an interval in points."""
    if not math.isfinite(e.low):
        return "[no interval]"
    return f"[{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def count(number: int, noun: str) -> str:
    """Format a number with its noun: '2 labels'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
