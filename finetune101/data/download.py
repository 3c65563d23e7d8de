"""Download Caltech-101, check it and unpack it; nothing leaves the folder that it is unpacked to."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from finetune101.config import DataConfig
from finetune101.data import store
from finetune101.data.images import FOLDER, find_data
from finetune101.data.layouts import holds_classes
from finetune101.errors import Refused, escaped

OFFICIAL_URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip?download=1"
OFFICIAL_MD5 = "3138e1922a9193bfa496528edbbc45d0"
ARCHIVE = "caltech-101.zip"
INNER = FOLDER + ".tar.gz"
BAD_NAMES = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOENT)
MOST_BYTES = 4 * 2**30  # of all unpacked files: Caltech-101 has 0.14 GB


def download(target: Path, url: str = OFFICIAL_URL, md5: str = OFFICIAL_MD5) -> Path:
    """Download, check and unpack Caltech-101 (137 MB, CC BY 4.0) into ``target``/101_ObjectCategories.

    A broken download goes on where it stopped; ``target``/caltech-101.zip put there by hand is used instead.

    Returns:
        The folder of class folders; at once if it is already there.
    Raises:
        Refused: no network, a full disk, a wrong md5, or an archive with links or paths that leave it.
    """
    folder = target / FOLDER
    if folder.is_dir():
        return folder
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(store.alone(target / f".{ARCHIVE}.lock"))  # all ranks of torchrun come here
        except OSError as error:
            reason = error.strerror or error
            raise Refused(f"cannot write {escaped(str(target))}: {reason}; choose another folder") from error
        if not folder.is_dir():  # another process may have made it meanwhile
            _download(target, url, md5)
    return folder


def _download(target: Path, url: str, md5: str) -> None:
    by_hand, part = target / ARCHIVE, target / (ARCHIVE + ".part")
    archive = by_hand if by_hand.is_file() else part
    if archive is part:
        _fetch(url, part)
    try:
        with open(archive, "rb") as file:
            actual = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise Refused(f"{archive} cannot be read ({error.strerror}); delete it and download it again") from error
    if actual != md5:
        if archive is part:
            part.unlink()
        raise Refused(f"{archive} is damaged (md5 {actual} instead of {md5}); delete it and download it again")
    _unpack(archive, target)
    part.unlink(missing_ok=True)


def _fetch(url: str, part: Path) -> None:
    """Download ``url`` to ``part``, going on after the bytes already there. Raises Refused when it breaks off."""
    import http.client
    import urllib.error
    import urllib.request

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    # the address is ours or the caller's, never read from a file; the md5 decides what is taken of the answer
    by_hand = f"download {url.split('?')[0]} by other means to {part.with_suffix('')} and run the command once more"
    try:
        with urllib.request.urlopen(request, timeout=20) as response:  # nosec B310
            # a server may ignore the range and send the whole file: then start over
            if not (response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")):
                have = 0
            missing = _write(response, part, have)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing left to send: the md5 decides whether the file is whole
            return
        raise Refused(f"{url} answered {error.code} {error.reason}; {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Refused(f"the download broke off ({reason}); run the command once more to go on, or {by_hand}") from error
    if missing:
        raise Refused(f"the download broke off {missing} bytes early; run the command once more to go on")


def _write(response: Any, part: Path, have: int) -> int:
    """Append the response's body after the first ``have`` bytes of ``part``; returns how many bytes did not come."""
    from tqdm import tqdm

    length = int(response.headers.get("Content-Length") or 0)
    done = 0
    with (
        open(part, "ab" if have else "wb") as file,
        tqdm(total=have + length or None, initial=have, unit="B", unit_scale=True, desc="download") as bar,
    ):
        while chunk := response.read(1 << 18):
            file.write(chunk)
            done += len(chunk)
            bar.update(len(chunk))
    return max(0, length - done)


def _safe(name: str) -> bool:
    """Whether a name in an archive stays below the folder it is unpacked to, on any system."""
    windows = PureWindowsPath(name)
    return not (windows.drive or windows.root or ".." in windows.parts)


def _unpack(archive: Path, target: Path) -> None:
    """Unpack the zip's inner tar to a temporary folder and rename its 101_ObjectCategories into ``target``."""
    import tarfile
    import zipfile

    try:
        with (
            zipfile.ZipFile(archive) as outer,
            tempfile.TemporaryDirectory(prefix=".unpack-", dir=target, ignore_cleanup_errors=True) as temporary,
        ):
            folder = Path(temporary)
            for info in outer.infolist():
                _refuse(info.filename, archive, link=stat.S_ISLNK(info.external_attr >> 16))
            names = [n for n in outer.namelist() if PurePosixPath(n).name == INNER and not n.startswith("__MACOSX")]
            if len(names) != 1:
                raise Refused(f"{archive} does not hold {INNER}; delete it and download it again")
            with outer.open(names[0]) as stream, tarfile.open(fileobj=stream, mode="r|gz") as inner:
                _unpack_tar(inner, folder, archive)
            if not ((folder / FOLDER).is_dir() and holds_classes(folder / FOLDER)):
                raise Refused(f"{archive} holds no images in {FOLDER}; delete it and download it again")
            os.replace(folder / FOLDER, target / FOLDER)
    except Refused:
        raise
    except OSError as error:
        if error.errno is None or error.errno in BAD_NAMES:  # None: gzip's own
            raise _damaged(archive, error) from error
        raise Refused(f"{archive} cannot be unpacked to {target} ({error}); make room there and try again") from error
    except Exception as error:  # a damaged or hostile archive can raise nearly anything
        raise _damaged(archive, error) from error


def _damaged(archive: Path, error: Exception) -> Refused:
    reason = escaped(str(error)) or type(error).__name__
    return Refused(f"{archive} cannot be unpacked ({reason}); delete it and download it again")


def _refuse(name: str, archive: Path, link: bool) -> None:
    if link or not _safe(name):
        what = "a link or device" if link else "a path that leaves the archive"
        raise Refused(f"{archive} holds {what} ({escaped(name)}) and was not unpacked; delete it and download it again")


def _unpack_tar(inner: Any, folder: Path, archive: Path) -> None:
    """Write the tar's regular files, nothing else of it: no owners, no modes, no links."""
    from tqdm import tqdm

    total = 0
    for member in tqdm(inner, desc="unpack", unit=" files"):
        _refuse(member.name, archive, link=not (member.isfile() or member.isdir()) or member.issparse())
        total += max(member.size, 0)
        if member.size < 0 or total > MOST_BYTES:
            what = "a file of negative size" if member.size < 0 else f"more than {MOST_BYTES >> 30} GB"
            raise Refused(f"{archive} holds {what} and was not unpacked; delete it and download it again")
        name = PurePosixPath(member.name).name
        if not member.isfile() or name.startswith("."):
            continue
        inner.extract(member, folder, set_attrs=False, filter="data")


def ensure_data(config: DataConfig) -> None:
    """Downloads Caltech-101 when no data set is there and the user agrees (or gave --download)."""
    try:
        find_data(config.root)
    except Refused:
        if config.root is not None or os.environ.get("FINETUNE101_DATA"):
            raise  # a place was named: another one would not be looked at
        agreed = config.download
        if not agreed and sys.stdin is not None and sys.stdin.isatty():
            agreed = input("No data set found. Download Caltech-101 (137 MB) to data/? [y/N] ").lower().strip() == "y"
        if not agreed:
            raise
        download(Path("data"))
