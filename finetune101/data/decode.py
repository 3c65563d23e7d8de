"""Image files of a data set as pixels: ``standalone`` with our sentences, progress bar and number of cores."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from finetune101 import standalone
from finetune101.errors import Refused, escaped, shortened
from finetune101.host import usable_cores
from finetune101.standalone import FILTERS, Item, Picture, Pixels, Problem, Result, UnreadableImage, upright

DECODER = 2
"""Version of what ``standalone`` makes of a file: part of the key of everything that is kept of pixels."""

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints Pillow's errors beside our reasons


class Unreadable(Refused):
    """An image that cannot be decoded: its ``path``, the ``reason`` in words and the kind of ``problem``."""

    def __init__(self, path: Path, reason: str, problem: Problem) -> None:
        super().__init__(f"cannot read the image {escaped(str(path))} ({reason}); repair it or add --skip-bad-images")
        self.path, self.reason, self.problem = path, reason, problem

    def __reduce__(self) -> tuple[Any, ...]:
        return Unreadable, (self.path, self.reason, self.problem)


def decode(path: Path, size: int, interpolation: str) -> Pixels:
    """The whole image, upright in RGB, resized to uint8 (size, size, 3). Raises Unreadable."""
    with opened(path, size) as picture:
        return np.asarray(picture.image.resize((size, size), FILTERS[interpolation]))


def decode_image(image: Image.Image, size: int, interpolation: str) -> Pixels:
    """A Pillow image as ``decode`` gives a file: uint8 (size, size, 3)."""
    return np.asarray(upright(image).resize((size, size), FILTERS[interpolation]))


def photo_reader(size: int, interpolation: str) -> Callable[[str], Pixels]:
    """``decode`` of files that belong to no data set, for ``standalone.decoded_passes``: raises UnreadableImage."""

    def pixels_of(file: str) -> Pixels:
        try:
            return decode(Path(file), size, interpolation)
        except Unreadable as error:
            raise UnreadableImage(error.reason, error.problem) from error

    return pixels_of


@contextlib.contextmanager
def opened(path: Path, side: int | None = None, content: bytes | None = None) -> Iterator[Picture]:
    """The picture in ``path`` as ``standalone.open_picture`` gives it. Raises Unreadable.

    With ``content``, the bytes of a picture that is no file here, ``path`` is its name for messages only. What Pillow
    warns of is told once per file.
    """
    messages = _listener.start()
    try:
        with standalone.open_picture(os.fspath(path) if content is None else io.BytesIO(content), side) as picture:
            yield picture
    except UnreadableImage as error:
        raise Unreadable(path, shortened(error.reason), error.problem) from error
    finally:
        _listener.stop()
    if messages and content is None:
        _report(path, messages)


class _Listener:
    """Takes what Pillow warns of in the thread that decodes; all other warnings go where they went."""

    RULE = ("always", None, Warning, re.compile(r"(PIL|pillow_heif|finetune101\.standalone)\b"), 0)

    def __init__(self) -> None:
        self.lock, self.threads, self.local = threading.Lock(), 0, threading.local()
        self.others: Any = warnings.showwarning
        self.reported: set[str] = set()

    def start(self) -> list[str]:
        """The messages of this thread from now on."""
        with self.lock:
            # in the lists that are there: other threads may add filters, or restore lists that they kept, meanwhile
            if self.RULE not in warnings.filters:
                warnings.filters.insert(0, self.RULE)  # type: ignore[attr-defined]
            if warnings.showwarning != self.take:
                self.others, warnings.showwarning = warnings.showwarning, self.take
            self.threads += 1
        messages: list[str] = []
        self.local.messages = messages
        return messages

    def stop(self) -> None:
        """The end of what ``start`` began."""
        self.local.messages = None
        with self.lock:
            self.threads -= 1
            if self.threads:
                return
            if self.RULE in warnings.filters:
                warnings.filters.remove(self.RULE)  # type: ignore[attr-defined]
            if warnings.showwarning == self.take:
                warnings.showwarning = self.others

    def take(self, message: Any, category: type[Warning], *rest: Any, **named: Any) -> None:
        """Takes the place of ``warnings.showwarning``."""
        messages = getattr(self.local, "messages", None)
        if messages is None:
            self.others(message, category, *rest, **named)
        elif not issubclass(category, Image.DecompressionBombWarning):  # standalone.MOST_PIXELS says that
            messages.append(" ".join(str(message).split()))


def _report(path: Path, messages: list[str]) -> None:
    """One line about the odd but readable file ``path``, once in the life of the process."""
    name = str(path)
    if name not in _listener.reported:
        _listener.reported.add(name)
        if sys.stderr:
            tqdm.write(f"{escaped(name)} is read, though it is odd: {shortened(messages[0])}", file=sys.stderr)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``standalone.in_threads`` on the cores that the process may use."""
    return standalone.in_threads(work, items, usable_cores())


def unreadable(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """The images that cannot be decoded, with the reason: what ``--skip-bad-images`` leaves out."""

    def reason(path: str) -> str:
        try:
            with opened(root / path, 8):
                return ""
        except Unreadable as error:
            return str(error)

    reasons = tqdm(in_threads(reason, paths), total=len(paths), desc="check images", unit="img", leave=False)
    return {path: why for path, why in zip(paths, reasons, strict=True) if why}


_listener = _Listener()
