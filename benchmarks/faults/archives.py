"""Archives for the downloader: damaged ones, and members that would leave the folder."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zipfile

from faults.mutations import changed_bytes

INNER = "caltech-101/101_ObjectCategories.tar.gz"
NAMES = ("../../out", "/tmp/out", "C:\\out", "..\\out", "a/../../out", "", ".", "x" * 300, "a/" * 1500 + "b", "\0",
         "con", "101_ObjectCategories", "101_ObjectCategories/ant/../../../out")  # fmt: skip
TYPES = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE,
         tarfile.DIRTYPE, tarfile.CONTTYPE)  # fmt: skip


def changed_archive(rng: random.Random, image: bytes, whole: bool) -> bytes:
    """The zip of Caltech-101 with two classes of one ``image``, ``whole`` or changed in one of five ways."""
    way = -1 if whole else rng.randrange(5)
    inner = _tar(rng, image, member=way == 0)
    if way == 1:
        inner = changed_bytes(rng, inner)
    packed = gzip.compress(inner, mtime=0)
    if way == 2:
        packed = changed_bytes(rng, packed)
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        file.writestr(INNER, packed)
        if way == 3:
            info = zipfile.ZipInfo(rng.choice(NAMES) or "x")
            info.external_attr = rng.choice([0o120777, 0o100644, 0o060666]) << 16
            file.writestr(info, b"/etc/passwd")
    content = outer.getvalue()
    return changed_bytes(rng, content) if way == 4 else content


def _tar(rng: random.Random, image: bytes, member: bool) -> bytes:
    """A tar of two classes, with a ``member`` that should not be unpacked."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as file:
        if member and rng.random() < 0.5:
            _add_hostile(rng, file)
        for name in ("ant", "bee"):
            info = tarfile.TarInfo(f"101_ObjectCategories/{name}/image_0001.jpg")
            info.size = len(image)
            file.addfile(info, io.BytesIO(image))
        if member:
            _add_hostile(rng, file)
    return inner.getvalue()


def _add_hostile(rng: random.Random, file: tarfile.TarFile) -> None:
    info = tarfile.TarInfo(rng.choice(NAMES))
    if rng.random() < 0.5:
        info = tarfile.TarInfo("101_ObjectCategories/ant/image_0002.jpg")
        info.type = rng.choice(TYPES)
        info.linkname = rng.choice(["/etc/passwd", "../../../out", "image_0001.jpg", ""])
    info.mode = 0o777
    file.addfile(info)
