from pathlib import Path

import pytest

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError

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
