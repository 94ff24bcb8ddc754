"""A folder as a hospital exports it: the right volumes, and a list of the rest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Environment
from tests.data.corpus.test_corpus import make
from tests.data.corpus.test_dicom import DICOMDIR, REPORT, STRUCTURES
from tests.volumes import volume, write_dicom, write_enhanced, write_series


def scout(_: int) -> dict[str, list[str]]:
    """Elements of a localizer."""
    return {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}


def write_export(root: Path) -> None:
    """Two CTs, an MR with two echoes, an enhanced CT, and what comes with them."""
    images = root / "DICOM"
    for patient in range(2):
        folder = images / f"P{patient}"
        write_series(folder / "CT", volume(patient), uid=f"1.2.{patient}.1", modality="CT")
        write_series(folder / "SCOUT", volume(patient)[:1], uid=f"1.2.{patient}.2", modality="CT", more=scout)
    write_series(
        images / "P0" / "MR",
        np.repeat(volume(5), 2, axis=0),
        uid="1.2.0.3",
        more=lambda k: {
            "EchoNumbers": k % 2 + 1,
            "EchoTime": 10 + 70 * (k % 2),
            "RescaleSlope": 1 + k % 2,
            "RescaleIntercept": 3 * (k % 2),
            "ImagePositionPatient": [0, 0, 2 * (k // 2)],
        },
    )
    write_enhanced(images / "P1" / "enhanced.dcm", volume(6)[::-1], [2.0 * k for k in range(11, -1, -1)], uid="1.2.1.3")
    write_dicom(images / "P0" / "RT" / "1.dcm", None, sop=STRUCTURES, Modality="RTSTRUCT", SeriesInstanceUID="1.2.0.4")
    write_dicom(images / "P0" / "SR" / "1.dcm", None, sop=REPORT, Modality="SR", SeriesInstanceUID="1.2.0.5")
    write_dicom(root / "DICOMDIR", None, sop=DICOMDIR)
    (root / "letter.pdf").write_bytes(b"%PDF-1.7")
    (root / "viewer.zip").write_bytes(b"PK\x03\x04")


def test_an_export_gives_its_volumes_and_a_list(
    with_data: Callable[[str], Environment], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_data("plain")
    root = tmp_path / "export"
    write_export(root)
    made = make(root)  # with the default --max-failures
    assert made["counts"] == {"kept": 5, "duplicate": 0, "unusable": 0, "no image": 5}
    kept = sorted(
        (row["series"], row["modality"], row["shape"], row["remarks"]) for row in made["volumes"] if row["case"]
    )
    assert kept == [
        ("1.2.0.1", "CT", [12, 14, 16], []),
        ("1.2.0.3", "MR", [12, 14, 16], ["echo 1"]),
        ("1.2.0.3", "MR", [12, 14, 16], ["echo 2"]),
        ("1.2.1.1", "CT", [12, 14, 16], []),
        ("1.2.1.3", "CT", [12, 14, 16], []),
    ]
    listed = [line.partition(", as ")[0] for line in capsys.readouterr().err.splitlines() if ", as " in line]
    assert listed == [
        "passed by: 1 x DICOMDIR",
        "passed by: 1 x RTSTRUCT",
        "passed by: 1 x SR",
        "passed by: 2 x localizer",
        "not read: 1 x .pdf",
        "not read: 1 x .zip",
    ]
    assert make(root) == made
