"""Sources and targets whose data differ: warnings with figures, and plans like the source's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nnssl_ext.cli import main
from nnssl_ext.configurations import configuration_of
from nnssl_ext.errors import UserError
from nnssl_ext.transfer.differences import differences, plans_like
from nnssl_ext.transfer.source import SourceGeometry
from tests.conftest import Environment
from tests.datasets import make_plans
from tests.transfer.files import stock_file

Data = Callable[[str], Environment]
CT = SourceGeometry((3.0, 1.0, 1.0), None, (16, 32, 32), ("CTNormalization",), ("CT",))
MR = SourceGeometry((1.5, 1.0, 1.0), None, (16, 16, 16), ("ZScoreNormalization",), ("T1",))


def test_each_difference_is_named_with_its_size() -> None:
    assert differences(CT, MR) == [
        "Normalization differs: CTNormalization in the source, ZScoreNormalization here.",
        "Spacing differs: 3 x 1 x 1 mm in the source, 1.5 x 1 x 1 mm here, factors 0.5 x 1 x 1.",
        "Plans like the source's: nnssl_ext plan -d DATASET -c CONFIGURATION -o NAME --like-source FILE.",
        "Modality differs: CT in the source, T1 here.",
    ]


def test_schemes_are_compared_channel_by_channel() -> None:
    both = ("CTNormalization", "ZScoreNormalization")
    one, other = (SourceGeometry(normalization=schemes) for schemes in (both, both[::-1]))
    assert differences(one, other)[0].startswith("Normalization differs: CTNormalization, ZScoreNormalization in the")
    masked, whole = (SourceGeometry(masked=(value,)) for value in (True, False))
    assert differences(masked, whole)[0] == (
        "Normalization differs: within the image's mask in the source, over the whole image here."
    )


def test_the_fixed_numbers_of_ct_are_compared_and_taken() -> None:
    lung, liver = (
        replace(CT, intensities=({"mean": mean, "std": 300, "percentile_00_5": -1000, "percentile_99_5": 400},))
        for mean in (-600, 100)
    )
    assert differences(lung, lung) == []
    assert differences(lung, liver)[0] == (
        "The numbers of CTNormalization differ: mean -600, deviation 300, clipped to -1000 to 400 in the source, mean "
        "100, deviation 300, clipped to -1000 to 400 here."
    )
    assert "The source does not record them: compare them with mean 100" in differences(CT, liver)[0]
    assert differences(lung, CT) == []
    pet = {**liver.intensities[0], "mean": 5}
    two = [
        replace(lung, normalization=(*CT.normalization, "ZScoreNormalization"), intensities=(*lung.intensities, row))
        for row in (pet, {**pet, "mean": 6})
    ]
    assert differences(*two) == []  # the numbers of z-scores are the image's own
    plans = make_plans("plain")
    changed, _ = plans_like(plans, replace(lung, masked=(True,)), "like", ["3d_fullres"])
    assert changed["foreground_intensity_properties_per_channel"] == {"0": dict(lung.intensities[0])}
    assert changed["configurations"]["3d_fullres"]["use_mask_for_norm"] == [True]
    assert changed["configurations"]["2d"]["data_identifier"] == "like_2d"  # its data have the old numbers
    assert configuration_of(changed, "3d_cascade_fullres")["data_identifier"] == "like_3d_fullres"
    changed, lines = plans_like(plans, CT, "like", ["3d_fullres"])
    assert (
        changed["foreground_intensity_properties_per_channel"] == plans["foreground_intensity_properties_per_channel"]
    )
    assert lines[0] == "CTNormalization keeps this data set's numbers: the source does not record its own"


def test_what_is_equal_or_not_recorded_is_no_difference() -> None:
    assert differences(CT, CT) == differences(SourceGeometry(), MR) == differences(CT, SourceGeometry()) == []
    near = SourceGeometry((3.2, 1.0, 1.0), None, None, ("CTNormalization",), ("ct", "PET"))
    assert differences(CT, near) == []


def test_plans_get_spacing_normalization_and_a_legal_patch() -> None:
    plans = make_plans("two_channel")
    changed, lines = plans_like(plans, CT, "like", ["3d_fullres"])
    before, after = plans["configurations"]["3d_fullres"], changed["configurations"]["3d_fullres"]
    assert after["spacing"] == [3.0, 1.0, 1.0]
    assert after["patch_size"] == [16, 32, 32]
    assert after["normalization_schemes"] == ["CTNormalization", "CTNormalization"]
    assert after["data_identifier"] == "like_3d_fullres" != before["data_identifier"]
    extent = [size * edge for size, edge in zip(before["median_image_size_in_voxels"], before["spacing"], strict=True)]
    assert [
        size * edge for size, edge in zip(after["median_image_size_in_voxels"], after["spacing"], strict=True)
    ] == pytest.approx(extent)
    assert lines[1:] == ["3d_fullres: spacing 3 x 1 x 1 mm, CTNormalization, patch 16 x 32 x 32"]
    odd = SourceGeometry(None, None, (17, 30, 33))
    assert plans_like(plans, odd, "like", ["3d_fullres"])[0]["configurations"]["3d_fullres"]["patch_size"] == [
        16,
        32,
        32,
    ]
    plans["configurations"]["heir"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    assert plans_like(plans, CT, "like", ["heir"])[0]["configurations"]["heir"]["spacing"] == [3.0, 1.0, 1.0]
    with pytest.raises(UserError, match="got one that records none"):
        plans_like(plans, SourceGeometry(), "like", ["3d_fullres"])


def test_the_commands_warn_and_plan(with_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("plain")
    given = make_plans("plain")
    given["configurations"]["3d_fullres"].update(spacing=[2.0, 1.0, 1.0], normalization_schemes=["CTNormalization"])
    stock_file(tmp_path / "stock.pth", given, "plain")
    words = ["-d", "811", "-c", "3d_fullres"]
    assert main(["transfer", str(tmp_path / "stock.pth"), *words, "-o", str(tmp_path / "init.pth")]) == 0
    printed = capsys.readouterr().out
    assert "Normalization differs: CTNormalization in the source, ZScoreNormalization here." in printed
    assert "factors 0.5 x 1 x 1" in printed
    assert main(["plan", *words, "-o", "like", "--like-source", str(tmp_path / "stock.pth")]) == 0
    assert "preprocess the data again: nnUNetv2_preprocess -d 811 -plans_name like -c 3d_fullres" in (
        capsys.readouterr().out
    )
    plans = json.loads((environment.dataset("plain") / "like.json").read_text())
    assert plans["configurations"]["3d_fullres"]["spacing"] == [2.0, 1.0, 1.0]
    assert main(["transfer", str(tmp_path / "stock.pth"), *words, "-p", "like", "-o", str(tmp_path / "same.pth")]) == 0
    assert "differs" not in capsys.readouterr().out


def test_channels_in_another_order_are_told() -> None:
    source, target = (SourceGeometry(modalities=names) for names in (("FLAIR", "T1w"), ("T1w", "FLAIR")))
    (line,) = differences(source, target)
    assert line == "Channels are in another order: FLAIR, T1w in the source, T1w, FLAIR here. They are not reordered."
    assert differences(source, source) == []
