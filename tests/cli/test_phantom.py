from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.study.demo.phantom import PhantomOptions, make_case

SMALL = ["--cases", "8", "--labelled", "5", "--test", "2", "--spacing", "4", "4", "4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "a b/c"], "a data set's name has letters, digits, '_', '.' and '-', got 'a b/c'"),
        (["-n", "../x"], "got '../x'"),
        (["-n", ""], "got ''"),
        (["-n", "Other"], "has Dataset900_Phantom, which nnU-Net also finds as 900. Give another -d"),
        (["-d", "900", "-n", "Second"], "has Dataset900_Phantom, which nnU-Net also finds as 900"),
        (["-d", "901", "--spacing", "nan", "1", "1"], "--spacing must be three lengths in mm"),
        (["-d", "901", "--spacing", "inf", "1", "1"], "--spacing must be three lengths in mm"),
        (["-d", "1000"], "has three digits, got 1000"),
    ],
)
def test_what_would_be_no_data_set_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "Dataset900_Phantom").mkdir()
    with pytest.raises(UserError) as error:
        main(["phantom", "-o", str(tmp_path), *SMALL, *words])
    assert message in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["Dataset900_Phantom"]


def test_no_bar_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["phantom", "-o", str(tmp_path), "-n", "My-Data.v1", *SMALL]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"wrote {tmp_path / 'Dataset900_My-Data.v1'}")
    assert "Making cases" not in err


def test_a_call_that_is_stopped_leaves_nothing_and_a_later_one_writes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(options: PhantomOptions, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number == 3:
            raise KeyboardInterrupt
        return make_case(options, number)

    words = ["phantom", "-o", str(tmp_path / "raw"), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("nnssl_ext.study.demo.phantom.make_case", stopped)
        assert main(words) == 130
    assert list((tmp_path / "raw").iterdir()) == []
    assert main(words) == 0
    assert len(list((tmp_path / "raw" / "Dataset900_Phantom" / "imagesTr").iterdir())) == 8
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["Dataset900_Phantom"]
    with pytest.raises(UserError, match="Dataset900_Phantom exists. Remove it"):
        main(words)
