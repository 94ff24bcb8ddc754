"""Settings that have other names now."""

import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.renamed import rename_settings


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"most_nonfinite": 3, "max_nonfinite_batches": 5},
            "one of the settings most_nonfinite and max_nonfinite_batches, got both. Remove most_nonfinite",
        ),
        ({"dino": {"hidden_dim": 8, "hidden": 16}}, "one of the settings hidden and hidden_dim in dino, got both"),
    ],
)
def test_a_setting_under_both_names_is_refused(settings: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        rename_settings(settings)
