"""What the manifest of a corpus knows."""

import os
from pathlib import Path

import pytest

from nnssl_ext.data.corpus.manifest import KEPT, Entry, Manifest
from nnssl_ext.data.corpus.preparation import left_out
from nnssl_ext.data.corpus.sources import Item
from nnssl_ext.data.corpus.volumes import Unusable


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"content")
    return str(path)


def kept(item: Item, number: int = 0) -> Entry:
    """Return an entry of a group's case."""
    channels = item.channels(item.groups[number])
    return Entry("s", list(item.files), item.stamp(), KEPT, case=f"c{number}", channels=channels, content=str(number))


def manifest_of(*entries: Entry) -> Manifest:
    found = Manifest(Path(), {})
    for entry in entries:
        found.add(entry)
    return found


def test_channels_in_another_order_are_not_known(file: str) -> None:
    item, swapped = (Item("s", (file,), ("T1", "T2"), (order,)) for order in ((0, 1), (1, 0)))
    assert manifest_of(kept(item)).knows(item, {"c0"})
    assert not manifest_of(kept(item)).knows(swapped, {"c0"})


def test_files_in_another_order_are_not_known_and_make_way(tmp_path: Path, file: str) -> None:
    """As after a correction of dataset.json: the names are the same."""
    other = tmp_path / "b.nii.gz"
    other.touch()
    item, swapped = (Item("s", files, ("T1", "T2"), ((0, 1),)) for files in ((file, str(other)), (str(other), file)))
    manifest = manifest_of(kept(item))
    assert not manifest.knows(swapped, {"c0"})
    assert manifest.forget(swapped) == {"0": "c0"}
    assert manifest.all() == []


def test_cases_of_single_channels_are_known_in_any_order(file: str) -> None:
    item, swapped = (Item("s", (file,), ("T1", "T2"), groups) for groups in (((0,), (1,)), ((1,), (0,))))
    manifest = manifest_of(kept(item), kept(item, 1))
    assert manifest.knows(item, {"c0", "c1"})
    assert manifest.knows(swapped, {"c0", "c1"})
    assert not manifest.knows(Item("s", (file,), ("T1", "T2"), ((0,),)), {"c0", "c1"})


def test_what_cannot_be_read_is_known(file: str) -> None:
    item = Item("s", (file,), ("T1", "T2"), ((0,), (1,)))
    assert manifest_of(left_out(item, Unusable("broken"))).knows(item, set())


def test_a_replaced_file_of_the_same_size_and_an_older_date_is_not_known(tmp_path: Path, file: str) -> None:
    (tmp_path / "b.nii.gz").write_bytes(b"other")
    item = Item("s", (file, str(tmp_path / "b.nii.gz")), ("T1", "T2"), ((0, 1),))
    for name, seconds in (("a.nii.gz", 1000), ("b.nii.gz", 2000)):
        os.utime(tmp_path / name, (seconds, seconds))
    manifest = manifest_of(kept(item))
    os.utime(file, (500, 500))
    assert not manifest.knows(item, {"c0"})


def test_stamps_of_earlier_versions_hold(file: str) -> None:
    """They are without the checksum."""
    item = Item("s", (file,))
    entry = kept(item)
    entry.stamp = entry.stamp[:3]
    assert manifest_of(entry).knows(item, {"c0"})
    entry.stamp = []
    assert not manifest_of(entry).knows(item, {"c0"})
