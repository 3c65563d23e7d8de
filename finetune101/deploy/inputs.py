"""The image files that the words of a command name: files, folders, patterns, lists of paths; what is left out."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune101.data.layouts import DEAD, NOT_IMAGES, OWN, SPECIAL, is_image_name, is_junk, list_folder
from finetune101.errors import Refused, escaped
from finetune101.standalone import IMAGE_SUFFIXES

STANDARD_INPUT = "-"
LIST = "@"
"""A word that begins with it names a file of paths."""
MOST_NAMES = 3  # names of left-out files in a line


@dataclass
class Inputs:
    """The image files that are named, each once, and what is not among them."""

    files: dict[str, None] = field(default_factory=dict)
    """Paths as given, or below a folder as given; a dict for its order and quick look-up."""
    folders: list[str] = field(default_factory=list)
    """The folders that were searched for images."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of words that name no image; prediction adds the images that cannot be read."""
    left_out: dict[str, dict[str, None]] = field(default_factory=dict)
    """Reason -> paths in ``folders`` that are not used, each once."""

    @property
    def readable(self) -> int:
        """The number of images, without those of ``failed``."""
        return len(self.files) - sum(path in self.files for path, _ in self.failed)


def image_inputs(words: Iterable[str]) -> Inputs:
    """The image files that ``words`` name.

    A folder stands for every image below it (``data.layouts.list_folder``: as in training). Patterns know ``*``,
    ``?``, ``[...]`` and ``**``. ``@FILE`` and ``-`` stand for the paths in a file and in standard input, one per line
    or separated by NUL. Raises Refused for a list that cannot be read.
    """
    inputs = Inputs()
    for word in words:
        for source in _listed(word) if is_list(word) else [word]:
            try:
                _add(source, inputs)
            except Refused as error:
                inputs.failed.append((source, str(error)))
    return inputs


def is_list(word: str) -> bool:
    """Whether ``word`` stands for a list of paths: standard input, or @ and a file; not a file of that very name."""
    return word == STANDARD_INPUT or (word.startswith(LIST) and not os.path.lexists(word))


def left_out_text(inputs: Inputs) -> str:
    """What the searched folders hold beside the images, in one line; "" where nothing was left out."""
    reasons = []
    for reason, paths in inputs.left_out.items():
        names = [escaped(path) for path in list(paths)[:MOST_NAMES]] + ["…"] * (len(paths) > MOST_NAMES)
        reasons.append(f"{len(paths)} {reason} ({', '.join(names)})")
    return f"Left out: {', '.join(reasons)}" if reasons else ""


def _listed(word: str) -> Iterator[str]:
    """The paths of the list that ``word`` names."""
    try:
        content = sys.stdin.buffer.read() if word == STANDARD_INPUT else Path(word.removeprefix(LIST)).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"the list {escaped(word)} cannot be read ({reason}); give @ and a file of paths") from error
    lines = content.split(b"\0") if b"\0" in content else content.removeprefix(b"\xef\xbb\xbf").splitlines()
    yield from (os.fsdecode(line) for line in lines if line)


def _add(source: str, inputs: Inputs) -> None:
    """Adds the images that one path or pattern names. Raises Refused when there are none."""
    try:
        if os.path.isfile(source):  # also one whose own name looks like a pattern; its suffix does not matter
            inputs.files[source] = None
            return
        if os.path.lexists(source) and not os.path.isdir(source):
            dead = os.path.islink(source) and not os.path.exists(source)
            raise Refused("a link to nothing" if dead else "a pipe or a device, not a file")
        matches = [source] if os.path.isdir(source) else _matches(source)
    except ValueError as error:  # a NUL in the name
        raise Refused("no such file or folder") from error
    if not matches:
        raise Refused("no such file or folder")
    images: list[str] = []
    for match in matches:
        if os.path.isdir(match):
            images += _images_below(match, inputs)
        elif is_image_name(match) and os.path.isfile(match):
            images.append(match)
        else:
            reason = NOT_IMAGES if os.path.isfile(match) else SPECIAL if os.path.exists(match) else DEAD
            inputs.left_out.setdefault(reason, {})[match] = None
    if not images:
        raise Refused(f"no image there ({', '.join(IMAGE_SUFFIXES)})")
    inputs.files |= dict.fromkeys(images)


def _matches(pattern: str) -> list[str]:
    """Paths that ``pattern`` matches, sorted, without those in which it matched junk."""
    fixed = next((i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part)), 0)
    paths = sorted(glob.glob(pattern, recursive=True))
    return [path for path in paths if not any(map(is_junk, Path(path).parts[fixed:]))]


def _images_below(folder: str, inputs: Inputs) -> list[str]:
    """The images in ``folder`` and below it; what else lies there is added to ``inputs.left_out``."""
    inputs.folders.append(folder)
    listing = list_folder(Path(folder), ".")
    if listing.own:
        raise Refused(f"one of the {OWN}; name its images")
    for reason, paths in listing.left_out.items():
        inputs.left_out.setdefault(reason, {}).update((str(Path(folder, path)), None) for path in paths)
    return [str(Path(folder, path)) for path in listing.images]
