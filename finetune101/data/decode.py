"""Image files as pixels: what a viewer shows, upright, in RGB of 8 bits, transparent parts on white."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import logging
import os
import re
import stat
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from finetune101.data.formats import NEEDS, OTHERS, formats_of
from finetune101.errors import Refused, escaped, shortened
from finetune101.host import usable_cores

DECODER = 2
"""Version of what this module makes of a file: part of the key of everything that is kept of pixels."""
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GRAYSCALE = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
MOST_PIXELS = 89_478_485  # of an image: from here on Pillow warns of decompression bombs
MOST_SIDE = 65_535  # px, that of the largest JPEG: the weights of a resize grow with it
DRAFT_PIXELS = 12_000_000  # JPEGs above are decoded at a part of their size; no image of Caltech-101 has as many
PIXELS_AT_ONCE = 128_000_000  # in all threads together, about 1 GB

Pixels = NDArray[np.uint8]
Problem = Literal["unreadable", "truncated", "not an image"]
Item = TypeVar("Item")
Result = TypeVar("Result")

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints Pillow's errors beside our reasons


class Unreadable(Refused):
    """An image that cannot be decoded: its ``path``, the ``reason`` in words and the kind of ``problem``."""

    def __init__(self, path: Path, reason: str, problem: Problem) -> None:
        super().__init__(f"cannot read the image {escaped(str(path))} ({reason}); repair it or add --skip-bad-images")
        self.path, self.reason, self.problem = path, reason, problem

    def __reduce__(self) -> tuple[Any, ...]:
        return Unreadable, (self.path, self.reason, self.problem)


class _Odd(Exception):
    """Why a file is not decoded although Pillow might; the text is the reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded file: RGB and upright; ``grayscale`` where the file has no colours."""

    image: Image.Image
    grayscale: bool


def decode(path: Path, size: int, interpolation: str) -> Pixels:
    """The whole image, upright in RGB, resized to uint8 (size, size, 3). Raises Unreadable."""
    with opened(path, size) as picture:
        return np.asarray(picture.image.resize((size, size), FILTERS[interpolation]))


def decode_image(image: Image.Image, size: int, interpolation: str) -> Pixels:
    """A Pillow image as ``decode`` gives a file: uint8 (size, size, 3)."""
    return np.asarray(upright(image).resize((size, size), FILTERS[interpolation]))


def upright(image: Image.Image) -> Image.Image:
    """A copy of a Pillow image in RGB, turned by its EXIF orientation, on white where it is transparent."""
    copy = image.copy()
    return _upright(_rgb(copy), _orientation(image))


@contextlib.contextmanager
def opened(path: Path, side: int | None = None, content: bytes | None = None) -> Iterator[Picture]:
    """The picture in ``path`` as a viewer shows it; memory for it is kept free until the block ends.

    With ``content``, the bytes of a picture that is no file here, ``path`` is its name for messages only.

    Turned by its EXIF orientation (Pillow's ``exif_transpose``), samples of more than 8 bits scaled to 8, transparent
    parts on white, the first of several frames. A JPEG of more than ``DRAFT_PIXELS`` may be decoded smaller, its sides
    at least twice ``side``. What Pillow warns of is told once per file. Raises Unreadable, whatever a decoder raises.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    messages, pixels = _listener.start(), 0
    try:
        try:
            picture, pixels = _load(path, side) if content is None else _load_from(io.BytesIO(content), side)
        except Exception as error:  # a damaged file can raise nearly anything, MemoryError among it
            raise Unreadable(path, *_reason(error)) from error
        try:
            yield picture
        except MemoryError as error:
            raise Unreadable(path, *_reason(error)) from error
    finally:
        _room.give(pixels)
        _listener.stop()
    if messages and content is None:
        _report(path, messages)


def _load(path: Path, side: int | None) -> tuple[Picture, int]:
    """The picture, and the pixels of it that ``_room`` must be given back; raises whatever decoders raise."""
    name = os.fspath(path)
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise _Odd("it is no regular file")  # opening a named pipe would wait for ever
    with open(name, "rb", buffering=65536) as file:
        return _load_from(file, side)


def _load_from(file: BinaryIO, side: int | None) -> tuple[Picture, int]:
    """As ``_load``, of an open file."""
    with _open(file) as image:
        pixels = _prepared(image, side)
        _room.take(pixels)
        try:
            image.load()
            return Picture(_upright(_rgb(image), _orientation(image)), image.mode in GRAYSCALE), pixels
        except BaseException:
            _room.give(pixels)
            raise


def _open(file: BinaryIO) -> Image.Image:
    """The image in ``file``, its header read. By our decoders only: PostScript, for one, would be run."""
    head = file.read(64)
    file.seek(0)
    formats = formats_of(head)
    decoders = tuple(name for name in formats if name in _decoders())
    if not head:
        raise UnidentifiedImageError("it is empty")
    if not decoders:
        raise _Odd(NEEDS[formats[0]])
    return Image.open(file, formats=decoders)


@functools.cache
def _decoders() -> frozenset[str]:
    """Which of our formats can be decoded here."""
    for name in ("Jpeg", "Mpo", "Png", "Bmp", "WebP", "Gif", "Tiff", "Avif"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{name}ImagePlugin")
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("pillow_heif").register_heif_opener()
    absent = [] if getattr(sys.modules.get("PIL.AvifImagePlugin"), "SUPPORTED", False) else ["AVIF"]
    return frozenset(name for name in (*OTHERS, *NEEDS) if name in Image.OPEN and name not in absent)


def _prepared(image: Image.Image, side: int | None) -> int:
    """Pixels that loading ``image`` makes, after large JPEGs were told to come smaller. Raises _Odd for too many."""
    width, height = image.size
    if side and width * height > DRAFT_PIXELS and image.format in ("JPEG", "MPO") and max(width, height) <= MOST_SIDE:
        image.draft(None, (2 * side, 2 * side))  # without a mode the mode stays
        width, height = image.size
    if width * height > MOST_PIXELS:
        millions = width * height / 1e6
        raise _Odd(f"it has {millions:.0f} megapixels, more than the {MOST_PIXELS / 1e6:.0f} that are read; shrink it")
    if max(width, height) > MOST_SIDE:
        raise _Odd(f"it is {max(width, height)} pixels long, more than the {MOST_SIDE} that are read; shrink it")
    return width * height


def _reason(error: Exception) -> tuple[str, Problem]:
    """What was wrong with a file, in words, and of which kind that is."""
    if isinstance(error, UnidentifiedImageError):
        empty = str(error) == "it is empty"
        return "it is empty" if empty else "no image format that is read here", "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than the {MOST_PIXELS / 1e6:.0f} megapixels that are read; shrink it", "unreadable"
    if isinstance(error, MemoryError):
        return "decoding it takes more memory than there is", "unreadable"
    if isinstance(error, OSError) and error.errno:
        return error.strerror or "it cannot be opened", "unreadable"
    reason = shortened(" ".join(str(error).split())) or type(error).__name__
    return reason, "truncated" if "truncated" in reason.lower() else "unreadable"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of a loaded image; 1 where its EXIF is damaged, as viewers do."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if value in range(2, 9) else 1
    except Exception:  # SyntaxError, struct.error, …: the pixels are right
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """``image`` turned and mirrored as its ``orientation`` says."""
    if orientation == 1:
        return image
    bare = image.copy()
    bare.info = {}  # exif_transpose rewrites all EXIF that it finds, which fails where that is damaged
    bare._exif = None
    bare.getexif()[ExifTags.Base.Orientation] = orientation
    turned = ImageOps.exif_transpose(bare)
    assert turned is not None
    return turned


def _rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode in RGB, on white where it is transparent."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _eight_bits(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, which Pillow has cut to 8 in the pixels
        image.info["transparency"] = tuple(value >> 8 for value in key)
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if key is not None or image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or palette.endswith("A"):
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 12, 16 or 32 bits or of floats as "L".

    16 bits are divided by 256. Others do not say what white is: 1, 255 or 65535, the first that all values of the
    image stay below; the largest number of 32 bits otherwise.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    unsigned = image.mode == "I" and tags.get(339) == (1,)
    if unsigned:
        values = values.view(np.uint32)
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=np.inf, neginf=0.0)
    finite = numbers[np.isfinite(numbers)]
    highest = float(finite.max()) if finite.size else 0.0
    if image.mode.startswith("I;16"):
        scale = 1 / 2.0 ** (int(tags.get(258, (16,))[0]) - 8)
    elif image.mode == "F" and highest <= 2:  # 1 is white; a little above is what sharpening leaves
        scale = 255.0
    else:
        scale = next((scale for white, scale in ((255, 1.0), (65535, 1 / 256)) if highest <= white), 0.0)
        scale = scale or (1 / 2**24 if unsigned else 1 / 2**23)
    gray = np.clip(np.rint(numbers * scale), 0, 255).astype(np.uint8)
    if image.mode.startswith("I;16") and tags.get(262) == 0:  # TIFF in which 0 is white
        gray = 255 - gray
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray[values == key] = 255
    return Image.fromarray(gray)


class _Room:
    """Lets threads hold images of at most ``most`` pixels together; one that is larger has to itself."""

    def __init__(self, most: int) -> None:
        self.most, self.taken, self.changed = most, 0, threading.Condition()

    def take(self, pixels: int) -> None:
        """Waits until there is room for ``pixels``."""
        with self.changed:
            while self.taken and self.taken + pixels > self.most:
                self.changed.wait()
            self.taken += pixels

    def give(self, pixels: int) -> None:
        """The end of what ``take`` began."""
        with self.changed:
            self.taken -= pixels
            self.changed.notify_all()


class _Listener:
    """Takes what Pillow warns of in the thread that decodes; all other warnings go where they went."""

    RULE = ("always", None, Warning, re.compile(r"(PIL|pillow_heif|finetune101\.data\.decode)\b"), 0)

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
        elif not issubclass(category, Image.DecompressionBombWarning):  # MOST_PIXELS says that
            messages.append(" ".join(str(message).split()))


def _report(path: Path, messages: list[str]) -> None:
    """One line about the odd but readable file ``path``, once in the life of the process."""
    name = str(path)
    if name not in _listener.reported:
        _listener.reported.add(name)
        if sys.stderr:
            tqdm.write(f"{escaped(name)} is read, though it is odd: {shortened(messages[0])}", file=sys.stderr)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work`` of each item, in their order, on the cores that the process may use; few results wait to be taken.

    Pillow decodes and resizes without the interpreter lock. The threads end with the items: a process that has none can
    be forked.
    """
    cores, rest, waiting = usable_cores(), iter(items), deque[Future[Result]]()
    with ThreadPoolExecutor(cores, "decode") as threads:
        try:
            for item in itertools.islice(rest, 8 * cores):
                waiting.append(threads.submit(work, item))
            while waiting:
                result = waiting.popleft().result()
                for item in itertools.islice(rest, 1):
                    waiting.append(threads.submit(work, item))
                yield result
        finally:
            for future in waiting:
                future.cancel()


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


_room, _listener = _Room(PIXELS_AT_ONCE), _Listener()
