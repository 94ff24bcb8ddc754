"""What a run and its checkpoint must share."""

import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.training.pretraining.state import refuse_other_run


def test_a_run_continues_though_a_setting_that_still_holds_was_dropped() -> None:
    mine = {"method": "x", "settings": {"seed": 0, "variable_dimension_transform": {"hidden_dim": 16}}}
    section = {"hidden_dim": 16, "depth": "rgb", "slices": 8}
    stored = {"method": "x", "settings": {"seed": 0, "variable_dimension_transform": section}}
    refuse_other_run(stored, mine, "checkpoint_latest.pth")
    section["depth"] = "drift"
    with pytest.raises(UserError, match="depth is 'drift' there and None here"):
        refuse_other_run(stored, mine, "checkpoint_latest.pth")
