from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnssl_ext.losses.triplet import plain_triplet, semi_hard_triplet
from nnssl_ext.methods.exemplar import Exemplar, ExemplarIntensitySettings, ExemplarSettings
from nnssl_ext.views.random import VIEWS, BatchRandom
from tests.methods.helpers import CASE, CPU, batch_of, build, readable_after, views_of

OURS = replace(ExemplarSettings(), warmup=0.0)
#: As published: three heads, a clean positive, the negative that is given.
PUBLISHED = replace(OURS, shared_head=False, clean_positive=True, mining="given", normalize=False)


def write_individuals(folder: Path, cases: int = 24) -> Path:
    """Cases that differ: four balls each, somewhere, in noise."""
    for case in range(cases):
        generator = np.random.default_rng(case)
        axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, edge) for edge in CASE), indexing="ij"))
        image = 0.3 * generator.standard_normal((2, *CASE))
        for _ in range(4):
            centre = generator.uniform(-0.7, 0.7, (3, 1, 1, 1))
            inside = ((axes - centre) ** 2).sum(0) < generator.uniform(0.25, 0.5) ** 2
            image += generator.choice([-2, 2]) * inside
        image = (image - image.mean()) / image.std()
        blosc2.asarray(image.astype(np.float32), urlpath=str(folder / f"c{case:02d}.b2nd"), mode="w")
    return folder


def loss_on_noise(settings: ExemplarSettings, folder: Path) -> tuple[float, float]:
    """First and last loss of the heads on features that are pure noise, for anchor, positive and negative alike."""
    method = build(Exemplar, settings)
    views = views_of(folder, method, list(range(16)))
    shape = method.encode(views["image"]).shape
    method.encode = lambda image: torch.randn(shape)
    optimiser = torch.optim.Adam(method.heads.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        loss = method(views)["loss"].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses[:3])), float(np.mean(losses[-20:]))


def test_three_heads_need_no_encoder_and_one_does(folder: Path) -> None:
    first, last = loss_on_noise(PUBLISHED, folder)
    assert last < 0.15 * first
    first, last = loss_on_noise(OURS, folder)
    assert last > 0.9 * first


def anchors_from_noise(settings: ExemplarSettings, folder: Path) -> float:
    """How often anchor and positive are told apart by how noisy they are, at the best threshold."""
    noisy = ExemplarIntensitySettings(
        noise_probability=1.0, noise=[0.2, 0.4], gamma_probability=0, histogram_probability=0, blur_probability=0
    )
    method = build(Exemplar, replace(settings, intensity=noisy, affine=0.0))
    image = views_of(folder, method, list(range(40)))["image"][:, :2]
    level = image.diff(dim=-1).abs().mean((2, 3, 4, 5))  # (40, 2)
    best = max(((level[:, 0] > t).float().mean() + (level[:, 1] <= t).float().mean()) / 2 for t in level.flatten())
    return float(best)


def test_a_clean_positive_is_told_by_its_cleanness_and_ours_is_not_clean(folder: Path) -> None:
    assert anchors_from_noise(PUBLISHED, folder) > 0.95
    assert anchors_from_noise(OURS, folder) < 0.75


def test_a_clean_positive_is_a_copy_of_voxels(folder: Path) -> None:
    """The room that a region leaves may be odd: its middle lies between two voxels."""
    method = build(Exemplar, replace(PUBLISHED, standardize=False))
    odd = tuple(edge - (edge - size + 1) % 2 for edge, size in zip(method.region, method.size, strict=True))
    method.region = odd
    batch = batch_of(folder, method, [0, 1, 2])
    assert all((edge - size) % 2 for edge, size in zip(odd, method.size, strict=True))
    images = method._images(*batch.boxes, BatchRandom(0, VIEWS, [0, 1, 2], CPU))
    for box, positive in zip(batch.boxes[0], images[:, 1], strict=True):
        assert torch.isin(positive, box.data.float()).all()


def test_views_are_parts_of_one_crop_and_the_negative_is_of_another_case(folder: Path) -> None:
    method = build(Exemplar, OURS)
    batch = batch_of(folder, method, [0, 1, 2])
    views = method.views(batch, BatchRandom(0, VIEWS, [0, 1, 2], CPU))
    assert views["image"].shape == (3, 3, 2, 16, 16, 16)
    assert (views["case"][:, 0] == views["case"][:, 1]).all()
    assert (views["case"][:, 0] != views["case"][:, 2]).all()
    assert not torch.equal(views["image"][:, 0], views["image"][:, 1])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_small_batches_have_a_negative(folder: Path, batch_size: int) -> None:
    """With one sample the only negative is the crop that is given: nothing is chosen, and the loss is the plain one."""
    method = build(Exemplar, OURS)
    views = views_of(folder, method, list(range(batch_size)))
    loss = method(views)["loss"]
    anchor, positive, negative = method.embed(method.encode(views["image"])).unbind(1)
    if batch_size == 1:
        both = plain_triplet(anchor, positive, negative, 1.0) + plain_triplet(positive, anchor, negative, 1.0)
        torch.testing.assert_close(loss, both / 2)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad)


def test_crops_of_the_same_case_are_no_negatives(folder: Path) -> None:
    method = build(Exemplar, OURS)
    views = views_of(folder, method, [0, 1])
    apart = method(views)["loss"]
    # say that both samples are of one case: only the given crops are left
    views["case"][:] = torch.tensor([[1, 1, 2], [1, 1, 2]])
    together = method(views)["loss"]
    assert not torch.equal(apart, together)
    embedded = method.embed(method.encode(views["image"]))
    allowed = torch.ones(2, 2, dtype=torch.bool)
    expected = [
        semi_hard_triplet(embedded[:, a], embedded[:, b], embedded[:, 2], allowed, 1.0) for a, b in ((0, 1), (1, 0))
    ]
    torch.testing.assert_close(together, (expected[0] + expected[1]) / 2)


def test_the_published_variant_runs(folder: Path) -> None:
    method = build(Exemplar, PUBLISHED)
    method(views_of(folder, method, [0, 1]))["loss"].sum().backward()
    assert len(method.heads) == 3
    assert all(p.grad is not None for p in method.heads.parameters())


def test_it_learns_and_with_voxels_shuffled_per_view_it_does_not(tmp_path: Path) -> None:
    folder = write_individuals(tmp_path)
    untrained = readable_after(
        folder, build(Exemplar, OURS), 0
    )  # views of one crop are alike before anything is learned
    assert readable_after(folder, build(Exemplar, OURS), 50) > untrained
    assert readable_after(folder, build(Exemplar, OURS), 50, "after") < 0.6


def test_vicreg_is_what_was_published_and_needs_no_negatives(folder: Path) -> None:
    method = build(Exemplar, replace(OURS, objective="vicreg"))
    views = views_of(folder, method, [0, 1])
    embedded = method.embed(method.encode(views["image"]))
    flat = embedded.flatten(0, 1)
    covariance = flat.T.cov()
    variance = (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp_min(0).mean()
    others = (covariance - covariance.diagonal().diag()).square().sum() / len(covariance)
    # both terms are sums over the two views, and here each is one over all images
    expected = 25 * ((embedded[:, 0] - embedded[:, 1]) ** 2).mean(1) + 2 * (25 * variance + others)
    torch.testing.assert_close(method(views)["loss"], expected)
    views["case"][:] = 1  # one case alone has no negatives
    torch.testing.assert_close(method(views)["loss"], expected)


def test_vicreg_keeps_features_apart(tmp_path: Path) -> None:
    """It learns which crop a view shows, and constant features cost more than those at the start."""
    folder = write_individuals(tmp_path)
    settings = replace(OURS, objective="vicreg")
    untrained, trained = (readable_after(folder, build(Exemplar, settings), steps) for steps in (0, 50))
    assert trained > untrained
