"""Dice as nnU-Net's, surface Dice as the Decathlon's."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnssl_ext.study.metrics import fold_metrics, normalised_surface_dice, read_labels, run_scores, tolerance_of


def cube(shift: int, size: int = 20) -> np.ndarray:
    mask = np.zeros((size,) * 3, dtype=bool)
    mask[5 + shift : 15 + shift, 5:15, 5:15] = True
    return mask


def test_surface_dice_of_a_shifted_cube() -> None:
    assert normalised_surface_dice(cube(0), cube(0), (1.0, 1.0, 1.0), 0.5) == pytest.approx(1.0)
    # two of six faces are off by 2 mm, the others only near their edges
    far = normalised_surface_dice(cube(0), cube(2), (1.0, 1.0, 1.0), 1.0)
    assert 0.55 < far < 0.75
    assert normalised_surface_dice(cube(0), cube(2), (1.0, 1.0, 1.0), 2.1) == pytest.approx(1.0)
    # the same shift in voxels is twice as many millimetres along a thick axis
    assert normalised_surface_dice(cube(0), cube(2), (2.0, 1.0, 1.0), 2.1) < 0.9


def test_surface_dice_at_the_edge_of_the_image() -> None:
    whole = np.ones((8, 8, 8), dtype=bool)
    assert normalised_surface_dice(whole, whole, (1.0, 1.0, 1.0), 1.0) == pytest.approx(1.0)


def test_surface_dice_without_a_class() -> None:
    nothing = np.zeros((8, 8, 8), dtype=bool)
    assert np.isnan(normalised_surface_dice(nothing, nothing, (1.0,) * 3, 1.0))
    assert normalised_surface_dice(nothing, cube(0), (1.0,) * 3, 1.0) == 0.0


def test_tolerances() -> None:
    def of(dataset: str, *classes: str) -> float:
        return tolerance_of(dataset, {"labels": {"background": 0, **dict.fromkeys(classes, 1)}})

    assert of("Dataset004_Hippocampus", "Anterior", "Posterior") == 1.0
    assert of("Dataset702_Heart", "Left Atrium") == 4.0
    assert of("Dataset027_Heart", "LV", "RV") == 2.0  # another data set of this name
    assert of("Dataset802_LeftAtrium", "left atrium") == 2.0


def test_fold_metrics_reads_regions_and_ignores_the_ignored(tmp_path: Path) -> None:
    truth, predicted = tmp_path / "truth", tmp_path / "validation"
    for folder in (truth, predicted):
        folder.mkdir()
    expected = cube(0).astype(np.uint8) + cube(0, 20) * 0
    expected[:2] = 3
    found = cube(2).astype(np.uint8)
    found[:2] = 1  # where nothing is to be judged
    for folder, volume in ((truth, expected), (predicted, found)):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), str(folder / "a.nii.gz"))
    rows = [{"prediction_file": str(predicted / "a.nii.gz"), "metrics": {"(1, 2)": {"Dice": 0.8}}}]
    (predicted / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
    labels = {"background": 0, "whole": [1, 2], "ignore": 3}
    frame = fold_metrics(predicted, truth, {"labels": labels}, 1.0, SimpleITKIO())
    assert frame["organ"].tolist() == ["whole"]
    assert frame["dice"].tolist() == [0.8]
    assert frame["nsd"][0] == pytest.approx(normalised_surface_dice(cube(2), cube(0), (1.0,) * 3, 1.0))


def test_a_runs_score_is_the_mean_of_class_means() -> None:
    rows = [("r", "a", "x", 1.0), ("r", "b", "x", 0.5), ("r", "a", "y", np.nan), ("r", "b", "y", 0.25)]
    frame = pd.DataFrame(rows, columns=["run", "case", "organ", "dice"])
    assert run_scores(frame, "dice", ["run"]).tolist() == [pytest.approx((0.75 + 0.25) / 2)]


def test_surfaces_are_measured_along_the_axes_of_the_image(tmp_path: Path) -> None:
    """Slices 3 mm thick: a shift by one slice is beyond 2 mm, one by a voxel in the plane is not."""
    found = {}
    for axis in range(3):
        folder = tmp_path / str(axis)
        for name, volume in (("truth", cube(0)), ("validation", np.roll(cube(0), 1, axis))):
            (folder / name).mkdir(parents=True)
            image = SimpleITK.GetImageFromArray(volume.astype(np.uint8))
            image.SetSpacing((1.0, 1.0, 3.0))
            SimpleITK.WriteImage(image, str(folder / name / "a.nii.gz"))
        rows = [{"prediction_file": str(folder / "validation" / "a.nii.gz"), "metrics": {"1": {"Dice": 0.9}}}]
        (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
        # nnU-Net takes a label as a number, as text or as a list of one
        labels = {"labels": {"background": 0, "whole": [1, "1", [1]][axis]}}
        frame = fold_metrics(folder / "validation", folder / "truth", labels, 2.0, SimpleITKIO())
        found[axis] = frame["nsd"][0]
    assert found[0] < 0.9
    assert found[1] == found[2] == pytest.approx(1.0)


def test_images_that_only_nibabel_reads_are_read_by_it(tmp_path: Path) -> None:
    """Plans name the reader: SimpleITK refuses directions that are not orthonormal."""
    affine = np.array([[1.0, 0.2, 0, 0], [0, 1.0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1.0]])
    file = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(cube(0).astype(np.uint8).transpose(2, 1, 0), affine), file)
    with pytest.raises(RuntimeError, match="orthonormal"):
        read_labels(file, SimpleITKIO())
    labels, spacing = read_labels(file, NibabelIO())
    assert np.array_equal(labels, cube(0))
    assert spacing == pytest.approx((3.0, 1.02, 1.0), abs=0.01)


def test_a_class_that_no_case_shows_does_not_count(tmp_path: Path) -> None:
    """One wrong voxel of it would halve the mean over classes."""
    for name in ("truth", "validation"):
        (tmp_path / name).mkdir()
        volume = cube(0).astype(np.uint8)
        volume[0, 0, 0] = 2 * (name == "validation")
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), str(tmp_path / name / "a.nii.gz"))
    metrics = {"1": {"Dice": 1.0}, "2": {"Dice": 0.0}}
    rows = [{"prediction_file": str(tmp_path / "validation" / "a.nii.gz"), "metrics": metrics}]
    (tmp_path / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
    labels = {"labels": {"background": 0, "organ": 1, "rare": 2}}
    frame = fold_metrics(tmp_path / "validation", tmp_path / "truth", labels, 1.0, SimpleITKIO())
    for value in ("dice", "nsd"):
        assert run_scores(frame.assign(run="r"), value, ["run"]).tolist() == [1.0]
