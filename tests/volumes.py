"""Raw images as they lie about, good ones and every kind of bad one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK

from nnssl_ext.data.corpus.volumes import kept_locale

SHAPE = (12, 14, 16)


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A noisy ball: float32."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (100 * (sum(a**2 for a in axes) < 0.8) + 5 * noise).astype(np.float32)


def write_image(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Path:
    """Write (D, H, W), or (T, D, H, W) as 4-D; ``spacing`` in mm, x y z."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 4:
        image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(part) for part in array])
    else:
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing(spacing[: image.GetDimension()])
    SimpleITK.WriteImage(image, str(path))
    return path


@kept_locale()
def write_series(
    folder: Path, array: np.ndarray, *, uid: str = "1.2.3", modality: str = "MR", skip: int = -1, turned: int = -1
) -> None:
    """Write a DICOM series, a file per slice of 2 mm; ``skip`` leaves one out, ``turned`` turns one in its plane."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, content in enumerate(array):
        if number == skip:
            continue
        image = SimpleITK.GetImageFromArray(content.astype(np.int16))
        image.SetSpacing((1.0, 1.0))
        tags = {
            "0008|0060": modality,
            "0008|0018": f"{uid}.{number + 1}",
            "0020|000d": "1.2.9",
            "0020|000e": uid,
            "0020|0013": str(number),
            "0020|0032": f"0\\0\\{2 * number}",
            "0020|0037": "0\\1\\0\\-1\\0\\0" if number == turned else "1\\0\\0\\0\\1\\0",
            "0018|0050": "2",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}_{number:03d}.dcm"))
        writer.Execute(image)


def write_bad_files(folder: Path) -> dict[str, str]:
    """One file of each kind that cannot be used; returns by name what will be said of it."""
    broken = volume(1)
    broken[3, 3, 3] = np.nan
    write_image(folder / "nan.nii.gz", broken)
    write_image(folder / "constant.mha", np.full(SHAPE, 7.0, np.float32))
    write_image(folder / "flat.nii.gz", volume(2)[:1])
    write_image(folder / "series.nii.gz", np.stack([volume(3), volume(4)]))
    write_image(folder / "tiny_spacing.nrrd", volume(5), (1e-7, 1.0, 1.0))
    whole = write_image(folder / "whole.nii", volume(6)).read_bytes()
    (folder / "whole.nii").unlink()
    (folder / "truncated.nii").write_bytes(whole[: len(whole) // 2])
    packed = write_image(folder / "packed.nii.gz", volume(7)).read_bytes()
    (folder / "packed.nii.gz").unlink()
    (folder / "truncated.nii.gz").write_bytes(packed[: len(packed) // 2])
    for name in ("truncated.nrrd", "truncated.mha"):
        content = write_image(folder / name, volume(8)).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "text.nii.gz").write_text("no image at all")
    (folder / "empty.mha").write_bytes(b"")
    colours = SimpleITK.Compose([SimpleITK.GetImageFromArray(volume(seed)) for seed in range(3)])
    SimpleITK.WriteImage(colours, str(folder / "colours.nrrd"))
    huge = b"NRRD0004\ntype: float\ndimension: 3\nsizes: 60000 60000 60000\nencoding: raw\nendian: little\n\n1234"
    (folder / "huge.nrrd").write_bytes(huge)
    return {
        "nan.nii.gz": "NaN",
        "constant.mha": "zero variance",
        "flat.nii.gz": "one slice",
        "series.nii.gz": "is 4-D",
        "tiny_spacing.nrrd": "would have size",
        "truncated.nii": "cannot be read",
        "truncated.nii.gz": "cannot be read",
        "truncated.nrrd": "cannot be read",
        "truncated.mha": "cannot be read",
        "text.nii.gz": "cannot be read",
        "empty.mha": "cannot be read",
        "colours.nrrd": "3 values per voxel",
        "huge.nrrd": "has size",
    }
