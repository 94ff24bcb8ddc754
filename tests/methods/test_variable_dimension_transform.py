"""The variable dimension transform: the plan's encoder, on images, with weights that fit it exactly."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl_ext import checkpoint
from nnssl_ext.data.crops import collate
from nnssl_ext.data.images import ImageDataset, ImageFolder
from nnssl_ext.errors import UserError
from nnssl_ext.methods import SCHEMAS, TRAINERS, DataGeometry
from nnssl_ext.methods.variable_dimension_transform import (
    VariableDimensionTransform,
    VariableDimensionTransformSettings,
)
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.recipe import load_recipe
from nnssl_ext.settings import split_sections
from nnssl_ext.views.random import VALIDATION, VIEWS, BatchRandom
from tests.conftest import Environment
from tests.datasets import KINDS
from tests.images import make_images
from tests.methods.helpers import CPU, OFF
from tests.support.networks import network
from tests.support.runs import pretrain, trainer_for

Data = Callable[[str], Environment]


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    return ImageFolder(make_images(tmp_path / "images"))


def build(images: ImageFolder, kind: str = "plain", channels: int = 2, **settings: Any) -> VariableDimensionTransform:
    torch.manual_seed(0)
    backbone = backbone_of(network(kind, channels, 3))
    geometry = DataGeometry((16, 16, 16), (1.0, 1.0, 1.0), channels, tuple(backbone.strides), classes=images.classes)
    return VariableDimensionTransform(backbone, VariableDimensionTransformSettings(**settings), geometry)


def views_of(images: ImageFolder, method: VariableDimensionTransform, indices: list[int]) -> dict[str, torch.Tensor]:
    data = ImageDataset(images, method.crops(method.settings, method.geometry), 0)
    return method.views(collate([data[i] for i in indices]), BatchRandom(0, VIEWS, indices, CPU))


def test_views(images: ImageFolder) -> None:
    method = build(images, intensity=OFF)
    views = views_of(images, method, [0, 1, 2])
    assert views["image"].shape == (3, 2, 3, 16, 16)
    assert torch.equal(views["image"][:, 0], views["image"][:, 1])
    assert views["image"].abs().max() < 3  # eight bits, normalised
    data = ImageDataset(images, method.crops(method.settings, method.geometry), 0)
    assert views["label"].tolist() == [
        images.classes.names.index(data[i].boxes[0].case.split("/", 1)[0]) for i in range(3)
    ]


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic"])
def test_the_depth_is_never_strided_and_the_weights_are_the_plans(images: ImageFolder, kind: str) -> None:
    plan = network(kind, 2, 3).state_dict()
    method = build(images, kind)
    features = method.backbone.features(torch.randn(2, 2, 3, 16, 16))
    assert [f.shape[2] for f in features] == [3] * len(features)
    assert features[-1].shape[3:] == (4, 4)
    exported = method.exported.state_dict()
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in plan.items()}
    # loaded into the plan's own network they run with its strides
    target = network(kind, 2, 3)
    target.load_state_dict(exported)
    assert backbone_of(target).features(torch.randn(1, 2, 16, 16, 16))[-1].shape[2] == (
        4 if kind != "anisotropic" else 8
    )


def test_input_channels_stay_alike(images: ImageFolder) -> None:
    method = build(images, channels=2).train()
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-2)
    before = method.exported.state_dict()["encoder.stages.0.0.convs.0.conv.weight"].clone()
    for step in range(2):
        optimiser.zero_grad()
        method(views_of(images, method, [2 * step, 2 * step + 1]))["loss"].sum().backward()
        optimiser.step()
    stem = method.exported.state_dict()["encoder.stages.0.0.convs.0.conv.weight"]
    assert not torch.equal(stem, before)
    assert torch.allclose(stem[:, 0], stem[:, 1], atol=1e-6)


def test_only_encoder_and_head_learn(images: ImageFolder) -> None:
    method = build(images).train()
    method(views_of(images, method, [0, 1]))["loss"].sum().backward()
    for name, parameter in method.named_parameters():
        trained = name.startswith(("network.encoder.", "head."))
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None) == trained


def test_it_learns_photographs_and_not_shuffled_labels(images: ImageFolder) -> None:
    def accuracy(shuffled: bool) -> float:
        method = build(images, channels=1, intensity=OFF, label_smoothing=0.0)
        optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 5e-3)
        request = method.crops(method.settings, method.geometry)

        def views(indices: list[int], stream: int = 0) -> dict[str, torch.Tensor]:
            data = ImageDataset(images, request, 0, stream)
            found = method.views(collate([data[i] for i in indices]), BatchRandom(0, stream + VIEWS, indices, CPU))
            if shuffled:
                found["label"] = torch.tensor([(7 * i + i // 3) % 3 for i in indices])
            return found

        method.train()
        for step in range(60):
            optimiser.zero_grad()
            method(views(list(range(8 * step, 8 * step + 8))))["loss"].mean().backward()
            optimiser.step()
        method.eval()
        with torch.no_grad():
            return float(method(views(list(range(60)), VALIDATION))["accuracy"].mean())

    assert not set(images.training) & set(images.validation)

    assert accuracy(shuffled=False) > 0.7
    assert accuracy(shuffled=True) < 0.5


def test_without_images_it_says_what_to_do(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "bare", {"images": None})
    with pytest.raises(UserError, match="learns from labeled 2-D images: set nnssl_ext.images"):
        pretrain(environment, "plain", "bare", trainer=TRAINERS["variable_dimension_transform"])
    assert not list(environment.results.rglob("*"))


def test_too_many_unreadable_images_stop_the_run(with_data: Data) -> None:
    environment = with_data("plain")
    folder = make_images(environment.root / "broken", classes=2, each=12)
    for path in sorted(folder.rglob("*"))[2::3]:
        if path.is_file():
            path.write_bytes(b"nothing")
    environment.write_plans("plain", "run", {"images": str(folder), "iterations_per_epoch": 12})
    with pytest.raises(UserError, match=r"of 24 images cannot be read, more than max_unreadable_fraction=0.05 allows"):
        pretrain(environment, "plain", "run", trainer=TRAINERS["variable_dimension_transform"])
    environment.write_plans("plain", "run", {"images": str(folder), "max_unreadable_fraction": 1.0})
    fold = pretrain(environment, "plain", "run", trainer=TRAINERS["variable_dimension_transform"])
    log = next(iter(sorted(fold.glob("training_log_*"), reverse=True))).read_text()
    assert "cannot be read and is skipped" in log


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_written_as_it_was_drawn(with_data: Data, kind: str) -> None:
    environment = with_data(kind)
    environment.write_plans(kind, "run", {})
    trainer = trainer_for(kind, "run", TRAINERS["variable_dimension_transform"])
    trainer.initialize()
    initial = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    fold = pretrain(environment, kind, "run", trainer=TRAINERS["variable_dimension_transform"])
    content = checkpoint.load(fold / "checkpoint_final.pth")
    assert content["nnssl_ext"]["trained"]
    assert all(name.startswith("encoder.") for name in content["nnssl_ext"]["trained"])
    weights = content["network_weights"]
    assert all(torch.equal(weights[key], initial[key]) for key in initial if key.startswith("decoder.stages."))
    assert any(not torch.equal(weights[key], initial[key]) for key in content["nnssl_ext"]["trained"])


@pytest.mark.parametrize("recipe", ["variable_dimension_transform", "variable_dimension_transform_paper"])
def test_recipes_run(images: ImageFolder, recipe: str) -> None:
    _, sections = split_sections(load_recipe(recipe).settings, SCHEMAS, recipe)
    settings = sections["variable_dimension_transform"]
    if not recipe.endswith("paper"):
        assert settings == VariableDimensionTransformSettings()
    method = build(images, **{entry.name: getattr(settings, entry.name) for entry in fields(settings)})
    assert method.optimizer().momentum == (0.9 if recipe.endswith("paper") else 0.99)
    method(views_of(images, method, [0, 1]))["loss"].sum().backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
