from dataclasses import dataclass, field

import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.methods import SCHEMAS
from nnssl_ext.renamed import rename_settings
from nnssl_ext.settings import CommonSettings, check_settings, setting, split_sections


@dataclass(frozen=True)
class Inner:
    rate: float = setting(0.5, "A rate.", low=0, high=1)


@dataclass(frozen=True)
class Example:
    count: int | None = setting(None, "A count.", low=1)
    name: str = setting("a", "A name.", choices=("a", "b"))
    on: bool = setting(False, "A switch.")
    limits: list[float] = setting([0.0, 1.0], "Limits.", length=2)
    inner: Inner = field(default_factory=Inner)


def test_defaults_and_values() -> None:
    assert check_settings(Example, {}, "f") == Example()
    given = {"count": 3, "name": "b", "on": True, "limits": [1, 2], "inner": {"rate": 1}}
    assert check_settings(Example, given, "f") == Example(3, "b", True, [1.0, 2.0], Inner(1.0))
    assert isinstance(check_settings(Example, given, "f").inner.rate, float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cuont": 1}, "f: unknown setting 'cuont'; did you mean 'count'?"),
        ({"inner": {"rat": 1}}, "f: unknown setting 'inner.rat'; did you mean 'inner.rate'?"),
        ({"count": 1.5}, "f: setting 'count' must be int, got 1.5 (float)"),
        ({"count": True}, "f: setting 'count' must be int, got True (bool)"),
        ({"count": 0}, "f: setting 'count' must be at least 1, got 0"),
        ({"name": None}, "f: setting 'name' must be str, got None (NoneType)"),
        ({"name": "c"}, "f: setting 'name' must be one of a, b, got 'c'"),
        ({"limits": 3}, "f: setting 'limits' must be a list of float, got 3"),
        ({"limits": [1]}, "f: setting 'limits' must have 2 entries, got [1]"),
        ({"limits": [1, "2"]}, "f: setting 'limits' must be float, got '2' (str)"),
        ({"inner": {"rate": 2}}, "f: setting 'inner.rate' must be 0 to 1, got 2.0"),
        ({"inner": {"rate": float("nan")}}, "f: setting 'inner.rate' must be a finite number, got nan"),
        ({"inner": 3}, "f: section 'inner' must be an object of settings, got 3"),
    ],
)
def test_errors_name_setting_file_and_expectation(given: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_settings(Example, given, "f")
    assert str(error.value) == f"nnssl_ext: error: {message}"


def test_sections_are_all_checked() -> None:
    common, methods = split_sections({"epochs": 3, "example": {"count": 2}}, {"example": Example}, "f")
    assert common == CommonSettings(epochs=3)
    assert methods == {"example": Example(2)}
    with pytest.raises(UserError, match=r"unknown setting 'exmaple'; did you mean 'example'\?"):
        split_sections({"exmaple": {}}, {"example": Example}, "f")
    with pytest.raises(UserError, match=r"'example\.cuont'"):
        split_sections({"example": {"cuont": 2}}, {"example": Example}, "f")
    with pytest.raises(UserError, match="must be an object"):
        split_sections([], {"example": Example}, "f")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"most_unreadable": 0.1}, "'most_unreadable' is called 'max_unreadable_fraction'"),
        ({"finetune": {"encoder_rate": 1.0}}, "'finetune.encoder_rate' is called 'finetune.encoder_lr_scale'"),
        ({"finetune": {"warm_up": 3}}, "'finetune.warm_up' is called 'finetune.warmup'"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(given: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        split_sections(given, SCHEMAS, "f")


def test_old_plans_are_renamed_by_the_table_and_their_values_kept() -> None:
    old = {
        "epochs": 2,
        "most_nonfinite": 3,
        "finetune": {"average": 0.9, "optimiser": "adamw"},
        "jigsaw": {"hidden": [8], "intensity": {"gamma": [0.7, 1.5], "hidden": 1}},
        "dino": {"momentum": 0.99, "hidden": 16},
        "variable_dimension_transform": {"momentum": 0.9},
    }
    new, changed = rename_settings(old)
    assert new == {
        "epochs": 2,
        "max_nonfinite_batches": 3,
        "finetune": {"weight_average_decay": 0.9, "optimizer": "adamw"},
        "jigsaw": {"hidden_dims": [8], "intensity": {"gamma": [0.7, 1.5], "hidden": 1}},
        "dino": {"teacher_momentum": 0.99, "hidden_dim": 16},
        "variable_dimension_transform": {"momentum": 0.9},
    }
    assert changed["dino.momentum"] == "dino.teacher_momentum"
    assert rename_settings(new) == (new, {})


def test_a_dropped_setting_may_stay_with_the_value_that_holds() -> None:
    section = {"depth": "rgb", "slices": 8, "drift_angle": 10.0, "hidden_dim": 16}
    sections = split_sections({"variable_dimension_transform": section}, SCHEMAS, "f")[1]
    assert sections["variable_dimension_transform"].hidden_dim == 16
    with pytest.raises(UserError, match="unknown setting 'variable_dimension_transform.depth'"):
        split_sections({"variable_dimension_transform": {**section, "depth": "drift"}}, SCHEMAS, "f")


@dataclass(frozen=True)
class Ranges:
    zoom: list[float] = setting([0.5, 2.0], "A range.", length=2)
    between: list[float] | None = setting(None, "A start and an end.", length=2)
    edges: list[int] = setting([3, 2, 1], "Edges.", length=3)


def test_a_range_goes_from_low_to_high() -> None:
    with pytest.raises(UserError, match=r"setting 'zoom' must be a range from low to high, got \[0.8, 0.25\]"):
        check_settings(Ranges, {"zoom": [0.8, 0.25]}, "f")
    given = {"zoom": [0.8, 0.8], "between": [2.0, 1.0], "edges": [3, 2, 1]}
    assert check_settings(Ranges, given, "f") == Ranges(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"count": 10**400}, {"inner": {"rate": -(10**400)}}])
def test_integers_beyond_float_are_no_numbers(given: dict) -> None:
    with pytest.raises(UserError, match=r"must be a finite number"):
        check_settings(Example, given, "f")
