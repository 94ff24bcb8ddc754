"""Feature maps on the image's grid."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch

from nnssl_ext.features.cases import Case, preprocess
from nnssl_ext.features.maps import affine_of, enlarge, on_image, principal_axes, project, write_nifti
from nnssl_ext.features.window import Grid
from nnssl_ext.transfer.target import TargetPlans, checked_plans
from tests.datasets import make_labels, make_plans


def plans(reader: str = "SimpleITKIO", spacing: tuple = (1.0, 1.0, 1.0)) -> TargetPlans:
    content = make_plans("plain")
    content |= {"image_reader_writer": reader, "transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
    content["configurations"]["3d_fullres"]["spacing"] = list(spacing)
    labels = {"channel_names": {"0": "MR"}, "file_ending": ".nii.gz", **make_labels("plain")}
    return checked_plans(content, labels, "3d_fullres", "nnUNetTrainer")


def oblique_image(path: Path) -> SimpleITK.Image:
    """A smooth image with a zero border, an oblique direction and unequal spacing."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 26, 32)), indexing="ij")
    array = (axes[0] + 2 * axes[1] - axes[2] + 5).astype(np.float32)
    array[:3], array[:, -5:], array[:, :, :4] = 0, 0, 0
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((0.9, 1.1, 2.0))
    image.SetOrigin((-12.0, 30.0, 7.0))
    rotation = SimpleITK.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.5)
    image.SetDirection(rotation.GetMatrix())
    SimpleITK.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_a_map_lies_on_the_images_grid(tmp_path: Path, reader: str) -> None:
    """The preprocessed image itself, as a map of stride one, comes back to its own place."""
    path, written = tmp_path / "case_0000.nii.gz", tmp_path / "map.nii.gz"
    original = SimpleITK.GetArrayFromImage(oblique_image(path)).transpose(2, 1, 0)
    to = plans(reader, (1.0, 1.6, 1.0))
    loaded = preprocess(Case("case", (path,)), to)
    grid = Grid.of(loaded.image.shape[1:], (16, 16, 16), (4, 4, 4))
    values = enlarge(grid.pad(loaded.image), grid)
    write_nifti(on_image(values, loaded.properties, to), affine_of(loaded.properties), written)
    found, image = nibabel.Nifti1Image.from_filename(written), nibabel.Nifti1Image.from_filename(path)
    assert found.affine == pytest.approx(image.affine, abs=1e-4)
    assert found.shape == (*image.shape, 1)
    assert found.get_data_dtype() == np.float32
    back, inside = found.get_fdata()[..., 0], original > 0
    assert (back[~inside] == 0).all()
    assert np.corrcoef(back[inside], original[inside])[0, 1] > 0.99


def test_a_coarse_map_keeps_its_place(tmp_path: Path) -> None:
    """Coordinates, averaged over the voxels of each feature, come back as coordinates."""
    grid = Grid.of((20, 24, 22), (16, 16, 16), (4, 4, 4))
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float) for n in grid.padded), indexing="ij"))
    coarse = torch.nn.functional.avg_pool3d(coordinates, 4)
    back, inner = enlarge(coarse, grid), (slice(2, -2),) * 3
    assert torch.allclose(back[(slice(None), *inner)], grid.crop(coordinates)[(slice(None), *inner)], atol=1e-4)


def test_readers_without_geometry_give_a_diagonal_affine() -> None:
    assert affine_of({"spacing": [5.0, 2.0, 1.0]}).tolist() == np.diag([1.0, 2.0, 5.0, 1.0]).tolist()


def test_principal_axes_are_those_of_the_weighted_voxels() -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(4, 3, 4, 5, generator=generator) * torch.tensor([1.0, 5, 2, 0.5])[:, None, None, None]
    share = torch.randint(0, 3, (3, 4, 5), generator=generator)
    repeated = found.flatten(1).repeat_interleave(share.flatten(), 1)
    mean, axes = principal_axes(found, share.float())
    assert torch.allclose(mean, repeated.mean(1), atol=1e-5)
    expected = torch.linalg.svd(repeated - repeated.mean(1, keepdim=True)).U
    assert torch.allclose((axes * expected).sum(0).abs(), torch.ones(4), atol=1e-4)
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
    first = project(found, (mean, axes), 2)
    assert first.shape == (2, 3, 4, 5)
    assert first[0].var() > first[1].var()
