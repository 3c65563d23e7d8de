"""Find and index an image data set; imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from finetune101.config import DataConfig
from finetune101.data.layouts import (
    FOLDER,
    LEFT_OUT,
    SUBSETS,
    Layout,
    State,
    class_of,
    folders_in,
    holds_images,
    is_image_name,
    is_junk,
    layout_of,
    list_classes,
    list_subsets,
    subset_folders,
    subset_of,
)
from finetune101.errors import Refused, escaped
from finetune101.files import atomic, cache_dir, sha256
from finetune101.host import usable_cores
from finetune101.standalone import IMAGE_SUFFIXES

__all__ = [
    "FOLDER", "IMAGE_SUFFIXES", "LEFT_OUT", "OFFICIAL_CLASSES", "OFFICIAL_IMAGES", "SUBSETS", "Index", "Layout",
    "as_found", "class_of", "content_hash", "find_data", "images_in", "index_images", "index_notes", "layout_of",
    "subset_of",
]  # fmt: skip

OFFICIAL_CLASSES = 101
OFFICIAL_IMAGES = 8677
HOW = f"give --data a folder with one folder per class (such as {FOLDER})"
DOWNLOAD = f"run `finetune101 data download`, or {HOW}"
KEPT_FROM = (1000, 64 * 2**20)  # images or bytes from which a data set's digests are kept
FRESH = 2e9  # ns: a file that changed so shortly ago may change once more without another time


def images_in(folder: Path) -> list[Path]:
    """Visible image files directly in a folder, sorted by name; the suffix decides, in any case."""
    try:
        entries = [entry for entry in folder.iterdir() if not is_junk(entry.name) and is_image_name(entry.name)]
        return sorted((entry for entry in entries if entry.is_file()), key=lambda entry: entry.name)
    except OSError as error:
        raise Refused(
            f"{escaped(str(folder))} cannot be read ({error.strerror}); allow it, or name another folder"
        ) from error


def find_data(root: str | None) -> Path:
    """Folder of the data set: ``root``, else $FINETUNE101_DATA, else data/101_ObjectCategories here.

    The path may be the folder of class folders (or of train/, val/, test/), or a folder above: one that contains
    101_ObjectCategories, or whose only folder with images holds them.

    Raises:
        Refused: nothing there, a file, or no folder of images in it; the sentence says what to do.
    """
    path, name = _named(root)
    if FOLDER in folders_in(path):
        path = path / FOLDER
    where, start = escaped(str(path)), path
    for _ in range(4):
        if subset_folders(path):
            return path
        with_images = [sub for sub in folders_in(path) if holds_images(path / sub)]
        if split := next((sub for sub in with_images if len(with_images) > 1 and subset_folders(path / sub)), None):
            inside, beside = escaped(str(path / split)), escaped(next(sub for sub in with_images if sub != split))
            raise Refused(f"{inside} has train and test folders, and {beside}/ lies beside it; give --data {inside}")
        if len(with_images) > 1:
            return path
        if not with_images or images_in(path / with_images[0]):
            break
        path = path / with_images[0]
    if path == start and with_images and images_in(path / with_images[0]):
        return path  # one class: refused where the images are listed
    if not with_images and images_in(start):
        raise Refused(f"{where} holds images but no class folders; give --data its parent folder")
    raise Refused(f"{name} {where} holds no class folders with images; {HOW}")


def _named(root: str | None) -> tuple[Path, str]:
    """The folder that is asked for, and what named it. Raises Refused when it is none."""
    folder = root or os.environ.get("FINETUNE101_DATA") or None
    name = "--data" if root else "FINETUNE101_DATA" if folder else "the folder"
    where = escaped(folder or "")
    try:
        path = Path(folder).expanduser() if folder else Path("data") / FOLDER
        path.stat()
    except RuntimeError as error:  # ~somebody
        raise Refused(f"{name} {where} names a user that does not exist; {HOW}") from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a zero in the name
        if not folder:
            raise Refused(f"no data set at {path}; {DOWNLOAD}") from error
        near: list[str] = []
        with contextlib.suppress(Refused):  # the folder above may be missing as well
            near = difflib.get_close_matches(path.name, folders_in(path.parent), n=1)
        usual = DOWNLOAD if path in (Path("data"), Path("data") / FOLDER) else HOW
        remedy = f"did you mean {escaped(str(path.with_name(near[0])))}?" if near else usual
        raise Refused(f"{name} {where} does not exist; {remedy}") from error
    except OSError as error:
        raise Refused(f"{name} {where} cannot be read ({error.strerror}); allow it, or name another folder") from error
    if not path.is_dir():
        raise Refused(f"{where or path} is a file, not a folder; {HOW}")
    return path, name


def as_found(config: DataConfig) -> DataConfig:
    """``config`` with the protocol "folders" where its images lie in train/, val/ and test/ and no split is given.

    Raises Refused as ``find_data``.
    """
    if config.protocol == "reference" and config.split is None and layout_of(find_data(config.root)) == "folders":
        return replace(config, protocol="folders")
    return config


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
    subsets: Mapping[str, str] = field(default_factory=dict)
    """Subset -> its folder's name, where the images lie in train/, val/ and test/."""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Reason -> paths of what is not used."""

    @property
    def layout(self) -> Layout:
        """How the folders are arranged."""
        return "folders" if self.subsets else "classes"


def index_images(
    root: Path,
    layout: Layout | None = None,
    *,
    ours: Collection[str | Path] = (),
    fresh: bool = False,
    to_train: bool = True,
) -> Index:
    """List and hash the images below ``root``, the same in any file-system order.

    Junk, BACKGROUND_Google and what finetune101 wrote are no classes; what else is left out stands in ``left_out``.

    Args:
        root: what ``find_data`` returned.
        layout: the layout that the caller counts on; by default, and with "classes", that which is there.
        ours: folders that are no classes, such as that of the runs.
        fresh: hash every file, also where neither its size nor its times changed since it was hashed.
        to_train: refuse what cannot be trained on; without, one class is enough, and empty class folders are ignored.

    Raises:
        Refused: fewer than two classes, a class folder without images, no folder for training, an unreadable file.
    """
    folders = subset_folders(root)
    if layout == "folders" and not folders:
        raise Refused(
            f"{escaped(str(root))} has no train/ with val/ or test/ of class folders, which --protocol folders needs;"
            " add them, or leave --protocol out"
        )
    runs = [Path(path) for path in ours]
    contents = list_subsets(root, folders, runs, to_train) if folders else list_classes(root, runs, to_train)
    if to_train and len(contents.classes) < 2:
        start = escaped(str(root / folders["train"] if folders else root))
        raise Refused(f"{start} holds {len(contents.classes)} class folder(s), at least 2 are needed; {HOW}")
    states = {path: state for images in contents.classes.values() for path, state in images.items()}
    paths = tuple(sorted(states))
    return Index(
        root=root,
        classes=tuple(sorted(contents.classes)),
        paths=paths,
        digests=_digests(root, {path: states[path] for path in paths}, fresh),
        subsets=folders,
        left_out={reason: tuple(sorted(names)) for reason, names in contents.left_out.items() if names},
    )


def _digests(root: Path, states: dict[str, State], fresh: bool) -> dict[str, str]:
    """Path -> sha256 of its bytes; kept in the cache folder while size, times and inode of the file stay."""
    from concurrent.futures import ThreadPoolExecutor

    worth = len(states) >= KEPT_FROM[0] or sum(state[0] for state in states.values()) >= KEPT_FROM[1]
    place = os.fsencode(os.path.realpath(root))
    file = cache_dir() / f"digests_{hashlib.sha256(place).hexdigest()[:16]}.msgpack"
    kept = _read_digests(file) if worth and not fresh else {}
    digests: dict[str, str] = {}
    for path, state in states.items():
        entry = kept.get(os.fsencode(path))
        if entry and entry[:4] == state:
            digests[path] = entry[4].hex()
    new = [path for path in states if path not in digests]
    now = time.time_ns()
    with ThreadPoolExecutor(max(4, usable_cores())) as pool:
        digests |= zip(new, pool.map(sha256, (root / path for path in new)), strict=True)
    if worth and new:
        settled = {
            os.fsencode(path): (*state, bytes.fromhex(digests[path]))
            for path, state in states.items()
            if max(state[1], state[2]) < now - FRESH
        }
        with suppress(Refused, OSError), atomic(file) as part:  # without space every command hashes
            part.write_bytes(msgspec.msgpack.encode(settled))
    return {path: digests[path] for path in states}


Kept = tuple[int, int, int, int, bytes]


def _read_digests(file: Path) -> dict[bytes, Kept]:
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=dict[bytes, Kept])
    except (OSError, msgspec.DecodeError):
        return {}  # missing or damaged: made anew


def index_notes(index: Index, *, split_by_folders: bool = True, most: int = 3) -> list[str]:
    """What a user should know of how the images of ``index`` were read, in lines; nothing where all is plain.

    ``split_by_folders``: whether images in train/, val/ and test/ are split so; else what these lack is not said.
    """
    lines = _subset_notes(index, split_by_folders) if index.subsets else []
    spellings: dict[str, list[str]] = {}
    for name in index.classes:
        spellings.setdefault(name.casefold(), []).append(name)
    for names in spellings.values():
        if len(names) > 1:
            both = " and ".join(map(escaped, names))
            lines.append(f"Classes {both} differ only by the case of letters: two classes here, one on some machines.")
    subset_names = [f"{escaped(name)}/" for name in index.classes if subset_of(name)] if not index.subsets else []
    if subset_names:
        lines.append(f"Taken as classes, as they hold no class folders: {', '.join(subset_names)}.")
    lines += _sub_folder_notes(index)
    for reason, paths in index.left_out.items():
        names = [escaped(path) for path in paths[:most]] + ["…"] * (len(paths) > most)
        lines.append(f"Left out: {len(paths)} {reason} ({', '.join(names)}).")
    return lines


def _sub_folder_notes(index: Index) -> list[str]:
    """A line for each class whose images all lie in two sub-folders or more: they might have been meant as classes."""
    depth = 2 if index.subsets else 1
    inner: dict[str, set[str]] = {}
    for path in index.paths:
        parts = path.split("/")
        inner.setdefault(class_of(path), set()).add(parts[depth] if len(parts) > depth + 1 else "")
    return [
        f"Class {escaped(name)} has its images in {len(folders)} sub-folders: all of them count for it."
        for name, folders in sorted(inner.items())
        if len(folders) > 1 and "" not in folders
    ]


def _subset_notes(index: Index, split_by_folders: bool) -> list[str]:
    """The number of images in each of train/, val/ and test/, and what these folders lack."""
    classes: dict[str, set[str]] = {subset: set() for subset in index.subsets}
    counts = dict.fromkeys(index.subsets, 0)
    subsets = {folder: subset for subset, folder in index.subsets.items()}
    for path in index.paths:
        subset = subsets[path.split("/", 1)[0]]
        counts[subset] += 1
        classes[subset].add(class_of(path))
    folders = ", ".join(f"{escaped(folder)}/" for folder in index.subsets.values())
    numbers = [str(count) for count in counts.values()]
    line = f"{folders} found: {', '.join(numbers[:-1])} and {numbers[-1]} images"
    if not split_by_folders:
        return [line + "."]
    if "val" not in index.subsets:
        line += ", no validation images: the last epoch is kept"
    if "test" not in index.subsets:
        line += ", no test images: evaluate will use the validation images"
    lines = [line + "."]
    for subset, present in classes.items():
        if missing := [escaped(name) for name in index.classes if name not in present]:
            few = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
            lines.append(
                f"{escaped(index.subsets[subset])}/ has no image of {len(missing)} of {len(index.classes)} classes"
                f" ({few})."
            )
    return lines


def content_hash(digests: Mapping[str, str], paths: Iterable[str]) -> str:
    """ "sha256:..." over the sorted (path, sha256 of the file) pairs; raises KeyError for a path without digest."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path}\0{digests[path]}\n".encode("utf-8", "surrogateescape"))
    return f"sha256:{total.hexdigest()}"
