"""Decode once, read for ever: every image of a data set as uint8 pixels in one memory-mapped file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from tqdm import tqdm

from finetune101.config import Preprocessing
from finetune101.data.dataset import Index, content_hash
from finetune101.errors import Refused
from finetune101.files import atomic
from finetune101.machine import usable_cores

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
Pixels = NDArray[np.uint8]


def cache_dir() -> Path:
    """$FINETUNE101_CACHE, else ~/.cache/finetune101."""
    return Path(os.environ.get("FINETUNE101_CACHE") or Path.home() / ".cache" / "finetune101").expanduser()


def decode(path: Path, size: int, interpolation: str) -> Pixels:
    """The whole image in RGB, resized to uint8 (size, size, 3). Raises Refused naming a file that cannot be read."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with Image.open(path) as image:
            return np.asarray(_rgb(image).resize((size, size), FILTERS[interpolation]))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(f"cannot read the image {path} ({error}); repair it or add --skip-bad-images") from error


def _rgb(image: Image.Image) -> Image.Image:
    # a palette image with transparency converts by way of RGBA, or Pillow warns
    return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")


class Images:
    """The pixels of ``paths``, decoded on demand or, after ``open_images`` built it, read from the cache file."""

    def __init__(
        self, root: Path, paths: Sequence[str], preprocessing: Preprocessing, file: Path | None = None, key: str = ""
    ) -> None:
        self.root, self.preprocessing = root, preprocessing
        self.key = key  # of all pixels: another one when an image changes
        self.position = {path: i for i, path in enumerate(paths)}
        self.paths = tuple(paths)
        self.pixels: Pixels | None = np.load(file, mmap_mode="r") if file else None
        self._pool = None if file else ThreadPoolExecutor(usable_cores())

    def read(self, paths: Sequence[str]) -> Pixels:
        """uint8 (N, cache_size, cache_size, 3), RGB. Raises Refused naming an unreadable image."""
        if self.pixels is not None:
            return self.pixels[[self.position[path] for path in paths]]
        assert self._pool is not None
        size, interpolation = self.preprocessing.cache_size, self.preprocessing.interpolation
        return np.stack(list(self._pool.map(lambda p: decode(self.root / p, size, interpolation), paths)))


def open_images(
    index: Index, preprocessing: Preprocessing, mode: str = "auto", skipped: Collection[str] = ()
) -> Images:
    """The images of ``index`` but ``skipped``; with ``mode`` "auto" from a cache, built when missing.

    The cache is keyed by the images' content and the geometry, so a changed image makes a new one. Without enough free
    disk space the images are decoded on demand. Raises Refused naming an unreadable image.
    """
    root, paths = index.root, [path for path in index.paths if path not in set(skipped)]
    if mode == "off":
        return Images(root, paths, preprocessing)
    size = preprocessing.cache_size
    geometry = f"{content_hash(index.digests, paths)} {','.join(paths)} {size} {preprocessing.interpolation}"
    key = hashlib.sha256(geometry.encode()).hexdigest()[:16]
    file = cache_dir() / f"images_{size}px_{key}.npy"
    if file.is_file():
        return Images(root, paths, preprocessing, file, key)
    needed = len(paths) * size * size * 3
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(file.parent).free
    except OSError:
        free = 0
    if free < needed * 1.05 + 1e8:
        print(f"The image cache needs {needed / 1e9:.2f} GB, {file.parent} has {free / 1e9:.2f}: going on without it.")
        return Images(root, paths, preprocessing)
    print(f"Decoding {len(paths)} images once into {file} ({needed / 1e9:.2f} GB).")
    with atomic(file) as part:
        _build(part, root, paths, preprocessing)
    return Images(root, paths, preprocessing, file, key)


def _build(part: Path, root: Path, paths: Sequence[str], preprocessing: Preprocessing) -> None:
    size, interpolation = preprocessing.cache_size, preprocessing.interpolation
    pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(paths), size, size, 3))

    def one(i: int) -> None:
        pixels[i] = decode(root / paths[i], size, interpolation)

    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow decodes and resizes without the interpreter lock
        try:
            for _ in tqdm(pool.map(one, range(len(paths))), total=len(paths), desc="decode", unit="img", leave=False):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    pixels.flush()


def unreadable(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """The images that cannot be decoded, with the reason: what ``--skip-bad-images`` leaves out."""

    def reason(path: str) -> tuple[str, str]:
        try:
            decode(root / path, 8, "bilinear")
        except Refused as error:
            return path, str(error)
        return path, ""

    with ThreadPoolExecutor(usable_cores()) as pool:
        checked = tqdm(pool.map(reason, paths), total=len(paths), desc="check images", unit="img", leave=False)
        return {path: why for path, why in checked if why}
