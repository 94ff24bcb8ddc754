"""Read NIfTI, Analyze, MGH, NRRD and MetaImage files.

Files come from elsewhere: headers are checked before voxels are read. A reader may still crash or fill the memory, so
it runs in a process of its own (``pool.py``).
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError

from nnssl_ext import files
from nnssl_ext.data.corpus.volumes import (
    MAX_COSINE,
    MAX_VOXELS,
    NotAnImage,
    NotWrittenError,
    Unusable,
    Volume,
    checked_affine,
    largest_cosine,
)
from nnssl_ext.errors import disk_is_full

#: Suffixes of image files, in lower case.
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr")
#: Suffixes of the data beside a header: .mhd, .nhdr and .hdr.
DATA_SUFFIXES = (".img", ".img.gz", ".raw", ".raw.gz", ".zraw")
_ITK = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO"}
#: Bytes that are searched for the text header of NRRD and MetaImage.
HEADER_BYTES = 2**16
#: Millimeters per unit: NIfTI's codes of meters and micrometers.
_UNITS = {1: 1000.0, 3: 0.001}
#: Two voxel sizes that differ by more are two.
SAME_SIZE = 1e-2


def image_suffix(name: str) -> str:
    """Return an image file's suffix in lower case, else ''."""
    lowered = name.lower()
    return next((suffix for suffix in SUFFIXES if lowered.endswith(suffix)), "")


def data_files(path: Path) -> list[Path]:
    """Find the files with a header's voxels by name."""
    if not path.name.lower().endswith((".mhd", ".nhdr", ".hdr")):
        return []
    stem = path.name.rpartition(".")[0]
    names = [f"{stem}{spelled}" for suffix in DATA_SUFFIXES for spelled in (suffix, suffix.upper())]
    if not path.name.lower().endswith(".hdr") and path.is_file():
        name = _data_name(_text_header(str(path)))
        names += [name] if name and not _is_elsewhere(name) else []
    return [path.parent / name for name in dict.fromkeys(names) if (path.parent / name).is_file()]


def read_image(path: str, canonical: bool = False, single: bool = False) -> list[Volume]:
    """Read the channels of a file.

    A 3-D image has one, a 4-D image several.

    Args:
        canonical: Turn the axes to right, anterior, superior, as nnU-Net's reorienting readers do.
        single: Refuse several channels by the header, before voxels are read.

    Raises:
        Unusable: If it cannot be read or its header makes no sense.
        MemoryError: If there is too little.
    """
    check_regular(path)
    try:
        volumes = (_read_by_itk if _ITK.get(image_suffix(path)) else _read_by_nibabel)(path, single)
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # a strange file may raise anything
        raise unreadable(error) from error
    return [volume.canonical() for volume in volumes] if canonical else volumes


def unreadable(error: Exception) -> Unusable:
    """Describe a failed reading.

    Raises:
        NotWrittenError: If the disk is full.
        MemoryError: If ITK has no memory.
    """
    if disk_is_full(error):
        raise NotWrittenError(f"cannot write: {last_line(error)}") from error
    if "allocate memory" in str(error):
        raise MemoryError(last_line(error)) from error
    return Unusable(f"cannot be read: {last_line(error)}")


def check_regular(path: str) -> None:
    """Refuse pipes, devices and empty files.

    Raises:
        Unusable: Then, and where there is no such file.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise Unusable(f"cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise Unusable("cannot be read: it is no regular file")
    if not found.st_size:
        raise Unusable("cannot be read: it is empty")


def last_line(error: BaseException) -> str:
    """Return the last line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][-200:] if lines else type(error).__name__


def _check_shape(shape: tuple[int, ...], single: bool) -> None:
    if len(shape) not in (3, 4):
        raise NotAnImage(f"{len(shape)}-D image" if len(shape) != 2 else "single slice", f"size {shape}")
    if single and len(shape) == 4 and shape[3] > 1:
        raise NotAnImage("4-D image", f"{shape[3]} volumes")
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS or min(shape) < 1:
        raise Unusable(f"has size {shape}; at most {MAX_VOXELS} voxels are read")


def _volumes(voxels: np.ndarray, affine: np.ndarray, remarks: list[str]) -> list[Volume]:
    """Make volumes of (x, y, z) or (x, y, z, t) voxels."""
    channels = np.moveaxis(voxels, 3, 0) if voxels.ndim == 4 else voxels[None]
    return [Volume(np.ascontiguousarray(one.T, dtype=np.float32), affine, list(remarks)) for one in channels]


def _read_by_nibabel(path: str, single: bool) -> list[Volume]:
    with ExitStack() as stack:
        header_stream = stack.enter_context(_stream(path))
        start = header_stream.read(540)
        header_stream.seek(0)
        kind = _nibabel_class(start, path)
        streams = {"header": header_stream, "image": header_stream}
        if path.lower().endswith(".hdr"):
            found = [file for file in data_files(Path(path)) if file.name.lower().endswith((".img", ".img.gz"))]
            if not found:
                raise Unusable("cannot be read: its .img file is missing")
            check_regular(str(found[0]))
            streams["image"] = stack.enter_context(_stream(str(found[0])))
        if kind is nibabel.MGHImage and start[28:30] == b"\0\0":  # nibabel takes 1 mm then
            raise Unusable("has unknown voxel size: its header holds none")
        # unchecked: nibabel sets unknown voxel sizes to 1
        header = kind.header_class(start[: kind.header_class.template_dtype.itemsize], check=False)
        image: Any = kind.from_file_map({name: FileHolder(fileobj=stream) for name, stream in streams.items()})
        _check_dtype(image.get_data_dtype())
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        _check_shape(shape, single)
        affine, remarks = _nibabel_affine(header)
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(shape, order="F")
        while streams["image"].read(2**20):  # gzip's checksum stands at the end
            pass
    return _volumes(voxels, affine, remarks)


@contextmanager
def _stream(path: str) -> Iterator[io.IOBase]:
    """Open a file, compressed or not, whatever its suffix."""
    with open(path, "rb") as file:
        yield gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file


def _nibabel_class(start: bytes, path: str) -> Any:
    kinds: tuple[Any, ...] = (nibabel.Nifti1Image, nibabel.Nifti2Image)
    if path.lower().endswith(".hdr"):
        kinds = (nibabel.Nifti1Pair, nibabel.Nifti2Pair, nibabel.AnalyzeImage)
    elif start[:4] == b"\0\0\0\1":  # MGH's version; nibabel has no test for it
        return nibabel.MGHImage
    for kind in kinds:
        if kind.header_class.may_contain_header(start):
            return kind
    raise Unusable(f"cannot be read: it begins with {start[:8]!r}, as no NIfTI, Analyze or MGH file does")


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.fields is not None:
        raise NotAnImage("color image", f"{len(dtype.fields)} values per voxel")
    if dtype.kind not in "iuf":
        raise NotAnImage("image of complex values")


def _nibabel_affine(header: Any) -> tuple[np.ndarray, list[str]]:
    """Return the affine in mm, and remarks.

    Voxel sizes are pixdim's, as in both of nnU-Net's readers. Directions are the sform's, or else the qform's.
    """
    if isinstance(header, nibabel.freesurfer.mghformat.MGHHeader):
        return checked_affine(header.get_affine()), []
    sizes = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    if not np.isfinite(sizes).all() or sizes.min() <= 0:
        raise Unusable(f"has unknown voxel size: spacing {tuple(sizes.tolist())}")
    stated = [header.get_base_affine()]
    if hasattr(header, "get_sform"):
        stated = _stated_affines(header) or stated
    affine = next((one for one in stated if largest_cosine(one) <= MAX_COSINE), None)
    if affine is None:
        affine = checked_affine(stated[0])
    found = np.linalg.norm(affine[:3, :3], axis=0)
    remarks = (
        [] if np.allclose(found, sizes, rtol=SAME_SIZE) else [f"its affine has voxels of {found.round(4).tolist()}"]
    )
    unit = _UNITS.get(int(header["xyzt_units"]) & 7, 1.0) if "xyzt_units" in header else 1.0
    affine = affine.copy()
    affine[:3, :3] *= sizes / found
    affine[:3] *= unit
    return checked_affine(affine), remarks


def _stated_affines(header: Any) -> list[np.ndarray]:
    """Return the sform. If there is none or it is sheared, return the qform too."""
    # as the standard and all readers take them
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    stated = [header.get_sform()] if header["sform_code"] > 0 else []
    if header["qform_code"] > 0 and not any(largest_cosine(one) <= MAX_COSINE for one in stated):
        # a registration may shear the sform; the qform cannot be sheared
        try:
            stated.append(header.get_qform())
        except (ValueError, HeaderDataError):  # its quaternion is no rotation
            if not stated:
                raise
    return stated


def _read_by_itk(path: str, single: bool) -> list[Volume]:
    suffix = image_suffix(path)
    header = _text_header(path)
    _check_text_header(path, header)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(_ITK[suffix])
    with tempfile.TemporaryDirectory() as folder:
        name, data = _utf8_name(path, Path(folder) / f"image{suffix}"), _data_name(header)
        if name != path and data and Path(data).name == data:  # it is looked for beside the link
            files.link(Path(folder) / data, Path(path).parent / data)
        reader.SetFileName(name)
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1:
            raise NotAnImage("color image", f"{reader.GetNumberOfComponents()} values per voxel")
        _check_shape(tuple(reader.GetSize()), single)
        image = reader.Execute()
    affine = np.eye(4)
    dimension = image.GetDimension()
    direction = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
    affine[:3, :3] = direction * np.asarray(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    affine = checked_affine(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    return _volumes(SimpleITK.GetArrayFromImage(image).T, affine, [])


def _text_header(path: str) -> dict[str, str]:
    """Read the text header's values by lower-case key."""
    with open(path, "rb") as file:
        lines = file.read(HEADER_BYTES).split(b"\n")
    found: dict[str, str] = {}
    separator = b":" if lines[0].startswith(b"NRRD") else b"="
    for line in lines:
        key, sign, value = line.rstrip(b"\r").partition(separator)
        if separator == b":" and not line.strip():
            break
        if sign:
            found[key.decode("latin-1").strip().lower()] = os.fsdecode(value.lstrip(b"=").strip())
        if found.get("elementdatafile"):
            break
    return found


def _check_text_header(path: str, header: dict[str, str]) -> None:
    """Refuse headers that crash or mislead ITK."""
    edges = header.get("ndims") or header.get("dimension", "")
    if not edges.isdigit() or not 2 <= int(edges) <= 5:
        raise Unusable(f"cannot be read: it has {edges or 'no number of'} dimensions")
    stated = next(
        (header[key] for key in ("elementspacing", "elementsize", "space directions", "spacings") if key in header), ""
    )
    sizes = [word for word in stated.split() if word.lower() not in ("none", "nan")]
    if len(sizes) < min(3, int(edges)):
        raise Unusable(f"has unknown voxel size: its header says '{stated}'")
    name = _data_name(header)
    if not name:
        return
    if _is_elsewhere(name):
        raise Unusable(f"cannot be read: its data lie outside its folder, in {name}")
    check_regular(str(Path(path).parent / name))


def _data_name(header: dict[str, str]) -> str:
    """Return the name of the one file that holds a text header's voxels, '' for several or the header's own."""
    name = header.get("elementdatafile") or header.get("data file") or header.get("datafile") or "LOCAL"
    return "" if name.partition(" ")[0] in ("LOCAL", "LIST") or "%" in name else name


def _is_elsewhere(name: str) -> bool:
    return os.path.isabs(name) or ".." in Path(name).parts or "\0" in name


def _utf8_name(path: str, link: Path) -> str:
    """Return a name that ITK opens in any locale. It may be a link."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        files.link(link, Path(path))
        return str(link)
