"""Pictures of all methods: rows of panels with input, target and prediction of a validation sample."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnssl_ext.data.crops import collate
from nnssl_ext.data.images import ImageDataset, ImageFolder, ImageRequest
from nnssl_ext.losses.dense import IGNORE
from nnssl_ext.methods import METHODS, DataGeometry
from nnssl_ext.methods.dino.settings import DINOSettings
from nnssl_ext.methods.panels import Panel, assemble, assembled_center, axial, principal_colors
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.views.masking import expand_blocks
from nnssl_ext.views.random import VIEWS, BatchRandom
from tests.images import make_images
from tests.methods.helpers import CPU, OFF, SIZE, build, views_of, write_cases
from tests.support.networks import network

SMALL: dict[str, Any] = {
    "dino": replace(
        DINOSettings(), local_crops=2, hidden_dim=16, bottleneck_dim=8, prototypes=32, token_stride=4, koleo_weight=0.1
    )
}
Views = dict[str, Tensor]


def shown(
    tmp_path: Path, name: str, kind: str = "plain", samples: int = 0, **settings: Any
) -> tuple[Any, Views, list[list[Panel]]]:
    """Return a method in evaluation, its views and its picture."""
    method_class = METHODS[name]
    chosen = replace(SMALL.get(name, method_class.Settings()), **settings)
    if name == "variable_dimension_transform":
        images = ImageFolder(make_images(tmp_path / "images"))
        backbone = backbone_of(network(kind, 2, 3))
        geometry = DataGeometry(SIZE, (1.0, 1.0, 1.0), 2, tuple(backbone.strides), classes=images.classes)
        method = method_class(backbone, chosen, geometry).eval()
        indices = list(range(samples or method.picture_samples))
        request = method.crops(method.settings, geometry)
        assert isinstance(request, ImageRequest)
        data = ImageDataset(images, request, 0)
        views = method.views(collate([data[i] for i in indices]), BatchRandom(0, VIEWS, indices, CPU))
    else:
        method = build(method_class, chosen, kind=kind).eval()
        views = views_of(write_cases(tmp_path), method, list(range(samples or method.picture_samples)))
    with torch.no_grad():
        return method, views, method.picture(views)


def the(rows: list[list[Panel]], title: str) -> Tensor:
    """Return the data of the one panel whose title begins so."""
    (found,) = (panel.data for row in rows for panel in row if panel.title.startswith(title))
    return found


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(-9.0), other.nan_to_num(-9.0))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_picture_of_drawable_panels(tmp_path: Path, name: str) -> None:
    _, _, rows = shown(tmp_path, name)
    assert rows
    for panel in (panel for row in rows for panel in row):
        assert panel.kind in ("image", "levels", "colors")
        axes = panel.data.ndim - (panel.kind == "colors")
        assert axes in (2, 3)
        assert panel.title.count("\n") <= 1
        assert not panel.data.requires_grad
        assert torch.isfinite(panel.data).any()
        if panel.kind == "colors":
            assert len(panel.data) == 3
            assert 0 <= panel.data.min() <= panel.data.max() <= 1
        if panel.center:
            assert all(0 <= place < edge for place, edge in zip(panel.center, panel.data.shape, strict=True))
            assert torch.isfinite(panel.data[panel.center])


@pytest.mark.parametrize("name", METHODS)
def test_a_picture_changes_nothing_and_needs_one_sample_only(tmp_path: Path, name: str) -> None:
    method, views, rows = shown(tmp_path, name, samples=1)
    state, draws = {k: v.clone() for k, v in method.state_dict().items()}, torch.get_rng_state()
    before = {key: value.clone() for key, value in views.items()}
    with torch.no_grad():
        again = method.picture(views)
    assert all(torch.equal(state[key], value) for key, value in method.state_dict().items())
    assert all(torch.equal(before[key], value) for key, value in views.items())
    assert torch.equal(draws, torch.get_rng_state())
    for one, other in zip(rows, again, strict=True):
        assert [panel.title for panel in one] == [panel.title for panel in other]
        assert all(same(a.data, b.data) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["plain", "pct_net"])
def test_volume_fusion_shows_levels_and_their_prediction(tmp_path: Path, kind: str) -> None:
    method, views, rows = shown(tmp_path, "volume_fusion", kind)
    assert torch.equal(the(rows, "fused input"), views["image"][0, 0])
    level, ignored = the(rows, "level of the foreground"), views["level"][0] == IGNORE
    assert torch.equal(level.isnan(), ignored)
    assert torch.equal(level[~ignored], views["level"][0][~ignored].float())
    with torch.no_grad():
        scores = method.network(views["image"])
    scores = scores[0] if isinstance(scores, (list, tuple)) else scores
    assert torch.equal(the(rows, "predicted level"), scores[0].argmax(0))


@pytest.mark.parametrize(
    "settings", [{}, {"normalize_target": True}, {"visible_norms": True}], ids=["plain", "normalized", "visible"]
)
def test_masked_autoencoder_shows_predictions_in_masked_blocks_only(tmp_path: Path, settings: dict) -> None:
    method, views, rows = shown(tmp_path, "masked_autoencoder", **settings)
    masked, target = views["weight"][0, 0] > 0, views["target"][0, 0]
    prediction = the(rows, "prediction in masked blocks")
    assert torch.equal(the(rows, "masked input"), views["image"][0, 0])
    assert torch.equal(the(rows, "truth"), target)
    assert torch.equal(prediction[~masked], target[~masked])
    with torch.no_grad():
        output = method.network(views["image"])[0, 0]
    assert torch.equal(prediction[masked], output[masked])


def test_models_genesis_shows_the_restoration(tmp_path: Path) -> None:
    method, views, rows = shown(tmp_path, "models_genesis")
    assert torch.equal(the(rows, "corrupted input"), views["image"][0, 0])
    assert torch.equal(the(rows, "truth"), views["target"][0, 0])
    with torch.no_grad():
        assert torch.equal(the(rows, "restoration"), method.network(views["image"])[0, 0])


def test_jigsaw_puts_patches_back(tmp_path: Path) -> None:
    method, views, _ = shown(tmp_path, "jigsaw")
    grid, patches = method.layout.grid, views["patches"][0, :, 0]
    for predicted in (int(views["order"][0, 0]), int(views["order"][0, 0]) ^ 1):
        logits = torch.eye(len(method.permutations))[predicted][None, None]
        method._logits = lambda *_, logits=logits: logits
        with torch.no_grad():
            rows = method.picture(views)
        target, restored = the(rows, "in their places"), the(rows, f"put back by the predicted order {predicted}")
        assert same(target, assemble(patches, grid))
        assert same(the(rows, "in order"), assemble(patches[method.permutations[views["order"][0, 0]]], grid))
        assert same(restored, target) == (predicted == views["order"][0, 0])


def test_relative_patch_location_names_places(tmp_path: Path) -> None:
    method, views, rows = shown(tmp_path, "relative_patch_location")
    panels = [panel for row in rows for panel in row]
    assert torch.equal(torch.stack([panel.data for panel in panels]), axial(views["patches"][0]))
    with torch.no_grad():
        guesses = method._logits(method.encode(views["patches"]))[0].argmax(-1)
    grid = np.asarray(method.layout.grid)
    offsets = [place - grid // 2 for place in np.ndindex(*grid)]
    offsets = [offset for offset in offsets if offset.any()]
    for panel, place, guess in zip(panels[1:], views["location"][0], guesses, strict=True):
        at, guessed = ([int(step) for step in line.split()[1:]] for line in panel.title.split("\n"))
        assert at == offsets[place].tolist()
        assert guessed == offsets[guess].tolist()


@pytest.mark.parametrize("loss", ["infonce", "bce"])
def test_contrastive_predictive_coding_shows_the_chosen_targets(tmp_path: Path, loss: str) -> None:
    method, views, (known, targets, guesses) = shown(tmp_path, "contrastive_predictive_coding", loss=loss)
    patches, number = axial(views["patches"][0]), method.targets
    assert torch.equal(torch.stack([panel.data for panel in [*known, *targets]]), patches)
    with torch.no_grad():
        accuracy = method(views)["accuracy"].item()
    right = [panel.title.endswith("right") for panel in guesses]
    assert sum(right) / number == pytest.approx(accuracy)
    for place, (panel, hit) in enumerate(zip(guesses, right, strict=True)):
        chosen = place if hit else int(panel.title.split("target ")[1]) - 1
        assert torch.equal(panel.data, targets[chosen].data)


def test_rotation_turns_views_back(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"jitter_angle": 0.0, "thick_slice_probability": 0.0, "copies": 6, "intensity": OFF}
    method, views, rows = shown(tmp_path, "rotation", **settings)
    assert len(set(views["rotation"][0].tolist())) > 2
    for row in rows[1:]:
        torch.testing.assert_close(row[2].data, rows[0][2].data, atol=1e-4, rtol=0)
    with torch.no_grad():
        guesses = method.head(method.encode(views["image"]))[0].argmax(-1)
    for copy, row in enumerate(rows):
        assert torch.equal(row[0].data, views["image"][0, copy, 0])
        right = guesses[copy] == views["rotation"][0, copy]
        assert torch.equal(row[1].data, row[2].data) or not right


def test_exemplar_shows_the_nearest_first(tmp_path: Path) -> None:
    method, views, rows = shown(tmp_path, "exemplar")
    with torch.no_grad():
        embedded = method.embed(method.encode(views["image"])).flatten(0, 1)
    images = axial(views["image"]).flatten(0, 1)
    assert len(rows) == method.picture_samples
    for sample, (anchor, *nearest) in enumerate(rows):
        assert torch.equal(anchor.data, images[3 * sample])
        distances = ((embedded - embedded[3 * sample]) ** 2).sum(1)
        order = [place for place in distances.argsort().tolist() if place != 3 * sample]
        for panel, place in zip(nearest, order, strict=False):
            assert torch.equal(panel.data, images[place])
            what, distance = panel.title.split("\n")
            assert (what == "positive") == (place == 3 * sample + 1)
            assert float(distance) == pytest.approx(distances[place].item(), abs=1e-3)


@pytest.mark.parametrize("kind", ["plain", "vit"])
@pytest.mark.parametrize("probability", [1.0, 0.5, 0.0])
def test_dino_colors_tokens_and_empties_masked_ones(tmp_path: Path, kind: str, probability: float) -> None:
    method, views, _ = shown(tmp_path, "dino", kind, mask_probability=probability)
    with torch.no_grad():
        for parameter in method.student.parameters():  # it begins as the teacher
            parameter.add_(0.1 * torch.randn_like(parameter))
        rows = method.picture(views)
    size, patch = method.geometry.crop_size, method.student.reader.patch
    sample = int(views["masked"].flatten(1).sum(1).argmax())
    assert views["masked"][sample].any() == (probability > 0)
    with torch.no_grad():
        tokens = method.teacher.reader(views["global"][sample])[1]
    for view, row in enumerate(rows[:2]):
        clean, masked, teacher, student = (panel.data for panel in row)
        assert torch.equal(clean, views["global"][sample, view, 0])
        patches = views["masked"][sample, view]
        expected = expand_blocks(patches.unflatten(-1, method.grid).float(), size, patch) > 0
        assert torch.equal(masked.isnan(), expected)
        assert row[1].title.startswith(f"{patches.sum()} masked patches")
        colors = principal_colors(tokens)[0][:, view].unflatten(-1, method.grid)
        assert torch.equal(teacher, expand_blocks(colors, size, patch))
        assert student.shape == teacher.shape
        assert not torch.equal(student, teacher)
    assert torch.equal(torch.stack([panel.data for panel in rows[2]]), axial(views["local"][sample]))


def test_variable_dimension_transform_names_classes(tmp_path: Path) -> None:
    method, views, rows = shown(tmp_path, "variable_dimension_transform")
    assert len(rows) == method.picture_samples
    for sample, row in enumerate(rows):
        assert torch.equal(torch.stack([panel.data for panel in row]), views["image"][sample, 0])
        assert row[0].title.split("\n")[0] == method.classes.names[views["label"][sample]]


def test_patches_are_assembled_in_the_order_of_the_grid() -> None:
    grid, patch = (2, 1, 3), (2, 4, 3)
    patches = torch.arange(6.0)[:, None, None, None].expand(-1, *patch)
    volume = assemble(patches, grid)
    assert volume.shape == (5, 4, 11)
    assert volume[0, 0, ::4].tolist() == [0, 1, 2]
    assert volume[3, 0, ::4].tolist() == [3, 4, 5]
    assert volume[2].isnan().all()
    assert volume[..., 3].isnan().all()
    assert volume[assembled_center(patch, grid)] == 4


@pytest.mark.parametrize("features", [2, 3, 12])
def test_principal_colors_do_not_depend_on_the_basis(features: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(5, 40, features) * torch.arange(1, features + 1)
    basis = torch.linalg.qr(torch.randn(features, features))[0]
    one, other = principal_colors(tokens)[0], principal_colors(tokens @ basis + 3)[0]
    assert one.shape == (3, 5, 40)
    # the sign of a component is that of its longest entry, which another basis may turn
    for channel, turned in zip(one, other, strict=True):
        difference = min((channel - turned).abs().max(), (channel + turned - 1).abs().max())
        assert difference < 1e-3 or not channel.any()
    rows = tokens.flatten(0, 1) - tokens.flatten(0, 1).mean(0)
    first = rows @ torch.linalg.svd(rows, full_matrices=False)[2][0]
    assert abs(np.corrcoef(first.argsort().argsort(), one[0].flatten().argsort().argsort())[0, 1]) > 0.99
    first_half = principal_colors(tokens, tokens[:1])[1]
    assert torch.equal(first_half, one[:, :1])
    assert principal_colors(torch.ones(4, 4))[0].isfinite().all()


def test_exemplar_takes_fewer_samples(tmp_path: Path) -> None:
    _, _, rows = shown(tmp_path, "exemplar", samples=2)
    assert [len(row) for row in rows] == [6, 6]
