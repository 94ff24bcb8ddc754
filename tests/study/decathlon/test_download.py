"""Downloads from a local server that does what servers do."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.study.decathlon import download as module
from nnssl_ext.study.decathlon.download import download

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content``; each connection ends after ``cut`` bytes; ``ranges`` says whether Range is understood."""

    content: bytes = CONTENT
    cut: int = len(CONTENT)
    ranges: bool = True
    status: int = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.tar"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.asked.append(wanted)
        if self.server.status:
            self.send_error(self.server.status)
            return
        begin = int(wanted[6:-1]) if wanted and self.server.ranges else 0
        if begin >= len(self.server.content):
            self.send_error(416)
            return
        rest = self.server.content[begin:]
        self.send_response(206 if begin else 200)
        if begin:
            last = len(self.server.content)
            self.send_header("Content-Range", f"bytes {begin}-{last - 1}/{last}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


fetch = partial(download, pause=0.0)


def test_a_cut_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cut = 400_000
    fetch(server.url, tmp_path / "file.tar", MD5)
    assert (tmp_path / "file.tar").read_bytes() == CONTENT
    assert server.asked == ["", "bytes=400000-", "bytes=800000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file.tar"]
    fetch(server.url, tmp_path / "file.tar", MD5)
    assert len(server.asked) == 3


def test_a_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar.part").write_bytes(CONTENT[:1000])
    fetch(server.url, tmp_path / "file.tar", MD5)
    assert server.asked == ["bytes=1000-"]
    (tmp_path / "file.tar").rename(tmp_path / "file.tar.part")  # stopped between the last byte and the checksum
    fetch(server.url, tmp_path / "file.tar", MD5)
    assert (tmp_path / "file.tar").read_bytes() == CONTENT


def test_a_server_without_ranges_is_asked_from_the_beginning(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.tar.part").write_bytes(b"something else")
    fetch(server.url, tmp_path / "file.tar", MD5)
    assert (tmp_path / "file.tar").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(UserError, match=rf"gave a file with md5 \w+, expected {MD5}"):
        fetch(server.url, tmp_path / "file.tar", MD5)
    assert not list(tmp_path.iterdir())


def test_a_connection_that_stays_cut_is_given_up(server: Server, tmp_path: Path) -> None:
    server.cut = 0
    (tmp_path / "file.tar.part").write_bytes(CONTENT[:10])
    with pytest.raises(UserError, match="10 bytes are kept in .*, call again to go on"):
        fetch(server.url, tmp_path / "file.tar", MD5)
    assert len(server.asked) == module.ATTEMPTS


def test_what_cannot_be_had(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.status = 404
    with pytest.raises(UserError, match="the server answered 404"):
        fetch(server.url, tmp_path / "file.tar", MD5)
    server.status = 503
    with pytest.raises(UserError, match="the server answered 503"):
        fetch(server.url, tmp_path / "file.tar", MD5)
    with pytest.raises(UserError, match="starts with https"):
        fetch("file:///etc/hostname", tmp_path / "file.tar", MD5)
    server.status = 0
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="has 10 bytes left"):
        fetch(server.url, tmp_path / "file.tar", MD5)
