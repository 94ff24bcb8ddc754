"""What a corpus is made from: other nnU-Net data sets, Decathlon tasks, folders of image files, DICOM folders.

A source becomes items; an item is what one worker reads at once. Nothing is opened here but dataset.json and the first
bytes of files that may be DICOM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnssl_ext.data.cases import shorten
from nnssl_ext.data.corpus.volumes import SUFFIXES, is_dicom
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json

#: Largest dataset.json that is read from a source.
MOST_BYTES = 16 * 2**20
#: Folders that hold labels, never images.
LABEL_FOLDERS = ("labelsTr", "labelsTs", "gt_segmentations")
#: Where nnU-Net and the Decathlon keep images.
IMAGE_FOLDERS = ("imagesTr", "imagesTs")


@dataclass(frozen=True)
class Item:
    """What is read at once.

    Attributes:
        source: The source as it was named.
        files: One image file, one per channel of a case, or one DICOM folder.
        names: The channels that the files hold in their order; one empty name where nobody says.
        groups: The cases to make, each by the numbers of its channels in ``names``.
        normalization: nnU-Net scheme instead of the plan's; empty: the plan's.
        dicom: ``files`` is a DICOM folder.
    """

    source: str
    files: tuple[str, ...]
    names: tuple[str, ...] = ("",)
    groups: tuple[tuple[int, ...], ...] = ((0,),)
    normalization: str = ""
    dicom: bool = False

    def channels(self, *groups: tuple[int, ...]) -> list[str]:
        """Names of the channels that are taken, of all groups or of some; none where nobody says."""
        return [self.names[n] for group in groups or self.groups for n in group if self.names[n]]

    def stamp(self) -> list[int]:
        """Number of files, their bytes and the latest change: what differs when the files do."""
        files = [Path(name) for name in self.files]
        try:
            if self.dicom:
                files = [path for path in files[0].iterdir() if path.is_file()]
            stats = [path.stat() for path in files]
        except OSError:  # a dangling link; reading it will say so
            return [0, 0, 0]
        return [len(stats), sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)]


@dataclass(frozen=True)
class Wishes:
    """What the command line asks of the sources.

    Args:
        target_names: Channels of the target.
        channels: By source ("" for all): names of the channels to take.
        normalization: By source: nnU-Net's scheme.
    """

    target_names: tuple[str, ...]
    channels: dict[str, tuple[str, ...]]
    normalization: dict[str, str]

    def groups(self, source: str, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The cases that a source's channels make.

        Raises:
            UserError: If they do not fit the target's.
        """
        chosen = of_source(self.channels, source) or of_source(self.channels, "")
        single = len(self.target_names) == 1
        lowered = [name.casefold() for name in names]
        if chosen is None and single:
            return tuple((number,) for number in range(len(names)))
        wanted = [name.casefold() for name in chosen or self.target_names]
        missing = [name for name in wanted if name not in lowered]
        if missing or (not single and len(wanted) != len(self.target_names)):
            raise UserError(
                f"{source} has channels {', '.join(map(repr, names))}, the target has "
                f"{', '.join(map(repr, self.target_names))}; name which to take, in the target's order, with "
                f"--channels SOURCE=NAME,NAME, or leave the source out"
            )
        numbers = tuple(lowered.index(name) for name in wanted)
        return tuple((number,) for number in numbers) if single else (numbers,)


def of_source(choices: dict[str, Any], source: str) -> Any:
    """What was said of a source, by its word or by its folder's name; None if nothing."""
    for name in (source, os.path.basename(source.rstrip("/"))):
        if name in choices:
            return choices[name]
    return None


def items_of(source: str, wishes: Wishes) -> list[Item]:
    """The items of a source in a fixed order.

    Args:
        source: A path, or an nnU-Net raw data set by name or number.
        wishes: What is asked of it.

    Raises:
        UserError: If there is nothing that could be read, or its channels do not fit.
    """
    path = _path(source)
    try:
        items = list(_found(source, path, wishes))
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    if not items:
        raise UserError(f"{source}: no image found in {path}; expected {', '.join(SUFFIXES)} or DICOM files")
    scheme = of_source(wishes.normalization, source)
    return [replace(item, normalization=scheme) for item in items] if scheme else items


def _found(source: str, path: Path, wishes: Wishes) -> Iterator[Item]:
    if path.is_dir() and any((path / part).is_dir() for part in IMAGE_FOLDERS) and (path / "dataset.json").is_file():
        content = _dataset_json(path)
        if "modality" in content and "channel_names" not in content:
            return _decathlon(source, path, content["modality"], wishes)
        return _nnunet(source, path, content, wishes)
    return _walk(source, path, wishes)


def _path(source: str) -> Path:
    path = Path(source)
    if path.exists():
        return path.resolve()
    pattern = source if source.startswith("Dataset") else f"Dataset{source:0>3}_*"
    root = os.environ.get("nnUNet_raw")
    found = sorted(Path(root).glob(pattern)) if root and re.fullmatch(r"\d{1,3}|Dataset\d{3}_\w+", source) else []
    if len(found) != 1:
        raise UserError(f"source {source} is neither a file or folder nor a data set in nnUNet_raw ({root})")
    return found[0].resolve()


def _dataset_json(path: Path) -> dict:
    file = path / "dataset.json"
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"{file} has {file.stat().st_size} bytes; a dataset.json of at most {MOST_BYTES} is read")
    return read_json(file)


def _channel_names(names: Any, path: Path) -> tuple[str, ...]:
    """``{"0": "T1"}`` in the order of its numbers."""
    try:
        ordered = sorted((int(number), str(name)) for number, name in names.items())
        if [number for number, _ in ordered] == list(range(len(ordered))) and ordered:
            return tuple(name for _, name in ordered)
    except (AttributeError, TypeError, ValueError):
        pass
    raise UserError(f"{path / 'dataset.json'}: channels must be an object from '0', '1', ... to names, got {names!r}")


def _nnunet(source: str, path: Path, content: dict, wishes: Wishes) -> Iterator[Item]:
    names = _channel_names(content.get("channel_names"), path)
    ending = content.get("file_ending")
    if ending not in SUFFIXES:
        raise UserError(f"{path}: file_ending {ending!r} cannot be read; known: {', '.join(SUFFIXES)}")
    groups = wishes.groups(source, names)
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    for part in IMAGE_FOLDERS:
        cases: dict[str, dict[int, str]] = {}
        for file in _files(path / part):
            found = pattern.fullmatch(file.name)
            if found:
                cases.setdefault(found[1], {})[int(found[2])] = str(file)
        for case in sorted(cases):
            for group in groups:
                # a channel that is absent is a file that cannot be read
                absent = str(path / part / case)
                files = tuple(cases[case].get(n, f"{absent}_{n:04d}{ending}") for n in group)
                yield Item(source, files, tuple(names[n] for n in group), (tuple(range(len(group))),))


def _decathlon(source: str, path: Path, modality: Any, wishes: Wishes) -> Iterator[Item]:
    names = _channel_names(modality, path)
    groups = wishes.groups(source, names)
    for part in IMAGE_FOLDERS:
        for file in _files(path / part):
            if file.name.endswith(SUFFIXES) and not file.name.startswith("_"):
                yield Item(source, (str(file),), names, groups)


def _walk(source: str, path: Path, wishes: Wishes) -> Iterator[Item]:
    """Every image file below a folder is a case of one channel; so is every DICOM series."""
    named = len(wishes.target_names) > 1 or of_source(wishes.channels, source)
    groups = wishes.groups(source, ("",)) if named else ((0,),)
    if path.is_file():
        yield Item(source, (str(path),), groups=groups)
        return
    for folder, inner, _ in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in LABEL_FOLDERS)
        files = _files(Path(folder))
        images = [file for file in files if file.name.endswith(SUFFIXES)]
        for file in images:
            yield Item(source, (str(file),), groups=groups)
        if not images and any(map(is_dicom, files)):
            yield Item(source, (folder,), groups=groups, dicom=True)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())


def unused_words(wishes: Wishes, sources: Sequence[str]) -> None:
    """Raises UserError if --channels or --normalization name a source that was not given."""
    for option, choices in (("--channels", wishes.channels), ("--normalization", wishes.normalization)):
        for name in choices:
            if name and not any(of_source({name: True}, source) for source in sources):
                raise UserError(f"{option} names '{name}', which is no source; the sources are {shorten(sources)}")
