"""What holds for every objective on the encoder alone."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnssl_ext import checkpoint
from nnssl_ext.data.crops import CropRequest
from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, SCHEMAS, TRAINERS
from nnssl_ext.methods.encoder_only import EncoderMethod
from nnssl_ext.recipe import load_recipe
from nnssl_ext.settings import split_sections
from nnssl_ext.views.random import VIEWS, BatchRandom
from nnssl_ext.views.spatial import crop_box
from tests.conftest import Environment
from tests.methods.helpers import CPU, batch_of, build, readable_after, views_of, write_anatomy
from tests.support.runs import pretrain, trainer_for

Data = Callable[[str], Environment]
ENCODER_ONLY = [name for name, m in METHODS.items() if issubclass(m, EncoderMethod) and m.learns_from == "cases"]
#: Objectives on patches of a window, and what the test of their learning changes: fewer orders are sooner learned.
PUZZLES = {
    "contrastive_predictive_coding": {},
    "jigsaw": {"permutations": 8},
    "relative_patch_location": {},
}


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_the_encoder_and_the_heads_learn_and_the_decoder_does_not(folder: Path, name: str, kind: str) -> None:
    method = build(METHODS[name], METHODS[name].Settings(), kind=kind)
    result = method(views_of(folder, method, [0, 1, 2]))
    assert result["loss"].shape == (3,)
    result["loss"].sum().backward()
    for parameter_name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    encoder = {id(p) for p in method.network.encoder.parameters()}
    for parameter_name, parameter in method.network.named_parameters():
        assert parameter.requires_grad == (id(parameter) in encoder), parameter_name
    assert any(p.requires_grad for n, p in method.named_parameters() if not n.startswith("network."))


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_health_chance_and_the_readable_number_in_evaluation(folder: Path, name: str) -> None:
    method = build(METHODS[name], METHODS[name].Settings()).eval()
    with torch.no_grad():
        result = method(views_of(folder, method, [0, 1, 2]))
    assert {"loss", "chance", method.readable.key, "feature_deviation", "effective_rank"} <= set(result)
    for key, value in result.items():
        assert value.shape == (3,), key
        assert torch.isfinite(value).all(), key
    assert (result["feature_deviation"] > 0).all()
    assert (result["effective_rank"] > 1).all()


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_a_collapsed_encoder_shows(folder: Path, name: str) -> None:
    method = build(METHODS[name], METHODS[name].Settings()).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
        result = method(views_of(folder, method, [0, 1, 2]))
    assert (result["feature_deviation"] < 1e-3).all()
    assert (result["effective_rank"] < 1).all()


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_a_sample_looks_the_same_in_any_batch(folder: Path, name: str) -> None:
    method = build(METHODS[name], METHODS[name].Settings())
    together = views_of(folder, method, [3, 4, 5])
    for place, index in enumerate([3, 4, 5]):
        alone = views_of(folder, method, [index])
        for key in together:
            assert torch.equal(together[key][place], alone[key][0]), key


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_one_sample_is_a_batch_and_constant_crops_give_finite_numbers(folder: Path, name: str) -> None:
    method = build(METHODS[name], METHODS[name].Settings())
    batch = batch_of(folder, method, [0])
    for row in batch.boxes:
        for box in row:
            box.data = torch.zeros_like(box.data)
    views = method.views(batch, BatchRandom(0, VIEWS, [0], CPU))
    method(views)["loss"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad)
    with torch.no_grad():
        assert all(torch.isfinite(value).all() for value in method.eval()(views).values())


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_crops_are_never_padded(with_data: Data, name: str) -> None:
    """One case of the data set is smaller than the crop: it is magnified."""
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    trainer = trainer_for("plain", "quick", TRAINERS[name], fold="all")
    trainer.on_train_start()
    request = trainer.method.crops(trainer.checked.settings, trainer.checked.geometry)
    assert isinstance(request, CropRequest)
    small = 0
    for batch in trainer.dataloader_train:
        for row, crop in zip(batch.boxes, request.crops, strict=True):
            for box in row:
                small += min(box.data.shape[1:]) < 16
                assert crop_box(box, crop.size, CPU)[1] is None
    assert small


@pytest.mark.parametrize("name", PUZZLES)
@pytest.mark.integration
def test_puzzles_learn_where_patches_are_from_and_from_shuffled_voxels_they_do_not(tmp_path: Path, name: str) -> None:
    folder = write_anatomy(tmp_path)
    settings = replace(METHODS[name].Settings(), warmup=0.0, **PUZZLES[name])
    method = build(METHODS[name], settings)
    steps = 100 if name == "contrastive_predictive_coding" else 50
    found = readable_after(folder, method, steps)
    with torch.no_grad():
        chance = method(views_of(folder, method, [0]))["chance"].item()
    assert found > 1.8 * chance
    assert readable_after(folder, build(METHODS[name], settings), steps, "before") < 1.3 * chance


@pytest.mark.parametrize("name", PUZZLES)
def test_puzzles_that_fit_no_case_are_refused_before_anything_is_written(with_data: Data, name: str) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {name: {"zoom": 1.0}})
    for path in (environment.dataset("plain") / "nnUNetPlans_3d_fullres").glob("*.b2nd"):
        path.unlink()
    for case in range(6):
        thin = np.random.default_rng(case).standard_normal((1, 6, 7, 6)).astype(np.float32)
        blosc2.asarray(thin, urlpath=str(environment.dataset("plain") / f"nnUNetPlans_3d_fullres/t{case}.b2nd"))
    with pytest.raises(UserError, match=r"side by side, but cases of \(6, 7, 6\) voxels hold none") as error:
        trainer_for("plain", "quick", TRAINERS[name])
    assert "\n" not in str(error.value)
    assert re.search(r"; cases of \d+ x \d+ x \d+ would do\. ", str(error.value))
    assert not list(environment.results.iterdir())


def test_the_layout_is_in_the_log(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"epochs": 1})
    fold = pretrain(environment, "plain", "quick", trainer=TRAINERS["jigsaw"])
    (log,) = fold.glob("training_log*.txt")
    assert re.search(r"Jigsaw: \d+ patches .* in a window of .*; \d encoder stages are trained", log.read_text())


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_the_decoder_is_written_at_its_initial_values_and_the_checkpoint_says_so(with_data: Data, name: str) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    trainer = trainer_for("plain", "quick", TRAINERS[name])
    trainer.initialize()
    initial = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    file = pretrain(environment, "plain", "quick", trainer=TRAINERS[name]) / "checkpoint_final.pth"
    content = checkpoint.load(file)
    weights, trained = content["network_weights"], set(content["nnssl_ext"]["trained"])
    assert trained == {key for key in dict(trainer.network.named_parameters()) if key.startswith("encoder.")}
    for key, value in weights.items():
        if key.startswith("decoder.") and not key.startswith("decoder.encoder."):
            assert torch.equal(value, initial[key]), key
    assert any(not torch.equal(weights[key], initial[key]) for key in trained)


@pytest.mark.parametrize("kind", ["plain", "anisotropic"])
@pytest.mark.parametrize("recipe", ["", "_paper"])
@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_recipes_run(folder: Path, name: str, recipe: str, kind: str) -> None:
    content = load_recipe(f"{name}{recipe}").settings
    _, sections = split_sections(content, SCHEMAS, recipe)
    if not recipe:
        assert sections[name] == METHODS[name].Settings()
    method = build(METHODS[name], sections[name], kind=kind)
    method(views_of(folder, method, [0, 1]))["loss"].sum().backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
