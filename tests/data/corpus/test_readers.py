"""Image files of all formats: the right voxels and geometry, and what is refused."""

import gzip
import os
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from nnssl_ext.data.corpus.readers import data_files, read_image
from nnssl_ext.data.corpus.volumes import NotAnImage, Unusable, Volume, label_values
from tests.volumes import SHAPE, volume, write_image

IMAGE = volume(1)
SPACING = (1.5, 1.0, 2.0)


def only(path: Path) -> Volume:
    (found,) = read_image(str(path))
    return found


def nifti(path: Path, affine: np.ndarray | None = None, kind: type = nibabel.Nifti1Image) -> Path:
    nibabel.save(kind(IMAGE.T, np.diag([*SPACING, 1.0]) if affine is None else affine), path)
    return path


def patched(path: Path, at: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd", "a.hdr", "A.NII.GZ", "A.MHA", "A.NRRD", "a.MHD"]
)
def test_formats(tmp_path: Path, name: str) -> None:
    lower = write_image(tmp_path / name.lower(), IMAGE, SPACING)
    path = lower.rename(tmp_path / name)
    found = only(path)
    np.testing.assert_array_equal(found.array, IMAGE)
    assert found.spacing == pytest.approx(SPACING[::-1])
    if not name.endswith("hdr"):
        assert found.geometry["direction"] == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    detached = {"a.mhd": "a.raw", "a.MHD": "a.raw", "a.nhdr": "a.raw", "a.hdr": "a.img"}
    assert [file.name for file in data_files(path)] == ([detached[name]] if name in detached else [])


def test_mgh_and_nifti_2(tmp_path: Path) -> None:
    for name, kind in (("a.mgz", nibabel.MGHImage), ("b.mgh", nibabel.MGHImage), ("c.nii", nibabel.Nifti2Image)):
        found = only(nifti(tmp_path / name, kind=kind))
        np.testing.assert_array_equal(found.array, IMAGE)
        assert (found.spacing, found.orientation) == (SPACING[::-1], "RAS")


def test_compression_is_told_by_content(tmp_path: Path) -> None:
    plain = nifti(tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(plain)
    (tmp_path / "b.nii").write_bytes(gzip.compress(plain))
    for name in ("a.nii.gz", "b.nii"):
        np.testing.assert_array_equal(only(tmp_path / name).array, IMAGE)


def test_a_changed_byte_in_a_compressed_file_is_found(tmp_path: Path) -> None:
    plain = nifti(tmp_path / "a.nii").read_bytes()
    packed = bytearray(gzip.compress(plain, 0))  # stored, not deflated: only the checksum can tell
    packed[2000] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(packed)
    with pytest.raises(Unusable, match="CRC"):
        only(tmp_path / "a.nii.gz")


def test_units(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(IMAGE.T, np.diag([0.0015, 0.001, 0.002, 1.0]))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    found = only(tmp_path / "a.nii")
    assert found.spacing == pytest.approx(SPACING[::-1])
    assert found.spacing == pytest.approx(SimpleITK.ReadImage(str(tmp_path / "a.nii")).GetSpacing()[::-1])


def test_a_sheared_sform_gives_way_to_the_qform(tmp_path: Path) -> None:
    """As ITK does it. Without a qform, the volume is refused."""
    sheared = np.diag([*SPACING, 1.0])
    sheared[0, 2] = 1.0
    image = nibabel.Nifti1Image(IMAGE.T, sheared)
    image.set_qform(np.diag([*SPACING, 1.0]), 1)
    image.set_sform(sheared, 2)
    nibabel.save(image, tmp_path / "a.nii")
    assert only(tmp_path / "a.nii").geometry["direction"] == (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "b.nii")
    with pytest.raises(Unusable, match="is sheared: its axes are"):
        only(tmp_path / "b.nii")


def test_a_qform_without_the_sign_of_its_third_axis(tmp_path: Path) -> None:
    """0 is 1, as in the standard. Sizes may be negative."""
    image = nibabel.Nifti1Image(IMAGE.T, np.diag([*SPACING, 1.0]))
    image.set_qform(np.diag([*SPACING, 1.0]), 1)
    image.set_sform(None, 0)
    nibabel.save(image, tmp_path / "a.nii")
    expected = only(tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[76:80] = np.float32(0).tobytes()
    content[80:84] = np.float32(-SPACING[0]).tobytes()
    (tmp_path / "b.nii").write_bytes(content)
    assert only(tmp_path / "b.nii").digest() == expected.digest()


def test_an_unknown_voxel_size_of_mgh(tmp_path: Path) -> None:
    nibabel.save(nibabel.MGHImage(IMAGE.T, np.diag([*SPACING, 1.0])), tmp_path / "a.mgh")
    only(tmp_path / "a.mgh")
    content = bytearray((tmp_path / "a.mgh").read_bytes())
    content[28:30] = b"\0\0"
    (tmp_path / "a.mgh").write_bytes(content)
    with pytest.raises(Unusable, match="has unknown voxel size: its header holds none"):
        only(tmp_path / "a.mgh")


def test_sizes_at_a_tie_of_the_digest_are_equal(tmp_path: Path) -> None:
    angle = np.radians(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    digests = set()
    for factor in (1.0, 1 + 1e-9, 1 - 1e-9):
        affine = np.eye(4)
        affine[:3, :3] = turn @ np.diag([0.78125, 0.46875, 1.0]) * factor
        digests.add(Volume(IMAGE.astype(np.float32), affine, []).digest())
    assert len(digests) == 1


def test_a_file_with_the_voxels_of_another_name_belongs_to_its_header(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.mhd", IMAGE)
    (tmp_path / "a.raw").rename(tmp_path / "voxels.raw")
    path.write_text(path.read_text().replace("a.raw", "voxels.raw"))
    assert data_files(path) == [tmp_path / "voxels.raw"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "voxels.raw").rename(tmp_path / "sub" / "voxels.raw")
    named = path.read_text()
    path.write_text(named.replace("voxels.raw", "sub/voxels.raw"))
    assert data_files(path) == [tmp_path / "sub" / "voxels.raw"]
    only(path)
    for elsewhere in ("../voxels.raw", str(tmp_path / "sub" / "voxels.raw"), "\xa0"):
        path.write_text(named.replace("voxels.raw", elsewhere))
        assert data_files(path) == []


def test_two_voxel_sizes_in_one_header(tmp_path: Path) -> None:
    """The voxel size is pixdim's, as in both of nnU-Net's readers."""
    image = nibabel.Nifti1Image(IMAGE.T, np.eye(4))
    image.set_qform(np.diag([2.0, 2.0, 2.0, 1.0]), 1)
    image.set_sform(np.diag([3.0, 3.0, 3.0, 1.0]), 1)
    nibabel.save(image, tmp_path / "a.nii")
    found = only(tmp_path / "a.nii")
    assert found.spacing == (2.0, 2.0, 2.0)
    assert found.remarks == ["its affine has voxels of [3.0, 3.0, 3.0]"]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("axis", [0, 2])
def test_an_unknown_voxel_size_of_nifti(tmp_path: Path, value: float, axis: int) -> None:
    path = patched(nifti(tmp_path / "a.nii"), 80 + 4 * axis, struct.pack("<f", value))
    for codes in ((0, 0), (1, 1)):
        patched(path, 252, struct.pack("<hh", *codes))
        with pytest.raises(Unusable, match="has unknown voxel size"):
            only(path)


@pytest.mark.parametrize(
    ("name", "line"), [("a.mha", "ElementSpacing"), ("a.nrrd", "space directions"), ("a.mhd", "E")]
)
def test_an_unknown_voxel_size_of_text_headers(tmp_path: Path, name: str, line: str) -> None:
    path = write_image(tmp_path / name, IMAGE, SPACING)
    lines = path.read_bytes().split(b"\n")
    kept = [one for one in lines if not one.startswith((b"ElementSpacing", b"space directions"))]
    assert len(kept) == len(lines) - 1, line
    path.write_bytes(b"\n".join(kept))
    with pytest.raises(Unusable, match="has unknown voxel size"):
        only(path)


def test_a_sheared_nrrd(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nrrd", IMAGE, SPACING)
    content = path.read_bytes()
    assert b"(0,0,2)" in content
    path.write_bytes(content.replace(b"(0,0,2)", b"(1,0,2)"))
    with pytest.raises(Unusable, match="is sheared"):
        only(path)


@pytest.mark.parametrize(
    ("dtype", "kind"), [([("R", "u1"), ("G", "u1"), ("B", "u1")], "color image"), ("c8", "image of complex values")]
)
def test_voxels_that_are_no_numbers(tmp_path: Path, dtype: object, kind: str) -> None:
    array = np.zeros(SHAPE, np.dtype(dtype))  # type: ignore[call-overload]
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(NotAnImage) as found:
        only(tmp_path / "a.nii")
    assert found.value.kind == kind


def test_a_header_asks_for_a_file_elsewhere_or_a_pipe(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.mhd", IMAGE)
    good = path.read_text()
    path.write_text(good.replace("a.raw", "/etc/hostname"))
    with pytest.raises(Unusable, match="its data lie outside its folder"):
        only(path)
    os.mkfifo(tmp_path / "pipe.raw")
    path.write_text(good.replace("a.raw", "pipe.raw"))
    with pytest.raises(Unusable, match="it is no regular file"):
        only(path)
    path.write_text(good.replace("a.raw", "gone.raw"))
    with pytest.raises(Unusable, match="No such file"):
        only(path)
    (tmp_path / "a.raw").write_bytes(b"12")
    path.write_text(good)
    with pytest.raises(Unusable, match="cannot be read"):
        only(path)


def test_headers_that_itk_crashes_on(tmp_path: Path) -> None:
    (tmp_path / "a.mha").write_text(
        "ObjectType = Image\nNDims = 300\nTransformMatrix = 1 0 0\nElementDataFile = LOCAL\n"
    )
    with pytest.raises(Unusable, match="it has 300 dimensions"):
        only(tmp_path / "a.mha")


def structures(count: int, shape: tuple[int, int, int] = (40, 40, 40)) -> np.ndarray:
    """A label map: pieces around random points."""
    random = np.random.default_rng(0)
    points = random.uniform(0, shape[0], (count, 3))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 1, 3)
    nearest = np.concatenate([((part - points) ** 2).sum(-1).argmin(1) for part in np.array_split(grid, 40)])
    return (1 + nearest).reshape(shape).astype(np.float32)


@pytest.mark.parametrize("count", [3, 17, 45, 117])
def test_label_maps_of_any_number_of_structures(count: int) -> None:
    labels = structures(count)
    labels[:8] = 0
    assert label_values(labels) == len(np.unique(labels))
    assert label_values(labels * 1000) == len(np.unique(labels))  # numbers as in FreeSurfer's tables


def test_images_are_no_label_maps() -> None:
    noise = np.random.default_rng(0).standard_normal((40, 40, 40))
    body = volume(0, (40, 40, 40))
    assert label_values(body) == 0
    assert label_values(np.round(body)) == 0  # integers
    assert label_values(np.clip(np.round(body), 0, 255)) == 0  # without noise around the body
    assert label_values(np.round(20 * noise), "t1_seg.nii.gz") == 0
    smooth = np.round(255 * np.exp(-(np.linspace(-2, 2, 40) ** 2)))
    assert label_values(smooth[:, None, None] * np.ones((40, 40, 40)) + 0.25) == 0


def test_fine_parcellations_are_told_by_their_names() -> None:
    random = np.random.default_rng(0)
    fine = np.kron(random.integers(1, 500, (20, 20, 20)), np.ones((2, 2, 2))).astype(np.float32)
    assert label_values(fine) == 0
    for name in ("sub-1_dseg.nii.gz", "aparc+aseg.mgz", "x-label.nrrd", "Mask_1.nii"):
        assert label_values(fine, name) == 499
    for name in ("segovia.nii.gz", "unmasked.nii.gz", "t1.nii.gz"):
        assert label_values(fine, name) == 0


def test_equal_content_in_any_order_of_axes(tmp_path: Path) -> None:
    first = only(nifti(tmp_path / "a.nii"))
    turned = np.array([[0.0, 1.0, 0, 0], [-1.5, 0, 0, 22.5], [0, 0, 2, 0], [0, 0, 0, 1]])
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(IMAGE.T, turned))
    nibabel.save(image, tmp_path / "b.nii")
    nibabel.save(nibabel.Nifti1Image(IMAGE.T, turned), tmp_path / "c.nii")
    assert only(tmp_path / "b.nii").digest() == only(tmp_path / "c.nii").digest() != first.digest()


def test_images_of_any_size_are_no_label_maps() -> None:
    """A sample at every (rows x columns)-th voxel would see one column of air."""
    image = np.random.default_rng(0).integers(1, 255, (391, 64, 64)).astype(np.float32)
    for edge in (64, 32, 16):
        part = image[:, :edge, :edge].copy()
        part[:, :, 0] = 0
        assert label_values(part) == 0


def test_a_qform_that_nobody_needs_may_be_wrong(tmp_path: Path) -> None:
    """The quaternion (1.001, 0, 0) is longer than 1."""
    sheared = np.diag([*SPACING, 1.0])
    sheared[0, 2] = 1.0
    quaternion = struct.pack("<fff", 1.001, 0, 0)
    good, wrong = (nifti(tmp_path / name, affine) for name, affine in (("a.nii", None), ("b.nii", sheared)))
    for path in (good, wrong):
        patched(patched(path, 252, struct.pack("<hh", 1, 1)), 256, quaternion)
    assert only(good).orientation == "RAS"
    with pytest.raises(Unusable, match="is sheared"):
        only(wrong)
    patched(good, 252, struct.pack("<hh", 1, 0))
    with pytest.raises(Unusable, match="cannot be read"):
        only(good)
