import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, SCHEMAS
from nnssl_ext.recipe import (
    Recipe,
    assignments_recipe,
    available_recipes,
    derive_plans,
    load_recipe,
    read_json,
    recipes_of,
    total_stride,
)
from nnssl_ext.settings import split_sections
from nnssl_ext.training.checks import check_plans
from tests.datasets import make_labels, make_plans


@pytest.mark.parametrize("name", available_recipes())
def test_every_recipe_gives_plans_that_every_method_takes(name: str) -> None:
    plans = derive_plans(make_plans("plain"), "p", [load_recipe(name)], ["3d_fullres"])
    for method in METHODS.values():
        check_plans(method, plans, "3d_fullres", {"channel_names": {"0": "MR"}, **make_labels("plain")})


def network_of(configuration: dict) -> Any:
    plan = configuration["architecture"]
    return get_network_from_plans(
        plan["network_class_name"], plan["arch_kwargs"], plan["_kw_requires_import"], 1, 3, deep_supervision=True
    )


def test_the_papers_recipes_say_what_the_papers_say() -> None:
    _, arxiv = split_sections(load_recipe("volume_fusion_paper_arxiv").settings, SCHEMAS, "arxiv")
    _, tip = split_sections(load_recipe("volume_fusion_paper_tip").settings, SCHEMAS, "tip")
    assert (arxiv["volume_fusion"].foreground_case, arxiv["volume_fusion"].layout) == ("other", "boxes")
    assert (tip["volume_fusion"].foreground_case, tip["volume_fusion"].layout) == ("same", "grid")
    assert tip["volume_fusion"].intensity.invert_probability == 0.25
    for paper in (arxiv, tip):
        assert paper["volume_fusion"].ignore_below == 0
        assert paper["volume_fusion"].optimizer == "adam"


def test_mis_fm_says_what_the_paper_says() -> None:
    recipe = load_recipe("mis_fm")
    assert recipe.settings["volume_fusion"] == load_recipe("volume_fusion_paper_arxiv").settings["volume_fusion"]
    common, _ = split_sections(recipe.settings, SCHEMAS, "mis_fm")
    assert (common.batch_size, common.learning_rate, common.epochs * common.iterations_per_epoch) == (4, 1e-3, 100_000)
    plans = derive_plans(make_plans("plain"), "p", [recipe], ["3d_fullres"])["configurations"]["3d_fullres"]
    assert plans["patch_size"] == [64, 128, 128]
    with torch.device("meta"):
        network = network_of(plans)
    assert sum(parameter.numel() for parameter in network.parameters()) == 45_288_338  # 45.29 M, 3 classes
    assert network.resolution_mode == 1
    assert not network.pyramid_ct.convtrans_e2.trans.blocks[0].mask_padding


@pytest.mark.parametrize(
    ("name", "spacing", "patch", "expected", "strides"),
    [
        ("vit_small", [1.0, 1.0, 1.0], [40, 56, 40], [48, 64, 48], (16, 16, 16)),
        ("vit_small", [1.0, 1.0, 1.0], [128, 112, 160], [96, 96, 96], (16, 16, 16)),
        ("vit_base", [5.0, 1.0, 1.0], [14, 256, 256], [16, 96, 96], (4, 16, 16)),
        ("pct_net", [3.0, 1.0, 1.0], [20, 320, 256], [24, 128, 128], (8, 16, 16)),
        ("pct_net", [6.0, 1.0, 1.0], [20, 320, 256], [20, 128, 128], (4, 16, 16)),
    ],
)
def test_another_network_gets_strides_for_the_spacing_and_a_patch_it_takes(
    name: str, spacing: list, patch: list, expected: list, strides: tuple
) -> None:
    plans = make_plans("plain")
    plans["configurations"]["3d_fullres"] |= {"spacing": spacing, "patch_size": patch}
    derived = derive_plans(plans, "p", [load_recipe(name)], ["3d_fullres"])
    configuration = derived["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == expected
    assert total_stride(configuration) == strides
    with torch.device("meta"):
        network = network_of(configuration)
        outputs = network(torch.zeros(1, 1, *expected))
    # what stock nnU-Net's loss expects
    kernels = PlansManager(derived).get_configuration("3d_fullres").pool_op_kernel_sizes
    scales = np.cumprod(np.vstack(kernels), axis=0)[:-1]
    assert [tuple(output.shape[2:]) for output in outputs] == [tuple(np.array(expected) // scale) for scale in scales]


def test_a_network_of_ones_own_and_changes_of_its_arguments() -> None:
    own = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {"n_stages": 2},
    }
    derived = derive_plans(make_plans("plain"), "p", [Recipe("r", {}, {}, own)], ["3d_fullres"])
    kwargs = derived["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["n_stages"] == 2  # the same class: laid over what the plans say
    assert len(kwargs["strides"]) == 3
    assert derived["configurations"]["3d_fullres"]["architecture"]["_kw_requires_import"]

    words = assignments_recipe(["architecture.arch_kwargs.depth=24", "architecture.arch_kwargs.checkpointing=true"])
    derived = derive_plans(make_plans("plain"), "p", [load_recipe("vit_small"), words], ["3d_fullres"])
    kwargs = derived["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert (kwargs["depth"], kwargs["checkpointing"], kwargs["embed_dim"]) == (24, True, 384)
    assert derived["configurations"]["3d_fullres"]["architecture"]["_kw_requires_import"] == []


def test_errors_of_networks() -> None:
    def derived(*recipes: Recipe) -> dict:
        return derive_plans(make_plans("plain"), "p", list(recipes), ["3d_fullres"])

    with pytest.raises(UserError, match="r: architecture.network_class_name 'nowhere.Net' cannot be imported"):
        derived(Recipe("r", {}, {}, {"network_class_name": "nowhere.Net"}))
    with pytest.raises(UserError, match="r: architecture.arch_kwargs needs 'strides'"):
        derived(Recipe("r", {}, {}, {"network_class_name": "torch.nn.Identity"}))
    with pytest.raises(UserError, match="cpu_small.json: architecture.features_base .* ViTUNETR has none"):
        derived(load_recipe("vit_small"), load_recipe("cpu_small"))
    with pytest.raises(UserError, match="'architecture.arch_kwargs' must be dict"):
        derived(Recipe("r", {}, {}, {"arch_kwargs": 3}))
    narrow = derived(load_recipe("pct_net"), load_recipe("cpu_small"))
    kwargs = narrow["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"] == [16, 32, 64, 128, 128]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["vit_small", "architecture.arch_kwargs.num_heads=7"], "ValueError: .* multiple of num_heads, got 384 and 7"),
        (["architecture.arch_kwargs.strides=[[1,1,1],[2,2,2]]"], "AssertionError: strides must have as many entries"),
        (["architecture.arch_kwargs.features_per_stage=[8,-16,32]"], "RuntimeError: .* negative dimension"),
        (["architecture.arch_kwargs.n_conv=2"], "TypeError: .* unexpected keyword argument 'n_conv'"),
        (["architecture.arch_kwargs.conv_op=torch.nn.Conv9d"], "TypeError: .*NoneType"),
    ],
)
def test_networks_that_cannot_be_built_are_refused_in_one_line(words: list[str], reason: str) -> None:
    plans = derive_plans(make_plans("plain"), "p", recipes_of(words), ["3d_fullres"])
    dataset_json = {"channel_names": {"0": "MR"}, **make_labels("plain")}
    wanted = rf"nnUNetTrainer cannot build the network of plans p \({reason}.*\)\. Check architecture\.arch_kwargs"
    with pytest.raises(UserError, match=wanted):
        check_plans(METHODS["volume_fusion"], plans, "3d_fullres", dataset_json)


def test_words_of_the_command_line() -> None:
    recipe = assignments_recipe(
        [
            "epochs=20",
            "volume_fusion.levels=3",
            "volume_fusion.intensity.noise=[0,0.1]",
            "volume_fusion.foreground_case=same",
            "configuration.batch_size=2",
            "architecture.features_base=8",
        ]
    )
    assert recipe.settings == {
        "epochs": 20,
        "volume_fusion": {"levels": 3, "intensity": {"noise": [0, 0.1]}, "foreground_case": "same"},
    }
    assert recipe.configuration == {"batch_size": 2}
    assert recipe.architecture == {"features_base": 8}
    with pytest.raises(UserError, match="a setting and a section at once"):
        assignments_recipe(["volume_fusion=3", "volume_fusion.levels=3"])


def test_recipes_are_laid_over_in_order_and_the_source_is_untouched() -> None:
    plans = make_plans("plain")
    before = json.dumps(plans)
    first = Recipe("a", {"epochs": 3, "volume_fusion": {"levels": 2}}, {"batch_size": 5})
    second = Recipe("b", {"volume_fusion": {"foreground_case": "same"}}, {}, {"features_base": 8, "features_max": 16})
    derived = derive_plans(plans, "new", [first, second], ["3d_fullres"])
    assert json.dumps(plans) == before
    assert derived["plans_name"] == "new"
    assert derived["nnssl_ext"] == {"epochs": 3, "volume_fusion": {"levels": 2, "foreground_case": "same"}}
    configuration = derived["configurations"]["3d_fullres"]
    assert configuration["batch_size"] == 5
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [8, 16, 16]
    assert configuration["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert derived["configurations"]["3d_lowres"] == plans["configurations"]["3d_lowres"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'volume_fushion'; did you mean 'volume_fusion'\?"):
        load_recipe("volume_fushion")
    with pytest.raises(UserError, match="cannot read .*absent.json: No such file"):
        load_recipe(str(tmp_path / "absent.json"))
    path = tmp_path / "recipe.json"
    path.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_recipe(str(path))
    path.write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON dict, got list"):
        read_json(path)
    path.write_text('{"nnssl": {}}')
    with pytest.raises(UserError, match=r"unknown part 'nnssl'; did you mean 'nnssl_ext'\?"):
        load_recipe(str(path))
    with pytest.raises(UserError, match="'configuration.batch_size' must be int"):
        derive_plans(make_plans("plain"), "p", [Recipe("r", {}, {"batch_size": "2"})], ["3d_fullres"])


@pytest.mark.parametrize("word", ["configuration=5", "architecture={}"])
def test_a_part_is_no_setting(word: str) -> None:
    part = word.partition("=")[0]
    with pytest.raises(UserError, match=f"expected {part}.SETTING=VALUE, got '{word}'. Name a setting"):
        assignments_recipe([word])


def test_settings_may_be_written_as_in_messages() -> None:
    words = ["nnssl_ext.batch_size=4", "nnssl_ext.finetune.steps=9"]
    assert assignments_recipe(words).settings == {"batch_size": 4, "finetune": {"steps": 9}}


def test_a_number_with_too_many_digits_is_text() -> None:
    assert assignments_recipe([f"epochs={'9' * 5000}"]).settings == {"epochs": "9" * 5000}
