"""Image files sorted into a folder per predicted class, as copies or links; no file is ever overwritten."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import itertools
import os
import re
import secrets
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from finetune101.deploy.inputs import Inputs
from finetune101.deploy.prediction import Prediction
from finetune101.errors import Refused, escaped
from finetune101.files import remedy_to_write

UNSURE = "unsure"
"""The folder of images whose best class has a low probability."""
UNLIKE = "unlike"
"""The folder of images without a label: with --reject those that are unlike the training images."""
RESERVED = (UNSURE, UNLIKE)
"""Folders that are of no class; a class of such a name gets a number."""
LONGEST = 100  # characters of a folder's name
_DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(10))}  # of Windows


class SortedFolder:
    """A folder with one folder per class, into which image files are copied, or linked."""

    def __init__(
        self, folder: Path, classes: Sequence[str], link: bool = False, unsure_below: float | None = None
    ) -> None:
        """``unsure_below``: the probability below which an image goes into ``UNSURE``, default 0.5. Raises Refused."""
        unsure_below = 0.5 if unsure_below is None else unsure_below
        if not 0 <= unsure_below <= 1:
            raise Refused(f"--unsure-below is {unsure_below}; give a probability from 0 to 1")
        if folder.exists() and not folder.is_dir():
            raise Refused(f"--into {escaped(str(folder))} is a file; name a folder")
        self.folder, self.unsure_below, self.link = folder, unsure_below, link
        self.names = folder_names(classes)
        self.added: Counter[str] = Counter()
        """Folder -> number of images that were copied or linked."""
        self.present = 0
        """Number of images that were there already."""

    def check(self, inputs: Inputs) -> None:
        """Raises Refused when the folder lies inside of ``inputs``, or an image of ``inputs`` inside of the folder."""
        own, name = self.folder.resolve(), escaped(str(self.folder))
        for folder in inputs.folders:
            if own.is_relative_to(Path(folder).resolve()):
                raise Refused(f"--into {name} lies inside of {escaped(folder)}; name a folder outside")
        inside = next((file for file in inputs.files if own in Path(os.path.realpath(file)).parents), None)
        if inside:
            raise Refused(f"{escaped(inside)} lies inside of --into {name}; name another folder")

    def place(self, prediction: Prediction) -> str:
        """The name of the folder that the image of ``prediction`` belongs into."""
        if not prediction.classes:
            return UNLIKE
        if prediction.probability < self.unsure_below:
            return UNSURE
        return self.names[prediction.label]

    def add_all(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """Passes ``predictions`` on, and puts the image file of each into its folder. Raises Refused on a full disk."""
        for prediction in predictions:
            place = self.place(prediction)
            try:
                is_new = _add(Path(prediction.source), self.folder / place, self.link)
            except OSError as error:
                raise _refused(prediction.source, self.folder / place, self.link, error) from error
            self.added[place] += is_new
            self.present += not is_new
            yield prediction

    def summary(self) -> str:
        """What was added, in one line."""
        total, unsure, unlike = self.added.total(), self.added[UNSURE], self.added[UNLIKE]
        act = "linked" if self.link else "copied"
        folders = sum(1 for name, count in self.added.items() if count and name not in RESERVED)
        plural = "" if folders == 1 else "s"
        where, sure = escaped(str(self.folder)), total - unsure - unlike
        line = f"{total} images {act} into {where}: {sure} into {folders} class folder{plural}, {unsure} into {UNSURE}"
        line += f", {unlike} into {UNLIKE}" if unlike else ""
        return f"{line}; {self.present} were there already" if self.present else line


def folder_names(classes: Sequence[str]) -> dict[str, str]:
    """Class -> a name for its folder that every system takes; no two are the same in letters of any case."""
    names: dict[str, str] = {}
    taken = set(RESERVED)
    for one in classes:
        stem = safe_name(one)
        numbered = (stem if i == 1 else f"{stem}_{i}" for i in itertools.count(1))
        names[one] = next(name for name in numbered if name.casefold() not in taken)
        taken.add(names[one].casefold())
    return names


def safe_name(name: str) -> str:
    """``name`` as the name of a folder on Linux, macOS and Windows: what one of these does not take becomes _."""
    normal = unicodedata.normalize("NFC", name)
    plain = "".join(letter if letter.isprintable() and letter not in '\\/:*?"<>|' else "_" for letter in normal)
    short = re.sub(r"^[.~@-]|^ +| +$|\.+$", "_", plain)[:LONGEST].rstrip(". ") or "_"
    while len(short.encode()) > 2 * LONGEST:
        short = short[:-1]
    return f"{short}_" if is_device(short) else short


def is_device(name: str) -> bool:
    """Whether Windows takes a file of this name for a device, whatever its ending."""
    return name.split(".")[0].lower() in _DEVICES


def _add(file: Path, folder: Path, link: bool) -> bool:
    """Puts ``file`` into ``folder``, under the first of its names that is free; False where it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        target = folder / (file.name if number == 1 else f"{file.stem}_{number}{file.suffix}")
        if os.path.lexists(target):
            if _is_same(file, target):
                return False
            continue
        with contextlib.suppress(FileExistsError):  # another command has just made it: the next name
            _link(file, target) if link else _copy(file, target)
            return True
    raise AssertionError


def _is_same(file: Path, other: Path) -> bool:
    """Whether ``other`` is a link to ``file``, or a file of the same bytes."""
    if not other.is_file():
        return False
    return os.path.samefile(file, other) or filecmp.cmp(file, other, shallow=False)


def _link(file: Path, target: Path) -> None:
    target.symlink_to(Path(os.path.abspath(file)))


def _copy(file: Path, target: Path) -> None:
    """Copies ``file`` with its times, whole or not at all. Raises FileExistsError where ``target`` is there."""
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        shutil.copy2(file, part)
        try:
            os.link(part, target)  # unlike a rename, it never replaces a file
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(target):
                raise FileExistsError from None
            os.rename(part, target)
    finally:
        part.unlink(missing_ok=True)


def _refused(file: str, folder: Path, link: bool, error: OSError) -> Refused:
    act = "link" if link else "copy"
    has_no_links = link and error.errno not in (errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    remedy = "leave --link out" if has_no_links else remedy_to_write(error, folder)
    return Refused(
        f"cannot {act} {escaped(file)} into {escaped(str(folder))} ({error.strerror or error}); {remedy};"
        " the same command adds the rest"
    )
