import fcntl
import os
import stat
from pathlib import Path

import pytest

from nnssl_ext import files
from nnssl_ext.errors import UserError
from nnssl_ext.files import link, lock_file, replaced_on_success


def test_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replaced_on_success(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replaced_on_success(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_flushed_through_a_handle_that_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to flush any other."""
    modes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    with replaced_on_success(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert modes == [os.O_RDWR]


def test_files_of_other_threads_keep_their_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed umask holds for all threads."""
    masks: list[int] = []
    monkeypatch.setattr(os, "umask", masks.append)
    with replaced_on_success(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert masks == []


def test_a_lock_makes_its_folder_or_says_in_one_line_why_not(tmp_path: Path) -> None:
    with lock_file(tmp_path / "a" / "b" / ".lock", "work"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="expected a folder that can be written for work, got .*file/c: Not a directory"
    ):
        lock_file(tmp_path / "file" / "c" / ".lock", "work")


def test_a_file_that_windows_holds_for_a_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    waits: list[float] = []

    def held(source: Path, target: Path) -> None:
        if len(waits) < 2:
            raise PermissionError
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", held)
    monkeypatch.setattr(files.time, "sleep", waits.append)
    with pytest.raises(PermissionError), replaced_on_success(tmp_path / "file"):
        pass
    assert not waits
    path = tmp_path / "file"
    with monkeypatch.context() as patch, replaced_on_success(path) as temporary:
        temporary.write_text("new")
        patch.setattr(files.os, "name", "nt")
        files._replace(temporary, path)
        assert path.read_text() == "new"
        temporary.write_text("new")
    assert len(waits) == 2


def test_a_link_leads_where_it_should(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "link"
    path.symlink_to(tmp_path / "gone")
    target.write_text("content")
    link(path, target)
    link(path, target)
    assert path.read_text() == "content"
    (tmp_path / "moved").write_text("moved")
    link(path, tmp_path / "moved")
    assert path.read_text() == "moved"
    link(target, tmp_path / "moved")  # what is no link stays
    assert target.read_text() == "content"


def test_a_file_is_copied_where_links_are_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    (tmp_path / "target").write_text("content")
    monkeypatch.setattr(Path, "symlink_to", forbidden)
    with pytest.raises(OSError, match="privilege"):
        link(tmp_path / "folder", tmp_path)
    link(tmp_path / "link", tmp_path / "target")
    assert (tmp_path / "link").read_text() == "content"
