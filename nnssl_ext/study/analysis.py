"""From a study's numbers to its answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nnssl_ext.methods import METHODS
from nnssl_ext.study.arms import Arm
from nnssl_ext.study.grid import Grid
from nnssl_ext.study.metrics import run_scores
from nnssl_ext.study.protocol import SCRATCH, TOTAL
from nnssl_ext.study.statistics import (
    Effect,
    LabelsSaved,
    case_wilcoxon,
    effect,
    holm,
    labels_saved,
    steps_to_reach,
)

RUN = ["arm", "labels", "subset", "step"]
#: A gain is called one at this two-sided p.
ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """An arm against another at one budget and step.

    Attributes:
        arm, against: Their names.
        labels, step: Where.
        arm_mean, against_mean: Mean score over the shared pairs.
        effect: Of the paired differences.
        adjusted: Holm's p over the budgets of the same comparison.
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
    """Columns arm, labels, subset, rate, step, case, organ, dice, nsd: every grid run that is done."""
    frames = []
    for arm in grid.arms:
        if not grid.rate_is_known(arm):
            continue
        for cell in grid.grid(arm, grid.rate(arm)):
            if grid.done(cell):
                frame = grid.metrics(cell)
                for place, (name, value) in enumerate(
                    (("arm", arm.name), ("labels", cell.labels), ("subset", cell.subset), ("rate", cell.rate))
                ):
                    frame.insert(place, name, value)
                frames.append(frame)
    columns = [*RUN[:3], "rate", "step", "case", "organ", "dice", "nsd"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


class Analysis:
    """The answers of a study, from the runs that are done.

    Args:
        grid: The study's.
        results: As ``load_results`` gives them.
        metric: ``dice`` or ``nsd``.
    """

    def __init__(self, grid: Grid, results: pd.DataFrame, metric: str = "dice") -> None:
        self.grid, self.protocol, self.results, self.metric = grid, grid.protocol, results, metric
        self.scores = run_scores(results, metric, RUN) if len(results) else pd.Series(dtype=float)

    @property
    def tested_arms(self) -> list[Arm]:
        """All but the two baselines."""
        return [arm for arm in self.grid.arms if arm.name not in (SCRATCH, TOTAL)]

    def score(self, arm: str, labels: int, step: int) -> dict[int, float]:
        """subset -> score of an arm's runs at one budget and step."""
        if not len(self.scores):
            return {}
        chosen = self.scores.reset_index()
        chosen = chosen[(chosen.arm == arm) & (chosen.labels == labels) & (chosen.step == step)]
        values = dict(zip(chosen.subset, chosen[self.metric], strict=True))
        return {int(subset): float(value) for subset, value in values.items() if math.isfinite(value)}

    def compare(self, arm: str, against: str, budgets: Sequence[int], step: int) -> list[Comparison]:
        """An arm against another at several budgets with Holm over all of them; those without a pair are left out."""
        last = self.grid.total_steps() if against == TOTAL else step
        found = []
        for labels in budgets:
            mine, theirs = self.score(arm, labels, step), self.score(against, labels, last)
            pairs = sorted(set(mine) & set(theirs))
            if pairs:
                means = [float(np.mean([side[pair] for pair in pairs])) for side in (mine, theirs)]
                difference = effect([mine[pair] - theirs[pair] for pair in pairs])
                cases = self._cases(arm, against, labels, step, last, pairs)
                found.append((labels, means, difference, cases))
        # a budget that is not measured yet will be tested, too
        adjusted = holm([difference.p for _, _, difference, _ in found] + [1.0] * (len(budgets) - len(found)))
        return [
            Comparison(arm, against, labels, step, means[0], means[1], difference, p, cases)
            for (labels, means, difference, cases), p in zip(found, adjusted, strict=False)
        ]

    def primary(self, arm: str, against: str = SCRATCH) -> Comparison | None:
        """The endpoint that was fixed before the runs; against equal total steps, the end of fine-tuning."""
        p = self.protocol
        step = p.steps if against == TOTAL else p.primary_step
        found = self.compare(arm, against, [p.primary_labels], step)
        return found[0] if found else None

    def saved(self, arm: str) -> LabelsSaved:
        """Labels saved at the end of fine-tuning, against scratch with all cases; of budgets with all their pairs."""
        everything, steps = len(self.grid.cases.labelled), self.protocol.steps
        reference = self.score(SCRATCH, everything, steps)
        against_all = {}
        for labels in self.protocol.labels:
            mine = self.score(arm, labels, steps)
            pairs = sorted(set(mine) & set(reference))
            if len(pairs) == self.protocol.subsets:
                against_all[labels] = effect([mine[pair] - reference[pair] for pair in pairs])
        return labels_saved(against_all, everything)

    def saving(self, arm: str) -> str:
        """``saved`` in words: "62 % (24 of 64)", "none shown", or "not measured" while budgets are missing.

        Of scratch it says how many labels are more than this length of training makes use of.
        """
        saved = self.saved(arm)
        if saved.share is not None:
            return f"{100 * saved.share:.0f} % ({saved.labels} of {saved.everything})"
        return "none shown" if self._measured(arm, saved.everything) else "not measured"

    def _measured(self, arm: str, everything: int) -> bool:
        """Whether there are runs of all that says how many labels are saved."""
        steps, fewer = self.protocol.steps, [labels for labels in self.protocol.labels if labels < everything]
        runs = [self.score(SCRATCH, everything, steps), *(self.score(arm, n, steps) for n in fewer)]
        return all(len(scores) == self.protocol.subsets for scores in runs)

    def curve(self, arm: str, labels: int) -> dict[int, list[float]]:
        """step -> scores of an arm's runs."""
        steps = [self.grid.total_steps()] if arm == TOTAL else self.protocol.snapshots
        return {step: list(self.score(arm, labels, step).values()) for step in steps}

    def reached(self, arm: str, labels: int) -> int | None:
        """The first snapshot at which an arm's mean is scratch's final one."""
        final = self.score(SCRATCH, labels, self.protocol.steps)
        scores = {step: self.score(arm, labels, step) for step in self.protocol.snapshots}
        shared = sorted(set(final).intersection(*scores.values()))
        if not shared:
            return None
        means = {step: float(np.mean([runs[pair] for pair in shared])) for step, runs in scores.items()}
        return steps_to_reach(means, float(np.mean([final[pair] for pair in shared])))

    def answer(self, arm: Arm) -> str:
        """One sentence about an arm."""
        found = self.primary(arm.name)
        p = self.protocol
        what = f"Starting from {arm.name}"
        if arm.method:
            images = f"{len(self.grid.folds[0]['train'])} images"
            if METHODS[arm.method].learns_from != "cases":
                images = "labelled 2-D images, none of them of this data set"
            what = f"Pretraining by {arm.name} on {images}"
        if found is None:
            return f"{what}: no pair of runs is finished at the primary endpoint."
        e = found.effect
        size = f"{100 * e.mean:+.1f} points of Dice at {count(p.primary_labels, 'label')} after {p.primary_step} steps"
        verdict = "no significant gain"
        if e.p <= ALPHA:
            verdict = "a significant gain" if e.mean > 0 else "significantly worse than scratch"
        pairs = count(e.pairs, "paired run")
        if e.pairs < p.subsets:  # who stops at the first good look finds gains that are none
            verdict, pairs = "not decided yet", f"{e.pairs} of {count(p.subsets, 'paired run')}"
        elif 2.0 ** (1 - e.pairs) > ALPHA:
            verdict = f"cannot be decided with {count(e.pairs, 'pair')}"
        total = self.primary(arm.name, TOTAL)
        longer = f"{100 * total.effect.mean:+.1f} {interval(total.effect)}" if total else "not measured"
        against = f"; against scratch of equal total steps {longer}" if self.grid.has_total else ""
        return (
            f"{what}: {verdict}, {size} {interval(e)}, {significance(e.p)}, {pairs}{against}; {self._labels(arm.name)}."
        )

    def _labels(self, arm: str) -> str:
        """The answer's words about labels, beside those that scratch itself has no use for."""
        saved, alone = self.saved(arm), self.saved(SCRATCH)
        if saved.share is None:
            measured = self._measured(arm, saved.everything)
            return "no saving of labels shown" if measured else "saving of labels not measured"
        if alone.labels is not None and alone.labels <= (saved.labels or 0):
            return f"no saving of labels shown: {alone.labels} of {saved.everything} are enough for scratch, too"
        scratch = "none shown" if self._measured(SCRATCH, saved.everything) else "not measured"
        if alone.labels is not None:
            scratch = f"{alone.labels} of {saved.everything}"
        instead = f"{saved.labels} instead of {saved.everything}"
        return f"{100 * saved.share:.0f} % of labels saved ({instead}; by scratch alone: {scratch})"

    def _cases(self, arm: str, against: str, labels: int, step: int, last: int, pairs: list[int]) -> float:
        frame = self.results[(self.results.labels == labels) & self.results.subset.isin(pairs)]
        sides = [
            frame[(frame.arm == name) & (frame.step == at)].groupby("case")[self.metric].mean()
            for name, at in ((arm, step), (against, last))
        ]
        return case_wilcoxon((sides[0] - sides[1]).to_numpy())


def rounded_p(p: float) -> str:
    """'0.031', or '< 0.001'."""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def significance(p: float) -> str:
    """'p = 0.031', or 'p < 0.001'."""
    text = rounded_p(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def interval(e: Effect) -> str:
    """[low, high] in points; open where there are too few pairs for an interval."""
    if not math.isfinite(e.low):
        return "[-, -]"
    return f"[{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def count(number: int, noun: str) -> str:
    """'1 label', '2 labels'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
