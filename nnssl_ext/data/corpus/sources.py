"""List the images of a corpus's sources.

Sources are nnU-Net data sets, Decathlon tasks, and folders of image files or DICOM.

A source becomes items, and a worker reads one item at a time. Only dataset.json and the first bytes of files that may
be DICOM are opened here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnssl_ext.data.cases import shorten
from nnssl_ext.data.corpus.dicom import is_dicom
from nnssl_ext.data.corpus.readers import DATA_SUFFIXES, SUFFIXES, data_files, image_suffix
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json

#: Largest dataset.json that is read from a source, in bytes.
MAX_BYTES = 16 * 2**20
#: Folders that hold labels, never images.
LABEL_FOLDERS = ("labelsTr", "labelsTs", "gt_segmentations")
#: Where nnU-Net and the Decathlon keep images.
IMAGE_FOLDERS = ("imagesTr", "imagesTs")
#: Kind of the images of a data set whose names lack the channel's number.
NO_NUMBER = "images without a channel number as _0000"
#: Kind of those whose channel dataset.json does not name.
OTHER_NUMBER = "images of channels that dataset.json does not name"


#: Files of unread kinds: names by kind. A kind is a suffix or a phrase.
NotRead = dict[str, list[str]]


@dataclass(frozen=True)
class Item:
    """Files that are read together.

    Attributes:
        source: The source as it was named.
        files: One image file, one per channel of a case, or one DICOM folder or file.
        names: The channels of the files in their order; one empty name if unknown.
        groups: The cases to make, each by the numbers of its channels in ``names``.
        normalization: nnU-Net scheme instead of the plan's; empty: the plan's.
        dicom: ``files`` is a DICOM folder or file.
    """

    source: str
    files: tuple[str, ...]
    names: tuple[str, ...] = ("",)
    groups: tuple[tuple[int, ...], ...] = ((0,),)
    normalization: str = ""
    dicom: bool = False

    def channels(self, *groups: tuple[int, ...]) -> list[str]:
        """Return the channel names of given groups, or all."""
        return [self.names[n] for group in groups or self.groups for n in group if self.names[n]]

    def paths(self) -> list[Path]:
        """Return all files of the item, data files included.

        Raises:
            OSError: If a folder cannot be listed.
        """
        if self.dicom and os.path.isdir(self.files[0]):
            return [path for path in sorted(Path(self.files[0]).iterdir()) if path.is_file()]
        return [path for name in self.files for path in (Path(name), *data_files(Path(name)))]

    def stamp(self) -> list[int]:
        """Return number, bytes, latest change and a checksum.

        The checksum is of each file's name, size and time.
        """
        try:
            rows = [(path.name, stat.st_size, stat.st_mtime_ns) for path in self.paths() for stat in (path.stat(),)]
        except (OSError, ValueError):  # a dangling link; its reader will name it
            return [0, 0, 0, 0]
        latest = max((row[2] for row in rows), default=0)
        return [len(rows), sum(row[1] for row in rows), latest, crc32(repr(rows).encode())]


@dataclass(frozen=True)
class Wishes:
    """Channels and normalizations that the command line asks for.

    Args:
        target_names: Channels of the target.
        channels: By source ("" for all): names of the channels to take.
        normalization: By source: nnU-Net's scheme.
    """

    target_names: tuple[str, ...]
    channels: dict[str, tuple[str, ...]]
    normalization: dict[str, str]

    def groups(self, source: str, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Group a source's channels into cases.

        Raises:
            UserError: If they do not fit the target's.
        """
        chosen = of_source(self.channels, source) or of_source(self.channels, "")
        single = len(self.target_names) == 1
        lowered = [name.casefold() for name in names]
        if chosen is None and single:
            return tuple((number,) for number in range(len(names)))
        wanted = [name.casefold() for name in chosen or self.target_names]
        numbers = _numbers(wanted, lowered)
        if None in numbers or (not single and len(wanted) != len(self.target_names)):
            raise UserError(
                f"{source} has channels {', '.join(map(repr, names))}, the target has "
                f"{', '.join(map(repr, self.target_names))}. Name which to take, in the target's order, with "
                f"--channels SOURCE=NAME,NAME, or leave the source out"
            )
        found = tuple(number for number in numbers if number is not None)
        return tuple((number,) for number in found) if single else (found,)


def _numbers(wanted: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return the channel number of each wanted name. Names may repeat, as in several phases of CT."""
    numbers: list[int | None] = []
    for name in wanted:
        free = (n for n, other in enumerate(names) if other == name and n not in numbers)
        numbers.append(next(free, None))
    return numbers


def of_source(choices: dict[str, Any], source: str) -> Any:
    """Return the choice for a source, None without one."""
    for name in (source, os.path.basename(source.rstrip("/\\"))):
        if name in choices:
            return choices[name]
    return None


def items_of(source: str, wishes: Wishes, not_read: NotRead | None = None) -> list[Item]:
    """List the items of a source in a fixed order.

    Args:
        source: A path, or an nnU-Net raw data set by name or number.
        not_read: Takes the files that no item holds.

    Raises:
        UserError: If there is nothing to read, or its channels do not fit.
    """
    path = _path(source)
    not_read = {} if not_read is None else not_read
    try:
        items = list(_found(source, path, wishes, not_read))
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    if not items:
        missing = not_read.get(NO_NUMBER)
        if missing:
            raise UserError(
                f"{source}: expected image names with a channel number, as CASE_0000.nii.gz, got "
                f"{shorten(missing)}. Rename them."
            )
        found = f"; got {describe_not_read(not_read)}" if not_read else ""
        raise UserError(f"{source}: no image found in {path}. Expected {', '.join(SUFFIXES)} or DICOM files{found}")
    scheme = of_source(wishes.normalization, source)
    return [replace(item, normalization=scheme) for item in items] if scheme else items


def describe_not_read(not_read: NotRead) -> str:
    """Count files by kind: "3 .pdf (a.pdf), 1 .zip (b.zip)"."""
    return ", ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in sorted(not_read.items()))


def channel_names(content: dict, path: Path) -> tuple[str, ...]:
    """Return the channels of a dataset.json in order.

    Raises:
        UserError: If there are none.
    """
    names = content.get("channel_names") or content.get("modality")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: expected channel_names as an object from numbers to names, got {names!r}")
    return tuple(str(name) for name in names.values())


def _found(source: str, path: Path, wishes: Wishes, not_read: NotRead) -> Iterator[Item]:
    if path.is_dir() and any((path / part).is_dir() for part in IMAGE_FOLDERS) and (path / "dataset.json").is_file():
        content = read_json(path / "dataset.json", most=MAX_BYTES)
        names = channel_names(content, path / "dataset.json")
        if "channel_names" in content:
            return _nnunet(source, path, names, content.get("file_ending"), wishes, not_read)
        images = [file.name for part in IMAGE_FOLDERS for file in _files(path / part) if image_suffix(file.name)]
        if _is_version_1(images, len(names)):
            return _nnunet(source, path, names, ".nii.gz", wishes, not_read)
        return _decathlon(source, path, names, wishes)
    return _walk(source, path, wishes, not_read)


def _is_version_1(images: Sequence[str], channels: int) -> bool:
    """Return whether names end in the numbers of channels, as in nnU-Net's first version.

    Some Decathlon-like data sets number their cases alike: amos_0001, amos_0004.
    """
    found = [re.fullmatch(r"(.+)_(\d{4})\.nii\.gz", name) for name in images]
    lowest: dict[str, int] = {}
    for match in found:
        if match is None:
            return False
        lowest[match[1]] = min(int(match[2]), lowest.get(match[1], channels))
    surplus = any(match is not None and int(match[2]) >= channels for match in found)
    return bool(lowest) and max(lowest.values()) < channels and (len(lowest) > 1 or not surplus)


def _path(source: str) -> Path:
    path, root = Path(source), os.environ.get("nnUNet_raw")
    if path.exists():
        return path.resolve()
    try:
        if root and re.fullmatch(r"\d+|Dataset\d{3,}_.+", source):
            found = Path(root) / maybe_convert_to_dataset_name(source)
            if found.is_dir():
                return found.resolve()
    except RuntimeError:  # none or several
        pass
    raise UserError(f"source {source} is neither a file or folder nor a data set in nnUNet_raw ({root})")


def _nnunet(
    source: str, path: Path, names: tuple[str, ...], ending: Any, wishes: Wishes, not_read: NotRead
) -> Iterator[Item]:
    """Yield the cases of an nnU-Net raw data set.

    Args:
        source: As named on the command line.
        names: Channels of the data set.
        ending: Suffix of its images.
        not_read: Takes images without a channel number.
    """
    if ending not in SUFFIXES:
        raise UserError(f"{path}: file_ending {ending!r} cannot be read. Known: {', '.join(SUFFIXES)}")
    groups = wishes.groups(source, names)
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    for part in IMAGE_FOLDERS:
        cases: dict[str, dict[int, str]] = {}
        for file in _files(path / part):
            found = pattern.fullmatch(file.name)
            if found and int(found[2]) < len(names):
                cases.setdefault(found[1], {})[int(found[2])] = str(file)
            else:
                kind = OTHER_NUMBER if found else NO_NUMBER if file.name.endswith(ending) else _suffix(file.name)
                not_read.setdefault(kind, []).append(str(file))
        for case in sorted(cases):
            for group in groups:
                # a channel that is absent is a file that cannot be read
                absent = str(path / part / case)
                files = tuple(cases[case].get(n, f"{absent}_{n:04d}{ending}") for n in group)
                yield Item(source, files, tuple(names[n] for n in group), (tuple(range(len(group))),))


def _decathlon(source: str, path: Path, names: tuple[str, ...], wishes: Wishes) -> Iterator[Item]:
    groups = wishes.groups(source, names)
    for part in IMAGE_FOLDERS:
        for file in _files(path / part):
            if image_suffix(file.name) and not file.name.startswith("_"):
                yield Item(source, (str(file),), names, groups)


def _walk(source: str, path: Path, wishes: Wishes, not_read: NotRead) -> Iterator[Item]:
    """Make an item of every image file and DICOM folder."""
    named = len(wishes.target_names) > 1 or of_source(wishes.channels, source)
    groups = wishes.groups(source, ("",)) if named else ((0,),)
    if not path.is_dir():
        dicom = path.is_file() and not image_suffix(path.name) and is_dicom(path)
        if not path.is_file():
            not_read.setdefault("pipes or devices", []).append(str(path))
        elif dicom or image_suffix(path.name):
            yield Item(source, (str(path),), groups=groups, dicom=dicom)
        else:
            not_read.setdefault(_suffix(path.name), []).append(str(path))
        return

    def unreadable(error: OSError) -> None:
        not_read.setdefault("folders that cannot be opened", []).append(str(error.filename))

    for folder, inner, names in os.walk(path, onerror=unreadable):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in LABEL_FOLDERS)
        for link in filter(os.path.islink, (os.path.join(folder, name) for name in inner)):
            not_read.setdefault("links to folders", []).append(link)
        dicom = False
        for name in sorted(name for name in names if not name.startswith(".")):
            file = os.path.join(folder, name)
            if os.path.exists(file) and not os.path.isfile(file):
                not_read.setdefault("pipes or devices", []).append(file)
            elif image_suffix(name):
                yield Item(source, (file,), groups=groups)
            elif is_dicom(Path(file)):
                dicom = True
            elif not name.lower().endswith(DATA_SUFFIXES):  # those belong to a header
                not_read.setdefault(_suffix(name), []).append(file)
        if dicom:
            yield Item(source, (folder,), groups=groups, dicom=True)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())


def unused_words(wishes: Wishes, sources: Sequence[str]) -> None:
    """Refuse options that name no given source.

    Raises:
        UserError: Then.
    """
    for option, choices in (("--channels", wishes.channels), ("--normalization", wishes.normalization)):
        for name in choices:
            if name and not any(of_source({name: True}, source) for source in sources):
                raise UserError(f"{option} names '{name}', which is no source. The sources are {shorten(sources)}")
