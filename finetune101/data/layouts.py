"""The folders that people have: one per class, or train/, val/ and test/ of them; what lies there and what is left out.

Sub-folders of a class folder count for their class. Nothing that could be an image is left out without a reason.
"""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from finetune101.errors import Refused, escaped
from finetune101.files import cache_dir
from finetune101.standalone import IMAGE_SUFFIXES

FOLDER = "101_ObjectCategories"
LEFT_OUT = "BACKGROUND_Google"  # clutter, not an object class: the published protocols leave it out
HEIF_SUFFIXES = (".heic", ".heif")
SUBSETS = ("train", "val", "test")
DEEPEST = 40  # folders within each other

Layout = Literal["classes", "folders"]
State = tuple[int, int, int, int]
"""Of a file: bytes, times of the last change of its content and of its entry (ns), and inode."""

_SPELLINGS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_BESIDE = {"set", "data", "dataset", "split", "images", "image", "imgs", "img", "photos", "pictures", "seg"}
_JUNK = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__", "@eadir", "$recycle.bin",
         "system volume information", "lost+found"}  # fmt: skip
# what finetune101 writes: any two of the first in one folder, or one of the second
_OWN_FILES = {"config.json", "split.json", "env.json", "metrics.jsonl", "test.json", "predictions.csv",
              "best.safetensors", "last.pt", "report.html", "report.md"}  # fmt: skip
_OWN_SIGNS = {"comparison.json", "study.json", "search.json", "optuna.journal"}
_PROGRAMS = {"pyvenv.cfg", "pyproject.toml", "setup.py", "package.json"}  # an environment or a checkout, never a class
_DEMO = {"data", "runs", "comparison", "report"}

DEAD = "dead links"
NOT_IMAGES = "files that are no images by their names"
SPECIAL = "pipes, devices or sockets"
LOOPS = "links that lead back to a folder above"
DEEP = f"folders more than {DEEPEST} deep"
HEIF = "HEIC images, which need a decoder: pip install pillow-heif"
BESIDE = "images beside the class folders"
ELSEWHERE = "images in folders that are neither train, val nor test, or have no class folders"
UNKNOWN = "images of classes that the training folder lacks"
OWN = "folders of finetune101 or of another program"


@cache
def subset_of(folder: str) -> str | None:
    """The subset that a folder's name stands for: "Validation_Set" -> "val"; None for every other name."""
    words = [word for word in re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower()) if word]
    words = [re.sub(r"(?<=.)(set|data|images)$", "", word) if word not in _BESIDE else word for word in words]
    named = [_SPELLINGS[word] for word in words if word in _SPELLINGS]
    return named[0] if len(named) == 1 and all(word in _BESIDE or word in _SPELLINGS for word in words) else None


def class_of(path: str) -> str:
    """Class of an image, from its path below the data set: CLASS/…/IMAGE, or SUBSET/CLASS/…/IMAGE."""
    parts = path.split("/")
    return parts[1] if len(parts) > 2 and subset_of(parts[0]) else parts[0]


def is_junk(name: str) -> bool:
    """Whether a file or folder is ignored without a word: hidden, or left by a system that browsed the folder."""
    return name.startswith(".") or name.lower() in _JUNK


@dataclass
class Listing:
    """What lies below one folder; paths are POSIX, relative to the data set."""

    images: dict[str, State] = field(default_factory=dict)
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Reason -> paths."""
    own: bool = False
    """Whether finetune101 wrote the folder."""

    def leave_out(self, others: dict[str, list[str]]) -> None:
        """Adds what ``others`` left out."""
        for reason, paths in others.items():
            self.left_out[reason] += paths


def _refuse(path: str | Path, error: OSError) -> Refused:
    reason = error.strerror or error
    return Refused(f"{escaped(str(path))} cannot be read ({reason}); allow it, or name another folder")


def _entries(path: Path | str) -> list[os.DirEntry[str]]:
    """Entries of a folder but junk, sorted by name. Raises Refused naming a folder that cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if not is_junk(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise _refuse(path, error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself: dead
            return False
        raise _refuse(entry.path, error) from error


def folders_in(path: Path | str) -> list[str]:
    """Names of the folders that may be classes: neither junk nor BACKGROUND_Google."""
    return [entry.name for entry in _entries(path) if entry.name != LEFT_OUT and _is_folder(entry)]


def is_image_name(name: str) -> bool:
    """Whether the name ends as an image's does."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_own(name: str, files: Collection[str], folders: Collection[str]) -> bool:
    """Whether finetune101 (or a program) wrote the folder ``name``, by the names in it; it draws PNG files only."""
    if any(is_image_name(file) and not file.lower().endswith(".png") for file in files):
        return False
    plots = name.startswith("training_plots_") and bool(files) and all(is_image_name(file) for file in files)
    signs = any(file in _OWN_SIGNS or file in _PROGRAMS or file.startswith("events.out.tfevents.") for file in files)
    demo = {"data", "runs"} <= set(folders) <= _DEMO and not any(map(is_image_name, files))
    return plots or signs or demo or len(_OWN_FILES.intersection(files)) > 1


def _named(path: str, entries: Iterable[os.DirEntry[str]]) -> tuple[list[str], list[str], bool]:
    """Names of a folder's files and folders, and whether finetune101 wrote it."""
    files: list[str] = []
    folders: list[str] = []
    for entry in entries:
        (folders if _is_folder(entry) else files).append(entry.name)
    return files, folders, _is_own(os.path.basename(path), files, folders)


def holds_images(path: Path | str, depth: int = 0) -> bool:
    """Whether there is an image in a folder or below it, by the names; not in one that finetune101 wrote."""
    if depth > DEEPEST:
        return False
    files, folders, own = _named(str(path), _entries(path))
    if own:
        return False
    return any(map(is_image_name, files)) or any(holds_images(os.path.join(path, sub), depth + 1) for sub in folders)


def holds_classes(path: Path) -> bool:
    """Whether a folder in ``path`` holds images."""
    return any(holds_images(path / name) for name in folders_in(path))


def subset_folders(root: Path) -> dict[str, str]:
    """Subset -> the name of its folder in ``root``; empty where ``root`` has one folder per class.

    There must be class folders for training and for validation or test. Raises Refused for two folders of one subset.
    """
    named = defaultdict(list)
    for name in folders_in(root):
        if (subset := subset_of(name)) and holds_classes(root / name):
            named[subset].append(name)
    if "train" not in named or len(named) < 2:
        return {}
    for names in named.values():
        if len(names) > 1:
            both = " and ".join(f"{escaped(name)}/" for name in names)
            raise Refused(f"{escaped(str(root))} has {both} for the same images of a split; move one of them elsewhere")
    return {subset: named[subset][0] for subset in SUBSETS if subset in named}


def layout_for(protocol: str) -> Layout:
    """The layout that a split by ``protocol`` is made of."""
    return "folders" if protocol == "folders" else "classes"


def layout_of(root: Path) -> Layout:
    """ "folders" where ``root`` has folders for training and for validation or test, else "classes"."""
    return "folders" if subset_folders(root) else "classes"


def _list_file(entry: os.DirEntry[str], path: str, listing: Listing) -> None:
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.is_symlink() and not os.path.exists(entry.path):
        listing.left_out[DEAD].append(path)
    elif not entry.is_file():
        listing.left_out[SPECIAL].append(path)
    elif suffix not in IMAGE_SUFFIXES:
        listing.left_out[NOT_IMAGES].append(path)
    elif suffix in HEIF_SUFFIXES and find_spec("pillow_heif") is None:
        listing.left_out[HEIF].append(path)
    else:
        state = entry.stat()
        listing.images[path] = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


def _identity(path: Path | str) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_dev, state.st_ino


def list_folder(root: Path, path: str, above: tuple[tuple[int, int], ...] = ()) -> Listing:
    """Everything in the folder ``path`` of ``root`` and below it; links are followed, but not in circles.

    Raises Refused naming a folder that cannot be read.
    """
    listing, place = Listing(), os.path.join(root, path)
    try:
        identity = _identity(place)
        if identity in above or len(above) > DEEPEST:
            listing.left_out[LOOPS if identity in above else DEEP].append(path)
            return listing
        entries = _entries(place)
        listing.own = _named(place, entries)[2]
        if listing.own:
            return listing
        below_is_own = False
        for entry in entries:
            inner = f"{path}/{entry.name}"
            if not _is_folder(entry):
                _list_file(entry, inner, listing)
                continue
            below = list_folder(root, inner, (*above, identity))
            if below.own:
                below_is_own = True
                listing.left_out[OWN].append(inner)
                continue
            listing.images |= below.images
            listing.leave_out(below.left_out)
    except OSError as error:
        raise _refuse(place, error) from error
    listing.own = below_is_own and not listing.images
    return listing


@dataclass
class Contents:
    """The images of a data set by class, and what is left out by reason."""

    classes: dict[str, dict[str, State]]
    left_out: defaultdict[str, list[str]]


def list_classes(root: Path, ours: Collection[Path] = (), to_train: bool = True) -> Contents:
    """The images of ``root``/CLASS. ``ours``: folders that are no classes, such as that of the runs.

    Raises Refused for a class folder whose name and sub-folders make it a subset, and, ``to_train``, for one without
    images.
    """
    listings, left_out = _class_folders(root, "", ours)
    for name, listing in listings.items():
        if subset_of(name) and any(path.count("/") > 1 for path in listing.images):
            where, folder = escaped(str(root)), escaped(name)
            if subset_of(name) == "train":
                raise Refused(
                    f"{where} has class folders in {folder}/ and none for validation or test beside it;"
                    f" give --data {escaped(str(root / name))} to split its images"
                )
            raise Refused(f"{where} has class folders in {folder}/ and none for training; add a folder train/")
        if to_train:
            _check_images(root / name, listing)
        inner = {subset_of(path.split("/")[1]) for path in listing.images if path.count("/") > 1}
        if len(inside := sorted(filter(None, inner))) > 1:
            raise Refused(
                f"{escaped(str(root / name))} has folders for {' and '.join(inside)} inside of the class;"
                f" put them above the classes, as {inside[-1]}/{escaped(name)}"
            )
    return Contents({name: listing.images for name, listing in listings.items() if listing.images}, left_out)


def list_subsets(root: Path, folders: dict[str, str], ours: Collection[Path] = (), to_train: bool = True) -> Contents:
    """The images of ``root``/SUBSET/CLASS, where ``folders`` names the subsets' folders.

    ``to_train``: classes that the training folder lacks are left out; raises Refused for a training folder's class
    without images, or class names that differ by their letters' case only.
    """
    classes: dict[str, dict[str, State]] = {}
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    for subset in (subset for subset in SUBSETS if subset in folders):
        listings, more = _class_folders(root, folders[subset], ours)
        _add(left_out, more)
        for name, listing in listings.items():
            if subset == "train" and to_train:
                _check_images(root / folders[subset] / name, listing)
                _check_depth(root / folders[subset] / name, listings)
            if subset == "train" or name in classes or not to_train:
                classes[name] = classes.get(name, {}) | listing.images
                continue
            if near := next((other for other in classes if _alike(other) == _alike(name)), None):
                wrong = escaped(str(root / folders[subset] / name))
                raise Refused(f"{wrong} is the class {escaped(near)} in another spelling; give both folders one name")
            left_out[UNKNOWN] += listing.images
    for name in folders_in(root):
        if name not in folders.values() and not _is_one_of(root / name, ours):
            listing = list_folder(root, name, (_identity(root),))
            if listing.own:
                left_out[OWN].append(name)
            left_out[ELSEWHERE] += listing.images
    _add(left_out, _beside(root, ""))
    return Contents({name: images for name, images in classes.items() if images}, left_out)


def _check_depth(folder: Path, listings: dict[str, Listing]) -> None:
    """Raises Refused where the only folder of a subset holds the classes, one folder deeper than they belong."""
    inner = {path.split("/")[2] for path in listings[folder.name].images if path.count("/") > 2}
    if len(listings) == 1 and len(inner) > 1:
        raise Refused(
            f"{escaped(str(folder))} holds the classes ({', '.join(map(escaped, sorted(inner)[:3]))}, …) one folder too"
            f" deep; move them up into {escaped(str(folder.parent))}"
        )


def _add(left_out: defaultdict[str, list[str]], more: dict[str, list[str]]) -> None:
    for reason, paths in more.items():
        left_out[reason] += paths


def _alike(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_one_of(path: Path, folders: Collection[Path]) -> bool:
    def same(other: Path) -> bool:
        try:
            return path.samefile(other)
        except OSError:
            return False

    return any(same(folder) for folder in (*folders, cache_dir()))


def _beside(root: Path, path: str) -> dict[str, list[str]]:
    """Images, and links to nothing, directly in ``root``/``path``."""
    left_out: dict[str, list[str]] = {BESIDE: [], DEAD: []}
    for entry in _entries(root / path):
        inner = f"{path}/{entry.name}" if path else entry.name
        if entry.is_symlink() and not os.path.exists(entry.path):
            left_out[DEAD].append(inner)
        elif is_image_name(entry.name) and not _is_folder(entry):
            left_out[BESIDE].append(inner)
    return left_out


def _class_folders(
    root: Path, path: str, ours: Collection[Path]
) -> tuple[dict[str, Listing], defaultdict[str, list[str]]]:
    """Class -> what lies in its folder, and what is left out."""
    listings: dict[str, Listing] = {}
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    above = tuple({_identity(root), _identity(root / path)})
    for name in folders_in(root / path):
        inner = f"{path}/{name}" if path else name
        if _is_one_of(root / inner, ours):
            continue
        listing = list_folder(root, inner, above)
        downloaded = (root / inner / FOLDER).is_dir()  # what `data download` made beside the classes
        if listing.own or downloaded or (name == "runs" and not listing.images):
            left_out[OWN].append(inner)
            continue
        listings[name] = listing
        _add(left_out, listing.left_out)
    _add(left_out, _beside(root, path))
    return listings, left_out


def _check_images(folder: Path, listing: Listing) -> None:
    if not listing.images:
        why = "; ".join(f"{len(paths)} {reason}" for reason, paths in listing.left_out.items())
        raise Refused(
            f"class folder {escaped(str(folder))} holds no image ({why or 'it is empty'});"
            " add images, or move the folder out of the data set"
        )
