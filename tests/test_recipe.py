import json
from pathlib import Path

import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, SCHEMAS
from nnssl_ext.recipe import (
    Recipe,
    assignments_recipe,
    available_recipes,
    derive_plans,
    load_recipe,
    read_json,
)
from nnssl_ext.settings import split_sections
from nnssl_ext.training.preflight import check_plans
from tests.datasets import make_labels, make_plans


@pytest.mark.parametrize("name", available_recipes())
def test_every_recipe_gives_plans_that_every_method_takes(name: str) -> None:
    plans = derive_plans(make_plans("plain"), "p", [load_recipe(name)], ["3d_fullres"])
    for method in METHODS.values():
        check_plans(method, plans, "3d_fullres", {"channel_names": {"0": "MR"}, **make_labels("plain")})


def test_the_papers_recipes_say_what_the_papers_say() -> None:
    _, arxiv = split_sections(load_recipe("volume_fusion_paper_arxiv").settings, SCHEMAS, "arxiv")
    _, tip = split_sections(load_recipe("volume_fusion_paper_tip").settings, SCHEMAS, "tip")
    assert (arxiv["volume_fusion"].source, arxiv["volume_fusion"].layout) == ("other", "boxes")
    assert (tip["volume_fusion"].source, tip["volume_fusion"].layout) == ("same", "grid")
    assert tip["volume_fusion"].intensity.invert_probability == 0.25
    for paper in (arxiv, tip):
        assert paper["volume_fusion"].ignore_below == 0
        assert paper["volume_fusion"].optimiser == "adam"


def test_words_of_the_command_line() -> None:
    recipe = assignments_recipe(
        [
            "epochs=20",
            "volume_fusion.levels=3",
            "volume_fusion.intensity.noise=[0,0.1]",
            "volume_fusion.source=same",
            "configuration.batch_size=2",
            "architecture.features_base=8",
        ]
    )
    assert recipe.settings == {
        "epochs": 20,
        "volume_fusion": {"levels": 3, "intensity": {"noise": [0, 0.1]}, "source": "same"},
    }
    assert recipe.configuration == {"batch_size": 2}
    assert recipe.architecture == {"features_base": 8}
    with pytest.raises(UserError, match="a setting and a section at once"):
        assignments_recipe(["volume_fusion=3", "volume_fusion.levels=3"])


def test_recipes_are_laid_over_in_order_and_the_source_is_untouched() -> None:
    plans = make_plans("plain")
    before = json.dumps(plans)
    first = Recipe("a", {"epochs": 3, "volume_fusion": {"levels": 2}}, {"batch_size": 5})
    second = Recipe("b", {"volume_fusion": {"source": "same"}}, {}, {"features_base": 8, "features_max": 16})
    derived = derive_plans(plans, "new", [first, second], ["3d_fullres"])
    assert json.dumps(plans) == before
    assert derived["plans_name"] == "new"
    assert derived["nnssl_ext"] == {"epochs": 3, "volume_fusion": {"levels": 2, "source": "same"}}
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
