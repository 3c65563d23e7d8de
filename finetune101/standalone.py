"""Labels photos by an exported network, with NumPy, Pillow and ONNX Runtime only: no PyTorch, nothing of finetune101.

finetune101 decodes and labels by this very file. A bundle holds a copy of it, which is a program:
python predict.py photos/ --out labels.csv
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple, TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".heic",
    ".heif",
)  # fmt: skip
"""Endings of the names of image files, in lower case."""
OTHERS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "GIF", "TIFF")
"""Pillow's decoders that may read a file, whatever its name, besides NEEDS. PostScript is not among them."""
NEEDS = {
    "AVIF": "AVIF needs a newer decoder: pip install --upgrade pillow",
    "HEIF": "HEIC needs a decoder: pip install pillow-heif",
}
"""Decoders that may be missing, and what gets them."""
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GRAYSCALE = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
MOST_PIXELS = 89_478_485  # of an image: from here on Pillow warns of decompression bombs
MOST_SIDE = 65_535  # px, that of the largest JPEG: the weights of a resize grow with it
DRAFT_PIXELS = 12_000_000  # JPEGs above are decoded at a part of their size; no image of Caltech-101 has as many
PIXELS_AT_ONCE = 128_000_000  # in all threads together, about 1 GB
WEIGHT_BITS = 15  # of a weight of a resize as a whole number
MOST_PRECISION = 22
EXACT = 2**24  # whole numbers up to here are exact in single precision
BLOCK = 16  # rows of a resize that are counted at once
METADATA = "finetune101"
"""The key of an exported file's metadata: a JSON object about its network."""
PICTURES, RESIZED = "images", "resized"
"""The name of the input: pictures of any size, uint8 (N, H, W, 3), or resized ones, uint8 (N, 3, size, size)."""
MOST_BYTES = 2 * 10**9  # of an exported file: protobuf's own bound
ELSEWHERE = "session.model_external_initializers_file_folder_path"  # ONNX Runtime takes the current folder without it
PASS = 4  # pictures of one forward pass; more are hardly faster and take more memory
DIGITS = 6  # of a probability in a table
UNLIKE_TEXT = "unlike the training pictures"

Pixels = NDArray[np.uint8]
Problem = Literal["unreadable", "truncated", "not an image"]
Item = TypeVar("Item")
Result = TypeVar("Result")


class UnreadableImage(Exception):
    """An image that cannot be decoded: the ``reason`` in words and the kind of ``problem``."""

    def __init__(self, reason: str, problem: Problem = "unreadable") -> None:
        super().__init__(reason)
        self.reason, self.problem = reason, problem


class UnusableFile(Exception):
    """A file of a network that is missing, damaged or of another program; the text says which."""


# --- an image file as pixels: what a viewer shows, upright, in RGB of 8 bits, transparent parts on white


@dataclass(frozen=True)
class Picture:
    """A decoded file: RGB and upright; ``grayscale`` where the file has no colours."""

    image: Image.Image
    grayscale: bool


@contextlib.contextmanager
def open_picture(file: str | BinaryIO, side: int | None = None) -> Iterator[Picture]:
    """The picture in ``file`` as a viewer shows it; memory for it is kept free until the block ends.

    Turned by its EXIF orientation (Pillow's ``exif_transpose``), samples of more than 8 bits scaled to 8, transparent
    parts on white, the first of several frames. A JPEG of more than ``DRAFT_PIXELS`` may be decoded smaller, its sides
    at least twice ``side``. Raises UnreadableImage, whatever a decoder raises.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    pixels = 0
    try:
        try:
            picture, pixels = _load(file, side) if isinstance(file, str) else _load_from(file, side)
        except Exception as error:  # a damaged file can raise nearly anything, MemoryError among it
            raise UnreadableImage(*_reason(error)) from error
        try:
            yield picture
        except MemoryError as error:
            raise UnreadableImage(*_reason(error)) from error
    finally:
        _room.give(pixels)


def formats_of(head: bytes) -> tuple[str, ...]:
    """The decoders that may see a file which begins with ``head`` (64 bytes)."""
    if head[4:8] != b"ftyp":
        return OTHERS
    end = min(len(head), int.from_bytes(head[:4]))
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return ("AVIF",)
    return ("HEIF",) if brands & _HEIF else OTHERS  # a film is no image


def upright(image: Image.Image) -> Image.Image:
    """A copy of a Pillow image in RGB, turned by its EXIF orientation, on white where it is transparent."""
    copy = image.copy()
    return _upright(_rgb(copy), _orientation(image))


def _load(name: str, side: int | None) -> tuple[Picture, int]:
    """The picture, and the pixels of it that ``_room`` must be given back; raises whatever decoders raise."""
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise UnreadableImage("it is no regular file")  # opening a named pipe would wait for ever
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
        raise UnreadableImage(NEEDS[formats[0]])
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
    """Pixels that loading ``image`` makes; large JPEGs are told to come smaller. Raises UnreadableImage."""
    width, height = image.size
    if side and width * height > DRAFT_PIXELS and image.format in ("JPEG", "MPO") and max(width, height) <= MOST_SIDE:
        image.draft(None, (2 * side, 2 * side))  # without a mode the mode stays
        width, height = image.size
    if width * height > MOST_PIXELS:
        millions = width * height / 1e6
        raise UnreadableImage(
            f"it has {millions:.0f} megapixels, more than the {MOST_PIXELS / 1e6:.0f} that are read; shrink it"
        )
    if max(width, height) > MOST_SIDE:
        raise UnreadableImage(
            f"it is {max(width, height)} pixels long, more than the {MOST_SIDE} that are read; shrink it"
        )
    return width * height


def _reason(error: Exception) -> tuple[str, Problem]:
    """What was wrong with a file, in words, and of which kind that is."""
    if isinstance(error, UnreadableImage):
        return error.reason, error.problem
    if isinstance(error, UnidentifiedImageError):
        empty = str(error) == "it is empty"
        return "it is empty" if empty else "no image format that is read here", "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than the {MOST_PIXELS / 1e6:.0f} megapixels that are read; shrink it", "unreadable"
    if isinstance(error, MemoryError):
        return "decoding it takes more memory than there is", "unreadable"
    if isinstance(error, OSError) and error.errno:
        return error.strerror or "it cannot be opened", "unreadable"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
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


_room = _Room(PIXELS_AT_ONCE)


# --- the second resize, from the size that training caches to the network's


@dataclass(frozen=True, eq=False)
class ResizeWeights:
    """``matrix`` (target, source) of whole numbers; a pixel is their sum over ``2 ** precision``, rounded half up."""

    matrix: NDArray[np.floating]
    precision: int

    @property
    def divisor(self) -> int:
        """What the sums are divided by."""
        return int(2**self.precision)


@functools.cache
def resize_weights(source: int, target: int, interpolation: str) -> ResizeWeights:
    """The weights that torchvision's antialiased resize of 8-bit images has, for one side of ``source`` pixels.

    A triangle for "bilinear", the cubic kernel with a = -0.5 for "bicubic", stretched where the picture shrinks
    (Pillow's filters); as whole numbers of the greatest precision that fits into ``WEIGHT_BITS``.
    """
    reach = 2 if interpolation == "bicubic" else 1
    scale = source / target
    stretch = max(scale, 1.0)
    shares = np.zeros((target, source))
    for row in range(target):
        center, support = scale * (row + 0.5), reach * stretch
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), source)
        distances = np.abs(np.arange(first, last) - center + 0.5) / stretch
        values = _cubic(distances) if reach == 2 else np.maximum(0.0, 1 - distances)
        shares[row, first:last] = values / values.sum()
    precision = 0
    while precision < MOST_PRECISION and int(0.5 + shares.max() * 2 ** (precision + 1)) < 2**WEIGHT_BITS:
        precision += 1
    whole = np.trunc(shares * 2**precision + np.where(shares < 0, -0.5, 0.5))
    exact = 255 * np.abs(whole).sum(1).max() < EXACT
    return ResizeWeights(whole.astype(np.float32 if exact else np.float64), precision)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a = -0.5  # Keys, 1981
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_pixels(pixels: Pixels, size: int, interpolation: str) -> Pixels:
    """uint8 (side, side, 3) -> (size, size, 3), as torchvision's antialiased resize gives it, to the last bit."""
    source = pixels.shape[0]
    if source == size:
        return pixels
    weights = resize_weights(source, size, interpolation)
    blocks, planes = _blocks(weights), pixels.transpose(2, 0, 1).astype(weights.matrix.dtype, order="C")
    columns, rows = (np.empty((3, side, size), planes.dtype) for side in (source, size))
    for block, reach, part in blocks:
        columns[:, :, block] = planes[:, :, reach] @ part.T
    _rounded(columns, weights)
    for block, reach, part in blocks:
        rows[:, block] = part @ columns[:, reach]
    return np.ascontiguousarray(_rounded(rows, weights).astype(np.uint8).transpose(1, 2, 0))


def _rounded(sums: NDArray[np.floating], weights: ResizeWeights) -> NDArray[np.floating]:
    """``sums`` over the divisor, rounded half up and within 8 bits, in place."""
    sums += weights.divisor / 2
    sums *= 1 / weights.divisor  # exact: a power of 2
    np.floor(sums, out=sums)
    return np.clip(sums, 0, 255, out=sums)


@functools.cache
def _blocks(weights: ResizeWeights) -> list[tuple[slice, slice, NDArray[np.floating]]]:
    """The matrix in blocks of rows: (rows, the columns that count for them, their weights).

    Blocks leave out most zeros; they are too small for a library of matrices to start threads of its own, in each
    thread that decodes.
    """
    blocks = []
    for start in range(0, len(weights.matrix), BLOCK):
        rows = weights.matrix[start : start + BLOCK]
        used = np.flatnonzero(rows.any(0))
        reach = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((slice(start, start + BLOCK), reach, np.ascontiguousarray(rows[:, reach])))
    return blocks


# --- an exported network


class Outputs(NamedTuple):
    """What a network gives for N pictures, float32."""

    probabilities: NDArray[np.float32]
    """(N, classes), calibrated."""
    features: NDArray[np.float32]
    """(N, D): what the output layer sees."""
    unlike: NDArray[np.float32] | None = None
    """(N,): how unlike the training images each is."""


class Label(NamedTuple):
    """What a network says of one image."""

    file: str
    classes: tuple[tuple[str, float], ...]
    """(name, probability), most probable first."""
    unlike: bool | None = None
    """Whether the image is unlike the training images; None where the network cannot tell."""
    unlike_score: float | None = None


class ExportedNetwork:
    """A network in an ONNX file that finetune101 exported, run by ONNX Runtime on the processor."""

    def __init__(self, file: str, threads: int | None = None, in_place: bool = False) -> None:
        """Opens ``file``. Raises UnusableFile when it is missing, damaged or of another program.

        ``in_place``: weights may lie in other files of its folder, which the file names; for files that one trusts.
        """
        import onnxruntime

        content = file if in_place else _content(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 3
        if not in_place:  # weights in other files are looked for below ``file``, which is no folder: there are none
            options.add_session_config_entry(ELSEWHERE, os.path.abspath(file))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores decode meanwhile
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a damaged file can raise nearly anything
            raise UnusableFile(f"{file} is damaged ({str(error)[:200]})") from error
        self.file, self.metadata = file, str(self.session.get_modelmeta().custom_metadata_map.get(METADATA, ""))
        try:
            values = json.loads(self.metadata or "null")
            self.classes = [str(name) for name in values["classes"]]
            own = values["preprocessing"]
            self.size, self.cache_size = int(own["size"]), int(own["cache_size"])
            self.interpolation, self.input = str(own["interpolation"]), str(values["input"])
            threshold = values.get("unlike_threshold")
            self.threshold = None if threshold is None else float(threshold)
            if self.interpolation not in FILTERS or not self.classes or min(self.size, self.cache_size) < 1:
                raise ValueError("values out of bounds")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UnusableFile(f"{file} does not say of which classes its network is") from error
        if [one.name for one in self.session.get_inputs()] != [self.input]:
            raise UnusableFile(f"{file} has other inputs than its metadata says")
        shapes = {one.name: one.shape for one in self.session.get_outputs()}
        self._outputs = ["probabilities", "features", *(["unlike"] if self.threshold is not None else [])]
        if not shapes.keys() >= set(self._outputs) or shapes["probabilities"][-1] not in (len(self.classes), None):
            raise UnusableFile(f"{file} has other outputs than its metadata says")

    def pixels(self, file: str | BinaryIO) -> Pixels:
        """An image file as the network's input: uint8 (size, size, 3). Raises UnreadableImage."""
        with open_picture(file, self.cache_size) as picture:
            return self.pixels_of(picture.image)

    def pixels_of(self, image: Image.Image) -> Pixels:
        """An upright image in RGB as the network's input: uint8 (size, size, 3)."""
        side = (self.cache_size, self.cache_size)
        cached = np.asarray(image.resize(side, FILTERS[self.interpolation]))
        return resize_pixels(cached, self.size, self.interpolation)

    def outputs(self, pictures: Pixels) -> Outputs:
        """What the network gives for pictures of one size, uint8 (N, H, W, 3).

        A file for pictures of any size resizes them if need be; a file for resized ones takes its own size only.
        """
        if self.input == RESIZED:
            pictures = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
        return Outputs(*self.session.run(self._outputs, {self.input: pictures}))

    def labels(self, pictures: Pixels, files: Sequence[str], top_k: int) -> list[Label]:
        """The ``top_k`` most probable classes of ``pictures``, as ``outputs`` takes them; of equals the first.

        Raises UnusableFile when an output is not finite.
        """
        probabilities, _, scores = self.outputs(pictures)
        if not (np.isfinite(probabilities).all() and (scores is None or np.isfinite(scores).all())):
            raise UnusableFile(f"the output of {self.file} is not finite")
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        rows = zip(probabilities, order, strict=True)
        ranked = [tuple((self.classes[k], float(row[k])) for k in best) for row, best in rows]
        if scores is None or self.threshold is None:
            return [Label(file, classes) for file, classes in zip(files, ranked, strict=True)]
        flags = [score > self.threshold for score in scores.tolist()]
        return [Label(*row) for row in zip(files, ranked, flags, scores.tolist(), strict=True)]


def label_files(
    network: ExportedNetwork, files: Iterable[str], failed: list[tuple[str, str]], top_k: int = 5
) -> Iterator[Label]:
    """The labels of image files, in their order; threads decode while the network runs, and few images are in memory.

    (file, reason) of images that cannot be read are added to ``failed``.
    """
    for paths, pictures in decoded_passes(network.pixels, files, failed):
        yield from network.labels(pictures, paths, top_k)


def decoded_passes(
    pixels_of: Callable[[str], Pixels],
    files: Iterable[str],
    failed: list[tuple[str, str]],
    count: int = PASS,
    threads: int | None = None,
) -> Iterator[tuple[list[str], Pixels]]:
    """The ``files`` that can be read, ``count`` at a time, and their pixels, uint8 (N, H, W, 3).

    ``pixels_of`` is called in threads; (file, reason) where it raises UnreadableImage are added to ``failed``.
    """

    def read(file: str) -> tuple[str, Pixels | str]:
        try:
            return file, pixels_of(file)
        except UnreadableImage as error:
            return file, error.reason

    results = in_threads(read, files, threads)
    with contextlib.closing(results):
        while part := list(itertools.islice(results, count)):
            failed += [(file, result) for file, result in part if isinstance(result, str)]
            good = [(file, result) for file, result in part if not isinstance(result, str)]
            if good:
                yield [file for file, _ in good], np.stack([pixels for _, pixels in good])


def _content(file: str) -> bytes:
    try:
        if not os.path.isfile(file):
            raise UnusableFile(f"there is no file {file}")
        if os.path.getsize(file) > MOST_BYTES:
            raise UnusableFile(f"{file} is larger than an ONNX file can be")
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise UnusableFile(f"{file} cannot be read ({error.strerror})") from error


def usable_cores() -> int:
    """Cores that the process may use: affinity and, in a container, its quota; a smaller OMP_NUM_THREADS counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits, wish = [cores], os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wish.isdecimal() and int(wish):
        limits.append(int(wish))
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
        quota, period = file.read().split()
        limits.append(math.ceil(int(quota) / int(period)))  # "max" is no number
    return max(1, min(limits))


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Generator[Result, None, None]:
    """``work`` of each item, in their order, in ``threads``; few results wait to be taken.

    Pillow decodes and resizes without the interpreter lock. The threads end with the items: a process that has none can
    be forked.
    """
    count, rest, waiting = threads or usable_cores(), iter(items), deque[Future[Result]]()
    with ThreadPoolExecutor(count, "decode") as pool:
        try:
            for item in itertools.islice(rest, 8 * count):
                waiting.append(pool.submit(work, item))
            while waiting:
                result = waiting.popleft().result()
                for item in itertools.islice(rest, 1):
                    waiting.append(pool.submit(work, item))
                yield result
        finally:
            for future in waiting:
                future.cancel()


# --- labels as text and as CSV

# what a spreadsheet takes for a formula (OWASP, "CSV injection")
_FORMULA = re.compile("'*[-=+@]")
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]|\\\\(?=u[0-9a-f]{4})")


def csv_cell(name: str) -> str:
    """``name`` for a CSV file: no formula, no control character, only characters that UTF-8 has.

    A formula begins with ', other characters are \\uNNNN, as is a backslash before what looks like one.
    """
    plain = _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", name)
    return f"'{plain}" if _FORMULA.match(plain) else plain


def csv_header(width: int) -> list[str]:
    """The columns of a table of labels: path, class_1, probability_1, … class_``width``, unlike, unlike_score."""
    classes = [f"{name}_{k + 1}" for k in range(width) for name in ("class", "probability")]
    return ["path", *classes, "unlike", "unlike_score"]


def csv_row(label: Label, width: int) -> list[str]:
    """The cells of ``label`` below ``csv_header``; empty where there is no value."""
    cells = [part for name, share in label.classes for part in (csv_cell(name), f"{share:.{DIGITS}f}")]
    cells += [""] * (2 * (width - len(label.classes)))
    flag = "" if label.unlike is None else str(label.unlike).lower()
    score = "" if label.unlike_score is None else f"{label.unlike_score:.{DIGITS}f}"
    return [csv_cell(label.file), *cells, flag, score]


def write_csv(labels: Iterable[Label], out: TextIO, width: int) -> None:
    """``csv_header`` and a line per label."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(csv_header(width))
    writer.writerows(csv_row(label, width) for label in labels)


def printable(name: str) -> str:
    """``name`` for a terminal: what is no printable character as Python writes it in text."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def text_lines(label: Label, escape: Callable[[str], str] = printable) -> list[str]:
    """The path of an image, and below it its classes with their probability in percent; ``escape`` makes names."""
    lines = [f"  {UNLIKE_TEXT}"] if label.unlike else []
    lines += [f"  {100 * share:5.1f} %  {escape(name)}" for name, share in label.classes]
    return [escape(label.file), *lines]


# --- the program


def image_files(words: Iterable[str], failed: list[tuple[str, str]]) -> list[str]:
    """The image files that ``words`` name, each once; a folder stands for those below it, without hidden ones."""
    files: dict[str, None] = {}
    for word in words:
        if os.path.isdir(word):
            for folder, folders, names in os.walk(word):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                images = (name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")
                files |= dict.fromkeys(os.path.join(folder, name) for name in images)
        elif os.path.isfile(word):
            files[word] = None
        else:
            failed.append((word, "no such file or folder"))
    return list(files)


def counted(labels: Iterable[Label], total: int) -> Iterator[Label]:
    """Passes ``labels`` on, and says on a terminal how many are done and how long the rest takes."""
    started, number = time.monotonic(), 0
    for number, label in enumerate(labels, 1):
        yield label
        if sys.stderr.isatty() and number % PASS == 0:
            left = (time.monotonic() - started) / number * (total - number)
            print(f"\r{number} of {total} images, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty() and number >= PASS:
        print("\r" + " " * 60, end="\r", file=sys.stderr)


def write_table(labels: Iterable[Label], file: str, width: int) -> None:
    """Writes ``labels`` as CSV into ``file``, whole or not at all. Raises OSError."""
    part = f"{file}.{os.getpid()}.part"
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    try:
        with open(part, "w", newline="", encoding="utf-8") as out:
            write_csv(labels, out, width)
        os.replace(part, file)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def main(argv: Sequence[str] | None = None) -> int:
    """Labels the images that the command names; the exit code is 1 when one cannot be read, 2 for a mistake."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "network.onnx")
    parser = argparse.ArgumentParser(description="Label photos. Without --out the labels are printed.")
    parser.add_argument("images", nargs="+", help="image files, and folders of them")
    parser.add_argument("--out", help="write a table into this file (.csv)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out")
    parser.add_argument("--top-k", type=int, default=5, help="classes to show for each image (default: 5)")
    parser.add_argument("--reject", action="store_true", help="give no label to images unlike the training pictures")
    parser.add_argument("--network", default=beside, help="the exported network (default: network.onnx beside this)")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that lacks a letter of a name
    if args.top_k < 1:
        parser.error(f"--top-k is {args.top_k}; give at least 1")
    if args.out and (not args.out.lower().endswith(".csv") or os.path.isdir(args.out)):
        parser.error(f"--out {args.out} is no name of a CSV table; give one such as labels.csv")
    if args.out and os.path.exists(args.out) and not args.overwrite:
        parser.error(f"{args.out} exists; give another --out, or --overwrite")
    failed: list[tuple[str, str]] = []
    files = image_files(args.images, failed)
    if not files and not failed:
        parser.error(f"no image in {' '.join(map(printable, args.images))}; name photos, or a folder that holds some")
    try:
        network = ExportedNetwork(args.network)
        if args.reject and network.threshold is None:
            parser.error(
                "--reject cannot tell which images are unlike the training pictures: the file has no score; omit it"
            )
        labels: Iterable[Label] = counted(label_files(network, files, failed, args.top_k), len(files))
        if args.reject:
            labels = (label._replace(classes=()) if label.unlike else label for label in labels)
        if args.out:
            write_table(labels, args.out, min(args.top_k, len(network.classes)))
            print(f"{len(files) - sum(file in files for file, _ in failed)} images: {args.out}")
        else:
            for label in labels:
                print("\n".join(text_lines(label)), flush=True)
    except BrokenPipeError:  # who read the lines has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 0
    except UnusableFile as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {args.out} ({error.strerror}); give another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for file, reason in failed:
        print(printable(f"failed: {file}: {reason}"), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
