import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from nnssl_ext.methods import DataGeometry
from nnssl_ext.methods.dino.networks import DistilledNetwork, ProjectionHead, Reader, reader_of
from nnssl_ext.methods.dino.settings import DINOSettings, patch_level
from nnssl_ext.networks.backbone import backbone_of
from tests.datasets import OWN_NETWORKS
from tests.support.networks import network

KINDS = ["plain", "residual", "anisotropic", *OWN_NETWORKS]
SIZE = (16, 32, 32)


def reader(kind: str, token_stride: int) -> Reader:
    backbone = backbone_of(network(kind))
    geometry = DataGeometry(SIZE, (1.0, 1.0, 1.0), 1, tuple(backbone.strides))
    return reader_of(backbone, patch_level(replace(DINOSettings(), token_stride=token_stride), geometry))


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_the_image_and_of_each_patch(kind: str) -> None:
    found = reader(kind, 4)
    grid = found.grid(SIZE)
    masked = torch.zeros(2, grid[0] * grid[1] * grid[2], dtype=torch.bool)
    image, vectors = found(torch.randn(2, 1, *SIZE), masked)
    assert image.shape == (2, found.image_width)
    assert vectors.shape == (2, masked.shape[1], found.patch_width)
    if found.masks_voxels:
        assert max(found.patch) <= 4
    else:
        other, _ = found.eval()(torch.ones(2, 1, *SIZE), masked)
        masked, _ = found(torch.ones(2, 1, *SIZE), ~masked)
        assert not torch.equal(other, masked)


def test_patches_are_where_their_voxels_are() -> None:
    found = reader("plain", 4).eval()
    image, place = torch.zeros(1, 1, *SIZE), torch.tensor([1, 2, 6])
    low, high = (place * torch.tensor(found.patch)).tolist(), ((place + 1) * torch.tensor(found.patch)).tolist()
    changed = image.clone()
    changed[0, 0, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 5
    difference = (found(changed)[1] - found(image)[1]).norm(dim=-1)[0]
    nearest = torch.stack(torch.unravel_index(difference.argmax(), found.grid(SIZE)))
    assert (nearest - place).abs().max() <= 1


def test_images_are_told_apart_at_the_start() -> None:
    """The plain mean after an instance norm hides nearly everything; a teacher must say different things."""
    torch.manual_seed(0)
    found = reader("plain", 16).eval()
    images = torch.randn(16, 1, *SIZE).cumsum(2).cumsum(3).cumsum(4)
    images = (images - images.mean((2, 3, 4), keepdim=True)) / images.std((2, 3, 4), keepdim=True)
    plain = found.backbone.features(images)[-1].mean((2, 3, 4))

    def cosine(vectors: torch.Tensor) -> float:
        unit = nn.functional.normalize(vectors, dim=1)
        return ((unit @ unit.T).sum() - 16).item() / (16 * 15)

    assert cosine(plain) > 0.98
    assert cosine(found(images)[0]) < 0.9


def test_a_head_ends_on_the_sphere_in_any_precision() -> None:
    head = ProjectionHead(width=6, hidden_dim=16, bottleneck_dim=8, prototypes=20)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(torch.randn(3, 4, 6))
    assert out.dtype == torch.float32
    assert torch.allclose(out.norm(dim=-1), torch.ones(3, 4), atol=1e-5)
    assert torch.allclose(head.prototypes.norm(dim=-1), torch.ones(20), atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "vit"])
def test_a_copy_reads_its_own_network(kind: str) -> None:
    student = DistilledNetwork(reader(kind, 8), hidden_dim=8, bottleneck_dim=4, prototypes=5).eval()
    teacher = copy.deepcopy(student)
    image = torch.randn(1, 1, *SIZE)
    before = teacher.reader(image)[0]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert teacher.reader.backbone.network is teacher.reader.network
    assert torch.equal(teacher.reader(image)[0], before)
    assert not torch.equal(student.reader(image)[0], before)
