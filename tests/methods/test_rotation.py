from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods import DataGeometry
from nnssl_ext.methods.rotation import Rotation, RotationSettings, allowed_rotations, roughness
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.views.random import VIEWS, BatchRandom
from tests.methods.helpers import CPU, OFF, build, noise_boxes, readable_after, views_of, write_anatomy, write_cases
from tests.support.networks import network

#: Turns and nothing else.
BARE = replace(RotationSettings(), jitter_angle=0.0, thick_slice_probability=0.0, intensity=OFF)
THICK = (4.0, 1.0, 1.0)


def make(settings: RotationSettings, spacing: tuple = (1.0, 1.0, 1.0)) -> Rotation:
    return build(Rotation, settings, spacing, "plain")


def turned(method: Rotation, boxes: list) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C, D, H, W) and the turns (B,)."""
    indices = list(range(len(boxes)))
    views = method.views(CropBatch(indices, [boxes]), BatchRandom(0, VIEWS, indices, CPU))
    return views["image"][:, 0], views["rotation"][:, 0]


@pytest.mark.parametrize("rotations", ["published", "cube"])
def test_a_rotation_is_a_permutation_of_voxels(rotations: str) -> None:
    method = make(replace(BARE, rotations=rotations))
    boxes = noise_boxes(method.size, 60)
    image, label = turned(method, boxes)
    assert len(label.unique()) > 7
    for box, view, turn in zip(boxes, image, label, strict=True):
        if turn == 0:
            assert torch.equal(view, box.data)
        else:
            assert not torch.equal(view, box.data)
        assert torch.equal(view.flatten().sort().values, box.data.flatten().sort().values)
        # turned back it is the box: o -> M o in coordinates from the centre
        places = np.stack(np.meshgrid(*(np.arange(n) for n in method.size), indexing="ij"), -1).reshape(-1, 3)
        centre = (np.asarray(method.size) - 1) / 2
        source = np.rint((places - centre) @ method.rotations[turn].T + centre).astype(int)
        assert np.array_equal(view[0].numpy().ravel(), box.data[0].numpy()[tuple(source.T)])


def accuracy_from_roughness(method: Rotation, boxes: list) -> float:
    """How often the turn is told by how much neighbours differ along the axes; classes known from half of the views."""
    image, label = turned(method, boxes)
    cue, half = roughness(image), len(boxes) // 2
    classes = range(len(method.rotations))
    centres = torch.stack([cue[:half][label[:half] == turn].mean(0) for turn in classes])
    # of classes that look the same one is as good a guess as another
    guess = torch.cdist(cue[half:], centres).argmin(1)
    return (guess == label[half:]).float().mean().item()


def test_spacing_gives_published_turns_away_and_ours_not() -> None:
    """Noise, with nothing to see, on a grid with one thick axis: in millimetres equally smooth along all of them."""
    found = {}
    for name, settings in (("published", replace(BARE, keep_grid=False)), ("ours", BARE)):
        method = make(settings, THICK)
        found[name] = (accuracy_from_roughness(method, noise_boxes(method.size, 400, (0.0, 1.5, 1.5))), method)
    accuracy, method = found["published"]
    assert len(method.rotations) == 10
    assert accuracy > 0.22
    accuracy, method = found["ours"]
    assert len(method.rotations) == 6
    assert accuracy < 1 / 6 + 0.06


def test_three_spacings_give_published_turns_away_and_ours_not() -> None:
    spacing = (4.0, 1.0, 2.0)
    found = {}
    for keep_grid in (False, True):
        method = make(replace(BARE, keep_grid=keep_grid), spacing)
        found[len(method.rotations)] = accuracy_from_roughness(method, noise_boxes(method.size, 400, (0.0, 1.6, 0.8)))
    assert found[10] > 0.3
    assert found[4] < 1 / 4 + 0.08


def test_low_resolution_after_the_turn_lowers_what_a_blurred_axis_gives_away() -> None:
    """Resampled thick slices: the grid is isotropic and the image is not. Stronger blur shows through."""
    found = []
    for settings in (BARE, replace(BARE, thick_slice_probability=1.0, thick_slice=[0.3, 0.7])):
        method = make(settings)
        found.append(accuracy_from_roughness(method, noise_boxes(method.size, 1000, (1.2, 0.8, 0.8))))
    published, ours = found
    assert published > 0.2
    assert ours < published - 0.05


@pytest.mark.parametrize(
    ("spacing", "published", "cube"), [((1.0, 1.0, 1.0), 10, 24), (THICK, 6, 8), ((4.0, 1.0, 2.0), 4, 4)]
)
def test_the_reported_chance_is_the_true_one(tmp_path: Path, spacing: tuple, published: int, cube: int) -> None:
    folder = write_cases(tmp_path)
    for turns, number in (("published", published), ("cube", cube)):
        method = build(Rotation, replace(RotationSettings(), rotations=turns), spacing).eval()
        assert len(method.rotations) == len(allowed_rotations(method.settings, method.geometry)) == number
        with torch.no_grad():
            assert method(views_of(folder, method, [0]))["chance"].item() == pytest.approx(1 / number)


def test_small_angles_say_nothing_of_the_turn() -> None:
    """The same angles are drawn whatever the turn: turned back, views of one crop are equally distributed."""
    method = make(replace(BARE, jitter_angle=10.0))
    image, label = turned(method, noise_boxes(method.size, 300, (2.0, 2.0, 2.0)))
    spread = image.std((1, 2, 3, 4))
    # every view is interpolated, so none is sharper than the others
    by_turn = torch.stack([spread[label == turn].mean() for turn in range(10)])
    assert by_turn.std() < 0.1 * by_turn.mean()
    assert (roughness(image).mean(0).abs() < 0.1).all()


def test_the_probe_learns_beside_and_leaves_the_objective_and_the_encoder_alone(tmp_path: Path) -> None:
    folder = write_cases(tmp_path)
    method = make(RotationSettings())
    views = views_of(folder, method, [0, 1])
    before = method(views)["loss"]
    gradients = torch.autograd.grad(before.sum(), [p for p in method.parameters() if p.requires_grad])
    torch.nn.init.normal_(list(method.spacing_classifier.parameters())[-2])
    after = method(views)["loss"]
    torch.testing.assert_close(after, before)
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    again = torch.autograd.grad(after.sum(), [p for p in method.parameters() if p.requires_grad])
    for name, one, other in zip(names, gradients, again, strict=True):
        if name.startswith("spacing_classifier."):
            assert one.any() or other.any(), name
        else:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("depth", [8, 12, 14, 16])
def test_slices_are_copied_where_nothing_rotates_along_them(depth: int) -> None:
    """Small angles turn thick slices in their plane. Noise keeps its differences from slice to slice."""
    geometry = DataGeometry((depth, 32, 32), THICK, 1, ((1, 1, 1), (1, 2, 2), (2, 4, 4)), (2 * depth, 64, 64))
    settings = replace(BARE, jitter_angle=5.0)
    method = Rotation(backbone_of(network("anisotropic")), settings, geometry)
    (crop,) = Rotation.crops(settings, geometry).crops
    assert method.size == (depth, 32, 32)
    assert crop.size == (depth, 38, 38)
    image, _ = turned(method, noise_boxes(crop.size, 10))
    # independent slices differ by twice their variance. Means of two neighbors differ by half of that
    assert image.diff(dim=2).var() / image.var() == pytest.approx(2, abs=0.1)


def test_crops_lie_about_the_body(tmp_path: Path) -> None:
    (crop,) = Rotation.crops(RotationSettings(), make(RotationSettings()).geometry).crops
    assert crop.centered
    assert crop.fit


def test_it_learns_and_with_shuffled_voxels_it_does_not(tmp_path: Path) -> None:
    folder = write_anatomy(tmp_path)
    settings = replace(RotationSettings(), warmup=0.0)
    assert readable_after(folder, make(settings), 50) > 0.5
    assert readable_after(folder, make(settings), 50, "before") < 0.2


@pytest.mark.parametrize("kind", ["plain", "residual", "vit", "pct_net"])
def test_cut_out_blocks_are_restored_beside_it(tmp_path: Path, kind: str) -> None:
    """The decoder learns too, the rotation is judged on the cut image, and the image elsewhere is not a target."""
    folder = write_cases(tmp_path)
    method = build(Rotation, replace(RotationSettings(), reconstruction=1.0), kind=kind)
    views = views_of(folder, method, [0, 1])
    cut = views["weight"] > 0
    assert (views["image"][cut] == 0).all()
    assert torch.equal(views["image"][~cut], views["target"][~cut])
    assert cut.float().mean().item() == pytest.approx(0.3, abs=0.02)
    result = method(views)
    result["loss"].sum().backward()
    heads = [name for name, p in method.network.named_parameters() if ".seg_layers." in name and p.requires_grad]
    assert heads
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    method.eval()
    with torch.no_grad():
        explained = method(views)["explained_variance"]
        assert explained.shape == (2,)
        views["target"][0, 0] = 0  # one copy with nothing to explain leaves the other
        assert method(views)["explained_variance"].isfinite().all()


def test_features_with_the_output_are_those_without(tmp_path: Path) -> None:
    backbone = build(Rotation, replace(RotationSettings(), reconstruction=1.0), kind="residual").backbone
    image = torch.randn(1, 2, 16, 16, 16)
    maps, output = backbone.features_and_output(image)
    torch.testing.assert_close(maps[-1], backbone.features(image)[-1])
    torch.testing.assert_close(output, backbone.network(image))


def test_a_solved_task_is_told() -> None:
    check = make(RotationSettings()).check_validation
    assert not check({"accuracy": 0.9}).solved
    assert "rotation.reconstruction=1" in check({"accuracy": 0.99}).solved
    assert not check({"accuracy": 0.99}).collapse


def test_an_axis_of_one_voxel_has_a_finite_roughness() -> None:
    image = torch.randn(2, 1, 1, 8, 8)
    assert torch.isfinite(roughness(image)).all()
