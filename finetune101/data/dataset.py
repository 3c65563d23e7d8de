"""Find, download and index a folder-per-class image data set; imports no torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from finetune101.data.formats import IMAGE_SUFFIXES
from finetune101.errors import Refused

FOLDER = "101_ObjectCategories"
LEFT_OUT = "BACKGROUND_Google"  # clutter, not an object class: the published protocols leave it out
OFFICIAL_CLASSES = 101
OFFICIAL_IMAGES = 8677
OFFICIAL_URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip?download=1"
OFFICIAL_MD5 = "3138e1922a9193bfa496528edbbc45d0"
ARCHIVE = "caltech-101.zip"
INNER = FOLDER + ".tar.gz"
SUBSETS = ("train", "val", "test")
HOW = f"run `finetune101 data download`, or give --data a folder with one folder per class (such as {FOLDER})"

Layout = Literal["classes", "folders"]


def _visible(folder: Path) -> list[Path]:
    """Entries that are not hidden, sorted by name."""
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise Refused(f"{folder} cannot be read ({error.strerror}); give --data another folder") from error
    return sorted(entries, key=lambda entry: entry.name)


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.name not in (LEFT_OUT, "__MACOSX") and entry.is_dir()]


def images_in(folder: Path) -> list[Path]:
    """Visible image files directly in a folder, sorted by name; the suffix decides, in any case."""
    return [entry for entry in _visible(folder) if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]


def _holds_classes(folder: Path) -> bool:
    return any(images_in(sub) for sub in _folders(folder))


def find(root: str | None) -> Path:
    """Folder of the data set: ``root``, else $FINETUNE101_DATA, else data/101_ObjectCategories here.

    The path may be the folder of class folders (or of train/, val/, test/), or its parent: a folder that contains
    101_ObjectCategories, or whose only folder holds the class folders.

    Raises:
        Refused: nothing there, a file, or no folder of images in it; the sentence says what to do.
    """
    given = root or os.environ.get("FINETUNE101_DATA") or None
    name = "--data" if root else "FINETUNE101_DATA"
    path = Path(given).expanduser() if given else Path("data") / FOLDER
    if not path.exists():
        start = f"{name} {path} does not exist" if given else f"no data set at {path}"
        raise Refused(f"{start}; {HOW}")
    if not path.is_dir():
        raise Refused(f"{path} is a file, not a folder; {HOW}")
    if (path / FOLDER).is_dir():
        path = path / FOLDER
    folders = _folders(path)
    if _holds_classes(path):
        return path
    if not folders and images_in(path):
        raise Refused(f"{path} holds images but no class folders; give --data its parent folder")
    if any(sub.name in SUBSETS and _folders(sub) for sub in folders):
        return path
    if len(folders) == 1 and _holds_classes(folders[0]):
        return folders[0]
    raise Refused(f"{path} holds no class folders with images; {HOW}")


@dataclass(frozen=True)
class Index:
    """The images of a data set.

    ``classes`` are sorted by code point, and so are ``paths`` (POSIX, relative to ``root``); ``digests`` maps each
    path to the sha256 (hex) of the file's bytes.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    digests: dict[str, str]


def class_of(path: str) -> str:
    """Class of an image: the name of the folder it lies in."""
    return PurePosixPath(path).parent.name


def layout_of(root: Path) -> Layout:
    """ "folders" where ``root`` has train/ and test/ that hold class folders with images, else "classes"."""
    subsets = (root / "train", root / "test")
    return "folders" if all(sub.is_dir() and _holds_classes(sub) for sub in subsets) else "classes"


def _class_images(folder: Path) -> dict[str, list[Path]]:
    """Class name -> image files. Raises Refused naming a class folder without images."""
    found = {sub.name: images_in(sub) for sub in _folders(folder)}
    for name, images in found.items():
        if not images:
            kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
            raise Refused(f"class folder {folder / name} holds no image ({kinds}); add images or remove the folder")
    return found


def _list_subsets(root: Path) -> dict[str, list[Path]]:
    """Class name -> image files of train/, val/ (may be missing) and test/ together."""
    found: dict[str, list[Path]] = {}
    for subset in SUBSETS:
        if not (root / subset).is_dir():
            if subset == "val":
                continue
            raise Refused(f"{root} has no folder {subset}/, which --protocol folders needs; add it")
        images = _class_images(root / subset)
        if subset != "train" and (unknown := sorted(set(images) - set(found))):
            raise Refused(f"{root / subset / unknown[0]} is a class that train/ does not have; add it or remove it")
        for name, files in images.items():
            found.setdefault(name, []).extend(files)
    return found


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); repair or remove it") from error


def index(root: Path, layout: Layout = "classes") -> Index:
    """List and hash the images below ``root``, the same in any file-system order.

    BACKGROUND_Google, hidden files and folders, and files that are no images by their suffix are left out.

    Args:
        root: what ``find`` returned.
        layout: "classes": root/CLASS/IMAGE. "folders": root/train/CLASS/IMAGE, the same in test/ and, if any, val/.

    Raises:
        Refused: fewer than two classes, a class folder without images, a missing subset, an unreadable file.
    """
    from concurrent.futures import ThreadPoolExecutor

    found = _list_subsets(root) if layout == "folders" else _class_images(root)
    if len(found) < 2:
        raise Refused(f"{root} holds {len(found)} class folder(s), at least 2 are needed; {HOW}")
    files = {file.relative_to(root).as_posix(): file for images in found.values() for file in images}
    paths = tuple(sorted(files))
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(paths, pool.map(_sha256, (files[path] for path in paths)), strict=True))
    return Index(root=root, classes=tuple(sorted(found)), paths=paths, digests=digests)


def other_files(found: Index) -> list[str]:
    """Visible files in the class folders that are no images by their suffix, relative to the root and sorted."""
    folders = {(found.root / path).parent for path in found.paths}
    others = (
        entry.relative_to(found.root).as_posix()
        for folder in folders
        for entry in _visible(folder)
        if entry.is_file() and entry.suffix.lower() not in IMAGE_SUFFIXES
    )
    return sorted(others)


def content_hash(digests: Mapping[str, str], paths: Iterable[str]) -> str:
    """ "sha256:..." over the sorted (path, sha256 of the file) pairs; raises KeyError for a path without digest."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path}\0{digests[path]}\n".encode("utf-8", "surrogateescape"))
    return f"sha256:{total.hexdigest()}"


def download(target: Path, url: str = OFFICIAL_URL, md5: str = OFFICIAL_MD5) -> Path:
    """Download, check and unpack Caltech-101 (137 MB, CC BY 4.0) into ``target``/101_ObjectCategories.

    A broken download goes on where it stopped; ``target``/caltech-101.zip put there by hand is used instead.

    Returns:
        The folder of class folders; at once if it is already there.
    Raises:
        Refused: no network, a full disk, a wrong md5, or an archive with links or paths that leave it.
    """
    if (target / FOLDER).is_dir():
        return target / FOLDER
    by_hand, part = target / ARCHIVE, target / (ARCHIVE + ".part")
    archive = by_hand if by_hand.is_file() else part
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{target} cannot be made ({error.strerror}); choose another folder") from error
    if archive is part:
        _fetch(url, part)
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        if archive is part:
            part.unlink()
        raise Refused(f"{archive} is damaged (md5 {found} instead of {md5}); delete it and download it again")
    _unpack(archive, target)
    part.unlink(missing_ok=True)
    return target / FOLDER


def _fetch(url: str, part: Path) -> None:
    """Download ``url`` to ``part``, going on after the bytes already there. Raises Refused when it breaks off."""
    import http.client
    import urllib.error
    import urllib.request

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    by_hand = f"download {url.split('?')[0]} by other means to {part.with_suffix('')} and run the command once more"
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
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


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".unpack-", dir=target))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(archive: Path, target: Path) -> None:
    """Unpack the zip's inner tar to a temporary folder and rename its 101_ObjectCategories into ``target``."""
    import tarfile
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(archive) as outer, _temporary(target) as folder:
            for info in outer.infolist():
                _refuse(info.filename, archive, link=stat.S_ISLNK(info.external_attr >> 16))
            names = [n for n in outer.namelist() if PurePosixPath(n).name == INNER and not n.startswith("__MACOSX")]
            if len(names) != 1:
                raise Refused(f"{archive} does not hold {INNER}; delete it and download it again")
            with outer.open(names[0]) as stream, tarfile.open(fileobj=stream, mode="r|gz") as inner:
                _unpack_tar(inner, folder, archive)
            if not ((folder / FOLDER).is_dir() and _holds_classes(folder / FOLDER)):
                raise Refused(f"{archive} holds no images in {FOLDER}; delete it and download it again")
            os.replace(folder / FOLDER, target / FOLDER)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise Refused(f"{archive} cannot be unpacked ({error}); delete it and download it again") from error
    except OSError as error:
        raise Refused(f"{archive} cannot be unpacked to {target} ({error}); make room there and try again") from error


def _refuse(name: str, archive: Path, link: bool) -> None:
    if link or not _safe(name):
        what = "a link or device" if link else "a path that leaves the archive"
        raise Refused(f"{archive} holds {what} ({name}) and was not unpacked; delete it and download it again")


def _unpack_tar(inner: Any, folder: Path, archive: Path) -> None:
    """Write the tar's regular files, nothing else of it: no owners, no modes, no links."""
    from tqdm import tqdm

    for member in tqdm(inner, desc="unpack", unit=" files"):
        _refuse(member.name, archive, link=not (member.isfile() or member.isdir()))
        parts = PurePosixPath(member.name).parts
        if not member.isfile() or parts[-1].startswith("."):
            continue
        goal = folder.joinpath(*parts)
        goal.parent.mkdir(parents=True, exist_ok=True)
        source = inner.extractfile(member)
        with source, open(goal, "wb") as file:
            shutil.copyfileobj(source, file)
