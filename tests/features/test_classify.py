"""Cross-validation of simple classifiers."""

from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.features.classify import _interval, cross_validate, read_labels

LABELS = ["a", "b"] * 20
PAIRS = [str(number // 2) for number in range(40)]
CASES = [str(number) for number in range(40)]


def noise(columns: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((40, columns))


def test_labels_that_show_are_recognized() -> None:
    shown = noise() + np.array([label == "a" for label in LABELS])[:, None] * 8
    for score in cross_validate(shown, LABELS, PAIRS):
        assert (score.accuracy, score.low, score.high, score.chance) == (1, 1, 1, 0.5)
        assert (score.cases, score.groups, score.folds) == (40, 20, 5)


def test_intervals_of_noise_hold_chance() -> None:
    found = [cross_validate(noise(seed=seed), LABELS, PAIRS) for seed in (1, 2)]
    assert cross_validate(noise(seed=1), LABELS, PAIRS) == found[0]
    assert sum(score.low <= 0.5 <= score.high for scores in found for score in scores) >= 3
    assert all(score.low < score.accuracy < score.high for scores in found for score in scores)


def test_cases_of_a_group_are_on_one_side() -> None:
    """Columns that show only the patient, who has one label, tell nothing about other patients."""
    groups = [str(number // 5) for number in range(40)]
    labels = [str(int(group) % 2) for group in groups]
    vectors = np.random.default_rng(1).standard_normal((8, 30)).repeat(5, 0) + 0.01 * noise(30)
    alone, grouped = (cross_validate(vectors, labels, names)[1].accuracy for names in (CASES, groups))
    assert alone > 0.8
    assert grouped < 0.75


def test_rare_labels_weigh_as_much_as_frequent_ones() -> None:
    labels = ["rare"] * 4 + ["frequent"] * 36
    for score in cross_validate(np.zeros((40, 1)), labels, CASES):
        assert score.accuracy == pytest.approx(0.5, abs=0.15)
        assert score.folds == 4


@pytest.mark.parametrize("labels", [["a"] * 40, ["b"] + ["a"] * 39])
def test_too_few_labels(labels: list[str]) -> None:
    with pytest.raises(UserError, match="two groups of cases each, got"):
        cross_validate(noise(), labels, CASES)


def test_labels_and_groups_are_read(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("case,label,group,site\np1_a,ill,x,1\np1_b,well,x,\np2_a,ill,y,2\np3_a,,y,2\n")
    assert read_labels(file, None)["group"].tolist() == ["x", "x", "y"]
    assert read_labels(file, "site")["group"].tolist() == ["1", "p1_b", "2"]
    assert read_labels(file, "(p[0-9])_")["group"].tolist() == ["p1", "p1", "p2"]
    assert read_labels(file, "^p[0-9]")["group"].tolist() == ["p1", "p1", "p2"]
    assert read_labels(file, None)["label"].to_dict() == {"p1_a": "ill", "p1_b": "well", "p2_a": "ill"}


@pytest.mark.parametrize(
    ("text", "group_by", "message"),
    [
        ("case,kind\na,b\n", None, "columns case and label"),
        ("case,label\na,x\na,y\n", None, "each case once in .*, got a again"),
        ("case,label\na,x\nb,y\n", "c(.)", "got none of 'c\\(.\\)' in a, b"),
        ("case,label\na,x\nb,y\n", "(", "expected a regular expression"),
    ],
)
def test_unusable_labels(tmp_path: Path, text: str, group_by: str | None, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_labels(tmp_path / "labels.csv", group_by)
    assert "\n" not in str(error.value)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected a csv file"):
        read_labels(tmp_path / "absent.csv", None)


def test_names_that_pandas_takes_for_missing_values_are_names(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("case,label,group\nNA,None,null\nnan,n/a,\nleft out,,x\n")
    found = read_labels(file, None)
    assert found["label"].to_dict() == {"NA": "None", "nan": "n/a"}
    assert found["group"].tolist() == ["null", "nan"]


def test_a_fold_whose_training_cases_have_one_label_is_refused() -> None:
    """One group holds all cases of a label but one."""
    groups = ["z", "x", "y", "z", "x", "x"]
    with pytest.raises(UserError, match="two labels or more in the training cases of each fold, got only"):
        cross_validate(noise()[:6], ["a", "b", "a", "b", "b", "b"], groups)


def test_the_bootstrap_draws_groups() -> None:
    right, truth, members = np.array([1, 0, 1, 1, 0.0]), np.array([0, 0, 1, 1, 1]), np.arange(5)
    # more scans of the same patients do not narrow the interval
    more = [np.repeat(values, 9) for values in (right, truth, members)]
    assert _interval(more[0], more[1], more[2], 0) == pytest.approx(_interval(right, truth, members, 0))


def test_lines_may_end_with_a_comma_and_a_table_must_have_rows(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("case,label\np1,A,\np2,B,\n")
    assert read_labels(path, None)["label"].to_dict() == {"p1": "A", "p2": "B"}
    path.write_text("case,label\n")
    with pytest.raises(UserError, match="Expected rows with a case and a label in .*, got none"):
        read_labels(path, None)
