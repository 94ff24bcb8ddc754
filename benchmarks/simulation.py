"""Simulate studies and count how often they call a gain, for the table of docs/evidence/statistics.md.

python -m benchmarks simulation
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnssl_ext.study.statistics import case_wilcoxon, random_effect, sign_flip_ps

#: Two-sided p below which a study calls a difference.
ALPHA = 0.05


@dataclass(frozen=True)
class TruthModel:
    """Sources of variation of a case's Dice.

    Attributes:
        gain: True effect of pretraining, in Dice.
        subset: Standard deviation over label subsets, shared by both sides of a pair.
        run: Standard deviation over runs (initial values, order, augmentation), shared by all cases of a run.
        case: Standard deviation over held-out cases, shared by all runs.
        noise: Standard deviation of a case within a run.
        cases: Number of held-out cases.
        pretraining: Standard deviation over pretraining runs of one method, shared by all pairs of a study.
    """

    gain: float
    subset: float = 0.02
    run: float = 0.01
    case: float = 0.04
    noise: float = 0.01
    cases: int = 16
    pretraining: float = 0.0

    def draw(self, pairs: int, generator: np.random.Generator, runs: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw the Dice of scratch and of the pretrained arm, each (pairs, cases).

        Pair i starts from pretraining run i modulo ``runs``.
        """
        easy = generator.normal(0, self.case, self.cases) + generator.normal(0, self.subset, (pairs, 1))
        sides = [
            easy + generator.normal(0, self.run, (pairs, 1)) + generator.normal(0, self.noise, (pairs, self.cases))
            for _ in range(2)
        ]
        luck = generator.normal(0, self.pretraining, runs)[np.arange(pairs) % runs]
        return sides[0], sides[1] + self.gain + luck[:, None]


def simulate(truth: TruthModel, *, pairs: int, repetitions: int, seed: int) -> float:
    """Return the share of simulated studies whose sign-flip test over paired runs is significant."""
    generator = np.random.default_rng(seed)
    studies = np.empty((repetitions, pairs))
    for study in studies:
        scratch, pretrained = truth.draw(pairs, generator)
        study[:] = pretrained.mean(1) - scratch.mean(1)
    return float(np.mean(sign_flip_ps(studies) <= ALPHA))


def simulate_runs(truth: TruthModel, *, pairs: int, runs: int, repetitions: int, seed: int) -> float:
    """Return the share of significant studies with several pretraining runs as a random effect."""
    generator = np.random.default_rng(seed)
    found = 0
    for _ in range(repetitions):
        scratch, pretrained = truth.draw(pairs, generator, runs)
        differences = pretrained.mean(1) - scratch.mean(1)
        found += random_effect([differences[run::runs].tolist() for run in range(runs)]).p <= ALPHA
    return found / repetitions


def case_level_false_alarms(truth: TruthModel, *, seeds: int, repetitions: int, seed: int) -> float:
    """Return the same share for the usual practice: average a few seeds, then test over cases."""
    generator = np.random.default_rng(seed)
    found = 0
    for _ in range(repetitions):
        scratch, pretrained = truth.draw(seeds, generator)
        found += case_wilcoxon(pretrained.mean(0) - scratch.mean(0)) <= ALPHA
    return found / repetitions


def table(repetitions: int = 1000, seed: int = 0) -> list[str]:
    """Return a Markdown table of the share of studies that call a gain, by true gain and number of pairs."""
    numbers, gains = (6, 8, 12, 16), (0.0, 0.005, 0.01, 0.015, 0.02, 0.03)
    rows = [
        "| true gain (points) | " + " | ".join(f"{n} pairs" for n in numbers) + " | 3 seeds averaged, over cases |",
        "|---|" + "---|" * (len(numbers) + 1),
    ]
    truths = {f"{100 * gain:g}": TruthModel(gain) for gain in gains}
    for spread in (0.005, 0.01, 0.02):
        truths[f"0, pretraining runs differ by {100 * spread:g}"] = TruthModel(0.0, pretraining=spread)
    for name, truth in truths.items():
        shares = [simulate(truth, pairs=n, repetitions=repetitions, seed=seed) for n in numbers]
        shares.append(case_level_false_alarms(truth, seeds=3, repetitions=repetitions, seed=seed))
        rows.append(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    return rows


def runs_table(repetitions: int = 1000, seed: int = 0) -> list[str]:
    """Return a Markdown table of the same shares with several pretraining runs."""
    designs, gains = ((8, 2), (8, 4), (16, 4), (16, 8)), (0.0, 0.02, 0.03, 0.05)
    rows = [
        "| true gain (points) | runs differ by | " + " | ".join(f"{p} pairs, {r} runs" for p, r in designs) + " |",
        "|---|---|" + "---|" * len(designs),
    ]
    for gain in gains:
        for spread in (0.005, 0.01):
            truth = TruthModel(gain, pretraining=spread)
            shares = [simulate_runs(truth, pairs=p, runs=r, repetitions=repetitions, seed=seed) for p, r in designs]
            numbers = " | ".join(f"{100 * share:.1f} %" for share in shares)
            rows.append(f"| {100 * gain:g} | {100 * spread:g} | {numbers} |")
    return rows


if __name__ == "__main__":
    print("\n".join([*table(), "", *runs_table()]))
