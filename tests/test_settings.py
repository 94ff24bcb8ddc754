from dataclasses import dataclass, field

import pytest

from nnssl_ext.errors import UserError
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
