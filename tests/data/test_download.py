"""Downloading from a server on loopback: resumed, damaged, malicious and missing archives."""

from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune101.data import download as downloading
from finetune101.data.download import ARCHIVE, download
from finetune101.data.images import FOLDER, index_images
from finetune101.errors import Refused

NOISE = b"".join(hashlib.sha256(bytes([i // 256, i % 256])).digest() for i in range(1000))  # does not compress
CONTENT = {"ant/image_0001.jpg": NOISE, "bee/image_0001.jpg": b"bee"}


def tar_of(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return stream.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def archive_of(*extra: tarfile.TarInfo, files: dict[str, bytes] | None = None) -> bytes:
    """A zip like the official one, holding the tar of ``files`` and ``extra`` members."""
    inner = files or {f"{FOLDER}/{name}": content for name, content in CONTENT.items()} | {f"{FOLDER}/ant/._x": b"mac"}
    return zip_of(
        {
            "caltech-101/Annotations.tar": b"not unpacked",
            f"caltech-101/{FOLDER}.tar.gz": tar_of(inner, *extra),
            f"__MACOSX/caltech-101/._{FOLDER}.tar.gz": b"mac",
        }
    )


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``data``; understands ranges unless told not to, and breaks off after ``most`` bytes."""

    data = archive_of()
    most: int | None = None
    ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.starts: list[int] = []  # where each request began

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{ARCHIVE}?download=1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data, wanted = self.server.data, self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        self.server.starts.append(start)
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.server.most])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def assert_complete(folder: Path, target: Path) -> None:
    assert folder == target / FOLDER
    assert index_images(folder).paths == tuple(CONTENT)
    assert all((folder / path).read_bytes() == content for path, content in CONTENT.items())
    assert [entry.name for entry in target.iterdir()] == [FOLDER]  # no .part, no temporary folder


def test_downloads_checks_and_unpacks(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "new" / "data"
    assert_complete(download(target, server.url, md5(server.data)), target)
    assert download(target, "http://nobody.invalid", "") == target / FOLDER  # already there


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_after_a_broken_download(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.most, server.ranges = 5000, ranges
    with pytest.raises(ValueError, match="run the command once more"):
        download(tmp_path, server.url, md5(server.data))
    assert (tmp_path / f"{ARCHIVE}.part").read_bytes() == server.data[:5000]
    server.most = None
    assert_complete(download(tmp_path, server.url, md5(server.data)), tmp_path)
    assert server.starts == [0, 5000 if ranges else 0]


def test_unpacks_a_part_that_was_complete_already(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{ARCHIVE}.part").write_bytes(server.data)
    assert_complete(download(tmp_path, server.url, md5(server.data)), tmp_path)


def test_refuses_a_wrong_md5_and_forgets_the_download(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is damaged"):
        download(tmp_path, server.url, "0" * 32)
    assert not list(tmp_path.iterdir())


def test_uses_an_archive_put_there_by_hand_and_keeps_it(tmp_path: Path) -> None:
    data = archive_of()
    (tmp_path / ARCHIVE).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        download(tmp_path, "http://nobody.invalid", "0" * 32)
    assert index_images(download(tmp_path, "http://nobody.invalid", md5(data))).paths == tuple(CONTENT)
    assert (tmp_path / ARCHIVE).read_bytes() == data


def link(name: str, kind: bytes, goal: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"{FOLDER}/{name}")
    info.type, info.linkname = kind, goal
    return info


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (archive_of(link("a", tarfile.SYMTYPE, "/etc")), "link"),
        (archive_of(link("a", tarfile.LNKTYPE, f"{FOLDER}/ant/image_0001.jpg")), "link"),
        (archive_of(link("a", tarfile.FIFOTYPE, "")), "link or device"),
        (archive_of(files={"../out.jpg": b"x"}), "a path that leaves"),
        (archive_of(files={f"{FOLDER}/ant/../../../out.jpg": b"x"}), "a path that leaves"),
        (archive_of(files={"/tmp/out.jpg": b"x"}), "a path that leaves"),
        (archive_of(files={"C:\\out.jpg": b"x"}), "a path that leaves"),
        (archive_of(files={"..\\out.jpg": b"x"}), "a path that leaves"),
        (zip_of({"../evil": b"x", f"{FOLDER}.tar.gz": tar_of({})}), "a path that leaves"),
        (archive_of(files={"elsewhere/1.jpg": b"x"}), "holds no images"),
        (zip_of({"other": b"x"}), "does not hold"),
        (zip_of({f"{FOLDER}.tar.gz": b"not a tar"}), "cannot be unpacked"),
        (zip_of({f"{FOLDER}.tar.gz": tar_of({f"{FOLDER}/ant/1.jpg": NOISE})[:20000]}), "cannot be unpacked"),
        (b"not a zip", "cannot be unpacked"),
    ],
)
def test_refuses_a_bad_archive_and_leaves_nothing(tmp_path: Path, data: bytes, says: str) -> None:
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    (target / ARCHIVE).write_bytes(data)
    with pytest.raises(ValueError, match=says) as caught:
        download(target, "http://nobody.invalid", md5(data))
    assert "\n" not in str(caught.value)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "b", ARCHIVE]


def method(number: int) -> bytes:
    """The archive with another number for the way its files are packed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"{FOLDER}.tar.gz", tar_of({f"{FOLDER}/ant/1.jpg": b"x"}))
    data = bytearray(stream.getvalue())
    for start in (data.index(b"PK\3\4") + 8, data.index(b"PK\1\2") + 10):
        data[start] = number
    return bytes(data)


def locked() -> bytes:
    data = bytearray(method(0))
    for start in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        data[start] |= 1
    return bytes(data)


def claiming(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """An archive whose last file claims a size."""
    info = tarfile.TarInfo(f"{FOLDER}/ant/claims.jpg")
    info.size, info.type = size, kind
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        first = tarfile.TarInfo(f"{FOLDER}/ant/1.jpg")
        first.size = 1
        tar.addfile(first, io.BytesIO(b"x"))
        assert tar.fileobj is not None
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
        tar.fileobj.write(bytes(1024))
    return zip_of({f"{FOLDER}.tar.gz": stream.getvalue()})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (locked(), "encrypted"),
        (method(99), "cannot be unpacked"),
        (method(12), "cannot be unpacked"),
        (method(14), "cannot be unpacked"),
        (archive_of(files={"": b"x", ".": b"x"}), "download it again"),
        (archive_of(files={f"{FOLDER}/" + "d/" * 2000 + "1.jpg": b"x"}), "cannot be unpacked|path that leaves"),
        (archive_of(files={f"{FOLDER}/ant/{'x' * 300}.jpg": b"x"}), "cannot be unpacked"),
        (claiming(-2000), "negative size|cannot be unpacked"),
        (claiming(2**40), "more than 4 GB"),
        (claiming(10, tarfile.GNUTYPE_SPARSE), "link or device|cannot be unpacked"),
        (archive_of(files={f"{FOLDER}/ant": b"x", f"{FOLDER}/ant/1.jpg": b"x"}), "cannot be unpacked"),
    ],
)
def test_damaged_and_hostile_archives_are_one_sentence(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / ARCHIVE).write_bytes(data)
    with pytest.raises(Refused, match=says) as caught:
        download(tmp_path, "http://nobody.invalid", md5(data))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


def test_processes_that_come_together_download_once(server: Server, tmp_path: Path) -> None:
    """As all ranks of torchrun do."""
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: download(tmp_path, server.url, md5(server.data)), range(3)))
    assert server.starts == [0]
    assert_complete(folders[0], tmp_path)


def test_without_network_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as free:  # a port where nobody listens
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/{ARCHIVE}?download=1"
        with pytest.raises(ValueError, match="broke off") as caught:
            download(tmp_path, url)
    message = str(caught.value)
    assert "\n" not in message
    assert url.split("?")[0] in message
    assert str(tmp_path / ARCHIVE) in message


def test_a_refusing_server_is_named(server: Server, tmp_path: Path) -> None:
    server.data = b""
    with pytest.raises(ValueError, match="answered 416"):
        download(tmp_path, server.url)


def test_a_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(ValueError, match="choose another folder"):
        download(tmp_path / "data", "http://nobody.invalid")


def test_a_fault_of_ours_is_not_told_as_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("a fault")

    monkeypatch.setattr(downloading, "_download", fail)
    with pytest.raises(OSError, match="a fault"):
        download(tmp_path, "http://nobody.invalid")
    assert not list(tmp_path.iterdir())


def test_an_archive_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"{ARCHIVE}.part").mkdir()
    with pytest.raises(Refused):
        download(tmp_path, "http://nobody.invalid")
