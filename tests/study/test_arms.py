"""Names of arms."""

from pathlib import Path

import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.study.arms import arms_of


def test_names_that_differ_in_case_only_share_a_folder_on_some_systems(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.touch()
    with pytest.raises(UserError, match="Two arms have the same name"):
        arms_of(["VolumeFusion"], [f"volumefusion={file}"], 0)
    with pytest.raises(UserError, match="Two arms have the same name"):
        arms_of([], [f"mine={file}", f"Mine={file}"], 0)
    with pytest.raises(UserError, match="two recipes have the same name"):
        arms_of(["VolumeFusion"], [], 0, ["a=finetune_stock", "A=finetune_stock"])
