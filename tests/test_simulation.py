"""Simulated studies: false alarms, power, and the documented table."""

import math

import pytest

from benchmarks.simulation import TruthModel, case_level_false_alarms, runs_table, simulate
from tests.conftest import REPOSITORY


def test_a_null_is_not_found_and_a_gain_is() -> None:
    """1,000 studies with run-to-run effects: false alarms at most 5 % within simulation error, power as documented."""
    numbers = 6, 8, 12, 16
    shares = {
        gain: [simulate(TruthModel(gain=gain / 100), pairs=n, repetitions=1000, seed=0) for n in numbers]
        for gain in (0.0, 1.5, 2.0)
    }
    error = 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert max(shares[0.0]) <= 0.05 + error
    assert shares[1.5] == sorted(shares[1.5])
    assert shares[1.5][-1] > 0.8
    assert shares[2.0][1] > 0.6
    documented = (REPOSITORY / "docs" / "evidence" / "statistics.md").read_text(encoding="utf-8")
    for gain, found in shares.items():
        assert f"| {gain:g} | " + " | ".join(f"{100 * share:.1f} %" for share in found) + " | " in documented


def test_testing_over_cases_finds_what_is_not_there() -> None:
    """The trap: three seeds averaged, then a test over cases, on a true null."""
    assert case_level_false_alarms(TruthModel(gain=0.0), seeds=3, repetitions=1000, seed=0) > 0.3


@pytest.mark.integration
def test_several_pretraining_runs_give_few_false_alarms_and_the_documented_power() -> None:
    rows = runs_table()
    documented = (REPOSITORY / "docs" / "evidence" / "statistics.md").read_text(encoding="utf-8")
    assert all(row in documented for row in rows)
    shares = {
        (float(gain), float(spread)): [float(share.rstrip("% ")) / 100 for share in rest]
        for gain, spread, *rest in ([cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:])
    }
    error = 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert max(shares[0.0, 0.5] + shares[0.0, 1.0]) <= 0.05 + error
    assert shares[3.0, 1.0][0] < 0.5 < 0.8 < shares[3.0, 1.0][-1]
