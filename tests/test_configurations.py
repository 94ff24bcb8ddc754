"""Plans as stock nnU-Net reads them."""

import warnings
from copy import deepcopy

import pytest

from nnssl_ext.configurations import configuration_of, configurations_3d, total_stride, unusable
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import Recipe, derive_plans
from tests.datasets import make_plans

#: nnU-Net's plans of a small data set.
PLANS = make_plans("plain")

#: A configuration as nnunetv2 2.0 to 2.2 wrote it.
OLD = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "batch_size": 2,
    "patch_size": [32, 32, 32],
    "spacing": [1.0, 1.0, 1.0],
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 8,
    "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "num_pool_per_axis": [2, 2, 2],
    "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "conv_kernel_sizes": [[3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "unet_max_num_features": 320,
}


def plans(**configurations: dict) -> dict:
    return {"plans_name": "nnUNetPlans", "dataset_name": "Dataset004_T", "configurations": configurations}


def test_inherited_values_are_filled_in_and_the_plans_stay() -> None:
    given = plans(**PLANS["configurations"], mine={"inherits_from": "3d_fullres", "batch_size": 7})
    before = deepcopy(given)
    found = configuration_of(given, "mine")
    assert found == {**PLANS["configurations"]["3d_fullres"], "batch_size": 7}
    assert given == before


def test_plans_of_old_versions_are_converted() -> None:
    given = plans(**{"3d_fullres": OLD})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert total_stride(configuration_of(given, "3d_fullres")) == (4, 4, 4)
        recipe = Recipe("r", architecture={"features_base": 4}, configuration={"batch_size": 3})
        derived = derive_plans(given, "new", [recipe], ["3d_fullres"])["configurations"]["3d_fullres"]
    assert derived["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16]
    assert derived["batch_size"] == 3
    assert "UNet_class_name" not in derived
    assert "architecture" not in given["configurations"]["3d_fullres"]


def test_a_derived_parent_is_still_inherited_by_those_that_are_not_named() -> None:
    full = PLANS["configurations"]["3d_fullres"]
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    given = plans(**{"3d_fullres": full, "3d_cascade_fullres": cascade})
    derived = derive_plans(given, "new", [Recipe("r", configuration={"batch_size": 5})], ["3d_fullres"])
    assert derived["configurations"]["3d_cascade_fullres"] == cascade
    assert configuration_of(derived, "3d_cascade_fullres")["batch_size"] == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "have no configuration 'absent'. They have 3d_fullres, circle, orphan, unknown"),
        ("circle", "configuration 'circle' cannot be resolved: Circular dependency"),
        ("orphan", "configuration 'orphan' cannot be resolved: The configuration nobody does not exist"),
        ("unknown", "configuration 'unknown' cannot be resolved: Unknown architecture Foo"),
    ],
)
def test_what_cannot_be_resolved_is_one_line(name: str, message: str) -> None:
    given = plans(
        **{"3d_fullres": PLANS["configurations"]["3d_fullres"]},
        circle={"inherits_from": "circle"},
        orphan={"inherits_from": "nobody"},
        unknown={**OLD, "UNet_class_name": "Foo"},
    )
    warnings.simplefilter("ignore")  # pytest restores it
    with pytest.raises(UserError, match=message):
        configuration_of(given, name)


def test_only_volumes_without_a_stage_before_them_are_pretrained() -> None:
    full = PLANS["configurations"]["3d_fullres"]
    given = plans(
        **{
            "2d": {**full, "patch_size": [32, 32]},
            "3d_fullres": full,
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "mine": {"inherits_from": "3d_fullres"},
        }
    )
    assert list(configurations_3d(given)) == ["3d_fullres", "mine"]
    assert "is 2-D; pretrain 3d_fullres" in unusable("2d", configuration_of(given, "2d"), "pretrain")
    assert unusable("2d", configuration_of(given, "2d"), "transfer to", flat=True) == ""
    assert "is a cascade stage" in unusable("c", configuration_of(given, "3d_cascade_fullres"), "pretrain")
    with pytest.raises(UserError, match="Expected an object 'configurations', got NoneType"):
        configurations_3d({"plans_name": "x"})
